"""Changes on disk that survive a power cut, and the locks around them.

Everything that installing writes goes through these few functions, by names of the module ``os``
alone: what is not flushed here is not promised, and tests can cut the power between any two calls.
A directory is flushed after its entries changed, because a file's own flush does not keep its name.

Modes are those that are asked for, whatever the umask: a slot that root installed from a shell with
umask 077 would pass its self-test and be unreadable to the service that is to run it.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from edgehp.errors import EnvironmentalError
from edgehp.files import json_digest, strict_json


def write_file(path: Path, pieces: Iterable[bytes], mode: int = 0o644) -> None:
    """Write a new file and flush it; its name is kept by `flush_folder` of its folder.

    Raises:
        OSError: it exists, or the disk is full or refuses.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, flags, mode)
    try:
        _allow(descriptor, mode)
        for piece in pieces:
            left = memoryview(piece)
            while left:
                left = left[os.write(descriptor, left) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Replace `path` by `content`, whole or not at all; when this returns it is on disk.

    Raises:
        OSError: the disk is full or refuses; `path` is what it was.
    """
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}"
    try:
        write_file(temporary, [content], mode)
        os.replace(temporary, path)  # noqa: PTH105 - by the names of os, see above
    except OSError:
        remove_tree(temporary)
        raise
    flush_folder(path.parent)


def make_folder(path: Path) -> None:
    """Make a folder, and those above it that are missing, and flush what holds them.

    Raises:
        OSError: something else is there, or the disk refuses.
    """
    if path.is_dir():
        return
    if path.parent != path:
        make_folder(path.parent)
    try:
        os.mkdir(path, 0o755)  # noqa: PTH102 - see above
    except FileExistsError:
        # Another process was faster, or something else is there.
        if not path.is_dir():
            raise
    else:
        allow(path, 0o755)
    flush_folder(path.parent)


def flush_folder(path: Path) -> None:
    """Flush the entries of a folder.

    Raises:
        OSError: it is missing, or the disk refuses.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(path: Path) -> None:
    """Flush every file and folder below `path`, then itself; all may read them then.

    Raises:
        OSError: the disk refuses.
    """
    for name in sorted(os.listdir(path)):  # noqa: PTH208
        inner = path / name
        if stat.S_ISDIR(os.lstat(inner).st_mode):
            flush_tree(inner)
            continue
        descriptor = os.open(inner, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            _allow(descriptor, 0o644)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    allow(path, 0o755)
    flush_folder(path)


def allow(path: Path, mode: int) -> None:
    """Give a folder that was just made at least these permissions, as far as its disk knows them.

    Raises:
        OSError: it is not there, or the disk refuses.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        _allow(descriptor, mode)
    finally:
        os.close(descriptor)


def _allow(descriptor: int, mode: int) -> None:
    if os.fstat(descriptor).st_mode & mode != mode:
        # FAT keeps no permissions, and may refuse.
        with suppress(PermissionError):
            os.fchmod(descriptor, mode)


def move(source: Path, destination: Path) -> None:
    """Rename within one folder and flush it.

    Raises:
        OSError: `destination` is there and not empty, or the disk refuses.
    """
    os.rename(source, destination)  # noqa: PTH104
    flush_folder(destination.parent)


def remove_tree(path: Path) -> None:
    """Remove a file or a folder with all in it, if it is there; links are not followed.

    Raises:
        OSError: the disk refuses.
    """
    try:
        folder = stat.S_ISDIR(os.lstat(path).st_mode)
    except FileNotFoundError:
        return
    if not folder:
        os.unlink(path)  # noqa: PTH108
        return
    for name in os.listdir(path):  # noqa: PTH208
        remove_tree(path / name)
    os.rmdir(path)  # noqa: PTH106


@contextmanager
def locked(path: Path, busy: str | None = None) -> Iterator[None]:
    """Hold the lock of the file `path` while the block runs; it dies with its process.

    The file stays: removing it would let two processes lock two files of the same name. It is for
    its owner alone: whoever may read a file may lock it, and would hold up every start for ever.
    One that root makes is given to the owner of its folder, who counts starts there.

    Args:
        path: of the file.
        busy: what to say where another process holds it; None waits for that one.

    Raises:
        EnvironmentalError: another process holds it; `busy` says so.
        OSError: the file cannot be made.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        descriptor = os.open(path, flags | os.O_EXCL, 0o600)
        if os.geteuid() == 0:
            owner = os.stat(path.parent)  # noqa: PTH116 - by the names of os, see above
            os.fchown(descriptor, owner.st_uid, owner.st_gid)
    except FileExistsError:
        # Never given away: somebody may have put another's file there.
        descriptor = os.open(path, flags, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError as e:
            raise EnvironmentalError(busy) from e
        yield
    finally:
        os.close(descriptor)


@contextmanager
def writing(what: str, remedy: str) -> Iterator[None]:
    """Raise an `OSError` of the block as one sentence about `what`, with its remedy.

    Raises:
        EnvironmentalError: the block raised an `OSError`.
    """
    try:
        yield
    except OSError as e:
        name = f"{e.filename}: " if e.filename else ""
        raise EnvironmentalError(
            f"cannot write to {what} ({name}{e.strerror or e}); {remedy}"
        ) from e


def require_space(folder: Path, needed: int, purpose: str) -> None:
    """Check that `needed` bytes fit on the disk of `folder`.

    Raises:
        EnvironmentalError: they do not.
    """
    found = os.statvfs(folder)
    free = found.f_bavail * found.f_frsize
    if free < needed:
        raise EnvironmentalError(
            f"{folder} has {free / 2**20:.0f} MiB free, {needed / 2**20:.0f} MiB are needed to "
            f"{purpose}\nhint: make room or choose another --root"
        )


def sweep(folder: Path, *prefixes: str) -> None:
    """Remove what a killed process left in `folder`, by the beginning of its name.

    Raises:
        OSError: the disk refuses.
    """
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith(prefixes):
            remove_tree(entry)


def sealed(content: dict[str, Any]) -> bytes:
    """JSON text with a digest of its content, so that a torn or rotten file is noticed."""
    return (json.dumps({"sha256": json_digest(content), "content": content}) + "\n").encode()


def unsealed(data: bytes) -> Any:
    """The content of what `sealed` made.

    Raises:
        ValueError: it is anything else, or was damaged.
    """
    values = strict_json(data)
    if not isinstance(values, dict) or not isinstance(values.get("content"), dict):
        raise ValueError("no record of edgehp")
    if values.get("sha256") != json_digest(values["content"]):
        raise ValueError("its digest does not fit")
    return values["content"]
