"""OpenCV's own log."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import cv2

__all__ = ["opencv_silenced"]

# cv2.utils.logging.LOG_LEVEL_SILENT, which older releases do not export.
_SILENT = 0


@contextmanager
def opencv_silenced(logger: logging.Logger) -> Iterator[None]:
    """Keep OpenCV from writing to stderr by itself; at DEBUG of `logger` it may.

    The level is the process's: what other threads' calls would log meanwhile is lost too.
    """
    if logger.isEnabledFor(logging.DEBUG):
        yield
        return
    try:
        before = cv2.utils.logging.setLogLevel(_SILENT)
    except AttributeError:  # a build without this module
        yield
        return
    try:
        yield
    finally:
        # Two threads at once: the second one found silence, and must not make it last.
        if before != _SILENT:
            cv2.utils.logging.setLogLevel(before)
