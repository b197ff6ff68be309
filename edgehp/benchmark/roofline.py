"""The roofline: how much of what the hardware could do a network really does.

Williams, Waterman & Patterson, "Roofline: an insightful visual performance model", CACM 2009. The
operations and bytes are counted from the deployed graph, the peaks come from the target's data for
the active power mode or, where the target states none, from a measurement on this processor
(`measure_peaks`). Bytes have two ends: *least*, where activations never leave the chip
(weights, input and output once), and *layer by layer*, where every convolution reads its input and
writes its output in memory. The truth lies between; where the two name different binding sides,
the report says so.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from edgehp.engines.openvino import check_available
from edgehp.errors import DataError, EnvironmentalError, UsageError
from edgehp.files import Record
from edgehp.targets import Target, load_target

if TYPE_CHECKING:
    from edgehp.artifact.open import OpenedNetwork
    from edgehp.benchmark.report import Result

logger = logging.getLogger(__name__)

# Shapes of the input and the weights, and layers: convolutions as in the middle of a ResNet, whose
# weights and activations stay in the caches, and one matrix product.
_CHAINS: tuple[tuple[tuple[int, ...], tuple[int, ...], int], ...] = (
    ((4, 256, 14, 14), (256, 256, 3, 3), 4),
    ((1024, 1024), (1024, 1024), 1),
)
# More than the last-level cache of any processor this runs on.
_COPY_BYTES = 128 << 20


class Roof(Record, frozen=True):
    """What the hardware could do.

    Attributes:
        name: of the power mode, the board or the processor.
        ops_per_s: multiplications and additions a second.
        bandwidth_gb_s: 10^9 bytes a second, read and written.
        source: where the figures come from.
        measured: whether somebody measured them.
    """

    name: str
    ops_per_s: float
    bandwidth_gb_s: float | None
    source: str
    measured: bool


def measure_peaks(precision: str, threads: int | None, seconds: float = 0.5) -> Roof:
    """Measure the roof for one precision.

    Args:
        precision: ``"int8"`` or ``"fp32"``.
        threads: processor threads, as the network has them; None leaves it to OpenVINO.
        seconds: spent on each of three measurements.

    Raises:
        UsageError: another precision.
        EnvironmentalError: OpenVINO is missing or failed, or does not compute INT8 here.
    """
    if precision not in ("int8", "fp32"):
        raise UsageError(f"no peak is measured for {precision!r}, only for int8 and fp32")
    ov = check_available()
    rates = []
    used = threads or 1
    try:
        for shape, weights, layers in _CHAINS:
            model = _chain(ov, precision == "int8", shape, weights, layers)
            # Every input value of a layer but its channels is an output position.
            operations = 2 * layers * math.prod(shape) // shape[1] * math.prod(weights)
            config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
            if threads is not None:
                config["INFERENCE_NUM_THREADS"] = str(threads)
            compiled = ov.Core().compile_model(model, "CPU", config)
            used = int(compiled.get_property("INFERENCE_NUM_THREADS"))
            request = compiled.create_infer_request()
            data = np.random.default_rng(1).integers(0, 256, shape).astype(np.float32)
            request.set_input_tensor(ov.Tensor(data, shared_memory=True))
            rates.append(operations / _fastest(request.infer, seconds))
            if precision == "int8" and not _computes_int8(compiled):
                raise EnvironmentalError("OpenVINO does not compute in INT8 on this processor")
    except RuntimeError as e:
        raise EnvironmentalError(f"OpenVINO failed at measuring the peak: {e}") from e
    bandwidth = _bandwidth(used, seconds)
    shown = ", ".join(f"{rate / 1e12:.2f}" for rate in rates)
    logger.info("measured peaks: %s T operations a second, %.1f GB/s", shown, bandwidth)
    source = (
        f"measured after the run with {used} threads: OpenVINO {ov.__version__} convolutions and "
        f"matrix products in {precision}, copies of {_COPY_BYTES >> 20} MiB"
    )
    return Roof("this processor", max(rates), bandwidth, source, measured=True)


def _fastest(work: Callable[[], Any], seconds: float) -> float:
    """Seconds of the fastest of at least three calls."""
    best, count = float("inf"), 0
    deadline = perf_counter() + seconds
    while count < 3 or perf_counter() < deadline:
        began = perf_counter()
        work()
        best = min(best, perf_counter() - began)
        count += 1
    return best


def _chain(
    ov: Any, int8: bool, shape: tuple[int, ...], weights: tuple[int, ...], layers: int
) -> Any:
    """A model of convolutions, or of matrix products where the weights have two dimensions."""
    ops = ov.opset13
    # Keeps activations near their size through the chain.
    size = np.sqrt(np.prod(weights[1:]))
    values = (np.random.default_rng(2).normal(0, 1, weights) / size).astype(np.float32)
    data = ops.parameter(shape, np.float32)
    x = _rounded(ops, data, 255.0) if int8 else data
    for _ in range(layers):
        w = ops.constant(values)
        if int8:
            w = _rounded(ops, w, float(np.abs(values).max()), signed=True)
        if len(weights) == 2:
            x = ops.relu(ops.matmul(x, w, False, True))
        else:
            x = ops.relu(ops.convolution(x, w, [1, 1], [1, 1], [1, 1], [1, 1]))
        if int8 and layers > 1:
            x = _rounded(ops, x, 255.0)
    return ov.Model([x], [data], "chain")


def _rounded(ops: Any, value: Any, largest: float, signed: bool = False) -> Any:
    """A quantization to 8 bits, which OpenVINO turns into INT8 arithmetic."""
    low, levels = (-largest, 255) if signed else (0.0, 256)
    ends = [np.float32(v) for v in (low, largest, low, largest)]
    return ops.fake_quantize(value, *ends, levels)


def _computes_int8(compiled: Any) -> bool:
    """Whether every multiplying layer of the compiled model runs in 8 bits."""
    from edgehp.engines.openvino import audit_model

    kinds = {"Convolution", "FullyConnected", "MatMul"}
    layers = [row for row in audit_model(compiled).rows if row.kind in kinds]
    return bool(layers) and all(row.precision == "int8" for row in layers)


def _bandwidth(threads: int, seconds: float) -> float:
    """10^9 bytes a second that copying reads and writes, with this many threads."""
    each = _COPY_BYTES // threads // 8
    sources = [np.ones(each, np.float64) for _ in range(threads)]
    copies = [np.empty_like(s) for s in sources]
    with ThreadPoolExecutor(threads, thread_name_prefix="edgehp-copy") as pool:

        def copy() -> None:
            # Copying lets go of the interpreter's lock.
            list(pool.map(np.copyto, copies, sources))

        best = _fastest(copy, seconds)
    return 2 * 8 * each * threads / best / 1e9


# Where the two counts of bytes name different sides.
BETWEEN = "between compute and memory"
_BYTES = {"int8": 1, "fp16": 2, "fp32": 4}


class GraphCost(Record, frozen=True):
    """What one image costs.

    Attributes:
        operations: multiplications and additions, two for each multiply-accumulate.
        weight_bytes: weights at the precision they are stored in.
        input_output_bytes: the crop and the answer.
        activation_bytes: inputs and outputs of every multiplying layer.
        layers: multiplying layers counted.
    """

    operations: int
    weight_bytes: int
    input_output_bytes: int
    activation_bytes: int
    layers: int


def graph_cost(graph: Path, precision: str) -> GraphCost:
    """Count the work of a deployed ONNX graph for one image.

    Args:
        graph: with the batch dimension free or fixed.
        precision: ``"int8"``, ``"fp16"`` or ``"fp32"``: of the layers that Q/DQ nodes do not say
            otherwise of; a layer whose weights come through a DequantizeLinear is counted in INT8.

    Raises:
        DataError: the file is not such a graph, or its shapes cannot be inferred.
        ModuleNotFoundError: the package onnx is not installed.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped, unused-ignore]

    from edgehp.pipeline.sensitivity import MULTIPLYING, count_work

    try:
        model = onnx.load(str(graph))
    except (DecodeError, OSError, ValueError) as e:
        raise DataError(f"{graph} cannot be read as an ONNX graph: {e}") from e
    names = [n.name or n.output[0] for n in model.graph.node if n.op_type in MULTIPLYING]
    work = count_work(model)
    unknown = [n for n in names if n not in work]
    if unknown or not names:
        raise DataError(f"{graph}: nothing multiplies, or in unknown shapes: {unknown[:1]}")
    layers = [work[n] for n in names]
    # Where the graph has Q/DQ at all, a layer without runs in the graph's own type.
    if precision == "int8" and any(w.int8 for w in layers):
        precision = "fp32"
    widths = [_BYTES["int8" if w.int8 else precision] for w in layers]
    ends = [
        math.prod(d.dim_value for d in v.type.tensor_type.shape.dim[1:]) * width
        for values, width in ((model.graph.input, 1), (model.graph.output, _BYTES["fp32"]))
        for v in values
    ]
    return GraphCost(
        sum(w.operations for w in layers),
        sum(w.weights * n for w, n in zip(layers, widths, strict=True)),
        sum(ends),
        sum(w.activations * n for w, n in zip(layers, widths, strict=True)),
        len(layers),
    )


