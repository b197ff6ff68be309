"""What one artifact comes to: the figures of a verdict or a row of a fleet, and its tables.

The tables are those of pages and of terminals: rows of text from reports and manifests.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from edgehp.artifact.manifest import Accuracy, Manifest, SubsetRecord
from edgehp.benchmark.power.base import TOTAL
from edgehp.benchmark.report import BenchmarkReport, number
from edgehp.benchmark.run import END_TO_END
from edgehp.report.gather import Material
from edgehp.validation.run import ValidationReport
from edgehp.validation.statistics import Interval

_ANGLES = ("pitch", "yaw", "roll")
ACCURACY = ("degrees", "reference", "artifact", "drop")
# |angles| and |spread| are mean absolute differences to FP32, whatever the truth is.
PARTS = ("artifact against FP32", "frames", "drop, degrees", "|angles|", "|spread|")
Rows = list[tuple[str, ...]]


@dataclass(frozen=True)
class Figures:
    """Figures of one artifact; None where something was not measured.

    Attributes:
        name: of the artifact.
        target: it was built for.
        precision: of its convolutions.
        passed: whether the drop keeps the limit of the build.
        drop: MAE of the artifact minus that of FP32, degrees.
        interval: 95 % interval of the drop.
        limit: of the drop at the build, degrees.
        mae: of the artifact, degrees.
        dataset: that drop and MAE were measured on.
        p50: median end to end, ms, one frame after the other.
        p99: of the same.
        rate: images a second: offline, else one frame after the other.
        speedup: times as fast as `against`, with its interval.
        against: what the artifact took turns with.
        watts: gross.
        millijoules: gross, an image.
        no_power: why power was not measured.
        valid: whether every benchmark is.
        reasons: why one is not.
    """

    name: str
    target: str = "-"
    precision: str = "-"
    passed: bool | None = None
    drop: float | None = None
    interval: tuple[float | None, float | None] = (None, None)
    limit: float | None = None
    mae: float | None = None
    dataset: str | None = None
    p50: float | None = None
    p99: float | None = None
    rate: float | None = None
    speedup: tuple[float, float | None, float | None] | None = None
    against: str = "FP32"
    watts: float | None = None
    millijoules: float | None = None
    no_power: str | None = None
    valid: bool | None = None
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Claim:
    """A line of the verdict: what of, in words, and whether it is good news (None: unknown)."""

    name: str
    text: str
    good: bool | None


def figures(material: Material) -> Figures:
    """The figures of an artifact and its reports.

    Of several validations the last one counts; its drop is held against the limit of the build.
    """
    found: dict[str, Any] = {"name": "edgehp"}
    for report in material.validations:
        found |= _validated(report)
    if material.manifest is not None:
        found = _built(material.manifest) | found | {"name": material.manifest.name}
    for measured in material.benchmarks:
        subject = measured.subjects["artifact"]
        if material.manifest is None:
            found |= {k: str(getattr(subject, k)) for k in ("name", "target", "precision")}
        found = _measured(measured) | found
    if material.benchmarks:
        partial = any(r.state == "partial" for r in material.benchmarks)
        found["valid"] = all(r.validity.valid for r in material.benchmarks) and not partial
        reasons = (reason for r in material.benchmarks for reason in r.validity.reasons)
        found["reasons"] = (*dict.fromkeys(reasons), *(("interrupted",) if partial else ()))
    high, limit = found.get("interval", (None, None))[1], found.get("limit")
    if high is not None and limit is not None:
        found["passed"] = high <= limit
    return Figures(**found)


def _built(manifest: Manifest) -> dict[str, Any]:
    precision, gate = manifest.precision, manifest.accuracy
    found: dict[str, Any] = {
        "name": manifest.name,
        "target": manifest.target.name,
        "precision": precision.reached or f"{precision.asked} asked",
    }
    if gate is not None:
        found |= {"drop": gate.drop, "interval": gate.interval, "limit": gate.max_drop}
        found |= {"dataset": gate.dataset, "mae": gate.artifact}
    return found


def _validated(report: ValidationReport) -> dict[str, Any]:
    found = {
        "name": (report.artifact or report.reference).name,
        "mae": (report.artifact_accuracy or report.reference_accuracy).overall.mae_mean,
        "dataset": report.protocol.get("dataset"),
    }
    if report.drop is not None:
        overall = report.drop.overall
        ends = (overall.low, overall.high) if math.isfinite(overall.high) else (None, None)
        found |= {"drop": overall.value, "interval": ends}
    return found


def _measured(report: BenchmarkReport) -> dict[str, Any]:
    """The figures of a benchmark's artifact; the first benchmark that has one gives it."""
    result = report.results["artifact"]
    found: dict[str, Any] = {"rate": result.images_per_s}
    if (latency := result.stages["end_to_end"]) is not None:
        found |= {"p50": latency.at(50.0).ms, "p99": latency.at(99.0).ms}
    if whole := [c for c in report.comparison if c.mode == END_TO_END]:
        # The last: of everything that a caller waits for.
        found["speedup"] = whole[-1].ratio, whole[-1].low, whole[-1].high
        other = report.subjects["reference"]
        found["against"] = "FP32" if other.precision == "fp32" else other.name
    if (energy := result.energy) is None:
        found["no_power"] = report.power.reason or "no sample fell into its turns"
        return found
    watts, joules = energy.watts[TOTAL], energy.joules_per_image[TOTAL]
    if watts is not None and joules is not None:
        found |= {"watts": watts, "millijoules": joules * 1e3}
    else:
        found["no_power"] = "; ".join(energy.reasons.values()) or "not of every rail"
    return found


