"""Two slots on the device: install, switch, start, roll back.

Under the root directory::

    lock            flock of the one installer
    state.lock      flock held while state.json or a slot is replaced, never while one is tested
    state.json      which slot is current, starts that were not confirmed, what failed
    slots/a/        record.json and artifact/
    slots/b/
    slots/.staging-XXXXXXXX/    an installation in progress; a dead one is removed by the next

`state.json` is replaced by one rename; everything it names was flushed to disk before.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from edgehp._hashing import sha256_file
from edgehp.artifact.check import check_device
from edgehp.artifact.device import DeviceProbe, HostProbe
from edgehp.artifact.manifest import MANIFEST_NAME
from edgehp.errors import DataError, EnvironmentalError
from edgehp.shipping import disk
from edgehp.shipping.bundle import VerifiedBundle, verify_bundle
from edgehp.shipping.examine import SelfTest, examine, is_root, is_whole, nothing_installed, writing
from edgehp.shipping.keys import Trust
from edgehp.shipping.records import (
    SLOT_NAMES,
    Slot,
    State,
    other_than,
    read_slot,
    read_state,
    slot_folder,
    write_record,
    write_state,
)
from edgehp.shipping.selftest import run_self_test
from edgehp.shipping.start import MAX_FAILED_STARTS, Boot, boot, confirm

__all__ = [
    "MAX_FAILED_STARTS",
    "Boot",
    "Finisher",
    "SelfTest",
    "Slot",
    "Status",
    "boot",
    "confirm",
    "current",
    "default_root",
    "install",
    "rollback",
    "status",
]

logger = logging.getLogger(__name__)

ROOT_VARIABLE = "EDGEHP_ROOT"
_DEFAULT_ROOT = "/var/lib/edgehp"
# Records, folders and the file system's own bookkeeping.
_SPARE_BYTES = 32 * 2**20
# Building here: the unpacked files, the writer's copy of them, and an engine with its caches.
_DEFERRED_FACTOR = 4
_LOCK_TRIES = 5
_LOCK_PAUSE_S = 0.05

# Builds the engine of the deferred artifact in this directory, in place.
Finisher = Callable[[Path], None]


@dataclass(frozen=True)
class Status:
    """What is installed.

    Attributes:
        root: the root directory.
        current: the slot in use, None where nothing is installed.
        other: the slot to return to, None where there is none.
        unconfirmed_starts: starts of the current slot since the last `confirm`.
        failed: digest -> reason, of slots that were left because they failed.
        installing: an installer is at work; None where this user may not know.
    """

    root: Path
    current: Slot | None
    other: Slot | None
    unconfirmed_starts: int
    failed: dict[str, str]
    installing: bool | None


def default_root() -> Path:
    """``$EDGEHP_ROOT``, else ``/var/lib/edgehp``."""
    return Path(os.environ.get(ROOT_VARIABLE) or _DEFAULT_ROOT)


def install(
    bundle: Path,
    trust: Trust,
    root: Path,
    *,
    device: DeviceProbe | None = None,
    selftest: SelfTest | None = None,
    finisher: Finisher | None = None,
    progress: Callable[[str], None] | None = None,
) -> Slot:
    """Verify a bundle, unpack it into the slot that is not current, test it and switch to it.

    Killed at any moment, the current slot is the old one or the new one, whole and tested.
    Installing what is already current does nothing and returns it.

    Args:
        bundle: the file.
        trust: see `verify_bundle`.
        root: made if it does not exist.
        device: facts about this device; probed when omitted.
        selftest: runs the golden vectors; `edgehp.shipping.selftest.run_self_test` when omitted.
        finisher: builds the engine of a deferred artifact; `edgehp build --finish` when omitted.
        progress: told the name of every step as it begins.

    Raises:
        DataError, CompatibilityError: as `verify_bundle`; or for another device; or the self-test
            failed. The slot in use is untouched.
        EnvironmentalError: too little disk space, another installer at work, a package missing.
        AccuracyError: an engine built here drops more than the gate allows.
    """
    say = progress or (lambda _: None)
    say("verify")
    verified = verify_bundle(bundle, trust)
    # Before anything is unpacked; a deferred one is checked by whoever finishes it.
    check_device(verified.manifest, device or HostProbe(), str(bundle))
    with writing(root), _one_installer(root):
        _sweep(root)
        state = read_state(root)
        kept = None if state.current is None else read_slot(root, state.current)
        if kept is not None and kept.digest == verified.digest and is_whole(kept):
            logger.info("%s is installed already, in slot %s", verified.manifest.name, kept.name)
            return kept
        if verified.digest in state.failed:
            logger.warning("this bundle was left once because: %s", state.failed[verified.digest])
        _check_space(root, verified)
        stage = root / "slots" / f".staging-{secrets.token_hex(4)}"
        try:
            slot = _staged(
                stage, verified, root, selftest or run_self_test, finisher or _finish, say
            )
            say("switch")
            return _switched(root, stage, slot)
        except BaseException:
            # Interruptions too: what was staged is of no use to anybody.
            disk.remove_tree(stage)
            raise


def status(root: Path) -> Status:
    """What is installed under `root`; reads records, hashes and runs nothing.

    Raises:
        DataError: there is no such directory.
        EnvironmentalError: this user may not look into it.
    """
    if not is_root(root):
        raise DataError(f"{root}: no such directory; install a bundle with 'edgehp install FILE'")
    state = read_state(root)
    return Status(
        root=root,
        current=None if state.current is None else read_slot(root, state.current),
        other=None if state.current is None else read_slot(root, other_than(state.current)),
        unconfirmed_starts=state.starts,
        failed=dict(state.failed),
        installing=disk.is_locked(root / "lock"),
    )


def current(root: Path) -> Slot:
    """The current slot, neither tested nor counted as a start; the runtime calls `boot`.

    Raises:
        DataError: nothing is installed.
    """
    found = status(root).current
    if found is None:
        raise nothing_installed(root)
    return found


def rollback(root: Path, *, selftest: SelfTest | None = None) -> Slot:
    """Verify and test the other slot and switch to it.

    Raises:
        DataError: there is no other slot.
        CompatibilityError: it does not pass; the current slot stays.
        EnvironmentalError: an installer is at work, or the root cannot be written.
    """
    if not is_root(root):
        raise nothing_installed(root)
    with writing(root), _one_installer(root):
        state = read_state(root)
        other = None if state.current is None else read_slot(root, other_than(state.current))
        if other is None:
            raise DataError(f"{root} has no other slot to return to; install a bundle first")
        # Before the lock: a runtime that waits for it to `confirm` would miss its watchdog. Slots
        # do not change meanwhile, this is the one installer.
        examine(other, selftest or run_self_test)
        with disk.locked(root / "state.lock", wait=True):
            state = read_state(root)
            write_state(
                root,
                replace(
                    state,
                    current=other.name,
                    starts=0,
                    failed=state.without_failure(other.digest),
                ),
            )
        return other


def _staged(
    stage: Path,
    verified: VerifiedBundle,
    root: Path,
    test: SelfTest,
    finish: Finisher,
    say: Callable[[str], None],
) -> Slot:
    """Unpack, build if need be, test and write down; all of it is on disk when this returns."""
    say("unpack")
    artifact = stage / "artifact"
    verified.extract(artifact)
    deferred = verified.manifest.state == "deferred"
    if deferred:
        say("build the engine")
        finish(artifact)
        disk.flush_tree(artifact)
    say("self-test")
    result = test(artifact)
    slots = [s for name in SLOT_NAMES if (s := read_slot(root, name)) is not None]
    slot = Slot(
        name="",
        artifact=artifact,
        digest=verified.digest,
        signer=verified.signer,
        artifact_name=verified.manifest.name,
        sequence=1 + max([read_state(root).sequence, *(s.sequence for s in slots)]),
        manifest_sha256=sha256_file(artifact / MANIFEST_NAME),
        built_here=deferred,
        selftest=result,
    )
    write_record(stage, slot)
    disk.flush_folder(stage)
    disk.flush_folder(stage.parent)
    return slot


def _switched(root: Path, stage: Path, slot: Slot) -> Slot:
    """Put the staged slot in the place of the one that can be spared, and make it current."""
    with disk.locked(root / "state.lock", wait=True):
        state = read_state(root)
        name = _spare(root, state)
        target = slot_folder(root, name)
        old = root / "slots" / f".old-{secrets.token_hex(4)}"
        if target.exists():
            disk.move(target, old)
        disk.move(stage, target)
        write_state(
            root,
            State(name, slot.sequence, 0, state.without_failure(slot.digest)),
        )
    disk.remove_tree(old)
    return replace(slot, name=name, artifact=target / "artifact")


def _spare(root: Path, state: State) -> str:
    """The slot to overwrite: not the current one, unless only the other one is whole."""
    if state.current is None:
        return other_than(None)
    kept = read_slot(root, state.current)
    other = read_slot(root, other_than(state.current))
    if (kept is None or not is_whole(kept)) and other is not None and is_whole(other):
        return state.current
    return other_than(state.current)


def _finish(artifact: Path) -> None:
    # The build side, needed for deferred artifacts only.
    from edgehp.pipeline.finish import finish

    finish(artifact)


def _sweep(root: Path) -> None:
    """Remove what a killed installer left; the lock says that it is dead."""
    for entry in sorted((root / "slots").iterdir()):
        if entry.name.startswith((".staging-", ".old-")):
            disk.remove_tree(entry)
    for entry in sorted(root.iterdir()):
        if entry.name.startswith(".state.json."):
            disk.remove_tree(entry)


def _check_space(root: Path, verified: VerifiedBundle) -> None:
    factor = _DEFERRED_FACTOR if verified.manifest.state == "deferred" else 1
    needed = verified.size * factor + _SPARE_BYTES
    found = os.statvfs(root)
    free = found.f_bavail * found.f_frsize
    if free < needed:
        raise EnvironmentalError(
            f"{root} has {free / 2**20:.0f} MiB free, {needed / 2**20:.0f} MiB are needed to "
            "install beside what runs; make room or choose another --root"
        )


@contextmanager
def _one_installer(root: Path) -> Iterator[None]:
    disk.make_folder(root / "slots")
    with ExitStack() as held:
        for attempt in range(_LOCK_TRIES):
            try:
                held.enter_context(disk.locked(root / "lock", wait=False))
                break
            except BlockingIOError as e:
                if attempt == _LOCK_TRIES - 1:
                    raise EnvironmentalError(
                        f"another installer is at work in {root}; wait for it"
                    ) from e
                # 'edgehp status' looks at the lock for a moment.
                time.sleep(_LOCK_PAUSE_S)
        yield
