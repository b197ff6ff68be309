"""Quantise the picture without error: its 256 values fit 8 bits if the scale is 1.

The graph centres every channel by its own mean, so the three together span more than 256 values
and rounding them to one scale costs about half a grey level everywhere. Centred by one number for
all channels (128, or 0 for unsigned integers) they are integers that fit. What that changes in the
interior is a constant, which goes into the bias; only the zero padding, which stands for the mean,
has to be made explicit before the shift.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from edgehp.quantization.graphview import GraphView, drop_unread
from edgehp.quantization.table import CalibrationTable, TensorRanges
from edgehp.quantization.thresholds import METHODS, Range

if TYPE_CHECKING:
    import onnx

__all__ = ["with_exact_input"]

_TENSOR = "shifted"
# What is subtracted from a pixel, and the range that makes the scale 1.
_SHIFTS = {"int8": 128, "uint8": 0}
_RANGES: dict[str, Range] = {"int8": (-127.0, 127.0), "uint8": (0.0, 255.0)}


@dataclass(frozen=True)
class _Entry:
    """The centring subtraction and the convolution behind it."""

    centring: onnx.NodeProto
    first: onnx.NodeProto
    mean: np.ndarray[tuple[int], np.dtype[np.float64]]


def with_exact_input(
    model: onnx.ModelProto, table: CalibrationTable, grid: str
) -> tuple[onnx.ModelProto, CalibrationTable]:
    """The same function, up to half a grey level at the border, with a picture of integers.

    Args:
        model: float graph; not modified.
        table: its calibration table.
        grid: ``"int8"`` or ``"uint8"``, of the activations.

    Returns:
        A graph whose first convolution reads the tensor ``shifted``, and the table with a range
        for it that has the scale 1. Both unchanged where the graph does not begin with the
        centring of uint8 pixels before a convolution.
    """
    import onnx
    from onnx import helper, numpy_helper

    view = GraphView(model)
    entry = _entry(view)
    if entry is None or _TENSOR in view.producer:
        return model, table
    shift = _SHIFTS[grid]
    whole = np.round(entry.mean)
    out = onnx.ModelProto()
    out.CopyFrom(model)
    nodes = {n.name: n for n in out.graph.node}
    first, centring = nodes[entry.first.name], nodes[entry.centring.name]

    def constant(name: str, values: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> str:
        out.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def channels(
        values: np.ndarray[tuple[int], np.dtype[np.float64]],
    ) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        return values.reshape(1, -1, 1, 1).astype(np.float32)

    weight = view.array(first.input[1]).astype(np.float64)
    bias = view.array(first.input[2]).astype(np.float64)
    bias = bias + weight.sum((2, 3)) @ (shift - entry.mean)
    pads = _pads(first)
    added = [
        helper.make_node(
            "Pad",
            [
                centring.output[0],
                constant(f"{_TENSOR}.pads", np.array([0, 0, *pads[:2], 0, 0, *pads[2:]], np.int64)),
            ],
            [f"{_TENSOR}.padded"],
            name=f"{_TENSOR}.padded",
        ),
        helper.make_node(
            "Add",
            [f"{_TENSOR}.padded", constant(f"{_TENSOR}.offset", channels(whole - shift))],
            [_TENSOR],
            name=_TENSOR,
        ),
    ]
    centring.input[1] = constant(f"{_TENSOR}.mean", channels(whole))
    first.input[0] = _TENSOR
    first.input[2] = constant(f"{_TENSOR}.bias", bias.astype(np.float32))
    for attribute in first.attribute:
        if attribute.name == "pads":
            attribute.ints[:] = [0] * 4
    place = list(out.graph.node).index(centring) + 1
    for i, node in enumerate(added):
        out.graph.node.insert(place + i, node)
    drop_unread(out)
    return out, _with_range(table, entry, shift)


def _entry(view: GraphView) -> _Entry | None:
    """uint8 input -> Cast, Transpose in any order -> Sub of a mean per channel -> Conv."""
    for first in view.of_type("Conv"):
        centring = view.producer.get(first.input[0])
        if centring is None or centring.op_type != "Sub" or not view.has_weight(first):
            continue
        if not view.is_constant(centring.input[1]) or len(first.input) < 3:
            continue
        if len(view.consumers[centring.output[0]]) != 1 or not view.is_constant(first.input[2]):
            continue
        if view.attribute(first, "group", 1) != 1 or any(
            a.name == "auto_pad" and a.s not in (b"", b"NOTSET") for a in first.attribute
        ):
            continue
        if not _is_picture(view, centring.input[0]):
            continue
        mean = view.array(centring.input[1]).astype(np.float64)
        count = view.array(first.input[1]).shape[1]
        if mean.shape == (1, count, 1, 1) and mean.min() >= 0 and mean.max() <= 255:
            return _Entry(centring, first, mean.reshape(-1))
    return None


def _is_picture(view: GraphView, tensor: str) -> bool:
    while (node := view.producer.get(tensor)) is not None and node.op_type in ("Cast", "Transpose"):
        tensor = node.input[0]
    uint8 = 2  # TensorProto.UINT8
    return any(i.name == tensor and i.type.tensor_type.elem_type == uint8 for i in view.inputs)


def _pads(node: onnx.NodeProto) -> Sequence[int]:
    return next((tuple(a.ints) for a in node.attribute if a.name == "pads"), (0, 0, 0, 0))


def _with_range(table: CalibrationTable, entry: _Entry, shift: int) -> CalibrationTable:
    seen = table.tensors.get(entry.centring.output[0])
    if seen is None:
        return table
    ranges = TensorRanges(
        minimum=-float(shift),
        maximum=255.0 - shift,
        ranges=MappingProxyType({m: MappingProxyType(_RANGES) for m in METHODS}),
        channel_mean=tuple((np.asarray(seen.channel_mean) + entry.mean - shift).tolist()),
        channel_peak=tuple(255.0 for _ in seen.channel_mean),
    )
    return replace(table, tensors=MappingProxyType({**table.tensors, _TENSOR: ranges}))
