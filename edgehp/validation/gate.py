"""The accuracy gate: how much worse than its FP32 reference an artifact may be.

It is a test of non-inferiority: the drop passes where the upper end of its interval keeps the
limit, not where the estimate happens to. A set that is too small to tell does not pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from edgehp.errors import AccuracyError, UsageError
from edgehp.validation.statistics import Interval, t_quantile

__all__ = ["DEFAULT_MAX_DROP", "GateResult", "check_drop", "require_drop"]

# Degrees of MAE. Plain per-channel INT8 loses a few thousandths: a tenth means something is wrong.
DEFAULT_MAX_DROP = 0.1
# More than any data set has: what asks for more cannot be told by measuring.
_MOST_UNITS = 1_000_000


@dataclass(frozen=True)
class GateResult:
    """The gate's answer.

    Attributes:
        passed: whether the upper end of the drop's interval is at most the limit.
        certain: whether the whole interval lies on the same side of the limit; a drop that did not
            pass although it is not certain was measured on too few frames.
        max_drop: the limit, degrees.
        needed: frames (or groups) that would do where the estimate is within the limit and the
            interval is not; None elsewhere.
        sentence: the answer for people, with the interval.
        hint: what to do about a drop that did not pass; empty where it did.
    """

    passed: bool
    certain: bool
    max_drop: float
    needed: int | None
    sentence: str
    hint: str


def check_drop(drop: Interval, max_drop: float = DEFAULT_MAX_DROP) -> GateResult:
    """Hold the interval of a drop against the limit.

    Args:
        drop: MAE of the artifact minus MAE of the reference, degrees.
        max_drop: the largest drop that passes, degrees.

    Raises:
        UsageError: the limit is negative or not finite.
    """
    if not 0 <= max_drop < float("inf"):
        raise UsageError(f"--max-drop {max_drop}: expected degrees, 0 or more")
    passed = drop.high <= max_drop
    certain = passed or drop.low > max_drop
    plural = drop.unit + ("" if drop.units == 1 else "s")
    interval = f"{drop.level:.0%} interval {drop.low:+.4f} to {drop.high:+.4f}"
    sentence = (
        f"the MAE drop of {drop.value:+.4f} degrees ({interval} over {drop.units} {plural}) "
        f"{'passes' if passed else 'fails'} the limit of {max_drop:g} degrees"
    )
    hint = (
        ""
        if passed
        else "keep more layers in floating point, calibrate with crops that look like the "
        "validation set, or raise --max-drop"
    )
    needed = None
    if not passed and drop.value <= max_drop:
        needed = _needed(drop, max_drop)
        verb = "is" if drop.units == 1 else "are"
        sentence += f"; the estimate keeps it, but {drop.units} {plural} {verb} too few to tell"
        enough = "many more" if needed is None else f"about {needed}"
        hint = f"validate on more {drop.unit}s ({enough} would do), or {hint}"
    return GateResult(passed, certain, max_drop, needed, sentence, hint)


def require_drop(drop: Interval, max_drop: float = DEFAULT_MAX_DROP) -> GateResult:
    """Like `check_drop`, for a build that must not go on.

    Raises:
        AccuracyError: the drop is over the limit, or it cannot be told that it is not.
    """
    result = check_drop(drop, max_drop)
    if not result.passed:
        raise AccuracyError(f"{result.sentence}\nhint: {result.hint}")
    return result


def _needed(drop: Interval, max_drop: float) -> int | None:
    """How many units of the same spread would bring the upper end down to the limit."""
    margin = max_drop - drop.value
    if drop.units < 2 or margin <= 0 or not math.isfinite(drop.high):
        return None
    half = drop.high - drop.value
    deviation = half * math.sqrt(drop.units) / t_quantile(drop.units - 1)
    n = drop.units
    while t_quantile(n - 1) * deviation / math.sqrt(n) > margin:
        n = math.ceil(1.02 * n) + 1
        if n > _MOST_UNITS:
            return None
    return n
