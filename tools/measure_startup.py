"""Measure how long `edgehp --help` takes to answer, beside an interpreter that does nothing.

The two take turns, so that whatever else the machine does falls on both alike. The time is that of
the whole process, from its start to its end, with the start of the interpreter included.

    python tools/measure_startup.py [--runs N] [--limit SECONDS] [--imports] [ARGUMENT ...]

Exit code 0: measured; 6: the median is above --limit.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

# As the installed entry point, and found wherever the package is importable.
COMMAND = (sys.executable, "-m", "edgehp")
NOTHING = (sys.executable, "-c", "pass")


def seconds(command: Sequence[str]) -> float:
    """The wall-clock seconds of one process; a RuntimeError if it fails."""
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    taken = time.perf_counter() - start
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr}")
    return taken


def alternately(commands: Sequence[Sequence[str]], runs: int) -> list[list[float]]:
    """The seconds of `runs` processes of each command, taken in turns after one of each."""
    for command in commands:
        seconds(command)  # what is read from disk for the first time is not the program's doing
    times: list[list[float]] = [[] for _ in commands]
    for _ in range(runs):
        for command, taken in zip(commands, times, strict=True):
            taken.append(seconds(command))
    return times


def imports(command: Sequence[str]) -> list[tuple[int, str]]:
    """The modules that the command imports: microseconds of their own and name, longest first."""
    timed = (command[0], "-X", "importtime", *command[1:])
    errors = subprocess.run(timed, capture_output=True, text=True, check=True).stderr
    rows = re.findall(r"^import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)$", errors, re.MULTILINE)
    return sorted(((int(own), name) for own, name in rows), reverse=True)


def _row(name: str, times: Sequence[float]) -> str:
    cuts = sorted(times)
    low, high = cuts[len(cuts) // 10], cuts[len(cuts) * 9 // 10]
    median = statistics.median(cuts)
    return f"{name:<24} {1e3 * median:7.1f} {1e3 * cuts[0]:7.1f} {1e3 * low:7.1f} {1e3 * high:7.1f}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure how long edgehp takes to start.")
    parser.add_argument("arguments", nargs="*", default=["--help"], help="of edgehp")
    parser.add_argument("--runs", type=int, default=21)
    parser.add_argument("--limit", type=float, help="seconds; a longer median ends with 6")
    parser.add_argument("--imports", action="store_true", help="list the slowest imports")
    given = parser.parse_args()
    if given.runs < 1:
        parser.error("--runs: expected 1 or more")
    command = (*COMMAND, *given.arguments)
    edgehp, nothing = alternately((command, NOTHING), given.runs)
    print(f"{given.runs} runs each, ms         median     min     p10     p90")
    print(_row(f"edgehp {' '.join(given.arguments)}", edgehp))
    print(_row("python -c pass", nothing))
    if given.imports:
        for own, name in imports(command)[:20]:
            print(f"{own / 1e3:8.1f} ms  {name}")
    if given.limit is not None and statistics.median(edgehp) > given.limit:
        print(f"the median is above {given.limit:g} s", file=sys.stderr)
        return 6
    return 0


if __name__ == "__main__":
    sys.exit(main())
