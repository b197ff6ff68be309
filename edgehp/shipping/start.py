"""Starting: the current slot if it passes, else the other one."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from edgehp.errors import CompatibilityError, EdgehpError, EnvironmentalError
from edgehp.shipping import disk
from edgehp.shipping.examine import SelfTest, examine, nothing_installed, writing
from edgehp.shipping.records import Slot, State, other_than, read_slot, read_state, write_state
from edgehp.shipping.selftest import SelfTestResult, run_self_test

__all__ = ["MAX_FAILED_STARTS", "Boot", "boot", "confirm"]

logger = logging.getLogger(__name__)

MAX_FAILED_STARTS = 3


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


def boot(root: Path, *, selftest: SelfTest | None = None) -> Boot:
    """Choose the slot to run: count the start, verify the hashes, run the self-test.

    The start is written down before anything is tried, so that a crash or a power cut counts. The
    other slot is taken where the current one fails, or was started three times
    (`MAX_FAILED_STARTS`) without `confirm`. Call `confirm` once frames flow.

    A root that cannot be written is warned about and starts are not counted: a full or read-only
    disk must not stop a network that works.

    Raises:
        DataError: nothing is installed.
        CompatibilityError: neither slot passes; both reasons are named.
        EnvironmentalError: neither slot passes, for a driver or package that is missing.
    """
    test = selftest or run_self_test
    if not root.is_dir():
        raise nothing_installed(root)
    with _state_lock_if_possible(root):
        state = read_state(root)
        if state.current is None:
            raise nothing_installed(root)
        _note(root, replace(state, starts=state.starts + 1))
        slot, other = read_slot(root, state.current), read_slot(root, other_than(state.current))
        exhausted = state.starts >= MAX_FAILED_STARTS
        if slot is not None and exhausted and (other is None or other.digest in state.failed):
            logger.warning("slot %s: %s, and there is none to return to", slot.name, _unconfirmed())
            exhausted = False
        failure: EdgehpError
        if slot is None:
            failure = CompatibilityError("its record is missing or damaged")
        elif exhausted:
            failure = CompatibilityError(_unconfirmed())
        else:
            try:
                return Boot(slot, examine(slot, test), None)
            except EdgehpError as e:
                failure = e
        return _fallen_back(root, state, slot, other, failure, test, exhausted)


def confirm(root: Path) -> None:
    """Say that the current slot runs well: its unconfirmed starts are forgotten.

    Raises:
        DataError: nothing is installed.
        EnvironmentalError: the root cannot be written.
    """
    if not root.is_dir():
        raise nothing_installed(root)
    # As `boot`: a start that could be counted can be confirmed, or it would lead to the other slot.
    with writing(root), _state_lock_if_possible(root):
        state = read_state(root)
        if state.current is None:
            raise nothing_installed(root)
        if state.starts:
            write_state(root, replace(state, starts=0))


def _fallen_back(
    root: Path,
    state: State,
    slot: Slot | None,
    other: Slot | None,
    failure: EdgehpError,
    test: SelfTest,
    untested: bool,
) -> Boot:
    """The other slot if it passes; else the current one, if it was not even tried; else nothing."""
    left = f"slot {state.current}: {failure}"
    if other is None:
        raise type(failure)(f"{left}; there is no other slot: install a bundle") from failure
    try:
        result = examine(other, test)
    except EdgehpError as second:
        if untested and slot is not None:
            logger.warning("slot %s: %s; slot %s stays", other.name, second, slot.name)
            return Boot(slot, examine(slot, test), None)
        both = isinstance(failure, EnvironmentalError) and isinstance(second, EnvironmentalError)
        kind = EnvironmentalError if both else CompatibilityError
        raise kind(f"{left}; slot {other.name}: {second}; install a bundle") from second
    failed = state.failed if slot is None else state.with_failure(slot.digest, str(failure))
    _note(root, replace(state, current=other.name, starts=1, failed=failed))
    logger.warning("%s; slot %s runs instead", left, other.name)
    return Boot(other, result, str(failure))


@contextmanager
def _state_lock_if_possible(root: Path) -> Iterator[None]:
    with ExitStack() as held:
        try:
            held.enter_context(disk.locked(root / "state.lock", wait=True))
        except OSError as e:
            logger.warning("%s cannot be locked (%s); going on without", root, e.strerror or e)
        yield


def _note(root: Path, state: State) -> None:
    """Write the state if the disk lets us."""
    try:
        write_state(root, state)
    except OSError as e:
        logger.warning("%s cannot be written (%s); this start is not counted", root, e)


def _unconfirmed() -> str:
    return f"it was started {MAX_FAILED_STARTS} times and never reported to run well"
