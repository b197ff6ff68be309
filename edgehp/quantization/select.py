"""Choose the calibration method by its error against FP32 on held-back crops, not by faith."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, overload

import numpy as np
import numpy.typing as npt

from edgehp.errors import DataError
from edgehp.quantization.runner import Runner

if TYPE_CHECKING:
    import onnx

__all__ = ["Difference", "Judge", "Selection", "Subset", "select", "split_crops"]

Crop = npt.NDArray[np.uint8]
_HELD_BACK = 128
_SHARE = 5  # one crop in five is held back
_OUTPUTS = ("angles", "spread")


@dataclass(frozen=True)
class Difference:
    """How far a Q/DQ graph is from its float graph, in degrees.

    Attributes:
        angles: mean absolute difference of pitch, yaw and roll.
        spread: mean absolute difference of the spread.
        worst: largest difference of an angle.
        bias: mean signed difference of (pitch, yaw, roll).
    """

    angles: float
    spread: float
    worst: float
    bias: tuple[float, float, float]


@dataclass(frozen=True)
class Selection:
    """The choice and what it was made by.

    Attributes:
        best: key of the candidate with the smallest mean angle difference.
        scores: candidate -> difference to FP32.
    """

    best: str
    scores: Mapping[str, Difference]


def split_crops(crops: Sequence[Crop]) -> tuple[list[int], list[int]]:
    """Indices for calibration and for judging: disjoint, and the same for the same crops.

    The crops are ordered by their SHA-256, so neither their order nor a name decides; one in five,
    128 at most, is held back. Equal crops stay on one side. Fewer than five crops serve as both.
    """
    if len(crops) < _SHARE:
        return list(range(len(crops))), list(range(len(crops)))
    digests = [hashlib.sha256(np.ascontiguousarray(c).tobytes()).digest() for c in crops]
    unique = sorted(set(digests))
    held = set(unique[: min(_HELD_BACK, max(1, len(unique) // _SHARE))])
    if len(held) == len(unique):
        return list(range(len(crops))), list(range(len(crops)))
    judged = [i for i, d in enumerate(digests) if d in held]
    return [i for i, d in enumerate(digests) if d not in held], judged


class Subset(Sequence[Crop]):
    """Some of the crops, read when they are asked for: loading thousands at once takes memory."""

    def __init__(self, crops: Sequence[Crop], indices: Sequence[int]) -> None:
        self._crops = crops
        self._indices = indices

    @overload
    def __getitem__(self, index: int) -> Crop: ...
    @overload
    def __getitem__(self, index: slice) -> Subset: ...
    def __getitem__(self, index: int | slice) -> Crop | Subset:
        if isinstance(index, slice):
            return Subset(self._crops, self._indices[index])
        return self._crops[self._indices[index]]

    def __len__(self) -> int:
        return len(self._indices)


class Judge:
    """Compares Q/DQ graphs with a float graph on the same crops.

    Args:
        model: the float graph with the outputs ``angles`` and ``spread``.
        crops: to compare on.
        engine: see `edgehp.quantization.runner.Runner`.
        threads: of the engine; None takes all cores.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        crops: Iterable[Crop],
        *,
        engine: str = "auto",
        threads: int | None = None,
    ) -> None:
        self._crops = crops
        self._engine = engine
        self._threads = threads
        names = [o.name for o in model.graph.output]
        if not set(_OUTPUTS) <= set(names):
            raise DataError(f"the graph's outputs are {names}, expected {', '.join(_OUTPUTS)}")
        self._angles, self._spread = self.outputs(model)

    def outputs(self, model: onnx.ModelProto) -> tuple[npt.NDArray[np.float32], ...]:
        """Angles and spread [N, 3] of any graph for the judge's crops."""
        return Runner(model, _OUTPUTS, engine=self._engine, threads=self._threads)(self._crops)

    def __call__(self, model: onnx.ModelProto) -> Difference:
        """How far `model` is from the float graph."""
        angles, spread = self.outputs(model)
        error = angles.astype(np.float64) - self._angles
        p, y, r = (float(v) for v in error.mean(0))
        return Difference(
            angles=float(np.abs(error).mean()),
            spread=float(np.abs(spread.astype(np.float64) - self._spread).mean()),
            worst=float(np.abs(error).max()),
            bias=(p, y, r),
        )


def select(candidates: Mapping[str, Callable[[], onnx.ModelProto]], judge: Judge) -> Selection:
    """Emit every candidate in turn and keep the one nearest to FP32.

    Only one graph is held at a time. Ties go to the first.

    Raises:
        DataError: no candidate gives finite angles.
    """
    scores = {name: judge(emit()) for name, emit in candidates.items()}
    finite = {n: d.angles for n, d in scores.items() if np.isfinite(d.angles)}
    if not finite:
        raise DataError("no quantised candidate computes finite angles; the crops may be damaged")
    return Selection(min(finite, key=finite.__getitem__), MappingProxyType(scores))
