"""The loop: takes the newest frame, says what it shows and what is wrong, and stays alive."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgehp.crop import Picture, cut_of
from edgehp.errors import DataError, EdgehpError, EnvironmentalError
from edgehp.pose import euler_from_matrix, matrix_from_euler
from edgehp.runtime.capture import CapturedFrame, CaptureStatus, CaptureThread
from edgehp.runtime.engine import EngineFaultError, EngineHost
from edgehp.runtime.filter import RotationFilter
from edgehp.runtime.frames import FrameHealth, as_rgb, nv12_picture
from edgehp.runtime.output import Metrics, Sink, Watchdog
from edgehp.runtime.records import (
    DEFAULT_BINS,
    Pose,
    StateRules,
    classify_pose,
    end_record,
    frame_record,
    json_line,
    status_record,
)
from edgehp.runtime.settings import Settings
from edgehp.runtime.sources import Source
from edgehp.runtime.tracking import Tracker

logger = logging.getLogger(__name__)

# Longest wait for a frame: how often readers are served and the clock is looked at without one.
_TICK = 0.05
# A run that has lasted so long does not die of its engine.
_SETTLED_NS = 30_000_000_000
# A run by hand (with a limit, or without a service manager) does not wait longer for a camera that
# has never given a frame.
_BY_HAND_S = 5.0
# A face detector that has failed for so long does not come back to this process.
_DETECTOR_S = 5.0
# How long the end of a run waits for a slow disk to have taken its confirmation.
_CONFIRM_S = 2.0


@dataclass(frozen=True)
class Summary:
    """What a run came to.

    Attributes:
        reason: why it ended.
        totals: counts by name.
        states: records by state.
    """

    reason: str
    totals: dict[str, int]
    states: dict[str, int]


@dataclass
class Runtime:
    """Everything one run needs; `run` runs it, once.

    Attributes:
        source: where frames come from.
        engine: what predicts.
        tracker: says where the face is.
        sinks: where the lines go.
        settings: limits and times.
        watchdog: the service manager.
        metrics: counters, where they are wanted.
        every_frame: do not drop frames of a file.
        limit: end after this many frames.
        confirm: called once, in a thread of its own, when the engine has answered for a frame, the
            run has lasted half a minute, or the camera's driver hangs: nobody may sit in the car,
            or the camera be broken, and neither is its fault.
    """

    source: Source
    engine: EngineHost
    tracker: Tracker
    sinks: Sequence[Sink]
    settings: Settings = field(default_factory=Settings)
    watchdog: Watchdog = field(default_factory=lambda: Watchdog({}))
    metrics: Metrics | None = None
    every_frame: bool = False
    limit: int | None = None
    confirm: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        """What the run changes."""
        s = self.settings
        self._stop_reason: str | None = None
        self._stop = threading.Event()
        self._health = FrameHealth(s.capture.frozen)
        self._filter = RotationFilter(s.filter)
        self._states: Counter[str] = Counter()
        self._frames = 0
        self._last_frame_ns = time.monotonic_ns()
        self._state: tuple[str, int] | None = None  # of moments without a frame; since when
        self._told_ns = 0
        self._stuck_since: float | None = None
        self._detector_since: float | None = None
        self._detector_faults = self._reconnects = 0
        self._confirming: threading.Thread | None = None
        # A film with few frames a second is not late between two of them.
        interval = 1 / self.source.fps if self.source.fps else 0.0
        self._stale = max(s.capture.stale, 3 * interval)
        self._lost = max(s.capture.lost, 3 * interval)

    def stop(self, reason: str) -> None:
        """End the run soon; may be called from a signal handler or another thread."""
        if self._stop_reason is None:
            self._stop_reason = reason
        self._stop.set()

    def run(self) -> Summary:
        """Run until `stop`, the end of a file, the limit, or a fault that a restart must cure.

        Raises:
            DataError: the file cannot be opened.
            EnvironmentalError: the camera's driver hangs, the engine cannot be opened again, or a
                run with a limit has no camera.
        """
        capture = CaptureThread(self.source, self.settings.capture, every_frame=self.every_frame)
        reason = "failed"
        try:
            with capture:
                self._last_frame_ns = time.monotonic_ns()
                self.watchdog.ready(f"reading {self.source.name}")
                reason = self._loop(capture)
                self.watchdog.stopping()
        except EdgehpError as e:
            reason = "failed: " + str(e).partition("\n")[0]
            raise
        finally:
            totals = self._totals(capture.status())
            self._write(end_record(reason, totals, time.time_ns()))
            for sink in self.sinks:
                sink.close()
            self.tracker.close()
            self.engine.close()
            if self.metrics is not None:
                self.metrics.close()
            self.watchdog.close()
            if self._confirming is not None:
                self._confirming.join(_CONFIRM_S)
                if self._confirming.is_alive():
                    logger.warning(
                        "the disk has not taken for %g s that this run went well; the start stays "
                        "counted",
                        _CONFIRM_S,
                    )
        return Summary(reason, totals, dict(self._states))

    def _loop(self, capture: CaptureThread) -> str:
        settled = time.monotonic_ns() + _SETTLED_NS
        while not self._stop.is_set():
            frame = capture.take(_TICK)
            self.watchdog.alive()
            if self.metrics is not None and not self.metrics.alive:
                logger.warning("the thread that serves the counters has ended: --metrics is silent")
                self.metrics = None
            if time.monotonic_ns() > settled:
                self._confirm()
            for sink in self.sinks:
                sink.pump()
                if sink.broken:
                    return "the reader went away"
            if frame is not None:
                self._last_frame_ns = frame.monotonic_ns
                if self._state is not None:
                    self._state = None
                    self.watchdog.status(f"reading {self.source.name}")
                self._frame(frame, capture)
                if self.limit is not None and self._frames >= self.limit:
                    return "limit"
                continue
            status = capture.status()
            if status.error is not None:
                # Not the engine's fault: three such ends must not bring the other slot back.
                self._confirm()
                raise status.error
            if status.ended:
                if self._detector_since is not None:
                    raise self._detector_gone("and did until the end of the source")
                return "end of source"
            # A file read at its own pace may take its time.
            if not self.every_frame:
                self._without_frame(status)
        return self._stop_reason or "stopped"

    def _frame(self, frame: CapturedFrame, capture: CaptureThread) -> None:
        self._frames += 1
        state, reason, pose = self._look(frame, capture)
        now = time.monotonic_ns()
        latency = (now - frame.monotonic_ns) / 1e9
        if not self.every_frame and state == "ok" and latency > self._stale:
            state, reason = "stale_frame", f"the result took {latency:.2f} s"
        status = capture.status()
        self._write(frame_record(frame, now, state, reason, pose, status.dropped))
        self._count(state, latency, status if self._frames % 16 == 1 else None)

    def _look(self, frame: CapturedFrame, capture: CaptureThread) -> tuple[str, str | None, Pose]:
        """State, reason and pose of a frame."""
        as_sent, nv12 = self.settings.capture, self.source.nv12
        try:
            photo = as_rgb(
                frame.pixels,
                grey=as_sent.grey,
                bit_depth=as_sent.bit_depth,
                rotate=as_sent.rotate,
                nv12=nv12,
            )
        except DataError as e:
            if e is frame.pixels:  # a photo of a folder, in whose place its reader says this
                return "unreadable", str(e), Pose()
            return self._stuck(frame, capture, "garbage", str(e))
        if (fault := self._health.check(photo, frame.seconds)) is not None:
            return self._stuck(frame, capture, fault.kind, fault.text)
        self._stuck_since = None
        if (reconnects := capture.status().reconnects) != self._reconnects:
            # A loss that a slow frame hid: the driver may have moved meanwhile.
            self._reconnects = reconnects
            self.tracker.reset()
            self._filter.reset()
        try:
            face = self.tracker.update(photo)
        except EdgehpError as e:
            return self._detector_fault(e)
        if self.tracker.looked:
            self._detector_since = None
        if face is None:
            if self._detector_since is not None:
                return "detector_fault", "the face detector failed and is asked again", Pose()
            if not self.tracker.looked:
                return "searching", "the face detector has not answered yet", Pose()
            return "no_face", None, Pose()
        height, width = photo.shape[:2]
        try:
            cut_of(width, height, face.box, self.engine.network.preprocessing)
        except DataError as e:
            self.tracker.lose()
            return "no_face", str(e), Pose()
        picture = Picture(photo)
        if nv12 and self.engine.crops_frames and not (as_sent.grey or as_sent.rotate):
            picture = nv12_picture(np.asarray(frame.pixels))
        try:
            answer = self.engine.infer([(picture, face.box)])
        except EngineFaultError as e:
            return "engine_fault", str(e), Pose(face.box, face.detected)
        except EnvironmentalError:
            if self.engine.driver_gone:
                self._confirm()  # a driver that is gone is no fault of the network
            raise
        self._confirm()
        angles = answer.angles[0].astype(np.float64)
        bins = self.engine.network.bins or DEFAULT_BINS
        rules = StateRules(bins, self.settings.tracking.min_confidence)
        spread = None if answer.spread is None else answer.spread[0].astype(np.float64)
        found = classify_pose(angles, spread, rules)
        rotation = None
        if found.state == "low_confidence":
            # Not filtered: a guess would pull the good ones with it.
            self.tracker.doubt()
        else:
            rotation = self._filter.update(frame.seconds, matrix_from_euler(angles))
        pose = Pose(
            face.box,
            face.detected,
            tuple(angles),
            None if rotation is None else tuple(euler_from_matrix(rotation)),
            None if spread is None else tuple(spread),
            found.confidence,
        )
        return found.state, None, pose

    def _detector_fault(self, error: EdgehpError) -> tuple[str, str | None, Pose]:
        """Say it, and ask the detector again; end where it goes on failing."""
        now = time.monotonic()
        self._detector_faults += 1
        if self._detector_since is None:
            self._detector_since = now
            logger.warning("%s; asked again", error)
        elif now - self._detector_since > _DETECTOR_S:
            raise self._detector_gone(str(error))
        self.tracker.reset()
        return "detector_fault", str(error), Pose()

    def _detector_gone(self, why: str) -> EnvironmentalError:
        # No fault of the engine: three such ends must not bring the other slot back.
        self._confirm()
        seconds = time.monotonic() - (self._detector_since or 0.0)
        return EnvironmentalError(
            f"the face detector has failed for {seconds:.1f} s ({self._detector_faults} times): "
            f"{why}"
        )

    def _confirm(self) -> None:
        """Beside the loop: a worn card flushes for seconds, and frames and watchdog do not wait."""
        if self.confirm is not None:
            # A daemon: a disk that hangs must not keep the process from ending.
            self._confirming = threading.Thread(
                target=_logged, args=(self.confirm,), name="confirm", daemon=True
            )
            self._confirming.start()
            self.confirm = None

    def _stuck(
        self, frame: CapturedFrame, capture: CaptureThread, kind: str, text: str
    ) -> tuple[str, str | None, Pose]:
        self.tracker.reset()
        self._detector_since = None
        if self._stuck_since is None:
            self._stuck_since = frame.seconds
        # A covered lens is not cured by opening the camera again.
        if (
            kind in ("frozen", "garbage")
            and frame.seconds - self._stuck_since > self.settings.capture.reopen
        ):
            self._stuck_since = frame.seconds
            capture.reopen(f"stuck for {self.settings.capture.reopen:g} s: {text}")
        return "stuck_camera", f"{kind}: {text}", Pose()

    def _without_frame(self, status: CaptureStatus) -> None:
        """Say what the clock says about the camera's silence."""
        now, utc_ns = time.monotonic_ns(), time.time_ns()
        silent = (now - self._last_frame_ns) / 1e9
        if status.waiting > self.settings.capture.hang:
            # No fault of the engine: three such ends must not bring the other slot back.
            self._confirm()
            raise EnvironmentalError(
                f"{self.source.name}: the camera's driver has not come back for "
                f"{status.waiting:.0f} s; it hangs, only a new process helps: let the service "
                "manager start one"
            )
        if status.lost is not None:
            by_hand = self.limit is not None or not self.watchdog.enabled
            if by_hand and status.captured == 0 and silent > _BY_HAND_S:
                self._confirm()
                raise EnvironmentalError(
                    f"{self.source.named(status.lost)}; given up after {_BY_HAND_S:g} s\n"
                    "hint: as a service ('edgehp run --print-unit') without --limit, the camera is "
                    "tried again without end"
                )
            state, reason = "camera_lost", status.lost
        elif silent > self._lost:
            state, reason = "camera_lost", f"no frame for {self._lost:g} s"
        elif silent > self._stale:
            state, reason = "stale_frame", f"no frame for {self._stale:g} s"
        else:
            return
        if self._state is None or self._state[0] != state:
            self._state, self._told_ns = (state, now), 0
            if state == "camera_lost":
                self.tracker.reset()
                self._filter.reset()
        if now - self._told_ns < self.settings.capture.heartbeat * 1e9:
            return
        self._told_ns = now
        self._write(status_record(state, reason, self._state[1], now, utc_ns))
        self._count(state, None, status)
        self.watchdog.status(f"{state}: {reason}")

    def _count(self, state: str, latency: float | None, status: CaptureStatus | None) -> None:
        self._states[state] += 1
        if self.metrics is not None:
            self.metrics.result(state, latency)
            if status is not None:
                self.metrics.totals(self._totals(status))

    def _write(self, values: Mapping[str, Any]) -> None:
        text = json_line(values)
        for sink in self.sinks:
            sink.write(text)

    def _totals(self, status: CaptureStatus) -> dict[str, int]:
        return {
            "captured": status.captured,
            "processed": self._frames,
            "dropped": status.dropped,
            "reconnects": status.reconnects,
            "engine_faults": self.engine.faults,
            "lines_dropped": sum(s.dropped for s in self.sinks),
            "detector_faults": self._detector_faults,
        }


def _logged(confirm: Callable[[], None]) -> None:
    """Call `confirm`; whatever it raises must be said, and must not stop a network that works."""
    try:
        confirm()
    except Exception as e:
        logger.warning("this start could not be confirmed: %s", e)