# GPUs by the exact names that CUDA and NVML give them, and the board of the targets' files that
# each is. Nothing is guessed from a part of a name: an L40S is no L4, and a MIG slice no whole GPU.
BOARDS = MappingProxyType(
    {
        "Tesla V100-SXM2-16GB": "V100 SXM2",
        "Tesla V100-SXM2-32GB": "V100 SXM2",
        "Tesla T4": "T4",
        "NVIDIA L4": "L4",
        "NVIDIA H100 80GB HBM3": "H100 SXM",
        "NVIDIA A100-SXM4-40GB": "A100 SXM 40GB",
        "NVIDIA A100-SXM4-80GB": "A100 SXM 80GB",
        "NVIDIA A10": "A10",
        "NVIDIA L40S": "L40S",
        "NVIDIA A2": "A2",
        "NVIDIA GeForce RTX 2080 Ti": "RTX 2080 Ti",
        "NVIDIA GeForce RTX 3060": "RTX 3060",
        "NVIDIA GeForce RTX 3090": "RTX 3090",
        "NVIDIA GeForce RTX 4060": "RTX 4060",
        "NVIDIA GeForce RTX 4090": "RTX 4090",
        "NVIDIA GeForce RTX 5060 Ti": "RTX 5060 Ti",
        "NVIDIA GeForce RTX 5090": "RTX 5090",
    }
)


