"""``edgehp distill``: the student, from labels or teachers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from edgehp.cli import _training
from edgehp.errors import UsageError

__all__ = ["command"]


@click.command("distill", short_help="Distil teachers into the student network.")
@click.argument("photos", nargs=-1, type=click.Path(exists=True, path_type=Path))
@click.option(
    "--network", default="kd-resnet18", show_default=True, help="kd-resnet18 ... 152, or ehpnet."
)
@click.option(
    "--teacher",
    "teachers",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A teacher checkpoint of the student's bins: learn the mean of the teachers' soft labels.",
)
@click.option(
    "--limit",
    type=click.IntRange(0),
    default=0,
    help="Photos at most, evenly spread: for a short fine-tune. Default: all.",
)
@_training.training_options
def command(
    photos: tuple[Path, ...],
    network: str,
    teachers: tuple[Path, ...],
    out: Path,
    **options: Any,
) -> None:
    """Distil on PHOTOS (folders or zips of faces); an interrupted run is resumed.

    With --labels the student learns an ensemble of offsets ('edgehp label'); with --teacher, once
    or more, it learns the mean of the teachers' soft labels on the same augmented crops.
    """
    _training.require_torch()
    if not teachers and not options["labels"]:
        raise UsageError("distil from what? Give --labels of 'edgehp label', or --teacher")
    from edgehp.training.runs import train_final

    run = _training.run_of(photos, network, out, options)
    if 0 < options["limit"] < len(run.items):
        count, n = options["limit"], len(run.items)
        run = replace(run, items=[run.items[i * n // count] for i in range(count)])
    with _training.progress_bar(run.config.epochs) as report:
        result = train_final(replace(run, report=report), teachers)
    _training.print_result(result)
