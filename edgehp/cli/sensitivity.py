"""``edgehp sensitivity``: what each layer's INT8 costs in degrees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgehp.cli._command import PATH, json_option, subcommand, threads_option
from edgehp.cli._output import print_columns, print_json
from edgehp.progress import step


@subcommand("sensitivity", "edgehp sensitivity dist/kd-resnet18-112-cpu-int8 --plot layers.svg")
@click.argument("artifact", required=False, type=PATH)
@click.option(
    "--crops",
    type=click.IntRange(1, 10_000),
    default=64,
    help="Rendered heads to measure on.",
)
@threads_option
@click.option("--plot", type=PATH, help="Write the plot here, as SVG.")
@json_option
def command(
    artifact: Path | None,
    crops: int,
    threads: int | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Keep one layer of ARTIFACT in INT8 at a time, and leave one out at a time.

    ARTIFACT is an INT8 artifact (default: the newest under dist/), of any target: the graph it is
    made from runs on this processor. The table goes into its reports/, where 'edgehp report' finds
    it and draws it.
    """
    from edgehp.artifact import load_artifact, newest_artifact
    from edgehp.artifact.check import REPORTS
    from edgehp.files import write_output
    from edgehp.pipeline.crops import held_out_crops
    from edgehp.pipeline.sensitivity import (
        artifact_graphs,
        measure_sensitivity,
        predict_latency,
        sensitivity_values,
    )
    from edgehp.report.gather import write_report
    from edgehp.targets import load_target

    path = artifact or newest_artifact()
    with step("open"):
        opened = load_artifact(path, bytes_only=True)
        manifest = opened.manifest
        model, source = artifact_graphs(opened)
        faces = held_out_crops(None, manifest.preprocessing)
    batch = manifest.build.recipe.get("batch", [1, 1, 1])[1]
    latency = predict_latency(model, source, load_target(manifest.target.name), batch)
    with step("sensitivity"):
        found = measure_sensitivity(model, source, faces.crops, count=crops, threads=threads)
    values = sensitivity_values(found, source, latency)
    values["artifact"] = opened.manifest.name
    mixed = opened.manifest.precision.mixed
    kept = () if mixed is None else mixed.float_layers
    written = write_report(values, path / REPORTS, "sensitivity")
    if plot is not None:
        from edgehp.report.gather import Layer
        from edgehp.report.plots import sensitivity_plot

        rows = [Layer(r["name"], r["degrees"], r["gain"]) for r in values["layers"]]
        write_output(plot, sensitivity_plot(rows, kept))
    if as_json:
        print_json(values)
    else:
        _print(values, kept)
        click.echo(f"\nwritten to {written}; 'edgehp report {path}' draws it")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _print(values: dict[str, Any], kept: tuple[str, ...]) -> None:
    full = values["all_int8"]
    click.echo(
        f"{values['artifact']}: mean |difference| to FP32 with every layer in INT8 "
        f"{full['angles']:.4f} degrees (spread {_number(full['spread'])}, worst angle "
        f"{full['worst']:.2f})\nms: {values['latency_model']}\n"
    )
    rows = sorted(values["layers"], key=lambda r: (-r["gain"], -r["degrees"]))
    print_columns(
        rows,
        {
            "layer": lambda r: f"{r['name']} *" if r["name"] in kept else r["name"],
            "operator": lambda r: r["operator"],
            "alone": lambda r: f"{r['degrees']:.4f}",
            "its spread": lambda r: _number(r["alone"]["spread"]),
            "gain": lambda r: f"{r['gain']:+.4f}",
            "INT8 ms": lambda r: f"{r['int8_ms']:.4f}",
            "float ms": lambda r: f"{r['float_ms']:.4f}",
        },
        range(2, 7),
    )
    click.echo(
        "\nalone: this layer in INT8, all others in floating point; gain: what the difference "
        "falls by when\nthis layer alone goes back to floating point (negative: its error cancels "
        "others')" + ("; * stays in floating point in this artifact" if kept else "")
    )
