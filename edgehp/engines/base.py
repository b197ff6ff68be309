"""What every engine has in common: one call from crops to angles, and what it says about itself.

An engine takes uint8 RGB crops and gives angles and spreads in degrees. Normalisation and decoding
are part of the graph (`edgehp.networks.graph`), so nothing here touches a pixel or an angle.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

import numpy as np
import numpy.typing as npt

from edgehp.crop import Box, Picture, Preprocessing, crop_face
from edgehp.errors import DataError, EnvironmentalError, UsageError

# The names `edgehp.networks.graph` gives; repeated because the device side has no graph builder.
INPUT_NAME = "crops"
OUTPUT_NAMES = ("angles", "spread")

Crops = npt.NDArray[np.uint8]
# A value that json.dumps takes.
Json = Any
# A frame and the face in it; None is the whole frame.
Face = tuple[Picture, Box | None]

_Opened = TypeVar("_Opened", bound="EngineBase")


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a network says about a batch of N crops.

    Attributes:
        angles: float32 [N, 3], pitch, yaw, roll in degrees, convention ``"aflw2000"``.
        spread: float32 [N, 3], standard deviation of the bin distribution in degrees, the same
            order; small where the network is sure. None of a network without bins.
    """

    angles: npt.NDArray[np.float32]
    spread: npt.NDArray[np.float32] | None

    @classmethod
    def joined(cls, parts: Sequence[Prediction]) -> Prediction:
        """Several batches of one network as one."""
        spreads = [p.spread for p in parts if p.spread is not None]
        return cls(
            np.concatenate([p.angles for p in parts]),
            np.concatenate(spreads) if spreads else None,
        )

    def first(self, count: int) -> Prediction:
        """The predictions of the first `count` crops."""
        return Prediction(self.angles[:count], None if self.spread is None else self.spread[:count])

    @property
    def finite(self) -> npt.NDArray[np.bool_]:
        """Which of the N crops have numbers for an answer."""
        found = np.isfinite(self.angles).all(axis=1)
        if self.spread is not None:
            found &= np.isfinite(self.spread).all(axis=1)
        return np.asarray(found)

    def spread_apart(self, other: Prediction) -> npt.NDArray[np.float64] | None:
        """How far the spreads of two are apart, [N, 3] degrees; None where there are none."""
        if self.spread is None or other.spread is None:
            return None
        return np.abs(self.spread.astype(np.float64) - other.spread)


@dataclass(frozen=True)
class StageTimes:
    """What the parts of one call took, in seconds.

    Attributes:
        inference: from the crops being where the engine reads them to the answers being computed.
        upload: taking the crops there; None where it cannot be told from the inference.
        download: bringing the answers back; None likewise.
        cropping: cutting and resizing the faces, where the engine does it.
    """

    inference: float
    upload: float | None = None
    download: float | None = None
    cropping: float | None = None


@dataclass(frozen=True)
class EngineInfo:
    """What is running, for reports and manifests.

    Attributes:
        kind: ``"openvino"``, ``"onnxruntime"``, ``"tensorrt"`` or ``"tensorrt-rtx"``.
        version: of the runtime library.
        device: the processor, as its runtime names it.
        threads: processor threads that inference uses; None where the engine does not say.
        precision: what the convolutions really run in: ``"int8"``, ``"fp16"``, ``"bf16"``,
            ``"fp32"``, ``"mixed"``, or ``"unknown"`` where the runtime cannot be asked.
        details: whatever else the engine knows, in values that JSON takes.
    """

    kind: str
    version: str
    device: str
    threads: int | None
    precision: str
    details: Mapping[str, Json] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Json]:
        """A dictionary for JSON."""
        return {**vars(self), "details": dict(self.details)}


