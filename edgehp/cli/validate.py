"""``edgehp validate``: accuracy of an artifact against its FP32 reference."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgehp.cli._remote import over_ssh
from edgehp.cli._remote_plans import VALIDATE
from edgehp.errors import AccuracyError, EnvironmentalError, UsageError

if TYPE_CHECKING:
    from edgehp.crop import Box
    from edgehp.datasets.base import Dataset, Sample
    from edgehp.validation.gate import GateResult
    from edgehp.validation.report import ValidationReport
    from edgehp.validation.run import BoxSource, Image

__all__ = ["command"]

logger = logging.getLogger(__name__)

DATASETS = ("aflw2000", "biwi", "aflw", "300w-lp", "rendered")
DETECT = "detect"
SHIPPED = "rendered-validation.zip"


@click.command("validate", short_help="Measure an artifact's accuracy against its FP32 reference.")
@click.argument("artifact", required=False, type=click.Path(path_type=Path))
@click.option(
    "--dataset",
    type=click.Choice(DATASETS),
    help="Default: the rendered heads that edgehp ships, as 'rendered' without --data-root.",
)
@click.option("--data-root", type=click.Path(path_type=Path), help="Where the data set is.")
@click.option(
    "--boxes",
    help="A box list (JSON), 'landmarks', or 'detect' for the face detector's, with its misses "
    "counted. Default: the published list beside the data.",
)
@click.option("--split", type=click.Choice(("train", "test")), help="Of the box list.")
@click.option("--rgb-cal", is_flag=True, help="BIWI: labels in the colour camera's axes.")
@click.option("--network", help="Validate a float network (bundled name or file) by itself.")
@click.option("--reference", help="FP32 reference; default: the network the artifact names.")
@click.option(
    "--max-drop",
    type=click.FloatRange(0),
    default=0.1,
    show_default=True,
    help="Largest drop of the MAE in degrees; more ends with exit code 3.",
)
@click.option("--batch", type=click.IntRange(1, 4096), default=32, show_default=True)
@click.option("--threads", type=click.IntRange(1), help="Processor threads for inference.")
@click.option("--limit", type=click.IntRange(1), help="Use this many frames, spread evenly.")
@click.option("--skip-bad", is_flag=True, help="Count and list bad samples instead of stopping.")
@click.option(
    "--robustness/--no-robustness",
    default=True,
    help="Also on dark, blurred and pseudo near-infrared versions of the crops (4 x the time).",
)
@click.option("--worst", type=click.IntRange(0, 1000), default=10, help="Worst frames to name.")
@click.option(
    "--emulate",
    is_flag=True,
    help="An artifact of another device: run the graph its engine is made from on this processor. "
    "The report says so.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("--report", type=click.Path(path_type=Path), help="Write the report as JSON here.")
@over_ssh(VALIDATE)
def command(
    artifact: Path | None,
    dataset: str | None,
    data_root: Path | None,
    boxes: str | None,
    split: str | None,
    rgb_cal: bool,
    network: str | None,
    reference: str | None,
    max_drop: float,
    batch: int,
    threads: int | None,
    limit: int | None,
    skip_bad: bool,
    robustness: bool,
    worst: int,
    emulate: bool,
    as_json: bool,
    report: Path | None,
) -> None:
    """Measure ARTIFACT (default: the newest under dist/) and its FP32 reference on a data set.

    Both see the same crops. The drop is the MAE of the artifact minus that of the reference, with
    a paired bootstrap interval of 95 %; more than --max-drop ends with exit code 3.
    """
    # Imported here: `edgehp --help` must not pay for OpenCV and the engines.
    from contextlib import ExitStack

    from edgehp.cli._calibrated import calibration_advice, calibration_looks, clipping_of
    from edgehp.cli._output import Steps, print_json
    from edgehp.validation.gate import check_drop
    from edgehp.validation.robustness import CONDITIONS
    from edgehp.validation.run import validate
    from edgehp.validation.subjects import (
        open_artifact,
        open_emulation,
        open_network,
        open_reference,
    )

    if artifact is not None and network is not None:
        raise UsageError("give an artifact or --network, not both")
    if network is not None and emulate:
        raise UsageError("--emulate runs an artifact's graph: a float network needs none")
    if network is not None and reference is not None:
        raise UsageError("--network is validated by itself: --reference belongs to an artifact")
    if report is not None:
        from edgehp.report.files import require_writable, write_text

        require_writable(report, "--report")
    steps = Steps()
    data = _open_data(dataset, data_root, boxes, split, rgb_cal, skip_bad)
    with ExitStack() as stack:
        with steps("open"):
            if network is not None:
                tested = None
                base = stack.enter_context(open_network(network, threads=threads, batch=batch))
            else:
                opened = open_emulation if emulate else open_artifact
                tested = stack.enter_context(opened(artifact, threads=threads, batch=batch))
                base = stack.enter_context(
                    open_reference(tested, reference, threads=threads, batch=batch)
                )
        total = len(data) if limit is None else min(limit, len(data))
        with steps("validate", total=total) as step:
            result = validate(
                base.contender(),
                None if tested is None else tested.contender(),
                data,
                base.preprocessing,
                batch=batch,
                limit=limit,
                skip_bad=skip_bad,
                box_source=_detector() if boxes == DETECT else None,
                box_words="CenterFace, mapped to the network's boxes",
                conditions=tuple(CONDITIONS) if robustness else (),
                worst=worst,
                progress=lambda done, _: step.advance(done - step.done),
                calibration=calibration_looks(tested),
                clipped=clipping_of(tested, threads),
                advice=calibration_advice(
                    tested, dataset in (None, "rendered") and data_root is None
                ),
            )
    gate = None if result.drop is None else check_drop(result.drop.overall, max_drop)
    values = result.to_dict()
    if gate is not None:
        values["gate"] = {
            "max_drop": max_drop,
            "passed": gate.passed,
            "certain": gate.certain,
            "sentence": gate.sentence,
        }
    unwritten: EnvironmentalError | None = None
    if report is not None:
        text = json.dumps(values, indent=2, allow_nan=False, ensure_ascii=False)
        try:
            write_text(report, text + "\n", "--report")
        except EnvironmentalError as e:
            # The disk may have filled meanwhile: that costs the file, not the figures.
            unwritten = e
    if result.appearance is not None and result.appearance["warning"]:
        logger.warning("%s", result.appearance["warning"])
    if as_json:
        print_json(values)
    else:
        _print(result, gate)
    if unwritten is not None:
        raise unwritten
    if gate is not None and not gate.passed:
        raise AccuracyError(
            f"{gate.sentence}; keep more layers in floating point, calibrate with crops that look "
            "like these, or raise --max-drop"
        )


def _open_data(
    name: str | None,
    root: Path | None,
    boxes: str | None,
    split: str | None,
    rgb_cal: bool,
    skip_bad: bool,
) -> Dataset:
    from edgehp.datasets.registry import open_dataset

    if name is None and root is not None:
        raise UsageError(f"--data-root {root}: say which data set it is with --dataset")
    options: dict[str, Any] = {
        "boxes": None if boxes == DETECT else boxes,
        "split": split,
        "rgb_cal": rgb_cal or None,
    }
    if name in (None, "rendered") and root is None:
        if given := [k for k, v in options.items() if v is not None]:
            raise UsageError(f"the shipped rendered heads have no option {', '.join(given)}")
        from edgehp.files import resource_dir

        if name is None:
            click.echo(
                "edgehp: no --dataset given: validating on the rendered heads that edgehp ships. "
                "They show what the artifact loses against FP32; the MAE itself is of renderings, "
                "not of people.",
                err=True,
            )
        shipped = resource_dir("calibration") / SHIPPED
        if not shipped.is_file():
            raise EnvironmentalError(
                f"the rendered heads that edgehp ships were not found ({shipped}); install edgehp "
                "again, or name a data set with --dataset and --data-root"
            )
        return open_dataset("rendered", shipped, skip_bad=skip_bad)
    return open_dataset(str(name), root, skip_bad=skip_bad, **options)


def _detector() -> BoxSource:
    """Boxes from the face detector: of the face nearest to the published box."""
    import threading

    from edgehp.prediction.faces import network_box, open_detector, overlap

    detector = open_detector()
    lock = threading.Lock()

    def find(photo: Image, sample: Sample) -> Box | None:
        # One network, and crops are prepared in several threads.
        with lock:
            faces = [network_box(f.box) for f in detector.detect(photo)]
        listed = sample.box
        if listed is None:
            return faces[0] if faces else None
        # A face elsewhere in the photo is not the one that the label is of.
        near = [(overlap(f, listed), f) for f in faces]
        best = max(near, key=lambda pair: pair[0], default=(0.0, None))
        return best[1] if best[0] >= 0.2 else None

    return find


def _print(result: ValidationReport, gate: GateResult | None) -> None:
    from edgehp.cli._output import print_table, styled

    protocol = result.protocol
    click.echo(
        f"{protocol['dataset']}: {protocol['frames']} frames (sha256 "
        f"{str(protocol['sha256'])[:16]}), boxes: {protocol.get('boxes')}, filter: "
        f"{protocol.get('filter') or 'none'}"
    )
    left_out = {
        "without a detected face": protocol["detector_misses"],
        "skipped as bad": len(result.skipped),
        "filtered by angle": len(protocol.get("filtered") or ()),
    }
    if any(left_out.values()):
        text = ", ".join(f"{n} {what}" for what, n in left_out.items() if n)
        click.echo(f"left out: {text}")
    click.echo("degrees; preprocessing " + result.preprocessing_digest[:16] + "\n")
    print_table(*_accuracy_table(result))
    if result.drop is not None:
        click.echo("")
        print_table(*_drop_table(result))
        d = result.drop
        click.echo(
            f"\nArtifact and reference differ by {d.mean_difference_overall:.4f} degrees on "
            f"average ({d.largest_difference:.2f} at most), their spreads by "
            f"{d.spread_difference_overall:.4f}."
        )
    worst = (result.artifact_accuracy or result.reference_accuracy).worst
    if worst:
        click.echo("\nWorst frames: " + ", ".join(f"{w.name} ({w.error:.1f})" for w in worst))
    if gate is not None:
        mark = styled("PASS", "green") if gate.passed else styled("FAIL", "red")
        click.echo(f"\n{mark}: {gate.sentence}.")


def _accuracy_table(
    result: ValidationReport,
) -> tuple[list[str], list[list[object]], range]:
    headers = ["", "frames", "pitch", "yaw", "roll", "MAE", "95 %", "geodesic", "MAEV", "p90"]
    rows: list[list[object]] = []
    for subject, accuracy, mae in (
        (result.reference, result.reference_accuracy, result.reference_mae),
        (result.artifact, result.artifact_accuracy, result.artifact_mae),
    ):
        if subject is None or accuracy is None or mae is None:
            continue
        lines = [(subject.name, accuracy.overall, f"{mae.low:.2f}..{mae.high:.2f}")]
        lines += [
            (f"  |yaw| {b.low:g}-{b.high:g}", b.summary, "") for b in accuracy.bands if b.summary
        ]
        for name, s, interval in lines:
            numbers = (*s.mae, s.mae_mean)
            rows.append(
                [name, s.frames, *(f"{v:.3f}" for v in numbers), interval]
                + [f"{v:.3f}" for v in (s.geodesic, s.maev, s.p90)]
            )
    return headers, rows, range(1, len(headers))


def _drop_table(result: ValidationReport) -> tuple[list[str], list[list[object]], range]:
    headers = ["drop against FP32", "frames", "degrees", "95 % interval", "MAE", "|difference|"]
    headers.append("of spread")
    rows: list[list[object]] = []
    drop, accuracy = result.drop, result.artifact_accuracy
    if drop is None or accuracy is None:
        return headers, rows, range(1, 7)

    def row(
        name: str,
        frames: int,
        d: Any,
        mae: float | None,
        apart: float | None,
        spread: float | None,
    ) -> None:
        rows.append(
            [
                name,
                frames,
                f"{d.value:+.4f}",
                f"{d.low:+.4f}..{d.high:+.4f}",
                None if mae is None else f"{mae:.3f}",
                None if apart is None else f"{apart:.4f}",
                None if spread is None else f"{spread:.4f}",
            ]
        )

    frames = accuracy.overall.frames
    row(
        "all",
        frames,
        drop.overall,
        accuracy.overall.mae_mean,
        drop.mean_difference_overall,
        drop.spread_difference_overall,
    )
    for name, d, mae, apart, spread in zip(
        ("pitch", "yaw", "roll"),
        drop.angles,
        accuracy.overall.mae,
        drop.mean_difference,
        drop.spread_difference,
        strict=True,
    ):
        row(f"  {name}", frames, d, mae, apart, spread)
    for band, accurate in zip(drop.bands, accuracy.bands, strict=True):
        if band.drop is not None and accurate.summary is not None:
            name = f"  |yaw| {band.low:g}-{band.high:g}"
            row(
                name,
                band.frames,
                band.drop,
                accurate.summary.mae_mean,
                band.mean_difference,
                band.spread_difference,
            )
    for c in result.robustness:
        if c.drop is not None:
            row(
                f"  {c.name}",
                frames,
                c.drop,
                c.artifact_mae,
                c.mean_difference,
                c.spread_difference,
            )
    return headers, rows, range(1, 7)
