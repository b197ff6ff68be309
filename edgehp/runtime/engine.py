"""The artifact's engine, opened again when it fails."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import numpy as np

from edgehp.engines.base import Crops, Prediction
from edgehp.errors import EdgehpError, EnvironmentalError
from edgehp.validation.subjects import OpenedNetwork

__all__ = ["EngineFaultError", "EngineHost"]

logger = logging.getLogger(__name__)

# A GPU that fell off the bus does not come back to this process: give up and be started again.
_ATTEMPTS = 6


class EngineFaultError(EnvironmentalError):
    """The engine gave no usable answer for this frame."""


class EngineHost:
    """Keeps one engine open.

    Attributes:
        network: the one that is open, or was last.
        faults: how often it failed.
    """

    def __init__(
        self, opener: Callable[[], OpenedNetwork], pause: float = 0.2, longest: float = 5.0
    ) -> None:
        """Open it; a first failure is the caller's.

        Args:
            opener: opens and tests the engine.
            pause: seconds before it is first opened again; doubled each time.
            longest: the longest pause, seconds.

        Raises:
            EdgehpError: it cannot be opened.
        """
        self._opener = opener
        self._first, self._longest = pause, longest
        self._pause, self._next = pause, 0.0
        self._attempts = 0
        self._why = ""
        self.faults = 0
        self.network = opener()
        self._opened: OpenedNetwork | None = self.network

    def infer(self, crops: Crops) -> Prediction:
        """The engine's answer.

        Args:
            crops: uint8 [N, S, S, 3], RGB.

        Raises:
            EngineFaultError: it failed, gave no numbers, or waits to be opened again.
            EnvironmentalError: it could not be opened again for good.
        """
        opened, taken = self._opened, self.network.preprocessing
        if opened is None:
            opened = self._reopen()
            if opened.preprocessing != taken:
                raise EngineFaultError("the engine that is open now takes other crops than this")
        try:
            answer = opened.engine.infer(crops)
        # RuntimeError and OSError: what native runtimes raise past their wrappers.
        except (EdgehpError, RuntimeError, OSError) as e:
            raise self._failed(f"the engine failed: {e}") from e
        if not (np.isfinite(answer.angles).all() and np.isfinite(answer.spread).all()):
            raise self._failed("the engine gave something else than numbers")
        self._attempts, self._pause = 0, self._first
        return answer

    def close(self) -> None:
        """Close the engine."""
        if self._opened is not None:
            self._opened.__exit__(None, None, None)
            self._opened = None

    def _failed(self, why: str) -> EngineFaultError:
        self.faults += 1
        self._why = why
        logger.warning("%s; opened again in %.1f s", why, self._pause)
        try:
            self.close()
        except (EdgehpError, RuntimeError, OSError) as e:
            logger.warning("closing the failed engine failed too: %s", e)
            self._opened = None
        self._next = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, self._longest)
        return EngineFaultError(why)

    def _reopen(self) -> OpenedNetwork:
        if time.monotonic() < self._next:
            raise EngineFaultError(self._why)
        if self._attempts >= _ATTEMPTS:
            raise EnvironmentalError(
                f"the engine was opened again {self._attempts} times and works no better: "
                f"{self._why}"
            )
        self._attempts += 1
        try:
            self._opened = self._opener()
        except (EdgehpError, RuntimeError, OSError) as e:
            raise self._failed(f"the engine cannot be opened again: {e}") from e
        # May be another one than before: an installation can have replaced the slot.
        self.network = self._opened
        logger.warning("the engine is open again")
        return self._opened
