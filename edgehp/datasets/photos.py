"""Photos as bytes and pixels: where they come from, and a decoder that refuses damage.

OpenCV decodes half of a truncated JPEG without a word and fills the rest with grey. The container
is therefore checked before decoding: a JPEG must reach its end-of-image marker, every chunk of a
PNG must have its checksum. Damage inside the entropy-coded data of an otherwise complete JPEG is
beyond any such check.
"""

from __future__ import annotations

import os
import struct
import threading
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import numpy.typing as npt

from edgehp.errors import DataError

__all__ = ["PHOTO_SUFFIXES", "Archive", "FilePhoto", "PhotoSource", "ZipPhoto", "decode_photo"]

Image = npt.NDArray[np.uint8]

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png")
# A face photo is smaller; a larger one is a mistake or an attack on memory.
_LARGEST_PIXELS = 100_000_000
_LARGEST_FILE = 256 * 2**20
_PNG = b"\x89PNG\r\n\x1a\n"
# Start-of-frame markers: C0..CF without DHT (C4), JPG (C8) and DAC (CC).
_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


class PhotoSource(Protocol):
    """Where the bytes of one encoded photo come from."""

    @property
    def where(self) -> str:
        """The place as a person would look for it, for messages."""

    def read(self) -> bytes:
        """The encoded photo.

        Raises:
            DataError: missing, unreadable or too large.
        """


@dataclass(frozen=True)
class FilePhoto:
    """A photo in a file of its own."""

    path: Path

    @property
    def where(self) -> str:
        """The file's path."""
        return str(self.path)

    def read(self) -> bytes:
        """The encoded photo.

        Raises:
            DataError: missing, unreadable or too large.
        """
        return read_bytes(self.path, "a photo")


@dataclass(frozen=True)
class ZipPhoto:
    """A photo inside a zip file."""

    archive: Archive
    member: str

    @property
    def where(self) -> str:
        """The zip's path and the member's name."""
        return f"{self.archive.path}:{self.member}"

    def read(self) -> bytes:
        """The encoded photo.

        Raises:
            DataError: the member is damaged, encrypted or too large.
        """
        return self.archive.read(self.member)


class Archive:
    """A zip file read member by member, never extracted.

    Usable from threads, across ``fork`` and after pickling: every process opens the file anew,
    since processes that share one file description would move each other's read position.
    """

    def __init__(self, path: Path) -> None:
        """Open the zip at `path` and check its directory.

        Raises:
            DataError: missing, not a zip, or with encrypted or duplicate members.
        """
        self.path = path
        self._reset()
        infos = self._open().infolist()
        seen: set[str] = set()
        for info in infos:
            if info.filename in seen:
                raise DataError(f"{path}: member {info.filename!r} occurs twice, expected once")
            if info.flag_bits & 1:
                raise DataError(f"{path}: member {info.filename!r} is encrypted; decrypt the zip")
            seen.add(info.filename)
        self.members = tuple(i.filename for i in infos if not i.is_dir())

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._zip: zipfile.ZipFile | None = None
        self._process = -1

    def __getstate__(self) -> dict[str, Any]:
        """Without the open file and the lock, which no other process can use."""
        return {"path": self.path, "members": self.members}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore; the file is opened on the first read."""
        self.__dict__.update(state)
        self._reset()

    def _open(self) -> zipfile.ZipFile:
        if self._zip is None:
            try:
                self._zip = zipfile.ZipFile(self.path)
            except OSError as e:
                raise DataError(f"{self.path}: cannot open the zip: {e.strerror or e}") from e
            except (zipfile.BadZipFile, NotImplementedError, ValueError) as e:
                raise DataError(f"{self.path}: expected a complete zip file: {e}") from e
            self._process = os.getpid()
        return self._zip

    def read(self, member: str) -> bytes:
        """The bytes of one member, its checksum verified.

        Raises:
            DataError: no such member, or it is damaged or too large.
        """
        where = f"{self.path}:{member}"
        if self._process != os.getpid():
            self._reset()  # after a fork another thread's lock may be locked for ever
        with self._lock:
            archive = self._open()
            try:
                info = archive.getinfo(member)
                if info.file_size > _LARGEST_FILE:
                    raise DataError(f"{where}: {info.file_size} bytes, expected <= {_LARGEST_FILE}")
                return archive.read(info)
            except KeyError:
                raise DataError(f"{where}: no such member in the zip") from None
            except (zipfile.BadZipFile, zlib.error, EOFError) as e:
                raise DataError(f"{where}: the zip member is damaged: {e}") from e
            except (OSError, NotImplementedError, RuntimeError) as e:
                raise DataError(f"{where}: cannot read the zip member: {e}") from e


def read_bytes(path: Path, what: str) -> bytes:
    """The whole file at `path`, which should be `what`.

    Raises:
        DataError: missing, unreadable, empty or larger than 256 MiB.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST_FILE + 1)
    except OSError as e:
        raise DataError(f"{path}: expected {what}, cannot read it: {e.strerror or e}") from e
    if not data:
        raise DataError(f"{path}: expected {what}, found an empty file")
    if len(data) > _LARGEST_FILE:
        raise DataError(f"{path}: expected {what}, found more than {_LARGEST_FILE} bytes")
    return data


