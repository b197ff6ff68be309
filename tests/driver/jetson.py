"""edgehp as a Jetson would run it: a board's files as this machine's, and its rails under load.

Run as ``python -m tests.driver.jetson ROOT BOARD words...`` with the driver double in the library
path; ROOT is a tree that the `BOARD` of `tests.boards.JETSONS` wrote.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgehp import device
from tests.boards import JETSONS


def main() -> None:
    root, board, sys.argv[1:] = Path(sys.argv[1]), JETSONS[sys.argv[2]], sys.argv[3:]
    usual, device.SYSTEM_ROOT = device.SYSTEM_ROOT, root
    for found in vars(device).values():
        if usual in (getattr(found, "__defaults__", None) or ()):
            found.__defaults__ = tuple(root if d == usual else d for d in found.__defaults__)
    os.environ["PATH"] = f"{root / 'bin'}:{os.environ['PATH']}"

    from edgehp.cli.main import main as edgehp
    from edgehp.doctor import selftest

    load = selftest._load

    @contextmanager
    def loaded(cuda: selftest.Cuda | None) -> Iterator[None]:
        with load(cuda):
            board.set_power(root, 2.5)
            yield
        board.set_power(root)

    selftest._load = loaded
    edgehp()


if __name__ == "__main__":
    main()
