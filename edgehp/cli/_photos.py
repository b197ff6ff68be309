"""Photos for labelling and training, as the command line names them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgehp.errors import UsageError

if TYPE_CHECKING:
    from edgehp.datasets.base import Dataset

__all__ = ["open_photos"]


def open_photos(sources: Sequence[Path], dataset: str | None, skip_bad: bool) -> Dataset:
    """Folders and zips of faces as one data set, or a named data set at one root.

    Raises:
        UsageError: a named data set with more than one root, or nothing at all.
        DataError: as the readers say.
    """
    from edgehp.datasets import open_dataset
    from edgehp.datasets.base import join_datasets
    from edgehp.datasets.faces import read_faces

    if dataset is not None:
        if len(sources) > 1:
            raise UsageError(f"--dataset {dataset} takes one root, found {len(sources)}")
        return open_dataset(dataset, sources[0] if sources else None, skip_bad=skip_bad)
    if not sources:
        raise UsageError("name at least one folder or zip of faces, or a --dataset")
    parts = [read_faces(source, skip_bad=skip_bad) for source in sources]
    return parts[0] if len(parts) == 1 else join_datasets("faces", parts)
