"""Data sets of head poses: AFLW2000-3D, BIWI, AFLW, 300W-LP, folders and zips of faces.

Each reader gives a `Dataset`: `Sample`s with box, rotation and a photo that is decoded when it is
asked for, what was skipped, and the protocol by which the samples were chosen.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from types import MappingProxyType
from typing import Any

from edgehp.datasets import aflw, biwi, pose_mat
from edgehp.datasets.base import Dataset, Sample, Skip, Skips, prefetch
from edgehp.datasets.faces import read_faces, read_rendered
from edgehp.errors import DataError, UsageError

__all__ = [
    "DATASETS",
    "Dataset",
    "Sample",
    "Skip",
    "Skips",
    "open_dataset",
    "prefetch",
    "read_faces",
]


@dataclass(frozen=True)
class Entry:
    """A data set that `open_dataset` knows.

    Attributes:
        layout: the files expected under its root, in words.
        read: the function that reads it.
    """

    layout: str
    read: Callable[..., Dataset]

    @property
    def options(self) -> set[str]:
        """The options of `open_dataset` that mean something for it."""
        return set(signature(self.read).parameters) & _OPTIONS


_OPTIONS = {"boxes", "split", "rgb_cal"}
_FACES_LAYOUT = "NAME/NNNNN.jpg and NAME/boxes.csv, zips of these, or plain photos"

DATASETS: Mapping[str, Entry] = MappingProxyType(
    {
        "aflw2000": Entry(pose_mat.AFLW2000_LAYOUT, pose_mat.read_aflw2000),
        "biwi": Entry(biwi.LAYOUT, biwi.read_biwi),
        "aflw": Entry(aflw.LAYOUT, aflw.read_aflw),
        "300w-lp": Entry(pose_mat.W300LP_LAYOUT, pose_mat.read_300w_lp),
        "rendered": Entry(_FACES_LAYOUT, read_rendered),
        "faces": Entry(_FACES_LAYOUT, read_faces),
    }
)


def open_dataset(
    name: str,
    root: Path | str | None,
    *,
    skip_bad: bool = False,
    **options: Any,
) -> Dataset:
    """Open a data set.

    Args:
        name: a key of `DATASETS`.
        root: where it is; None is an error that says so.
        skip_bad: count and list missing or damaged files instead of raising. Photos are decoded
            later: give `edgehp.datasets.prefetch` an ``on_bad`` for those.
        options: ``boxes`` (path of a box list), ``split`` (``"train"`` or ``"test"``) and
            ``rgb_cal`` (bool), see the readers; None means not given.

    Raises:
        UsageError: no such data set, no place, or an option that means nothing for it.
        DataError: it is not there, or something in it is missing or damaged.
    """
    if (entry := DATASETS.get(name)) is None:
        near = difflib.get_close_matches(name.lower(), DATASETS, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"unknown data set {name!r}{hint} (known: {', '.join(DATASETS)})")
    given = {k: v for k, v in options.items() if v is not None}
    for option in given:
        if option not in entry.options:
            known = ", ".join(sorted(entry.options)) or "none"
            raise UsageError(f"the data set {name} has no option {option!r}; it has: {known}")
    if root is None:
        raise UsageError(
            f"{name}: say where it is with --data-root; expected there: {entry.layout}"
        )
    place = Path(root)
    if not place.exists():
        beside = [p.name for p in place.parent.iterdir()] if place.parent.is_dir() else []
        near = difflib.get_close_matches(place.name, beside, n=1)
        hint = f"; {place.parent / near[0]} is there" if near else ""
        raise DataError(f"{name}: not found at {place}{hint}; expected there: {entry.layout}")
    return entry.read(place, skip_bad=skip_bad, **given)
