"""Two benchmark reports side by side, if they are about the same thing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgehp.errors import MeasurementError, UsageError

__all__ = ["Comparison", "Difference", "compare_benchmarks", "why_not"]

_RESAMPLES, _SEED = 10_000, 20240229
# Must agree always: with another workload there is nothing to compare.
_WORKLOAD = {
    "scenario": "the scenario",
    "batch": "the batch",
    "cameras": "the number of cameras",
    "fps": "the frame rate",
}
# May differ only where the network does not: else nobody knows what made the difference.
_SETTINGS = {
    "processor": "the processor",
    "jetson": "the board",
    "processors_usable": "the number of processors",
    "power_mode": "the power mode",
    "governors": "the governor",
    "cpu_mhz_limits": "the clock limits",
    "opencv_threads": "OpenCV's threads",
    "environment": "the environment variables",
}


@dataclass(frozen=True)
class Difference:
    """One figure of both reports: `ratio` is A over B; its interval is of 95 %, or None."""

    name: str
    a: float
    b: float
    ratio: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Comparison:
    """The comparison: what differs on purpose, and the figures."""

    differs: tuple[str, ...]
    figures: tuple[Difference, ...]


def why_not(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Why two reports must not be compared, and what differs between them on purpose.

    Returns:
        Reasons (empty: go on) and differences, a phrase each.
    """
    reasons = []
    for name, report in (("A", a), ("B", b)):
        if report["state"] != "complete":
            reasons.append(f"{name} is partial: it was interrupted")
        if not report["validity"]["valid"]:
            reasons.append(f"{name} is invalid: {'; '.join(report['validity']['reasons'])}")
    for key, what in _WORKLOAD.items():
        if a["scenario"][key] != b["scenario"][key]:
            reasons.append(f"{what} differs: {a['scenario'][key]} and {b['scenario'][key]}")
    if a["input"] != b["input"]:
        reasons.append(f"the frames differ: {a['input']} and {b['input']}")
    one, two = a["subjects"]["artifact"], b["subjects"]["artifact"]
    settings = [
        f"{what} differs: {_say(a['host'].get(key))} and {_say(b['host'].get(key))}"
        for key, what in _SETTINGS.items()
        if a["host"].get(key) != b["host"].get(key)
    ]
    if one["engine"]["threads"] != two["engine"]["threads"]:
        settings.append(
            f"the threads differ: {one['engine']['threads']} and {two['engine']['threads']}"
        )
    same_kind = one["engine"]["kind"] == two["engine"]["kind"]
    if same_kind and one["engine"]["version"] != two["engine"]["version"]:
        settings.append(
            f"the version of {one['engine']['kind']} differs: {one['engine']['version']} and "
            f"{two['engine']['version']}"
        )
    if one["engine_sha256"] == two["engine_sha256"]:
        return reasons, settings
    network = f"the network differs: {one['name']} and {two['name']}"
    if settings:
        also = "the network differs too, so that nobody can say which of them matters"
        reasons += [f"{s} ({also})" for s in settings]
    return reasons, [network]


def compare_benchmarks(
    a: Mapping[str, Any], b: Mapping[str, Any], *, allow_invalid: bool = False
) -> Comparison:
    """Compare the artifacts of two benchmark reports.

    Args:
        a: one report.
        b: the other, which A is divided by.
        allow_invalid: accept runs that were called invalid.

    Raises:
        UsageError: they are not both benchmarks.
        MeasurementError: the comparison would be meaningless; the message says why.
    """
    if a["kind"] != "benchmark" or b["kind"] != "benchmark":
        raise UsageError(f"expected two benchmarks, found {a['kind']} and {b['kind']}")
    reasons, differs = why_not(a, b)
    if allow_invalid:
        reasons = [r for r in reasons if not r.startswith(("A is invalid", "B is invalid"))]
    if reasons:
        raise MeasurementError(f"these reports must not be compared: {'; '.join(reasons)}")
    one, two = a["results"]["artifact"], b["results"]["artifact"]
    figures = []
    if one["offline"] is None:
        for stage in ("end_to_end", "inference"):
            for p in (50.0, 90.0, 99.0):
                values = [_percentile(r["stages"][stage], p) for r in (one, two)]
                if values[0] is None or values[1] is None:
                    continue
                name = f"{stage} p{p:g}, ms"
                low, high = _interval(a, b) if (stage, p) == ("end_to_end", 50.0) else (None, None)
                figures.append(
                    Difference(name, values[0], values[1], values[0] / values[1], low, high)
                )
    for name, get in (
        ("images/s", lambda r: r["images_per_s"]),
        ("joules an image", _joules),
    ):
        x, y = get(one), get(two)
        if x and y:
            figures.append(Difference(name, x, y, x / y))
    return Comparison(tuple(differs), tuple(figures))


def _percentile(latency: Mapping[str, Any] | None, p: float) -> float | None:
    if latency is None:
        return None
    return next((float(q["ms"]) for q in latency["percentiles"] if q["p"] == p), None)


def _joules(result: Mapping[str, Any]) -> float | None:
    energy = result["energy"]
    value = None if energy is None else energy["joules_per_image"].get("total")
    return None if value is None else float(value)


def _interval(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """95 % bootstrap interval of the ratio of the turns' median latencies."""
    logs = [
        np.log(
            [
                t["p50_ms"]
                for t in r["timeline"]["turns"]
                if t["role"] == "artifact" and t.get("p50_ms")
            ]
        )
        for r in (a, b)
    ]
    if min(len(x) for x in logs) < 3:
        return None, None
    rng = np.random.default_rng(_SEED)
    means = [x[rng.integers(0, len(x), (_RESAMPLES, len(x)))].mean(axis=1) for x in logs]
    low, high = np.quantile(means[0] - means[1], (0.025, 0.975))
    return math.exp(float(low)), math.exp(float(high))


def _say(value: Any) -> str:
    text = "unknown" if value in (None, [], {}) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
