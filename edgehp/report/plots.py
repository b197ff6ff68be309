"""The plots of a report as SVG text, drawn by matplotlib without a display."""

from __future__ import annotations

import io
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from edgehp.benchmark.power.base import POWER
from edgehp.benchmark.report import BenchmarkReport

if TYPE_CHECKING:
    from edgehp.report.figures import Figures
    from edgehp.report.gather import Layer
    from edgehp.validation.run import ValidationReport

# Okabe & Ito's colors, told apart by color-blind readers too.
COLOURS = {"artifact": "#0072B2", "reference": "#D55E00"}
_OTHERS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_WIDTH = 8.6
# Bars of the sensitivity: a ResNet18 has 31 layers, a ResNet152 many more than a page takes.
_MOST_LAYERS = 40
_STYLE: Any = {
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
    # The page's own paper shows through, light or dark.
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.facecolor": "none",
    # Text as outlines: the page looks the same whatever fonts a reader has.
    "svg.fonttype": "path",
    # The same figures give the same bytes.
    "svg.hashsalt": "edgehp",
}


@contextmanager
def _figure(height: float, rows: int = 1, **options: Any) -> Iterator[tuple[Any, Any, list[str]]]:
    """A figure, its axes and a list that holds the SVG text afterwards."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    out: list[str] = []
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        axes = figure.subplots(rows, 1, squeeze=False, **options)[:, 0]
        yield figure, axes, out
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    # Without the XML declaration, which has no place inside a page.
    text = buffer.getvalue()
    out.append(text[text.index("<svg") :])


def latency_histogram(report: BenchmarkReport) -> str | None:
    """How long calls took, all of them, by network; None where the scenario has no latencies."""
    found = {r: v for r, result in report.results.items() if (v := result.stages["end_to_end"])}
    if not found:
        return None
    with _figure(2.9) as (_, axes, out):
        ax = axes[0]
        for role, latency in found.items():
            histogram = latency.histogram
            merged: dict[int, int] = {}
            # Two buckets in one: 2.2 % wide, still finer than the eye.
            for index, count in histogram.counts.items():
                merged[index // 2] = merged.get(index // 2, 0) + count
            first, last = min(merged), max(merged)
            edges = [histogram.edges(2 * i)[0] * 1e3 for i in range(first, last + 2)]
            counts = [merged.get(i, 0) for i in range(first, last + 1)]
            color = _color(role)
            ax.stairs(counts, edges, fill=True, color=color, alpha=0.45, label=role)
            for p, line in ((50.0, "-"), (99.0, ":")):
                ax.axvline(latency.at(p).ms, color=color, linestyle=line, linewidth=1.2)
            ax.plot([latency.max_ms], [0.6], marker="v", color=color, clip_on=False)
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_ylim(bottom=0.6)
        _plain_ticks(ax)
        ax.set_xlabel("end to end, ms (log); line p50, dots p99, triangle the slowest of all")
        ax.set_ylabel("calls (log)")
        ax.legend(frameon=False)
    return out[0]


def timeline(report: BenchmarkReport) -> str | None:
    """Latency or throughput turn by turn, with power and temperature under it."""
    data, meter = report.timeline, report.power.meter
    turns = [t for t in data.turns if t.mode == "end-to-end"]
    if not turns:
        return None
    rails = {r: list(_watts(report, r)) for r in meter.rails} if meter and data.power else {}
    zones = {
        z: [(s.time, s.temperatures[z]) for s in data.host if z in s.temperatures]
        for z in sorted({z for s in data.host for z in s.temperatures})
    }
    panels = [(series, unit) for series, unit in ((rails, "W"), (zones, "°C")) if series]
    latencies = any(t.p50_ms is not None for t in turns)
    rows = 1 + len(panels)
    with _figure(1.4 + 1.5 * rows, rows, sharex=True) as (_, axes, out):
        ax = axes[0]
        for role in dict.fromkeys(t.role for t in turns):
            own = [t for t in turns if t.role == role]
            middle = [(t.start + t.end) / 2 for t in own]
            color = _color(role)
            if latencies:
                ax.plot(middle, [t.p50_ms for t in own], "o-", ms=3, color=color, label=role)
                ax.plot(middle, [t.p99_ms for t in own], ":", color=color)
                ax.plot(middle, [t.max_ms for t in own], "v", ms=3, color=color, alpha=0.5)
            else:
                rates = [t.images / (t.end - t.start) for t in own]
                ax.plot(middle, rates, "o-", ms=3, color=color, label=role)
        ax.set_ylabel("ms (p50, p99, max)" if latencies else "images/s")
        ax.legend(frameon=False, ncols=2)
        for ax, (series, unit) in zip(axes[1:], panels, strict=True):
            for i, (name, points) in enumerate(series.items()):
                color = _OTHERS[i % len(_OTHERS)]
                ax.plot(*zip(*points, strict=True), color=color, linewidth=1.1, label=name)
            ax.set_ylabel(unit)
            ax.legend(frameon=False, fontsize=7, ncols=3)
        axes[-1].set_xlabel("seconds since the measurement began")
    return out[0]


def roofline_plot(report: BenchmarkReport) -> str | None:
    """Operations a second over operations a byte; None where a peak is missing."""
    placed = report.roofline.get("artifact")
    if placed is None or (found := placed.roofline) is None or not found.peaks.bandwidth_gb_s:
        return None
    with _figure(3.2) as (_, axes, out):
        ax = axes[0]
        peak, bandwidth = found.peaks.ops_per_s, found.peaks.bandwidth_gb_s * 1e9
        ridge = peak / bandwidth
        points = [e.intensity for e in found.ends.values()]
        low, high = min(ridge, *points) / 4, max(ridge, *points) * 4
        ax.plot([low, ridge, high], [low * bandwidth / 1e12, peak / 1e12, peak / 1e12], "k-")
        reached = found.reached_ops_per_s / 1e12
        for (name, end), marker in zip(found.ends.items(), ("o", "s"), strict=False):
            label = f"{name}: {end.fraction:.1%} of the roof"
            ax.plot([end.intensity], [reached], marker, color=COLOURS["artifact"], label=label)
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_ylim(min(reached, low * bandwidth / 1e12) / 2, peak / 0.5e12)
        _plain_ticks(ax)
        ax.set_xlabel("operations a byte (log)")
        ax.set_ylabel("10¹² operations a second (log)")
        ax.set_title(f"peaks of {found.peaks.name}", fontsize=9, loc="left")
        ax.legend(frameon=False)
    return out[0]


def error_by_yaw(report: ValidationReport) -> str:
    """Mean absolute error by band of |yaw|, reference and artifact, of a validation report."""
    subjects = {"reference": report.reference_accuracy}
    if report.artifact_accuracy is not None:
        subjects["artifact"] = report.artifact_accuracy
    with _figure(2.7) as (_, axes, out):
        ax = axes[0]
        width = 0.8 / len(subjects)
        labels: list[str] = []
        for i, (role, accuracy) in enumerate(subjects.items()):
            bands = [(b, b.summary) for b in accuracy.bands if b.summary is not None]
            labels = [f"{b.low:g} to {b.high:g}°\n{s.frames} frames" for b, s in bands]
            x = [k + (i - (len(subjects) - 1) / 2) * width for k in range(len(bands))]
            heights = [s.mae_mean for _, s in bands]
            drawn = ax.bar(x, heights, width * 0.92, color=_color(role), label=role)
            ax.bar_label(drawn, fmt="%.2f", fontsize=8)
        ax.set_xticks(range(len(labels)), labels)
        ax.grid(visible=False, axis="x")
        ax.set_ylabel("mean absolute error, degrees")
        ax.set_xlabel("|yaw| of the truth")
        # Above the axes: bars of near-equal height leave no room inside.
        ax.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    return out[0]


def error_by_latency(artifacts: Sequence[Figures]) -> str | None:
    """MAE over median milliseconds, a point an artifact; None where fewer than two have both."""
    shown = [(f.p50, f.mae, f) for f in artifacts if f.p50 is not None and f.mae is not None]
    if len(shown) < 2:
        return None
    with _figure(3.6) as (_, axes, out):
        ax = axes[0]
        for i, (x, y, f) in enumerate(shown):
            color = _OTHERS[i % (len(_OTHERS) - 1)]
            # Hollow: a figure of an invalid run.
            ax.plot([x], [y], "o", color=color, mfc=color if f.valid else "none")
            ax.annotate(f.name, (x, y), xytext=(6, 4), textcoords="offset points", fontsize=8)
        ax.set_xscale("log")
        ax.margins(0.15)
        _plain_ticks(ax)
        from matplotlib.ticker import AutoLocator, ScalarFormatter

        ax.yaxis.set_major_locator(AutoLocator())
        ax.yaxis.set_major_formatter(ScalarFormatter())
        ax.set_xlabel("p50 end to end, ms (log); hollow: an invalid measurement")
        ax.set_ylabel("mean absolute error, degrees")
    return out[0]


def sensitivity_plot(layers: Sequence[Layer], kept: Collection[str] = ()) -> str:
    """What each layer's INT8 costs, the dearest first.

    Args:
        layers: name, cost alone and gain without it, degrees.
        kept: names of those that an artifact keeps in floating point; marked.
    """
    shown = sorted(layers, key=lambda x: -x.degrees)[:_MOST_LAYERS][::-1]
    with _figure(1.1 + 0.19 * len(shown)) as (_, axes, out):
        ax = axes[0]
        rows = range(len(shown))
        ax.barh(
            rows,
            [x.degrees for x in shown],
            color=[_OTHERS[0] if x.name in kept else COLOURS["artifact"] for x in shown],
            label="this layer alone in INT8: difference to FP32",
        )
        points = [(x.gain, i) for i, x in enumerate(shown) if x.gain is not None]
        if points:
            ax.plot(
                [p[0] for p in points],
                [p[1] for p in points],
                "D",
                ms=4,
                color=COLOURS["reference"],
                label="all but this layer in INT8: what the difference falls by",
            )
        ax.set_yticks(rows, [f"{x.name} *" if x.name in kept else x.name for x in shown])
        ax.set_ylim(-0.7, len(shown) - 0.3)
        ax.grid(visible=False, axis="y")
        ax.axvline(0, color="#59636e", linewidth=0.8)
        note = "; * stays in floating point" if any(x.name in kept for x in shown) else ""
        more = f"; the {len(shown)} dearest of {len(layers)}" if len(shown) < len(layers) else ""
        ax.set_xlabel(f"mean |angle difference| to FP32, degrees{note}{more}")
        # Below: the longest bars end where a legend inside would be.
        ax.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=1, fontsize=8)
    return out[0]


def _watts(report: BenchmarkReport, rail: str) -> Iterator[tuple[float, float]]:
    """Points of power over time; differences of a counter where the meter counts energy."""
    samples = [(s.time, s.values[rail]) for s in report.timeline.power if rail in s.values]
    if report.power.meter is not None and report.power.meter.kind == POWER:
        yield from samples
        return
    for (t0, before), (t1, after) in pairwise(samples):
        if t1 > t0:
            yield (t0 + t1) / 2, (after - before) / (t1 - t0)


def _color(role: str) -> str:
    return COLOURS.get(role, _OTHERS[0])


def _plain_ticks(ax: Any) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())
