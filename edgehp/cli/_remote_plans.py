"""How ``build``, ``validate`` and ``bench`` travel to a board."""

from __future__ import annotations

import io
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgehp.cli._remote import Trip, sent_artifact
from edgehp.cli.validate import default_report
from edgehp.errors import EnvironmentalError, UsageError
from edgehp.files import strict_json

if TYPE_CHECKING:
    from edgehp.cli._remote import Changes

_DEFERRED = "edgehp.remote.deferred"


def plan_bench(trip: Trip) -> Changes:
    """The artifact goes, its reports come back."""
    from edgehp.remote.errand import Returned, Sent

    given = trip.given
    artifact = sent_artifact(given["artifact"])
    reports = trip.own(given["output"] or artifact.source / "reports")
    changes: dict[str, list[str | Sent | Returned]] = {
        "artifact": [artifact],
        "output": [Returned(reports, folder=True)],
    }
    if trip.board.power_cycle and turns_bench(given) > 1:
        if given["as_json"]:
            raise UsageError("--json prints one start: with --power-cycle read the report's file")
        changes["starts"] = ["1"]
        changes["output"] = [Returned(reports, folder=True, keep=_joining(reports))]
    if given["against"] is not None and Path(given["against"]).is_dir():
        changes["against"] = [sent_artifact(Path(given["against"]))]
    return changes


def turns_bench(given: Mapping[str, Any]) -> int:
    """How often ``bench`` runs on a board that is power cycled before each time."""
    return int(given["starts"]) if "cold-start" in given["scenarios"] else 1


def _joining(reports: Path) -> Callable[[Path], Sequence[Path]]:
    """Keeps one report of all cold starts until now."""
    found: list[dict[str, Any]] = []

    def keep(folder: Path) -> Sequence[Path]:
        from edgehp.benchmark.cold_start import REPORT, joined
        from edgehp.report.gather import write_report

        for path in folder.glob(f"{REPORT}.json"):
            found.append(strict_json(path.read_bytes()))
        return [write_report(joined(found), reports, REPORT)] if found else []

    return keep


def plan_validate(trip: Trip) -> Changes:
    """Artifact and photos go where they are not there already, the report comes back."""
    from edgehp.remote.errand import Returned, Sent

    given = trip.given
    changes: dict[str, list[str | Sent | Returned]] = {}
    artifacts: list[Sent] = []
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
    if root is not None:
        changes["data_root"] = [Sent(root)]
    elif there is not None:
        changes["data_root"] = [there]
    many = len(artifacts) > 1 or len(given["datasets"]) > 1
    report = given["output"]
    if report is None and artifacts and not many:
        own = default_report(artifacts[0].source, next(iter(given["datasets"]), None))
        report = trip.own(own.parent) / own.name
    elif report is not None and trip.several:
        report = report.with_name(f"{report.stem}-{trip.board.folder}{report.suffix}")
    if report is not None:
        changes["output"] = [Returned(report, folder=many)]
    return changes


def plan_build(trip: Trip) -> Changes:
    """Finish a deferred artifact there, made here where the target's engine needs its device."""
    from edgehp.artifact.check import read_manifest
    from edgehp.pipeline.plan import unfinished_artifact
    from edgehp.remote.errand import Returned

    given = trip.given
    unfinished = unfinished_artifact(given["artifact"], given["finish"], given["target"])
    if unfinished is None and given["target"] is None:
        raise UsageError("--target is missing; 'edgehp targets' lists what can be built for")
    output = trip.own(given["output"])
    if unfinished is None and not _needs_its_device(given):

        def keep(found: Path) -> Sequence[Path]:
            made = sorted(path.parent for path in found.glob("*/manifest.json"))
            return [_keep_artifact(path, output / path.name) for path in made]

        return {"output": [Returned(output, folder=True, keep=keep)]}
    if unfinished is None:
        deferred = _deferred(trip)
        destination = output / deferred.name
    else:
        deferred = unfinished
        destination = output / read_manifest(deferred).name if trip.several else deferred
    artifact = sent_artifact(
        deferred,
        allow_deferred=True,
        keep=lambda found: [_keep_artifact(found, destination)],
        shown=destination,
    )
    # What the artifact was made with is in it: these options alone are for its finish.
    for_finish = ("validate_on", "threads", "as_json", "remote_data_root")
    return {n: () for n in given if n not in for_finish} | {"finish": [artifact]}


def _keep_artifact(found: Path, destination: Path) -> Path:
    """Check what came back and put it in place as `build` would: whole, or not at all."""
    from edgehp.artifact import load_artifact
    from edgehp.artifact.write import ArtifactWriter

    manifest = load_artifact(found, bytes_only=True, allow_deferred=True).manifest
    with ArtifactWriter(destination) as writer:
        for record in manifest.files:
            target = writer.path / record.path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(found / record.path, target)
        writer.commit(manifest, {f.path: f.role for f in manifest.files})
    return destination


def _needs_its_device(given: Mapping[str, Any]) -> bool:
    """Whether the engine is built on the target's own device, and that is not this one."""
    from edgehp.device import HostProbe
    from edgehp.pipeline.plan import BuildRequest, find_place, make_plan

    plan = make_plan(BuildRequest.from_options(given, max_drop_typed=False))
    if plan.kind != "tensorrt":
        return False
    try:
        find_place(plan, HostProbe())
    except EnvironmentalError:
        return True
    return False


def _deferred(trip: Trip) -> Path:
    """The deferred artifact of this command line, made once for all boards."""
    context = click.get_current_context()
    if _DEFERRED not in context.meta:
        folder = context.with_resource(tempfile.TemporaryDirectory(prefix="edgehp-"))
        own = {k: v for k, v in trip.given.items() if k != "remote_data_root"}
        # What it prints is of an artifact that nobody will see.
        with redirect_stdout(io.StringIO()):
            trip.local(**own | {"defer": True, "output": Path(folder), "as_json": False})
        context.meta[_DEFERRED] = next(p.parent for p in Path(folder).glob("*/manifest.json"))
    path: Path = context.meta[_DEFERRED]
    return path
