"""What each layer's INT8 costs in degrees: one layer alone, and all but one."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgehp.errors import UsageError
from edgehp.quantization.compare import Comparison, Difference
from edgehp.quantization.qdq import quantized_layers, remove_qdq

if TYPE_CHECKING:
    import onnx

__all__ = ["LayerSensitivity", "Sensitivity", "measure_sensitivity"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerSensitivity:
    """One layer's share of the error.

    Attributes:
        layer: name of the node.
        alone: difference to FP32 with this layer in INT8 and all others in floating point.
        left_out: difference with this layer in floating point and all others in INT8.
        gain: how much the mean angle difference falls when this layer goes back to floating
            point, degrees; negative where its error happened to cancel others'.
    """

    layer: str
    alone: Difference
    left_out: Difference
    gain: float


@dataclass(frozen=True)
class Sensitivity:
    """The table, in graph order.

    Attributes:
        full: difference with every layer in INT8.
        layers: one row per layer.
    """

    full: Difference
    layers: tuple[LayerSensitivity, ...]

    def ranked(self) -> tuple[LayerSensitivity, ...]:
        """The rows, most harmful first: by `gain`, then by the error alone."""
        return tuple(sorted(self.layers, key=lambda s: (-s.gain, -s.alone.angles)))


def measure_sensitivity(
    model: onnx.ModelProto, source: onnx.ModelProto, comparison: Comparison
) -> Sensitivity:
    """Measure the effect of each layer's INT8 on angles and spread.

    Q/DQ are taken out of the graph itself; two graphs are run per layer.

    Args:
        model: the Q/DQ graph.
        source: the float graph that it was made from.
        comparison: with `source`.

    Raises:
        UsageError: fewer than two layers to compare.
    """
    layers = quantized_layers(model)
    if len(layers) < 2:
        raise UsageError(f"{len(layers)} quantized layers to compare, expected at least two")
    full = comparison(model)
    rows = []
    for i, layer in enumerate(layers, 1):
        left_out = comparison(remove_qdq(model, (layer,), source))
        alone = comparison(remove_qdq(model, set(layers) - {layer}, source))
        rows.append(LayerSensitivity(layer, alone, left_out, full.angles - left_out.angles))
        _log.info(
            "%d/%d %s: alone %.4f, without it %.4f degrees",
            i,
            len(layers),
            layer,
            alone.angles,
            left_out.angles,
        )
    return Sensitivity(full, tuple(rows))
