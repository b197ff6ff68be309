"""The comparison as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgehp.validation.statistics import Interval
from quantizers.figures import Figures
from quantizers.parent import Outcome
from quantizers.rows import FP32, ROWS

__all__ = ["markdown"]

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
        reference = name == FP32
        lines.append(
            _line(
                (
                    title,
                    f"{f.mae:.3f}",
                    "" if reference else _interval(f.drop),
                    "" if reference else f"{f.difference:.3f}",
                    "" if reference else f"{made.seconds:.0f}",
                    "" if reference else f"{made.peak_mib:.0f}",
                    f"{made.size_mb:.1f}",
                    "not measured" if ms is None else f"{ms:.2f}",
                    {True: "accepted", False: "no", None: "not tried"}[outcome.accepted],
                )
            )
        )
        if made.note:
            notes.append(f"- {title}: {made.note}")
        if outcome.accepted is False:
            refusals.append(f"- {title}: {outcome.accept_reason}")
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
    rows = [n for n in found if ROWS[n].group == "edgehp"]
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
