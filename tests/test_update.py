"""Updates from a repository: what fits and is newer is installed, everything else is refused."""

from __future__ import annotations

import base64
import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs
from tuf.api.metadata import Metadata

from edgehp.artifact.manifest import TargetRecord
from edgehp.errors import (
    CompatibilityError,
    DataError,
    EdgehpError,
    EnvironmentalError,
    UsageError,
)
from edgehp.shipping import disk, repository, slots
from edgehp.shipping.offers import Offer, read_memory
from edgehp.shipping.signature import read_public_key
from tests import ship_parts as parts
from tests.faults import deaths, no_flush
from tests.update_parts import Fleet, name_here, new_fleet, served

KEPT = {"lock", "memory.json", "device-id"}


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    with no_flush():
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    with no_flush():
        fleet = new_fleet(tmp_path_factory.mktemp("fleet") / "made", "one", "two")
        for name in ("three", "four"):
            fleet.bundle(name)
        return fleet


@pytest.fixture
def fleet(made: Fleet, tmp_path: Path) -> Fleet:
    """A fleet of its own: two bundles are published."""
    return moved(made, shutil.copytree(made.folder, tmp_path / "fleet"))


def moved(fleet: Fleet, folder: Path) -> Fleet:
    """The fleet that was copied to `folder`."""
    signer = replace(fleet.signer, private=folder / "release.pem", public=folder / "release.pub")
    return Fleet(folder, signer, folder / "root.json")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


def memory(root: Path) -> bytes:
    return (root / "updates" / "memory.json").read_bytes()


def test_the_newest_is_installed_once(fleet: Fleet, root: Path) -> None:
    done = fleet.update(root)
    assert done.slot is not None
    assert (done.slot.artifact_name, done.serial) == ("two", 2)
    again = fleet.update(root)
    assert (again.slot, again.serial) == (None, 2)
    fleet.release("three")
    assert fleet.update(root).serial == 3
    assert name_here(root) == "three"
    # Nothing of a download or of the scratch copy is left.
    assert {p.name for p in (root / "updates").iterdir()} <= KEPT


def test_over_http_and_from_a_file_url(fleet: Fleet, root: Path, tmp_path: Path) -> None:
    with served(fleet.public) as (url, wire):
        assert fleet.update(root, url).serial == 2
        assert fleet.update(root, f"{url}/").slot is None
    assert [p for p, _ in wire.asked if "/targets/" in p] != []
    assert name_here(root) == "two"
    assert fleet.update(tmp_path / "other", f"file://{fleet.public}").serial == 2


def test_a_login_is_sent_to_its_server_alone_and_shown_nowhere(fleet: Fleet, root: Path) -> None:
    with served(fleet.public) as (url, wire), served(fleet.public) as (other, elsewhere):
        login = url.replace("http://", "http://me:hu%40sh@")
        assert fleet.update(root, login).serial == 2
        assert set(wire.logins) == {"Basic " + base64.b64encode(b"me:hu@sh").decode()}
        wire.moved = other
        assert fleet.update(root, login).slot is None
        assert set(elsewhere.logins) == {None}
    with pytest.raises(EnvironmentalError, match="cannot be reached") as caught:
        fleet.update(root, login)
    assert url in str(caught.value) and "@" not in str(caught.value)


def test_a_web_page_in_place_of_a_list_is_named(fleet: Fleet, root: Path) -> None:
    with served(fleet.public) as (url, wire):
        wire.page, wire.login = b"<!doctype html><html>Please log in</html>", True
        with pytest.raises(EnvironmentalError, match=r"timestamp\.json is a web page.*\nhint"):
            fleet.update(root, url)
        # A server that answers a file that it lacks with a page has no newer root.
        wire.login = False
        assert fleet.update(root, url).serial == 2


# --- what fits ------------------------------------------------------------------------------------


def test_what_does_not_fit_is_not_offered(fleet: Fleet, root: Path) -> None:
    device = parts.Device(runtime="1.0")
    with served(fleet.public) as (url, wire):
        done = fleet.update(root, url, device=device)
        assert not [p for p, _ in wire.asked if "/targets/" in p]
    assert done.slot is None
    assert [(o.serial, "onnxruntime" in o.reason) for o in done.passed_over] == [
        (2, True),
        (1, True),
    ]
    # Another runtime later: it fits.
    assert fleet.update(root).serial == 2


