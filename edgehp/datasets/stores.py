"""A folder or a zip of photos and lists, read alike; zips in place, nothing is extracted."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Protocol

from edgehp.datasets.photos import Archive, FilePhoto, PhotoSource, ZipPhoto, read_bytes
from edgehp.errors import DataError

__all__ = ["Store", "inside", "open_store"]


class Store(Protocol):
    """A folder or a zip: names with ``/``, relative to it."""

    @property
    def where(self) -> str:
        """Its path, for messages."""

    def names(self) -> list[str]:
        """Every file in it."""

    def read(self, name: str) -> bytes:
        """The bytes of a CSV list.

        Raises:
            DataError: missing, unreadable, damaged or too large.
        """

    def photo(self, name: str) -> PhotoSource:
        """A photo, not yet read."""


class _Folder:
    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def where(self) -> str:
        return str(self.path)

    def names(self) -> list[str]:
        return [p.relative_to(self.path).as_posix() for p in self.path.rglob("*") if p.is_file()]

    def read(self, name: str) -> bytes:
        return read_bytes(self.path / name, "a CSV list")

    def photo(self, name: str) -> PhotoSource:
        return FilePhoto(self.path / name)


class _Zip:
    def __init__(self, path: Path) -> None:
        self.archive = Archive(path)

    @property
    def where(self) -> str:
        return str(self.archive.path)

    def names(self) -> list[str]:
        return list(self.archive.members)

    def read(self, name: str) -> bytes:
        return self.archive.read(name)

    def photo(self, name: str) -> PhotoSource:
        return ZipPhoto(self.archive, name)


def open_store(path: Path) -> Store:
    """The folder or zip at `path`, which exists.

    Raises:
        DataError: a file that is not a complete zip.
    """
    return _Folder(path) if path.is_dir() else _Zip(path)


def inside(image: str, at: str) -> PurePosixPath:
    """The path that a list names, which must not leave the data set.

    Args:
        image: as the list has it, with ``/``.
        at: the place in the list, for the message.

    Raises:
        DataError: absolute, with ``..``, or with a backslash.
    """
    path = PurePosixPath(image)
    if path.is_absolute() or ".." in path.parts or "\\" in image:
        raise DataError(f"{at}: {image!r} leaves the data set; expected a path inside it")
    return path
