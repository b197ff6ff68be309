"""The steps of a build: announced to whoever watches, timed for the manifest."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from edgehp.artifact.manifest import StepTime

__all__ = ["StepClock", "Watcher"]

# Called with a step's name; its context lasts as long as the step.
Watcher = Callable[[str], AbstractContextManager[Any]]


class StepClock:
    """Times the steps of a build.

    Attributes:
        times: of the steps that are done, in order.
    """

    def __init__(self, watcher: Watcher | None = None) -> None:
        """Time steps and tell `watcher` about them."""
        self._watcher = watcher
        self._times: list[StepTime] = []

    @property
    def times(self) -> tuple[StepTime, ...]:
        """The steps that are done."""
        return tuple(self._times)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Run the body as the step called `name`."""
        started = time.monotonic()
        if self._watcher is None:
            yield
        else:
            with self._watcher(name):
                yield
        self._times.append(StepTime(name, round(time.monotonic() - started, 3)))
