"""``edgehp validate``: accuracy of an artifact against its FP32 reference."""

from __future__ import annotations

import json
import logging
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgehp.cli._command import Command, json_option, note, output_option, threads_option
from edgehp.cli._photos import photo_depth
from edgehp.cli._remote import over_ssh
from edgehp.cli._remote_plans import plan_validate
from edgehp.cli._workers import worker_options, workers_of
from edgehp.cli.project import artifacts_here
from edgehp.errors import AccuracyError, EnvironmentalError, UsageError
from edgehp.progress import step

if TYPE_CHECKING:
    from edgehp.artifact.open import OpenedNetwork
    from edgehp.crop import Box
    from edgehp.datasets.base import Dataset, Sample
    from edgehp.validation.gate import GateResult
    from edgehp.validation.run import BoxSource, Image, ValidationReport
    from edgehp.validation.statistics import Interval

__all__ = ["Asked", "command", "validated"]

logger = logging.getLogger(__name__)

DATASETS = ("aflw2000", "biwi", "aflw", "300w-lp", "rendered")
DETECT = "detect"
SHIPPED = "rendered-validation.zip"


@click.command(
    "validate",
    cls=Command,
    short_help="Measure an artifact's accuracy against its FP32 reference.",
    renamed={"--report": "--output"},
    examples=(
        "edgehp validate",
        "edgehp validate dist/kd-resnet18-112-cpu-int8 --dataset aflw2000 --data-root AFLW2000",
        "edgehp validate dist/* --dataset aflw2000 --dataset biwi --data-root data --workers 4",
        "edgehp validate --network net.safetensors --dataset biwi --data-root BIWI",
    ),
)
@click.argument("artifacts", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--dataset",
    "datasets",
    multiple=True,
    type=click.Choice(DATASETS),
    help="May be given several times. Default: the rendered heads that edgehp ships, as 'rendered' "
    "without --data-root.",
)
@click.option(
    "--data-root",
    type=click.Path(path_type=Path),
    help="Where the data set is; of several, the folder that has each under its name.",
)
@click.option(
    "--boxes",
    help="A box list (JSON or CSV), 'landmarks', or 'detect' for the face detector's, with its "
    "misses counted. Default: the published list beside the data.",
)
@click.option("--split", type=click.Choice(("train", "test")), help="Of the box list.")
@click.option("--rgb-cal", is_flag=True, help="BIWI: labels in the color camera's axes.")
@click.option("--network", help="Validate a float network (bundled name or file) by itself.")
@click.option("--reference", help="FP32 reference; default: the network the artifact names.")
@click.option(
    "--max-drop",
    type=click.FloatRange(0),
    default=0.1,
    show_default=True,
    help="Degrees that the upper end of the MAE drop's interval may reach; else exit code 3.",
)
@click.option(
    "--batch",
    type=click.IntRange(1, 4096),
    default=32,
    show_default=True,
    help="Crops that go through the network at once.",
)
@threads_option
@click.option("--limit", type=click.IntRange(1), help="Use this many frames, spread evenly.")
@photo_depth
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
@json_option
@output_option("Write the report as JSON here; of several, a file each into this folder.")
@worker_options
@over_ssh("network", "reference", "boxes", plan=plan_validate, data_root=True)
def command(
    artifacts: tuple[Path, ...],
    datasets: tuple[str, ...],
    data_root: Path | None,
    max_drop: float,
    as_json: bool,
    output: Path | None,
    workers: int,
    cluster: str | None,
    remote_data_root: str | None = None,
    **options: Any,
) -> None:
    """Measure ARTIFACTS (default: the newest under dist/) and their FP32 references on data sets.

    Both see the same crops. The drop is the MAE of the artifact minus that of the reference, with
    a paired interval of 95 %; where its upper end is over --max-drop the exit code is 3. Several
    artifacts or data sets give one table.
    """
    # Imported here: `edgehp --help` must not pay for OpenCV and the engines.
    from edgehp.cli._output import print_json
    from edgehp.report.files import require_writable, write_text
    from edgehp.validation.gate import check_drop

    where = workers_of(workers, cluster)
    if not artifacts and options["network"] is None and not where.elsewhere:
        artifacts = artifacts_here()
    asked = Asked(
        artifacts[0] if artifacts else None,
        datasets[0] if datasets else None,
        data_root,
        **options,
    )
    if len(artifacts) > 1 or len(datasets) > 1 or where.elsewhere:
        from edgehp.cli._validate_many import Place, validate_many

        there = None if remote_data_root is None else Path(remote_data_root)
        root = data_root if cluster is None else there
        place = Place(where, root, output, as_json, max_drop)
        validate_many(artifacts, datasets, asked, place)
        return
    if output is not None:
        require_writable(output)
    result = validated(asked)
    gate = None if result.drop is None else check_drop(result.drop.overall, max_drop)
    values = result.to_dict()
    if gate is not None:
        values["gate"] = asdict(gate)
    unwritten: EnvironmentalError | None = None
    if output is not None:
        text = json.dumps(values, indent=2, allow_nan=False, ensure_ascii=False)
        try:
            write_text(output, text + "\n")
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
        raise AccuracyError(f"{gate.sentence}\nhint: {gate.hint}")