def test_an_older_one_that_fits_is_taken(fleet: Fleet, root: Path) -> None:
    # What the newest says of itself is for a board with a GPU.
    path = fleet.add("three")
    staged = fleet.public / ".staged" / "targets.json"
    values = json.loads(staged.read_text())
    custom = values["signed"]["targets"][path]["custom"]["edgehp"]
    custom["target"] = {
        "name": "orin-nx-16gb", "compute_capabilities": ["8.7"], "module": None, "gpu": "Orin",
    }  # fmt: skip
    staged.write_text(json.dumps(values))
    fleet.publish()
    done = fleet.update(root)
    assert (name_here(root), done.serial) == ("two", 2)
    assert [o.serial for o in done.passed_over] == [3]
    assert "8.7" in done.passed_over[0].reason


def test_a_deferred_one_is_for_its_board_alone(fleet: Fleet, root: Path) -> None:
    fleet.release("late", deferred=True)
    assert fleet.update(root).slot is not None
    assert name_here(root) == "late"
    for target, words in (("orin-nx-16gb", "Orin NX"), ("nonesuch", "nonesuch")):
        assert words in str(deferred(target).misfit(parts.Device()))


def deferred(target: str) -> Offer:
    content = "0" * 64
    return Offer("a-3.edgehp", 3, content, "a", "n", "int8", 1, TargetRecord(target), None)


def test_what_failed_here_is_not_offered_again(fleet: Fleet, root: Path) -> None:
    fleet.update(root)
    # Twenty degrees off: its golden vectors do not pass.
    fleet.release("bad", offset=20.0)
    with pytest.raises(CompatibilityError, match=r"20\.0"):
        fleet.update(root)
    assert name_here(root) == "two"
    (reason,) = slots.status(root).failed.values()
    assert "20.0" in reason
    done = fleet.update(root)
    assert done.slot is None
    assert "failed here" in done.passed_over[0].reason
    fleet.release("three")
    assert fleet.update(root).serial == 4


def test_what_was_left_at_a_start_is_not_offered(fleet: Fleet, root: Path) -> None:
    fleet.update(root)
    fleet.release("three")
    fleet.update(root)
    current = slots.status(root).current
    assert current is not None
    engine = current.artifact / "engine.onnx"
    engine.write_bytes(b"rust")
    assert slots.boot(root, parts.here).slot.artifact_name == "two"
    assert fleet.update(root).slot is None


def test_a_rollback_by_hand_is_respected(fleet: Fleet, root: Path) -> None:
    fleet.update(root)
    fleet.release("three")
    fleet.update(root)
    parts.rollback(root)
    assert fleet.update(root).slot is None
    assert name_here(root) == "two"
    fleet.release("four")
    assert fleet.update(root).serial == 4


def test_an_older_bundle_is_never_newer(fleet: Fleet, root: Path) -> None:
    """A list that lost its newest entry brings no older one; a new serial does."""
    fleet.update(root)
    targets = fleet.public / ".staged" / "targets.json"
    fleet.add("three")
    values = json.loads(targets.read_text())
    for path in ("two-2.edgehp", "three-3.edgehp"):
        del values["signed"]["targets"][path]
    targets.write_text(json.dumps(values))
    fleet.publish()
    assert fleet.update(root).slot is None
    shutil.rmtree(root / "slots")
    (root / "state.json").unlink()
    assert fleet.update(root).slot is None  # the serial is remembered
    fleet.release("one")
    assert (fleet.update(root).serial, name_here(root)) == (4, "one")


def test_what_must_happen_before_an_update_is_said_before_it_is_fetched(
    fleet: Fleet, root: Path
) -> None:
    fleet.update(root)
    slots.confirm(root)
    fleet.release("three")
    fleet.update(root)
    fleet.release("four")
    with served(fleet.public) as (url, wire):
        refused(fleet, root, EnvironmentalError, "'edgehp confirm'", where=url)
        assert not [p for p, _ in wire.asked if "/targets/" in p]
    slots.confirm(root)
    assert fleet.update(root).serial == 4


