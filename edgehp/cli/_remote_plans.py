"""How ``build``, ``validate`` and ``bench`` travel to a board."""

from __future__ import annotations

import io
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgehp.cli._remote import Job, Journey, Trip, sent_artifact
from edgehp.errors import EnvironmentalError, UsageError

if TYPE_CHECKING:
    from edgehp.remote.errand import Returned, Sent

__all__ = ["BENCH", "BUILD", "VALIDATE"]

Parameters = Mapping[str, Any]
_DEFERRED = "edgehp.remote.deferred"


def _bench(trip: Trip) -> Job:
    from edgehp.remote.errand import Returned

    given = trip.given
    artifact = sent_artifact(given["artifact"])
    reports = given["output"] or artifact.source / "reports"
    changes: dict[str, str | Sent | Returned | None] = {
        "artifact": artifact,
        "output": Returned(_own(trip, reports), folder=True),
    }
    against = given["against"]
    if against is not None and Path(against).is_dir():
        changes["against"] = sent_artifact(Path(against))
    return Job(changes)


def _validate(trip: Trip) -> Job:
    from edgehp.remote.errand import Returned, Sent

    given = trip.given
    changes: dict[str, str | Sent | Returned | None] = {}
    if given["network"] is None:
        changes["artifact"] = sent_artifact(given["artifact"], allow_deferred=given["emulate"])
    root, there = given["data_root"], given["remote_data_root"]
    if root is not None and there is not None:
        raise UsageError("give --data-root (sent) or --remote-data-root (on the board), not both")
    if root is None and there is None and given["dataset"] not in (None, "rendered"):
        raise UsageError(
            f"--dataset {given['dataset']} on a board: give --data-root to send the photos, or "
            "--remote-data-root where they are there already"
        )
    if root is not None:
        changes["data_root"] = Sent(root)
    elif there is not None:
        changes["data_root"] = str(there)
    if (report := given["report"]) is not None:
        name = f"{report.stem}-{trip.board.folder}{report.suffix}" if trip.several else report.name
        changes["report"] = Returned(report.with_name(name), folder=False)
    return Job(changes)


def _own(trip: Trip, folder: Path) -> Path:
    """The board's own folder in `folder` where there are several, else `folder`."""
    return folder / trip.board.folder if trip.several else folder


def _build(trip: Trip) -> Job:
    """Finish a deferred artifact there, made here where the target's engine needs its device."""
    from edgehp.artifact.check import read_manifest
    from edgehp.pipeline.plan import unfinished_artifact

    given = trip.given
    unfinished = unfinished_artifact(given["artifact"], given["finish"], given["target"])
    if unfinished is not None:
        destination = unfinished
        if trip.several:
            destination = _own(trip, given["output"]) / read_manifest(unfinished).name
        return _finish(given, unfinished, destination)
    if given["target"] is None:
        raise UsageError("--target is missing; 'edgehp targets' lists what can be built for")
    output = _own(trip, given["output"])
    if not _needs_its_device(given):
        return _whole(output)
    deferred = _deferred(trip)
    return _finish(given, deferred, output / deferred.name)


def _finish(given: Parameters, deferred: Path, destination: Path) -> Job:
    from edgehp.remote.errand import Sent

    words: list[str | Sent | Returned] = ["build"]
    if given["validate_on"] is not None:
        words += ["--validate-on", Sent(given["validate_on"])]
    if given["threads"] is not None:
        words.append(f"--threads={given['threads']}")
    if given["as_json"]:
        words.append("--json")
    artifact = sent_artifact(
        deferred,
        allow_deferred=True,
        keep=lambda found: [_keep_artifact(found, destination)],
        shown=destination,
    )
    return Job(replace=(*words, "--finish", artifact))


def _whole(output: Path) -> Job:
    """The same build there: its target needs no device that defers it."""
    from edgehp.remote.errand import Returned

    def keep(found: Path) -> Sequence[Path]:
        return [
            _keep_artifact(path.parent, output / path.parent.name)
            for path in sorted(found.glob("*/manifest.json"))
        ]

    return Job({"output": Returned(output, folder=True, keep=keep)})


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


def _needs_its_device(given: Parameters) -> bool:
    """Whether the engine is built on the target's own device, and that is not this one."""
    from edgehp.artifact.device import HostProbe
    from edgehp.pipeline.plan import BuildRequest, find_place, make_plan

    plan = make_plan(BuildRequest(given["target"], given["precision"], dla=given["dla"]))
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


BENCH = Journey(sends=("frames",), plan=_bench)
VALIDATE = Journey(finds=("network", "reference", "boxes"), plan=_validate, data_root=True)
BUILD = Journey(sends=("calibration", "validate_on"), finds=("network",), plan=_build)
