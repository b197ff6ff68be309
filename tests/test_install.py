"""Two slots: what runs stays until something else has proved itself, and comes back if it fails."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from edgehp.cli.main import main
from edgehp.errors import AccuracyError, CompatibilityError, DataError, EnvironmentalError
from edgehp.files import sha256_file
from edgehp.progress import Step, listening
from edgehp.shipping import disk, slots
from edgehp.shipping.bundle import verify_bundle
from edgehp.shipping.selftest import SelfTestResult, run_self_test, self_test
from tests import ship_parts as parts
from tests.faults import no_flush


def start(root: Path) -> slots.Boot[SelfTestResult]:
    return slots.boot(root, parts.here)


@dataclass(frozen=True)
class Shop:
    """Bundles by name, and a root to install them into."""

    folder: Path
    signer: parts.Signer
    root: Path

    def bundle(self, name: str, **options: Any) -> Path:
        return parts.bundle(self.folder, name, self.signer, **options)

    def install(self, *names: str, **options: Any) -> slots.Slot:
        found = [parts.install(self.bundle(n), self.signer, self.root, **options) for n in names]
        return found[-1]

    def rollback(self, **options: Any) -> slots.Slot:
        return parts.rollback(self.root, **options)

    def boot(self) -> slots.Boot[SelfTestResult]:
        return start(self.root)

    def current(self) -> str:
        return slots.current(self.root).artifact_name


@pytest.fixture
def waited(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds of the pauses of a start, which nobody waits for."""
    pauses: list[float] = []
    monkeypatch.setattr("time.sleep", pauses.append)
    return pauses


@pytest.fixture
def shop(tmp_path: Path, waited: list[float]) -> Iterator[Shop]:
    with no_flush():
        yield Shop(tmp_path, parts.new_signer(tmp_path), tmp_path / "device" / "edgehp")


def damage(slot: slots.Slot, file: str = "engine.onnx") -> None:
    path = slot.artifact / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


# --- installing -----------------------------------------------------------------------------------


