"""From answers to figures: what a quantised network is worth against FP32 on the same photos."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgehp.pose import angle_errors
from edgehp.validation.metrics import frame_errors, yaw_bands
from edgehp.validation.robustness import CONDITIONS
from edgehp.validation.statistics import Interval, mean_interval

__all__ = ["Figures", "figures"]

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Figures:
    """One network against FP32, degrees.

    Attributes:
        mae: mean absolute error.
        drop: MAE minus that of FP32, paired.
        difference: mean |angle difference| to FP32.
        spread: mean |spread difference| to FP32.
        subsets: drop by |yaw| band and by condition.
        subset_differences: mean |angle difference| likewise.
    """

    mae: float
    drop: Interval
    difference: float
    spread: float
    subsets: dict[str, Interval]
    subset_differences: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def figures(answers: Path, reference: Path, truth: Array) -> Figures:
    """Compare stored answers with those of FP32.

    Args:
        answers: ``answers.npz`` of the row.
        reference: that of FP32.
        truth: [N, 3] degrees.
    """
    with np.load(answers) as a, np.load(reference) as r:
        after = {k: np.asarray(a[k], np.float64) for k in a.files}
        before = {k: np.asarray(r[k], np.float64) for k in r.files}
    worse = {
        name: frame_errors(after[f"{name}.angles"], truth)
        - frame_errors(before[f"{name}.angles"], truth)
        for name in ("clean", *CONDITIONS)
    }
    apart = {
        name: angle_errors(after[f"{name}.angles"], before[f"{name}.angles"]).mean(axis=1)
        for name in ("clean", *CONDITIONS)
    }
    subsets, differences = {}, {}
    for low, high, mask in yaw_bands(truth):
        if mask.any():
            name = f"|yaw| {low:g} to {high:g}"
            subsets[name] = mean_interval(worse["clean"][mask])
            differences[name] = float(apart["clean"][mask].mean())
    for name in CONDITIONS:
        subsets[name] = mean_interval(worse[name])
        differences[name] = float(apart[name].mean())
    return Figures(
        mae=float(frame_errors(after["clean.angles"], truth).mean()),
        drop=mean_interval(worse["clean"]),
        difference=float(apart["clean"].mean()),
        spread=float(np.abs(after["clean.spread"] - before["clean.spread"]).mean()),
        subsets=subsets,
        subset_differences=differences,
    )
