"""A folder or a zip of photos and lists, read alike; zips in place, nothing is extracted."""

from __future__ import annotations

import os
import stat
import threading
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath

from edgehp.errors import DataError
from edgehp.files import read_bytes, stand_in
from edgehp.images import files_below, is_apple_double

_LARGEST_MEMBER = 256 * 2**20


@dataclass(frozen=True)
class Photo:
    """Where the bytes of an encoded photo come from.

    Attributes:
        path: of its file, or of the zip that it is in.
        member: its name in the zip; None where it is a file of its own.
        data: the photo itself, where it was sent here from another machine.
    """

    path: Path
    member: str | None = None
    data: bytes | None = field(default=None, repr=False)

    @property
    def where(self) -> str:
        """Its place, for messages."""
        return str(self.path) if self.member is None else f"{self.path}:{self.member}"

    def read(self) -> bytes:
        """The encoded photo.

        Raises:
            DataError: missing, unreadable, damaged, encrypted or too large.
        """
        if self.data is not None:
            return self.data
        if self.member is None:
            return read_bytes(self.path, "a photo")
        return open_archive(self.path).read(self.member)


def photo_for(source: Photo, here: Path | None, there: Path | None) -> Photo:
    """A photo as another machine can read it.

    Args:
        source: the photo.
        here: a folder or zip that is on the other machine too; None to send the photo itself.
        there: its place on the other machine.

    Raises:
        DataError: not below `here`, or, where it is sent, missing, unreadable or too large.
    """
    if here is None or there is None:
        return replace(source, data=source.read())
    if not source.path.is_relative_to(here):
        raise DataError(
            f"{source.where}: not a photo below {here}, so where it is elsewhere is unknown"
        )
    return replace(source, path=there / source.path.relative_to(here))


class Archive:
    """A zip file read member by member, never extracted; names have ``/``. Usable from threads.

    Attributes:
        path: of the zip.
        names: of every file in it that can be used.
        left_out: how many were left out, by kind (`edgehp.images.report_left_out`).
    """

    def __init__(self, path: Path) -> None:
        """Open the zip at `path` and check its directory.

        Raises:
            DataError: missing, not a zip, or with encrypted or duplicate members.
        """
        self.path = path
        self._lock = threading.Lock()
        try:
            self._zip = zipfile.ZipFile(path)
        except OSError as e:
            raise DataError(f"{path}: cannot open the zip: {e.strerror or e}") from e
        except (zipfile.BadZipFile, NotImplementedError, ValueError) as e:
            with path.open("rb") as file:
                other = stand_in(file.read(512))
            if other is not None:
                raise DataError(f"{path} is {other}") from e
            raise DataError(
                f"{path}: expected a folder of photos or a complete zip of them: {e}"
            ) from e
        self._members: dict[str, str] = {}
        self.left_out = Counter[str]()
        for info in self._zip.infolist():
            # PowerShell 5 writes names with backslashes.
            name = info.filename.replace("\\", "/")
            if info.is_dir() or name.endswith("/"):
                continue
            if is_apple_double(name):
                self.left_out["of macOS ('._', __MACOSX)"] += 1
                continue
            if stat.S_ISLNK(info.external_attr >> 16):
                self.left_out["that are links"] += 1
                continue
            if name in self._members:
                raise DataError(f"{path}: member {name!r} occurs twice, expected once")
            if info.flag_bits & 1:
                raise DataError(f"{path}: member {name!r} is encrypted; decrypt the zip")
            self._members[name] = info.filename
        self.names = tuple(self._members)

    @property
    def where(self) -> str:
        """The zip's path."""
        return str(self.path)

    def photo(self, name: str) -> Photo:
        """A photo, not yet read."""
        return Photo(self.path, name)

    def read(self, name: str) -> bytes:
        """The bytes of one member, its checksum verified.

        Raises:
            DataError: no such member, or it is damaged or too large.
        """
        where = f"{self.path}:{name}"
        with self._lock:
            try:
                info = self._zip.getinfo(self._members[name])
                if info.file_size > _LARGEST_MEMBER:
                    raise DataError(
                        f"{where}: {info.file_size} bytes, expected <= {_LARGEST_MEMBER}"
                    )
                return self._zip.read(info)
            except KeyError:
                raise DataError(f"{where}: no such member in the zip") from None
            except (zipfile.BadZipFile, zlib.error, EOFError) as e:
                raise DataError(f"{where}: the zip member is damaged: {e}") from e
            except (OSError, NotImplementedError, RuntimeError) as e:
                raise DataError(f"{where}: cannot read the zip member: {e}") from e


