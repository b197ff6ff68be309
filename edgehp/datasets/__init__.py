"""Data sets of head poses: AFLW2000-3D, BIWI, AFLW, 300W-LP, folders and zips of faces.

Each reader gives a `Dataset`: `Sample`s with box, rotation and a photo that is decoded when it is
asked for, what was skipped, and the protocol by which the samples were chosen.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from inspect import signature
from pathlib import Path
from types import MappingProxyType
from typing import Any

from edgehp.datasets import aflw, biwi, pose_mat
from edgehp.datasets.base import Dataset
from edgehp.datasets.faces import read_faces, read_rendered
from edgehp.errors import DataError, UsageError

_OPTIONS = {"boxes", "split", "rgb_cal"}
_FACES_LAYOUT = "NAME/NNNNN.jpg and NAME/boxes.csv, zips of these, or plain photos"
# What reads a data set, and the files that are expected under its root, in words.
_READERS: Mapping[str, tuple[Callable[..., Dataset], str]] = MappingProxyType(
    {
        "aflw2000": (pose_mat.read_aflw2000, pose_mat.AFLW2000_LAYOUT),
        "biwi": (biwi.read_biwi, biwi.LAYOUT),
        "aflw": (aflw.read_aflw, aflw.LAYOUT),
        "300w-lp": (pose_mat.read_300w_lp, pose_mat.W300LP_LAYOUT),
        "rendered": (read_rendered, _FACES_LAYOUT),
        "faces": (read_faces, _FACES_LAYOUT),
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
        name: ``"aflw2000"``, ``"biwi"``, ``"aflw"``, ``"300w-lp"``, ``"rendered"`` or ``"faces"``.
        root: where it is; None is an error that says so.
        skip_bad: count and list missing or damaged files instead of raising. Photos are decoded
            later: give `edgehp.datasets.base.prefetch` an ``on_bad`` for those.
        options: ``boxes`` (path of a box list), ``split`` (``"train"`` or ``"test"``) and
            ``rgb_cal`` (bool), see the readers; None means not given.

    Raises:
        UsageError: no such data set, no place, or an option that means nothing for it.
        DataError: it is not there, or something in it is missing or damaged.
    """
    if name not in _READERS:
        near = difflib.get_close_matches(name.lower(), _READERS, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"unknown data set {name!r}{hint} (known: {', '.join(_READERS)})")
    read, layout = _READERS[name]
    given = {k: v for k, v in options.items() if v is not None}
    means = set(signature(read).parameters) & _OPTIONS
    for option in given:
        if option not in means:
            known = ", ".join(sorted(means)) or "none"
            raise UsageError(f"the data set {name} has no option {option!r}; it has: {known}")
    if root is None:
        raise UsageError(f"{name}: say where it is with --data-root; expected there: {layout}")
    place = Path(root)
    if not place.exists():
        beside = [p.name for p in place.parent.iterdir()] if place.parent.is_dir() else []
        near = difflib.get_close_matches(place.name, beside, n=1)
        hint = f"; {place.parent / near[0]} is there" if near else ""
        raise DataError(f"{name}: not found at {place}{hint}; expected there: {layout}")
    return read(place, skip_bad=skip_bad, **given)
