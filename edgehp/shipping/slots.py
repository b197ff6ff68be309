"""Two slots on the device: install, switch, start, roll back.

Under the root directory::

    lock            flock of the one installer
    state.lock      flock held while state.json or a slot is replaced, never for long
    state.json      which slot is current, starts that were not confirmed, what failed
    slots/a/        record.json and artifact/
    slots/b/
    slots/.staging-XXXXXXXX/    an installation in progress; a dead one is removed by the next

`state.json` is replaced by one rename; everything it names was flushed to disk before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgehp.artifact.device import DeviceProbe
from edgehp.shipping.keys import Trust
from edgehp.shipping.selftest import SelfTestResult

__all__ = [
    "MAX_FAILED_STARTS",
    "Boot",
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

MAX_FAILED_STARTS = 3

# From an artifact directory to what its golden vectors gave; raises if they are not right.
SelfTest = Callable[[Path], SelfTestResult]
# Builds the engine of the deferred artifact in this directory, in place.
Finisher = Callable[[Path], None]


@dataclass(frozen=True)
class Slot:
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

    name: str
    artifact: Path
    digest: str
    signer: str
    artifact_name: str
    sequence: int
    manifest_sha256: str
    built_here: bool
    selftest: SelfTestResult


@dataclass(frozen=True)
class Status:
    """What is installed.

    Attributes:
        root: the root directory.
        current: the slot in use, None where nothing is installed.
        other: the slot to return to, None where there is none.
        unconfirmed_starts: starts of the current slot since the last `confirm`.
        failed: digest -> reason, of slots that were left because they failed.
        installing: an installer is at work.
    """

    root: Path
    current: Slot | None
    other: Slot | None
    unconfirmed_starts: int
    failed: dict[str, str]
    installing: bool


@dataclass(frozen=True)
class Boot:
    """The answer to `boot`.

    Attributes:
        slot: to run.
        selftest: what its golden vectors gave now.
        fell_back: why the slot that was current before was left, None where it was kept.
    """

    slot: Slot
    selftest: SelfTestResult
    fell_back: str | None


def default_root() -> Path:
    """``$EDGEHP_ROOT``, else ``/var/lib/edgehp``."""
    raise NotImplementedError


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
    raise NotImplementedError


def status(root: Path) -> Status:
    """What is installed under `root`; reads records, hashes and runs nothing.

    Raises:
        DataError: there is no such directory.
    """
    raise NotImplementedError


def current(root: Path) -> Slot:
    """The current slot, neither tested nor counted as a start; the runtime calls `boot`.

    Raises:
        DataError: nothing is installed.
    """
    raise NotImplementedError


def boot(
    root: Path, *, device: DeviceProbe | None = None, selftest: SelfTest | None = None
) -> Boot:
    """Choose the slot to run: count the start, verify the hashes, run the self-test.

    The start is written down before anything is tried, so that a crash or a power cut counts. The
    other slot is taken where the current one fails, or was started three times
    (`MAX_FAILED_STARTS`) without `confirm`. Call `confirm` once frames flow.

    Raises:
        DataError: nothing is installed.
        CompatibilityError: neither slot passes; both reasons are named.
        EnvironmentalError: the root cannot be written.
    """
    raise NotImplementedError


def confirm(root: Path) -> None:
    """Say that the current slot runs well: its unconfirmed starts are forgotten.

    Raises:
        DataError: nothing is installed.
        EnvironmentalError: the root cannot be written.
    """
    raise NotImplementedError


def rollback(
    root: Path, *, device: DeviceProbe | None = None, selftest: SelfTest | None = None
) -> Slot:
    """Verify and test the other slot and switch to it.

    Raises:
        DataError: there is no other slot.
        CompatibilityError: it does not pass; the current slot stays.
        EnvironmentalError: an installer is at work, or the root cannot be written.
    """
    raise NotImplementedError
