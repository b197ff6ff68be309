"""``edgehp validate``: accuracy of an artifact against its FP32 reference."""

from __future__ import annotations

import json
import logging
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgehp.cli._command import (
    DATASETS,
    PATH,
    json_option,
    note,
    output_option,
    photo_depth_option,
    skip_bad_option,
    subcommand,
    threads_option,
    typed,
    weights_option,
    with_weights,
    worker_options,
)
from edgehp.cli._output import conclude, print_json, print_table, say, styled
from edgehp.cli._remote import over_ssh, sent_artifact
from edgehp.cli.project import artifacts_here
from edgehp.errors import AccuracyError, EdgehpError, EnvironmentalError, UsageError
from edgehp.progress import Step, step

if TYPE_CHECKING:
    from edgehp.cli._remote import Changes
    from edgehp.remote.errand import Parcel
    from edgehp.validation.run import ValidationReport
    from edgehp.validation.session import Item
    from edgehp.validation.statistics import GateResult

logger = logging.getLogger(__name__)


def _to_boards(given: Mapping[str, Any]) -> Callable[[str], Changes]:
    """To a board go artifact and photos where they are not there already; the report comes back."""
    from edgehp.remote.errand import returned, sent

    changes: dict[str, list[str | Parcel]] = {"remote_data_root": []}
    artifacts: list[Parcel] = []
    if given["network"] is None:
        artifacts = [
            sent_artifact(path, allow_deferred=given["emulate"])
            for path in given["artifacts"] or (None,)
        ]
        changes["artifacts"] = [*artifacts]
    root, there = given["data_root"], given["remote_data_root"]
    if root is not None and there is not None:
        raise UsageError("give --data-root (sent) or --remote-data-root (on the board), not both")
    if root is None and there is None and set(given["datasets"]) - {"rendered"}:
        raise UsageError(
            f"--dataset {given['datasets'][0]} on a board: give --data-root to send the photos, or "
            "--remote-data-root where they are there already"
        )
    if root is not None or there is not None:
        changes["data_root"] = [there or sent(root)]
    many = len(artifacts) > 1 or len(given["datasets"]) > 1

    def change(own: str) -> Changes:
        report: Path | None = given["output"]
        if report is None and artifacts and not many:
            report = _default_report(artifacts[0].here, next(iter(given["datasets"]), None))
            report = report.parent / own / report.name
        elif report is not None and own:
            report = report.with_name(f"{report.stem}-{own}{report.suffix}")
        return changes if report is None else changes | {"output": [returned(report, folder=many)]}

    return change


