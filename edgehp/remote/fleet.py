"""Errands on many boards at once; one that fails costs nothing but its own row."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Sequence

from edgehp.remote.boards import Board
from edgehp.remote.control import INTERRUPTED, Control
from edgehp.remote.errand import Errand, Listener, Outcome, run

__all__ = ["exit_code", "run_all"]

# What an interrupted command may take to write its report, and the board to tidy up.
_GRACE_S = 30.0
_LOOK_S = 0.05


def run_all(
    errands: Sequence[tuple[Board, Errand]], listener: Callable[[Board], Listener]
) -> list[Outcome]:
    """Do all errands at once and return how they ended, in order.

    Ctrl-C or SIGTERM interrupts the commands on the boards and waits for what they still have to
    say; a second one ends everything at once.
    """
    outcomes: list[Outcome | None] = [None] * len(errands)
    controls = [Control() for _ in errands]
    ended = [threading.Event() for _ in errands]

    def work(i: int) -> None:
        board, errand = errands[i]
        try:
            outcomes[i] = run(board, errand, controls[i], listener(board))
        finally:
            ended[i].set()

    threads = [
        threading.Thread(target=work, args=(i,), name=board.host)
        for i, (board, _) in enumerate(errands)
    ]
    # Counted, not raised: an exception in the middle of a lock or a start would leave it broken.
    presses: list[int] = []
    before = {
        s: signal.signal(s, lambda number, _: presses.append(number))
        for s in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        for thread in threads:
            thread.start()
        _watch(ended, controls, presses)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for thread in threads:
        thread.join()
    # A thread that has died of a fault of this program has shown its traceback.
    return [
        outcome or Outcome(board, 1, "edgehp itself failed; see above", 0.0)
        for outcome, (board, _) in zip(outcomes, errands, strict=True)
    ]


def _watch(
    ended: Sequence[threading.Event], controls: Sequence[Control], presses: Sequence[int]
) -> None:
    """Wait for all errands and pass on what was pressed."""
    passed_on = 0
    end: float | None = None
    while not all(event.is_set() for event in ended):
        time.sleep(_LOOK_S)
        overdue = end is not None and time.monotonic() > end
        if len(presses) > passed_on or overdue:
            for control in controls:
                if passed_on or overdue:
                    control.abandon()
                else:
                    control.interrupt()
            passed_on = len(presses)
            end = None if overdue else time.monotonic() + _GRACE_S


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """0 where all ended so; the code all failures share, else 1; 130 after an interruption."""
    codes = {o.exit_code for o in outcomes if o.exit_code}
    if INTERRUPTED in codes:
        return INTERRUPTED
    return 0 if not codes else codes.pop() if len(codes) == 1 else 1
