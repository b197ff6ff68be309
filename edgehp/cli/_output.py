"""How commands answer: tables that fit the terminal, and JSON."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO, TypeVar

import click

T = TypeVar("T")
_STYLED = re.compile(r"((?:\x1b\[[0-9;]*m)+)(.*?)(\x1b\[0m)", re.DOTALL)
# Longer words may be cut: paths and hashes.
_LONGEST_WORD = 20


def styled(text: str, colour: str, stream: TextIO | None = None, **how: Any) -> str:
    """`text` in one of click's colours on a terminal (`stream`, stdout), else as it is.

    As it is also where the user has asked for that (no-color.org).
    """
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return click.style(text, fg=colour, **how) if (stream or sys.stdout).isatty() else text


def wrapped(text: str, indent: str = "") -> str:
    """`text` in lines that fit the terminal, those after the first indented.

    Commands to copy, which begin with two blanks, stay whole, and so do words.
    """
    width, lines = max(40, _columns()), []
    for line in text.splitlines() or [""]:
        if line.startswith("  "):
            lines.append(line)
            continue
        at = 0
        for word in line.split(" "):
            # What colours a word takes no place.
            length = len(click.unstyle(word))
            if at and at + 1 + length <= width:
                lines[-1] += f" {word}"
                at += 1 + length
            else:
                lines.append(indent + word if at else word)
                at = len(indent) + length if at else length
    return "\n".join(lines)


def say(text: str, err: bool = False) -> None:
    """Print sentences on stdout, or stderr, in lines that fit where it is a terminal."""
    terminal = (sys.stderr if err else sys.stdout).isatty()
    click.echo(wrapped(text) if terminal else text, err=err)


def conclude(word: str, colour: str, text: str) -> None:
    """Print the verdict: a coloured word and a sentence."""
    click.echo("")
    say(f"{styled(word, colour, bold=True)}  {text}")


def _columns() -> int:
    return shutil.get_terminal_size((80, 24)).columns


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def _wrap(cell: str, width: int) -> list[str]:
    """The lines of a cell; each keeps its colour."""
    found = _STYLED.fullmatch(cell)
    text = found[2] if found else cell
    lines = [
        piece
        for line in text.splitlines() or [""]
        for piece in textwrap.wrap(line, width, break_on_hyphens=False) or [""]
    ]
    return [f"{found[1]}{line}{found[3]}" for line in lines] if found else lines


def _fit(widths: list[int], floors: list[int], right: Collection[int], width: int) -> list[int]:
    """Narrower columns where all together are wider than `width`: always the widest of text."""
    widths = list(widths)
    while sum(widths) > width - 2 * (len(widths) - 1):
        able = [i for i, w in enumerate(widths) if i not in right and w > floors[i]]
        if not able:
            break
        widths[max(able, key=lambda i: widths[i])] -= 1
    return widths


def format_table(
    headers: Sequence[str],
    rows: Sequence[Sequence[object]],
    right: Collection[int] = (),
    width: int | None = None,
) -> str:
    """Rows as aligned text columns under their headers, wrapped to fit the terminal.

    Args:
        headers: one title a column.
        rows: cells; None is shown as ``-``, a bool as yes or no, a float with four significant
            digits (pass a string for anything else).
        right: indices of the columns to align right (numbers); they are never wrapped.
        width: columns to fit in; the terminal's when omitted, 80 where there is none.

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
    natural = [
        max(len(line) for row in cells for line in click.unstyle(row[i]).splitlines() or [""])
        for i in range(len(headers))
    ]
    # Wrapped between words, however long: but a path or a sum of digits may be cut.
    floors = [
        max(len(word) for row in cells for word in [*click.unstyle(row[i]).split(), ""])
        for i in range(len(headers))
    ]
    floors = [min(floor, _LONGEST_WORD) for floor in floors]
    widths = _fit(natural, floors, right, _columns() if width is None else width)
    cells.insert(1, ["-" * width for width in widths])
    if not any(headers):
        del cells[:2]
    lines = []
    for row in cells:
        parts = [_wrap(cell, width) for cell, width in zip(row, widths, strict=True)]
        for n in range(max(map(len, parts))):
            line = []
            for i, (part, width) in enumerate(zip(parts, widths, strict=True)):
                cell = part[n] if n < len(part) else ""
                blanks = " " * (width - len(click.unstyle(cell)))
                line.append(blanks + cell if i in right else cell + blanks)
            lines.append("  ".join(line).rstrip())
    return "\n".join(lines)


def print_table(
    headers: Sequence[str], rows: Sequence[Sequence[object]], right: Collection[int] = ()
) -> None:
    """Print `format_table` on stdout."""
    click.echo(format_table(headers, rows, right))


def print_columns(
    rows: Iterable[T], columns: Mapping[str, Callable[[T], object]], right: Collection[int] = ()
) -> None:
    """Print a table by its columns: their titles, and what each shows of a row."""
    print_table([*columns], [[show(row) for show in columns.values()] for row in rows], right)


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
    from edgehp.files import plain

    return plain(value)


def answer(as_json: bool, values: object, text: str) -> None:
    """Print `values` as JSON where that was asked for, else `text`."""
    if as_json:
        print_json(values)
    else:
        click.echo(text)


def print_json(value: object) -> None:
    """Print `value` on stdout as indented JSON.

    Paths become strings, numpy values plain numbers and lists, objects with ``to_dict`` its
    result, records and dataclasses dictionaries.

    Raises:
        ValueError: a number is NaN or infinite, which JSON does not have: say null and why.
        TypeError: a value has no JSON form.
    """
    click.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False, default=_plain))
