"""Seconds that every command's --help takes, the best of several starts. Run it on a quiet machine.

    python tools/help_times.py [STARTS]

Wall clock from the start of the interpreter to its end, as a user waits; the limits are 0.15 s for
``edgehp --help`` and 0.2 s for each command's. What a help may import is held by a test.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator

import click

from edgehp.cli.main import cli


def commands(group: click.Group, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words of every command, groups before what is in them."""
    yield words
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from commands(command, (*words, name))
        else:
            yield (*words, name)


def seconds(words: tuple[str, ...], starts: int) -> float:
    """The shortest of `starts` runs."""
    times = []
    for _ in range(starts):
        began = time.perf_counter()
        run = [sys.executable, "-m", "edgehp", *words, "--help"]
        subprocess.run(run, check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - began)
    return min(times)


def main() -> None:
    """Print a line a command."""
    starts = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    for words in commands(cli):
        took, limit = seconds(words, starts), 0.2 if words else 0.15
        mark = "" if took <= limit else f"  over {limit}"
        print(f"{took:.3f}  edgehp {' '.join((*words, '--help'))}{mark}")


if __name__ == "__main__":
    main()