def test_installed_by_hand_counts(fleet: Fleet, root: Path) -> None:
    parts.install(fleet.bundle("two"), fleet.signer, root)
    assert fleet.update(root).slot is None


# --- staged rollout -------------------------------------------------------------------------------


def test_a_share_of_the_devices_is_drawn_by_a_hash_of_their_ids() -> None:
    offer = deferred("cpu")
    ids = [f"device-{i}" for i in range(2000)]

    def offered(content: str, share: int) -> set[str]:
        one = structs.replace(offer, content=content, share=share)
        return {i for i in ids if one.withheld(i) is None}

    five, quarter = offered("0" * 64, 5), offered("0" * 64, 25)
    assert 60 < len(five) < 140 and 430 < len(quarter) < 570  # four deviations
    assert five < quarter < offered("0" * 64, 100) == set(ids)
    # Not the same devices try every bundle first.
    assert len(five & offered("1" * 64, 5)) < len(five) / 2


def test_a_rollout_in_stages(fleet: Fleet, tmp_path: Path) -> None:
    first, last = tmp_path / "first", tmp_path / "last"
    for root in (first, last):
        fleet.update(root)
    path = fleet.add("three", share=5)
    fleet.publish()
    content = repository._staged_or_published(fleet.public).signed.targets[path].custom["edgehp"]
    offer = Offer.from_dict(path, content)
    early = next(i for i in map(str, range(1000)) if offer.withheld(i) is None)
    late = next(i for i in map(str, range(1000)) if "at 9" in str(offer.withheld(i)))

    def decided(root: Path) -> list[tuple[int, str | None]]:
        return [(d.serial, d.reason) for d in read_memory(root / "updates").decisions]

    fleet.rollout(path, state="paused")
    assert fleet.update(first, device_id=early).slot is None
    assert decided(first) == [(3, "its rollout is paused")]
    fleet.rollout(path, share=5)
    assert fleet.update(first, device_id=early).serial == 3
    assert decided(first) == [(3, None)]
    done = fleet.update(last, device_id=late)
    assert done.slot is None and "5 % of the devices" in str(done.passed_over[0].reason)
    fleet.rollout("3", share=100)
    fleet.rollout(path, state="withdrawn")
    assert fleet.update(last, device_id=late).slot is None
    assert decided(last) == [(3, "it was withdrawn by its publisher")]
    # Who has it keeps it, and is told; it cannot be offered again.
    assert fleet.update(first, device_id=early).slot is None
    assert decided(first) == [(3, "it was withdrawn by its publisher")]
    for change in ({"share": 5}, {"state": "paused"}):
        with pytest.raises(UsageError, match="add it again"):
            repository.set_rollout(fleet.public, path, **change)
    with pytest.raises(UsageError, match=r"no bundle 'nonesuch'.*three-3"):
        repository.set_rollout(fleet.public, "nonesuch", share=5)
    fleet.release("two")
    assert fleet.update(first, device_id=early).serial == 4


