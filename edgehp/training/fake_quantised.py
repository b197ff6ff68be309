"""A network in torch that computes what its Q/DQ graph will compute, and can be trained.

The module walks the deployed float graph (batch normalisation already folded) and rounds on the
very edges and weights that `edgehp.quantization.placement` names, so there is no second opinion
about where Q/DQ pairs go. Rounding passes gradients straight through; activation scales learn from
the gradient of Esser et al., "Learned Step Size Quantization" (arXiv 1902.08153, equation 3).

What is learnt are small steps about the start: weights and biases in units of their own channel's
rounding step, scales by a factor. One learning rate then means the same in every layer, however
large its folded weights are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from edgehp.errors import UsageError
from edgehp.networks.spec import NetworkSpec
from edgehp.quantization.graphview import GraphView
from edgehp.quantization.placement import place
from edgehp.quantization.trained import TrainedLayer

if TYPE_CHECKING:
    import onnx

__all__ = ["FakeQuantised"]

_INT8 = 127
# A learning step moves a scale by this share of what it moves a weight by, relative to its size:
# a scale acts on a whole tensor, a weight on one product.
_SCALE_RATE = 0.5
_HALF_TINY = 2.0**-24  # the smallest positive float16


@dataclass(frozen=True)
class _Step:
    """A node of the graph: what to compute from which tensors."""

    kind: str
    name: str
    inputs: tuple[str, ...]
    output: str
    stride: int = 1
    padding: int = 0
    kernel: int = 1


@dataclass(frozen=True)
class _Integers:
    """A tensor of whole numbers (as floats, zero point taken off) and their scale."""

    values: Tensor
    scale: Tensor

    def floats(self) -> Tensor:
        return self.values * self.scale


class FakeQuantised(nn.Module):
    """Normalised images [N, 3, S, S] to logits [N, 3, bins] with integer layers.

    ``forward`` is exact in float32. Under bfloat16 autocast the products are still of exact whole
    numbers (all below 256); only their sums are rounded.

    Args:
        spec: of the network.
        model: its deployed float graph.
        flavour: ``"cpu"`` or ``"tensorrt"``.
        scales: activation tensor -> (scale, zero point) to begin with.
        biases: node -> bias in place of the graph's own.

    Raises:
        UsageError: the graph has a node this module cannot compute, or has no such flavour.
    """

    std: Tensor

    def __init__(
        self,
        spec: NetworkSpec,
        model: onnx.ModelProto,
        flavour: str,
        scales: Mapping[str, tuple[float, int]],
        biases: Mapping[str, npt.NDArray[np.float32]] | None = None,
    ) -> None:
        super().__init__()
        self.spec, self.flavour = spec, flavour
        view = GraphView(model)
        placement = place(view, flavour)
        self._edges = dict(placement.edges)
        body = view.body()
        self._steps = [_step(view, n) for n in model.graph.node if n.name in body]
        self._input = self._steps[0].inputs[0]
        # TensorRT builds an FP16 body with FP16 scales: those that are learnt must fit there.
        half = flavour == "tensorrt"
        self.layers = nn.ModuleDict()
        for step in self._steps:
            if step.kind in ("Conv", "Gemm"):
                node = view.nodes[step.name]
                weight, bias = (view.array(node.input[i]) for i in (1, 2))
                bias = (biases or {}).get(step.name, bias)
                layer = _Layer(weight, bias, step.name in placement.weights, half)
                self.layers[_key(step.name)] = layer
        self.activations = nn.ModuleDict(
            {
                _key(tensor): _Activation(*scales[tensor], flavour != "tensorrt", half)
                for tensor in placement.tensors
            }
        )
        p = spec.preprocessing
        self.register_buffer("std", torch.tensor(p.std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, 3, bins] of normalised images [N, 3, S, S] in the network's colour order."""
        # The graph takes centred RGB: the division by std is in its first convolution.
        x = images * self.std
        if self.spec.preprocessing.colour == "BGR":
            x = x.flip(1)
        values: dict[str, Tensor | _Integers] = {self._input: x}
        rounded: dict[str, _Integers] = {}
        for step in self._steps:
            taken = [
                self._taken(step, i, values, rounded) for i in range(2 if step.kind == "Add" else 1)
            ]
            values[step.output] = self._compute(step, taken, values)
        logits = _floats(values[self._steps[-1].output])
        return logits.reshape(len(images), 3, self.spec.bins.count)

    def _taken(
        self,
        step: _Step,
        index: int,
        values: Mapping[str, Tensor | _Integers],
        rounded: dict[str, _Integers],
    ) -> Tensor | _Integers:
        """Input `index` of a node, rounded where the placement says so."""
        tensor = step.inputs[index]
        value = values[tensor]
        source = self._edges.get((step.name, index))
        # Behind pooling or reshaping of integers: rounding again on the same scale changes nothing.
        # Before max pooling: it picks the same values, and there are four times fewer behind it.
        if source is None or isinstance(value, _Integers) or step.kind == "MaxPool":
            return value
        if tensor not in rounded:
            rounded[tensor] = self.activations[_key(source)](value)
        return rounded[tensor]

    def _compute(
        self, step: _Step, taken: list[Tensor | _Integers], values: Mapping[str, Any]
    ) -> Tensor | _Integers:
        x = taken[0]
        if step.kind in ("Conv", "Gemm"):
            out: Tensor = self.layers[_key(step.name)](x, step.stride, step.padding)
            return out
        if step.kind == "Relu":
            return functional.relu(_floats(x))
        if step.kind == "Add":
            return _floats(x) + _floats(taken[1])
        if step.kind == "MaxPool":
            source = self._edges.get((step.name, 0))
            y = functional.max_pool2d(_floats(x), step.kernel, step.stride, step.padding)
            if source is None:
                return y
            found: _Integers = self.activations[_key(source)](y)
            return found
        if step.kind == "GlobalAveragePool":
            return _floats(x).mean((2, 3), keepdim=True)
        if isinstance(x, _Integers):
            return _Integers(x.values.flatten(1), x.scale)
        return x.flatten(1)

    @torch.no_grad()
    def trained_layers(self) -> dict[str, TrainedLayer]:
        """The layers by node name as they are now."""
        found = {}
        for step in self._steps:
            if step.kind in ("Conv", "Gemm"):
                layer: Any = self.layers[_key(step.name)]
                found[step.name] = layer.trained()
        return found

    @torch.no_grad()
    def scales(self) -> dict[str, tuple[float, int]]:
        """Activation tensor -> (scale, zero point) as they are now."""
        found = {}
        for tensor in dict.fromkeys(self._edges.values()):
            activation: Any = self.activations[_key(tensor)]
            found[tensor] = float(activation.scale()), int(activation.zero)
        return found