class Heard:
    """The names of the steps that begin."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def begin(self, step: Step) -> Callable[[], None]:
        self.names.append(step.name)
        return lambda: None

    def end(self, step: Step, completed: bool) -> None:
        pass


def test_install_upgrade_and_the_way_back(shop: Shop) -> None:
    with pytest.raises(DataError, match="no such directory"):
        slots.status(shop.root)
    for call in (start, slots.confirm, slots.rollback):
        with pytest.raises(DataError, match="nothing is installed"):
            call(shop.root)
    with listening(heard := Heard()):
        first = shop.install("one")
    assert heard.names == ["unpack", "self-test", "switch"]
    assert (first.name, first.sequence, first.built_here) == ("a", 1, False)
    assert first.selftest.worst_degrees < 0.01
    with pytest.raises(DataError, match="no other slot"):
        shop.rollback()
    assert shop.install("two").name == "b"
    assert shop.install("three").name == "a"
    found = slots.status(shop.root)
    assert found.current is not None and found.other is not None
    assert (found.current.artifact_name, found.other.artifact_name) == ("three", "two")
    assert found.current == slots.current(shop.root) == shop.boot().slot
    assert shop.rollback().artifact_name == "two"
    assert shop.rollback().artifact_name == "three"
    left = {"lock", "slots", "state.json", "state.lock"}
    assert {p.name for p in shop.root.iterdir()} == left
    assert {p.name for p in (shop.root / "slots").iterdir()} == {"a", "b"}
    # Whoever may open a lock file may hold it, and with it every start and every installation.
    for name in ("lock", "state.lock"):
        assert (shop.root / name).stat().st_mode & 0o777 == 0o600


def test_what_is_installed_already_is_left_alone(shop: Shop) -> None:
    first = shop.install("one")
    assert shop.install("one", selftest=None) == first  # nothing is run
    damage(first)
    assert shop.install("one").name == "b"
    assert shop.boot().slot.name == "b"


def test_only_a_broken_current_slot_is_overwritten(shop: Shop) -> None:
    shop.install("one")
    damage(shop.install("two"))
    third = shop.install("three")
    assert third.name == "b"
    assert shop.rollback().artifact_name == "one"


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("skewed", {"offset": 3.0}, r"3\.00 degrees off"),
        ("slow", {"budget": 1e-6}, "the manifest allows"),
    ],
)
def test_what_fails_its_self_test_is_not_installed(
    shop: Shop, name: str, options: dict[str, Any], words: str
) -> None:
    shop.install("one")
    shop.bundle(name, **options)
    with pytest.raises(CompatibilityError, match=words):
        shop.install(name)
    assert shop.current() == "one"
    assert [p.name for p in (shop.root / "slots").iterdir()] == ["a"]
    # Without a budget the time is not judged.
    shop.bundle("free", budget=None)
    assert shop.install("free").selftest.max_latency_ms is None


def test_another_device_is_refused_before_anything_is_unpacked(shop: Shop) -> None:
    with pytest.raises(CompatibilityError, match="older"), listening(heard := Heard()):
        shop.install("one", device=parts.Device("1.0"))
    with pytest.raises(EnvironmentalError, match="not installed"):
        shop.install("one", device=parts.Device(None))
    assert heard.names == []
    assert not shop.root.exists()


def test_no_space(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.install("one")
    full = os.statvfs_result((4096, 4096, *[100] * 8))
    monkeypatch.setattr(os, "statvfs", lambda path: full)
    with pytest.raises(EnvironmentalError, match=r"0 MiB free, 32 MiB are needed"):
        shop.install("two")
    assert shop.current() == "one"


def test_one_installer_at_a_time(shop: Shop) -> None:
    shop.install("one")
    with disk.locked(shop.root / "lock"):
        with pytest.raises(EnvironmentalError, match="another installer"):
            shop.install("two")
        with pytest.raises(EnvironmentalError, match="another installer"):
            shop.rollback()
        # What runs may start all the same.
        assert shop.boot().slot.artifact_name == "one"
    assert shop.install("two").artifact_name == "two"


def test_what_runs_can_be_confirmed_while_a_rollback_tests(shop: Shop) -> None:
    shop.install("one", "two")
    shop.boot()

    def test(artifact: Path) -> SelfTestResult:
        # A runtime that had to wait here would be killed by its watchdog.
        slots.confirm(shop.root)
        return parts.here(artifact)

    assert shop.rollback(selftest=test).artifact_name == "one"
    assert slots.status(shop.root).unconfirmed_starts == 0


@contextmanager
def another_user() -> Iterator[None]:
    """Without the rights of root, where the test has them."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("deferred", [False, True])
def test_what_root_installs_from_a_careful_shell_runs_for_the_service(
    shop: Shop, deferred: bool
) -> None:
    shop.bundle("one", deferred=deferred)
    before = os.umask(0o077)
    try:
        shop.install("one")
        shop.boot()
    finally:
        os.umask(before)
    for path in (shop.root, *shop.root.rglob("*")):
        mode = path.stat().st_mode & 0o777
        if "lock" not in path.name:
            assert mode == (0o755 if path.is_dir() else 0o644), path


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make files of somebody else")
def test_the_service_and_root_share_the_locks(shop: Shop) -> None:
    # Without it the service would count its starts unlocked, and may undo a switch.
    shop.root.mkdir(parents=True)
    os.chown(shop.root, 65534, 65534)
    shop.install("one")
    for name in ("lock", "state.lock"):
        status = (shop.root / name).stat()
        assert (status.st_uid, status.st_mode & 0o777) == (65534, 0o600)
    # One that is there already is never given away.
    other = shop.root / "other.lock"
    other.touch(0o600)
    with disk.locked(other):
        assert other.stat().st_uid == 0


def test_what_cannot_be_read_is_not_called_empty(tmp_path: Path) -> None:
    with no_flush(), tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        shop = Shop(tmp_path, parts.new_signer(tmp_path), Path(folder, "root"))
        shop.install("one")
        for closed in (shop.root, shop.root / "slots"):
            closed.chmod(0)
            with another_user():
                for call in (slots.status, start, slots.confirm, slots.rollback):
                    with pytest.raises(EnvironmentalError, match="cannot be read by this user"):
                        call(shop.root)
            closed.chmod(0o755)
        assert shop.boot().slot.artifact_name == "one"