@dataclass(frozen=True)
class Asked:
    """What the command line asks to be measured, checked for options that exclude each other."""

    artifact: Path | None
    dataset: str | None
    data_root: Path | None
    boxes: str | None
    split: str | None
    rgb_cal: bool
    network: str | None
    reference: str | None
    batch: int
    threads: int | None
    limit: int | None
    photo_depth: int | None
    skip_bad: bool
    robustness: bool
    worst: int
    emulate: bool

    def __post_init__(self) -> None:
        if self.network is None:
            return
        if self.artifact is not None:
            raise UsageError("give an artifact or --network, not both")
        if self.emulate:
            raise UsageError("--emulate runs an artifact's graph: a float network needs none")
        if self.reference is not None:
            raise UsageError("--network is validated by itself: --reference belongs to an artifact")

    @property
    def shipped_heads(self) -> bool:
        """Whether the frames are the rendered heads that edgehp ships."""
        return self.dataset in (None, "rendered") and self.data_root is None


def validated(asked: Asked) -> ValidationReport:
    """Do what was asked for.

    Raises:
        EdgehpError: as of the parts.
    """
    from edgehp.cli._calibrated import calibration_check
    from edgehp.validation.robustness import CONDITIONS
    from edgehp.validation.run import Detector, Pair, Settings, validate

    settings = Settings(
        batch=asked.batch,
        limit=asked.limit,
        skip_bad=asked.skip_bad,
        conditions=tuple(CONDITIONS) if asked.robustness else (),
        worst=asked.worst,
    )
    name = asked.network or ("newest" if asked.artifact is None else asked.artifact.name)
    with step(f"{name}, {asked.dataset or 'shipped heads'}"), ExitStack() as stack:
        with step("open"):
            data = _open_data(asked).with_depth(asked.photo_depth)
            base, tested = _open_networks(asked, stack)
        detector = None
        if asked.boxes == DETECT:
            detector = Detector(_nearest_face(), "CenterFace, mapped to the network's boxes")
        return validate(
            Pair(base, tested),
            data,
            base.preprocessing,
            settings,
            detector=detector,
            calibration=calibration_check(tested, asked.threads, asked.shipped_heads),
        )


def _open_networks(asked: Asked, stack: ExitStack) -> tuple[OpenedNetwork, OpenedNetwork | None]:
    """The FP32 network and the artifact, which `stack` closes; None where it is measured alone."""
    from edgehp.artifact.open import (
        open_artifact,
        open_emulation,
        open_network,
        open_reference,
    )

    threads, batch = asked.threads, asked.batch
    if asked.network is not None:
        return stack.enter_context(open_network(asked.network, threads=threads, batch=batch)), None
    opened = open_emulation if asked.emulate else open_artifact
    tested = stack.enter_context(opened(asked.artifact, threads=threads, batch=batch))
    reference = open_reference(tested, asked.reference, threads=threads, batch=batch)
    return stack.enter_context(reference), tested


def _open_data(asked: Asked) -> Dataset:
    from edgehp.datasets.registry import open_dataset

    if asked.dataset is None and asked.data_root is not None:
        raise UsageError(f"--data-root {asked.data_root}: say which data set it is with --dataset")
    options: dict[str, Any] = {
        "boxes": None if asked.boxes == DETECT else asked.boxes,
        "split": asked.split,
        "rgb_cal": asked.rgb_cal or None,
    }
    if not asked.shipped_heads:
        return open_dataset(str(asked.dataset), asked.data_root, skip_bad=asked.skip_bad, **options)
    if given := [k for k, v in options.items() if v is not None]:
        raise UsageError(f"the shipped rendered heads have no option {', '.join(given)}")
    from edgehp.files import resource_dir

    if asked.dataset is None:
        note(
            "no --dataset given: validating on the rendered heads that edgehp ships. They show "
            "what the artifact loses against FP32; the MAE itself is of renderings, not of people."
        )
    shipped = resource_dir("calibration") / SHIPPED
    if not shipped.is_file():
        raise EnvironmentalError(
            f"the rendered heads that edgehp ships were not found ({shipped})\n"
            "hint: install edgehp again, or name a data set with --dataset and --data-root"
        )
    return open_dataset("rendered", shipped, skip_bad=asked.skip_bad)