def verdict(f: Figures) -> list[Claim]:
    """Gate, speed, power and validity, each in a sentence."""
    claims = []
    if f.drop is None:
        claims.append(Claim("Accuracy", "no drop against FP32 was measured", None))
    else:
        low, high = f.interval
        span = "" if low is None else f" ({low:+.4f} to {high:+.4f})"
        limit = "" if f.limit is None else f", {f.limit:g} allowed"
        word = "" if f.passed is None else "passed: " if f.passed else "FAILED: "
        text = f"{word}drop of {f.drop:+.4f} degrees{span} on {f.dataset}{limit}"
        claims.append(Claim("Accuracy gate", text, f.passed))
    if f.p50 is None and f.rate is None:
        claims.append(Claim("Speed", "not measured", None))
    else:
        parts = []
        if f.p50 is not None:
            parts.append(f"{number(f.p50)} ms at p50, {number(f.p99)} at p99")
        parts.append(f"{number(f.rate, 4)} images/s")
        if f.speedup is not None:
            ratio, low, high = f.speedup
            span = "" if low is None or high is None else f" ({low:.2f} to {high:.2f})"
            parts.append(f"{ratio:.2f} times as fast as {f.against}{span}")
        claims.append(Claim("Speed", "; ".join(parts), None))
    if f.millijoules is not None:
        text = f"{number(f.millijoules)} mJ an image, {number(f.watts)} W"
        claims.append(Claim("Power", text, None))
    else:
        reason = f.no_power or "no benchmark"
        shown = reason if len(reason) <= 160 else reason[:160].rpartition(" ")[0] + " ..."
        claims.append(Claim("Power", f"not measured: {shown}", None))
    if f.valid is not None:
        text = "valid" if f.valid else "INVALID: " + "; ".join(f.reasons)
        claims.append(Claim("Measurement", text, f.valid))
    return claims


