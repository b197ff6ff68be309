"""Data sets by name, and where they are looked for."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from edgehp.datasets import aflw, biwi, pose_mat
from edgehp.datasets.base import Dataset
from edgehp.datasets.faces import read_faces, read_rendered
from edgehp.errors import DataError, UsageError
from edgehp.files import require_utf8

__all__ = ["DATASETS", "Entry", "dataset_entry", "find_root", "open_dataset"]


@dataclass(frozen=True)
class Entry:
    """A data set that `open_dataset` knows.

    Attributes:
        name: its name on the command line.
        layout: the files expected under its root, in words.
        options: the options of `open_dataset` that mean something for it.
        read: the function that reads it.
    """

    name: str
    layout: str
    options: frozenset[str]
    read: Callable[..., Dataset]


_FACES_LAYOUT = "NAME/NNNNN.jpg and NAME/boxes.csv, zips of these, or plain photos"

DATASETS: Mapping[str, Entry] = MappingProxyType(
    {
        e.name: e
        for e in (
            Entry(
                "aflw2000",
                pose_mat.AFLW2000_LAYOUT,
                frozenset({"boxes", "max_angle"}),
                pose_mat.read_aflw2000,
            ),
            Entry(
                "biwi",
                biwi.LAYOUT,
                frozenset({"boxes", "split", "max_angle", "rgb_cal"}),
                biwi.read_biwi,
            ),
            Entry("aflw", aflw.LAYOUT, frozenset({"boxes", "split", "max_angle"}), aflw.read_aflw),
            Entry(
                "300w-lp",
                pose_mat.W300LP_LAYOUT,
                frozenset({"boxes", "max_angle", "flipped"}),
                pose_mat.read_300w_lp,
            ),
            Entry("rendered", _FACES_LAYOUT, frozenset(), read_rendered),
            Entry("faces", _FACES_LAYOUT, frozenset({"labels"}), read_faces),
        )
    }
)


def dataset_entry(name: str) -> Entry:
    """The data set called `name`.

    Raises:
        UsageError: no such data set; the message suggests a near name.
    """
    try:
        return DATASETS[name]
    except KeyError:
        near = difflib.get_close_matches(name.lower(), DATASETS, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        known = ", ".join(DATASETS)
        raise UsageError(f"unknown data set {name!r}{hint} (known: {known})") from None


def find_root(name: str, root: Path | str | None = None) -> Path:
    """The place of the data set `name`.

    It is `root` if given, else ``$EDGEHP_DATA/<name>``, else ``data/<name>``. An explicit root or
    an ``$EDGEHP_DATA`` without the data set is an error, not a reason to look further.

    Raises:
        UsageError: no such data set.
        DataError: nothing there, or its name is not UTF-8; the message says what was tried.
    """
    entry = dataset_entry(name)
    if root is not None:
        place, tried = Path(root), f"{root} (--data-root)"
    elif base := os.environ.get("EDGEHP_DATA"):
        place = Path(base) / name
        tried = f"{place} ($EDGEHP_DATA/{name})"
    else:
        place = Path("data") / name
        tried = f"{place} (--data-root and $EDGEHP_DATA are not set)"
    require_utf8(place)
    if place.exists():
        return place
    near = []
    if place.parent.is_dir():
        near = difflib.get_close_matches(place.name, [p.name for p in place.parent.iterdir()], n=1)
    hint = f"; {place.parent / near[0]} is there" if near else ""
    raise DataError(f"{name}: not found at {tried}{hint}; expected there: {entry.layout}")


def open_dataset(
    name: str,
    root: Path | str | None = None,
    *,
    skip_bad: bool = False,
    **options: Any,
) -> Dataset:
    """Open a data set.

    Args:
        name: a key of `DATASETS`.
        root: where it is; see `find_root` for None.
        skip_bad: count and list missing or damaged files instead of raising. Photos are decoded
            later: give `edgehp.datasets.prefetch` an ``on_bad`` for those.
        options: ``boxes`` (path of a box list), ``split`` (``"train"`` or ``"test"``),
            ``max_angle`` (degrees or None), ``rgb_cal`` (bool), ``flipped`` (bool), ``labels``
            (path of a CSV file); None means not given, but for ``max_angle``, where it means no
            filter. See the readers for each.

    Raises:
        UsageError: no such data set, or an option that means nothing for it.
        DataError: it is not there, or something in it is missing or damaged.
    """
    entry = dataset_entry(name)
    given = {k: v for k, v in options.items() if v is not None or k == "max_angle"}
    for option in given:
        if option not in entry.options:
            known = ", ".join(sorted(entry.options)) or "none"
            raise UsageError(f"the data set {name} has no option {option!r}; it has: {known}")
    return entry.read(find_root(name, root), skip_bad=skip_bad, **given)
