"""The newest frame: a thread that reads and overwrites one slot, and opens a lost camera again.

Reading may block without end (OpenCV issue 4468), so it has a thread of its own and the loop
judges its silence by the clock. One slot is the bounded queue: at most one frame waits, an older
one is dropped and counted, and memory does not depend on how slow the loop is.

Whatever a driver raises, the camera is closed and opened again. Should the thread end all the same,
`CaptureStatus.error` says so, and the loop sees it at its next tick.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

from edgehp.errors import DataError, EdgehpError, EnvironmentalError, without_password
from edgehp.runtime.settings import CaptureSettings
from edgehp.runtime.sources import Capture, Source, TimedCapture

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class CapturedFrame:
    """One frame as it came.

    Attributes:
        number: counts the frames that were read, from 1.
        pixels: as the device gave it; not checked yet.
        monotonic_ns: when `read` returned, on the clock of `time.monotonic_ns`. Exposure and
            transfer came before; OpenCV does not tell how long they took.
        utc_ns: the same moment, nanoseconds since 1970 UTC.
        seconds: the time that filters and timers go by: of a file, that in the film; else
            `monotonic_ns` in seconds.
    """

    number: int
    pixels: object
    monotonic_ns: int
    utc_ns: int
    seconds: float


@dataclass(frozen=True)
class CaptureStatus:
    """How the capture stands.

    Attributes:
        lost: why there is no camera now; None while it is open.
        ended: a file has no more frames; the last one may still be in the slot.
        error: what ended it for good (a file that cannot be opened, or ends early).
        captured: frames read.
        dropped: frames overwritten before the loop took them.
        reconnects: how often the camera was opened again.
        waiting: seconds that a call of the driver (open, read or close) has not come back for.
    """

    lost: str | None
    ended: bool
    error: EdgehpError | None
    captured: int
    dropped: int
    reconnects: int
    waiting: float


class CaptureThread:
    """Reads a source in a thread of its own; a context manager that starts and stops it."""

    def __init__(
        self, source: Source, settings: CaptureSettings, *, every_frame: bool = False
    ) -> None:
        """Nothing is opened yet.

        Args:
            source: what to read.
            settings: when a lost camera is opened again.
            every_frame: wait until the loop has taken a frame instead of dropping it, and do not
                play at the file's rate; for files.
        """
        self.source = source
        self._every_frame = every_frame and not source.live
        self._first, self._longest = settings.retry_first, settings.retry_longest
        self._stop = threading.Event()
        self._changed = threading.Condition()
        self._slot: CapturedFrame | None = None
        self._lost: str | None = None
        self._ended = False
        self._error: EdgehpError | None = None
        self._captured = self._dropped = self._reconnects = 0
        self._reopen: str | None = None
        self._called: float | None = None  # when a call of the driver began that is not back yet
        # A daemon: a read that never returns must not keep the process.
        self._thread = threading.Thread(target=self._run, name="capture", daemon=True)

    def __enter__(self) -> CaptureThread:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self, wait: float = 1.0) -> bool:
        """Stop reading; False if the device still holds the thread after `wait` seconds."""
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
        self._thread.join(wait)
        return not self._thread.is_alive()

    def take(self, timeout: float) -> CapturedFrame | None:
        """The newest frame that was not taken yet; None after `timeout` seconds without one."""
        with self._changed:
            if self._slot is None and not self._ended:
                self._changed.wait(timeout)
            frame, self._slot = self._slot, None
            self._changed.notify_all()
            return frame

    def status(self) -> CaptureStatus:
        """How it stands now."""
        called = self._called
        with self._changed:
            return CaptureStatus(
                self._lost,
                self._ended and self._slot is None,
                self._error,
                self._captured,
                self._dropped,
                self._reconnects,
                0.0 if called is None else time.monotonic() - called,
            )

    def reopen(self, reason: str) -> None:
        """Ask for the camera to be closed and opened again; for files, nothing happens."""
        if self.source.live:
            with self._changed:
                self._reopen = reason

    def _run(self) -> None:
        try:
            self._cycle()
        except BaseException as e:
            # Whatever it is: a thread that ends unseen would leave the loop waiting for ever.
            logger.debug("the capture thread ended", exc_info=True)
            self._finish(
                EnvironmentalError(
                    f"{self.source.name}: the capture thread ended: {_line(e)}; only a new process "
                    "helps: let the service manager start one"
                )
            )

    def _cycle(self) -> None:
        """Open, read, close, again and again; once for a file."""
        pause = self._first
        complaints = Complaints()
        while not self._stop.is_set():
            frames, reason, error = self._read_once()
            if not self.source.live:
                self._finish(error)
                return
            if self._stop.is_set():
                return
            # A camera that delivered deserves a quick first attempt; one that did not, patience.
            pause = self._first if frames > 0 else min(2 * pause, self._longest)
            with self._changed:
                self._lost = reason
            named = self.source.named(reason)
            lines = [] if error is None else str(error).splitlines()[1:]
            hint = "".join(f"\n{without_password(line)}" for line in lines)
            if complaints.due(reason, time.monotonic()):
                logger.warning(
                    "%s; trying again, every %g s at the latest%s", named, self._longest, hint
                )
            else:
                logger.debug("%s; again in %.1f s", named, pause)
            self._stop.wait(pause)

    def _read_once(self) -> tuple[int, str, EdgehpError | None]:
        """Open the source, read it to its end, close it.

        Returns:
            How many frames came, why it ended, and what is wrong with a file.
        """
        before, capture = self._captured, None
        reason = "the stream ended: read() gave no frame"
        error: EdgehpError | None = None
        try:
            with self._driver():
                capture = self.source.open()
            stopped = self._read(capture)
            reason = stopped or reason
            if not self.source.live and stopped is None:
                missing = cast(TimedCapture, capture).shortfall()
                error = None if missing is None else DataError(missing)
        # Drivers and their wrappers raise what they like, and the camera must come back after it.
        except Exception as e:
            reason = _line(e) if capture is None else f"reading failed: {_line(e)}"
            error = e if isinstance(e, EdgehpError) else EnvironmentalError(reason)
        if capture is not None:
            try:
                with self._driver():
                    capture.release()
            except Exception as e:
                logger.warning("%s", self.source.named(f"closing failed: {_line(e)}"))
        return self._captured - before, reason, error

    def _read(self, capture: Capture) -> str | None:
        """Hand over frames until there are no more (None), or say why reading was stopped."""
        start, first = time.monotonic(), 0.0
        opened = self._captured
        while not self._stop.is_set():
            with self._driver():
                got, pixels = capture.read()
            if not got or pixels is None:
                return None
            film = None if self.source.live else cast(TimedCapture, capture).seconds
            if film is not None and not self._every_frame:
                first = film if self._captured == opened else first
                self._stop.wait(max(0.0, start + film - first - time.monotonic()))
            now, utc = time.monotonic_ns(), time.time_ns()
            seconds = now / 1e9 if film is None else film
            frame = CapturedFrame(self._captured + 1, pixels, now, utc, seconds)
            if (reason := self._put(frame, self._captured == opened)) is not None:
                return reason
        return "stopped"

    @contextmanager
    def _driver(self) -> Iterator[None]:
        """Around every call that may never come back."""
        self._called = time.monotonic()
        try:
            yield
        finally:
            self._called = None

    def _put(self, frame: CapturedFrame, first: bool) -> str | None:
        """Overwrite the slot; a reason if the camera is to be opened again."""
        with self._changed:
            while self._every_frame and self._slot is not None and not self._stop.is_set():
                self._changed.wait(0.1)
            if self._stop.is_set():
                return "stopped"
            if first:
                self._reconnects += self._captured > 0
                self._lost = None
            self._captured = frame.number
            self._dropped += self._slot is not None
            self._slot = frame
            self._changed.notify_all()
            reason, self._reopen = self._reopen, None
            return reason

    def _finish(self, error: EdgehpError | None) -> None:
        with self._changed:
            self._ended, self._error, self._lost = True, error, None
            self._changed.notify_all()


def _line(error: BaseException) -> str:
    """An error in one line; OpenCV's have several, and may repeat the URL with its password."""
    words = error.sentence if isinstance(error, EdgehpError) else str(error)
    return without_password(" ".join(words.split())) or type(error).__name__


# --- saying a lasting fault at growing intervals --------------------------------------------------

# Seconds until the same words are said again the first time, doubled each time, at most.
_FIRST, _LONGEST = 60.0, 3600.0
# Words that were not met for so long are news again.
_FORGOTTEN = 60.0
# Words with numbers in them may be new each time; memory may not grow.
_MOST = 16


@dataclass
class _Said:
    due: float
    interval: float
    met: float


class Complaints:
    """What was said when. Two faults that take turns are each said once, too."""

    def __init__(self) -> None:
        """Nothing was said."""
        self._said: dict[str, _Said] = {}

    def due(self, words: str, now: float) -> bool:
        """Whether to say `words` at the time `now`, seconds; True counts as said."""
        said = self._said.get(words)
        if said is None or now - said.met > _FORGOTTEN:
            self._said.pop(words, None)
            if len(self._said) >= _MOST:
                del self._said[min(self._said, key=lambda each: self._said[each].met)]
            self._said[words] = _Said(now + _FIRST, _FIRST, now)
            return True
        said.met = now
        if now < said.due:
            return False
        said.interval = min(2 * said.interval, _LONGEST)
        said.due = now + said.interval
        return True