@subcommand(
    "validate",
    "edgehp validate",
    "edgehp validate dist/kd-resnet18-112-cpu-int8 --dataset aflw2000 --data-root AFLW2000",
    "edgehp validate dist/* --dataset aflw2000 --dataset biwi --data-root data --workers 4",
    "edgehp validate --network net.safetensors --dataset biwi --data-root BIWI",
    "edgehp validate dist/kd-resnet18-112-cpu-int8 --dataset faces --data-root drive",
    renamed={"--report": "--output"},
)
@click.argument("artifacts", nargs=-1, type=PATH)
@click.option(
    "--dataset",
    "datasets",
    multiple=True,
    type=click.Choice(DATASETS),
    help="May be given several times; 'faces': photos of your own with boxes.csv and labels in it. "
    "Default: the rendered heads that edgehp ships, as 'rendered' without --data-root.",
)
@click.option(
    "--data-root",
    type=PATH,
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
@weights_option
@click.option("--reference", help="FP32 reference; default: the network the artifact names.")
@click.option(
    "--max-drop",
    type=click.FloatRange(0),
    default=0.1,
    help="Degrees that the upper end of the MAE drop's interval may reach; else exit code 3.",
)
@click.option(
    "--batch",
    type=click.IntRange(1, 4096),
    default=32,
    help="Crops that go through the network at once.",
)
@threads_option
@click.option("--limit", type=click.IntRange(1), help="Use this many frames, spread evenly.")
@photo_depth_option
@skip_bad_option
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
@output_option(
    "Write the report as JSON here; of several, a file each into this folder. Default: reports/ in "
    "the artifact."
)
@worker_options
@click.option(
    "--remote-data-root",
    metavar="DIR",
    help="With --host or --cluster: where the data set is there, not sent.",
)
@over_ssh("network", "reference", "boxes", plan=_to_boards)
def command(
    artifacts: tuple[Path, ...],
    datasets: tuple[str, ...],
    data_root: Path | None,
    max_drop: float,
    as_json: bool,
    output: Path | None,
    workers: int,
    cluster: str | None,
    remote_data_root: str | None,
    **options: Any,
) -> None:
    """Measure ARTIFACTS (default: the newest under dist/) and their FP32 references on data sets.

    Both see the same crops. The drop is the MAE of the artifact minus that of the reference, with
    a paired interval of 95 %; where its upper end is over --max-drop the exit code is 3. Several
    artifacts or data sets give one table.
    """
    from edgehp.cluster import Workers
    from edgehp.files import write_output
    from edgehp.validation.session import Request, validations
    from edgehp.validation.statistics import check_drop

    options["network"] = with_weights(options["network"], options.pop("weights"))
    where, network = Workers(workers, cluster), options["network"]
    if network is not None and artifacts:
        raise UsageError("give an artifact or --network, not both")
    found = artifacts or (() if network else artifacts_here())
    pairs: list[Item] = [(a, d) for a in found or (None,) for d in datasets or (None,)]
    if where.processes and options["threads"] is None:
        # Each would take all processors, and be in the way of the others.
        options["threads"] = max(1, (os.cpu_count() or 1) // where.processes)
    several = len(datasets) > 1
    if cluster is None and typed("remote_data_root"):
        raise UsageError("--remote-data-root belongs to --host, --hosts, --lab or --cluster")
    if cluster is not None:
        data_root = None if remote_data_root is None else Path(remote_data_root)
        if set(datasets) - {"rendered"} and data_root is None:
            raise UsageError(
                "--cluster with --dataset: say with --remote-data-root where the photos are there\n"
                "hint: with several data sets that folder holds each under its name"
            )
    dataset = datasets[0] if datasets else None
    request = Request(dataset=dataset, data_root=data_root, several=several, **options)
    if not datasets and data_root is None:
        note(
            "no --dataset given: validating on the rendered heads that edgehp ships. They show "
            "what the artifact loses against FP32; the MAE itself is of renderings, not of people."
        )
    places = _places(pairs, output, network)
    results: dict[int, _Result | EdgehpError] = {}
    unwritten: EnvironmentalError | None = None
    written: list[Path] = []
    several_steps = step("validate", len(pairs), "validations")
    with several_steps if len(pairs) > 1 else nullcontext(Step("")) as going:
        for i, result in validations(request, pairs, where):
            going.advance()
            if isinstance(result, EdgehpError):
                results[i] = result
                continue
            gate = None if result.drop is None else check_drop(result.drop.overall, max_drop)
            done = results[i] = _Result(result, gate)
            if (place := places[i]) is None:
                continue
            text = json.dumps(done.values(), indent=2, allow_nan=False, ensure_ascii=False)
            try:
                write_output(place, text + "\n")
            except EnvironmentalError as e:
                # The disk may have filled meanwhile: that costs the file, not the figures.
                unwritten = e
            else:
                written.append(place)
    ordered = [results[i] for i in range(len(pairs))]
    for one in ordered:
        unlike = None if isinstance(one, EdgehpError) else one.report.appearance
        if unlike is not None and unlike["warning"]:
            logger.warning("%s", unlike["warning"])
    if len(pairs) == 1:
        if isinstance(ordered[0], EdgehpError):
            raise ordered[0]
        failed = _one(ordered[0], as_json)
    else:
        failed = _many(pairs, ordered, network, max_drop, as_json)
    if written and not as_json:
        place = written[0] if len(written) == 1 else written[0].parent
        click.echo(f"{styled('measured', 'green', bold=True)} {place}")
    if unwritten is not None:
        raise unwritten
    if failed is not None:
        raise failed
    if not as_json and len(found) == 1 and not options["emulate"]:
        click.echo(f"next: {shlex.join(['edgehp', 'bench', str(found[0])])}")


@dataclass(frozen=True)
class _Result:
    """A validation, and how its drop stands to the limit; None without an artifact."""

    report: ValidationReport
    gate: GateResult | None

    def values(self) -> dict[str, Any]:
        """As it is written and printed for programs."""
        gate = {} if self.gate is None else {"gate": asdict(self.gate)}
        return {**self.report.to_dict(), **gate}


def _default_report(artifact: Path, dataset: str | None) -> Path:
    """Where the report of an artifact on a data set lies unless --output says so."""
    return artifact / "reports" / f"validation-{dataset or 'rendered'}.json"


def _places(pairs: Sequence[Item], output: Path | None, network: str | None) -> list[Path | None]:
    """Where the reports are written; what cannot be is said before anything is measured."""
    from edgehp.files import require_writable

    if output is None:
        places = [None if a is None else _default_report(a, d) for a, d in pairs]
    elif len(pairs) == 1:
        places = [output]
    else:
        names = [f"{Path(a or network or '').name}-{d or 'shipped'}.json" for a, d in pairs]
        if len(set(names)) < len(names):
            raise UsageError("two artifacts have the same name, so their reports would too")
        places = [output / name for name in names]
    for i, place in enumerate(places):
        # An artifact that is not there is said by whoever opens it.
        if place is None or (output is None and not place.parent.parent.is_dir()):
            places[i] = None
            continue
        try:
            require_writable(place)
        except EnvironmentalError:
            if output is not None:
                raise
            note(f"{place} cannot be written: --output takes the report elsewhere")
            places[i] = None
    return places


def _many(
    pairs: Sequence[Item],
    results: Sequence[_Result | EdgehpError],
    network: str | None,
    max_drop: float,
    as_json: bool,
) -> AccuracyError | None:
    """Print the table or the JSON; the error of those that fail the gate."""
    rows: list[list[object]] = []
    document = []
    codes, over = set(), 0
    for (artifact, dataset), result in zip(pairs, results, strict=True):
        name = str(network) if artifact is None else artifact.name
        row: dict[str, Any] = {"artifact": name, "dataset": dataset, "report": None, "error": None}
        cells: list[object] = [name, dataset or "shipped heads"]
        if isinstance(result, EdgehpError):
            codes.add(result.exit_code)
            row["error"] = str(result)
            cells += [None] * 5 + [styled("ERROR", "red")]
            click.echo(f"edgehp: error: {name} on {cells[1]}: {result}", err=True)
        else:
            report = result.report
            row["report"] = result.values()
            cells += [report.protocol["frames"], f"{report.reference_mae.value:.3f}"]
            mae = report.artifact_mae
            cells.append(None if mae is None else f"{mae.value:.3f}")
            if report.drop is None or result.gate is None:
                cells += [None] * 3
            else:
                drop, passed = report.drop.overall, result.gate.passed
                cells += [f"{drop.value:+.4f}", f"{drop.low:+.4f}..{drop.high:+.4f}"]
                cells.append(styled("PASS", "green") if passed else styled("FAIL", "red"))
                over += not passed
        rows.append(cells)
        document.append(row)
    if as_json:
        print_json(document)
    else:
        headers = ["", "data set", "frames", "MAE FP32", "MAE", "drop", "95 % interval", "gate"]
        print_table(headers, rows, right=range(2, 7))
    if codes:
        click.get_current_context().exit(codes.pop() if len(codes) == 1 else 1)
    if not over:
        return None
    return AccuracyError(
        f"{over} of {len(pairs)} fail the limit of {max_drop:g} degrees\n"
        "hint: validate each by itself for what to do"
    )


def _one(result: _Result, as_json: bool) -> AccuracyError | None:
    """Print one report in full; the error where it fails the gate."""
    gate = result.gate
    if as_json:
        print_json(result.values())
    else:
        _print(result.report)
        if gate is not None:
            word, colour = ("PASS", "green") if gate.passed else ("FAIL", "red")
            conclude(word, colour, f"{gate.sentence}.")
    if gate is None or gate.passed:
        return None
    return AccuracyError(f"{gate.sentence}\nhint: {gate.hint}")


def _print(report: ValidationReport) -> None:
    """The tables of one report."""
    from edgehp.report.figures import ACCURACY, PARTS, accuracy_rows, breakdown_rows

    protocol, drop = report.protocol, report.drop
    say(
        f"{protocol['dataset']}: {protocol['frames']} frames (sha256 "
        f"{str(protocol['sha256'])[:16]}), boxes: {protocol.get('boxes')}, filter: "
        f"{protocol.get('filter') or 'none'}"
    )
    left_out = {
        "without a detected face": protocol["detector_misses"],
        "skipped as bad": len(report.skipped),
        "filtered by angle": len(protocol.get("filtered") or ()),
    }
    if any(left_out.values()):
        text = ", ".join(f"{n} {what}" for what, n in left_out.items() if n)
        say(f"left out: {text}")
    say(f"reference: {report.reference.name}")
    if report.artifact is not None:
        say(f"artifact: {report.artifact.name}")
    say(f"degrees; preprocessing {report.preprocessing_digest[:16]}")
    click.echo("")
    print_table(ACCURACY, accuracy_rows(report), range(1, 4))
    if drop is not None:
        click.echo("")
        print_table(PARTS, breakdown_rows(report), range(1, 5))
        click.echo("")
        wide = drop.spread_difference_overall
        say(
            f"Artifact and reference differ by {drop.mean_difference_overall:.4f} degrees on "
            f"average ({drop.largest_difference:.2f} at most)"
            + ("." if wide is None else f", their spreads by {wide:.4f}.")
        )
    if worst := (report.artifact_accuracy or report.reference_accuracy).worst:
        say("Worst frames: " + ", ".join(f"{w.name} ({w.error:.1f})" for w in worst))
