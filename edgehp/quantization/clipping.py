"""How many activations a Q/DQ graph cuts off: what its scales have not seen before."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgehp.errors import DataError
from edgehp.quantization.graph import GraphView, with_outputs
from edgehp.quantization.runner import Runner

if TYPE_CHECKING:
    import onnx

Crop = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Clipping:
    """Activations beyond the range of their QuantizeLinear.

    Attributes:
        share: of all quantized activations, 0..1; tensors count by their elements.
        tensors: tensor -> its own share.
    """

    share: float
    tensors: Mapping[str, float]

    @property
    def worst(self) -> tuple[str, float]:
        """The tensor with the largest share, and that share."""
        name = max(self.tensors, key=lambda n: self.tensors[n])
        return name, self.tensors[name]


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
        return Clipping(
            sum(beyond.values()) / sum(seen.values()),
            MappingProxyType({n: beyond[n] / max(1, seen[n]) for n in self._limits}),
        )


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
