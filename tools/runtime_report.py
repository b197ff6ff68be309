#!/usr/bin/env python3
"""Run the runtime on a generated 1080p video of a moving head with known pose, and print figures.

    python tools/runtime_report.py dist/kd-resnet18-cpu-int8 --minutes 10
    python tools/runtime_report.py --network kd-resnet18-112 --heads rendered

Error against truth before and after the filter, its lag, latency at camera pace, frames dropped
under overload, and memory over time. With `--heads rendered` the head itself turns (needs `anny`
and `moderngl`); else a packaged head moves, grows and turns in the image plane. Only the camera is
emulated; measure on a quiet machine.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
import threading
import time
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from runtime_clip import FPS, Camera, Clip, ClipFrame, packaged_head, rendered_heads  # noqa: E402

from edgehp._memory import keep_little  # noqa: E402
from edgehp.artifact.open import OpenedNetwork, open_artifact, open_network  # noqa: E402
from edgehp.crop import Box  # noqa: E402
from edgehp.engines.base import Crops, Engine, Prediction  # noqa: E402
from edgehp.files import resource_dir  # noqa: E402
from edgehp.pose import geodesic_degrees, matrix_from_euler  # noqa: E402
from edgehp.runtime.detection import CenterFace, Detection, find_weights, overlap  # noqa: E402
from edgehp.runtime.engine import EngineHost  # noqa: E402
from edgehp.runtime.filter import lag_seconds, rotation_exp, rotation_log  # noqa: E402
from edgehp.runtime.loop import Runtime, Summary  # noqa: E402
from edgehp.runtime.output import Sink  # noqa: E402
from edgehp.runtime.settings import FilterSettings, Settings  # noqa: E402
from edgehp.runtime.sources import Source, parse_source  # noqa: E402
from edgehp.runtime.tracking import FaceTracker  # noqa: E402

Array = npt.NDArray[np.float64]
Opener = Callable[[], OpenedNetwork]
ARCHIVE = "rendered-validation.zip"


@dataclass
class Lines(Sink):
    """A sink that keeps the records of frames, or of as many as wanted."""

    most: int = 1_000_000
    records: list[dict[str, Any]] = field(default_factory=list)

    def write(self, line: bytes) -> None:
        """Keep the record."""
        if len(self.records) < self.most:
            self.records.append(json.loads(line))


class SlowEngine:
    """An engine that takes longer, and cuts no faces itself."""

    def __init__(self, engine: Engine, seconds: float) -> None:
        self.info, self.input_size, self.close = engine.info, engine.input_size, engine.close
        self._engine, self._seconds = engine, seconds

    def infer(self, crops: Crops) -> Prediction:
        """The engine's answer, late."""
        time.sleep(self._seconds)
        return self._engine.infer(crops)


def tracker(inline: bool) -> FaceTracker:
    weights = find_weights()
    whole, near = CenterFace(weights), CenterFace(weights, side=160)
    return FaceTracker(Detection(whole, near, beside=not inline))


def live(video: Path) -> Source:
    return Source("camera", True, lambda: Camera(video))


