"""Errands on many boards at once; one that fails costs nothing but its own row."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from edgehp.remote.boards import Board
from edgehp.remote.errand import INTERRUPTED, Control, Errand, Listener, Outcome, run

__all__ = ["exit_code", "run_all"]

# What an interrupted command may take to write its report, and the board to tidy up.
_GRACE_S = 30.0


def run_all(
    errands: Sequence[tuple[Board, Errand]], listener: Callable[[Board], Listener]
) -> list[Outcome]:
    """Do all errands at once and return how they ended, in order.

    Ctrl-C interrupts the commands on the boards and waits for what they still have to say; a second
    one ends everything at once.
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
    for thread in threads:
        thread.start()
    presses = 0
    end: float | None = None
    while not all(event.is_set() for event in ended):
        try:
            # Not Thread.join: interrupted, it takes a thread that runs for one that has ended.
            for event in ended:
                event.wait(0.1)
            if end is not None and time.monotonic() > end:
                end = None
                for control in controls:
                    control.abandon()
        except KeyboardInterrupt:
            presses += 1
            for control in controls:
                if presses == 1:
                    control.interrupt()
                else:
                    control.abandon()
            end = time.monotonic() + _GRACE_S
    for thread in threads:
        thread.join()
    # A thread that has died of a fault of this program has shown its traceback.
    return [
        outcome or Outcome(board, 1, "edgehp itself failed; see above", 0.0)
        for outcome, (board, _) in zip(outcomes, errands, strict=True)
    ]


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """0 where all ended so; the code all failures share, else 1; 130 after an interruption."""
    codes = {o.exit_code for o in outcomes if o.exit_code}
    if INTERRUPTED in codes:
        return INTERRUPTED
    return 0 if not codes else codes.pop() if len(codes) == 1 else 1