@runtime_checkable
class Engine(Protocol):
    """An opened engine. Not safe for use by several threads at once: open one per thread."""

    @property
    def info(self) -> EngineInfo:
        """What is running."""

    @property
    def input_size(self) -> int:
        """Side S of the square input in pixels."""

    def infer(self, crops: Crops) -> Prediction:
        """Angles and spreads of uint8 RGB crops [N, S, S, 3], N >= 1; waits for the answer.

        Raises:
            DataError: the crops have another type, shape or size.
            EnvironmentalError: the runtime failed.
        """

    def close(self) -> None:
        """Free what the engine holds; calling it again does nothing."""

    def __enter__(self) -> Engine: ...

    def __exit__(self, *_: object) -> None: ...


@runtime_checkable
class TimedEngine(Engine, Protocol):
    """An engine that times the parts of a call by the clock that suits it.

    Attributes:
        stage_clock: which one, for people, such as ``"CUDA events"``.
    """

    stage_clock: str

    def infer_timed(self, crops: Crops) -> tuple[Prediction, StageTimes]:
        """As `infer`, with what its parts took."""


@runtime_checkable
class FrameEngine(TimedEngine, Protocol):
    """An engine that can cut the faces out of frames where it infers."""

    @property
    def crops_frames(self) -> bool:
        """Whether it can here."""

    def infer_frames(self, faces: Sequence[Face], spec: Preprocessing) -> Prediction:
        """As `infer`, of faces in frames.

        Args:
            faces: frames, each with the box of a face, or None for all of the frame; a frame that
                several share is sent once.
            spec: the network's preprocessing.

        Raises:
            DataError: as of `edgehp.crop.crop_face`.
            EnvironmentalError: the runtime failed.
        """

    def infer_frames_timed(
        self, faces: Sequence[Face], spec: Preprocessing
    ) -> tuple[Prediction, StageTimes]:
        """As `infer_frames`, with what its parts took."""

    def stream_frames(
        self, groups: Iterable[Sequence[Face]], spec: Preprocessing
    ) -> Iterator[Prediction]:
        """As `StreamingEngine.stream`, of groups of faces in frames."""

    def crop_frames(self, faces: Sequence[Face], spec: Preprocessing) -> Crops:
        """The crops that `infer_frames` makes, uint8 [N, S, S, 3]."""


def crops_frames(engine: Engine) -> FrameEngine | None:
    """The engine as one that cuts faces out of frames by itself, or None if it cannot."""
    # Not by isinstance, which looks at every property: this is asked for each frame.
    return cast(FrameEngine, engine) if getattr(engine, "crops_frames", False) else None


def infer_frames(engine: Engine, faces: Sequence[Face], spec: Preprocessing) -> Prediction:
    """Angles and spreads of faces in frames, cut by the engine where it can, else here.

    Raises:
        DataError: as of `edgehp.crop.crop_face`.
        EnvironmentalError: the runtime failed.
    """
    if (able := crops_frames(engine)) is not None:
        return able.infer_frames(faces, spec)
    return engine.infer(np.stack([crop_face(p.rgb(), box, spec) for p, box in faces]))


@runtime_checkable
class StreamingEngine(Engine, Protocol):
    """An engine that works on several batches at once, for throughput."""

    def stream(self, batches: Iterable[Crops]) -> Iterator[Prediction]:
        """Predictions of `batches` in their order, several in flight at a time."""


class EngineBase(ABC):
    """What engines have in common: the file they were opened from, its input size, and closing.

    A subclass sets `_path` and `_size` when it opens.
    """

    _path: Path
    _size: int

    @abstractmethod
    def infer_timed(self, crops: Crops) -> tuple[Prediction, StageTimes]:
        """As `TimedEngine.infer_timed`."""

    def infer(self, crops: Crops) -> Prediction:
        """As `Engine.infer`."""
        return self.infer_timed(crops)[0]

    @property
    def input_size(self) -> int:
        """Side S of the square input in pixels."""
        return self._size

    @abstractmethod
    def close(self) -> None:
        """Free what the engine holds; calling it again does nothing."""

    def __enter__(self: _Opened) -> _Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _closed_error(self) -> EnvironmentalError:
        """The error to raise when a closed engine is used."""
        return EnvironmentalError(f"{self._path}: the engine is closed; open it again")


