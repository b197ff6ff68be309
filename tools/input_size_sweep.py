r"""Accuracy against operations and milliseconds over input sizes, as a table and a plot.

Every size is measured with the weights of --network as they are, and with those fine-tuned for it
where --checkpoint names a file; each in FP32 and in INT8 (``cpu`` flavour). The milliseconds are
of one crop, all networks in turns in one process.

    python tools/input_size_sweep.py --calibration faces/aflw-a.zip --photos-from AFLW2000 \
        --boxes boxes/AFLW2000.json --checkpoint 64=runs/64/kd-resnet18-64.safetensors \
        --checkpoint 224=kd-resnet18 --work runs/sweep --plot docs/input-size.svg
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

TOOLS = Path(__file__).resolve().parent
sys.path[:0] = [str(TOOLS), str(TOOLS.parent)]

import click  # noqa: E402
import numpy as np  # noqa: E402
from quantizers.figures import figures  # noqa: E402
from quantizers.job import Job  # noqa: E402
from quantizers.parent import measure_latency, run_row  # noqa: E402
from quantizers.prepare import Crops, prepare  # noqa: E402
from quantizers.rows import FP32  # noqa: E402

from edgehp.benchmark.roofline import graph_cost  # noqa: E402
from edgehp.errors import EdgehpError, UsageError  # noqa: E402
from edgehp.files import write_whole  # noqa: E402
from edgehp.networks.bundled import Network, resolve_network  # noqa: E402

SIZES = (64, 80, 96, 112, 128, 160, 224)
INT8 = "edgehp-default-cpu"
SHIPPED, TUNED = "as shipped", "fine-tuned"
# Labelled marks of every decade of a logarithmic axis.
_MARKS = (1, 2, 5)


@dataclass(frozen=True)
class Point:
    """One network at one size.

    Attributes:
        size: side of the input, pixels.
        kind: `SHIPPED` or `TUNED`.
        gmac: thousand million multiply-accumulates an image.
        mae: in FP32, degrees; `mae_int8` likewise.
        mae_int8: in INT8.
        interval: of the drop, 95 %, degrees.
        ms: of one crop in FP32, None where not measured; `ms_int8` likewise.
        ms_int8: in INT8.
    """

    size: int
    kind: str
    gmac: float
    mae: float
    mae_int8: float
    interval: tuple[float, float]
    ms: float | None
    ms_int8: float | None


@click.command()
@click.option("--network", default="kd-resnet18-112", show_default=True)
@click.option("--calibration", required=True, help="Folder or zip of faces, or 'shipped'.")
@click.option(
    "--photos-from",
    "root",
    required=True,
    type=click.Path(exists=True, path_type=Path),
    help="AFLW2000-3D, or a folder or zip of labelled faces.",
)
@click.option("--boxes", type=click.Path(exists=True, path_type=Path), help="Published box list.")
@click.option("--size", "sizes", multiple=True, type=int, help="Pixels; default 64 to 224.")
@click.option(
    "--checkpoint", "tuned", multiple=True, metavar="SIZE=FILE", help="Fine-tuned for this size."
)
@click.option("--crops", default=512, show_default=True, help="Calibration crops.")
@click.option("--photos", default=0, help="Use this many photos only (0: all).")
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--latency/--no-latency", default=True, help="Only a quiet machine gives figures.")
@click.option("--rounds", default=30, show_default=True)
@click.option("--limit", default=3600.0, show_default=True, help="Seconds a step.")
@click.option("--work", type=click.Path(path_type=Path), help="Keep files; resume from them.")
@click.option("--plot", type=click.Path(path_type=Path), help="An .svg or .png file.")
@click.option("--out", type=click.Path(path_type=Path), help="Write OUT.md and OUT.json too.")
def main(
    network: str,
    calibration: str,
    root: Path,
    boxes: Path | None,
    sizes: tuple[int, ...],
    tuned: tuple[str, ...],
    crops: int,
    photos: int,
    seed: int,
    threads: int,
    latency: bool,
    rounds: int,
    limit: float,
    work: Path | None,
    plot: Path | None,
    out: Path | None,
) -> None:
    """Sweep the input size of one network."""
    chosen = Crops(calibration, crops, 0, root, boxes, photos, seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) if work is None else work.resolve()
        try:
            points = _sweep(
                _networks(network, sizes or SIZES, tuned),
                chosen,
                folder,
                threads,
                rounds if latency else 0,
                limit,
            )
        except EdgehpError as e:
            raise click.ClickException(str(e)) from e
    text = table(points, f"{Path(network).stem}, INT8 of the cpu flavour, {crops} crops")
    click.echo(text, nl=False)
    if out is not None:
        write_whole(out.with_suffix(".md"), text)
        rows = {"schema": 1, "points": [asdict(p) for p in points]}
        write_whole(out.with_suffix(".json"), json.dumps(rows, indent=1) + "\n")
    if plot is not None:
        draw(points, plot, resolve_network(network).spec.preprocessing.size)


def _networks(
    name: str, sizes: Sequence[int], tuned: Sequence[str]
) -> list[tuple[int, str, Network]]:
    """(size, kind, network) of every point."""
    base = resolve_network(name)
    if base.weights is None:
        raise UsageError(f"{name} is a graph of one size; give a checkpoint")
    own = {}
    for pair in tuned:
        number, _, file = pair.partition("=")
        if not number.isdecimal() or not file:
            raise UsageError(f"--checkpoint {pair}: expected SIZE=FILE, such as 96=w.safetensors")
        own[int(number)] = resolve_network(file)
        found = own[int(number)].spec.preprocessing.size
        if found != int(number):
            raise UsageError(f"--checkpoint {pair}: that network takes {found} pixels")
    found_networks = []
    for size in sizes:
        shipped = replace(base, spec=base.spec.with_size(size))
        found_networks.append((size, SHIPPED, shipped))
        if size in own:
            found_networks.append((size, TUNED, own[size]))
    return found_networks


def _sweep(
    networks: Sequence[tuple[int, str, Network]],
    chosen: Crops,
    folder: Path,
    threads: int,
    rounds: int,
    limit: float,
) -> list[Point]:
    measured: list[tuple[Point, str, str]] = []
    for size, kind, network in networks:
        click.echo(f"{size} px, {kind}", err=True)
        place = folder / f"{size}-{kind.replace(' ', '-')}"
        prepare(place, network, chosen)
        outcomes = {}
        for row in (FP32, INT8):
            job = Job(row, str(place), str(place / row), threads, 0.0)
            outcomes[row] = run_row(
                job, limit, ("fp32.onnx", "calibration.npy", "photos.npy"), accept=False
            )
        reference, quantised = outcomes[FP32], outcomes[INT8]
        if reference.answers is None or quantised.answers is None:
            reason = reference.reason or quantised.reason
            click.echo(f"  left out: {reason}", err=True)
            continue
        truth = np.load(place / "truth.npy")
        before = figures(reference.answers, reference.answers, truth)
        after = figures(quantised.answers, reference.answers, truth)
        work = graph_cost(place / "fp32.onnx", "fp32")
        point = Point(
            size,
            kind,
            work.operations / 2e9,
            before.mae,
            after.mae,
            (after.drop.low, after.drop.high),
            None,
            None,
        )
        files = [o.made.file if o.made else "" for o in (reference, quantised)]
        measured.append((point, files[0], files[1]))
    times: dict[str, float] = {}
    if rounds:
        models = [f for _, a, b in measured for f in (a, b)]
        times = measure_latency(folder, models, threads, rounds, limit)
    return [replace(p, ms=times.get(a), ms_int8=times.get(b)) for p, a, b in measured]


def table(points: Sequence[Point], heading: str) -> str:
    """Markdown, one row a point."""
    lines = [
        heading,
        "",
        "| input, px | weights | GMAC | MAE FP32 | MAE INT8 | drop, 95 % | FP32, ms | INT8, ms |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for p in points:
        low, high = p.interval
        lines.append(
            f"| {p.size} | {p.kind} | {p.gmac:.2f} | {p.mae:.3f} | {p.mae_int8:.3f} | "
            f"{low:+.3f} to {high:+.3f} | {_ms(p.ms)} | {_ms(p.ms_int8)} |"
        )
    return "\n".join(lines) + "\n"


def _ms(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2f}"


def draw(points: Sequence[Point], path: Path, native: int) -> None:
    """MAE against operations and, where measured, milliseconds.

    Args:
        points: in the order of their sizes.
        path: an .svg or .png file.
        native: the size that the shipped weights were trained for.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # What a user would choose from: weights of each size's own, those of 112 as they are shipped.
    tuned = [p for p in points if p.kind == TUNED or p.size == native]
    lines = {"trained for the size": tuned, SHIPPED: [p for p in points if p.kind == SHIPPED]}
    timed = any(p.ms is not None and p.ms_int8 is not None for p in points)
    # The same points give the same file.
    with mpl.rc_context({"svg.hashsalt": "edgehp", "font.size": 9.0}):
        figure = Figure(figsize=(9.6, 4.0) if timed else (5.2, 4.0), layout="constrained")
        axes = figure.subplots(1, 2 if timed else 1, squeeze=False, sharey=True)[0]
        _panel(axes[0], lines, ("gmac", "gmac"), "GMAC an image")
        if timed:
            _panel(axes[1], lines, ("ms", "ms_int8"), "ms an image, OpenVINO, batch 1")
        axes[0].set_ylabel("MAE, degrees")
        if len(tuned) > 1:
            # Weights of another size can be five times worse, and would flatten what matters.
            low, high = (f(v for p in tuned for v in (p.mae, p.mae_int8)) for f in (min, max))
            axes[0].set_ylim(low - 0.15 * (high - low), high + 0.6 * (high - low))
        axes[-1].legend(loc="upper right", framealpha=1.0, edgecolor="none")
        metadata = {"Date": None, "Creator": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=150, metadata=metadata)


def _panel(
    axes: Any, lines: Mapping[str, Sequence[Point]], names: tuple[str, str], label: str
) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    colours = {"FP32": "#D55E00", "INT8": "#0072B2"}
    for (kind, all_rows), style in zip(lines.items(), ("-", ":"), strict=True):
        rows = [p for p in all_rows if None not in (getattr(p, n) for n in names)]
        for precision, x, y in (
            ("FP32", names[0], "mae"),
            ("INT8", names[1], "mae_int8"),
        ):
            if not rows:
                continue
            axes.plot(
                [getattr(p, x) for p in rows],
                [getattr(p, y) for p in rows],
                style,
                marker="o",
                markersize=4,
                color=colours[precision],
                label=f"{precision}, {kind}",
            )
        for p in rows if style == "-" else ():
            axes.annotate(
                str(p.size),
                (getattr(p, names[1]), p.mae_int8),
                textcoords="offset points",
                xytext=(0, -11),
                ha="center",
                fontsize=8,
            )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator([m * 10**e for e in (-2, -1, 0, 1) for m in _MARKS]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.set_xlabel(label)
    axes.grid(color="#e4e4e4")
    axes.set_axisbelow(True)


if __name__ == "__main__":
    main()
