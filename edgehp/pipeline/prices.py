"""What a build's layers cost on its target: the best latency model that can be had here."""

from __future__ import annotations

from collections.abc import Callable

from edgehp.artifact.manifest import Manifest
from edgehp.errors import UsageError
from edgehp.pipeline.graphs import QuantizedGraph
from edgehp.pipeline.plan import Plan, make_plan
from edgehp.pipeline.request import BuildRequest
from edgehp.pipeline.sensitivity import layers_of
from edgehp.quantization.latency import (
    LatencyModel,
    counted_latency,
    roofline_latency,
    shared_latency,
)
from edgehp.targets import Peaks, Target

__all__ = ["latency_model", "price_layers"]

# The peaks of targets are of GPUs, whose floating-point body is FP16.
_FP16_BYTES = 2


def latency_model(
    plan: Plan,
    made: QuantizedGraph,
    batch: int,
    *,
    threads: int | None = None,
    totals: Callable[[], tuple[float, float]] | None = None,
) -> LatencyModel:
    """Prices of the layers on the plan's target, by the best means there is.

    OpenVINO's counters where that is the engine; else measured times of whole engines, if they can
    run here; else the roofline of the target's data.

    Args:
        plan: of the build.
        made: the quantised graph.
        batch: images a call.
        threads: processor threads.
        totals: measures (INT8, floating point) engines in milliseconds; None where they cannot
            run here.

    Raises:
        UsageError: neither can anything be measured here nor has the target any peaks.
    """
    source, layers = made.source, layers_of(made)
    if plan.kind == "openvino":
        return counted_latency(source, made.model, layers, batch=batch, threads=threads)
    if totals is not None:
        integer_ms, float_ms = totals()
        words = (
            f"measured here: whole {plan.kind} engines of {integer_ms:.3f} and {float_ms:.3f} ms "
            f"at batch {batch}, shared out by operations"
        )
        return shared_latency(
            source, layers, integer_ms=integer_ms, float_ms=float_ms, source=words
        )
    peaks = _peaks(plan.target)
    bandwidth = peaks.bandwidth_gb_s
    return roofline_latency(
        source,
        layers,
        integer_ops_per_s=peaks.int8_tops * 1e12,
        float_ops_per_s=peaks.fp16_tflops * 1e12,
        bytes_per_s=None if bandwidth is None else bandwidth * 1e9,
        float_bytes=_FP16_BYTES,
        batch=batch,
        source=f"roofline of {peaks.name} at batch {batch}, not measured",
    )


def price_layers(
    manifest: Manifest, made: QuantizedGraph, *, threads: int | None = None
) -> LatencyModel | None:
    """Prices of an artifact's layers, for its table of sensitivities; None where nobody knows.

    Args:
        manifest: of the artifact.
        made: its quantised graph.
        threads: processor threads.

    Raises:
        UsageError: its target is not known here.
    """
    batch = manifest.build.recipe.get("batch", [1, 1, 1])[1]
    plan = make_plan(BuildRequest(manifest.target.name, manifest.precision.asked))
    if plan.kind != "openvino" and not (plan.target.power_modes or plan.target.boards):
        return None
    return latency_model(plan, made, batch, threads=threads)


def _peaks(target: Target) -> Peaks:
    """The mode a module is delivered with; else the slowest, for which the choice matters most."""
    known = target.power_modes or target.boards
    if not known:
        raise UsageError(
            f"the target {target.name} states no peak figures to price layers by; install OpenVINO "
            "to measure them"
        )
    default = [p for p in known if p.default]
    return default[0] if default else min(known, key=lambda p: p.int8_tops)
