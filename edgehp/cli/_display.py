"""The live display: bars with rate and remaining time, notes below them, plain lines elsewhere.

On a terminal `rich` draws one region while the outermost step lasts: its parts, those that are
done with their times, then what was said meanwhile. Where stderr is no terminal, or rich is not
installed (a device needs none of it), finished parts are lines, and long ones report every
`_PLAIN_SECONDS`. ``--quiet`` shows nothing.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from typing import TYPE_CHECKING, TextIO

import click

from edgehp.cli._command import Notes, loudness
from edgehp.progress import Step, listening

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live
    from rich.spinner import Spinner

# A long step says how far it is after so many seconds, where nothing can be drawn.
_PLAIN_SECONDS = 30.0
# Notes that a live region shows while it is drawn; all of them at its end.
_NOTES_SHOWN = 4
_BAR = 24


class _Part:
    """A step and when it began."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.began = time.monotonic()
        self.said = self.began
        self.had_parts = False

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def figures(self) -> list[str]:
        """How far it is: count, rate, remaining time."""
        s, parts = self.step, []
        scale, unit = (1e6, "MB") if s.unit == "B" else (1, s.unit)
        if s.done or s.total:
            digits = 1 if scale > 1 else 0
            of = "" if s.total is None else f"/{s.total / scale:.{digits}f}"
            parts.append(f"{s.done / scale:.{digits}f}{of} {unit}".rstrip())
        if s.done > 0 and unit != "s" and self.seconds > 0.5:
            rate = s.done / self.seconds
            parts.append(f"{rate / scale:.3g}/s")
            if s.total is not None:
                parts.append(f"{_clock(max(0.0, s.total - s.done) / rate)} left")
        return parts


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _outer(parts: Sequence[_Part]) -> _Part:
    """The step that goes on: inside the command's own, unless that has nothing but a loop."""
    return parts[1] if len(parts) > 1 and parts[1].step.name else parts[0]


