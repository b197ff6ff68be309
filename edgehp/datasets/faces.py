"""Folders and zips of face photos, with or without boxes and labels.

``NAME/NNNNN.jpg`` with ``NAME/boxes.csv`` or ``boxes.json`` (see `edgehp.datasets.lists`), or
``labels.csv``, or boxes and labels in one each; a plain folder of photos without a list, where the
whole photo is the box; a folder of such zips. Zips are read in place: nothing is extracted.

Rendered heads are such a zip or folder, with the renderer's ``labels.csv``: size, box, angles and
matrix, which is known exactly, and ``nir`` (0 or 1: pseudo near-infrared) and ``seed`` (of the
picture).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from edgehp.datasets.base import Dataset, Sample, Skips, build_dataset, join_datasets
from edgehp.datasets.lists import Row, parse_list
from edgehp.datasets.stores import NameIndex, Store, inside, open_store
from edgehp.errors import DataError
from edgehp.images import PHOTO_SUFFIXES, report_left_out

logger = logging.getLogger(__name__)

_LIST = "boxes.csv"
# Rendered heads call the same table, with labels in it, by its content.
_LABELS = "labels.csv"
_LISTS = (_LIST, "boxes.json", _LABELS)


def read_faces(
    path: Path | str,
    *,
    skip_bad: bool = False,
    name: str = "faces",
) -> Dataset:
    """Read a folder or zip of face photos.

    Files that are not used, such as lists of another name, are said in a warning.

    Args:
        path: a zip, a folder of photos, or a folder of zips (taken in the order of their names).
        skip_bad: list a missing photo under ``skipped`` instead of raising. Photos are decoded
            later, by `Sample.load`.
        name: the data set's name.

    Raises:
        DataError: nothing there, a list is malformed, or names a photo that is not there.
    """
    root = Path(path)
    if not root.exists():
        what = "a link to nowhere" if root.is_symlink() else "no such file or folder"
        raise DataError(f"{root}: {what}; expected photos or a zip of photos")
    store = open_store(root)
    zips = [n for n in store.names if "/" not in n and n.lower().endswith(".zip")]
    if not root.is_dir() or not zips:
        return _read(store, skip_bad, name)
    if loose := [n for n in store.names if PurePosixPath(n).suffix.lower() in PHOTO_SUFFIXES]:
        raise DataError(f"{root}: both zips and photos ({loose[0]}, ...): which are meant?")
    _report(store, zips)
    parts = [_read(open_store(root / z), skip_bad, Path(z).stem) for z in zips]
    return join_datasets(name, parts)


def _read(store: Store, skip_bad: bool, name: str) -> Dataset:
    photos = [m for m in store.names if PurePosixPath(m).suffix.lower() in PHOTO_SUFFIXES]
    photos.sort()
    lists = sorted(m for m in store.names if PurePosixPath(m).name.lower() in _LISTS)
    _report(store, lists)
    if not photos:
        raise DataError(
            f"{store.where}: no photos; expected NAME/NNNNN.jpg with NAME/{_LIST}, or a folder of "
            f"{', '.join(PHOTO_SUFFIXES)} files"
        )
    index = NameIndex(photos)
    skips = Skips(skip_bad)
    rows: dict[str, Row] = {}
    for member in lists:
        where = f"{store.where}/{member}"
        folder = str(PurePosixPath(member).parent)
        _collect(parse_list(store.read(member), where), index, folder, where, rows, skips)
    # Boxes and labels refer to the pixels as stored; without them, up is up.
    upright = not rows and not skips.found
    if upright:
        rows = {p: Row(0, p) for p in photos}
    if not_listed := len(photos) - len(rows):
        logger.warning(
            "%s: %d of %d photos are not in its list and are left out",
            store.where,
            not_listed,
            len(photos),
        )
    samples = [
        Sample(p, store.photo(p), r.box, r.matrix, r.angles, r.size, upright=upright)
        for p, r in rows.items()
    ]
    boxed = sum(s.box is not None for s in samples)
    named = sorted({PurePosixPath(m).name for m in lists})
    source = "whole photo" if boxed == 0 else ", ".join(named)
    return build_dataset(
        name,
        samples,
        skips,
        boxes=source if boxed in (0, len(samples)) else f"{source}, whole photo where none",
        convention="aflw2000" if any(s.matrix is not None for s in samples) else None,
        photos_not_listed=not_listed,
    )


def _report(store: Store, used: Sequence[str]) -> None:
    """Say what of a folder or zip is not used."""
    known = set(used)
    report_left_out(
        store.where,
        store.left_out,
        (n for n in store.names if n not in known),
        remedy=f"; those that are used are called {', '.join(_LISTS)}",
    )


def _collect(
    table: Sequence[Row],
    photos: NameIndex,
    folder: str,
    where: str,
    into: dict[str, Row],
    skips: Skips,
) -> None:
    """Add the rows of one list under the names of their photos, to those of other lists."""
    for row in table:
        with skips.guard(row.image):
            at = f"{where}: line {row.line}" if row.line else where
            photo = _resolve(row.image, folder, photos, at)
            joined = _joined(into[photo], row) if photo in into else row
            if joined is None:
                raise DataError(f"{at}: {row.image} is listed twice; expected one face a photo")
            into[photo] = joined


def _joined(one: Row, other: Row) -> Row | None:
    """What two rows say of one photo, a box and a label; None where both give a box or a label."""
    if (one.box is not None and other.box is not None) or (
        one.angles is not None and other.angles is not None
    ):
        return None
    box, labelled = one.box or other.box, one if other.angles is None else other
    size = one.size or other.size
    return Row(other.line, other.image, size, box, labelled.matrix, labelled.angles)


def _resolve(image: str, folder: str, photos: NameIndex, at: str) -> str:
    """The photo an image column means: relative to the root, to the list, or to its parent."""
    path = inside(image, at)
    candidates = [path, PurePosixPath(folder) / path]
    if len(path.parts) > 1:  # the list lies in NAME/ and says NAME/NNNNN.jpg
        candidates.append(PurePosixPath(folder, *path.parts[1:]))
    for candidate in map(str, candidates):
        if (found := photos.find(candidate)) is not None:
            return found
    raise DataError(
        f"{at}: the photo {image} is not there; expected {candidates[-1]}{photos.hint(image)}"
    )


def read_rendered(path: Path | str, *, skip_bad: bool = False) -> Dataset:
    """Read rendered heads: faces whose list gives each its box and its exact rotation.

    Args:
        path: as of `read_faces`.
        skip_bad: list missing photos under ``skipped`` instead of raising.

    Raises:
        DataError: as of `read_faces`, or a photo is without box or rotation.
    """
    found = read_faces(path, skip_bad=skip_bad, name="rendered")
    if any(s.box is None or s.matrix is None for s in found.samples):
        raise DataError(
            f"{path}: photos without a box or a rotation; expected heads with the {_LABELS} that "
            "the renderer writes"
        )
    return found