def _floats(value: Tensor | _Integers) -> Tensor:
    return value.floats() if isinstance(value, _Integers) else value


def _key(name: str) -> str:
    # Modules may not have a dot in their names.
    return name.replace(".", "_")


def _step(view: GraphView, node: onnx.NodeProto) -> _Step:
    known = ("Conv", "Gemm", "Relu", "Add", "MaxPool", "GlobalAveragePool", "Flatten")
    if node.op_type not in known or (node.op_type in known[:2] and len(node.input) != 3):
        raise UsageError(
            f"{node.name}: quantisation-aware training knows no {node.op_type} of this form; start "
            "from a checkpoint of a KD-ResNet or an EHPNet"
        )
    lists = {a.name: list(a.ints) for a in node.attribute}
    return _Step(
        node.op_type,
        node.name,
        tuple(node.input),
        node.output[0],
        lists.get("strides", [1])[0],
        lists.get("pads", [0])[0],
        lists.get("kernel_shape", [1])[0],
    )


class _Activation(nn.Module):
    """Rounds a tensor to 8 bits on a scale that learns; the zero point stays."""

    start: Tensor
    zero: Tensor

    def __init__(self, scale: float, zero: int, unsigned: bool, half: bool) -> None:
        super().__init__()
        self.half_scale = half
        self.steps = nn.Parameter(torch.zeros(()))
        self.register_buffer("start", torch.tensor(scale))
        self.register_buffer("zero", torch.tensor(zero))
        self.lowest, self.highest = (0, 255) if unsigned else (-128, 127)

    def scale(self) -> Tensor:
        """The scale now, a scalar."""
        scale: Tensor = self.start * torch.exp(_SCALE_RATE * self.steps)
        if self.half_scale:
            scale = scale + (scale.half().float().clamp_min(_HALF_TINY) - scale).detach()
        return scale

    def forward(self, x: Tensor) -> _Integers:
        """Whole numbers [...] of x [...]."""
        scale = self.scale()
        zero = int(self.zero)
        q: Tensor = _RoundActivation.apply(  # type: ignore[no-untyped-call]
            x, scale, self.lowest - zero, self.highest - zero
        )
        return _Integers(q, scale)


