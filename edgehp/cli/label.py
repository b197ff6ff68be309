"""``edgehp label``: pose labels from teachers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from edgehp.cli._command import (
    PATH,
    json_option,
    note,
    open_photos,
    output_option,
    photo_depth_option,
    skip_bad_option,
    subcommand,
    worker_options,
)
from edgehp.cli._output import answer
from edgehp.errors import UsageError
from edgehp.progress import step as begin


@subcommand(
    "label",
    "edgehp label faces.zip --teacher docs/teachers/fsanet.toml --output labels",
    "edgehp label faces.zip --teacher base.toml --workers 4 --output labels",
    renamed={"--out": "--output", "--threads": "--photos-at-once"},
)
@click.argument("photos", nargs=-1, type=click.Path(exists=True, path_type=Path))
@click.option("--dataset", help="A named data set (aflw2000, ...) in place of folders and zips.")
@click.option(
    "--teacher",
    "teacher_files",
    multiple=True,
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A teacher's TOML description; may be given several times.",
)
@click.option(
    "--model-dir",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Where the teachers' ONNX files are; default: beside their descriptions.",
)
@click.option("--grid", type=int, help="Box offsets per axis (odd); default: as described.")
@click.option("--step", type=float, help="Distance of offsets, times the box side.")
@click.option("--flip/--no-flip", default=None, help="Average with the mirrored photo too.")
@output_option("Folder of the labels.", required=True)
@worker_options
@click.option(
    "--remote-data-root",
    type=PATH,
    metavar="DIR",
    help="With --cluster: where PHOTOS are on the workers. Default: they are sent.",
)
@click.option(
    "--photos-at-once",
    "threads",
    type=click.IntRange(1),
    default=2,
    help="Photos that a worker does at a time.",
)
@photo_depth_option
@skip_bad_option
@json_option
def command(
    photos: tuple[Path, ...],
    dataset: str | None,
    teacher_files: tuple[Path, ...],
    model_dir: Path | None,
    grid: int | None,
    step: float | None,
    flip: bool | None,
    output: Path,
    workers: int,
    cluster: str | None,
    remote_data_root: Path | None,
    threads: int,
    photo_depth: int | None,
    skip_bad: bool,
    as_json: bool,
) -> None:
    """Label PHOTOS (folders or zips of faces) with the mean rotation and spread of the teachers.

    A run that was interrupted goes on where it stopped. The labels do not depend on who computes
    them, or on how many.
    """
    from msgspec.structs import replace

    from edgehp.cluster import Workers
    from edgehp.datasets.base import Skips
    from edgehp.networks.description import load_description
    from edgehp.training.labelling import label_samples

    place = Workers(workers, cluster)
    specs = []
    for file in teacher_files:
        spec = load_description(file, model_dir)
        given = {"size": grid, "step": step, "flip": flip}
        changes: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
        specs.append(spec.with_grid(replace(spec.grid, **changes)))
    data = open_photos(photos, dataset, skip_bad, photo_depth)
    skips = Skips(skip_bad)
    labels = label_samples(
        data.samples,
        specs,
        output,
        threads=threads,
        skips=skips,
        workers=place,
        places=_places(photos, remote_data_root, cluster),
    )
    began, first = time.monotonic(), next(labels)
    last = first
    with begin("label", len(data.samples) - first, "photos") as progress:
        for last in labels:
            progress.advance(last - first - progress.done)
    rate = (last - first) / max(time.monotonic() - began, 1e-9)
    skipped = (*data.skipped, *skips.found)
    listed = [{"name": s.name, "reason": s.reason} for s in skipped]
    answer(
        as_json,
        {"labels": output, "count": last, "skipped": listed},
        f"{last} photos labelled in {output} ({rate:.1f} images/s)",
    )
    if skipped:
        note(f"{len(skipped)} photos skipped")


def _places(
    photos: tuple[Path, ...], there: Path | None, cluster: str | None
) -> tuple[Path, Path] | None:
    """Where the photos are here and on the workers; None where they are sent."""
    if there is None:
        return None
    if cluster is None or len(photos) != 1:
        raise UsageError(
            "--remote-data-root names the place of one folder or zip on the workers of a "
            f"--cluster, found {len(photos)} here\nhint: without it the photos are sent"
        )
    return photos[0], there