def test_nobody_waits_for_the_self_test_of_a_start(shop: Shop) -> None:
    shop.install("one", "two")
    opened: list[str] = []
    closed: list[str] = []

    def test(artifact: Path) -> str:
        opened.append(artifact.parent.name)
        if len(opened) == 1:
            # Somebody goes back meanwhile: what is started is what is current then.
            assert shop.rollback().name == "a"
            assert slots.status(shop.root).unconfirmed_starts == 0
        return opened[-1]

    found = slots.boot(shop.root, test, discard=closed.append)
    # What was opened for a slot that is not run is closed.
    assert (opened, closed, found.tested) == (["b", "a"], ["b"], "a")
    assert (found.slot.artifact_name, found.fell_back) == ("one", None)
    after = slots.status(shop.root)
    assert after.current is not None and after.current.artifact_name == "one"
    assert (after.unconfirmed_starts, after.failed) == (1, {})


def test_an_installation_during_a_start_that_fails_is_not_undone(shop: Shop) -> None:
    shop.install("one", "two")
    damage(slots.current(shop.root))
    tested: list[str] = []

    def test(artifact: Path) -> SelfTestResult:
        tested.append(artifact.parent.name)
        if len(tested) == 2:
            # While the slot to fall back to is tested.
            shop.install("three")
        return parts.here(artifact)

    assert slots.boot(shop.root, test).slot.artifact_name == "three"
    assert shop.current() == "three"


def test_what_a_dead_installer_left_is_removed(shop: Shop) -> None:
    shop.install("one")
    (shop.root / "slots" / ".staging-0badc0de" / "artifact").mkdir(parents=True)
    (shop.root / "slots" / ".old-0badc0de").mkdir()
    (shop.root / ".state.json.0badc0de").write_text("half")
    shop.install("two")
    assert sorted(p.name for p in (shop.root / "slots").iterdir()) == ["a", "b"]
    assert not list(shop.root.glob(".state*"))


# --- deferred -------------------------------------------------------------------------------------


def test_a_deferred_artifact_is_built_in_its_slot(shop: Shop) -> None:
    shop.install("one")
    bundle = shop.bundle("late", deferred=True)
    slot = shop.install("late")
    assert slot.built_here
    manifest = json.loads((slot.artifact / "manifest.json").read_text())
    assert manifest["state"] == "complete"
    # The digest names what was signed; the record has the hash of what was built.
    assert slot.digest == verify_bundle(bundle, shop.signer.trust).digest
    assert slot.manifest_sha256 == sha256_file(slot.artifact / "manifest.json")
    assert "engine.onnx" in {f["path"] for f in manifest["files"]}
    assert shop.boot().slot == slot
    assert shop.install("late", finisher=None) == slot  # not built again
    damage(slot)
    assert shop.boot().slot.artifact_name == "one"


def test_a_build_that_fails_leaves_what_runs(shop: Shop) -> None:
    shop.install("one")
    shop.bundle("late", deferred=True)

    def inaccurate(path: Path) -> None:
        raise AccuracyError("drops 2 degrees")

    with pytest.raises(AccuracyError):
        shop.install("late", finisher=inaccurate)
    # The default is the real build, which finds no TensorRT target behind "cpu".
    with pytest.raises(CompatibilityError, match="recipe"):
        shop.install("late", finisher=None)
    assert shop.current() == "one"
    assert [p.name for p in (shop.root / "slots").iterdir()] == ["a"]


# --- starting -------------------------------------------------------------------------------------


def test_three_starts_without_confirmation_lead_back(shop: Shop) -> None:
    shop.install("one", "two")
    for expected in (1, 2, 3):
        assert shop.boot().fell_back is None
        assert slots.status(shop.root).unconfirmed_starts == expected
    back = shop.boot()
    assert back.slot.artifact_name == "one"
    assert back.fell_back is not None and "3 times" in back.fell_back
    found = slots.status(shop.root)
    assert found.unconfirmed_starts == 1
    assert found.other is not None and list(found.failed) == [found.other.digest]
    # The one that was left is not returned to, however often this one fails to confirm.
    for _ in range(5):
        assert shop.boot().slot.artifact_name == "one"


def test_confirmed_starts_are_not_counted(shop: Shop) -> None:
    shop.install("one", "two")
    for _ in range(5):
        assert shop.boot().slot.artifact_name == "two"
        slots.confirm(shop.root)
    assert slots.status(shop.root).unconfirmed_starts == 0