def sum_of(times: Iterable[StageTimes]) -> StageTimes:
    """The stages of several calls together."""
    rows = tuple(times)

    def total(name: str) -> float | None:
        values = [getattr(row, name) for row in rows]
        return None if None in values else float(sum(values))

    return StageTimes(
        sum(row.inference for row in rows), total("upload"), total("download"), total("cropping")
    )


def check_crops(crops: Crops, size: int) -> Crops:
    """The crops as the runtimes want them: C-contiguous, which copies only if they are not.

    Args:
        crops: uint8 [N, size, size, 3], RGB.
        size: the network's input size in pixels.

    Raises:
        DataError: they are anything else.
    """
    if (
        isinstance(crops, np.ndarray)
        and crops.dtype == np.uint8
        and crops.ndim == 4
        and crops.shape[0] > 0
        and crops.shape[1:] == (size, size, 3)
    ):
        return np.ascontiguousarray(crops)
    expected = f"expected uint8 RGB crops [N, {size}, {size}, 3] with N >= 1"
    if not isinstance(crops, np.ndarray):
        raise DataError(f"{expected}, found {type(crops).__name__}: pass a numpy array")
    found = f"{crops.dtype} {list(crops.shape)}"
    if crops.dtype != np.uint8:
        raise DataError(
            f"{expected}, found {found}: normalisation is inside the graph, pass the pixels as "
            "they are"
        )
    if crops.ndim == 3 and crops.shape == (size, size, 3):
        raise DataError(f"{expected}, found {found}: add the batch dimension, crops[None]")
    if crops.ndim == 4 and crops.shape[1] == 3 and crops.shape[3] != 3:
        raise DataError(f"{expected}, found {found}: channels come last here, not first")
    if crops.ndim != 4 or crops.shape[1:] != (size, size, 3):
        raise DataError(f"{expected}, found {found}: cut the crops with edgehp.crop.crop_face")
    raise DataError(f"{expected}, found an empty batch: skip frames without a face")


def check_processor(device: str | None, runtime: str) -> None:
    """Return if `device` is the processor, or None.

    Raises:
        UsageError: it is anything else.
    """
    if device not in (None, "CPU", "cpu"):
        raise UsageError(f"{runtime} runs here on 'CPU' only, {device!r} was asked for")


def check_threads(threads: int | None) -> int | None:
    """`threads`, if it is a number of threads or None.

    Raises:
        UsageError: it is neither.
    """
    if threads is not None and not 1 <= threads <= 1024:
        raise UsageError(f"{threads} threads asked for; give a number from 1 to 1024")
    return threads


def import_runtime(module: str, runtime: str, remedy: str) -> Any:
    """The Python module of a runtime, which may be missing or unable to load its libraries.

    Args:
        module: such as ``"tensorrt"``.
        runtime: its name for people.
        remedy: how to install it.

    Raises:
        EnvironmentalError: it cannot be imported.
    """
    try:
        return import_module(module)
    except (ImportError, OSError) as e:
        raise EnvironmentalError(f"{runtime} cannot be used ({e}); {remedy}") from e


def answers_of(outputs: Sequence[str]) -> tuple[str, ...]:
    """Which of `OUTPUT_NAMES` a graph gives: a network without bins has no spread."""
    return tuple(name for name in OUTPUT_NAMES if name in outputs)


