"""Give the stem all 256 levels of a signed byte: shift its ReLU into the quantiser.

A symmetric int8 tensor behind a ReLU uses half of its levels. Shifted down by 128 steps it uses all
of them, and the quantiser's saturation at -128 is the ReLU. What the shift does to the layers
behind goes into their biases; only their zero padding has to be made explicit, so this is done
once, for the tensor that costs most accuracy: the stem's, which every later layer depends on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgehp.quantization.graphview import GraphView, drop_unread
from edgehp.quantization.qdq import Recipe, scale_of
from edgehp.quantization.table import CalibrationTable, TensorRanges
from edgehp.quantization.thresholds import METHODS

if TYPE_CHECKING:
    import onnx

__all__ = ["with_full_stem"]

_PADDED = "stem.padded"
_DEPTH = 128  # steps that zero is moved down


@dataclass(frozen=True)
class _Stem:
    """Convolution, ReLU, max pooling, and what reads them."""

    conv: onnx.NodeProto
    relu: onnx.NodeProto
    pool: onnx.NodeProto
    readers: tuple[onnx.NodeProto, ...]
    # The last convolutions of the blocks whose skip is the stem.
    joined: tuple[onnx.NodeProto, ...]

    @property
    def names(self) -> set[str]:
        """Nodes that must be integers for the shift to work."""
        own = (self.conv, self.pool, *self.readers, *self.joined)
        return {n.name for n in own}


def with_full_stem(
    model: onnx.ModelProto, table: CalibrationTable, recipe: Recipe, *, half: bool = False
) -> tuple[onnx.ModelProto, CalibrationTable]:
    """A graph that computes the same once it is quantised, and not before: its ReLU is gone.

    Args:
        model: float graph; not modified.
        table: its calibration table.
        recipe: of the activations.
        half: whether the scale will be float16.

    Returns:
        The graph and the table with the ranges of its new tensors. Both unchanged where there is
        no such stem, or `recipe` keeps a layer of it in floating point.
    """
    import onnx
    from onnx import helper, numpy_helper

    view = GraphView(model)
    stem = _stem(view)
    if stem is None or stem.names & recipe.keep_float or _PADDED in view.producer:
        return model, table
    before, after = stem.relu.output[0], stem.conv.output[0]
    low, high = recipe.range_of(table, before, "uint8")
    pooled = table.tensors.get(stem.pool.output[0])
    if low < 0 or pooled is None:
        return model, table
    scale, _ = scale_of((0.0, high), "uint8", half=half)
    shift = _DEPTH * scale
    out = onnx.ModelProto()
    out.CopyFrom(model)
    nodes = {n.name: n for n in out.graph.node}

    def constant(name: str, values: npt.NDArray[np.generic]) -> str:
        out.graph.initializer.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def add_to_bias(node: onnx.NodeProto, change: npt.NDArray[np.float64] | float) -> None:
        name = nodes[node.name].input[2]
        values = (view.array(name).astype(np.float64) + change).astype(np.float32)
        nodes[node.name].input[2] = constant(f"{name}.shifted", values)

    add_to_bias(stem.conv, -shift)
    nodes[stem.pool.name].input[0] = after
    pads = [0] * 4
    for reader in stem.readers:
        if reader.op_type != "Conv":
            continue
        add_to_bias(reader, shift * view.array(reader.input[1]).astype(np.float64).sum((1, 2, 3)))
        for attribute in nodes[reader.name].attribute:
            if attribute.name == "pads" and any(attribute.ints):
                pads = list(attribute.ints)
                attribute.ints[:] = [0] * 4
                nodes[reader.name].input[0] = _PADDED
    for node in stem.joined:
        add_to_bias(node, shift)
    out.graph.node.remove(nodes[stem.relu.name])
    if any(pads):
        ends = np.array([0, 0, *pads[:2], 0, 0, *pads[2:]], np.int64)
        inputs = [
            stem.pool.output[0],
            constant(f"{_PADDED}.pads", ends),
            constant(f"{_PADDED}.value", np.array(-shift, np.float32)),
        ]
        pad = helper.make_node("Pad", inputs, [_PADDED], name=_PADDED)
        out.graph.node.insert(list(out.graph.node).index(nodes[stem.pool.name]) + 1, pad)
    drop_unread(out)
    ends_of = {"int8": (-127.0 * scale, 127.0 * scale), "uint8": (0.0, 255.0 * scale)}
    ranges = TensorRanges(
        minimum=-shift,
        maximum=127.0 * scale,
        ranges=MappingProxyType({m: MappingProxyType(ends_of) for m in METHODS}),
        channel_mean=tuple((np.asarray(pooled.channel_mean) - shift).tolist()),
        channel_peak=pooled.channel_peak,
    )
    more = {after: ranges, _PADDED: ranges, stem.pool.output[0]: ranges}
    return out, replace(table, tensors=MappingProxyType({**table.tensors, **more}))


def _stem(view: GraphView) -> _Stem | None:
    """The first convolution of the graph with ReLU and max pooling behind it, and its readers."""
    conv = next((n for n in view.of_type("Conv") if view.has_weight(n)), None)
    if conv is None:
        return None
    relu = _only_reader(view, conv.output[0], "Relu")
    pool = None if relu is None else _only_reader(view, relu.output[0], "MaxPool")
    if relu is None or pool is None or not _plain(view, conv):
        return None
    skips = {n.name: skip for n, skip in view.residual_adds()}
    readers, joined, padded = [], [], set()
    for name, index in view.consumers.get(pool.output[0], []):
        node = view.nodes[name]
        if node.op_type == "Conv" and index == 0 and _plain(view, node):
            padded.add(next((tuple(a.ints) for a in node.attribute if a.name == "pads"), (0,) * 4))
        elif node.op_type == "Add" and skips.get(name) == index:
            last = view.producer.get(node.input[1 - index])
            if last is None or not _plain(view, last) or len(view.consumers[last.output[0]]) != 1:
                return None
            joined.append(last)
        else:
            return None
        readers.append(node)
    if not readers or pool.output[0] in view.outputs or len(padded - {(0,) * 4}) > 1:
        return None
    return _Stem(conv, relu, pool, tuple(readers), tuple(joined))


def _only_reader(view: GraphView, tensor: str, kind: str) -> onnx.NodeProto | None:
    readers = view.consumers.get(tensor, [])
    if len(readers) != 1 or tensor in view.outputs:
        return None
    node = view.nodes[readers[0][0]]
    return node if node.op_type == kind else None


def _plain(view: GraphView, node: onnx.NodeProto) -> bool:
    """A convolution with constant weight and bias, in one group, with explicit pads."""
    return (
        node.op_type == "Conv"
        and view.has_weight(node)
        and len(node.input) > 2
        and view.is_constant(node.input[2])
        and view.attribute(node, "group", 1) == 1
        and not any(a.name == "auto_pad" and a.s not in (b"", b"NOTSET") for a in node.attribute)
    )