def _nearest_face() -> BoxSource:
    """Boxes from the face detector: of the face nearest to the published box."""
    import threading

    from edgehp.runtime.detection import network_box, open_detector, overlap

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
    from edgehp.cli._output import print_table, say, styled

    protocol = result.protocol
    say(
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
        say(f"left out: {text}")
    for role, subject in (("reference", result.reference), ("artifact", result.artifact)):
        if subject is not None:
            say(f"{role}: {subject.name}")
    say(f"degrees; preprocessing {result.preprocessing_digest[:16]}\n")
    print_table(*_accuracy_table(result))
    if result.drop is not None:
        click.echo("")
        print_table(*_drop_table(result))
        d = result.drop
        click.echo("")
        wide = d.spread_difference_overall
        say(
            f"Artifact and reference differ by {d.mean_difference_overall:.4f} degrees on "
            f"average ({d.largest_difference:.2f} at most)"
            + ("." if wide is None else f", their spreads by {wide:.4f}.")
        )
    worst = (result.artifact_accuracy or result.reference_accuracy).worst
    if worst:
        say("Worst frames: " + ", ".join(f"{w.name} ({w.error:.1f})" for w in worst))
    if gate is not None:
        word, color = ("PASS", "green") if gate.passed else ("FAIL", "red")
        click.echo("")
        say(f"{styled(word, color, bold=True)}: {gate.sentence}.")


def _accuracy_table(
    result: ValidationReport,
) -> tuple[list[str], list[list[object]], range]:
    headers = ["", "frames", "pitch", "yaw", "roll", "MAE", "95 %", "geodesic", "MAEV"]
    rows: list[list[object]] = []
    for role, accuracy, mae in (
        ("reference", result.reference_accuracy, result.reference_mae),
        ("artifact", result.artifact_accuracy, result.artifact_mae),
    ):
        if accuracy is None or mae is None:
            continue
        lines = [(role, accuracy.overall, f"{mae.low:.2f}..{mae.high:.2f}")]
        lines += [
            (f"  |yaw| {b.low:g}-{b.high:g}", b.summary, "") for b in accuracy.bands if b.summary
        ]
        for name, s, interval in lines:
            numbers = (*s.mae, s.mae_mean)
            rows.append(
                [name, s.frames, *(f"{v:.3f}" for v in numbers), interval]
                + [f"{v:.3f}" for v in (s.geodesic, s.maev)]
            )
    return headers, rows, range(1, len(headers))


def _drop_table(result: ValidationReport) -> tuple[list[str], list[list[object]], range]:
    # The last two: mean absolute differences of angles and spreads to FP32.
    headers = ["drop on", "frames", "degrees", "95 % interval", "MAE", "|angles|", "|spread|"]
    rows: list[list[object]] = []
    drop, accuracy = result.drop, result.artifact_accuracy

    def row(name: str, frames: int, d: Interval | None, *figures: float | None) -> None:
        """A row with the MAE and the differences of angles and spreads; none without a drop."""
        if d is not None:
            shown = [
                None if v is None else f"{v:.{digits}f}"
                for v, digits in zip(figures, (3, 4, 4), strict=True)
            ]
            rows.append([name, frames, f"{d.value:+.4f}", f"{d.low:+.4f}..{d.high:+.4f}", *shown])

    if drop is not None and accuracy is not None:
        whole = accuracy.overall
        frames = whole.frames
        means: tuple[float, float | None] = (
            drop.mean_difference_overall,
            drop.spread_difference_overall,
        )
        row("all", frames, drop.overall, whole.mae_mean, *means)
        for i, name in enumerate(("pitch", "yaw", "roll")):
            wide = None if drop.spread_difference is None else drop.spread_difference[i]
            means = (drop.mean_difference[i], wide)
            row(f"  {name}", frames, drop.angles[i], whole.mae[i], *means)
        for band, accurate in zip(drop.bands, accuracy.bands, strict=True):
            mae = None if accurate.summary is None else accurate.summary.mae_mean
            apart = (band.mean_difference, band.spread_difference)
            row(f"  |yaw| {band.low:g}-{band.high:g}", band.frames, band.drop, mae, *apart)
        for c in result.robustness:
            apart = (c.mean_difference, c.spread_difference)
            row(f"  {c.name}", frames, c.drop, c.artifact_mae, *apart)
    return headers, rows, range(1, 7)