class _Layer(nn.Module):
    """A convolution or linear layer with rounded weights, or (``integer=False``) plain ones."""

    step: Tensor
    start: Tensor
    bias_start: Tensor
    bias_unit: Tensor

    def __init__(
        self,
        weight: npt.NDArray[np.float32],
        bias: npt.NDArray[np.float32],
        integer: bool,
        half: bool,
    ) -> None:
        super().__init__()
        self.integer, self.half_scale = integer, half
        values = torch.from_numpy(weight.astype(np.float32))
        step = values.abs().amax(tuple(range(1, values.ndim))) / _INT8
        step = torch.where(step > 0, step, torch.ones_like(step))
        offset = torch.from_numpy(bias.astype(np.float32))
        self.register_buffer("step", step)
        self.register_buffer("start", values / _column(step, values.ndim))
        self.register_buffer("bias_start", offset)
        unit = offset.square().mean().sqrt() / _INT8
        self.register_buffer("bias_unit", unit if unit > 0 else torch.tensor(1 / _INT8))
        self.weight_steps = nn.Parameter(torch.zeros_like(values))
        self.bias_steps = nn.Parameter(torch.zeros_like(offset))

    def bias(self) -> Tensor:
        """The bias now [Cout]."""
        out: Tensor = self.bias_start + self.bias_unit * self.bias_steps
        return out

    def rounded(self) -> tuple[Tensor, Tensor]:
        """Whole numbers [Cout, ...] in -127..127 and scales [Cout] of the weight now."""
        weight = self.start + self.weight_steps
        peak = weight.detach().abs().amax(tuple(range(1, weight.ndim)))
        scale = torch.where(peak > 0, self.step * (peak / _INT8), self.step)
        if self.half_scale:
            scale = _half_below(scale)
        q: Tensor = _RoundWeight.apply(  # type: ignore[no-untyped-call]
            weight * _column(self.step / scale, weight.ndim)
        )
        return q.clamp(-_INT8, _INT8), scale

    def forward(self, x: Tensor | _Integers, stride: int, padding: int) -> Tensor:
        """Float32 output; an integer layer takes integers, a plain one either."""
        if self.integer and isinstance(x, _Integers):
            q, scale = self.rounded()
            y, factor = _product(x.values, q, stride, padding), scale * x.scale
        else:
            weight = (self.start + self.weight_steps) * _column(self.step, self.start.ndim)
            y, factor = _product(_floats(x), weight, stride, padding), torch.ones_like(self.step)
        shape = (1, -1) + (1,) * (y.ndim - 2)
        return torch.addcmul(self.bias().view(shape), y.float(), factor.view(shape))

    def trained(self) -> TrainedLayer:
        """The layer as a file keeps it."""
        bias = self.bias().float().cpu().numpy()
        if not self.integer:
            weight = (self.start + self.weight_steps) * _column(self.step, self.start.ndim)
            return TrainedLayer(weight.cpu().contiguous().numpy(), bias)
        q, scale = self.rounded()
        integers = q.to(torch.int8).cpu().contiguous().numpy()
        return TrainedLayer(integers, bias, scale.cpu().numpy())


def _product(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    if weight.ndim == 2:
        return functional.linear(x, weight)
    return functional.conv2d(x, weight, None, stride, padding)


def _column(values: Tensor, axes: int) -> Tensor:
    return values.view((-1,) + (1,) * (axes - 1))


def _half_below(scale: Tensor) -> Tensor:
    """The next float16 number at or below, so that the largest weight keeps the integer 127."""
    half = scale.half()
    bits = half.view(torch.int16)
    lower = torch.where(half.float() > scale, bits - 1, bits).view(torch.float16)
    return lower.float().clamp_min(_HALF_TINY)


class _RoundWeight(torch.autograd.Function):
    """Round to nearest; the gradient passes as if nothing had happened."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, values: Tensor) -> Tensor:
        return values.round()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        return gradient


class _RoundActivation(torch.autograd.Function):
    """clip(round(x / scale), low, high).

    The output is later multiplied by the scale, which adds q to the scale's gradient: together
    q - x / scale inside the range and q outside, as in arXiv 1902.08153, equation 3.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
        v = x.float() / scale
        ctx.save_for_backward(v, scale)
        ctx.ends = low, high
        return v.round().clamp_(low, high)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        v, scale = ctx.saved_tensors
        low, high = ctx.ends
        inside = gradient.float() * ((v >= low) & (v <= high))
        return inside / scale, -(inside * v).sum() / scale, None, None
