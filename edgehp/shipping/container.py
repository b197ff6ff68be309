"""The layout of a bundle file: where things are, and nothing about what they are.

====================  ===========================================================
24 bytes              header: magic, version, number of files, length of the
                      signature section, a zero (little endian)
8 bytes a file        its length, in the order of the signed statement
n * 4096 bytes        the signature: JSON, padded with blanks
the rest              the files end to end
====================  ===========================================================

Nothing is compressed, so that a small bundle cannot become a large folder, and the lengths must add
up to the length of the file. They are not signed and need not be: a wrong one gives a wrong hash.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edgehp.errors import DataError

__all__ = [
    "MAX_FILES",
    "MAX_FILE_SIZE",
    "SIGNATURE_BLOCK",
    "Container",
    "is_container",
    "open_container",
    "pack_front",
]

MAGIC = b"\x89EDGEHP\n"
VERSION = 1
_HEADER = struct.Struct("<8sIIII")
_SIZE = struct.Struct("<Q")
# 64 files of a manifest and the manifest; 4 GiB is the manifest's own limit for a file.
MAX_FILES = 65
MAX_FILE_SIZE = 2**32
SIGNATURE_BLOCK = 4096
# A key's signature over 64 files is about 25 kB, a keyless one some 10 kB more.
_MAX_SIGNATURE = 64 * SIGNATURE_BLOCK
_CHUNK = 2**20


@dataclass(frozen=True)
class Container:
    """An open bundle file whose lengths add up.

    Attributes:
        path: for messages.
        signature: the section as it stands in the file, with its padding.
        sizes: of the files, in bytes.
        offsets: of the files.
    """

    path: Path
    signature: bytes
    sizes: tuple[int, ...]
    offsets: tuple[int, ...]
    _descriptor: int

    def pieces(self, index: int) -> Iterator[bytes]:
        """The content of file number `index`, in pieces of at most 1 MiB.

        Raises:
            DataError: the file cannot be read, or was truncated meanwhile.
        """
        at, end = self.offsets[index], self.offsets[index] + self.sizes[index]
        while at < end:
            piece = _read(self._descriptor, min(_CHUNK, end - at), at, self.path)
            at += len(piece)
            yield piece


@contextmanager
def open_container(path: Path) -> Iterator[Container]:
    """Open a bundle file and check its layout.

    Raises:
        DataError: missing, not a regular file, truncated, too long, or no bundle.
    """
    try:
        # O_NONBLOCK: a named pipe must not make us wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as e:
        raise DataError(f"{path}: the bundle cannot be opened ({e.strerror or e})") from e
    try:
        yield _checked(descriptor, path)
    finally:
        os.close(descriptor)


def is_container(path: Path) -> bool:
    """Whether the file begins as a bundle does, damaged or not, of whatever version."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
        return regular and os.pread(descriptor, len(MAGIC), 0) == MAGIC
    except OSError:
        return False
    finally:
        os.close(descriptor)


def pack_front(signature: bytes, sizes: tuple[int, ...]) -> bytes:
    """Everything before the files: header, lengths and the padded signature.

    Raises:
        DataError: more files, or a longer signature, than a bundle holds.
    """
    padded = signature.ljust(-(-len(signature) // SIGNATURE_BLOCK) * SIGNATURE_BLOCK)
    if not 1 <= len(sizes) <= MAX_FILES or len(padded) > _MAX_SIGNATURE:
        raise DataError(
            f"{len(sizes)} files with a signature of {len(signature)} bytes; a bundle holds at "
            f"most {MAX_FILES} and {_MAX_SIGNATURE}"
        )
    header = _HEADER.pack(MAGIC, VERSION, len(sizes), len(padded), 0)
    return header + b"".join(_SIZE.pack(s) for s in sizes) + padded


def _checked(descriptor: int, path: Path) -> Container:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path} is no regular file; give a bundle made by 'edgehp bundle'")
    length = status.st_size
    if length < _HEADER.size:
        raise DataError(f"{path}: {length} bytes are no bundle; copy it again")
    magic, version, count, signature_size, zero = _HEADER.unpack(
        _read(descriptor, _HEADER.size, 0, path)
    )
    if magic != MAGIC:
        raise DataError(f"{path} is no bundle; give a file made by 'edgehp bundle'")
    if version != VERSION:
        raise DataError(
            f"{path} is a bundle of version {version}, this edgehp reads {VERSION}; install a "
            "newer edgehp or make the bundle with this one"
        )
    if not 1 <= count <= MAX_FILES:
        raise _damaged(path, f"{count} files, expected 1 to {MAX_FILES}")
    if not 1 <= signature_size <= _MAX_SIGNATURE or signature_size % SIGNATURE_BLOCK:
        raise _damaged(path, f"a signature of {signature_size} bytes")
    if zero != 0:
        raise _damaged(path, "a header that is not zero where it must be")
    start = _HEADER.size + count * _SIZE.size + signature_size
    if length < start:
        raise _damaged(path, f"{length} bytes, expected at least {start}")
    table = _read(descriptor, count * _SIZE.size, _HEADER.size, path)
    sizes = tuple(s for (s,) in _SIZE.iter_unpack(table))
    if (largest := max(sizes)) > MAX_FILE_SIZE:
        raise _damaged(path, f"a file of {largest} bytes, expected at most {MAX_FILE_SIZE}")
    if length != start + sum(sizes):
        raise _damaged(path, f"{length} bytes, its lengths add up to {start + sum(sizes)}")
    signature = _read(descriptor, signature_size, start - signature_size, path)
    offsets = tuple(start + sum(sizes[:i]) for i in range(count))
    return Container(path, signature, sizes, offsets, descriptor)


def _read(descriptor: int, count: int, at: int, path: Path) -> bytes:
    """Exactly `count` bytes at offset `at`."""
    found = b""
    while len(found) < count:
        try:
            piece = os.pread(descriptor, count - len(found), at + len(found))
        except OSError as e:
            raise DataError(f"{path}: the bundle cannot be read ({e.strerror or e})") from e
        if not piece:
            raise _damaged(path, "it was truncated while it was read")
        found += piece
    return found


def _damaged(path: Path, found: str) -> DataError:
    return DataError(f"{path} is a damaged bundle: found {found}; copy it again")
