"""The artifact's engine, opened again when it fails."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from concurrent.futures import Future

from edgehp.artifact.open import OpenedNetwork
from edgehp.engines.base import Face, Prediction, crops_frames, infer_frames
from edgehp.engines.cuda import GpuLostError
from edgehp.errors import EdgehpError, EnvironmentalError

logger = logging.getLogger(__name__)

# Seconds before a failed engine is first opened again, doubled each time, at most.
_PAUSE_S, _LONGEST_S = 0.2, 5.0
# A GPU that fell off the bus does not come back to this process: give up and be started again.
_ATTEMPTS = 6
# A driver that is missing is waited for so long, seconds, and counts as no attempt.
_PATIENCE_S = 60.0
# A driver that has not come back from opening by then never will; a self-test may take as long.
_HANGS_S = 120.0
# The service manager waits five seconds for the end of the process.
_END_S = 2.0


class EngineFaultError(EnvironmentalError):
    """The engine gave no usable answer for this frame."""


def _opening(
    opener: Callable[[], OpenedNetwork], broken: OpenedNetwork | None
) -> Future[OpenedNetwork]:
    """Close what failed and open it again, in a thread of its own.

    Opening verifies hashes, deserializes and runs golden vectors. That may take longer than the
    service manager waits for a sign of life from the loop, on a board that is recovering. A daemon:
    a driver that hangs must not keep the process.
    """
    opening = Future[OpenedNetwork]()

    def work() -> None:
        try:
            if broken is not None:
                _close(broken)
            opening.set_result(opener())
        except BaseException as e:
            # Of whatever kind: it is raised where somebody sees it.
            opening.set_exception(e)

    threading.Thread(target=work, name="engine", daemon=True).start()
    return opening


def _abandon(opening: Future[OpenedNetwork]) -> None:
    """Close what is opened: now, or later where the driver takes longer than the end may."""
    futures.wait([opening], _END_S)
    opening.add_done_callback(lambda done: None if done.exception() else _close(done.result()))


def _close(network: OpenedNetwork) -> None:
    try:
        network.__exit__(None, None, None)
    except (EdgehpError, RuntimeError, OSError) as e:
        logger.warning("closing the engine failed too: %s", e)


class EngineHost:
    """Keeps one engine open.

    Attributes:
        network: the one that is open, or was last.
        faults: how often it failed.
    """

    def __init__(self, opener: Callable[[], OpenedNetwork]) -> None:
        """Open and test it by `opener`; a first failure is the caller's.

        Raises:
            EdgehpError: it cannot be opened.
        """
        self._opener = opener
        self._pause, self._next = _PAUSE_S, 0.0
        self._attempts = 0
        self._why = ""
        self._gone_since: float | None = None
        self.faults = 0
        self.network = opener()
        self._opened: OpenedNetwork | None = self.network
        self._broken: OpenedNetwork | None = None
        self._opening: Future[OpenedNetwork] | None = None
        self._opening_since = 0.0

    @property
    def driver_gone(self) -> bool:
        """Whether it was its environment (a driver, a device) that kept it from opening last."""
        return self._gone_since is not None

    @property
    def crops_frames(self) -> bool:
        """Whether the engine that is open takes frames as their source gives them."""
        return self._opened is not None and crops_frames(self._opened.engine) is not None

    def infer(self, faces: Sequence[Face]) -> Prediction:
        """The engine's answer; returns at once while an engine that failed is opened again.

        Args:
            faces: frames with boxes that have an area inside them; cut out as the network that is
                open now wants it.

        Raises:
            EngineFaultError: it failed, gave no numbers, or is not open again yet.
            EnvironmentalError: it could not be opened again for good, or its driver hangs.
            GpuLostError: nothing but a new process can use the GPU.
        """
        opened = self._opened or self._reopened()
        try:
            answer = infer_frames(opened.engine, faces, opened.preprocessing)
        except GpuLostError:
            raise
        # RuntimeError and OSError: what native runtimes raise past their wrappers.
        except (EdgehpError, RuntimeError, OSError) as e:
            raise self._failed(f"the engine failed: {e}") from e
        if not answer.finite.all():
            raise self._failed("the engine gave something else than numbers")
        self._attempts, self._pause, self._gone_since = 0, _PAUSE_S, None
        return answer

    def close(self) -> None:
        """Close the engine."""
        if self._opening is not None:
            _abandon(self._opening)
            self._opening = None
        for network in (self._opened, self._broken):
            if network is not None:
                _close(network)
        self._opened = self._broken = None

    def _failed(self, why: str) -> EngineFaultError:
        self.faults += 1
        self._why = why
        logger.warning("%s; opened again in %.1f s", why, self._pause)
        self._broken, self._opened = self._opened, None
        self._next = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, _LONGEST_S)
        return EngineFaultError(why)

    def _reopened(self) -> OpenedNetwork:
        """The engine, once another thread has opened it again."""
        if self._opening is None:
            self._begin()
        elif self._opening.done():
            opening, self._opening = self._opening, None
            try:
                self._opened = opening.result()
            except GpuLostError:
                raise
            # Of whatever kind: it was raised in another thread, and this one must live.
            except Exception as e:
                if isinstance(e, EnvironmentalError):
                    self._gone_since = self._gone_since or time.monotonic()
                    self._attempts -= 1
                else:
                    self._gone_since = None
                raise self._failed(f"the engine cannot be opened again: {e}") from e
            # May be another one than before: an installation can have replaced the slot.
            self.network = self._opened
            logger.warning("the engine is open again")
            return self._opened
        elif time.monotonic() - self._opening_since > _HANGS_S:
            raise EnvironmentalError(
                f"the engine's driver has not come back from opening it for {_HANGS_S:g} s "
                f"({self._why}); it hangs, only a new process helps: let the service manager "
                "start one"
            )
        raise EngineFaultError(self._why)

    def _begin(self) -> None:
        """Have it opened again, after a pause and for so many times."""
        if time.monotonic() < self._next:
            return
        gone = self._gone_since
        if gone is not None and time.monotonic() - gone > _PATIENCE_S:
            raise EnvironmentalError(
                f"the engine's driver or device has been missing for {_PATIENCE_S:g} s: {self._why}"
            )
        if self._attempts >= _ATTEMPTS:
            raise EnvironmentalError(
                f"the engine was opened again {self._attempts} times and works no better: "
                f"{self._why}"
            )
        self._attempts += 1
        self._opening, self._opening_since = _opening(self._opener, self._broken), time.monotonic()
        self._broken = None