def open_archive(path: Path) -> Archive:
    """The zip at `path`, opened once in each process, and anew where the file is another one.

    Processes that share one file description would move each other's read position.

    Raises:
        DataError: as of `Archive`.
    """
    try:
        status = path.stat()
    except OSError as e:
        raise DataError(f"{path}: cannot open the zip: {e.strerror or e}") from e
    return _opened(path, os.getpid(), (status.st_ino, status.st_size, status.st_mtime_ns))


@lru_cache(maxsize=64)
def _opened(path: Path, process: int, file: tuple[int, int, int]) -> Archive:
    return Archive(path)


class Folder:
    """A folder with its subfolders; as an `Archive`."""

    def __init__(self, path: Path) -> None:
        """Look at the names; nothing is read yet.

        Raises:
            DataError: as of `edgehp.images.files_below`.
        """
        self.path = path
        self.names, self.left_out = files_below(path)

    @property
    def where(self) -> str:
        """Its path."""
        return str(self.path)

    def read(self, name: str) -> bytes:
        """The bytes of a list.

        Raises:
            DataError: missing, unreadable or too large.
        """
        return read_bytes(self.path / name, "a list")

    def photo(self, name: str) -> Photo:
        """A photo, not yet read."""
        return Photo(self.path / name)


Store = Archive | Folder


def open_store(path: Path) -> Store:
    """The folder or zip at `path`, which exists.

    Raises:
        DataError: a file that is not a complete zip, or as of `edgehp.images.files_below`.
    """
    return Folder(path) if path.is_dir() else open_archive(path)


def plain_name(name: str) -> str:
    """A file's name in the one spelling that lists are compared by.

    With ``/`` where Windows writes a backslash, without ``./``, and with accents as Linux and
    Windows write them (Unicode's composed form), which macOS takes apart.
    """
    return unicodedata.normalize("NFC", str(PurePosixPath(name.replace("\\", "/"))))


class NameIndex:
    """Names of files, found by any spelling that `plain_name` makes the same."""

    def __init__(self, names: Iterable[str]) -> None:
        """Index `names`; one that is spelled exactly as asked for goes before its like."""
        known = list(names)
        self._names = {plain_name(name): name for name in known} | {name: name for name in known}
        self._by_stem: dict[str, str] | None = None

    def find(self, name: str) -> str | None:
        """The indexed name that `name` means, None if there is none."""
        return self._names.get(name) or self._names.get(plain_name(name))

    def hint(self, name: str) -> str:
        """A line that suggests a near name, such as one in other case; empty if there is none."""
        if self._by_stem is None:
            self._by_stem = {_stem(known): known for known in self._names.values()}
        near = self._by_stem.get(_stem(name))
        return "" if near is None else f"\nhint: did you mean {near}?"


def _stem(name: str) -> str:
    return PurePosixPath(plain_name(name)).stem.casefold()


def inside(image: str, at: str) -> PurePosixPath:
    r"""The path that a list names, which must not leave the data set.

    Args:
        image: as the list has it, with ``/`` or ``\``.
        at: the place in the list, for the message.

    Raises:
        DataError: absolute, or with ``..``.
    """
    path = PurePosixPath(image.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or (path.parts[:1] and ":" in path.parts[0]):
        raise DataError(f"{at}: {image!r} leaves the data set; expected a path inside it")
    return path