def accuracy(opener: Opener, video: Path, truth: list[ClipFrame], s: FilterSettings) -> None:
    """Every frame in turn: does not depend on the machine's speed."""
    lines = Lines()
    Runtime(
        parse_source(str(video)),
        EngineHost(opener),
        tracker(inline=True),
        [lines],
        Settings(filter=s),
        every_frame=True,
    ).run()
    frames = [r for r in lines.records if r["type"] == "frame"]
    states = Counter(r["state"] for r in frames)
    known = [r for r in frames if r["filtered"] is not None]
    at = np.array([r["frame"] - 1 for r in known])
    true = np.stack([t.rotation for t in truth])[at]
    raw = matrix_from_euler([list(r["raw"].values()) for r in known])
    filtered = matrix_from_euler([list(r["filtered"].values()) for r in known])
    boxes = [overlap(Box(*r["box"]), truth[r["frame"] - 1].box) for r in known]
    print(f"frames {len(frames)}, states {dict(states)}")
    print(f"box overlap with truth: mean {np.mean(boxes):.2f}, least {np.min(boxes):.2f}")
    for name, found in (("raw", raw), ("filtered", filtered)):
        errors = geodesic_degrees(found, true)
        print(
            f"{name:9s} error against truth: mean {errors.mean():.2f}, median "
            f"{np.median(errors):.2f}, p95 {np.percentile(errors, 95):.2f} degrees; "
            f"jitter {jitter(found, true):.2f} degrees a frame"
        )
    speed = np.array([np.linalg.norm(rotation_log(a.T @ b)) for a, b in pairwise(true)]) * FPS
    print(
        f"true speed: mean {speed.mean():.0f}, largest {speed.max():.0f} degrees/s; lag of the "
        f"filter against its input: measured {measured_lag(raw, filtered, at) * 1000:.0f} ms; "
        f"by the formula {lag_seconds(s.min_cutoff, s.beta) * 1000:.0f} ms at rest, "
        f"{lag_seconds(s.min_cutoff, s.beta, float(speed.mean())) * 1000:.0f} ms at the mean "
        f"speed, {lag_seconds(s.min_cutoff, s.beta, 90) * 1000:.0f} ms at 90 degrees/s"
    )


def jitter(found: Array, true: Array) -> float:
    """Root mean square of what the error changes by from frame to frame, degrees."""
    wrong = [t.T @ f for t, f in zip(true, found, strict=True)]
    steps = [np.linalg.norm(rotation_log(a.T @ b)) for a, b in pairwise(wrong)]
    return float(np.sqrt(np.mean(np.square(steps))))


def measured_lag(raw: Array, filtered: Array, at: npt.NDArray[np.int64]) -> float:
    """Seconds by which the raw signal has to be delayed to be nearest to the filtered one."""
    best = (np.inf, 0.0)
    for delay in np.arange(0, 0.4, 0.005):
        where = np.arange(len(at)) - delay * FPS
        usable = where >= 0
        low = np.floor(where[usable]).astype(int)
        part = where[usable] - low
        high = np.minimum(low + 1, len(raw) - 1)
        delayed = [
            raw[i] @ rotation_exp(p * rotation_log(raw[i].T @ raw[j]))
            for i, j, p in zip(low, high, part, strict=True)
        ]
        error = float(geodesic_degrees(np.stack(delayed), filtered[usable]).mean())
        best = min(best, (error, float(delay)))
    return best[1]


