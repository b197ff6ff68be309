"""How far long work is: said by the loops that do it, shown by whoever listens.

A loop writes ``for crop in track(crops, "crops")``, a part of the work ``with step("calibrate")``.
Without a listener both cost next to nothing. The command line listens (`edgehp.cli._display`); a
program of yours may do so as well:

    with listening(my_listener):
        build(request)

Only the thread that listens is heard: what others do is told by the loop that collects it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol, TypeVar

T = TypeVar("T")


@dataclass(eq=False)
class Step:
    """A part of the work that is going on.

    Attributes:
        name: what is done, in a word or two.
        total: how much there is to do, None where nobody knows.
        unit: what is counted, such as ``"crops"``; ``"B"`` are bytes.
        done: how much is done.
        text: figures of the moment, for people.
    """

    name: str
    total: float | None = None
    unit: str = ""
    done: float = 0
    text: str = ""
    _changed: Callable[[], None] | None = None

    def advance(self, count: float = 1) -> None:
        """Count `count` more as done."""
        self.update(self.done + count)

    def update(
        self, done: float | None = None, total: float | None = None, text: str | None = None
    ) -> None:
        """Say how much is done, of how much, or the figures of the moment."""
        self.done = self.done if done is None else done
        self.total = self.total if total is None else total
        self.text = self.text if text is None else text
        if self._changed is not None:
            self._changed()


class Listener(Protocol):
    """Is told of every step, from the inside out at their ends."""

    def begin(self, step: Step) -> Callable[[], None]:
        """A step begins; returns what is to be called after every change of it."""

    def end(self, step: Step, completed: bool) -> None:
        """The step that began last is over; `completed` unless an error or Ctrl-C ended it."""


_LISTENER: ContextVar[Listener | None] = ContextVar("edgehp.progress", default=None)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Tell `listener` of the steps inside."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


@contextmanager
def step(name: str, total: float | None = None, unit: str = "") -> Iterator[Step]:
    """Do a part of the work inside.

    Args:
        name: what is done, in a word or two.
        total: how much there is to do, if that is known.
        unit: what is counted, such as ``"crops"``.
    """
    going, listener = Step(name, total, unit), _LISTENER.get()
    if listener is None:
        yield going
        return
    going._changed = listener.begin(going)
    completed = False
    try:
        yield going
        completed = True
    except GeneratorExit:  # a loop that took as much as it needed
        completed = True
        raise
    finally:
        listener.end(going, completed)


def track(items: Iterable[T], unit: str, name: str = "", total: float | None = None) -> Iterator[T]:
    """The items, each counted when the loop comes back for the next.

    Args:
        items: what is looped over.
        unit: what they are, such as ``"crops"``.
        name: what is done with them.
        total: how many there are, where `items` does not know.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    with step(name, total, unit) as going:
        for item in items:
            yield item
            going.advance()