def prediction_from(
    answers: Sequence[npt.NDArray[np.generic]], count: int, source: str
) -> Prediction:
    """Wrap a runtime's outputs, which must be [count, 3], as float32 arrays.

    Args:
        answers: in the order of `answers_of`.
        count: of the crops.
        source: for the message.

    Raises:
        DataError: the graph gave another shape.
    """
    for name, array in zip(OUTPUT_NAMES, answers, strict=False):
        if array.shape != (count, 3):
            raise DataError(
                f"{source}: output {name!r} has shape {list(array.shape)}, expected [{count}, 3]; "
                "the file is not a head-pose graph of edgehp: build it again"
            )
    angles, *spread = (np.asarray(a).astype(np.float32, copy=False) for a in answers)
    return Prediction(angles, spread[0] if spread else None)


# A ResNet152 in FP32 has 240 MB; whatever is far larger is a mistaken path.
_LARGEST = 2 << 30


def check_file(path: str | Path, what: str) -> Path:
    """`path` if it is a file of a believable size.

    Args:
        path: of an engine or graph.
        what: for the message, such as ``"an ONNX graph"``.

    Raises:
        DataError: it is missing, no file, empty or huge.
    """
    path = Path(path)
    if not path.is_file():
        kind = "is not a file" if path.exists() else "does not exist"
        raise DataError(f"{path} {kind}; expected {what}")
    size = path.stat().st_size
    if not 0 < size <= _LARGEST:
        raise DataError(f"{path} has {size} bytes; expected {what} of at most {_LARGEST} bytes")
    return path


def input_size_of(
    inputs: Mapping[str, tuple[str, Sequence[int | None]]], outputs: Sequence[str], path: Path
) -> int:
    """The side S of the input, if the graph is a deployed head-pose graph.

    Args:
        inputs: name -> (element type as the runtime spells it, shape; None or negative for a
            free dimension).
        outputs: names.
        path: for the message.

    Raises:
        DataError: names, type or shape differ from `edgehp.networks.graph`.
    """
    shown = ", ".join(f"{n}: {t} {list(s)}" for n, (t, s) in inputs.items())
    wrong = DataError(
        f"{path}: expected one input {INPUT_NAME!r} uint8 [N, S, S, 3] and the outputs "
        f"{', '.join(OUTPUT_NAMES)} (of bins); found {shown or 'no input'} and "
        f"{', '.join(outputs)}\nhint: build the graph with edgehp"
    )
    if list(inputs) != [INPUT_NAME] or OUTPUT_NAMES[0] not in outputs:
        raise wrong
    kind, shape = inputs[INPUT_NAME]
    if kind.lower() not in ("uint8", "u8", "tensor(uint8)") or len(shape) != 4:
        raise wrong
    _, height, width, channels = shape
    if height is None or height <= 0 or height != width or channels != 3:
        raise wrong
    return height


# Field numbers of onnx.proto: ModelProto.graph, GraphProto.initializer, TensorProto.data_type.
_GRAPH, _INITIALIZER, _DATA_TYPE = 7, 5, 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def constant_types(path: Path) -> frozenset[int]:
    """Element types (`onnx.TensorProto.DataType`) of a graph's constants, without the onnx package.

    A file that is no ONNX graph gives none: the runtime that reads it next says what is wrong.
    """
    model = memoryview(path.read_bytes())
    found: set[int] = set()
    try:
        for graph in _messages(model, _GRAPH):
            for tensor in _messages(graph, _INITIALIZER):
                found |= {v for n, v in _fields(tensor) if n == _DATA_TYPE and isinstance(v, int)}
    except (IndexError, ValueError):
        return frozenset()
    return frozenset(found)


def _messages(data: memoryview, number: int) -> Iterator[memoryview]:
    for found, value in _fields(data):
        if found == number and isinstance(value, memoryview):
            yield value


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Number and value of each field of a protocol buffer message, in its wire format."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield key >> 3, value
        elif kind == _BYTES:
            size, at = _varint(data, at)
            yield key >> 3, data[at : at + size]
            at += size
        elif kind in (_FIXED32, _FIXED64):
            at += 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {kind}")


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number longer than 64 bits")
