"""``edgehp label``: pose labels from teachers."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import Any

import click

from edgehp.errors import UsageError

__all__ = ["command"]


@click.command("label", short_help="Label photos with an ensemble of teacher networks.")
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
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the labels.")
@click.option(
    "--shard", default="0/1", show_default=True, help="I/N: label every N-th photo, from the I-th."
)
@click.option("--threads", default=2, show_default=True, help="Photos worked on at a time.")
@click.option("--skip-bad", is_flag=True, help="Leave damaged photos out, counted and listed.")
def command(
    photos: tuple[Path, ...],
    dataset: str | None,
    teacher_files: tuple[Path, ...],
    model_dir: Path | None,
    grid: int | None,
    step: float | None,
    flip: bool | None,
    out: Path,
    shard: str,
    threads: int,
    skip_bad: bool,
) -> None:
    """Label PHOTOS (folders or zips of faces) with the mean rotation and spread of the teachers.

    A run that was interrupted goes on where it stopped.
    """
    from msgspec.structs import replace

    from edgehp.cli._photos import open_photos
    from edgehp.datasets.base import Skips
    from edgehp.training.labelling import label_samples
    from edgehp.training.labelling import shard as take
    from edgehp.training.teachers import Teacher, load_teacher_spec

    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    if match is None:
        raise UsageError(f"--shard {shard!r}: expected I/N, such as 0/4")
    if threads < 1:
        raise UsageError("--threads must be at least 1")
    specs = []
    for file in teacher_files:
        spec = load_teacher_spec(file, model_dir)
        given = {"size": grid, "step": step, "flip": flip}
        changes: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
        specs.append(spec.with_grid(replace(spec.grid, **changes)))
    data = open_photos(photos, dataset, skip_bad)
    samples = take(data.samples, int(match[1]), int(match[2]))
    skips = Skips(skip_bad)
    began, first, last = time.monotonic(), 0, 0
    ready = [Teacher(s) for s in specs]
    bar: Any
    with click.progressbar(length=len(samples), label="labelling", file=sys.stderr) as bar:
        for i, count in enumerate(label_samples(samples, ready, out, threads=threads, skips=skips)):
            if i == 0:
                first = count
            bar.update(count - last)
            last = count
    rate = (last - first) / max(time.monotonic() - began, 1e-9)
    click.echo(f"{last} photos labelled in {out} ({rate:.1f} images/s)")
    for skip in (*data.skipped, *skips.found):
        click.echo(f"skipped {skip.name}: {skip.reason}", err=True)
    if skipped := len(data.skipped) + len(skips.found):
        click.echo(f"{skipped} photos skipped", err=True)
