"""What each layer's INT8 costs in degrees, and what it saves in milliseconds.

The sensitivity comes from the Q/DQ graph itself: the pairs of a layer are taken out, and the
answers compared with FP32. The milliseconds are predicted by the roofline.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from edgehp.artifact.check import Artifact
from edgehp.datasets.base import spaced
from edgehp.errors import CompatibilityError, DataError, UsageError
from edgehp.networks.bundled import resolve_network
from edgehp.progress import track
from edgehp.quantization.compare import Comparison, Difference
from edgehp.quantization.qdq import quantized_layers, remove_qdq
from edgehp.targets import Peaks, Target

if TYPE_CHECKING:
    import onnx

logger = logging.getLogger(__name__)

# `edgehp validate` takes the FP32 reference from here where a name alone does not find it.
REFERENCE_GRAPH = "reference.onnx"
SCHEMA_VERSION = 2
# Operators that multiply; all others together are below 1 % of a ResNet.
MULTIPLYING = ("Conv", "Gemm", "MatMul")
_KEEP_SIZE = ("DequantizeLinear", "QuantizeLinear", "Cast", "Identity", "Transpose")
# Enough crops to rank layers; two graphs a layer are run on them.
CROPS = 64
# Targets without figures of their own are processors. One core with AVX2 and VNNI issues two
# 32-byte operations a cycle: 128 integer or 32 FP32 multiplications and additions. Layers are
# chosen by the ratio; 10 GB/s is a core's share of dual-channel memory.
_PROCESSOR = Peaks(
    name="one processor core with VNNI at 3 GHz",
    int8_tops=0.384,
    fp16_tflops=0.096,
    bandwidth_gb_s=10.0,
    gpu_mhz=None,
    sms=None,
    power_w=None,
    default=True,
    measured=False,
    source="Intel 64 and IA-32 Architectures Optimization Reference Manual",
)


@dataclass(frozen=True)
class LayerSensitivity:
    """One layer's share of the error.

    Attributes:
        layer: name of the node.
        alone: difference to FP32 with this layer in INT8 and all others in floating point.
        left_out: difference with this layer in floating point and all others in INT8.
        gain: how much the mean angle difference falls when this layer goes back to floating
            point, degrees; negative where its error happened to cancel others'.
    """

    layer: str
    alone: Difference
    left_out: Difference
    gain: float


@dataclass(frozen=True)
class Sensitivity:
    """The table, in graph order.

    Attributes:
        full: difference with every layer in INT8.
        layers: one row per layer.
    """

    full: Difference
    layers: tuple[LayerSensitivity, ...]


def measure_sensitivity(
    model: onnx.ModelProto,
    source: onnx.ModelProto,
    crops: npt.NDArray[np.uint8],
    *,
    count: int = CROPS,
    threads: int | None = None,
) -> Sensitivity:
    """Measure the effect of each layer's INT8 on angles and spread.

    Args:
        model: the Q/DQ graph.
        source: the float graph that it was made from.
        crops: uint8 [N, S, S, 3].
        count: how many of them to use, evenly spread.
        threads: processor threads.

    Raises:
        UsageError: fewer than two layers to compare.
    """
    layers = quantized_layers(model)
    if len(layers) < 2:
        raise UsageError(f"{len(layers)} quantized layers to compare, expected at least two")
    compare = Comparison(source, crops[spaced(len(crops), count)], threads=threads)
    full = compare(model)
    rows = []
    for i, layer in enumerate(track(layers, "layers"), 1):
        left_out = compare(remove_qdq(model, (layer,), source))
        alone = compare(remove_qdq(model, set(layers) - {layer}, source))
        rows.append(LayerSensitivity(layer, alone, left_out, full.angles - left_out.angles))
        logger.info("%d/%d %s: gain %.4f degrees", i, len(layers), layer, rows[-1].gain)
    return Sensitivity(full, tuple(rows))


@dataclass(frozen=True)
class LatencyModel:
    """Predicted times of layers, milliseconds a call.

    Attributes:
        integer_ms: layer -> in INT8.
        float_ms: layer -> in the target's floating point.
        source: where they come from, for people.
    """

    integer_ms: Mapping[str, float]
    float_ms: Mapping[str, float]
    source: str


def predict_latency(
    model: onnx.ModelProto, source: onnx.ModelProto, target: Target, batch: int
) -> LatencyModel:
    """Predict the times of a Q/DQ graph's layers by the roofline.

    A layer takes the longer of its operations over the peak and its bytes over the bandwidth. Every
    layer is counted as reading its input from memory and writing its output there; fused layers do
    less, and conversions between layers of different precision are left out. Layers whose shapes
    cannot be inferred are counted by their weights alone, which the model's source says.

    Args:
        model: the Q/DQ graph.
        source: the float graph that it was made from.
        target: whose peak figures count; those of a processor core where it states none.
        batch: images a call.

    Raises:
        DataError: the shapes of the graph cannot be inferred.
    """
    peaks = _peaks(target)
    float_bytes = 4 if target.engine == "openvino" else 2
    bandwidth = math.inf if peaks.bandwidth_gb_s is None else peaks.bandwidth_gb_s * 1e9
    layers, counted = quantized_layers(model), count_work(source)
    unknown = [name for name in layers if name not in counted]
    if unknown:
        elements = {t.name: math.prod(t.dims) for t in source.graph.initializer}
        weights = {n.name: sum(elements.get(i, 0) for i in n.input[1:2]) for n in source.graph.node}
        for name in unknown:
            count = weights.get(name, 0)
            counted[name] = LayerWork(2 * count, count, 0, int8=False)
    work = {name: counted[name] for name in layers}
    note = ""
    if unknown:
        shown = ", ".join(unknown[:3]) + (", ..." if len(unknown) > 3 else "")
        note = f"; by their weights alone, as their shapes are unknown: {shown}"

    def price(tera_operations: float, width: int) -> dict[str, float]:
        return {
            name: 1e3
            * max(
                batch * w.operations / (tera_operations * 1e12),
                width * (w.weights + batch * w.activations) / bandwidth,
            )
            for name, w in work.items()
        }

    return LatencyModel(
        price(peaks.int8_tops, 1),
        price(peaks.fp16_tflops, float_bytes),
        f"roofline of {peaks.name} at batch {batch}, not measured{note}",
    )


def _peaks(target: Target) -> Peaks:
    """The mode a module is delivered with; else the slowest, for which the choice matters most."""
    known = target.power_modes or target.boards or (_PROCESSOR,)
    default = [p for p in known if p.default]
    return default[0] if default else min(known, key=lambda p: p.int8_tops)


class LayerWork(NamedTuple):
    """What one image costs a layer.

    Operations are two for each multiply-accumulate, else one for each element of the output;
    `weights` and `activations` are elements; `int8`: what a layer multiplies by comes through a
    DequantizeLinear.
    """

    operations: int
    weights: int
    activations: int
    int8: bool


def count_work(model: onnx.ModelProto) -> dict[str, LayerWork]:
    """Name of the node, or of its output where it has none -> its work, in graph order.

    Nodes whose shapes cannot be inferred are left out.

    Args:
        model: a deployed graph, with Q/DQ or without.

    Raises:
        DataError: shapes cannot be inferred.
    """
    from onnx import ModelProto, shape_inference

    fixed = ModelProto()
    fixed.CopyFrom(model)
    try:
        for value in fixed.graph.input:
            value.type.tensor_type.shape.dim[0].dim_value = 1
        # Exporters compute the shapes of a Reshape in the graph: their values have to be followed.
        graph = shape_inference.infer_shapes(fixed, data_prop=True).graph
    except (RuntimeError, ValueError, IndexError) as e:
        raise DataError(f"the shapes of the graph cannot be inferred: {e}") from e
    shapes: dict[str, Sequence[int]] = {}
    for v in (*graph.value_info, *graph.input, *graph.output):
        dims = v.type.tensor_type.shape.dim
        if v.type.tensor_type.HasField("shape") and all(d.HasField("dim_value") for d in dims):
            shapes[v.name] = [d.dim_value for d in dims]
    constants = {t.name: t.dims for t in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            constants[node.output[0]] = node.attribute[0].t.dims
    shapes |= constants
    made_by = {o: n for n in graph.node for o in n.output}
    found = {}
    for node in graph.node:
        multiplies = node.op_type in MULTIPLYING
        # What a layer adds is small beside what it multiplies.
        read = [i for i in node.input[: 2 if multiplies else None] if i]
        if any(name not in shapes for name in (*read, node.output[0])):
            continue
        size = math.prod(shapes[node.output[0]])
        origins = [_origin(name, made_by) for name in read]
        elements = [math.prod(shapes[name]) for name in read]
        fixed_elements = sum(
            n for n, (o, _) in zip(elements, origins, strict=True) if o in constants
        )
        moved = sum(elements) - fixed_elements + size
        name = node.name or node.output[0]
        if not multiplies:
            found[name] = LayerWork(size, 0, moved, int8=False)
            continue
        # The products that are summed up for one element of the output.
        conv = node.op_type == "Conv"
        summed = math.prod(shapes[read[1]][1:]) if conv else shapes[read[0]][-1]
        found[name] = LayerWork(2 * size * summed, fixed_elements, moved, origins[1][1])
    return found


def _origin(name: str, made_by: Mapping[str, onnx.NodeProto]) -> tuple[str, bool]:
    """Where a tensor comes from, up through Q/DQ and casts, and whether it is dequantized there."""
    int8 = False
    while (node := made_by.get(name)) is not None and node.op_type in _KEEP_SIZE:
        int8 = int8 or node.op_type == "DequantizeLinear"
        name = node.input[0]
    return name, int8


def artifact_graphs(artifact: Artifact) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """The Q/DQ graph of an artifact, and the float graph that it was made from.

    Raises:
        UsageError: the artifact is not quantized.
        CompatibilityError: the network that it was made from is another one now.
    """
    import onnx

    record = artifact.manifest.network
    if artifact.manifest.calibration is None:
        raise UsageError(
            f"{artifact.path} is {artifact.manifest.precision.asked}: no layer of it is quantized\n"
            "hint: give an INT8 artifact"
        )
    own = artifact.path / REFERENCE_GRAPH
    network = resolve_network(str(own) if own.is_file() else record.source)
    if not own.is_file() and network.digest != record.weights_sha256:
        raise CompatibilityError(
            f"{record.source} is not the network that {artifact.path} was made from: its SHA-256 "
            f"is not {record.weights_sha256[:16]}...\nhint: build the artifact again"
        )
    return onnx.load(str(artifact.graph_path)), network.graph()


def sensitivity_values(
    found: Sensitivity, source: onnx.ModelProto, latency: LatencyModel
) -> dict[str, Any]:
    """The table as a dictionary for JSON, in graph order.

    ``degrees`` of a layer is its ``alone.angles``: what `edgehp report` draws.

    Args:
        found: the sensitivity.
        source: the float graph.
        latency: predicted times of the layers.
    """
    kinds = {n.name: n.op_type for n in source.graph.node}
    return {
        "kind": "sensitivity",
        "schema": SCHEMA_VERSION,
        "latency_model": latency.source,
        "all_int8": _difference(found.full),
        "layers": [
            {
                "name": s.layer,
                "operator": kinds.get(s.layer),
                "degrees": s.alone.angles,
                "gain": s.gain,
                "alone": _difference(s.alone),
                "left_out": _difference(s.left_out),
                "int8_ms": latency.integer_ms[s.layer],
                "float_ms": latency.float_ms[s.layer],
            }
            for s in found.layers
        ],
    }


def sensitivity_report(found: Sensitivity, source: onnx.ModelProto, latency: LatencyModel) -> str:
    """`sensitivity_values` as the text of a file."""
    values = sensitivity_values(found, source, latency)
    return json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _difference(d: Difference) -> dict[str, float | None]:
    return {"angles": d.angles, "spread": d.spread, "worst": d.worst}
