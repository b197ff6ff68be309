"""The engine step: build, audit, and describe for the manifest."""

from __future__ import annotations

import platform
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgehp.artifact.manifest import (
    Comparison,
    EngineRecord,
    MixedRecord,
    PrecisionRecord,
    TargetRecord,
)
from edgehp.engines import open_engine
from edgehp.engines.audit import PrecisionAudit
from edgehp.engines.build import BuildReport, build_engine
from edgehp.engines.tensorrt_build import AMPERE_AND_LATER
from edgehp.errors import CompatibilityError
from edgehp.files import sha256_file
from edgehp.pipeline.plan import Place, Plan
from edgehp.quantization.qdq import quantized_layers

if TYPE_CHECKING:
    import onnx

_SUFFIX = {
    "openvino": ".onnx",
    "onnxruntime": ".onnx",
    "tensorrt": ".plan",
    "tensorrt-rtx": ".plan",
}
_WARM_UP = 20
_ROUNDS = 100


@dataclass(frozen=True)
class BuiltEngine:
    """A built engine, as the manifest describes it."""

    path: Path
    engine: EngineRecord
    precision: PrecisionRecord
    target: TargetRecord
    warnings: tuple[str, ...]
    same_as_graph: bool


def build_here(
    plan: Plan,
    place: Place,
    graph: Path,
    folder: Path,
    *,
    mixed: MixedRecord | None = None,
) -> BuiltEngine:
    """Build the engine of `graph` into `folder`.

    Args:
        plan: of the build.
        place: where it is built.
        graph: the deployed graph.
        folder: where the engine goes.
        mixed: the layers that stay in floating point by the accuracy gate; no other may.

    Raises:
        CompatibilityError: less precision was reached than asked for.
        DataError, EnvironmentalError, UsageError: as `edgehp.engines.build.build_engine`.
    """
    out = folder / f"engine{_SUFFIX[plan.kind]}"
    here = (place.gpu.compute_capability,) if place.gpu else plan.options.compute_capabilities
    options = replace(plan.options, compute_capabilities=here)
    report = build_engine(plan.kind, graph, out, options)
    if mixed is not None:
        import onnx

        convolutions = convolutions_of(graph)
        unquantized = frozenset(convolutions) - set(quantized_layers(onnx.load(str(graph))))
        _require_exactly(mixed, report.audit, convolutions, unquantized)
    elif report.audit.reached != plan.precision:
        raise CompatibilityError(
            f"{plan.precision} was asked for, the {report.audit.source} shows "
            f"{report.audit.reached}: {report.audit.convolutions}; choose a precision that "
            f"{plan.target.name} has"
        )
    return BuiltEngine(
        path=out,
        engine=EngineRecord(
            kind=plan.kind,
            files=tuple(p.name for p in report.files),
            versions=dict(report.versions),
            min_batch=options.batch[0],
            best_batch=options.batch[1],
            max_batch=options.batch[2],
            machine=platform.machine(),
        ),
        precision=_precision(plan, report, mixed),
        target=TargetRecord(
            plan.target.name,
            AMPERE_AND_LATER if options.hardware_compatible else here,
            place.module,
            place.gpu.name if place.gpu else None,
        ),
        warnings=report.warnings,
        same_as_graph=sha256_file(out) == sha256_file(graph),
    )


def planned_precision(plan: Plan, mixed: MixedRecord | None = None) -> PrecisionRecord:
    """The record of an engine that is not built yet."""
    text = "nothing yet: the build is deferred"
    return PrecisionRecord(plan.precision, None, text, {}, (), mixed)


def convolutions_of(graph: Path) -> tuple[str, ...]:
    """Names of all convolutions of a graph file, quantised or not."""
    import onnx

    nodes = onnx.load(str(graph), load_external_data=False).graph.node
    return tuple(n.name for n in nodes if n.op_type == "Conv")