def peaks_for(target: Target, mode: str | None, device: str, precision: str) -> Roof:
    """The peaks of the active power mode or GPU.

    Args:
        target: of the artifact.
        mode: name of the active power mode of a Jetson; None if it is not known.
        device: the name of the engine's own device.
        precision: whose peak counts.

    Raises:
        DataError: the target states none for these.
    """
    if target.power_modes:
        if mode is None:
            raise DataError(f"unknown: the active power mode of {target.name} cannot be read")
        found = next((p for p in target.power_modes if p.name == mode.removeprefix("MODE_")), None)
        names = ", ".join(p.name for p in target.power_modes)
        missing = f"unknown: no peaks for the power mode {mode}, only for {names}"
    elif target.boards:
        found = next((p for p in target.boards if p.name == BOARDS.get(device)), None)
        missing = f"unknown: no peaks for {device!r} among those of {target.name}"
    else:
        raise DataError(f"unknown: the target {target.name} states no peak figures")
    if found is None:
        raise DataError(missing)
    if precision not in ("int8", "fp16"):
        raise DataError(f"the target states no peak for {precision}")
    rate = (found.int8_tops if precision == "int8" else found.fp16_tflops) * 1e12
    return Roof(found.name, rate, found.bandwidth_gb_s, found.source, found.measured)