def test_a_start_that_is_counted_can_be_confirmed(shop: Shop) -> None:
    shop.install("one")
    # As one that another user made: it cannot be opened.
    (shop.root / "state.lock").unlink()
    (shop.root / "state.lock").symlink_to("elsewhere")
    shop.boot()
    assert slots.status(shop.root).unconfirmed_starts == 1
    slots.confirm(shop.root)
    assert slots.status(shop.root).unconfirmed_starts == 0


def test_the_last_slot_that_was_confirmed_is_not_overwritten(shop: Shop) -> None:
    shop.install("one")
    shop.boot()
    slots.confirm(shop.root)
    shop.install("two")
    before = slots.status(shop.root)
    assert not before.confirmed
    # It passed its self-test here, as everything that is installed; it was never run.
    with pytest.raises(
        EnvironmentalError, match=r"(?s)slot b \(two\) was not confirmed yet.* confirm"
    ):
        shop.install("three")
    assert slots.status(shop.root) == before
    shop.boot()
    slots.confirm(shop.root)
    assert slots.status(shop.root).confirmed
    assert shop.install("three").name == "a"
    # Or back to the one that was confirmed: then the other can be spared.
    shop.rollback()
    assert shop.install("four").name == "a"
    # One that rotted protects nothing.
    damage(next(s for n in "ab" if (s := slots.read_slot(shop.root, n)).artifact_name == "two"))
    assert shop.install("five").name == "b"


def test_another_slot_is_not_confirmed_for_the_one_that_ran(shop: Shop) -> None:
    shop.install("one")
    started = shop.boot().slot
    shop.install("two")
    slots.confirm(shop.root, started)
    assert not slots.status(shop.root).confirmed
    slots.confirm(shop.root, shop.boot().slot)
    assert slots.status(shop.root).confirmed


def late(tries: int) -> Callable[[Path], SelfTestResult]:
    """The self-test with a driver that is there after so many tries."""
    left = iter(range(tries))

    def test(artifact: Path) -> SelfTestResult:
        if next(left, None) is not None:
            raise EnvironmentalError("the driver is not there")
        return parts.here(artifact)

    return test


def test_a_driver_that_comes_late_counts_against_nobody(shop: Shop, waited: list[float]) -> None:
    shop.install("one")
    shop.boot()
    slots.confirm(shop.root)
    shop.install("two")
    found = slots.boot(shop.root, late(5))
    assert (found.slot.artifact_name, found.fell_back) == ("two", None)
    assert 1 < sum(waited) < slots.PATIENCE_S
    before = slots.status(shop.root)
    assert before.unconfirmed_starts == 1
    # One that never comes: no other slot, no start counted, and an end.
    for _ in range(slots.MAX_FAILED_STARTS + 1):
        waited.clear()
        with pytest.raises(EnvironmentalError, match="driver is not there"):
            slots.boot(shop.root, late(1000))
        assert sum(waited) <= slots.PATIENCE_S
        assert slots.status(shop.root) == before
    assert shop.boot().slot.artifact_name == "two"


@pytest.mark.parametrize("file", ["engine.onnx", "golden.png", "manifest.json", "../record.json"])
def test_a_slot_that_rots_is_left(shop: Shop, file: str) -> None:
    shop.install("one")
    damage(shop.install("two"), file)
    back = shop.boot()
    assert back.slot.artifact_name == "one"
    assert back.fell_back
    assert shop.boot().fell_back is None


def test_neither_slot_passes(shop: Shop) -> None:
    damage(shop.install("one"))
    with pytest.raises(CompatibilityError, match="no other slot"):
        shop.boot()
    damage(shop.install("two"))
    with pytest.raises(
        CompatibilityError, match=r"slot b: .*; slot a: .*\nhint: install a bundle$"
    ):
        shop.boot()
    with pytest.raises(CompatibilityError):
        shop.rollback()
    assert shop.current() == "two"

    def no_driver(path: Path) -> SelfTestResult:
        raise EnvironmentalError("no driver")

    shop.install("three")
    slots.confirm(shop.root)
    with pytest.raises(EnvironmentalError, match="no driver"):
        slots.boot(shop.root, no_driver)


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"\x00" * 300, b"[" * 1000, b'{"schema": 1}', None]
)
def test_a_lost_state_is_rebuilt(shop: Shop, content: bytes | None) -> None:
    shop.install("one", "two")
    path = shop.root / "state.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert shop.boot().slot.artifact_name == "two"
    assert shop.install("three").name == "a"


