"""What one artifact comes to: the few figures that a verdict or a row of a fleet is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgehp.benchmark.report import number
from edgehp.report.gather import Material

__all__ = ["Claim", "Figures", "figures", "verdict"]


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
        speedup: times as fast as FP32, with its interval.
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
        found = _built(material.manifest) | found | {"name": material.manifest["name"]}
    for report in material.benchmarks:
        subject = report["subjects"]["artifact"]
        if material.manifest is None:
            found |= {k: str(subject[k]) for k in ("name", "target", "precision")}
        found = _measured(report) | found
    if material.benchmarks:
        validity = [r["validity"] for r in material.benchmarks]
        partial = any(r["state"] == "partial" for r in material.benchmarks)
        found["valid"] = all(v["valid"] for v in validity) and not partial
        reasons = (reason for v in validity for reason in v["reasons"])
        found["reasons"] = (*dict.fromkeys(reasons), *(("interrupted",) if partial else ()))
    high, limit = found.get("interval", (None, None))[1], found.get("limit")
    if high is not None and limit is not None:
        found["passed"] = high <= limit
    return Figures(**found)


def _built(manifest: Any) -> dict[str, Any]:
    precision = manifest["precision"]
    found = {
        "target": manifest["target"]["name"],
        "precision": precision["reached"] or f"{precision['asked']} asked",
    }
    accuracy = manifest.get("accuracy")
    if accuracy:
        found |= {k: accuracy[k] for k in ("drop", "dataset")}
        found |= {"interval": tuple(accuracy["interval"]), "limit": accuracy["max_drop"]}
        found["mae"] = accuracy["artifact"]
    return found


def _validated(report: Any) -> dict[str, Any]:
    accuracy = report.get("artifact_accuracy") or report["reference_accuracy"]
    found = {
        "name": (report.get("artifact") or report["reference"])["name"],
        "mae": accuracy["overall"]["mae_mean"],
        "dataset": report["protocol"].get("dataset"),
    }
    if drop := report.get("drop"):
        overall = drop["overall"]
        found |= {"drop": overall["value"], "interval": (overall["low"], overall["high"])}
    return found


def _measured(report: Any) -> dict[str, Any]:
    """The figures of a benchmark's artifact; the first benchmark that has one gives it."""
    result = report["results"].get("artifact")
    if result is None:
        return {}
    found: dict[str, Any] = {"rate": result["images_per_s"]}
    if result["offline"] is not None:
        found["rate"] = result["offline"]["end_to_end_images_per_s"]
    elif (latency := result["stages"]["end_to_end"]) is not None:
        at = {q["p"]: q["ms"] for q in latency["percentiles"]}
        found |= {"p50": at[50.0], "p99": at[99.0]}
    if report["comparison"]:
        # The last: of everything that a caller waits for.
        last = report["comparison"][-1]
        found["speedup"] = last["ratio"], last["low"], last["high"]
    energy = result["energy"]
    total = (report["power"]["meter"] or {}).get("total_rails") or ()
    if energy is None:
        found["no_power"] = report["power"]["reason"] or "no sample fell into its turns"
    else:
        joules = [energy["joules_per_image"].get(rail) for rail in total]
        watts = [energy["watts"].get(rail) for rail in total]
        if joules and None not in joules and None not in watts:
            found |= {"watts": sum(watts), "millijoules": sum(joules) * 1e3}
        else:
            found["no_power"] = "; ".join(energy["reasons"].values()) or "not of every rail"
    return found


def verdict(f: Figures) -> list[Claim]:
    """Gate, speed, power and validity, each in a sentence."""
    claims = []
    if f.drop is None:
        claims.append(Claim("Accuracy", "no drop against FP32 was measured", None))
    else:
        low, high = f.interval
        span = "" if low is None or high is None else f" ({low:+.4f} to {high:+.4f})"
        limit = "" if f.limit is None else f", {f.limit:g} allowed"
        word = "" if f.passed is None else "passed: " if f.passed else "FAILED: "
        text = f"{word}drop of {f.drop:+.4f} degrees{span} on {f.dataset}{limit}"
        claims.append(Claim("Accuracy gate", text, f.passed))
    if f.p50 is None and f.rate is None:
        claims.append(Claim("Speed", "not measured", None))
    else:
        parts = []
        if f.p50 is not None:
            parts.append(f"{number(f.p50)} ms in the middle, {number(f.p99)} ms at p99")
        parts.append(f"{number(f.rate, 4)} images/s")
        if f.speedup is not None:
            ratio, low, high = f.speedup
            span = "" if low is None or high is None else f" ({low:.2f} to {high:.2f})"
            parts.append(f"{ratio:.2f} times as fast as FP32{span}")
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
