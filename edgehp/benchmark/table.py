"""The figures of a benchmark report as rows, for terminals and Markdown alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgehp.benchmark.stats import PERCENTILES

__all__ = ["Table", "number", "summary_rows"]


@dataclass(frozen=True)
class Table:
    """Rows under headers, with a title before and sentences after them."""

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


def number(value: float | None, digits: int = 3) -> str:
    """A figure with `digits` significant digits, thousands not in exponents; ``-`` for None."""
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def summary_rows(report: Mapping[str, Any]) -> Table:
    """One row a network and stage: count, percentiles, the slowest, and images a second."""
    rows: list[tuple[str, ...]] = []
    notes: list[str] = []
    scenario = report["scenario"]
    for role, result in report["results"].items():
        subject = report["subjects"][role]
        label = f"{role} {subject['precision']}"
        offline = result["offline"]
        if offline is not None:
            nothing = ("-",) * (len(PERCENTILES) + 2)
            for title, key in (
                ("end to end", "end_to_end_images_per_s"),
                ("inference only", "inference_images_per_s"),
            ):
                rows.append((f"{label} {title}", *nothing, number(offline[key], 4)))
            if offline["overlap"] is not None:
                span = ""
                if offline.get("overlap_low") is not None:
                    low, high = offline["overlap_low"], offline["overlap_high"]
                    span = f" (95 % interval {low:.1%} to {high:.1%})"
                notes.append(
                    f"{role}: batch {offline['batch']}; cropping beside inference keeps "
                    f"{offline['overlap']:.1%} of the pure inference rate{span}"
                )
            continue
        for stage, title in (
            ("end_to_end", "end to end"),
            ("preprocessing", "crop + resize"),
            ("upload", "upload"),
            ("inference", "inference"),
            ("download", "download"),
        ):
            latency = result["stages"][stage]
            # On the processor handing over is no transfer: microseconds, in the JSON.
            moved = stage in ("upload", "download")
            if latency is None or (moved and result.get("clocks", {}).get(stage) == "host"):
                continue
            at = {q["p"]: q for q in latency["percentiles"]}
            rate = number(result["images_per_s"], 4) if stage == "end_to_end" else ""
            rows.append(
                (f"{label} {title}", str(latency["count"]),
                 *(number(at[p]["ms"]) + ("" if at[p]["enough"] else "?") for p in PERCENTILES),
                 number(latency["max_ms"]), rate)
            )  # fmt: skip
        if result["arrived"] is not None:
            notes.append(
                f"{role}: of {result['arrived']} frames {result['late']} late, "
                f"{result['dropped']} dropped"
            )
    if any("?" in cell for row in rows for cell in row):
        notes.append("?: the sample is too small for a 99 % bound on this percentile")
    for found in report["comparison"]:
        interval = ""
        if found["low"] is not None:
            interval = f" (95 % interval {found['low']:.2f} to {found['high']:.2f})"
        notes.append(
            f"artifact is {found['ratio']:.2f} times as fast as the reference, {found['metric']}, "
            f"{found['mode']}{interval}"
        )
    if report["reference_reason"]:
        notes.append(f"no reference: {report['reference_reason']}")
    notes += _power_notes(report)
    if report["state"] == "partial":
        notes.append("PARTIAL: the run was interrupted")
    validity = report["validity"]
    notes.append("valid" if validity["valid"] else "INVALID: " + "; ".join(validity["reasons"]))
    threads = report["subjects"]["artifact"]["engine"]["threads"]
    title = (
        f"{report['subjects']['artifact']['name']}, {scenario['duration_s']:g} s a network, "
        f"{threads or 'unknown number of'} threads"
    )
    percentiles = (f"p{p:g}" for p in PERCENTILES)
    headers = ("milliseconds", "count", *percentiles, "max", "images/s")
    return Table(title, headers, tuple(rows), tuple(notes))


def _power_notes(report: Mapping[str, Any]) -> list[str]:
    power = report["power"]
    if power["reason"] is not None:
        return [f"power: null, {power['reason']}"]
    notes = []
    for role, result in report["results"].items():
        energy = result["energy"]
        if energy is None:
            continue
        for rail, joules in energy["joules_per_image"].items():
            if joules is None:
                notes.append(f"power of {role}, {rail}: null, {energy['reasons'].get(rail)}")
                continue
            net = energy["net_joules_per_image"].get(rail)
            notes.append(
                f"power of {role}, {rail}: {number(energy['watts'][rail])} W, "
                f"{number(joules * 1e3)} mJ an image"
                + ("" if net is None else f" ({number(net * 1e3)} mJ net of idle)")
            )
    return notes
