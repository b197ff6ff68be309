"""The ``cpu`` flavour: uint8 activations, int8 per-channel weights, integers up to the decode."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgehp.quantization.exact_input import with_exact_input
from edgehp.quantization.graphview import GraphView
from edgehp.quantization.placement import place
from edgehp.quantization.qdq import Recipe, insert_qdq
from edgehp.quantization.table import CalibrationTable

if TYPE_CHECKING:
    import onnx

__all__ = ["emit_cpu"]


def emit_cpu(
    model: onnx.ModelProto,
    table: CalibrationTable,
    recipe: Recipe,
    *,
    quantise_sum: bool = True,
) -> onnx.ModelProto:
    """Emit a Q/DQ graph for OpenVINO and onnxruntime on x86-64 and ARM.

    Biases stay in FP32: both engines fold them into the integer convolution. Processors without
    VNNI add pairs of u8 x s8 products in 16 bits, which saturates in onnxruntime; OpenVINO widens
    there, so it is the engine to use on them.

    Args:
        model: the deployed float graph; not modified.
        table: its calibration table.
        recipe: methods, nodes kept in floating point, corrections.
        quantise_sum: quantise the last convolution's edge to the residual Add as well;
            onnxruntime needs it to stay in integers.

    Raises:
        UsageError: a node in `recipe.keep_float` that does not exist.
    """
    if recipe.exact_input:
        model, table = with_exact_input(model, table, "uint8")
    view = GraphView(model)
    placement = place(view, "cpu", recipe.keep_float, quantise_sum=quantise_sum)
    return insert_qdq(model, view, placement, table, recipe, grid="uint8")
