"""``edgehp train``: the base network, or a final network on given labels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from edgehp.cli import _training

__all__ = ["command"]


@click.command("train", short_help="Train the base network (stage 1) or a network on labels.")
@click.argument("photos", nargs=-1, type=click.Path(exists=True, path_type=Path))
@click.option(
    "--network",
    default="base",
    show_default=True,
    help="base (one regression and four RvC heads), kd-resnet18 ... kd-resnet152, or ehpnet.",
)
@click.option("--depth", default=18, show_default=True, help="ResNet depth of the base network.")
@_training.training_options
def command(photos: tuple[Path, ...], network: str, depth: int, out: Path, **options: Any) -> None:
    """Train on PHOTOS (folders or zips of faces) with labels; an interrupted run is resumed.

    Start it with torchrun to use several GPUs or machines. The base network is the teacher of the
    next stage: 'edgehp label --teacher RUN/base.toml --grid 5', then 'edgehp distill'.
    """
    _training.require_torch()
    from edgehp.training.runs import train_base, train_final

    base = network == "base"
    run = _training.run_of(photos, f"kd-resnet{depth}" if base else network, out, options)
    with _training.progress_bar(run.config.epochs) as report:
        run = replace(run, report=report)
        result = train_base(run) if base else train_final(run)
    _training.print_result(result)
