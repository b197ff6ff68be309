"""The networks of one benchmark and the frames they look at, ready to take their turns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from edgehp.artifact import Artifact, golden_crops
from edgehp.artifact.open import OpenedNetwork
from edgehp.crop import Box, Picture, Preprocessing, crop_face
from edgehp.engines.base import (
    Engine,
    EngineInfo,
    Face,
    FrameEngine,
    Prediction,
    StageTimes,
    StreamingEngine,
    TimedEngine,
    crops_frames,
)
from edgehp.errors import DataError
from edgehp.files import Record

Image = npt.NDArray[np.uint8]

WIDTH, HEIGHT = 1920, 1080
# A driver's face, about 60 cm from a camera of 50 degrees, covers some 400 pixels of 1080.
FACE_SIDES = (320, 360, 400, 440, 480)
MOST_PHOTOS = 64


@dataclass(frozen=True, eq=False)
class Frame:
    """A picture uint8 [H, W, 3], RGB, and the box of the face in it."""

    photo: Image
    box: Box | None

    @property
    def face(self) -> Face:
        """For an engine that takes frames."""
        return Picture(self.photo), self.box


@dataclass(frozen=True, eq=False)
class Frames:
    """Frames to go round.

    Attributes:
        source: where they come from, for people.
        items: at least one.
    """

    source: str
    items: tuple[Frame, ...]

    def crops(self, spec: Preprocessing) -> npt.NDArray[np.uint8]:
        """All of them cropped: uint8 [N, S, S, 3]."""
        return np.stack([crop_face(f.photo, f.box, spec) for f in self.items])


def camera_frames(artifact: Artifact) -> Frames:
    """The golden crops of an artifact, each put into a gray frame at another place and size.

    They travel with every artifact, so that a device needs no other file.
    """
    crops, spec = golden_crops(artifact), artifact.manifest.preprocessing
    frames = []
    # A gradient: real memory traffic without pretending to be a scene.
    ramp = np.linspace(40, 200, WIDTH).astype(np.uint8)
    for i, crop in enumerate(crops):
        photo = np.ascontiguousarray(np.broadcast_to(ramp[None, :, None], (HEIGHT, WIDTH, 3)))
        side = FACE_SIDES[i % len(FACE_SIDES)]
        x = (i * 211) % (WIDTH - side)
        y = (i * 97) % (HEIGHT - side)
        photo[y : y + side, x : x + side] = cv2.resize(crop, (side, side))
        whole = Box(x, y, x + side, y + side)
        frames.append(Frame(photo, whole.moved(0, 0, 1 / spec.box_scale)))
    return Frames(f"{len(frames)} golden crops in {WIDTH}x{HEIGHT} frames", tuple(frames))


def photo_frames(path: Path, depth: int | None = None) -> Frames:
    """Photos of a folder or zip with their face boxes (`edgehp.datasets.faces`), the first 64.

    Raises:
        DataError: unreadable, or none.
    """
    from edgehp.datasets.faces import read_faces

    data = read_faces(path).with_depth(depth)
    samples = data.samples[:MOST_PHOTOS]
    if not samples:
        raise DataError(f"{path}: no photos to measure with")
    frames = tuple(Frame(s.load(), s.box) for s in samples)
    return Frames(f"{len(frames)} photos of {path.resolve().name}", frames)


ARTIFACT, REFERENCE = "artifact", "reference"
# Stable: the medians of this many blocks in a row differ by no more than this.
_BLOCKS, _STABLE = 3, 0.03
_BLOCK_S, _BLOCK_CALLS = 0.3, 10

Array = npt.NDArray[np.float64]


class Answer(NamedTuple):
    """How a group of frames was answered, by the benchmark's clock in seconds.

    Attributes:
        began: when.
        called: when the engine's call began.
        end: when it ended.
        cropping: seconds; a part of the call where the engine crops.
        times: parts of the call.
    """

    began: float
    called: float
    end: float
    cropping: float
    times: StageTimes


@dataclass(frozen=True, eq=False)
class Lane:
    """One network of a benchmark.

    Attributes:
        role: `ARTIFACT` or `REFERENCE`.
        engine: opened.
        spec: from frame to crop.
        frames: what it looks at.
        crops: the frames cropped, uint8 [N, S, S, 3].
        batch: crops a call.
        crops_on_engine: the engine, if it cuts faces out of frames by itself.
        timed: the engine, if it times the parts of a call.
        tried: images a second by batch, where the best one was looked for.
    """

    role: str
    engine: Engine
    spec: Preprocessing
    frames: Frames
    crops: npt.NDArray[np.uint8]
    batch: int
    crops_on_engine: FrameEngine | None = None
    timed: TimedEngine | None = None
    tried: Mapping[int, float] = field(default_factory=dict)

    @classmethod
    def of(cls, role: str, engine: Engine, spec: Preprocessing, frames: Frames, batch: int) -> Lane:
        """A lane with its crops cut."""
        timed = engine if isinstance(engine, TimedEngine) else None
        return cls(
            role, engine, spec, frames, frames.crops(spec), batch, crops_frames(engine), timed
        )

    def crop(self, frames: Iterable[Frame]) -> npt.NDArray[np.uint8]:
        """The crops of `frames`, uint8 [N, S, S, 3]."""
        return np.stack([crop_face(f.photo, f.box, self.spec) for f in frames])

    def answer(self, group: Sequence[Frame], clock: Callable[[], float] = perf_counter) -> Answer:
        """Crop and infer a group of frames, where the engine can in one call."""
        began = clock()
        if (engine := self.crops_on_engine) is not None:
            times = engine.infer_frames_timed([f.face for f in group], self.spec)[1]
            return Answer(began, began, clock(), times.cropping or 0.0, times)
        if len(group) == 1:
            crops = crop_face(group[0].photo, group[0].box, self.spec)[None]
        else:
            crops = self.crop(group)
        ready = clock()
        if self.timed is not None:
            times = self.timed.infer_timed(crops)[1]
            return Answer(began, ready, clock(), ready - began, times)
        self.engine.infer(crops)
        end = clock()
        return Answer(began, ready, end, ready - began, StageTimes(end - ready))

    def groups(self, batch: int) -> Iterator[tuple[Frame, ...]]:
        """Groups of `batch` frames, round and round without end."""
        items, i = self.frames.items, 0
        while True:
            yield tuple(items[(i + j) % len(items)] for j in range(batch))
            i = (i + batch) % len(items)

    def batches(self, batch: int) -> Iterator[npt.NDArray[np.uint8]]:
        """Ready crops in batches, round and round without end; each memory of its own."""
        n = len(self.crops)
        ready = [
            np.ascontiguousarray(self.crops[np.arange(i, i + batch) % n])
            for i in range(0, n, min(batch, n))
        ]
        while True:
            yield from ready

    def stream(self, batches: Iterable[npt.NDArray[np.uint8]]) -> Iterator[Prediction]:
        """Predictions of batches, several in flight where the engine can."""
        if isinstance(self.engine, StreamingEngine):
            yield from self.engine.stream(batches)
            return
        for crops in batches:
            yield self.engine.infer(crops)

    def stream_frames(self, groups: Iterable[Sequence[Frame]]) -> Iterator[Prediction]:
        """As `stream`, of frames for an engine that cuts the faces out."""
        if self.crops_on_engine is not None:
            faces = ([f.face for f in group] for group in groups)
            yield from self.crops_on_engine.stream_frames(faces, self.spec)


class Subject(Record, frozen=True, kw_only=True):
    """A network that was measured; a float network alone has no target, engine file or manifest.

    Attributes:
        batch: crops a call.
        clock: what upload, inference and download are timed with: ``"host"``, the processor's
            monotonic clock, or ``"CUDA events"``. Everything else is by the host's.
        cropping_clock: the same of cropping, which an engine may do itself.
        tried: images a second by batch, where the best one was looked for.
    """

    name: str
    network_digest: str | None
    engine: EngineInfo
    input_size: int
    batch: int
    precision: str | None = "fp32"
    target: str | None = None
    engine_sha256: str | None = None
    manifest_digest: str | None = None
    clock: str = "host"
    cropping_clock: str = "host"
    tried: dict[int, float]


def describe(network: OpenedNetwork, batch: int, tried: Mapping[int, float]) -> Subject:
    """What is measured, in calls of `batch` crops."""
    engine, found = network.engine, {}
    if (artifact := network.artifact) is not None:
        manifest = artifact.manifest
        found = {
            "precision": manifest.precision.reached,
            "target": manifest.target.name,
            "engine_sha256": manifest.file(artifact.engine.files[0]).sha256,
            "manifest_digest": manifest.digest,
        }
    clock = engine.stage_clock if isinstance(engine, TimedEngine) else "host"
    return Subject(
        name=network.name,
        network_digest=network.digest,
        engine=engine.info,
        input_size=engine.input_size,
        batch=batch,
        **found,
        clock=clock,
        cropping_clock="host" if crops_frames(engine) is None else clock,
        tried=dict(tried),
    )


@dataclass(frozen=True, eq=False)
class Turn:
    """What a lane did in one turn.

    Attributes:
        role: of the lane.
        mode: ``"end-to-end"``, or ``"inference"`` where crops were ready beforehand.
        start: seconds of the monotonic clock.
        end: the same.
        images: crops that were answered.
        calls: of the engine.
        stages: durations in seconds by stage, one a call (``"frame"``: one a frame).
        counts: further counts (``arrived``, ``late``, ``dropped``).
    """

    role: str
    mode: str
    start: float
    end: float
    images: int
    calls: int
    stages: dict[str, Array]
    counts: dict[str, int]

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.end - self.start


class WarmUp(Record, frozen=True):
    """How a lane warmed up: `settled` says whether its last block medians agreed within 3 %."""

    role: str
    seconds: float
    calls: int
    settled: bool
    spread: float | None


def warm_up(
    lane: Lane,
    limit_s: float,
    clock: Callable[[], float] = perf_counter,
    smaller: bool = False,
) -> WarmUp:
    """Run the lane until the median latency of three blocks in a row agrees, or time is up.

    Args:
        lane: what to warm up.
        limit_s: the longest this may take, in seconds.
        clock: monotonic seconds.
        smaller: run every smaller batch once before, where a scenario uses them: engines prepare
            for a size when they see it first.
    """
    batches = lane.batches(lane.batch)
    start = clock()
    # Each size and way of calling that the scenario uses: engines prepare at the first call.
    for size in range(1 if smaller else lane.batch, lane.batch + 1):
        lane.answer(next(lane.groups(size)), clock)
    medians: list[float] = []
    calls = 0
    spread: float | None = None
    while True:
        block: list[float] = []
        began = clock()
        while not block or (
            clock() - start < limit_s and (len(block) < _BLOCK_CALLS or clock() - began < _BLOCK_S)
        ):
            t = clock()
            lane.engine.infer(next(batches))
            block.append(clock() - t)
        calls += len(block)
        medians.append(float(np.median(block)))
        last = medians[-_BLOCKS:]
        spread = max(last) / min(last) - 1 if len(last) == _BLOCKS else None
        settled = spread is not None and spread <= _STABLE
        if settled or clock() - start >= limit_s:
            return WarmUp(lane.role, clock() - start, calls, settled, spread)