def decode_photo(data: bytes, where: str) -> Image:
    """Decode an encoded photo.

    The EXIF orientation is ignored on purpose: the boxes, landmarks and angles of every data set
    here refer to the pixels as they are stored, so turning the photo would falsify the labels.

    Args:
        data: a complete JPEG or PNG file.
        where: its place, for messages.

    Returns:
        uint8 [H, W, 3], RGB.

    Raises:
        DataError: neither JPEG nor PNG, truncated, damaged, or of more than 100 megapixels.
    """
    if data.startswith(b"\xff\xd8"):
        width, height = _check_jpeg(data, where)
    elif data.startswith(_PNG):
        width, height = _check_png(data, where)
    else:
        raise DataError(f"{where}: expected a JPEG or PNG photo, found bytes {data[:8].hex(' ')!r}")
    if not 0 < width * height <= _LARGEST_PIXELS:
        raise DataError(
            f"{where}: a photo of {width}x{height} pixels, expected 1..{_LARGEST_PIXELS} in all"
        )
    try:
        pixels = cv2.imdecode(
            np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
        )
    except cv2.error as e:
        raise DataError(f"{where}: the photo cannot be decoded: {e.err}") from e
    if pixels is None or pixels.shape[:2] != (height, width):
        raise DataError(f"{where}: the photo is damaged and cannot be decoded; replace the file")
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)  # type: ignore[return-value]


def _check_jpeg(data: bytes, where: str) -> tuple[int, int]:
    """Width and height of a JPEG that reaches its end marker (ITU-T T.81, annex B)."""
    truncated = DataError(f"{where}: truncated JPEG of {len(data)} bytes; fetch the file again")
    size: tuple[int, int] | None = None
    at = 2
    while True:
        if at + 4 > len(data):
            raise truncated
        if data[at] != 0xFF:
            raise DataError(f"{where}: damaged JPEG, no marker at byte {at}; fetch the file again")
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        length = struct.unpack_from(">H", data, at + 2)[0]
        if marker in _SOF:
            if at + 9 > len(data):
                raise truncated
            height, width = struct.unpack_from(">HH", data, at + 5)
            size = width, height
        at += 2 + length
        if marker == 0xDA:
            break
    # Within scans FF is always followed by 00 or a restart marker, so FF D9 is the real end and
    # not that of a thumbnail, which would lie in a segment before the scan.
    if data.find(b"\xff\xd9", at) < 0:
        raise truncated
    if size is None:
        raise DataError(f"{where}: damaged JPEG without a frame header; fetch the file again")
    return size


def _check_png(data: bytes, where: str) -> tuple[int, int]:
    """Width and height of a PNG whose chunks are complete and have their checksums."""
    at = len(_PNG)
    size: tuple[int, int] | None = None
    view = memoryview(data)
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 8 + length
        if end + 4 > len(data):
            break
        if zlib.crc32(view[at + 4 : end]) != struct.unpack_from(">I", data, end)[0]:
            raise DataError(f"{where}: damaged PNG, bad checksum at byte {at}; fetch it again")
        if kind == b"IHDR" and length >= 8:
            size = struct.unpack_from(">II", data, at + 8)
        if kind == b"IEND":
            if size is None:
                raise DataError(f"{where}: damaged PNG without a header; fetch the file again")
            return size
        at = end + 4
    raise DataError(f"{where}: truncated PNG of {len(data)} bytes; fetch the file again")
