"""What this processor reaches at its best, measured: the roof where no vendor states one.

Not a theoretical figure: the most operations that OpenVINO's own convolutions and matrix products
reach with the threads the benchmark uses, and the bytes that plain copies move. A network can come
close to it, which it cannot to a data sheet's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np

from edgehp._openvino import import_openvino
from edgehp.errors import EnvironmentalError, UsageError

__all__ = ["MeasuredPeaks", "measure_peaks"]

logger = logging.getLogger(__name__)

# Convolutions as in the middle of a ResNet: weights and activations stay in the caches.
_CHANNELS, _SIDE, _IMAGES, _LAYERS = 256, 14, 4, 4
# Sides of the matrix product.
_MATRIX = 1024
# More than the last-level cache of any processor this runs on.
_COPY_BYTES = 128 << 20


@dataclass(frozen=True)
class MeasuredPeaks:
    """The roof of this processor.

    Attributes:
        name: for people.
        precision: ``"int8"`` or ``"fp32"``.
        ops_per_s: multiplications and additions a second.
        bandwidth_gb_s: 10^9 bytes a second, read and written, by copying.
        source: how it was found.
    """

    name: str
    precision: str
    ops_per_s: float
    bandwidth_gb_s: float
    source: str


def measure_peaks(precision: str, threads: int | None, seconds: float = 0.5) -> MeasuredPeaks:
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
    ov = import_openvino()
    rates = []
    used = threads or 1
    try:
        for build in (_convolutions, _product):
            model, operations, shape = build(ov, precision == "int8")
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
    logger.info("measured peaks: %s operations a second, %.1f GB/s", rates, bandwidth)
    return MeasuredPeaks(
        "this processor",
        precision,
        max(rates),
        bandwidth,
        f"measured after the run with {used} threads: OpenVINO {ov.__version__} convolutions and "
        f"matrix products in {precision}, copies of {_COPY_BYTES >> 20} MiB",
    )


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


def _convolutions(ov: Any, int8: bool) -> tuple[Any, int, tuple[int, ...]]:
    """A chain of 3x3 convolutions, its operations, and the shape of its input."""
    ops = ov.opset13
    shape = (_IMAGES, _CHANNELS, _SIDE, _SIDE)
    data = ops.parameter(shape, np.float32)
    kernel = np.random.default_rng(2).normal(0, 1, (_CHANNELS, _CHANNELS, 3, 3))
    # Keeps activations near their size through the chain.
    kernel = (kernel / np.sqrt(9 * _CHANNELS)).astype(np.float32)
    x = _rounded(ops, data, 255.0) if int8 else data
    for _ in range(_LAYERS):
        weights = ops.constant(kernel)
        if int8:
            weights = _rounded(ops, weights, float(np.abs(kernel).max()), signed=True)
        x = ops.relu(ops.convolution(x, weights, [1, 1], [1, 1], [1, 1], [1, 1]))
        if int8:
            x = _rounded(ops, x, 255.0)
    operations = 2 * _LAYERS * _IMAGES * _SIDE**2 * 9 * _CHANNELS**2
    return ov.Model([x], [data], "convolutions"), operations, shape


def _product(ov: Any, int8: bool) -> tuple[Any, int, tuple[int, ...]]:
    """One matrix product, its operations, and the shape of its input."""
    ops = ov.opset13
    shape = (_MATRIX, _MATRIX)
    data = ops.parameter(shape, np.float32)
    matrix = np.random.default_rng(3).normal(0, 1, shape).astype(np.float32)
    x, weights = data, ops.constant(matrix)
    if int8:
        x = _rounded(ops, data, 255.0)
        weights = _rounded(ops, weights, float(np.abs(matrix).max()), signed=True)
    product = ops.relu(ops.matmul(x, weights, False, True))
    return ov.Model([product], [data], "product"), 2 * _MATRIX**3, shape


def _rounded(ops: Any, value: Any, largest: float, signed: bool = False) -> Any:
    """A quantisation to 8 bits, which OpenVINO turns into INT8 arithmetic."""
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
