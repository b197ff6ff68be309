"""What each layer's INT8 costs in degrees: one layer alone, and all but one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from edgehp.errors import UsageError
from edgehp.quantization.qdq import Recipe
from edgehp.quantization.select import Difference, Judge

if TYPE_CHECKING:
    import onnx

__all__ = ["LayerSensitivity", "Sensitivity", "measure_sensitivity"]

_log = logging.getLogger(__name__)
# Recipe -> Q/DQ graph, e.g. a partial of `edgehp.quantization.quantise.emit`.
Emitter = Callable[[Recipe], "onnx.ModelProto"]


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
    emitter: Emitter, recipe: Recipe, layers: Sequence[str], judge: Judge
) -> Sensitivity:
    """Measure the effect of each layer's INT8 on angles and spread.

    Two graphs are emitted and run per layer.

    Args:
        emitter: emits a recipe, everything else fixed.
        recipe: methods and corrections; its `keep_float` stays in floating point throughout.
        layers: `edgehp.quantization.placement.quantisable_layers` of the flavour.
        judge: compares with FP32.

    Raises:
        UsageError: fewer than two layers to compare.
    """
    tried = [name for name in layers if name not in recipe.keep_float]
    if len(tried) < 2 or len(set(tried)) != len(tried):
        raise UsageError(f"{len(set(tried))} layers to compare, expected at least two")

    def difference(kept: frozenset[str]) -> Difference:
        return judge(emitter(replace(recipe, keep_float=recipe.keep_float | kept)))

    full = difference(frozenset())
    rows = []
    for i, layer in enumerate(tried, 1):
        others = frozenset(tried) - {layer}
        left_out = difference(frozenset({layer}))
        alone = difference(others)
        rows.append(LayerSensitivity(layer, alone, left_out, full.angles - left_out.angles))
        _log.info(
            "%d/%d %s: alone %.4f, without it %.4f degrees",
            i,
            len(tried),
            layer,
            alone.angles,
            left_out.angles,
        )
    return Sensitivity(full, tuple(rows))
