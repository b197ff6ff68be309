"""Two slots on the device: install, switch, start, confirm, roll back.

Under the root directory::

    lock            flock of the one installer
    state.lock      flock held while state.json or a slot is replaced, never while one is tested
    state.json      which slot is current, starts that were not confirmed, what failed
    slots/a/        record.json and artifact/
    slots/b/
    slots/.staging-XXXXXXXX/    an installation in progress; a dead one is removed by the next

`state.json` is replaced by one rename; everything it names was flushed to disk before. It and the
records hold a digest of their own, so that a damaged one is noticed.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import msgspec
from msgspec.structs import replace

from edgehp.artifact import load_artifact
from edgehp.artifact.check import check_device, read_manifest
from edgehp.artifact.manifest import MANIFEST_NAME
from edgehp.device import HostProbe
from edgehp.errors import (
    AccuracyError,
    CompatibilityError,
    DataError,
    EdgehpError,
    EnvironmentalError,
)
from edgehp.files import Record, sha256_file
from edgehp.progress import step
from edgehp.shipping import disk
from edgehp.shipping.bundle import VerifiedBundle
from edgehp.shipping.selftest import SelfTestResult, run_self_test

logger = logging.getLogger(__name__)

T = TypeVar("T")

ROOT_VARIABLE = "EDGEHP_ROOT"
SLOT_NAMES = ("a", "b")
MAX_FAILED_STARTS = 3
_DEFAULT_ROOT = "/var/lib/edgehp"
_STATE = "state.json"
_RECORD = "record.json"
_LARGEST = 256 * 1024
_SCHEMA = 2
# Reasons are kept for people; eight are more than two slots can hold.
_FAILURES_KEPT = 8
# Records, folders and the file system's own bookkeeping.
_SPARE_BYTES = 32 * 2**20
# Building here: the unpacked files, the writer's copy of them, and an engine with its caches.
_DEFERRED_FACTOR = 4
# How often a start begins anew because slots changed below it; each takes an installation.
_TRIES = 5
# How long a start waits for a driver that comes late at boot, and between its tries.
PATIENCE_S = 60.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 5.0


class Slot(Record, frozen=True, kw_only=True):
    """An installed slot.

    Attributes:
        name: ``"a"`` or ``"b"``.
        artifact: the artifact directory, for `edgehp.artifact.load_artifact`.
        digest: of the bundle it came from (`VerifiedBundle.digest`).
        signer: who signed that bundle.
        artifact_name: of the manifest.
        sequence: counts installations on this device; the larger is the newer.
        manifest_sha256: of the manifest in the slot; differs from the signed one where the engine
            was built here.
        built_here: the engine was built on this device from a deferred bundle.
        selftest: what the golden vectors gave at installation.
    """

    name: Literal["a", "b"]
    artifact: Path
    digest: str
    signer: str
    artifact_name: str
    sequence: int
    manifest_sha256: str
    built_here: bool
    selftest: SelfTestResult

    def to_dict(self) -> dict[str, Any]:
        """A dictionary for JSON."""
        values: dict[str, Any] = msgspec.to_builtins(self, enc_hook=str)
        return values


class State(Record, frozen=True):
    """Which slot is current.

    Attributes:
        current: its name, None where nothing is installed.
        sequence: of the newest installation.
        starts: of the current slot that nobody confirmed.
        confirmed: `Slot.sequence` of those that were reported to run well.
        failed: digest of a bundle -> why it was left.
    """

    current: Literal["a", "b"] | None = None
    sequence: int = 0
    starts: int = 0
    confirmed: tuple[int, ...] = ()
    failed: dict[str, str] = msgspec.field(default_factory=dict)

    def with_failure(self, digest: str, reason: str) -> dict[str, str]:
        """`failed` and one more; the oldest are forgotten."""
        kept = {**self.without_failure(digest), digest: reason[:500]}
        return dict(list(kept.items())[-_FAILURES_KEPT:])

    def without_failure(self, digest: str) -> dict[str, str]:
        """`failed` without the one of `digest`."""
        return {k: v for k, v in self.failed.items() if k != digest}


@dataclass(frozen=True)
class Status:
    """What is installed.

    Attributes:
        root: the root directory.
        current: the slot in use, None where nothing is installed.
        other: the slot to return to, None where there is none.
        unconfirmed_starts: starts of the current slot since the last `confirm`.
        confirmed: whether the current slot was ever reported to run well.
        failed: digest -> reason, of bundles that failed here and of slots that were left.
    """

    root: Path
    current: Slot | None
    other: Slot | None
    unconfirmed_starts: int
    confirmed: bool
    failed: dict[str, str]


@dataclass(frozen=True)
class Boot(Generic[T]):
    """The answer to `boot`.

    Attributes:
        slot: to run.
        tested: what the test of it gave, such as its opened engine.
        fell_back: why the slot that was current before was left, None where it was kept.
    """

    slot: Slot
    tested: T
    fell_back: str | None


def default_root() -> Path:
    """``$EDGEHP_ROOT``, else ``/var/lib/edgehp``."""
    return Path(os.environ.get(ROOT_VARIABLE) or _DEFAULT_ROOT)


# --- installing -----------------------------------------------------------------------------------


def install(
    bundle: VerifiedBundle, root: Path, *, finisher: Callable[[Path], None] | None = None
) -> Slot:
    """Unpack a verified bundle into the slot that is not current, test it and switch to it.

    Killed at any moment, the current slot is the old one or the new one, whole and tested.
    Installing what is already current does nothing and returns it. A bundle that cannot be built
    or fails its self-test is noted in `Status.failed`.

    Args:
        bundle: see `edgehp.shipping.bundle.verify_bundle`.
        root: made if it does not exist.
        finisher: builds the engine of the deferred artifact in a directory, in place;
            `edgehp build --finish` when omitted.

    Raises:
        CompatibilityError: the bundle is for another device, its file has changed since it was
            verified, or the self-test failed. The slot in use is untouched.
        EnvironmentalError: too little disk space, another installer at work, a package missing, or
            no slot can be spared (`require_spare`).
        AccuracyError: an engine built here drops more than the gate allows.
    """
    # Before anything is unpacked; a deferred one is checked by whoever finishes it.
    check_device(bundle.manifest, HostProbe(), str(bundle.path))
    with _installing(root):
        disk.sweep(root / "slots", ".staging-", ".old-")
        disk.sweep(root, f".{_STATE}.")
        state = read_state(root)
        kept = read_slot(root, state.current)
        if kept is not None and kept.digest == bundle.digest and is_whole(kept):
            logger.info("%s is installed already, in slot %s", bundle.manifest.name, kept.name)
            return kept
        if bundle.digest in state.failed:
            logger.warning("this bundle was left once because: %s", state.failed[bundle.digest])
        _spare(root, state)
        deferred = bundle.manifest.state == "deferred"
        needed = bundle.size * (_DEFERRED_FACTOR if deferred else 1) + _SPARE_BYTES
        disk.require_space(root, needed, "install beside what runs")
        stage = root / "slots" / f".staging-{secrets.token_hex(4)}"
        try:
            with step("unpack"):
                bundle.extract(stage / "artifact")
            try:
                if deferred:
                    with step("build the engine"):
                        (finisher or _finish)(stage / "artifact")
                        disk.flush_tree(stage / "artifact")
                with step("self-test"):
                    result = run_self_test(stage / "artifact")
            except (CompatibilityError, AccuracyError) as e:
                with _state_lock(root):
                    state = read_state(root)
                    failed = state.with_failure(bundle.digest, e.sentence)
                    _write(root, replace(state, failed=failed))
                raise
            slot = _recorded(bundle, stage, root, result)
            with step("switch"):
                return _switched(root, stage, slot)
        except BaseException:
            # Interruptions too: what was staged is of no use to anybody.
            disk.remove_tree(stage)
            raise


def _finish(artifact: Path) -> None:
    # The build side, needed for deferred artifacts only.
    from edgehp.pipeline.finish import finish

    finish(artifact)


def _recorded(bundle: VerifiedBundle, stage: Path, root: Path, result: SelfTestResult) -> Slot:
    """Write the record of what was staged; all of it is on disk when this returns."""
    slot = Slot(
        name="a",
        artifact=stage / "artifact",
        digest=bundle.digest,
        signer=bundle.signer,
        artifact_name=bundle.manifest.name,
        sequence=1 + max([read_state(root).sequence, *(s.sequence for s in _installed(root))]),
        manifest_sha256=sha256_file(stage / "artifact" / MANIFEST_NAME),
        built_here=bundle.manifest.state == "deferred",
        selftest=result,
    )
    values = slot.to_dict()
    del values["name"], values["artifact"]
    disk.write_file(stage / _RECORD, [disk.sealed({"schema": _SCHEMA, **values})])
    disk.flush_folder(stage)
    disk.flush_folder(stage.parent)
    return slot


def _switched(root: Path, stage: Path, slot: Slot) -> Slot:
    """Put the staged slot in the place of the one that can be spared, and make it current."""
    with _state_lock(root):
        state = read_state(root)
        name = _spare(root, state)
        target = root / "slots" / name
        old = root / "slots" / f".old-{secrets.token_hex(4)}"
        if target.exists():
            disk.move(target, old)
        disk.move(stage, target)
        failed, confirmed = state.without_failure(slot.digest), _confirmed_here(root, state)
        _write(root, State(name, slot.sequence, 0, confirmed, failed))
    disk.remove_tree(old)
    return replace(slot, name=name, artifact=target / "artifact")


def require_spare(root: Path) -> None:
    """Check that a bundle may be installed without losing the only slot that is known to run well.

    Raises:
        EnvironmentalError: the current slot was not confirmed, the other one was.
    """
    _spare(root, read_state(root))


def _spare(root: Path, state: State) -> Literal["a", "b"]:
    """The slot to overwrite.

    Not the current one, unless only the other one is whole; and not the other one while it is the
    last that was confirmed. The self-test at installation is not enough for that: a network can
    pass it and still not run in the car.
    """
    if state.current is None:
        return "a"
    kept = read_slot(root, state.current)
    other = read_slot(root, _other_than(state.current))
    if other is None or not is_whole(other):
        return _other_than(state.current)
    if kept is None or not is_whole(kept):
        return state.current
    if other.sequence in state.confirmed and kept.sequence not in state.confirmed:
        raise EnvironmentalError(
            f"slot {kept.name} ({kept.artifact_name}) was not confirmed yet, and slot {other.name} "
            f"({other.artifact_name}) is the last that was, so that neither can be overwritten\n"
            f"hint: start it ('edgehp run SOURCE --root {root}') or confirm it ('edgehp confirm'), "
            "or go back ('edgehp rollback')"
        )
    return _other_than(state.current)


def rollback(root: Path) -> Slot:
    """Verify and test the other slot and switch to it.

    Raises:
        DataError: there is no other slot.
        CompatibilityError: it does not pass; the current slot stays.
        EnvironmentalError: an installer is at work, or the root cannot be written.
    """
    if not _is_root(root):
        raise _nothing_installed(root)
    with _installing(root):
        other = status(root).other
        if other is None:
            raise DataError(f"{root} has no other slot to return to; install a bundle first")
        # Before the lock: a runtime that waits for it to `confirm` would miss its watchdog. Slots
        # do not change meanwhile, this is the one installer.
        _check_record(other)
        run_self_test(other.artifact)
        with _state_lock(root):
            state = read_state(root)
            failed = state.without_failure(other.digest)
            _write(root, replace(state, current=other.name, starts=0, failed=failed))
        return other


@contextmanager
def _installing(root: Path) -> Iterator[None]:
    """Be the one installer under `root`, and say what the disk refuses."""
    with _writing(root):
        disk.make_folder(root / "slots")
        busy = f"another installer is at work in {root}; wait for it"
        with disk.locked(root / "lock", busy):
            yield


# --- looking --------------------------------------------------------------------------------------


def status(root: Path) -> Status:
    """What is installed under `root`; reads records, hashes and runs nothing.

    Raises:
        DataError: there is no such directory.
        EnvironmentalError: this user may not look into it.
    """
    if not _is_root(root):
        raise DataError(f"{root}: no such directory; install a bundle with 'edgehp install FILE'")
    state = read_state(root)
    current = read_slot(root, state.current)
    return Status(
        root=root,
        current=current,
        other=None if state.current is None else read_slot(root, _other_than(state.current)),
        unconfirmed_starts=state.starts,
        confirmed=current is not None and current.sequence in state.confirmed,
        failed=dict(state.failed),
    )


def current(root: Path) -> Slot:
    """The current slot, neither tested nor counted as a start; the runtime calls `boot`.

    Raises:
        DataError: nothing is installed.
    """
    found = status(root).current
    if found is None:
        raise _nothing_installed(root)
    return found


def identity(slot: Slot) -> dict[str, Any]:
    """What identifies the software of a slot from outside, for JSON; its files are not hashed.

    Returns:
        ``rxswin`` (see `edgehp.artifact.Manifest`) and SHA-256s in hex: of the ``manifest``'s file,
        of each file of the ``engine``, of the ``network``'s specification (None for a foreign
        graph), of the file of ``weights`` that the build read, and of the ``preprocessing``.

    Raises:
        CompatibilityError: the manifest is not the one that was installed.
    """
    _check_record(slot)
    manifest = read_manifest(slot.artifact)
    engine = () if manifest.engine is None else manifest.engine.files
    return {
        "rxswin": manifest.rxswin,
        "manifest": slot.manifest_sha256,
        "engine": {name: manifest.file(name).sha256 for name in engine},
        "network": manifest.network.digest,
        "weights": manifest.network.weights_sha256,
        "preprocessing": manifest.preprocessing.digest,
    }


def is_whole(slot: Slot) -> bool:
    """Whether every byte of a slot is as recorded; the engine is not opened."""
    try:
        _check_record(slot)
        load_artifact(slot.artifact, bytes_only=True)
    except (EdgehpError, OSError) as e:
        logger.warning("slot %s: %s", slot.name, e)
        return False
    return True


# --- starting -------------------------------------------------------------------------------------


def boot(
    root: Path,
    test: Callable[[Path], T],
    *,
    discard: Callable[[T], object] = lambda _: None,
) -> Boot[T]:
    """Choose the slot to run: count the start, check the records, test the slot.

    The start is written down before anything is tried, so that a crash or a power cut counts. The
    other slot is taken where the current one fails, or was started three times
    (`MAX_FAILED_STARTS`) without `confirm`. Call `confirm` once the engine is seen to work.

    A fault of the environment (a driver that comes late) is waited for and counts against no slot:
    the current one stays, and the start is not counted.

    A root that cannot be written is warned about and starts are not counted: a full or read-only
    disk must not stop a network that works. Nobody waits for the tests, which take minutes at
    worst: where an installer switches meanwhile, the start begins anew with what is current then.

    Args:
        root: the root directory.
        test: checks hashes, device and golden vectors of an artifact directory, and raises an
            `EdgehpError` if anything is not right. What it gives is passed on, so that nothing is
            opened or verified twice. It is tried again after an `EnvironmentalError`, for
            `PATIENCE_S` together.
        discard: frees what `test` gave for a slot that will not be run.

    Raises:
        DataError: nothing is installed.
        CompatibilityError: neither slot passes; both reasons are named.
        EnvironmentalError: a driver or package is missing; the root cannot be read; or the slots
            change again and again.
    """
    if not _is_root(root):
        raise _nothing_installed(root)
    for _ in range(_TRIES):
        state = _counted(root)
        try:
            found = _chosen(root, state, test)
        except EdgehpError as e:
            if _unchanged(root, state):
                if isinstance(e, EnvironmentalError):
                    with _state_lock_if_possible(root):
                        if _unchanged(root, state):
                            _note(root, replace(read_state(root), starts=state.starts))
                raise
        else:
            if _settled(root, state, found):
                return found
            discard(found.tested)
        logger.warning("the slots of %s were changed while a start tested them: anew", root)
    raise EnvironmentalError(
        f"{root}: the slots were changed {_TRIES} times while a start tested them\n"
        "hint: wait for the installer and start again"
    )


def confirm(root: Path, slot: Slot | None = None) -> None:
    """Say that the current slot runs well: its unconfirmed starts are forgotten.

    Args:
        root: the root directory.
        slot: the one that was started. Nothing is noted where another one is current by now.

    Raises:
        DataError: nothing is installed.
        EnvironmentalError: the root cannot be read or written.
    """
    if not _is_root(root):
        raise _nothing_installed(root)
    # As `boot`: a start that could be counted can be confirmed, or it would lead to the other slot.
    with _writing(root), _state_lock_if_possible(root):
        state = read_state(root)
        current = read_slot(root, state.current)
        if current is None:
            raise _nothing_installed(root)
        if slot is not None and slot.sequence != current.sequence:
            logger.warning("slot %s is current now; %s is not confirmed", current.name, slot.name)
        elif state.starts or current.sequence not in state.confirmed:
            confirmed = {*_confirmed_here(root, state), current.sequence}
            _write(root, replace(state, starts=0, confirmed=tuple(sorted(confirmed))))


def _confirmed_here(root: Path, state: State) -> tuple[int, ...]:
    """Those that were confirmed and are still installed."""
    here = {slot.sequence for slot in _installed(root)}
    return tuple(n for n in state.confirmed if n in here)


def _counted(root: Path) -> State:
    """The state before this start, which is written down."""
    with _state_lock_if_possible(root):
        state = read_state(root)
        if state.current is None:
            raise _nothing_installed(root)
        _note(root, replace(state, starts=state.starts + 1))
        return state


def _chosen(root: Path, state: State, test: Callable[[Path], T]) -> Boot[T]:
    """The current slot if it passes, else the other one; nothing is written."""
    slot, other = read_slot(root, state.current), read_slot(root, _other_than(state.current))
    worn_out = state.starts >= MAX_FAILED_STARTS
    unconfirmed = f"it was started {MAX_FAILED_STARTS} times and never reported to run well"
    if slot is not None and worn_out and (other is None or other.digest in state.failed):
        logger.warning("slot %s: %s, and there is none to return to", slot.name, unconfirmed)
        worn_out = False
    missing = "its record is missing or damaged"
    failure: EdgehpError = CompatibilityError(missing if slot is None else unconfirmed)
    if slot is not None and not worn_out:
        try:
            return Boot(slot, _tested(slot, test), None)
        except EnvironmentalError:
            raise
        except EdgehpError as e:
            failure = e
    left = f"slot {state.current}: {failure.sentence}"
    if other is None:
        raise type(failure)(f"{left}; there is no other slot\nhint: install a bundle") from failure
    try:
        return Boot(other, _tested(other, test), failure.sentence)
    except EdgehpError as second:
        if worn_out and slot is not None:
            text = second.sentence
            logger.warning("slot %s: %s; slot %s stays", other.name, text, slot.name)
            return Boot(slot, _tested(slot, test), None)
        kind = EnvironmentalError if isinstance(second, EnvironmentalError) else CompatibilityError
        raise kind(
            f"{left}; slot {other.name}: {second.sentence}\nhint: install a bundle"
        ) from second


def _tested(slot: Slot, test: Callable[[Path], T]) -> T:
    waited, pause = 0.0, _FIRST_PAUSE_S
    while True:
        try:
            _check_record(slot)
            return test(slot.artifact)
        except EnvironmentalError as e:
            if waited + pause > PATIENCE_S:
                raise
            logger.warning("slot %s: %s; tried again in %.1f s", slot.name, e, pause)
        time.sleep(pause)
        waited, pause = waited + pause, min(2 * pause, _LONGEST_PAUSE_S)


def _settled(root: Path, state: State, found: Boot[Any]) -> bool:
    """Make what was chosen current; false where the slots were changed meanwhile."""
    if found.fell_back is None:
        return _unchanged(root, state)
    with _state_lock_if_possible(root):
        if not _unchanged(root, state):
            return False
        now, left = read_state(root), read_slot(root, state.current)
        failed = now.failed if left is None else now.with_failure(left.digest, found.fell_back)
        _note(root, replace(now, current=found.slot.name, starts=1, failed=failed))
    logger.warning(
        "slot %s: %s; slot %s runs instead", state.current, found.fell_back, found.slot.name
    )
    return True


def _unchanged(root: Path, state: State) -> bool:
    """Whether the slots are still those of `state`."""
    now = read_state(root)
    return (now.current, now.sequence) == (state.current, state.sequence)


def _check_record(slot: Slot) -> None:
    manifest = slot.artifact / MANIFEST_NAME
    try:
        found = sha256_file(manifest)
    except OSError as e:
        raise CompatibilityError(
            f"{manifest} cannot be read ({e.strerror or e}); install the bundle again"
        ) from e
    if found != slot.manifest_sha256:
        raise CompatibilityError(
            f"{manifest} is not the one that was installed; install the bundle again"
        )


# --- what is written down -------------------------------------------------------------------------


def read_state(root: Path) -> State:
    """The state under `root`; rebuilt from the slots where the file is missing or damaged."""
    path = root / _STATE
    try:
        return msgspec.convert(_content(path), State)
    except (OSError, ValueError) as e:
        newest = max(_installed(root), key=lambda s: s.sequence, default=None)
        found = State() if newest is None else State(newest.name, newest.sequence)
        if newest is not None or not isinstance(e, FileNotFoundError):
            logger.warning(
                "%s is missing or damaged (%s): slot %s taken as current", path, e, found.current
            )
        return found


def read_slot(root: Path, name: str | None) -> Slot | None:
    """The record of a slot, None where there is none, or one that is damaged."""
    if name is None:
        return None
    folder = root / "slots" / name
    try:
        values = _content(folder / _RECORD)
        return msgspec.convert({**values, "name": name, "artifact": folder / "artifact"}, Slot)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        logger.warning("%s is damaged (%s): the slot counts as empty", folder / _RECORD, e)
        return None


def _installed(root: Path) -> list[Slot]:
    """The slots that have a record."""
    return [slot for name in SLOT_NAMES if (slot := read_slot(root, name)) is not None]


def _content(path: Path) -> dict[str, Any]:
    with path.open("rb") as f:
        values = disk.unsealed(f.read(_LARGEST))
    if values.pop("schema", None) != _SCHEMA:
        raise ValueError(f"it is not of schema {_SCHEMA}")
    return dict(values)


def _write(root: Path, state: State) -> None:
    """Replace the state; when this returns it is on disk.

    Raises:
        OSError: the disk is full or refuses.
    """
    values = {"schema": _SCHEMA, **msgspec.to_builtins(state)}
    disk.replace_file(root / _STATE, disk.sealed(values))


def _note(root: Path, state: State) -> None:
    """Write the state if the disk lets us."""
    try:
        _write(root, state)
    except OSError as e:
        logger.warning("%s cannot be written (%s); this start is not counted", root, e)


def _state_lock(root: Path) -> AbstractContextManager[None]:
    return disk.locked(root / "state.lock")


@contextmanager
def _state_lock_if_possible(root: Path) -> Iterator[None]:
    with ExitStack() as held:
        try:
            held.enter_context(_state_lock(root))
        except OSError as e:
            logger.warning("%s cannot be locked (%s); going on without", root, e.strerror or e)
        yield


def _writing(root: Path) -> AbstractContextManager[None]:
    return disk.writing(str(root), "check its owner and the disk, or choose another --root")


def _other_than(name: str | None) -> Literal["a", "b"]:
    return "b" if name == "a" else "a"


def _is_root(root: Path) -> bool:
    """Whether the directory is there.

    Raises:
        EnvironmentalError: this user may not look into it, where it would seem to be empty.
    """
    try:
        # The point at the end needs the permission to look into it.
        for inner in (".", "slots/."):
            os.stat(os.path.join(root, inner))  # noqa: PTH116, PTH118 - Path drops the point
    except (FileNotFoundError, NotADirectoryError):
        return root.is_dir()
    except PermissionError as e:
        raise EnvironmentalError(
            f"{root} cannot be read by this user; run this as its owner or as root"
        ) from e
    return True


def _nothing_installed(root: Path) -> DataError:
    return DataError(f"{root}: nothing is installed; install a bundle with 'edgehp install FILE'")
