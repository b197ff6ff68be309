"""Cross-layer equalisation: rescale channels so that one activation scale fits them all.

ReLU, max pooling, averaging and residual addition commute with a positive factor per channel, so
a factor can be moved from the convolutions that make a set of tensors to those that read them
without changing the function (Nagel et al., arXiv 1906.04721, section 4.1; the mix of activation
and weight ranges is that of Xiao et al., arXiv 2211.10438, equation 4). Here the sets include the
residual stream of a whole stage, not only what lies inside a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgehp.errors import UsageError
from edgehp.quantization.graphview import GraphView, with_constants
from edgehp.quantization.table import CalibrationTable

if TYPE_CHECKING:
    import onnx

__all__ = ["ChannelGroup", "channel_groups", "equalise"]

Array = npt.NDArray[np.float64]
# Operators that commute with a positive factor per channel.
_HOMOGENEOUS = ("Relu", "MaxPool", "AveragePool", "GlobalAveragePool", "Add", "Flatten")
_LARGEST_FACTOR = 16.0


@dataclass(frozen=True)
class ChannelGroup:
    """Tensors that must share their channel factors.

    Attributes:
        tensors: in graph order.
        makers: Conv and Gemm nodes whose outputs belong to the group.
        readers: Conv and Gemm nodes that read from it.
    """

    tensors: tuple[str, ...]
    makers: tuple[str, ...]
    readers: tuple[str, ...]


def channel_groups(view: GraphView) -> tuple[ChannelGroup, ...]:
    """The groups of a graph that can be rescaled, in graph order."""
    parent: dict[str, str] = {}

    def root(t: str) -> str:
        while parent.setdefault(t, t) != t:
            t = parent[t]
        return t

    for node in view.of_type(*_HOMOGENEOUS):
        for name in node.input:
            parent[root(name)] = root(node.output[0])
    members: dict[str, list[str]] = {}
    for node in view.model.graph.node:
        for t in node.output:
            members.setdefault(root(t), []).append(t)
    uses: dict[str, int] = {}
    for node in view.model.graph.node:
        for name in node.input:
            uses[name] = uses.get(name, 0) + 1
    groups = []
    for tensors in members.values():
        makers, readers = [], []
        for t in tensors:
            node = view.producer[t]
            if _scalable(view, node, uses):
                makers.append(node.name)
            elif node.op_type not in _HOMOGENEOUS or any(map(view.is_constant, node.input)):
                break
            consumers = [(view.nodes[n], i) for n, i in view.consumers.get(t, [])]
            if t in view.outputs or not all(
                c.op_type in _HOMOGENEOUS or (i == 0 and _scalable(view, c, uses))
                for c, i in consumers
            ):
                break
            readers += [c.name for c, _ in consumers if c.op_type not in _HOMOGENEOUS]
        else:
            if makers and readers:
                groups.append(ChannelGroup(tuple(tensors), tuple(makers), tuple(readers)))
    return tuple(groups)


def _scalable(view: GraphView, node: onnx.NodeProto, uses: dict[str, int]) -> bool:
    """Whether weight and bias are constants of this node alone and channels map one to one."""
    if not view.has_weight(node) or view.attribute(node, "group", 1) != 1:
        return False
    own = all(view.is_constant(p) and uses[p] == 1 for p in node.input[1:])
    return own and view.attribute(node, "transA", 0) == 0


def equalise(
    model: onnx.ModelProto, table: CalibrationTable, strength: float = 0.5
) -> onnx.ModelProto:
    """The same function with channels of like ranges.

    Args:
        model: float graph; not modified.
        table: its calibration table (channel peaks).
        strength: 0 to 1: how far activations are evened out at the cost of the weights behind.

    Returns:
        A float graph with the same node names; its ranges must be calibrated again.

    Raises:
        UsageError: `strength` is out of range, or the table lacks a tensor.
    """
    from onnx import numpy_helper

    if not 0 <= strength <= 1:
        raise UsageError(f"equalisation strength {strength} is outside 0..1")
    view = GraphView(model)
    arrays: dict[str, npt.NDArray[np.float64]] = {}

    def array(name: str) -> Array:
        if name not in arrays:
            arrays[name] = view.array(name).astype(np.float64)
        return arrays[name]

    for group in channel_groups(view):
        weights = [array(view.nodes[r].input[1]) for r in group.readers]
        peaks = [table.tensors[t].channel_peak for t in group.tensors if t in table.tensors]
        channels = weights[0].shape[1]
        if not peaks or any(len(p) != channels for p in peaks):
            continue
        factors = _factors([np.asarray(p) for p in peaks], weights, strength)
        for name in group.makers:
            node = view.nodes[name]
            for parameter in node.input[1:]:
                values = array(parameter)
                arrays[parameter] = values / factors.reshape((-1,) + (1,) * (values.ndim - 1))
        for name in group.readers:
            parameter = view.nodes[name].input[1]
            values = array(parameter)
            arrays[parameter] = values * factors.reshape((1, -1) + (1,) * (values.ndim - 2))

    def changed(tensor: onnx.TensorProto) -> onnx.TensorProto:
        values = arrays.pop(tensor.name, None)
        if values is None:
            return tensor
        return numpy_helper.from_array(values.astype(np.float32), tensor.name)

    return with_constants(model, map(changed, model.graph.initializer))


def _factors(peaks: Sequence[Array], weights: Sequence[Array], strength: float) -> Array:
    activation = np.max([p / max(float(p.max()), 1e-30) for p in peaks], axis=0)
    weight = np.max(
        [
            np.abs(w).max((0, *range(2, w.ndim))) / max(float(np.abs(w).max()), 1e-30)
            for w in weights
        ],
        axis=0,
    )
    usable = (activation > 1e-6) & (weight > 1e-6)
    if not usable.any():
        return np.ones_like(activation)
    log = np.zeros_like(activation)
    log[usable] = strength * np.log(activation[usable]) - (1 - strength) * np.log(weight[usable])
    log[usable] -= log[usable].mean()
    limit = np.log(_LARGEST_FACTOR)
    return np.asarray(np.exp(np.clip(log, -limit, limit)), np.float64)
