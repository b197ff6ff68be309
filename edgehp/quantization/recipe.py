"""What a quantization was made with: saved beside the graph, and enough to repeat it."""

from __future__ import annotations

from typing import Literal

from edgehp.files import Record

# Raised when the same recipe and crops would give other integers.
ALGORITHM = 4
FLAVORS = ("tensorrt", "cpu", "onnxruntime")
BODIES = ("fp32", "fp16")


class Recipe(Record, frozen=True, kw_only=True):
    """The choices behind a Q/DQ graph; the same float graph and crops give the same graph again.

    Attributes:
        flavor: where Q/DQ pairs go, and the type of the activations (`quantization.placement`).
        method: how the ranges of the activations were found (`quantization.ranges.METHODS`).
        rounding: each weight to the nearest integer, or those of a layer jointly
            (`quantization.rounding`).
        body: what is computed outside of Q/DQ.
        float_layers: nodes that stay in floating point.
        algorithm: `ALGORITHM` of the edgehp that made the graph.
    """

    flavor: Literal["tensorrt", "cpu", "onnxruntime"]
    method: Literal["minmax", "percentile", "entropy", "mse"]
    rounding: Literal["nearest", "joint"] = "nearest"
    body: Literal["fp32", "fp16"] = "fp32"
    float_layers: tuple[str, ...] = ()
    algorithm: int = ALGORITHM

    def __str__(self) -> str:
        """For people: the method, and how weights were rounded where it was jointly."""
        return self.method + (", joint rounding" if self.rounding == "joint" else "")