def outside_int8(audit: PrecisionAudit, convolutions: tuple[str, ...]) -> frozenset[str]:
    """The convolutions that an engine does not compute in INT8.

    Runtimes fuse and rename: a row belongs to a convolution whose name it holds as a whole word. A
    row that belongs to none is given by its own name.
    """
    found: set[str] = set()
    for row in audit.rows:
        if row.kind == "Convolution" and row.precision != "int8":
            words = {row.layer, *row.layer.replace("/WithoutBiases", "").split(" + ")}
            found |= words & set(convolutions) or {row.layer}
    return frozenset(found)


def _require_exactly(
    mixed: MixedRecord,
    audit: PrecisionAudit,
    convolutions: tuple[str, ...],
    unquantized: frozenset[str],
) -> None:
    """Refuse an engine whose convolutions outside INT8 are others than the gate's search named.

    Those that no Q/DQ was ever written for (`unquantized`) may be outside too.
    """
    kept = set(mixed.float_layers) & set(convolutions)
    outside = outside_int8(audit, convolutions) - (unquantized - kept)
    if outside != kept:
        more, fewer = sorted(outside - kept), sorted(kept - outside)
        what = [f"{', '.join(more)} too"] if more else []
        what += [f"but not {', '.join(fewer)}"] if fewer else []
        raise CompatibilityError(
            f"{', '.join(sorted(kept)) or 'no convolution'} should stay in "
            f"{mixed.float_precision}; the {audit.source} has outside INT8 {', '.join(what)}: "
            "build with --no-mixed, or report this"
        )


def _precision(plan: Plan, report: BuildReport, mixed: MixedRecord | None) -> PrecisionRecord:
    audit = report.audit
    source = f"{audit.source} ({audit.opaque})" if audit.opaque else audit.source
    return PrecisionRecord(
        asked=plan.precision,
        reached=audit.reached,
        audited=source[:500],
        counts=dict(audit.convolutions),
        audit=audit.rows,
        mixed=mixed,
    )


def compare_engines(
    kind: str,
    one: Path,
    other: Path,
    crops: npt.NDArray[np.uint8],
    threads: int | None = None,
) -> tuple[float, float]:
    """Median milliseconds of two engines on `crops` [N, S, S, 3].

    Both run alternately, so that a change of the clocks hits both.
    """
    with (
        open_engine(kind, one, batch=len(crops), threads=threads) as first,
        open_engine(kind, other, batch=len(crops), threads=threads) as second,
    ):
        times: tuple[list[float], list[float]] = ([], [])
        for i in range(_WARM_UP + _ROUNDS):
            for engine, seconds in zip((first, second), times, strict=True):
                started = time.perf_counter()
                engine.infer(crops)
                if i >= _WARM_UP:
                    seconds.append(time.perf_counter() - started)
    return statistics.median(times[0]) * 1e3, statistics.median(times[1]) * 1e3


def against_half(
    plan: Plan,
    place: Place,
    model: onnx.ModelProto,
    built: BuiltEngine,
    crops: npt.NDArray[np.uint8],
    folder: Path,
) -> tuple[Comparison, str]:
    """Time an INT8 engine against one in FP16, on hardware that may be slower in INT8.

    Args:
        plan: of the INT8 engine.
        place: where both run.
        model: the float graph.
        built: the INT8 engine.
        crops: one batch, uint8 [N, S, S, 3].
        folder: for the FP16 engine, which nobody keeps.

    Returns:
        Both medians, and a sentence for people.

    Raises:
        EdgehpError: as `build_here`.
    """
    from edgehp.quantization.half import to_half_body

    half = to_half_body(model)[0] if place.knows_half_scales else model
    path = folder / "fp16.onnx"
    path.write_bytes(half.SerializeToString(deterministic=True))
    (folder / "fp16").mkdir(exist_ok=True)
    other = build_here(plan.in_half(), place, path, folder / "fp16")
    int8_ms, fp16_ms = compare_engines(plan.kind, built.path, other.path, crops)
    verdict = "INT8 is faster" if int8_ms < fp16_ms else "INT8 is NOT faster: use --precision fp16"
    text = f"at batch {len(crops)}: INT8 {int8_ms:.2f} ms, FP16 {fp16_ms:.2f} ms; {verdict}"
    return Comparison(round(int8_ms, 4), round(fp16_ms, 4), len(crops)), text
