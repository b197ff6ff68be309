"""The loop: takes the newest frame, says what it shows and what is wrong, and stays alive."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from edgehp.crop import crop_face
from edgehp.errors import DataError, EdgehpError, EnvironmentalError
from edgehp.pose import euler_from_matrix, matrix_from_euler
from edgehp.prediction.judgement import DEFAULT_BINS, Rules, judge
from edgehp.runtime.capture import CapturedFrame, CaptureStatus, CaptureThread
from edgehp.runtime.distraction import DistractionMonitor
from edgehp.runtime.engine import EngineFaultError, EngineHost
from edgehp.runtime.filter import RotationFilter
from edgehp.runtime.frames import FrameHealth, as_rgb
from edgehp.runtime.metrics import Metrics, NoMetrics
from edgehp.runtime.output import Sink
from edgehp.runtime.records import (
    Pose,
    end_line,
    event_line,
    frame_line,
    line,
    status_line,
    utc,
)
from edgehp.runtime.settings import Settings
from edgehp.runtime.sources import CaptureSource
from edgehp.runtime.speed import ConstantSpeed, SpeedSource
from edgehp.runtime.tracking import Tracker
from edgehp.runtime.watchdog import Watchdog

__all__ = ["Runtime", "Summary"]

logger = logging.getLogger(__name__)

# Longest wait for a frame: how often readers are served and the clock is looked at without one.
_TICK = 0.05
# A run that has lasted so long does not die of its engine.
_SETTLED_NS = 30_000_000_000
# A run by hand, with a limit, does not wait longer for a camera that has never given a frame.
_BY_HAND_S = 5.0
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
        speed: of the car.
        watchdog: the service manager.
        metrics: counters.
        every_frame: do not drop frames of a file.
        limit: end after this many frames; a camera that cannot be opened then is an error soon.
        confirm: called once, in a thread of its own, when the engine has answered for a frame, the
            run has lasted half a minute, or the camera's driver hangs: nobody may sit in the car,
            or the camera be broken, and neither is its fault.
    """

    source: CaptureSource
    engine: EngineHost
    tracker: Tracker
    sinks: Sequence[Sink]
    settings: Settings = field(default_factory=Settings)
    speed: SpeedSource = field(default_factory=lambda: ConstantSpeed(None))
    watchdog: Watchdog = field(default_factory=lambda: Watchdog({}))
    metrics: Metrics = field(default_factory=NoMetrics)
    every_frame: bool = False
    limit: int | None = None
    confirm: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        """What the run changes."""
        s = self.settings
        self._stop_reason: str | None = None
        self._stop = threading.Event()
        self._health = FrameHealth(s.capture.frozen)
        self._filter = RotationFilter(
            s.filter.min_cutoff, s.filter.beta, s.filter.speed_cutoff, s.filter.reset_after
        )
        self._monitor = DistractionMonitor(s.distraction)
        self._states: Counter[str] = Counter()
        self._frames = 0
        self._last_frame_ns = time.monotonic_ns()
        self._state: tuple[str, int] | None = None  # of moments without a frame; since when
        self._told_ns = 0
        self._stuck_since: float | None = None
        self._events = self._reconnects = 0
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
        capture = CaptureThread(
            self.source,
            every_frame=self.every_frame,
            retry_first=self.settings.capture.retry_first,
            retry_longest=self.settings.capture.retry_longest,
        )
        reason = "failed"
        try:
            with capture:
                self._last_frame_ns = time.monotonic_ns()
                self.watchdog.ready(f"reading {self.source.name}")
                reason = self._loop(capture)
                self.watchdog.stopping()
        finally:
            totals = self._totals(capture.status())
            self._write(end_line(reason, totals, time.time_ns()))
            for sink in self.sinks:
                sink.close()
            self.tracker.close()
            self.engine.close()
            self.metrics.close()
            self.watchdog.close()
            self._wait_for_confirm()
        return Summary(reason, totals, dict(self._states))

    def _loop(self, capture: CaptureThread) -> str:
        settled = time.monotonic_ns() + _SETTLED_NS
        while not self._stop.is_set():
            frame = capture.take(_TICK)
            self.watchdog.alive()
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
                raise status.error
            if status.ended:
                return "end of source"
            # A file read at its own pace may take its time.
            if not self.every_frame:
                self._without_frame(status)
        return self._stop_reason or "stopped"

    def _frame(self, frame: CapturedFrame, capture: CaptureThread) -> None:
        self._frames += 1
        speed = self.speed.read()
        state, reason, pose, rotation = self._look(frame, capture)
        now = time.monotonic_ns()
        latency = (now - frame.monotonic_ns) / 1e9
        if not self.every_frame and state == "ok" and latency > self._stale:
            state, reason = "stale_frame", f"the result took {latency:.2f} s"
        events = self._monitor.update(frame.seconds, rotation, speed)
        pose = replace(pose, area=self._monitor.area)
        status = capture.status()
        self._states[state] += 1
        self._write(frame_line(frame, now, state, reason, pose, speed, status.dropped))
        self.metrics.result(state, latency)
        self._tell(events, utc(frame.utc_ns), frame.monotonic_ns)
        if self._frames % 16 == 1:
            self.metrics.totals(self._totals(status))

    def _look(
        self, frame: CapturedFrame, capture: CaptureThread
    ) -> tuple[str, str | None, Pose, npt.NDArray[np.float64] | None]:
        """State, reason, pose, and the rotation to believe, of a frame."""
        capture_settings = self.settings.capture
        try:
            photo = as_rgb(
                frame.pixels, grey=capture_settings.grey, bit_depth=capture_settings.bit_depth
            )
        except DataError as e:
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
        except EdgehpError:
            # The detector's fault: three such ends must not bring the other slot back.
            self._confirm()
            raise
        if face is None:
            if not self.tracker.looked:
                return "searching", "the face detector has not answered yet", Pose(), None
            return "no_face", None, Pose(), None
        try:
            crop = crop_face(photo, face.box, self.engine.network.preprocessing)
        except DataError as e:
            self.tracker.lose()
            return "no_face", str(e), Pose(), None
        try:
            answer = self.engine.infer(crop[None])
        except EngineFaultError as e:
            return "engine_fault", str(e), Pose(face.box, face.detected), None
        self._confirm()
        angles = answer.angles[0].astype(np.float64)
        bins = self.engine.network.bins or DEFAULT_BINS
        rules = Rules(bins, self.settings.tracking.min_confidence)
        judgement = judge(angles, answer.spread[0], rules)
        rotation = None
        if judgement.state == "low_confidence":
            # Not filtered: a guess would pull the good ones with it.
            self.tracker.doubt()
        else:
            rotation = self._filter.update(frame.seconds, matrix_from_euler(angles))
        pose = Pose(
            face.box,
            face.detected,
            tuple(angles),
            None if rotation is None else tuple(euler_from_matrix(rotation)),
            tuple(answer.spread[0].astype(np.float64)),
            judgement.confidence,
        )
        return judgement.state, None, pose, rotation

    def _confirm(self) -> None:
        """Beside the loop: a worn card flushes for seconds, and frames and watchdog do not wait."""
        if self.confirm is not None:
            # A daemon: a disk that hangs must not keep the process from ending.
            self._confirming = threading.Thread(target=self.confirm, name="confirm", daemon=True)
            self._confirming.start()
            self.confirm = None

    def _wait_for_confirm(self) -> None:
        if self._confirming is not None:
            self._confirming.join(_CONFIRM_S)
            if self._confirming.is_alive():
                logger.warning(
                    "the disk has not taken for %g s that this run went well; the start stays "
                    "counted",
                    _CONFIRM_S,
                )

    def _stuck(
        self, frame: CapturedFrame, capture: CaptureThread, kind: str, text: str
    ) -> tuple[str, str | None, Pose, None]:
        self.tracker.reset()
        if self._stuck_since is None:
            self._stuck_since = frame.seconds
        # A covered lens is not cured by opening the camera again.
        if (
            kind in ("frozen", "garbage")
            and frame.seconds - self._stuck_since > self.settings.capture.reopen
        ):
            self._stuck_since = frame.seconds
            capture.reopen(f"stuck for {self.settings.capture.reopen:g} s: {text}")
        return "stuck_camera", f"{kind}: {text}", Pose(), None

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
            if self.limit is not None and status.captured == 0 and silent > _BY_HAND_S:
                self._confirm()
                raise EnvironmentalError(
                    f"{self.source.named(status.lost)} (given up after {_BY_HAND_S:g} s because "
                    "of --limit; without it, the camera is tried again without end)"
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
        self._states[state] += 1
        self._write(status_line(state, reason, self._state[1], now, utc_ns))
        self.metrics.result(state, None)
        self.metrics.totals(self._totals(status))
        self.watchdog.status(f"{state}: {reason}")
        if self.source.live:
            self._tell(self._monitor.update(now / 1e9, None, self.speed.read()), utc(utc_ns), now)

    def _tell(self, events: Sequence[Any], captured: str, captured_ns: int) -> None:
        for event in events:
            self._events += 1
            self._write(event_line(event, captured, captured_ns))
            self.metrics.event(event.event)

    def _write(self, values: dict[str, Any]) -> None:
        text = line(values)
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
            "events": self._events,
        }
