"""Files that are either whole or not there."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from edgehp.errors import EnvironmentalError

__all__ = ["output_to", "replacing", "write_whole"]


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` when the block ends without an exception.

    It is a temporary file beside `path`, flushed to disk before it is renamed, and removed if the
    block or the disk fails; `path` is then what it was before.

    Raises:
        OSError: the directory is missing or not writable, or the disk is full; about `path`.
    """
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}"
    # Not tempfile: its files are for the owner alone, this one gets what open() would have given.
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except OSError as e:
        # The user has never heard of the temporary file.
        raise OSError(e.errno, e.strerror, str(path)) from e
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def output_to(path: Path, option: str) -> Iterator[None]:
    """Around what writes to `path`, which the user gave with `option`.

    Raises:
        EnvironmentalError: the block raised an `OSError`.
    """
    try:
        yield
    except OSError as e:
        raise EnvironmentalError(
            f"{path} cannot be written ({e.strerror or e}); free space or choose another {option}"
        ) from e


def write_whole(path: Path, content: bytes | str) -> None:
    """Replace `path` by `content` (text as UTF-8), whole or not at all.

    Raises:
        OSError: as of `replacing`.
    """
    with replacing(path) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)