class End(Record, frozen=True):
    """The roof at one count of bytes.

    Attributes:
        bytes_per_image: counted.
        intensity: operations a byte.
        bound: ``"compute"`` or ``"memory"``; None where the bandwidth is not known.
        fraction: of the roof that was reached.
    """

    bytes_per_image: float
    intensity: float
    bound: str | None
    fraction: float


class Place(Record, frozen=True):
    """A measured throughput under the roof.

    Attributes:
        reached_ops_per_s: by the network.
        fraction_of_compute: of the peak of computing.
        bound: which side binds.
        ends: ``"least"`` and ``"layer by layer"``.
        peaks: of the hardware.
    """

    reached_ops_per_s: float
    fraction_of_compute: float
    bound: str | None
    ends: dict[str, End]
    peaks: Roof


class Roofline(Record, frozen=True):
    """The roofline of a network, and the reason where one of the two is missing."""

    reason: str | None
    work: GraphCost | None = None
    roofline: Place | None = None


def place(work: GraphCost, peaks: Roof, images_per_s: float, batch: int) -> Place:
    """Place a measured throughput under the roof.

    Args:
        work: of one image.
        peaks: of the hardware.
        images_per_s: measured, of inference alone.
        batch: images a call.
    """
    reached = work.operations * images_per_s
    ends = {}
    # Activations stay on the chip, weights are shared by the batch; or all goes through memory.
    least = work.weight_bytes / batch + work.input_output_bytes
    for name, count in (("least", least), ("layer by layer", least + work.activation_bytes)):
        intensity = work.operations / count
        roof, side = peaks.ops_per_s, None
        if peaks.bandwidth_gb_s is not None:
            memory = intensity * peaks.bandwidth_gb_s * 1e9
            roof, side = min((roof, "compute"), (memory, "memory"))
        ends[name] = End(count, intensity, side, reached / roof)
    sides = {e.bound for e in ends.values()}
    bound = sides.pop() if len(sides) == 1 else BETWEEN
    return Place(reached, reached / peaks.ops_per_s, bound, ends, peaks)


def roofline_of(
    network: OpenedNetwork,
    result: Result,
    mode: str | None,
    measure: Callable[[str], Roof] | None = None,
) -> Roofline:
    """The roofline of one measured network; what is missing is null with a reason.

    Args:
        network: opened.
        result: its part of the report.
        mode: the active power mode.
        measure: the peaks of this processor at a precision, for a target that states none.
    """
    artifact = network.artifact
    if artifact is None:
        return Roofline("the roofline is of the artifact only")
    manifest = artifact.manifest
    precision = manifest.precision.reached or manifest.precision.asked
    work = None
    try:
        work = graph_cost(artifact.graph_path, precision)
        target = load_target(manifest.target.name)
        latency, batch = result.stages["inference"], 1
        if result.calls:
            batch = max(1, round(result.images / result.calls))
        rate = None if latency is None else 1e3 / latency.mean_ms * batch
        if result.offline is not None:
            rate = result.offline.inference_images_per_s
        if rate is None:
            raise DataError("no inference was finished")
        if measure is not None and not (target.power_modes or target.boards):
            peaks = measure(precision)
        else:
            peaks = peaks_for(target, mode, network.engine.info.device, precision)
    except ModuleNotFoundError as e:
        return Roofline(f"counting needs the package {e.name!r}", work)
    except (DataError, EnvironmentalError, UsageError) as e:
        return Roofline(str(e), work)
    return Roofline(None, work, place(work, peaks, rate, batch))
