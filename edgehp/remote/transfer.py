"""Files to a board and back, as one tar stream each way.

SSH sees to it that no byte changes on the way and artifacts carry their hashes, so that nothing is
hashed here: a stream arrives whole, or the errand fails.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

from edgehp.errors import DataError, EnvironmentalError

# Of what comes back: an artifact is some tens of megabytes, a report two.
MOST_BACK = 4 << 30
_MOST_FILES_BACK = 10_000
# The longest path that Linux knows.
_LONGEST_NAME = 4096


def files_below(path: Path) -> Iterator[Path]:
    """The regular files of a folder, links followed, relative to it.

    Raises:
        DataError: nothing is there, or it cannot be read.
    """

    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror}), so not be sent")

    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder to send")
    seen: set[tuple[int, int]] = set()
    for root, folders, files in os.walk(path, followlinks=True, onerror=fail):
        status = Path(root).stat()
        if (status.st_dev, status.st_ino) in seen:
            # A link to a folder above: it would never end.
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        below = Path(root).relative_to(path)
        yield from (below / file for file in sorted(files) if Path(root, file).is_file())


def pack(files: Mapping[str, Path], write: Callable[[bytes], None], piece: int) -> None:
    """Write an archive of files, by their names in it, in pieces of so many bytes.

    Raises:
        BrokenPipeError: of `write`.
        DataError: a file changed or went away meanwhile.
    """
    stream: Any = SimpleNamespace(write=write)
    with tarfile.open(fileobj=stream, mode="w|", bufsize=piece, format=tarfile.GNU_FORMAT) as tar:
        for name, source in files.items():
            try:
                with source.open("rb") as file:
                    info, status = tarfile.TarInfo(name), os.fstat(file.fileno())
                    info.size, info.mode = status.st_size, 0o600
                    info.mtime = int(status.st_mtime)
                    tar.addfile(info, file)
            except BrokenPipeError:
                raise
            except OSError as e:
                raise DataError(f"{source}: changed or went away while sent ({e})") from e


def unpack(archive: Any, into: Path, host: str) -> None:
    """Unpack the file of bytes that the board `host` has sent into the empty folder `into`.

    Raises:
        EnvironmentalError: it is damaged, or something in it is nothing one would ask for.
    """
    if not hasattr(tarfile, "data_filter"):
        raise EnvironmentalError(
            "this Python's tarfile has no data filter, which results of a board go through: "
            "expected 3.10.12, 3.11.4 or later"
        )
    try:
        with tarfile.open(fileobj=archive, mode="r:", tarinfo=_PlainInfo) as tar:
            tar.extractall(into, members=_checked(tar), filter="data")
    except _RefusedError as e:
        raise EnvironmentalError(f"{host} sent {e}; nothing of it is kept") from e
    # ValueError: what tarfile makes of some damaged headers.
    except (tarfile.TarError, EOFError, ValueError) as e:
        raise EnvironmentalError(
            f"the results of {host} did not arrive whole ({e}): run it again"
        ) from e


class _RefusedError(Exception):
    """Something in an archive that no board has a reason to send."""


class _PlainInfo(tarfile.TarInfo):
    """A header that is checked before tarfile does what it asks for.

    tarfile reads an extended header whole, however long it says it is, and lets it change the next
    member. GNU tar, which is asked for its own format, needs one of its kinds: the name of more
    than 100 characters.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _PlainInfo:
        """As tarfile calls it."""
        info = super().frombuf(buf, encoding, errors)
        long_name = info.type == tarfile.GNUTYPE_LONGNAME and info.size <= _LONGEST_NAME
        ordinary = info.type in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE)
        if info.size < 0 or not (ordinary or long_name):
            raise _RefusedError(f"{plain(info.name)!r}, which is no plain file of its results")
        return info


def _checked(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members of `tar`, each refused where no result is called so."""
    for count, member in enumerate(tar, 1):
        if count > _MOST_FILES_BACK:
            raise _RefusedError(f"more than {_MOST_FILES_BACK} files")
        if plain(member.name) != member.name:
            # Names are shown to a person too.
            raise _RefusedError(f"{member.name!r}, which is no plain file of its results")
        if any(part.startswith(".") for part in PurePosixPath(member.name).parts):
            # What steers a shell or a repository is called so.
            raise _RefusedError(f"{member.name!r}, a hidden file or a path that leads elsewhere")
        yield member


def plain(text: str) -> str:
    """`text` without control characters: what a board writes must not steer this terminal."""
    return "".join(c for c in text if c == "\t" or (c >= " " and not "\x7f" <= c <= "\x9f"))