def test_a_disk_that_cannot_be_written_does_not_stop_what_works(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop.install("one")

    def refused(*arguments: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(disk, "write_file", refused)
    assert shop.boot().slot.artifact_name == "one"
    with pytest.raises(EnvironmentalError, match="Read-only"):
        shop.install("two")


# --- the self-test as it really runs --------------------------------------------------------------


def test_the_self_test_runs_in_a_process_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = parts.tiny_artifact(tmp_path / "good")
    # A module of that name in the current folder, as on a prepared USB stick, is not imported.
    (tmp_path / "json.py").write_text("raise SystemExit('imported from the current folder')")
    monkeypatch.chdir(tmp_path)
    assert run_self_test(Path("good")).worst_degrees == self_test(artifact).worst_degrees
    skewed = parts.tiny_artifact(tmp_path / "skewed", offset=-2.0)
    with pytest.raises(CompatibilityError, match=r"2\.00 degrees off"):
        run_self_test(skewed)
    monkeypatch.setattr("edgehp.shipping.selftest._TIMEOUT_S", 0.01)
    with pytest.raises(CompatibilityError, match="no answer within"):
        run_self_test(artifact)


def test_an_engine_that_crashes_or_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgehp.shipping import selftest

    monkeypatch.setattr(selftest, "_CODE", "import os; os.abort()")
    with pytest.raises(CompatibilityError, match=r"crashed in the self-test \(signal 6\)"):
        run_self_test(tmp_path)
    monkeypatch.setattr(selftest, "_CODE", "print('hello'); raise SystemExit(3)")
    with pytest.raises(CompatibilityError, match="ended with 3 and no answer"):
        run_self_test(tmp_path)


# --- commands -------------------------------------------------------------------------------------


def test_the_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    signer = parts.new_signer(tmp_path)
    parts.bundle(tmp_path, "one", signer)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EDGEHP_ROOT", str(tmp_path / "root"))

    def edgehp(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(list(arguments))
        out = capfd.readouterr()
        return int(caught.value.code or 0), out.out, out.err

    code, out, _ = edgehp("verify", "one.edgehp", "--public-key", "key.pub", "--json")
    assert (code, json.loads(out)["name"]) == (0, "one")
    code, out, err = edgehp("install", "one.edgehp", "--public-key", "key.pub")
    assert code == 0, err
    assert out.startswith("slot a (current): one")
    steps = [re.sub(r"edgehp: (.*): [\d.]+ s", r"\1", line) for line in err.splitlines()]
    assert steps == ["verify", "unpack", "self-test", "switch"], err
    code, out, _ = edgehp("status", "--json")
    assert json.loads(out)["current"]["artifact_name"] == "one"
    code, out, _ = edgehp("confirm")
    assert code == 0 and "slot a (current, confirmed): one" in out
    code, out, _ = edgehp("status", "--json")
    found = json.loads(out)
    assert found["confirmed"] and found["offers"] == []
    manifest = json.loads((tmp_path / "root/slots/a/artifact/manifest.json").read_text())
    hashes = {f["path"]: f["sha256"] for f in manifest["files"]}
    assert found["current"]["identity"] == {
        "rxswin": None,
        "manifest": found["current"]["manifest_sha256"],
        "engine": {"engine.onnx": hashes["engine.onnx"]},
        "network": manifest["network"]["digest"],
        "weights": manifest["network"]["weights_sha256"],
        "preprocessing": manifest["preprocessing"]["digest"],
    }
    code, _, err = edgehp("rollback")
    assert code == 1 and "no other slot" in err
    parts.new_signer(tmp_path, "other")
    code, _, err = edgehp("install", "one.edgehp", "--public-key", "other.pub")
    assert code == 4 and "trusted" in err
    code, _, err = edgehp("install", "one.edgehp")
    assert code == 2 and "--public-key" in err
