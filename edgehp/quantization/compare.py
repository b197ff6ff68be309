"""A Q/DQ graph on crops it was not calibrated on: how far from FP32, and how much it cuts off."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgehp.errors import DataError
from edgehp.quantization.graph import GraphView, with_outputs
from edgehp.quantization.runner import Runner

if TYPE_CHECKING:
    import onnx

Crop = npt.NDArray[np.uint8]
# Of 112 pixels. Twice as many chose no better between candidates that differ at all.
_HELD_BACK = 64
_SHARE = 5  # one crop in five is held back
_OUTPUTS = ("angles", "spread")


@dataclass(frozen=True)
class Difference:
    """How far a Q/DQ graph is from its float graph, in degrees.

    Attributes:
        angles: mean absolute difference of pitch, yaw and roll.
        spread: mean absolute difference of the spread; None of a network without bins.
        worst: largest difference of an angle.
        bias: mean signed difference of (pitch, yaw, roll).
    """

    angles: float
    spread: float | None
    worst: float
    bias: tuple[float, float, float]


def fewer_of_large(count: int, side: int) -> int:
    """How many crops of `side` pixels say what `count` of 112 pixels do; smaller ones no less."""
    return max(1, count * 112 // max(112, side))


def split_crops(crops: Sequence[Crop]) -> tuple[list[int], list[int]]:
    """Indices for calibration and for comparison: disjoint, and the same for the same crops.

    The crops are ordered by their SHA-256, so neither their order nor a name decides; one in five
    is held back, at most 64 of 112 pixels (`fewer_of_large`). Equal crops stay on one side. Fewer
    than five crops serve as both.
    """
    if len(crops) < _SHARE:
        return list(range(len(crops))), list(range(len(crops)))
    digests = [hashlib.sha256(np.ascontiguousarray(c).tobytes()).digest() for c in crops]
    unique = sorted(set(digests))
    most = fewer_of_large(_HELD_BACK, len(crops[0]))
    held = set(unique[: min(most, max(1, len(unique) // _SHARE))])
    if len(held) == len(unique):
        return list(range(len(crops))), list(range(len(crops)))
    held_back = [i for i, d in enumerate(digests) if d in held]
    return [i for i, d in enumerate(digests) if d not in held], held_back


class Comparison:
    """Compares Q/DQ graphs with a float graph on the same crops.

    Args:
        model: the float graph with the outputs ``angles`` and, of bins, ``spread``.
        crops: to compare on.
        threads: of the processor; None takes all cores.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        crops: Iterable[Crop],
        *,
        threads: int | None = None,
    ) -> None:
        self._crops = crops
        self._threads = threads
        names = [o.name for o in model.graph.output]
        self._names = tuple(name for name in _OUTPUTS if name in names)
        if _OUTPUTS[0] not in self._names:
            raise DataError(f"the graph's outputs are {names}, expected {', '.join(_OUTPUTS)}")
        self._reference = self.outputs(model)

    def outputs(self, model: onnx.ModelProto) -> tuple[npt.NDArray[np.float32], ...]:
        """Angles and, of bins, spread [N, 3] of any graph for the crops."""
        return Runner(model, self._names, threads=self._threads)(self._crops)

    def __call__(self, model: onnx.ModelProto) -> Difference:
        """How far `model` is from the float graph."""
        apart = [
            found.astype(np.float64) - own
            for found, own in zip(self.outputs(model), self._reference, strict=True)
        ]
        error = apart[0]
        p, y, r = (float(v) for v in error.mean(0))
        return Difference(
            angles=float(np.abs(error).mean()),
            spread=float(np.abs(apart[1]).mean()) if len(apart) > 1 else None,
            worst=float(np.abs(error).max()),
            bias=(p, y, r),
        )


@dataclass(frozen=True)
class Clipping:
    """Activations beyond the range of their QuantizeLinear.

    Attributes:
        share: of all quantized activations, 0..1; tensors count by their elements.
        worst: the tensor with the largest share, and that share.
    """

    share: float
    worst: tuple[str, float]


class ClippingMeter:
    """Counts the activations that a Q/DQ graph clips.

    A value counts where it is more than half a step beyond the last level, so that mere rounding
    does not.

    Args:
        model: the Q/DQ graph.
        threads: of the processor.

    Raises:
        DataError: the graph quantizes no activation.
    """

    def __init__(self, model: onnx.ModelProto, *, threads: int | None = None) -> None:
        self._limits = _limits(model)
        if not self._limits:
            raise DataError(
                "the graph has no QuantizeLinear behind an activation; quantize it first"
            )
        outputs = dict.fromkeys([*(o.name for o in model.graph.output), *self._limits])
        self._run = Runner(with_outputs(model, list(outputs)), tuple(self._limits), threads=threads)

    def __call__(self, crops: Iterable[Crop]) -> Clipping:
        """What it clips of crops uint8 [S, S, 3], RGB.

        Raises:
            DataError: no crops, or crops of the wrong size.
        """
        beyond = dict.fromkeys(self._limits, 0)
        seen = dict.fromkeys(self._limits, 0)
        for batch in self._run.stream(crops):
            for (name, (low, high)), values in zip(self._limits.items(), batch, strict=True):
                beyond[name] += int(np.count_nonzero((values < low) | (values > high)))
                seen[name] += values.size
        if not any(seen.values()):
            raise DataError("no crops to count clipped activations on: expected at least one")
        shares = {n: beyond[n] / max(1, seen[n]) for n in self._limits}
        worst = max(shares.items(), key=lambda share: share[1])
        return Clipping(sum(beyond.values()) / sum(seen.values()), worst)


def _limits(model: onnx.ModelProto) -> dict[str, tuple[float, float]]:
    """Activation tensor -> the values that its QuantizeLinear represents."""
    view = GraphView(model)
    found: dict[str, tuple[float, float]] = {}
    for node in view.of_type("QuantizeLinear"):
        name = node.input[0]
        if view.is_constant(name) or not view.is_constant(node.input[1]):
            continue
        scale = float(view.array(node.input[1]).reshape(-1)[0])
        zero, kind = 0, np.dtype(np.uint8)
        if len(node.input) > 2 and node.input[2]:
            point = view.array(node.input[2])
            zero, kind = int(point.reshape(-1)[0]), point.dtype
        info = np.iinfo(kind)
        low, high = (info.min - zero - 0.5) * scale, (info.max - zero + 0.5) * scale
        if name in found:
            low, high = max(low, found[name][0]), min(high, found[name][1])
        found[name] = (low, high)
    return found
