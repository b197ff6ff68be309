r"""Quantise one network in many ways and print what each costs and keeps, as Markdown.

The same network, the same calibration crops, the same photos; every row in a process of its own
with a time limit. A quantiser that is not installed or fails is listed with its reason.

    python tools/compare_quantizers.py --calibration faces/aflw-a.zip --photos-from AFLW2000 \
        --boxes boxes/AFLW2000.json --modelopt-python modelopt-venv/bin/python --work runs/compare
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
sys.path[:0] = [str(TOOLS), str(TOOLS.parent)]

import click  # noqa: E402
import numpy as np  # noqa: E402
from quantizers.prepare import Crops, prepare  # noqa: E402
from quantizers.rows import FP32, ROWS, Job  # noqa: E402
from quantizers.run import Outcome, measure_latency, run_row  # noqa: E402
from quantizers.table import figures, markdown  # noqa: E402

from edgehp.errors import EdgehpError  # noqa: E402
from edgehp.files import plain, write_whole  # noqa: E402
from edgehp.networks.bundled import resolve_network  # noqa: E402


@click.command()
@click.option("--network", default="kd-resnet18-112", show_default=True)
@click.option(
    "--calibration",
    required=True,
    help="Folder or zip of faces to calibrate on, or 'shipped' for the rendered heads.",
)
@click.option(
    "--photos-from",
    "root",
    required=True,
    type=click.Path(exists=True, path_type=Path),
    help="AFLW2000-3D, or a folder or zip of labelled faces.",
)
@click.option("--boxes", type=click.Path(exists=True, path_type=Path), help="Published box list.")
@click.option("--crops", default=512, show_default=True, help="Calibration crops.")
@click.option("--control-crops", default=256, show_default=True, help="For controlled precision.")
@click.option("--photos", default=0, help="Use this many photos only (0: all).")
@click.option("--seed", default=0, show_default=True, help="Chooses the crops.")
@click.option("--budget", default=0.04, show_default=True, help="Of controlled precision, degrees.")
@click.option("--row", "rows", multiple=True, type=click.Choice(list(ROWS)), help="These only.")
@click.option("--modelopt-python", default="", help="An interpreter with nvidia-modelopt[onnx].")
@click.option("--threads", default=2, show_default=True)
@click.option("--latency/--no-latency", default=True, help="Only a quiet machine gives figures.")
@click.option("--rounds", default=30, show_default=True, help="Turns of the latency measurement.")
@click.option("--limit", default=3600.0, show_default=True, help="Seconds a step of a row.")
@click.option("--work", type=click.Path(path_type=Path), help="Keep the files here.")
@click.option("--out", type=click.Path(path_type=Path), help="Write OUT.md and OUT.json too.")
def main(
    network: str,
    calibration: str,
    root: Path,
    boxes: Path | None,
    crops: int,
    control_crops: int,
    photos: int,
    seed: int,
    budget: float,
    rows: tuple[str, ...],
    modelopt_python: str,
    threads: int,
    latency: bool,
    rounds: int,
    limit: float,
    work: Path | None,
    out: Path | None,
) -> None:
    """Compare quantisers on one network."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) if work is None else work.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            chosen = Crops(calibration, crops, control_crops, root, boxes, photos, seed)
            heading = prepare(folder, resolve_network(network), chosen)
        except EdgehpError as e:
            raise click.ClickException(str(e)) from e
        outcomes: dict[str, Outcome] = {}
        for name in dict.fromkeys((FP32, *(rows or ROWS))):
            click.echo(ROWS[name].title, err=True)
            job = Job(name, str(folder), str(folder / name), threads, budget, modelopt_python)
            outcomes[name] = run_row(job, limit)
            if outcomes[name].reason:
                click.echo(f"  {outcomes[name].reason}", err=True)
        reference = outcomes[FP32].answers
        if reference is None:
            raise click.ClickException(f"no FP32 to compare with: {outcomes[FP32].reason}")
        truth = np.load(folder / "truth.npy")
        found = {
            n: figures(o.answers, reference, truth)
            for n, o in outcomes.items()
            if o.answers is not None
        }
        times = {}
        if latency:
            files = [o.made.file for n, o in outcomes.items() if o.made and n in found]
            click.echo("latencies", err=True)
            times = measure_latency(files, threads, rounds, limit)
        text = markdown(outcomes, found, times, heading)
        click.echo(text, nl=False)
        if out is not None:
            write_whole(out.with_suffix(".md"), text)
            rows_made = {
                name: {
                    "title": ROWS[name].title,
                    "reason": o.reason or None,
                    "figures": found.get(name),
                    "made": o.made,
                    "openvino_ms": times.get(o.made.file) if o.made else None,
                    "tensorrt_rtx_refusal": o.refusal,
                }
                for name, o in outcomes.items()
            }
            document = {"schema": 3, "heading": heading, "processors": os.cpu_count(),
                        "rows": rows_made}  # fmt: skip
            write_whole(out.with_suffix(".json"), json.dumps(plain(document), indent=1) + "\n")


if __name__ == "__main__":
    main()
