"""Folders and zips of face photos, with or without boxes and labels.

``NAME/NNNNN.jpg`` with ``NAME/boxes.csv`` (see `edgehp.datasets.table` for the columns); a plain
folder of photos without a list, where the whole photo is the box; a folder of such zips. Zips are
read in place: nothing is extracted.

Rendered heads are such a zip or folder, with the renderer's ``labels.csv``: size, box, angles and
matrix, which is known exactly, and ``nir`` (0 or 1: pseudo near-infrared) and ``seed`` (of the
picture).
"""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from edgehp.datasets.base import Dataset, Sample, Skips, build_dataset, join_datasets
from edgehp.datasets.stores import PhotoSource, Store, inside, open_store
from edgehp.datasets.table import ANGLES, BOX, MATRIX, Row, parse_table
from edgehp.errors import DataError
from edgehp.images import PHOTO_SUFFIXES, read_bytes

__all__ = ["Origin", "read_faces", "read_origins", "read_rendered"]

logger = logging.getLogger(__name__)

_LIST = "boxes.csv"
# Rendered heads call the same table, with labels in it, by its content.
_LABELS = "labels.csv"
_LISTS = (_LIST, _LABELS)


def read_faces(
    path: Path | str,
    *,
    skip_bad: bool = False,
    labels: Path | str | None = None,
    name: str = "faces",
) -> Dataset:
    """Read a folder or zip of face photos.

    Args:
        path: a zip, a folder of photos, or a folder of zips (taken in the order of their names).
        skip_bad: list a missing photo under ``skipped`` instead of raising. Photos are decoded
            later, by `Sample.load`.
        labels: CSV file with image,pitch,yaw,roll in degrees, and a box if there is one; photos it
            does not name are left out and counted. It takes the place of the folder's own labels.
        name: the data set's name.

    Raises:
        DataError: nothing there, a list is malformed, or names a photo that is not there.
    """
    root = Path(path)
    if not root.exists():
        raise DataError(f"{root}: no such file or folder; expected photos or a zip of photos")
    if root.is_dir():
        zips = sorted(p for p in root.iterdir() if p.suffix.lower() == ".zip")
        if not zips:
            return _read(open_store(root), skip_bad, labels, name)
        if labels is not None:
            raise DataError(f"{root}: {len(zips)} zips in a folder; give one with a labels file")
        loose = [p.name for p in root.iterdir() if p.suffix.lower() in PHOTO_SUFFIXES]
        if loose:
            raise DataError(f"{root}: both zips and photos ({loose[0]}, ...): which are meant?")
        return join_datasets(name, [_read(open_store(z), skip_bad, None, z.stem) for z in zips])
    return _read(open_store(root), skip_bad, labels, name)


def _read(store: Store, skip_bad: bool, labels: Path | str | None, name: str) -> Dataset:
    members = store.names()
    photos = sorted(m for m in members if PurePosixPath(m).suffix.lower() in PHOTO_SUFFIXES)
    if not photos:
        raise DataError(
            f"{store.where}: no photos; expected NAME/NNNNN.jpg with NAME/{_LIST}, or a folder of "
            f"{', '.join(PHOTO_SUFFIXES)} files"
        )
    skips = Skips(skip_bad)
    rows: dict[str, Row] = {}
    for member in sorted(m for m in members if PurePosixPath(m).name.lower() in _LISTS):
        where = f"{store.where}/{member}"
        folder = str(PurePosixPath(member).parent)
        _collect(parse_table(store.read(member), where), photos, folder, where, rows, skips)
    listed = bool(rows) or bool(skips.found)
    unused = [m for m in members if _is_unused_list(m)]
    if unused:
        logger.warning(
            "%s: %d lists are not used (%s): a list of boxes or labels is called %s",
            store.where,
            len(unused),
            ", ".join(unused[:3]),
            " or ".join(_LISTS),
        )
    chosen: Mapping[str, Row] = rows
    if labels is not None:
        chosen = _labelled(Path(labels), photos, rows, skips)
    elif not listed:
        chosen = {p: Row(0, p) for p in photos}
    samples = [
        # Boxes and labels refer to the pixels as stored; without them, up is up.
        Sample(p, store.photo(p), r.box, r.matrix, r.angles, r.size, upright=r.line == 0)
        for p, r in chosen.items()
    ]
    boxed = sum(s.box is not None for s in samples)
    source = "whole photo" if boxed == 0 else _LIST if labels is None else f"{_LIST} or labels file"
    return build_dataset(
        name,
        samples,
        skips,
        boxes=source if boxed in (0, len(samples)) else f"{source}, whole photo where none",
        convention="aflw2000" if any(s.matrix is not None for s in samples) else None,
        photos_not_listed=len(set(photos) - set(chosen)),
    )


