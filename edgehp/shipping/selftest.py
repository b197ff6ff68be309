"""The self-test: golden vectors through the engine on this device, in a process of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["SelfTestResult", "run_self_test", "self_test"]


@dataclass(frozen=True)
class SelfTestResult:
    """What the golden vectors gave.

    Attributes:
        worst_degrees: largest difference of an angle from FP32.
        tolerance_degrees: what the manifest allows.
        latency_ms: median time of one crop, after warm-up.
        max_latency_ms: the manifest's budget, None where it has none (the time is then not judged).
    """

    worst_degrees: float
    tolerance_degrees: float
    latency_ms: float
    max_latency_ms: float | None


def self_test(artifact: Path) -> SelfTestResult:
    """Check the artifact, open its engine in this process and run the golden vectors.

    Raises:
        CompatibilityError: altered, for another device, angles beyond the tolerance, or slower
            than the budget.
        DataError, EnvironmentalError: as `edgehp.artifact.load_artifact` and `open_engine`.
    """
    raise NotImplementedError


def run_self_test(artifact: Path, *, timeout_s: float = 120.0) -> SelfTestResult:
    """`self_test` in a process of its own, which may crash or hang without harm.

    Raises:
        CompatibilityError: as `self_test`, or the process crashed or took longer than `timeout_s`.
        EnvironmentalError: as `self_test`.
    """
    raise NotImplementedError
