"""Bring the channels of an activation to one size before they share a scale.

A convolution's output channels differ in size, those of depthwise convolutions by factors of a
hundred, and INT8 gives all of them one scale. Between two layers with nothing but ReLU and its kind
the network does not change when a channel is divided by a factor and the weights that read it are
multiplied by it (Nagel et al., arXiv 1906.04721). The factors here are those of SmoothQuant (Xiao
et al., arXiv 2211.10438): half of the difference moves into the weights, which have scales per
output channel. Where a depthwise convolution reads, all of it moves: it has a scale for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from edgehp.quantization.graph import GraphView, with_constants, with_outputs
from edgehp.quantization.runner import Runner

if TYPE_CHECKING:
    import onnx

# Functions with f(s x) = s f(x) for s > 0, channel by channel.
_HOMOGENEOUS = ("Relu", "LeakyRelu", "PRelu")
# What a channel is made larger by at most: one that was nearly still on these crops may not be on
# others.
_MOST = 32.0
_CROPS = 64


class _Link(NamedTuple):
    """Two layers and the tensor between them, read by the second alone."""

    first: str
    second: str
    tensor: str
    depthwise: bool


def equalize(
    model: onnx.ModelProto,
    crops: Sequence[npt.NDArray[np.uint8]],
    *,
    threads: int | None = None,
) -> onnx.ModelProto:
    """The same float network with channels of equal size where that is free.

    Networks without depthwise convolutions are given back as they are: a ResNet gains nothing.

    Args:
        model: the deployed float graph.
        crops: uint8 [S, S, 3] each; some of them, evenly spread, show how large channels become.
        threads: of the processor; None takes all cores.

    Raises:
        DataError, EnvironmentalError: as `edgehp.quantization.runner.Runner`.
    """
    from onnx import numpy_helper

    view = GraphView(model)
    links = _links(view)
    if not any(link.depthwise for link in links):
        return model
    tensors = [link.tensor for link in links]
    some = [crops[i] for i in range(0, len(crops), -(-len(crops) // _CROPS))]
    sizes: dict[str, npt.NDArray[np.float64]] = {}
    for outputs in Runner(with_outputs(model, tensors), tensors, threads=threads).stream(some):
        for name, x in zip(tensors, outputs, strict=True):
            found = np.abs(x).max(axis=(0, *range(2, x.ndim))).astype(np.float64)
            sizes[name] = np.maximum(found, sizes.get(name, 0.0))
    constants = {t.name: t for t in model.graph.initializer}

    def values(name: str) -> npt.NDArray[np.float64]:
        return np.asarray(numpy_helper.to_array(constants[name]), np.float64)

    def change(name: str, factor: npt.NDArray[np.float64]) -> None:
        made = np.asarray(values(name) * factor, np.float32)
        constants[name] = numpy_helper.from_array(made, name)

    for link in links:
        first, second = view.nodes[link.first], view.nodes[link.second]
        weight = values(second.input[1])
        other = tuple(i for i in range(weight.ndim) if i != 1)
        reads = np.ones(1) if link.depthwise else np.abs(weight).max(axis=other)
        factor = _factors(sizes[link.tensor], reads, 1.0 if link.depthwise else 0.5)
        own = values(first.input[1]).ndim
        change(first.input[1], 1 / factor.reshape(-1, *[1] * (own - 1)))
        if len(first.input) > 2:
            change(first.input[2], 1 / factor)
        axis = 0 if link.depthwise else 1
        shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
        change(second.input[1], factor.reshape(shape))
    return with_constants(model, constants.values())


def _factors(
    sizes: npt.NDArray[np.float64], reads: npt.NDArray[np.float64], share: float
) -> npt.NDArray[np.float64]:
    """What each channel is divided by; 1 for the largest."""
    found = np.where((sizes > 0) & (reads > 0), sizes**share / reads ** (1 - share), 0.0)
    largest = found.max(initial=0.0)
    if largest == 0:
        return np.ones_like(found)
    return np.where(found > 0, np.maximum(found / largest, 1 / _MOST), 1.0)


def _links(view: GraphView) -> list[_Link]:
    found = []
    for first in view.of_type("Conv"):
        if not view.has_weight(first) or not _alone(view, first):
            continue
        tensor = first.output[0]
        users = view.consumers.get(tensor, [])
        while len(users) == 1 and view.nodes[users[0][0]].op_type in _HOMOGENEOUS:
            tensor = view.nodes[users[0][0]].output[0]
            users = view.consumers.get(tensor, [])
        if len(users) != 1 or tensor in view.outputs:
            continue
        second = view.nodes[users[0][0]]
        if second.op_type != "Conv" or users[0][1] != 0 or not view.has_weight(second):
            continue
        group = view.attribute(second, "group", 1)
        shape = view.array(second.input[1]).shape
        depthwise = group > 1 and shape[1] == 1 and shape[0] == group
        if _alone(view, second) and (depthwise or group == 1):
            found.append(_Link(first.name, second.name, tensor, depthwise))
    return found


def _alone(view: GraphView, node: onnx.NodeProto) -> bool:
    """Whether a layer's constants are read by it alone."""
    constants = node.input[1:]
    return all(view.is_constant(c) and len(view.consumers[c]) == 1 for c in constants if c)
