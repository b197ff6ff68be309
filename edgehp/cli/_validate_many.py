"""``edgehp validate`` of many artifacts on many data sets: one table, and one file a pair."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click

from edgehp.artifact import newest_artifact
from edgehp.artifact.check import read_manifest
from edgehp.artifact.manifest import MANIFEST_NAME
from edgehp.cli._output import print_json, print_table, styled
from edgehp.cli.validate import Asked, validated
from edgehp.cluster import ShardsLostError, Workers, run_shards
from edgehp.errors import AccuracyError, EdgehpError, EnvironmentalError, UsageError
from edgehp.progress import step
from edgehp.report.files import require_writable, write_text
from edgehp.validation.gate import GateResult, check_drop
from edgehp.validation.run import ValidationReport

__all__ = ["Place", "validate_many"]

# An artifact (None: a float network alone) and the name of a data set (None: the shipped heads).
Pair = tuple[Path | None, str | None]


@dataclass(frozen=True)
class Place:
    """Where the work is done and where its results go.

    Attributes:
        workers: who does it.
        data_root: where the data sets are for them.
        output: folder for a report of each pair; None for none.
        as_json: whether to print JSON in place of the table.
        max_drop: of the gate, degrees.
    """

    workers: Workers
    data_root: Path | None
    output: Path | None
    as_json: bool
    max_drop: float


@dataclass(frozen=True)
class _Validations:
    """Validations as work for `edgehp.cluster`."""

    asked: Asked
    data_root: Path | None
    several: bool
    files: Mapping[str, Path]

    def open(self, folder: Path | None) -> Callable[[Pair], ValidationReport]:
        def place(path: Path) -> Path:
            return path if folder is None else folder / _name(path)

        def given(text: str | None) -> str | None:
            """A file travels; anything else is a name."""
            return (
                text
                if text is None or _name(Path(text)) not in self.files
                else str(place(Path(text)))
            )

        def validate(pair: Pair) -> ValidationReport:
            artifact, dataset = pair
            root = self.data_root
            if root is not None and dataset is not None and self.several:
                root = root / dataset
            return validated(
                replace(
                    self.asked,
                    artifact=None if artifact is None else place(artifact),
                    dataset=dataset,
                    data_root=root,
                    network=given(self.asked.network),
                    reference=given(self.asked.reference),
                    boxes=given(self.asked.boxes),
                )
            )

        return validate


def _name(path: Path) -> str:
    """The name of a file or an artifact among those that travel."""
    return path.resolve().as_posix().lstrip("/")


def validate_many(
    artifacts: Sequence[Path], datasets: Sequence[str], asked: Asked, place: Place
) -> None:
    """Validate every artifact on every data set, in the given order.

    Raises:
        UsageError: options that fit one data set only, or data that the workers do not have.
        AccuracyError: the gate was not met by some.
        EdgehpError: some could not be validated; the others were.
    """
    several = len(datasets) > 1
    if several and (asked.split or asked.rgb_cal or asked.boxes not in (None, "detect")):
        raise UsageError("--split, --rgb-cal and lists of --boxes are for one --dataset at a time")
    if place.workers.address and set(datasets) - {"rendered"} and place.data_root is None:
        raise UsageError(
            "--cluster with --dataset: say with --remote-data-root where the photos are there\n"
            "hint: with several data sets that folder holds each under its name"
        )
    found: list[Path | None] = [*artifacts] or [None if asked.network else newest_artifact()]
    pairs: list[Pair] = [(a, d) for a in found for d in datasets or (None,)]
    names = [_row_name(asked.network if a is None else str(a), d) for a, d in pairs]
    if place.output is not None:
        if len(set(names)) < len(names):
            raise UsageError("two artifacts have the same name, so their reports would too")
        require_writable(place.output / "x")
    if place.workers.processes and asked.threads is None:
        # Each would take all processors, and be in the way of the others.
        asked = replace(asked, threads=max(1, (os.cpu_count() or 1) // place.workers.processes))
    work = _Validations(asked, place.data_root, several, _files(found, asked))
    results: dict[int, ValidationReport | EdgehpError] = {}
    with step("validate", len(pairs), "validations") as going:
        try:
            for shard in run_shards(work, pairs, place.workers, size=1):
                for i, result in shard:
                    results[i] = result
                    going.advance()
                    if place.output is not None and isinstance(result, ValidationReport):
                        write_text(
                            place.output / f"{names[i]}.json",
                            _text(_values(result, place.max_drop)),
                        )
        except ShardsLostError as e:
            for lost in e.shards:
                results |= {i: EnvironmentalError("it killed its worker twice") for i in lost}
    _print(pairs, [results[i] for i in range(len(pairs))], asked, place)


def _row_name(network: str | None, dataset: str | None) -> str:
    return f"{Path(network or 'network').name}-{dataset or 'shipped'}"


def _files(artifacts: Sequence[Path | None], asked: Asked) -> dict[str, Path]:
    """All files that the work needs, by `_name`; what cannot be read fails as its own row."""
    found = [Path(t) for t in (asked.network, asked.reference, asked.boxes) if t]
    for artifact in artifacts:
        if artifact is not None and (artifact / MANIFEST_NAME).is_file():
            found.append(artifact / MANIFEST_NAME)
            try:
                found += [artifact / f.path for f in read_manifest(artifact).files]
            except EdgehpError:
                continue
    return {_name(path): path for path in found if path.is_file()}


def _gate(result: ValidationReport, max_drop: float) -> GateResult | None:
    return None if result.drop is None else check_drop(result.drop.overall, max_drop)


def _values(result: ValidationReport, max_drop: float) -> dict[str, Any]:
    gate = _gate(result, max_drop)
    return result.to_dict() | ({} if gate is None else {"gate": asdict(gate)})


def _text(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def _print(
    pairs: Sequence[Pair],
    results: Sequence[ValidationReport | EdgehpError],
    asked: Asked,
    place: Place,
) -> None:
    """The table or the JSON; raises what the exit code is of."""
    rows: list[list[object]] = []
    document = []
    failed, over = [], 0
    for (artifact, dataset), result in zip(pairs, results, strict=True):
        name = artifact.name if artifact is not None else str(asked.network)
        row: dict[str, Any] = {"artifact": name, "dataset": dataset, "report": None, "error": None}
        cells: list[object] = [name, dataset or "shipped heads"]
        if isinstance(result, EdgehpError):
            failed.append(result)
            row["error"] = str(result)
            cells += [None] * 5 + [styled("ERROR", "red")]
            click.echo(f"edgehp: error: {name} on {cells[1]}: {result}", err=True)
        else:
            row["report"] = _values(result, place.max_drop)
            gate, drop = _gate(result, place.max_drop), result.drop
            cells += [
                result.protocol["frames"],
                f"{result.reference_mae.value:.3f}",
                None if result.artifact_mae is None else f"{result.artifact_mae.value:.3f}",
                None if drop is None else f"{drop.overall.value:+.4f}",
                None if drop is None else f"{drop.overall.low:+.4f}..{drop.overall.high:+.4f}",
                None
                if gate is None
                else styled("PASS", "green")
                if gate.passed
                else styled("FAIL", "red"),
            ]
            over += gate is not None and not gate.passed
        rows.append(cells)
        document.append(row)
    if place.as_json:
        print_json(document)
    else:
        headers = ["", "data set", "frames", "MAE FP32", "MAE", "drop", "95 % interval", "gate"]
        print_table(headers, rows, right=range(2, 7))
    if failed:
        codes = {e.exit_code for e in failed}
        click.get_current_context().exit(codes.pop() if len(codes) == 1 else 1)
    if over:
        raise AccuracyError(
            f"{over} of {len(pairs)} fail the limit of {place.max_drop:g} degrees\n"
            "hint: validate each by itself for what to do"
        )