def accuracy_rows(report: ValidationReport) -> Rows:
    """Errors of the reference and the artifact and the drop, in degrees, a row a figure.

    Intervals are of 95 %.
    """
    reference, artifact, drop = report.reference_accuracy, report.artifact_accuracy, report.drop
    one, two = reference.overall, artifact.overall if artifact else None

    def row(name: str, before: float, after: float | None, of: Interval | None) -> tuple[str, ...]:
        shown = "-" if after is None else f"{after:.3f}"
        return name, f"{before:.3f}", shown, _interval(of.value, of.low, of.high) if of else "-"

    rows = [row("MAE", one.mae_mean, two.mae_mean if two else None, drop.overall if drop else None)]
    means = report.reference_mae, report.artifact_mae
    rows.append(("MAE, 95 % interval", *(_ends(m.low, m.high) if m else "-" for m in means), ""))
    for i, angle in enumerate(_ANGLES):
        change = drop.angles[i] if drop else None
        rows.append(row(f"MAE {angle}", one.mae[i], two.mae[i] if two else None, change))
    change = drop.geodesic if drop else None
    rows.append(row("geodesic", one.geodesic, two.geodesic if two else None, change))
    rows.append(row("MAEV", one.maev, two.maev if two else None, None))
    for i, band in enumerate(reference.bands):
        if (summary := band.summary) is not None:
            other = artifact.bands[i].summary if artifact else None
            name = f"|yaw| {band.low:g} to {band.high:g}° ({summary.frames})"
            change = drop.bands[i].drop if drop else None
            rows.append(row(name, summary.mae_mean, other.mae_mean if other else None, change))
    return rows


def breakdown_rows(report: ValidationReport) -> Rows:
    """The artifact against its reference by |yaw| and on degraded versions of the crops.

    Rows of `PARTS`; empty where a network alone was validated.
    """
    if (drop := report.drop) is None:
        return []

    def row(name: str, frames: int, of: Interval, *apart: float | None) -> tuple[str, ...]:
        return _part(name, frames, _interval(of.value, of.low, of.high, 4), *apart)

    frames = report.reference_accuracy.overall.frames
    apart = drop.mean_difference_overall, drop.spread_difference_overall
    rows = [row("all", frames, drop.overall, *apart)]
    for b in drop.bands:
        if b.drop is not None:
            name = f"|yaw| {b.low:g} to {b.high:g}°"
            rows.append(row(name, b.frames, b.drop, b.mean_difference, b.spread_difference))
    for c in report.robustness:
        if c.drop is not None:
            rows.append(row(c.name, frames, c.drop, c.mean_difference, c.spread_difference))
    return rows


def gate_rows(manifest: Manifest) -> Rows:
    """What the build's gate measured, as `breakdown_rows`."""
    gate = manifest.accuracy
    if gate is None or not gate.subsets:
        return []

    def row(name: str, of: Accuracy | SubsetRecord) -> tuple[str, ...]:
        drop = _interval(of.drop, *of.interval, 4)
        return _part(name, of.count, drop, of.difference, of.spread_difference)

    return [row("all", gate), *(row(s.name, s) for s in gate.subsets)]


def mixed_text(manifest: Manifest) -> str | None:
    """Which layers stay in floating point and what that costs, in a sentence; None for none."""
    if (mixed := manifest.precision.mixed) is None:
        return None
    text = (
        f"To keep the drop, {', '.join(mixed.float_layers)} stay in "
        f"{mixed.float_precision.upper()}; INT8 throughout dropped by "
        f"{mixed.all_int8_drop:+.4f} degrees. Predicted cost: {number(mixed.predicted_cost_ms)} "
        f"ms on {number(mixed.predicted_all_int8_ms)} ms ({mixed.latency_model})."
    )
    if mixed.measured_ms is not None and mixed.measured_all_int8_ms is not None:
        text += (
            f" Measured: {number(mixed.measured_ms)} ms against "
            f"{number(mixed.measured_all_int8_ms)} ms."
        )
    return text


def _part(name: str, frames: int, drop: str, *apart: float | None) -> tuple[str, ...]:
    return (name, str(frames), drop, *("-" if v is None else f"{v:.4f}" for v in apart))


def _interval(value: float, low: float, high: float, digits: int = 3) -> str:
    ends = _ends(low, high, f"+.{digits}f")
    return f"{value:+.{digits}f}" + ("" if ends == "-" else f" ({ends})")


def _ends(low: float, high: float, form: str = ".2f") -> str:
    """An interval, or "-" where it is unbounded."""
    return f"{low:{form}} to {high:{form}}" if math.isfinite(high - low) else "-"