def _is_unused_list(member: str) -> bool:
    path = PurePosixPath(member)
    return path.suffix.lower() in (".csv", ".tsv") and path.name.lower() not in _LISTS


def _collect(
    table: Sequence[Row],
    photos: Sequence[str],
    folder: str,
    where: str,
    into: dict[str, Row],
    skips: Skips,
) -> None:
    """Add the rows of one list under the names of their photos."""
    known = set(photos)
    for row in table:
        with skips.guard(row.image):
            photo = _resolve(row.image, folder, known, f"{where}: line {row.line}")
            if photo in into:
                raise DataError(f"{where}: line {row.line}: {row.image} is listed twice")
            into[photo] = row


def _resolve(image: str, folder: str, known: set[str], at: str) -> str:
    """The photo an image column means: relative to the root, to the list, or to its parent."""
    path = inside(image, at)
    candidates = [path, PurePosixPath(folder) / path]
    if len(path.parts) > 1:  # the list lies in NAME/ and says NAME/NNNNN.jpg
        candidates.append(PurePosixPath(folder, *path.parts[1:]))
    for candidate in map(str, candidates):
        if candidate in known:
            return candidate
    raise DataError(f"{at}: the photo {image} is not there; expected {candidates[-1]}")


def _labelled(
    path: Path, photos: Sequence[str], boxes: Mapping[str, Row], skips: Skips
) -> dict[str, Row]:
    """Rows of a labels file, with the folder's boxes where it has none of its own."""
    rows: dict[str, Row] = {}
    table = parse_table(read_bytes(path, "a CSV file of labels"), str(path), ANGLES)
    _collect(table, photos, ".", str(path), rows, skips)
    merged = {}
    for photo, row in rows.items():
        own = boxes.get(photo)
        if own is not None and row.box is None:
            row = Row(row.line, row.image, own.size, own.box, row.matrix, row.angles)
        merged[photo] = row
    return merged


@dataclass(frozen=True)
class Origin:
    """How a picture came to be: pseudo near-infrared or colour, and the renderer's seed."""

    nir: bool
    seed: int


def read_rendered(path: Path | str, *, skip_bad: bool = False) -> Dataset:
    """Read rendered heads.

    Args:
        path: a zip, or a folder, with one ``labels.csv``.
        skip_bad: list missing photos under ``skipped`` instead of raising.

    Raises:
        DataError: nothing there, the list is missing or malformed, or names a photo that is not
            there.
    """
    heads = _Rendered(Path(path))
    skips = Skips(skip_bad)
    samples = []
    for row in parse_table(heads.table(), heads.where, (*BOX, *MATRIX)):
        with skips.guard(row.image):
            samples.append(
                Sample(
                    row.image,
                    heads.photo(row.image, row.line),
                    row.box,
                    row.matrix,
                    row.angles,
                    row.size,
                )
            )
    return build_dataset("rendered", samples, skips, boxes=_LABELS, convention="aflw2000")


def read_origins(path: Path | str) -> dict[str, Origin]:
    """The ``nir`` and ``seed`` columns by the image's name.

    Raises:
        DataError: the list is missing or lacks one of them, or one is not a whole number.
    """
    heads = _Rendered(Path(path))
    text = heads.table().decode("utf-8-sig", errors="replace")
    try:
        return {
            row["image"]: Origin(bool(int(row["nir"])), int(row["seed"]))
            for row in csv.DictReader(io.StringIO(text, newline=""))
        }
    except (KeyError, TypeError, ValueError, csv.Error) as e:
        raise DataError(
            f"{heads.where}: expected whole numbers in the columns image,nir,seed: {e}"
        ) from e


class _Rendered:
    """The one ``labels.csv`` of a zip or folder, and the photos beside it."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise DataError(f"{path}: no such file or folder; expected heads with {_LABELS}")
        self._store = open_store(path)
        self._names = frozenset(self._store.names())
        lists = sorted(n for n in self._names if PurePosixPath(n).name == _LABELS)
        if len(lists) != 1:
            found = f"two lists: {', '.join(lists[:3])}" if lists else f"no {_LABELS}"
            raise DataError(f"{path}: {found}; expected NNNNN.jpg files and one {_LABELS}")
        self._list = lists[0]
        self.where = f"{path}/{self._list}"

    def table(self) -> bytes:
        """The bytes of the list."""
        return self._store.read(self._list)

    def photo(self, image: str, line: int) -> PhotoSource:
        """The photo that a row names, relative to the list."""
        at = f"{self.where}: line {line}"
        name = str(PurePosixPath(self._list).parent / inside(image, at))
        if name not in self._names:
            raise DataError(f"{at}: the photo {image} is not there")
        return self._store.photo(name)
