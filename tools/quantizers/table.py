"""What a quantized network is worth against FP32 on the same photos, and that as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgehp.pose import angle_errors
from edgehp.validation.appearance import CONDITIONS
from edgehp.validation.metrics import frame_errors, yaw_bands
from edgehp.validation.statistics import Interval, mean_interval
from quantizers.rows import FP32, ROWS
from quantizers.run import Answers, Outcome

Array = npt.NDArray[np.float64]

_COLUMNS = (
    "quantiser",
    "MAE",
    "drop (95 %)",
    "mean abs. angle difference to FP32",
    "quantise, s",
    "peak memory, MiB",
    "file, MB",
    "OpenVINO, ms",
    "TensorRT-RTX",
)


@dataclass(frozen=True)
class Figures:
    """One network against FP32, degrees.

    Attributes:
        mae: mean absolute error.
        drop: MAE minus that of FP32, paired.
        difference: mean |angle difference| to FP32.
        spread: mean |spread difference| to FP32.
        subsets: drop by |yaw| band and by condition.
    """

    mae: float
    drop: Interval
    difference: float
    spread: float
    subsets: dict[str, Interval]


def figures(after: Answers, before: Answers, truth: Array) -> Figures:
    """Compare the answers of a row with those of FP32.

    Args:
        after: of the row, as `quantizers.run.Outcome` has them.
        before: of FP32.
        truth: [N, 3] degrees.
    """
    worse = {
        name: frame_errors(after[f"{name}.angles"], truth)
        - frame_errors(before[f"{name}.angles"], truth)
        for name in ("clean", *CONDITIONS)
    }
    subsets = {
        f"|yaw| {low:g} to {high:g}": mean_interval(worse["clean"][mask])
        for low, high, mask in yaw_bands(truth)
        if mask.any()
    }
    return Figures(
        mae=float(frame_errors(after["clean.angles"], truth).mean()),
        drop=mean_interval(worse["clean"]),
        difference=float(angle_errors(after["clean.angles"], before["clean.angles"]).mean()),
        spread=float(np.abs(after["clean.spread"] - before["clean.spread"]).mean()),
        subsets=subsets | {name: mean_interval(worse[name]) for name in CONDITIONS},
    )


def markdown(
    outcomes: Mapping[str, Outcome],
    found: Mapping[str, Figures],
    milliseconds: Mapping[str, float],
    heading: str,
) -> str:
    """Main table, drops by subset, and what has to be said beside them."""
    lines = [heading, "", _line(_COLUMNS), _line(["---"] * len(_COLUMNS))]
    left_out, notes, refusals = [], [], []
    for name, outcome in outcomes.items():
        title = ROWS[name].title
        if outcome.made is None or name not in found:
            left_out.append(f"- {title}: {outcome.reason}")
            continue
        f, made = found[name], outcome.made
        ms = milliseconds.get(made.file)
        cost = (_interval(f.drop), f"{f.difference:.3f}", f"{made.seconds:.0f}",
                f"{made.peak_mib:.0f}") if name != FP32 else ("",) * 4  # fmt: skip
        shown = "not measured" if ms is None else f"{ms:.2f}"
        taken = "accepted" if outcome.refusal is None else "no"
        lines.append(_line((title, f"{f.mae:.3f}", *cost, f"{made.megabytes:.1f}", shown, taken)))
        if made.note:
            notes.append(f"- {title}: {made.note}")
        if outcome.refusal is not None:
            refusals.append(f"- {title}: {outcome.refusal}")
    lines += _subsets(found)
    for words, rows in (
        ("Left out:", left_out),
        ("Notes:", notes),
        ("Why TensorRT-RTX does not build it:", refusals),
    ):
        if rows:
            lines += ["", words, "", *rows]
    return "\n".join(lines) + "\n"


def _subsets(found: Mapping[str, Figures]) -> list[str]:
    rows = [n for n in found if n.startswith("edgehp-")]
    if not rows:
        return []
    names = list(found[rows[0]].subsets)
    lines = [
        "",
        "Drop by subset (95 %), degrees; the last column is the mean |difference| of the spread to "
        "FP32 on all photos:",
        "",
        _line(["", *names, "spread"]),
        _line(["---"] * (len(names) + 2)),
    ]
    for row in rows:
        f = found[row]
        cells = [_interval(f.subsets[n]) for n in names]
        lines.append(_line([ROWS[row].title, *cells, f"{f.spread:.3f}"]))
    return lines


def _interval(i: Interval) -> str:
    return f"{i.value:+.3f} ({i.low:+.3f} to {i.high:+.3f})"


def _line(cells: Sequence[str]) -> str:
    # A bar inside a cell would end it.
    return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"
