"""An FP16 body between FP32 normalisation and FP32 decode, for strongly typed engines."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np

from edgehp.errors import UsageError
from edgehp.quantization.graph import GraphView, add_nodes, drop_unread, with_constants

if TYPE_CHECKING:
    import onnx

# QuantizeLinear and DequantizeLinear take FP16 scales from this opset on.
HALF_OPSET = 19
_LARGEST = float(np.finfo(np.float16).max)
_SMALL = 1024  # values of a constant that may be more than a weight


def to_half_body(
    model: onnx.ModelProto, keep_weights: Collection[str] = ()
) -> tuple[onnx.ModelProto, frozenset[str]]:
    """Cast the body of a float graph (`GraphView.body`) to FP16.

    Args:
        model: float graph of any opset; raised to `HALF_OPSET` where it is older.
        keep_weights: nodes whose input 1 is left alone because it will be replaced.

    Returns:
        The new graph, FP32 at its inputs and outputs, and the names of the nodes in FP16.

    Raises:
        UsageError: a weight is too large for FP16, or the opset cannot be raised.
    """
    import onnx
    from onnx import helper, numpy_helper

    out = _raised(model)
    view = GraphView(out)
    body = view.body()
    added: list[onnx.NodeProto] = []
    casts: dict[str, str] = {}
    halves: dict[str, str] = {}

    def half_constant(name: str) -> str:
        if name not in halves:
            values = view.array(name)
            if values.dtype != np.float32:
                return name
            if np.abs(values).max(initial=0.0) > _LARGEST:
                raise UsageError(f"{name} holds values beyond FP16's {_LARGEST:g}; build FP32")
            halves[name] = f"{name}.fp16"
            tensor = numpy_helper.from_array(values.astype(np.float16), halves[name])
            out.graph.initializer.append(tensor)
        return halves[name]

    def cast(tensor: str, kind: int, name: str) -> onnx.NodeProto:
        return helper.make_node("Cast", [tensor], [name], name=name, to=kind)

    inside = {o for n in out.graph.node if n.name in body for o in n.output}
    for node in out.graph.node:
        if node.name in body:
            for i, name in enumerate(node.input):
                if not name or name in inside:
                    continue
                if view.is_constant(name):
                    if not (i == 1 and node.name in keep_weights):
                        node.input[i] = half_constant(name)
                    continue
                if name not in casts:
                    casts[name] = f"{name}.fp16"
                    added.append(cast(name, onnx.TensorProto.FLOAT16, casts[name]))
                node.input[i] = casts[name]
        else:
            for i, name in enumerate(node.input):
                if name in inside:
                    if name not in casts:
                        casts[name] = f"{name}.fp32"
                        added.append(cast(name, onnx.TensorProto.FLOAT, casts[name]))
                    node.input[i] = casts[name]
    if crossing := sorted(inside & view.outputs):
        raise UsageError(f"the graph's output {crossing[0]} lies in its body; expected a decode")
    add_nodes(out, added)
    drop_unread(out)
    del out.graph.value_info[:]
    return out, body


def _raised(model: onnx.ModelProto) -> onnx.ModelProto:
    import onnx
    from onnx import helper, version_converter

    if GraphView(model).opset >= HALF_OPSET:
        out = onnx.ModelProto()
        out.CopyFrom(model)
    else:
        # Weights mean nothing to the converter, which holds several copies of its graph.
        constants = {t.name: t for t in model.graph.initializer}
        try:
            light = with_constants(model, map(_hollow, constants.values()))
            light = version_converter.convert_version(light, HALF_OPSET)
        except RuntimeError as e:
            raise UsageError(
                f"FP16 scales need opset {HALF_OPSET} and this graph cannot be raised to it ({e})\n"
                f"hint: export it at opset {HALF_OPSET}"
            ) from e
        out = with_constants(light, (constants.get(t.name, t) for t in light.graph.initializer))
        out.ir_version = helper.find_min_ir_version_for(list(out.opset_import))
        out.metadata_props.extend(model.metadata_props if not out.metadata_props else [])
    return out


def _hollow(tensor: onnx.TensorProto) -> onnx.TensorProto:
    """A large tensor without its values; a small one, such as axes, as it is."""
    import onnx

    if math.prod(tensor.dims) <= _SMALL:
        return tensor
    return onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
