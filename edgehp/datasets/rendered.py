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
from edgehp.datasets.photos import PhotoSource
from edgehp.datasets.stores import inside, open_store
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
    return build_dataset("rendered", samples, skips, boxes=LIST, convention="aflw2000")


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
            raise DataError(f"{path}: no such file or folder; expected rendered heads with {LIST}")
        self._store = open_store(path)
        self._names = frozenset(self._store.names())
        lists = sorted(n for n in self._names if PurePosixPath(n).name == LIST)
        if len(lists) != 1:
            found = f"{_CLASH}: {', '.join(lists[:3])}" if lists else f"no {LIST}"
            raise DataError(f"{path}: {found}; expected NNNNN.jpg files and one {LIST}")
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
