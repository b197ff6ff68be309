"""The accuracy gate: how much worse than its FP32 reference an artifact may be."""

from __future__ import annotations

from dataclasses import dataclass

from edgehp.errors import AccuracyError, UsageError
from edgehp.validation.statistics import Interval

__all__ = ["DEFAULT_MAX_DROP", "GateResult", "check_drop", "require_drop"]

# Degrees of MAE. Plain per-channel INT8 loses a few thousandths: a tenth means something is wrong.
DEFAULT_MAX_DROP = 0.1


@dataclass(frozen=True)
class GateResult:
    """The gate's answer.

    Attributes:
        passed: whether the point estimate of the drop is at most the limit.
        certain: whether the whole interval lies on the same side of the limit.
        max_drop: the limit, degrees.
        sentence: the answer for people, with the interval, and whether it crosses the limit.
    """

    passed: bool
    certain: bool
    max_drop: float
    sentence: str


def check_drop(drop: Interval, max_drop: float = DEFAULT_MAX_DROP) -> GateResult:
    """Hold a drop against the limit: by its point estimate, saying what the interval adds.

    Args:
        drop: MAE of the artifact minus MAE of the reference, degrees.
        max_drop: the largest drop that passes, degrees.

    Raises:
        UsageError: the limit is negative or not finite.
    """
    if not 0 <= max_drop < float("inf"):
        raise UsageError(f"--max-drop {max_drop}: expected degrees, 0 or more")
    passed = drop.value <= max_drop
    certain = drop.high <= max_drop if passed else drop.low > max_drop
    s = "" if drop.units == 1 else "s"
    interval = (
        f"{drop.level:.0%} interval {drop.low:+.4f} to {drop.high:+.4f} over "
        f"{drop.units} {drop.unit}{s}"
    )
    verb = "passes" if passed else "fails"
    sentence = (
        f"the MAE drop of {drop.value:+.4f} degrees ({interval}) {verb} the limit of "
        f"{max_drop:g} degrees"
    )
    if not certain:
        other = "may be over" if passed else "may be within"
        sentence += (
            f"; the interval crosses the limit, so the true drop {other} it: "
            "validate on more frames to be sure"
        )
    return GateResult(passed, certain, max_drop, sentence)


def require_drop(drop: Interval, max_drop: float = DEFAULT_MAX_DROP) -> GateResult:
    """Like `check_drop`, for a build that must not go on.

    Raises:
        AccuracyError: the drop is over the limit.
    """
    result = check_drop(drop, max_drop)
    if not result.passed:
        raise AccuracyError(
            f"{result.sentence}; keep more layers in floating point, calibrate with crops that "
            "look like the validation set, or raise --max-drop"
        )
    return result