def test_a_device_without_an_id_draws_one(
    fleet: Fleet, root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("edgehp.shipping.update._MACHINE_ID", tmp_path / "none")
    fleet.update(root)
    drawn = (root / "updates" / "device-id").read_text()
    assert len(drawn) == 32
    fleet.update(root)
    assert (root / "updates" / "device-id").read_text() == drawn


# --- attacks --------------------------------------------------------------------------------------


def refused(fleet: Fleet, root: Path, kind: type[EdgehpError], *words: str, **options: Any) -> str:
    """The update is refused in one clear sentence and changes nothing that is installed."""
    before = name_here(root)
    with pytest.raises(kind) as caught:
        fleet.update(root, **options)
    assert caught.value.exit_code == kind.exit_code
    message = str(caught.value)
    for word in words:
        assert word in message
    sentence = message.partition("\nhint: ")[0]
    assert "\n" not in sentence and len(message) < 700
    assert name_here(root) == before
    return message


def resigned(fleet: Fleet, role: str, change: Callable[[Any], object]) -> None:
    """Change the newest list of a role as whoever holds the keys can, and sign those above it."""
    names = ("targets", "snapshot", "timestamp")
    for name in names[names.index(role) :]:
        path = fleet.metadata / ("timestamp.json" if name == "timestamp" else f"2.{name}.json")
        values = json.loads(path.read_text())
        if name == role:
            change(values["signed"])
        else:
            # Length and hashes are optional; they would have to be made anew.
            meta = values["signed"]["meta"]
            for described in meta.values():
                described.pop("length", None), described.pop("hashes", None)
        item = Metadata[Any].from_dict(values)
        item.signatures.clear()
        item.sign(repository._signer_of(fleet.keys / f"{name}.pem", None))
        path.write_bytes(item.to_bytes())


def put(values: Any, keys: tuple[str, ...], new: Any) -> None:
    for key in keys[:-1]:
        values = values[key]
    values[keys[-1]] = new


@pytest.mark.parametrize(("role", "of"), [("timestamp", "snapshot"), ("snapshot", "targets")])
def test_what_a_list_says_of_the_next_is_bounded(
    fleet: Fleet, tmp_path: Path, role: str, of: str
) -> None:
    wrong = [("version", 10**400), ("version", 2**70), ("length", 10**12), ("length", 2**70)]
    for number, (key, value) in enumerate(wrong):
        resigned(fleet, role, lambda signed: put(signed, ("meta", f"{of}.json", key), value))  # noqa: B023
        refused(fleet, tmp_path / f"root-{number}", CompatibilityError)


PATHS = ("../../evil/x", "/etc/evil", "a" * 64 + "/../../x", "", "A" * 64, "a" * 64 + "\n")
# Every field of a target that becomes a path, a size or the bound of a loop; below ``custom``, and
# below its ``edgehp``, those of the offer.
FIELDS: dict[str, tuple[Any, ...]] = {
    "hashes sha256": PATHS,
    "length": (0, 10**12, 2**70, True),
    "custom": (None, {}, {"edgehp": None}, {"edgehp": [1]}),
    **{f"custom edgehp {key}": values for key, values in {
        "schema": (0, 99, None, "1"),
        "serial": (-1, 2**70, "3", True, None),
        "size": (-1, 2**70, "3", True, None),
        "content": (*PATHS, None, 1),
        "name": (None, 1, "x" * 10_000),
        "network": (None, 1, "x" * 10_000),
        "precision": (None, 1, "x" * 10_000),
        "target": (None, [], {}, {"name": 1}),
        "target name": (None, 1),
        "target compute_capabilities": (None, "8.7", [1]),
        "engine": ([], {}, "x"),
        "engine kind": (None, 1),
        "engine files": (None, "x", [1]),
        "engine versions": (None, [], {"onnxruntime": 1}),
        "share": (0, 101, -5, "5", True, None),
        "state": ("", "other", None, 1),
        "unknown": (1,),
    }.items()},
}  # fmt: skip
NAMES = ("../../evil/x", "/etc/evil", "..", "", "a/b", "x\n", "-rf", "x" * 300)


def test_every_field_from_outside_is_checked_where_it_enters(fleet: Fleet, tmp_path: Path) -> None:
    """Whatever is wrong with a bundle that is newer, it is not taken for one."""

    def spoil(signed: Any) -> None:
        newer = signed["targets"].pop("two-2.edgehp")
        signed["targets"] |= {name: copy.deepcopy(newer) for name in NAMES}
        for field, values in FIELDS.items():
            for number, wrong in enumerate(values):
                spoiled = copy.deepcopy(newer)
                put(spoiled, tuple(field.split()), wrong)
                signed["targets"][f"{field.replace(' ', '-')}-{number}.edgehp"] = spoiled

    resigned(fleet, "targets", spoil)
    (tmp_path / "evil").mkdir()
    before = set(tmp_path.rglob("*"))
    done = fleet.update(tmp_path / "some" / "root")
    assert (done.serial, done.passed_over, done.name) == (1, (), "one-1.edgehp")
    assert {p.relative_to(tmp_path).parts[0] for p in set(tmp_path.rglob("*")) - before} == {"some"}


def test_a_length_of_many_digits(fleet: Fleet, root: Path) -> None:
    with served(fleet.public) as (url, wire):
        wire.length = "9" * 5000
        assert fleet.update(root, url).serial == 2


def test_rollback_of_the_repository(fleet: Fleet, root: Path) -> None:
    old = fleet.folder / "old"
    shutil.copytree(fleet.public, old)
    fleet.release("three")
    fleet.update(root)
    kept = memory(root)
    refused(fleet, root, CompatibilityError, "rollback", "timestamp", where=old)
    assert memory(root) == kept


def test_freeze(fleet: Fleet, root: Path) -> None:
    fleet.publish(days_ago=31)
    refused(fleet, root, CompatibilityError, "freeze", "timestamp.json is expired")
    fleet.publish()
    assert fleet.update(root).slot is not None
    # Now the same list for ever: it is refused once it has expired, also by who has seen it.
    fleet.publish(days_ago=31)
    fleet.add("three")
    message = refused(fleet, root, CompatibilityError, "freeze")
    assert "UTC" in message


@pytest.mark.parametrize(("of", "longer"), [("snapshot", 0), ("snapshot", 1000), ("targets", 0)])
def test_mix_and_match(fleet: Fleet, root: Path, of: str, longer: int) -> None:
    fleet.update(root)
    fleet.release("three")
    old = (fleet.metadata / f"2.{of}.json").read_bytes()
    (fleet.metadata / f"3.{of}.json").write_bytes(old + b" " * longer)
    refused(fleet, root, CompatibilityError, "mix and match")


def test_mixed_bundles(fleet: Fleet, root: Path) -> None:
    """A genuine bundle in the place of another one."""
    (one,) = (fleet.public / "targets").glob("*.one-1.edgehp")
    (two,) = (fleet.public / "targets").glob("*.two-2.edgehp")
    data = one.read_bytes()
    two.write_bytes(data.ljust(two.stat().st_size, b"\0")[: two.stat().st_size])
    refused(fleet, root, CompatibilityError, "not the bundle that is listed")
    assert not list((root / "updates").glob("*.part"))


@pytest.mark.parametrize(
    "path", ["timestamp.json", "2.snapshot.json", "2.targets.json", "/targets"]
)
def test_endless_data(fleet: Fleet, root: Path, path: str) -> None:
    with served(fleet.public) as (url, wire):
        wire.endless = (path,)
        refused(fleet, root, CompatibilityError, "endless data", where=url)
    # What the sockets of both ends take, and no more.
    assert wire.sent < 16 * 2**20
    held = sum(p.stat().st_size for p in root.rglob("*") if p.is_file())
    assert held < 100_000


def test_endless_files_on_a_stick(fleet: Fleet, root: Path) -> None:
    os.truncate(fleet.metadata / "timestamp.json", 2**40)
    refused(fleet, root, CompatibilityError, "endless data", "timestamp")


def test_data_that_drips(fleet: Fleet, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgehp.shipping.fetch._GRACE_S", 0.2)
    with served(fleet.public) as (url, wire):
        wire.drip = {"timestamp": 0.02}
        refused(fleet, root, EnvironmentalError, "bytes a second", where=url)


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets", "root"])
def test_a_key_that_was_stolen_and_rotated(fleet: Fleet, root: Path, role: str) -> None:
    """Who has the old key gets nothing past a device that saw the new root."""
    fleet.update(root)
    stolen = fleet.folder / "stolen"
    shutil.copytree(fleet.keys, stolen)
    fleet.rotate(role)
    versions = fleet.publish()
    assert versions["root"] == 2
    assert fleet.update(root).slot is None  # a rotation alone brings nothing, and is accepted
    # The thief publishes a further bundle (genuine, even) with the keys of before.
    forged = Fleet(fleet.folder / "forged", fleet.signer, fleet.root_metadata)
    shutil.copytree(fleet.public, forged.public)
    repository.add(forged.public, fleet.bundle("three"), fleet.signer.trust)
    shutil.copytree(stolen, forged.keys)
    if role == "root":
        # The other keys are good: with the old root key the thief replaces the root.
        forged_root = forged.metadata / "2.root.json"
        shutil.move(forged_root, forged.folder / "genuine")
        repository.rotate_key(forged.public, "timestamp", forged.keys)
        forged.publish()
        shutil.move(forged_root, forged.metadata / "3.root.json")
        values = json.loads((forged.metadata / "3.root.json").read_text())
        values["signed"]["version"] = 3
        _sign_again(values, forged.keys / "root.pem")
        (forged.metadata / "3.root.json").write_text(json.dumps(values))
        shutil.copyfile(forged.folder / "genuine", forged_root)
    else:
        with pytest.raises(UsageError, match="not the key that the root names"):
            forged.publish()
        # So they leave the new root out while they sign, and put it back afterwards.
        shutil.move(forged.metadata / "2.root.json", forged.folder / "genuine")
        forged.publish()
        shutil.move(forged.folder / "genuine", forged.metadata / "2.root.json")
    message = refused(fleet, root, CompatibilityError, "revoked", where=forged.public)
    assert role in message
    assert name_here(root) == "two"
    # The rightful owner goes on; the thief here has the other keys as well, and used them.
    if role not in ("root", "timestamp"):
        fleet.rotate("snapshot")
        fleet.rotate("timestamp")
    fleet.release("three")
    assert fleet.update(root).serial == 3


def _sign_again(values: dict[str, Any], key: Path) -> None:
    from tuf.api.metadata import Metadata, Root

    item = Metadata[Root].from_dict(json.loads(json.dumps(values)))
    item.sign(repository._signer_of(key, None))
    values.clear()
    values.update(item.to_dict())


def test_versions_that_a_thief_ran_forward(fleet: Fleet, root: Path) -> None:
    """Huge versions and serials are forgotten once the keys that signed them are rotated."""
    staged = fleet.public / ".staged" / "targets.json"
    genuine = fleet.folder / "genuine"
    shutil.copytree(fleet.public, genuine)
    path = fleet.add("one")
    values = json.loads(staged.read_text())
    values["signed"]["targets"][path]["custom"]["edgehp"]["serial"] = 2**50
    staged.write_text(json.dumps(values))
    for _ in range(3):
        fleet.publish()
    assert fleet.update(root).serial == 2**50
    # An old genuine bundle is all that they could bring.
    assert name_here(root) == "one"
    shutil.rmtree(fleet.public)
    shutil.copytree(genuine, fleet.public)
    refused(fleet, root, CompatibilityError, "rollback")
    for role in ("targets", "snapshot", "timestamp"):
        fleet.rotate(role)
    fleet.publish()
    assert (fleet.update(root).serial, name_here(root)) == (2, "two")


def test_all_keys_of_the_repository_put_nothing_on_a_device(
    fleet: Fleet, root: Path, tmp_path: Path
) -> None:
    thief = parts.new_signer(tmp_path, "thief")
    repository.add(fleet.public, parts.bundle(tmp_path, "evil", thief), thief.trust)
    fleet.publish()
    refused(fleet, root, CompatibilityError, "sign")
    # Not held against the content: it says nothing about it.
    assert not slots.status(root).failed


def test_another_repository(fleet: Fleet, root: Path, tmp_path: Path) -> None:
    other = new_fleet(tmp_path / "other", "alien")
    fleet.update(root)
    refused(fleet, root, CompatibilityError, "wrong or revoked key", where=other.public)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"signed": 1}', b"\xff" * 40, b"[" * 10_000])
def test_rubbish(fleet: Fleet, root: Path, text: bytes) -> None:
    (fleet.metadata / "timestamp.json").write_bytes(text)
    refused(fleet, root, CompatibilityError, "no TUF metadata")


def test_incomplete_repositories(fleet: Fleet, root: Path, tmp_path: Path) -> None:
    refused(fleet, root, DataError, "no repository", where=tmp_path)
    (fleet.metadata / "2.targets.json").unlink()
    refused(fleet, root, DataError, "2.targets.json", "complete")


def test_the_root_metadata_of_a_device(fleet: Fleet, root: Path, tmp_path: Path) -> None:
    for content in (None, b"", b"{}", b"x" * 600_000, fleet.bundle("one").read_bytes()):
        wrong = tmp_path / "wrong.json"
        if content is not None:
            wrong.write_bytes(content)
        refused(replace(fleet, root_metadata=wrong), root, UsageError, "wrong.json")
    timestamp = replace(fleet, root_metadata=fleet.metadata / "timestamp.json")
    refused(timestamp, root, UsageError, "no TUF root metadata")


def test_a_memory_that_is_damaged(
    fleet: Fleet, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fleet.update(root)
    data = memory(root)
    for damaged in (data[: len(data) // 2], b"", data.replace(b"timestamp", b"timestamq")):
        (root / "updates" / "memory.json").write_bytes(damaged)
        assert fleet.update(root).slot is None
        assert "damaged" in caplog.text
        assert read_memory(root / "updates").serial == 2


# --- the wire -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranges", "part", "ranges_asked"),
    [
        (True, None, [None, "bytes=1000-", "bytes=1500-"]),
        # A server without ranges sends all of it again.
        (False, None, [None, "bytes=1000-", "bytes=1500-"]),
        # What a power cut left need not be what was written.
        (True, bytes(900), [None, "bytes=1000-", "bytes=900-", None]),
    ],
)
def test_a_download_goes_on_where_it_was_cut(
    fleet: Fleet, root: Path, ranges: bool, part: bytes | None, ranges_asked: list[str | None]
) -> None:
    with served(fleet.public) as (url, wire):
        for cut, length in ((1000, 1000), (500, 1500)):
            wire.cut = {"/targets/": cut}
            refused(fleet, root, EnvironmentalError, "again", where=url)
            (found,) = (root / "updates").glob("*.part")
            assert found.stat().st_size == length
        wire.cut, wire.ranges = {}, ranges
        if part is not None:
            found.write_bytes(part)
        assert fleet.update(root, url).serial == 2
        assert [r for p, r in wire.asked if "/targets/" in p] == ranges_asked


def test_a_part_of_something_else_is_removed(fleet: Fleet, root: Path) -> None:
    with served(fleet.public) as (url, wire):
        wire.cut = {"/targets/": 1000}
        refused(fleet, root, EnvironmentalError, "again", where=url)
        wire.cut = {}
        fleet.release("three")
        assert fleet.update(root, url).serial == 3
    assert not list((root / "updates").glob("*.part"))


def test_servers_that_fail(fleet: Fleet, root: Path) -> None:
    with served(fleet.public) as (url, wire):
        wire.status = {"timestamp": 503}
        refused(fleet, root, EnvironmentalError, "503", where=url)
        wire.status = {"/targets/": 404}
        refused(fleet, root, DataError, "404", where=url)
        wire.status = {"timestamp": 401}
        refused(fleet, root, EnvironmentalError, "another user or password", where=url)
        wire.moved = url
        refused(fleet, root, EnvironmentalError, "leads in a circle", where=url)
        wire.moved = None
        wire.status, wire.cut = {}, {"timestamp": 10}
        refused(fleet, root, EnvironmentalError, "ended after 10 of", where=url)
    refused(fleet, root, EnvironmentalError, "cannot be reached", where=url)


def test_one_update_at_a_time(fleet: Fleet, root: Path) -> None:
    def test(artifact: Path) -> Any:
        with pytest.raises(EnvironmentalError, match="another update"):
            fleet.update(root)
        return parts.here(artifact)

    assert fleet.update(root, selftest=test).serial == 2


def test_no_room(fleet: Fleet, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs

    def full(path: Any) -> Any:
        found = real(path)
        return os.statvfs_result((*found[:4], 1, *found[5:]))

    monkeypatch.setattr(os, "statvfs", full)
    refused(fleet, root, EnvironmentalError, "make room")


# --- the publisher --------------------------------------------------------------------------------


def test_renewing_needs_the_timestamp_key_alone(fleet: Fleet, root: Path) -> None:
    for role in ("root", "targets", "snapshot"):
        (fleet.keys / f"{role}.pem").unlink()
    assert fleet.publish() == {"timestamp": 3}
    assert fleet.update(root).serial == 2
    with pytest.raises(UsageError, match=r"targets\.pem"):
        fleet.release("three")
    # A key that is missing changes nothing that is public.
    assert fleet.update(root).slot is None


def test_lists_are_renewed_in_time(fleet: Fleet, root: Path) -> None:
    assert set(fleet.publish(days_ago=-200)) == {"timestamp", "snapshot", "targets"}
    assert fleet.update(root).serial == 2


def test_keys_are_private_and_may_be_encrypted(tmp_path: Path) -> None:
    repository.init(tmp_path / "r", tmp_path / "keys", password="secret")
    assert (tmp_path / "keys").stat().st_mode & 0o777 == 0o700
    for role in repository.ROLES:
        path = tmp_path / "keys" / f"{role}.pem"
        assert path.stat().st_mode & 0o777 == 0o600
        assert b"ENCRYPTED" in path.read_bytes()
    for password, words in ((None, "is encrypted and no password"), ("wrong", "does not open")):
        with pytest.raises(UsageError, match=words):
            repository.publish(tmp_path / "r", tmp_path / "keys", password=password)
    repository.publish(tmp_path / "r", tmp_path / "keys", password="secret")


def test_private_keys_never_lie_in_what_is_public(fleet: Fleet, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "r")
    for keys in ("r", "r/keys", "link/keys"):
        with pytest.raises(UsageError, match="inside the repository"):
            repository.init(tmp_path / "r", tmp_path / keys)
        assert not (tmp_path / "r").exists()
    with pytest.raises(UsageError, match="inside the repository"):
        repository.rotate_key(fleet.public, "timestamp", fleet.public / "metadata")
    # Nor does anything become public that was there before.
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "diary").touch()
    with pytest.raises(UsageError, match="not empty"):
        repository.init(tmp_path / "home", tmp_path / "keys")


def test_a_key_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write

    def full(descriptor: int, data: bytes) -> int:
        if len(data) < 60:
            raise OSError(28, "No space left on device")
        return real(descriptor, data[: len(data) // 2])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(EnvironmentalError, match="No space left"):
        repository.init(tmp_path / "r", tmp_path / "keys")
    assert not list((tmp_path / "keys").iterdir())
    monkeypatch.undo()
    repository.init(tmp_path / "r", tmp_path / "keys")


def test_the_root_key_is_rotated_and_published_before_any_other(fleet: Fleet, root: Path) -> None:
    fleet.update(root)
    fleet.rotate("timestamp")
    fleet.rotate("root")
    for role in ("root", "timestamp"):
        with pytest.raises(UsageError, match="not public yet"):
            fleet.rotate(role)
    fleet.release("three")
    assert fleet.update(root).serial == 3
    fleet.rotate("root")
    fleet.release("four")
    assert fleet.update(root).serial == 4
    assert sorted(n for n in read_memory(root / "updates").files if "root" in n) == [
        "1.root.json", "2.root.json", "3.root.json",
    ]  # fmt: skip


def test_a_publisher_that_dies(fleet: Fleet, tmp_path: Path, seed: int) -> None:
    """Devices see the lists of before or the new ones; publishing again completes it."""
    fleet.update(tmp_path / "seen")
    fleet.add("three")
    seen = set()
    for _, folder in deaths(lambda folder: moved(fleet, folder).publish(), fleet.folder, 7, seed):
        root = shutil.copytree(tmp_path / "seen", tmp_path / folder.name)
        there = moved(fleet, folder)
        seen.add(there.update(root).serial)
        there.publish()
        there.update(root)
        assert name_here(root) == "three"
    assert seen <= {2, 3} and 2 in seen


def test_two_publishers(fleet: Fleet) -> None:
    with (
        disk.locked(fleet.public / ".staged" / "lock"),
        pytest.raises(EnvironmentalError, match="somebody else"),
    ):
        fleet.publish()


def test_what_a_publisher_does_wrong(fleet: Fleet, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="already"):
        repository.init(fleet.public, fleet.keys)
    with pytest.raises(UsageError, match="already"):
        fleet.add("two")
    with pytest.raises(DataError, match="no repository"):
        repository.add(tmp_path, fleet.bundle("one"), fleet.signer.trust)
    with pytest.raises(DataError, match="no repository"):
        repository.publish(tmp_path, fleet.keys)
    stranger = parts.new_signer(tmp_path, "stranger")
    with pytest.raises(CompatibilityError, match="sign"):
        repository.add(fleet.public, fleet.bundle("one"), [read_public_key(stranger.public)])
    shutil.copyfile(stranger.private, fleet.keys / "root.pem")
    with pytest.raises(UsageError, match="not the root key"):
        fleet.rotate("targets")
    assert not (fleet.public / ".staged" / "root.json").exists()
