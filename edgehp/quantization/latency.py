"""What each layer costs in milliseconds in integers and in floating point: the search's prices.

Three sources, the best that a target allows: the counters of OpenVINO for engines that run here,
the measured time of whole engines shared out by operations, and the roofline of the target's data.
All of them add up layers, so they leave out conversions between neighbours of different precision:
what they give is a prediction, and is called so wherever it is shown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from edgehp._openvino import import_openvino
from edgehp.errors import DataError, EnvironmentalError, UsageError
from edgehp.quantization.graph import WEIGHTED, GraphView
from edgehp.quantization.runner import input_of

if TYPE_CHECKING:
    import onnx

__all__ = [
    "LatencyModel",
    "LayerWork",
    "counted_latency",
    "layer_work",
    "roofline_latency",
    "shared_latency",
]

_ROUNDS = 30
_WARM_UP = 3
# OpenVINO names a convolution without its folded bias so.
_FOLDED = "/WithoutBiases"


@dataclass(frozen=True)
class LatencyModel:
    """Prices of layers, milliseconds a call.

    Attributes:
        integer_ms: layer -> in INT8.
        float_ms: layer -> in the target's floating point.
        source: where they come from, for people.
        measured: whether they were measured on this device.
    """

    integer_ms: Mapping[str, float]
    float_ms: Mapping[str, float]
    source: str
    measured: bool


@dataclass(frozen=True)
class LayerWork:
    """One layer's work for one image: operations (two a multiply-accumulate) and elements.

    Attributes:
        operations: multiplications and additions.
        weights: elements of the weight.
        activations: elements read and written.
    """

    operations: int
    weights: int
    activations: int


def layer_work(model: onnx.ModelProto, layers: Sequence[str]) -> dict[str, LayerWork]:
    """Count the work of nodes of a float graph for one image.

    Raises:
        DataError: the graph has no such node, or its shapes cannot be inferred.
    """
    from onnx import ModelProto, shape_inference

    fixed = ModelProto()
    fixed.CopyFrom(model)
    for value in fixed.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = 1
    try:
        inferred = shape_inference.infer_shapes(fixed)
    except (RuntimeError, ValueError) as e:
        raise DataError(f"the shapes of the graph cannot be inferred: {e}") from e
    graph = inferred.graph
    shapes = {
        v.name: [d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (*graph.value_info, *graph.input, *graph.output)
    }
    view = GraphView(model)

    def size(tensor: str) -> int:
        # Reshape may leave the batch open: it is one.
        return math.prod(d or 1 for d in shapes.get(tensor, ()))

    found = {}
    for name in layers:
        node = view.nodes.get(name)
        if node is None:
            raise DataError(f"the graph has no node {name!r}")
        data = [i for i in node.input if i and not view.is_constant(i)]
        out = size(node.output[0])
        if not shapes.get(node.output[0]):
            raise DataError(f"the shape of {name}'s output is not known")
        weights = math.prod(view.array(node.input[1]).shape) if view.has_weight(node) else 0
        if node.op_type == "Conv":
            operations = 2 * weights * math.prod(shapes[node.output[0]][2:])
        elif node.op_type in WEIGHTED:
            operations = 2 * weights
        else:
            operations = out
        found[name] = LayerWork(operations, weights, sum(map(size, data)) + out)
    return found


def roofline_latency(
    model: onnx.ModelProto,
    layers: Sequence[str],
    *,
    integer_ops_per_s: float,
    float_ops_per_s: float,
    bytes_per_s: float | None,
    float_bytes: int,
    batch: int,
    source: str,
) -> LatencyModel:
    """Prices by the roofline: a layer takes the longer of its operations and its bytes.

    Every layer is counted as reading its input from memory and writing its output there, which is
    the upper of the two ends of the roofline; fused layers do less.

    Args:
        model: the float graph.
        layers: nodes to price.
        integer_ops_per_s: peak in INT8, operations a second.
        float_ops_per_s: peak in floating point.
        bytes_per_s: memory bandwidth; None counts operations alone.
        float_bytes: bytes of a floating-point number on the target, 2 or 4.
        batch: images a call.
        source: whose peaks these are, for people.

    Raises:
        UsageError: a peak is not positive.
        DataError: as `layer_work`.
    """
    if min(integer_ops_per_s, float_ops_per_s, bytes_per_s or 1.0) <= 0 or batch < 1:
        raise UsageError(f"peaks of {source}: expected positive figures and a batch of 1 or more")

    def price(work: LayerWork, ops_per_s: float, width: int) -> float:
        seconds = batch * work.operations / ops_per_s
        if bytes_per_s is not None:
            moved = width * (work.weights + batch * work.activations)
            seconds = max(seconds, moved / bytes_per_s)
        return 1e3 * seconds

    work = layer_work(model, layers)
    return LatencyModel(
        MappingProxyType({n: price(w, integer_ops_per_s, 1) for n, w in work.items()}),
        MappingProxyType({n: price(w, float_ops_per_s, float_bytes) for n, w in work.items()}),
        source,
        measured=False,
    )


def shared_latency(
    model: onnx.ModelProto,
    layers: Sequence[str],
    *,
    integer_ms: float,
    float_ms: float,
    source: str,
) -> LatencyModel:
    """Prices from two measured engines, all INT8 and all floating point, shared out by operations.

    Args:
        model: the float graph.
        layers: nodes to price.
        integer_ms: the INT8 engine's milliseconds a call.
        float_ms: the floating-point engine's.
        source: what was measured, for people.

    Raises:
        DataError: as `layer_work`.
    """
    work = layer_work(model, layers)
    total = sum(w.operations for w in work.values())
    share = {n: w.operations / total for n, w in work.items()}
    return LatencyModel(
        MappingProxyType({n: s * integer_ms for n, s in share.items()}),
        MappingProxyType({n: s * float_ms for n, s in share.items()}),
        source,
        measured=True,
    )


def counted_latency(
    float_model: onnx.ModelProto,
    integer_model: onnx.ModelProto,
    layers: Sequence[str],
    *,
    batch: int = 1,
    threads: int | None = None,
) -> LatencyModel:
    """Prices by OpenVINO's counters: both graphs run alternately, the least of 30 runs counts.

    A fused layer is charged to its convolution or matrix product.

    Args:
        float_model: the float graph.
        integer_model: the Q/DQ graph with every layer in integers.
        layers: nodes to price.
        batch: images a call.
        threads: processor threads.

    Raises:
        EnvironmentalError: OpenVINO is not installed, or fails.
    """
    openvino = import_openvino()
    name, height, width = input_of(float_model)
    crops = np.random.default_rng(0).integers(0, 256, (batch, height, width, 3), np.uint8)
    config: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "PERF_COUNT": "YES",
    }
    if threads:
        config["INFERENCE_NUM_THREADS"] = threads
    least: list[dict[str, float]] = [{}, {}]
    owners: list[dict[str, tuple[str, ...]]] = []
    try:
        core = openvino.Core()
        requests = []
        for model in (float_model, integer_model):
            read = core.read_model(model.SerializeToString())
            read.reshape({name: list(crops.shape)})
            compiled = core.compile_model(read, "CPU", config)
            owners.append(_owners(compiled, float_model, layers))
            requests.append(compiled.create_infer_request())
        for i in range(_WARM_UP + _ROUNDS):
            for request, seen in zip(requests, least, strict=True):
                request.infer({name: crops})
                if i < _WARM_UP:
                    continue
                for p in request.get_profiling_info():
                    ms = p.real_time.total_seconds() * 1e3
                    seen[p.node_name] = min(ms, seen.get(p.node_name, math.inf))
        version = str(openvino.__version__).split("-")[0]
    except RuntimeError as e:
        raise EnvironmentalError(f"OpenVINO cannot time the layers: {e}") from e
    prices = []
    for seen, owned in zip(least, owners, strict=True):
        price = dict.fromkeys(layers, 0.0)
        for node, ms in seen.items():
            for layer in owned.get(node, ()):
                price[layer] += ms / len(owned[node])
        prices.append(MappingProxyType(price))
    source = f"measured here: counters of OpenVINO {version}, batch {batch}"
    return LatencyModel(prices[1], prices[0], source, measured=True)


def _owners(
    compiled: Any, model: onnx.ModelProto, layers: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """Node of the compiled model -> the layers that its time is charged to."""
    weighted = {n.name for n in model.graph.node if n.op_type in WEIGHTED}
    known = set(layers)
    found = {}
    for op in compiled.get_runtime_model().get_ordered_ops():
        info = op.get_rt_info()
        if "originalLayersNames" not in info:
            continue
        value = info["originalLayersNames"]
        text = str(getattr(value, "value", value))
        names = {n.removesuffix(_FOLDED) for n in text.split(",")} & known
        heavy = tuple(sorted(names & weighted)) or tuple(sorted(names))
        if heavy:
            found[op.get_friendly_name()] = heavy
    return found
