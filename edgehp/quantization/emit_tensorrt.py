"""The ``tensorrt`` flavour: symmetric int8, per-channel weights, float biases.

Placement as NVIDIA ModelOpt's for ResNets (`edgehp.quantization.placement`). Opset 17 with FP32
scales, or an FP16 body with FP16 scales at opset 19: a strongly typed engine computes what lies
outside Q/DQ in the graph's own type.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgehp.errors import UsageError
from edgehp.quantization.exact_input import with_exact_input
from edgehp.quantization.graphview import GraphView
from edgehp.quantization.halves import to_half_body
from edgehp.quantization.placement import place
from edgehp.quantization.qdq import Recipe, insert_qdq
from edgehp.quantization.stem import with_full_stem
from edgehp.quantization.table import CalibrationTable

if TYPE_CHECKING:
    import onnx

__all__ = ["BODIES", "emit_tensorrt"]

BODIES = ("fp32", "fp16")


def emit_tensorrt(
    model: onnx.ModelProto,
    table: CalibrationTable,
    recipe: Recipe,
    *,
    body: str = "fp32",
    head: bool = False,
) -> onnx.ModelProto:
    """Emit a Q/DQ graph for TensorRT and TensorRT-RTX.

    Args:
        model: the deployed float graph; not modified.
        table: its calibration table.
        recipe: methods, nodes kept in floating point, corrections.
        body: ``"fp32"``: FP32 scales, the opset of `model`; ``"fp16"``: FP16 scales and body,
            FP32 normalisation and decode, opset 19 or later.
        head: quantise the Gemm nodes too (NVIDIA's placement does not).

    Raises:
        UsageError: unknown body, or a node in `recipe.keep_float` that does not exist.
    """
    if body not in BODIES:
        raise UsageError(f"body {body!r} is none of {', '.join(BODIES)}")
    if recipe.exact_input:
        model, table = with_exact_input(model, table, "int8")
    if recipe.full_stem:
        model, table = with_full_stem(model, table, recipe, half=body == "fp16")
    view = GraphView(model)
    placement = place(view, "tensorrt", recipe.keep_float, head=head)
    half: frozenset[str] = frozenset()
    target = model
    if body == "fp16":
        target, half = to_half_body(model, placement.weights)
    return insert_qdq(target, view, placement, table, recipe, grid="int8", half=half)
