"""TensorRT's messages into Python logging, with the last errors kept for our own sentences.

TensorRT reports most failures as None or False and the reason only to its logger. The logger gets
everything an `IErrorRecorder` would, and parser and builder errors besides, so it is the recorder.
"""

from __future__ import annotations

import logging
from collections import deque
from functools import cache
from typing import Any

__all__ = ["logger_of"]

_log = logging.getLogger(__name__)
_KEPT = 8


@cache
def logger_of(trt: Any) -> Any:
    """The `ILogger` of the module `trt`, with the methods `reasons()` and `forget()`.

    One for the life of the process, because TensorRT registers one for all its builders and
    runtimes, ignores every later one, and must not outlive it.
    """
    levels = {
        "INTERNAL_ERROR": logging.ERROR,
        "ERROR": logging.ERROR,
        "WARNING": logging.WARNING,
        "INFO": logging.DEBUG,
        "VERBOSE": logging.DEBUG,
    }
    base: Any = trt.ILogger

    class Logger(base):  # type: ignore[misc]
        """The bridge; defined here because its base comes from the module given."""

        def __init__(self) -> None:
            base.__init__(self)
            self._errors: deque[str] = deque(maxlen=_KEPT)

        def log(self, severity: Any, message: str) -> None:
            name = getattr(severity, "name", str(severity))
            level = levels.get(name, logging.WARNING)
            if level >= logging.ERROR:
                self._errors.append(" ".join(message.split())[:400])
            # The failure is raised as an error with this reason: logging it too would say it twice.
            _log.log(logging.DEBUG if level >= logging.ERROR else level, "%s", message)

        def reasons(self) -> str:
            """The errors since `forget`, the first first; or that there were none."""
            return "; ".join(dict.fromkeys(self._errors)) or "TensorRT gave no reason"

        def forget(self) -> None:
            """Drop the errors kept."""
            self._errors.clear()

    return Logger()