class Display:
    """Shows the steps of a command, and what is logged while they go on. Use it with ``with``."""

    def __init__(self, stream: TextIO | None = None) -> None:
        """Show on `stream`, stderr when omitted."""
        self._stream = sys.stderr if stream is None else stream
        self._parts: list[_Part] = []
        self._done: list[tuple[str, float, bool]] = []
        self._notes: list[tuple[str, int]] = []
        self._console: Console | None = None
        self._live: Live | None = None
        self._spinner: Spinner | None = None
        self._handlers: list[Notes] = []
        self._stack = ExitStack()
        self._quiet = loudness() < 0

    def __enter__(self) -> Display:
        self._stack.enter_context(listening(self))
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        self._stack.close()

    # --- what a listener is told ------------------------------------------------------------------

    def begin(self, step: Step) -> Callable[[], None]:
        """Show a step that begins."""
        for part in self._parts:
            part.had_parts = True
        part = _Part(step)
        self._parts.append(part)
        if len(self._parts) == 1 and self._drawn():
            self._start()
        return (lambda: None) if self._live is not None else (lambda: self._report(part))

    def end(self, step: Step, completed: bool) -> None:
        """Show that the step that began last is over."""
        # Found by itself: a loop that was left early may end after those around it.
        depth = next((i for i, p in enumerate(self._parts) if p.step is step), None)
        if depth is None:
            return
        part = self._parts.pop(depth)
        # An error says itself what failed; how long it took matters where that was long.
        said = completed or part.seconds >= _PLAIN_SECONDS
        if step.name and (depth == 1 or (depth == 0 and not part.had_parts)):
            if said or self._done:
                self._done.append((step.name, part.seconds, completed))
            if self._live is None and said and (depth == 1 or step.total is not None):
                how = (
                    f"{part.seconds:.1f} s" if completed else f"stopped after {part.seconds:.1f} s"
                )
                self._line(f"{step.name}: {how}")
        if not self._parts:
            self._stop()

    # --- plain lines ------------------------------------------------------------------------------

    def _line(self, text: str) -> None:
        if not self._quiet:
            click.echo(f"edgehp: {text}", file=self._stream)

    def _report(self, part: _Part) -> None:
        """Say how far a long step is, now and then."""
        now = time.monotonic()
        outer = _outer(self._parts)
        if now - outer.said >= _PLAIN_SECONDS:
            outer.said = now
            name = " ".join(dict.fromkeys(n for n in (outer.step.name, part.step.name) if n))
            figures = [*part.figures(), *([part.step.text] if part.step.text else [])]
            self._line(f"{name}: {', '.join(figures)}")

    # --- the live region --------------------------------------------------------------------------

    def _drawn(self) -> bool:
        terminal = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        return terminal and not self._quiet and find_spec("rich") is not None

    def _start(self) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.spinner import Spinner

        self._console = Console(file=self._stream, highlight=False)
        self._spinner = Spinner("line" if self._console.options.ascii_only else "dots")
        self._live = Live(
            get_renderable=self._render,
            console=self._console,
            refresh_per_second=8,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._handlers = [h for h in logging.getLogger().handlers if isinstance(h, Notes)]
        for handler in self._handlers:
            handler.say = lambda text, level: self._notes.append((text, level))
        self._live.start()

    def _stop(self) -> None:
        for handler in self._handlers:
            handler.say = None
        live, self._live = self._live, None
        if live is not None:
            self._parts.clear()
            live.stop()
            # Results begin below a blank line.
            click.echo(file=self._stream)
        self._done, self._notes, self._handlers = [], [], []

    def _render(self) -> RenderableType:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        if self._console is None:
            return ""
        plain = self._console.options.ascii_only
        good, bad = ("+", "x") if plain else ("✓", "✗")
        parts = list(self._parts)
        lines: list[RenderableType] = []
        names = [name for name, _, _ in self._done] + [_outer(parts).step.name for _ in parts[:1]]
        width = max((len(n) for n in names), default=0)
        for name, seconds, completed in list(self._done):
            line = Text().append(good if completed else bad, style="green" if completed else "red")
            line.append(f" {name:<{width}}")
            how = f"  {seconds:6.1f} s" if completed else f"  stopped after {seconds:.1f} s"
            lines.append(line.append(how, style="dim" if completed else "red"))
        if parts:
            lines += self._going(parts, width)
        notes = list(self._notes)
        hidden = len(notes) - _NOTES_SHOWN if parts else 0
        for text, level in notes[max(0, hidden) :]:
            row = Table.grid(padding=(0, 1))
            warning = level >= logging.WARNING
            row.add_row(
                Text("!" if warning else "-", style="yellow" if warning else "dim"),
                Text(text, style="default" if warning else "dim"),
            )
            lines.append(row)
        return Group(*lines)

    def _going(self, parts: list[_Part], width: int) -> list[RenderableType]:
        """The line of the step that goes on, with a bar where its inner loop has an end."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        outer, inner = _outer(parts), parts[-1]
        # The innermost loop that has an end says how far the step is.
        counted = next((p for p in reversed(parts) if p.step.total), inner)
        row = Table.grid(padding=(0, 1))
        cells: list[RenderableType] = [
            self._spinner or "",
            Text(f"{outer.step.name:<{width}}", style="bold"),
        ]
        named = [p.step.name for p in parts[2:] if p.step.name]
        if named:
            cells.append(Text(named[-1], style="dim"))
        if counted.step.total:
            cells.append(ProgressBar(counted.step.total, counted.step.done, width=_BAR))
        figures = counted.figures() or [f"{outer.seconds:.0f} s"]
        cells.append(Text("  ".join(figures), style="dim", overflow="ellipsis", no_wrap=True))
        row.add_row(*cells)
        if not counted.step.text:
            return [row]
        return [row, Text(f"  {counted.step.text}", style="dim", overflow="ellipsis", no_wrap=True)]
