"""How much faster one network is than the other, from turns taken in the same run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgehp.benchmark.lanes import Turn
from edgehp.validation.statistics import mean_interval

__all__ = ["Speedup", "speedup"]


@dataclass(frozen=True)
class Speedup:
    """How many times faster the artifact is.

    Attributes:
        metric: what was compared.
        ratio: geometric mean over pairs of turns, reference over artifact; above 1 is faster.
        low: lower end of the 95 % bootstrap interval over pairs; None for fewer than three.
        high: the upper end.
        pairs: turns compared.
    """

    metric: str
    ratio: float
    low: float | None
    high: float | None
    pairs: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "metric": self.metric,
            "ratio": self.ratio,
            "low": self.low,
            "high": self.high,
            "level": 0.95,
            "pairs": self.pairs,
        }


def speedup(artifact: Sequence[Turn], reference: Sequence[Turn], stage: str) -> Speedup | None:
    """Compare turns in the order they were taken, the i-th with the i-th.

    Turns of a pair follow each other within seconds, so what the machine does to both cancels.

    Args:
        artifact: its turns.
        reference: those of the other, in the same mode.
        stage: a stage whose medians are compared, or ``"images_per_s"``.

    Returns:
        None where no pair has figures.
    """
    logs = []
    for a, b in zip(artifact, reference, strict=False):
        time_a, time_b = _time(a, stage), _time(b, stage)
        if time_a and time_b:
            logs.append(math.log(time_b / time_a))
    if not logs:
        return None
    interval = mean_interval(logs)
    enough = len(logs) >= 3
    return Speedup(
        "images per second" if stage == "images_per_s" else f"median {stage}",
        math.exp(interval.value),
        math.exp(interval.low) if enough else None,
        math.exp(interval.high) if enough else None,
        len(logs),
    )


def _time(turn: Turn, stage: str) -> float | None:
    """Seconds of one image or call in this turn."""
    if stage == "images_per_s":
        return turn.seconds / turn.images if turn.images else None
    values = turn.stages.get(stage)
    return float(np.median(values)) if values is not None and values.size else None
