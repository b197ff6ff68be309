"""What to think of a prediction: may the car use it?

The heads of the network give a distribution over angle bins; ``spread`` is its standard deviation.
It is the network's own doubt, and what the rules here are about:

* ``confidence`` is 1 / (1 + (s / 10)^2) with s the root mean square of the three spreads in
  degrees: 1 for a sharp peak, 0.5 at 10 degrees. A monotone scale, not a probability.
* ``low_confidence``: the confidence is below a limit (0.5, so s above 10 degrees).
* ``out_of_range``: an angle plus or minus two of its spreads reaches past the outermost bin. The
  distribution is then cut off at the end of the bins, and its mean is pulled inwards by an amount
  nobody knows; the head may be turned further than the angle says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["DEFAULT_BINS", "Judgement", "Rules", "judge"]

# The filter of the training data, for networks whose bins nobody knows.
DEFAULT_BINS = (-99.0, 99.0)
_HALF_AT = 10.0


@dataclass(frozen=True)
class Rules:
    """Limits of the states.

    Attributes:
        bins: first and last bin value in degrees.
        min_confidence: less is ``low_confidence``.
        reach: how many spreads of room an angle needs to the outermost bin.
    """

    bins: tuple[float, float] = DEFAULT_BINS
    min_confidence: float = 0.5
    reach: float = 2.0


@dataclass(frozen=True)
class Judgement:
    """State, confidence (0..1) and flag of one face."""

    state: str
    confidence: float
    out_of_range: bool


def judge(
    angles: npt.NDArray[np.floating], spread: npt.NDArray[np.floating], rules: Rules
) -> Judgement:
    """Judge one face.

    Doubt comes before range in `Judgement.state`, as a wide distribution reaches the ends of the
    bins from anywhere; the flag tells both.

    Args:
        angles: [3] degrees, pitch, yaw, roll.
        spread: [3] degrees.
        rules: the limits.
    """
    a, s = np.asarray(angles, np.float64), np.asarray(spread, np.float64)
    if not (np.isfinite(a).all() and np.isfinite(s).all()):
        return Judgement("low_confidence", 0.0, True)
    rms = math.sqrt(float((s**2).mean()))
    confidence = 1 / (1 + (rms / _HALF_AT) ** 2)
    first, last = rules.bins
    out = bool((a - rules.reach * s < first).any() or (a + rules.reach * s > last).any())
    if confidence < rules.min_confidence:
        state = "low_confidence"
    else:
        state = "out_of_range" if out else "ok"
    return Judgement(state, confidence, out)
