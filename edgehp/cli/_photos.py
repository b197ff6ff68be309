"""Photos as the command line names them, and their depth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgehp.errors import UsageError

if TYPE_CHECKING:
    from edgehp.datasets.base import Dataset

DATASETS = ("aflw2000", "biwi", "aflw", "300w-lp", "rendered", "faces")

# Of every command that reads photos. Nothing is guessed: 10 bits in 16 look like a dark photo.
photo_depth = click.option(
    "--photo-depth",
    type=click.IntRange(8, 16),
    metavar="BITS",
    envvar="EDGEHP_PHOTO_BITS",
    help="Of photos with 16 bits a sample: the camera's bits, 10, 12, 14 or 16.",
)
skip_bad = click.option(
    "--skip-bad", is_flag=True, help="Leave damaged photos out, counted and listed."
)


def open_photos(
    sources: Sequence[Path], dataset: str | None, skip_bad: bool, depth: int | None = None
) -> Dataset:
    """Folders and zips of faces as one data set, or a named data set at one root.

    Raises:
        UsageError: a named data set without one root, or nothing at all.
        DataError: as the readers say.
    """
    from edgehp.datasets import open_dataset
    from edgehp.datasets.base import join_datasets
    from edgehp.datasets.faces import read_faces

    if dataset is not None:
        if len(sources) != 1:
            raise UsageError(f"--dataset {dataset} takes one root, found {len(sources)}")
        return open_dataset(dataset, sources[0], skip_bad=skip_bad).with_depth(depth)
    if not sources:
        raise UsageError("name at least one folder or zip of faces, or a --dataset")
    parts = [read_faces(source, skip_bad=skip_bad) for source in sources]
    found = parts[0] if len(parts) == 1 else join_datasets("faces", parts)
    return found.with_depth(depth)
