"""Starting: the current slot if it passes, else the other one."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from edgehp.errors import CompatibilityError, EdgehpError, EnvironmentalError
from edgehp.shipping import disk
from edgehp.shipping.examine import SelfTest, examine, is_root, nothing_installed, writing
from edgehp.shipping.records import Slot, State, other_than, read_slot, read_state, write_state
from edgehp.shipping.selftest import SelfTestResult, run_self_test

__all__ = ["MAX_FAILED_STARTS", "Boot", "boot", "confirm"]

logger = logging.getLogger(__name__)

MAX_FAILED_STARTS = 3
# How often a start begins anew because slots changed below it; each takes an installation.
_TRIES = 5


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
    disk must not stop a network that works. Nobody waits for the self-tests: where an installer
    switches meanwhile, the start begins anew with what is current then.

    Raises:
        DataError: nothing is installed.
        CompatibilityError: neither slot passes; both reasons are named.
        EnvironmentalError: neither slot passes, for a driver or package that is missing; the root
            cannot be read; or the slots change again and again.
    """
    test = selftest or run_self_test
    if not is_root(root):
        raise nothing_installed(root)
    for _ in range(_TRIES):
        state = _counted(root)
        found = _tried(root, state, test)
        if found is not None:
            return found
        logger.warning("the slots of %s were changed while a start tested them: anew", root)
    raise EnvironmentalError(
        f"{root}: the slots were changed {_TRIES} times while a start tested them; wait for the "
        "installer and start again"
    )


def _counted(root: Path) -> State:
    """The state before this start, which is written down."""
    with _state_lock_if_possible(root):
        state = read_state(root)
        if state.current is None:
            raise nothing_installed(root)
        _note(root, replace(state, starts=state.starts + 1))
        return state


def _tried(root: Path, state: State, test: SelfTest) -> Boot | None:
    """What passes; None where an installer or a rollback was at work meanwhile.

    No lock is held while a slot is tested, which takes minutes at worst: `confirm` of what runs, an
    installation and a rollback would wait for it without a word.
    """
    current = str(state.current)
    slot, other = read_slot(root, current), read_slot(root, other_than(current))
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
            result = examine(slot, test)
        except EdgehpError as e:
            failure = e
        else:
            return Boot(slot, result, None) if _unchanged(root, state) else None
    try:
        return _fallen_back(root, state, slot, other, failure, test, exhausted)
    except EdgehpError:
        if _unchanged(root, state):
            raise
        return None


def _unchanged(root: Path, state: State) -> bool:
    """Whether the slots are still those of `state`."""
    now = read_state(root)
    return (now.current, now.sequence) == (state.current, state.sequence)


def confirm(root: Path) -> None:
    """Say that the current slot runs well: its unconfirmed starts are forgotten.

    Raises:
        DataError: nothing is installed.
        EnvironmentalError: the root cannot be read or written.
    """
    if not is_root(root):
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
) -> Boot | None:
    """The other slot if it passes; else the current one, if it was not even tried; else nothing.

    None where the slots were changed meanwhile.
    """
    left = f"slot {state.current}: {failure}"
    if other is None:
        raise type(failure)(f"{left}; there is no other slot: install a bundle") from failure
    try:
        result = examine(other, test)
    except EdgehpError as second:
        if untested and slot is not None:
            logger.warning("slot %s: %s; slot %s stays", other.name, second, slot.name)
            result = examine(slot, test)
            return Boot(slot, result, None) if _unchanged(root, state) else None
        both = isinstance(failure, EnvironmentalError) and isinstance(second, EnvironmentalError)
        kind = EnvironmentalError if both else CompatibilityError
        raise kind(f"{left}; slot {other.name}: {second}; install a bundle") from second
    with _state_lock_if_possible(root):
        if not _unchanged(root, state):
            return None
        state = read_state(root)
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