def rss() -> float:
    """Resident memory of this process, MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def pace(opener: Opener, video: Path, minutes: float) -> None:
    """At the camera's pace, with memory watched."""
    latencies = array("f")  # of objects, the list alone would grow by 0.06 MB a minute
    memory: list[tuple[float, float]] = []
    states: Counter[str] = Counter()

    class Watch(Lines):
        def write(self, line: bytes) -> None:
            r = json.loads(line)
            if "state" in r:
                states[r["state"]] += 1
            if r["type"] == "frame":
                latencies.append(r["latency_ms"])

    runtime = Runtime(live(video), EngineHost(opener), tracker(False), [Watch()])
    start, done = time.monotonic(), threading.Event()

    def watch() -> None:
        while not done.wait(1.0):
            memory.append((time.monotonic() - start, rss()))

    thread = threading.Thread(target=watch)
    thread.start()
    timer = threading.Timer(60 * minutes, runtime.stop, ("the time is over",))
    timer.start()
    summary = runtime.run()
    done.set()
    thread.join()
    timer.cancel()
    p = np.percentile(latencies, [50, 90, 99, 100])
    print(f"{minutes:g} min at {FPS:g} frames/s, 1920x1080: {_counts(summary)}, {dict(states)}")
    print(
        f"latency, read() to result: p50 {p[0]:.1f}, p90 {p[1]:.1f}, p99 {p[2]:.1f}, "
        f"largest {p[3]:.1f} ms"
    )
    # The first half minute fills caches and pools.
    settled = np.array([m for m in memory if m[0] > min(30.0, 60 * minutes / 3)])
    if len(settled) > 4:
        # Between samples the frames in flight come and go, 6 MB each; the least of each half minute
        # shows what stays.
        bins = (settled[:, 0] // 30).astype(int)
        floor = np.array([settled[bins == b].min(0) for b in np.unique(bins)])
        slopes = [np.polyfit(m[:, 0] / 60, m[:, 1], 1)[0] for m in (settled, floor)]
        print(
            f"memory: {settled[0, 1]:.1f} MB after {settled[0, 0]:.0f} s, {settled[-1, 1]:.1f} MB "
            f"at the end, least {settled[:, 1].min():.1f}, largest {settled[:, 1].max():.1f} MB; "
            f"slope {slopes[0]:+.2f} MB a minute, of the least of each half minute {slopes[1]:+.2f}"
        )


def _counts(summary: Summary) -> str:
    t = summary.totals
    share = t["dropped"] / max(1, t["captured"])
    return (
        f"{t['captured']} captured, {t['processed']} processed, {t['dropped']} dropped "
        f"({share:.1%})"
    )


def overload(opener: Opener, video: Path, seconds: float = 8.0, slow: float = 0.1) -> None:
    """An engine three times slower than the camera."""

    def slowed() -> OpenedNetwork:
        opened = opener()
        return replace(opened, engine=cast(Engine, SlowEngine(opened.engine, slow)))

    lines = Lines()
    runtime = Runtime(live(video), EngineHost(slowed), tracker(False), [lines])
    timer = threading.Timer(seconds, runtime.stop, ("the time is over",))
    timer.start()
    summary = runtime.run()
    timer.cancel()
    frames = [r for r in lines.records if r["type"] == "frame"]
    latency = np.percentile([r["latency_ms"] for r in frames], [50, 99])
    # The age of a frame when it is taken: what newest-frame policy bounds by one frame interval.
    gaps = np.diff([r["captured_ns"] for r in frames]) / 1e6
    unaccounted = summary.totals["captured"] - summary.totals["processed"]
    unaccounted -= summary.totals["dropped"]
    print(
        f"engine slowed by {slow * 1000:.0f} ms: {_counts(summary)}, {unaccounted} waiting at the "
        f"end (at most 1 can); latency p50 {latency[0]:.0f}, p99 {latency[1]:.0f} ms, a result "
        f"every {np.mean(gaps):.0f} ms"
    )


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("artifact", nargs="?", type=Path, help="an artifact directory")
    p.add_argument("--network", default="kd-resnet18-112", help="without an artifact: this one")
    p.add_argument("--heads", choices=["packaged", "rendered"], default="packaged")
    p.add_argument("--seconds", type=float, default=10.0, help="length of the video")
    p.add_argument("--minutes", type=float, default=0.5, help="of running at camera pace")
    p.add_argument("--threads", type=int, help="processor threads for inference")
    p.add_argument("--seed", type=int, default=3_000_001, help="of clip and rendered person")
    p.add_argument("--only", choices=["accuracy", "pace", "overload"])
    p.add_argument("--video", type=Path, help="keep the video here")
    args = p.parse_args()
    keep_little()  # as `edgehp run` does
    # Ten minutes are long: what is measured shows at once, also in a file.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)

    def opener() -> OpenedNetwork:
        if args.artifact is not None:
            return open_artifact(args.artifact, threads=args.threads)
        return open_network(args.network, threads=args.threads)

    count = round(args.seconds * FPS)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edgehp-")))
        if args.heads == "rendered":
            heads = rendered_heads(args.seed, count)
        else:
            heads = [packaged_head(resource_dir("calibration") / ARCHIVE)]
        video = args.video or folder / "head.mp4"
        truth = Clip(heads, args.seed).write(video, count)
        with opener() as opened:
            print(f"{opened.name}; {count} frames of {args.heads} heads; {os.cpu_count()} cores, "
                  f"load {os.getloadavg()[0]:.1f}")  # fmt: skip
        if args.only in (None, "accuracy"):
            accuracy(opener, video, truth, FilterSettings())
        if args.only in (None, "pace"):
            pace(opener, video, args.minutes)
        if args.only in (None, "overload"):
            overload(opener, video)


if __name__ == "__main__":
    main()
