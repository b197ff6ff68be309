"""How commands speak: tables and JSON on stdout, steps with their times on stderr."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import click

__all__ = ["Step", "Steps", "format_table", "print_json", "print_table", "styled", "use_colour"]

logger = logging.getLogger(__name__)

# A terminal line rewritten more often than this only flickers.
REDRAW_SECONDS = 0.1


def use_colour(stream: TextIO) -> bool:
    """Whether `stream` is a terminal whose user has not asked for plain text (no-color.org)."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb" and stream.isatty()


def styled(text: str, colour: str) -> str:
    """`text` in one of click's colours where stdout can show it, else as it is."""
    return click.style(text, fg=colour) if use_colour(sys.stdout) else text


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def format_table(
    headers: Sequence[str], rows: Sequence[Sequence[object]], right: Collection[int] = ()
) -> str:
    """Rows as aligned text columns under their headers.

    Args:
        headers: one title a column.
        rows: cells; None is shown as ``-``, a bool as yes or no, a float with four significant
            digits (pass a string for anything else).
        right: indices of the columns to align right (numbers).

    Returns:
        The lines joined by newlines, without trailing blanks.

    Raises:
        ValueError: a row has more or fewer cells than there are headers.
    """
    cells = [list(headers), *([_cell(value) for value in row] for row in rows)]
    for row in cells:
        if len(row) != len(headers):
            raise ValueError(f"row {row} has {len(row)} cells; expected {len(headers)}")
    # Styled cells carry invisible characters: count what is seen.
    widths = [max(len(click.unstyle(row[i])) for row in cells) for i in range(len(headers))]
    cells.insert(1, ["-" * width for width in widths])
    lines = []
    for row in cells:
        parts = []
        for i, (cell, width) in enumerate(zip(row, widths, strict=True)):
            blanks = " " * (width - len(click.unstyle(cell)))
            parts.append(blanks + cell if i in right else cell + blanks)
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)


def print_table(
    headers: Sequence[str], rows: Sequence[Sequence[object]], right: Collection[int] = ()
) -> None:
    """Print `format_table` on stdout."""
    click.echo(format_table(headers, rows, right))


def _plain(value: object) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    # numpy scalars and arrays, without importing numpy for it.
    for method in ("tolist", "to_dict"):
        convert = getattr(value, method, None)
        if callable(convert):
            return convert()
    raise TypeError(f"{type(value).__name__} has no JSON form")


def print_json(value: object) -> None:
    """Print `value` on stdout as indented JSON.

    Paths become strings, numpy values plain numbers and lists, objects with ``to_dict`` its
    result.

    Raises:
        ValueError: a number is NaN or infinite, which JSON does not have: say null and why.
        TypeError: a value has no JSON form.
    """
    click.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False, default=_plain))


class LiveLine:
    """One line on a terminal that is drawn over and over; nothing where there is no terminal.

    Attributes:
        on: whether there is a terminal.
    """

    def __init__(self, stream: TextIO | None = None, quiet: bool = False) -> None:
        self._stream = sys.stderr if stream is None else stream
        self.on = not quiet and self._stream.isatty()

    def draw(self, text: str) -> None:
        """Replace the line by `text`, which may be empty."""
        if self.on:
            self._stream.write(f"\r\x1b[K{text}")
            self._stream.flush()


class Step:
    """One running step of `Steps`: tell it how far it is."""

    def __init__(self, owner: Steps, name: str, total: int | None) -> None:
        self.name = name
        self.total = total
        self.done = 0
        self._owner = owner
        self._began = self._drawn = time.monotonic()

    def advance(self, count: int = 1) -> None:
        """Count `count` more items as done and redraw the line, at most ten times a second.

        Where the total is known, the line says how many are done a second and the time left.
        """
        self.done += count
        now = time.monotonic()
        if now - self._drawn >= REDRAW_SECONDS:
            self._drawn = now
            text = f"{self.name} ... {self.done}"
            if self.total:
                rate = self.done / (now - self._began)
                left = timedelta(seconds=round((self.total - self.done) / rate))
                text += f"/{self.total}  {rate:.3g}/s, {left} left"
            self._owner.draw(text)


class Steps:
    """The steps of a long command and their times, drawn on stderr when it is a terminal.

    Use::

        steps = Steps()
        with steps("calibrate", total=len(crops)) as step:
            for crop in crops:
                observe(crop)
                step.advance()

    On anything but a terminal nothing is drawn; each step is logged at level INFO.

    Attributes:
        seconds: wall-clock seconds of each finished step, in order.
    """

    def __init__(self, stream: TextIO | None = None, quiet: bool = False) -> None:
        stream = sys.stderr if stream is None else stream
        self._line = LiveLine(stream, quiet)
        self._colour = use_colour(stream)
        self.seconds: dict[str, float] = {}

    def draw(self, text: str) -> None:
        """Replace the current terminal line by `text`."""
        self._line.draw(text)

    def _end(self, mark: str, colour: str, text: str) -> None:
        if self._line.on:
            self.draw((click.style(mark, fg=colour) if self._colour else mark) + f" {text}\n")

    @contextmanager
    def __call__(self, name: str, total: int | None = None) -> Iterator[Step]:
        """Run the body as the step called `name`, of `total` items if that is known."""
        started = time.monotonic()
        self.draw(f"{name} ...")
        try:
            yield Step(self, name, total)
        except BaseException:
            # Interruptions too: the line must say where the command stopped.
            seconds = time.monotonic() - started
            self._end("x", "red", f"{name} stopped after {seconds:.1f} s")
            logger.info("%s stopped after %.1f s", name, seconds)
            raise
        seconds = time.monotonic() - started
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        self._end("+", "green", f"{name}  {seconds:.1f} s")
        logger.info("%s: %.1f s", name, seconds)
