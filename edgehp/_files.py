"""Files that are either whole or not there."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

__all__ = ["replacing", "write_whole"]


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` when the block ends without an exception.

    It is a temporary file beside `path`, flushed to disk before it is renamed, and removed if the
    block or the disk fails; `path` is then what it was before.

    Raises:
        OSError: the directory is missing or not writable, or the disk is full.
    """
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}"
    # Not tempfile: its files are for the owner alone, this one gets what open() would have given.
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_whole(path: Path, content: bytes | str) -> None:
    """Replace `path` by `content` (text as UTF-8), whole or not at all.

    Raises:
        OSError: as of `replacing`.
    """
    with replacing(path) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)
