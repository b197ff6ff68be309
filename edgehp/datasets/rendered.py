"""Rendered heads: a zip or folder with ``NNNNN.jpg`` and ``labels.csv``, written by the renderer.

``labels.csv`` has the columns of `edgehp.datasets.table` (size, box, angles, matrix), and ``nir``
(0 or 1: pseudo near-infrared) and ``seed`` (of the picture). The rotation is known exactly.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from edgehp.datasets.base import Dataset, Sample, Skips, build_dataset
from edgehp.datasets.photos import Archive, FilePhoto, PhotoSource, ZipPhoto, read_bytes
from edgehp.datasets.table import BOX, MATRIX, parse_table
from edgehp.errors import DataError

__all__ = ["LIST", "Origin", "read_origins", "read_rendered"]

LIST = "labels.csv"
_CLASH = "two lists of rendered heads"


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
    store = _Store(Path(path))
    skips = Skips(skip_bad)
    samples = []
    for row in parse_table(store.read(store.list), store.where, (*BOX, *MATRIX)):
        with skips.guard(row.image):
            samples.append(
                Sample(
                    row.image,
                    store.photo(row.image, row.line),
                    row.box,
                    row.matrix,
                    row.angles,
                    row.size,
                )
            )
    return build_dataset("rendered", samples, skips, boxes=LIST, convention="aflw2000")


def read_origins(path: Path | str) -> dict[str, Origin]:
    """The ``nir`` and ``seed`` columns by the image's name.

    Raises:
        DataError: the list is missing or lacks one of them, or one is not a whole number.
    """
    store = _Store(Path(path))
    text = store.read(store.list).decode("utf-8-sig", errors="replace")
    try:
        return {
            row["image"]: Origin(bool(int(row["nir"])), int(row["seed"]))
            for row in csv.DictReader(io.StringIO(text, newline=""))
        }
    except (KeyError, TypeError, ValueError, csv.Error) as e:
        raise DataError(
            f"{store.where}: expected whole numbers in the columns image,nir,seed: {e}"
        ) from e


class _Store:
    """The one ``labels.csv`` of a zip or folder, and the photos beside it."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise DataError(f"{path}: no such file or folder; expected rendered heads with {LIST}")
        self.path = path
        self.archive = None if path.is_dir() else Archive(path)
        if self.archive is None:
            names = [p.relative_to(path).as_posix() for p in path.rglob(LIST)]
        else:
            names = [n for n in self.archive.members if PurePosixPath(n).name == LIST]
        if len(names) != 1:
            found = f"{_CLASH}: {', '.join(sorted(names)[:3])}" if names else f"no {LIST}"
            raise DataError(f"{path}: {found}; expected NNNNN.jpg files and one {LIST}")
        self.list = names[0]
        self.where = f"{path}/{self.list}"
        self.names = set(self.archive.members) if self.archive else None

    def read(self, name: str) -> bytes:
        """The bytes of a member."""
        if self.archive is not None:
            return self.archive.read(name)
        return read_bytes(self.path / name, "a CSV list")

    def photo(self, image: str, line: int) -> PhotoSource:
        """The photo that a row names, relative to the list."""
        inside = PurePosixPath(image)
        if inside.is_absolute() or ".." in inside.parts or "\\" in image:
            raise DataError(f"{self.where}: line {line}: {image!r} leaves the data set")
        name = str(PurePosixPath(self.list).parent / inside)
        there = name in self.names if self.names is not None else (self.path / name).is_file()
        if not there:
            raise DataError(f"{self.where}: line {line}: the photo {image} is not there")
        if self.archive is not None:
            return ZipPhoto(self.archive, name)
        return FilePhoto(self.path / name)
