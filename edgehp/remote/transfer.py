"""Files to a board and back, as one tar stream each way.

SSH sees to it that no byte changes on the way and artifacts carry their hashes, so that nothing is
hashed here: a stream arrives whole, or the errand fails.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from edgehp.errors import DataError, EnvironmentalError
from edgehp.progress import Step
from edgehp.remote.lease import Lease
from edgehp.remote.ssh import FETCH, SEND, Session, plain

__all__ = ["fetch", "files_below", "send"]

# Of what comes back: an artifact is some tens of megabytes, a report two.
_MOST_BACK = 4 << 30
_MOST_FILES_BACK = 10_000
_PIECE = 1 << 18
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


def send(lease: Lease, files: Mapping[str, Path], going: Step) -> None:
    """Put files into ``in/`` on the board.

    Args:
        lease: of the board.
        files: by their paths below ``in/``, with ``/``.
        going: is told of the bytes that are on their way.

    Raises:
        EnvironmentalError: the connection was lost, and the folder with it; the board has no space.
        DataError: a file here changed or went away meanwhile.
    """
    with lease.session(SEND, talk=True) as session:
        # The board may go away while this side writes; the exit status then says why.
        with (
            suppress(BrokenPipeError),
            tarfile.open(
                fileobj=session.stdin, mode="w|", bufsize=_PIECE, format=tarfile.GNU_FORMAT
            ) as tar,
        ):
            for name, source in files.items():
                try:
                    with source.open("rb") as file:
                        info, status = tarfile.TarInfo(name), os.fstat(file.fileno())
                        info.size, info.mode = status.st_size, 0o600
                        info.mtime = int(status.st_mtime)
                        tar.addfile(info, _Counted(file, going))
                except BrokenPipeError:
                    raise
                except OSError as e:
                    raise DataError(f"{source}: changed or went away while sent ({e})") from e
        with suppress(BrokenPipeError):
            session.stdin.close()
        session.begin().read()
        _check_end(lease, session, "sending files")


class _Counted(io.RawIOBase):
    """A file whose bytes are counted as they are read."""

    def __init__(self, file: BinaryIO, going: Step) -> None:
        self._file, self._going = file, going

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._going.advance(len(data))
        return data


def fetch(lease: Lease, what: Sequence[str], into: Path) -> None:
    """Bring folders of the board's own folder here.

    Args:
        lease: of the board.
        what: ``"out"`` or something below ``"in"``.
        into: an empty folder here, which gets them under the same names.

    Raises:
        EnvironmentalError: the connection was lost, the folders are not there, or what came is
            nothing one would ask for.
    """
    if not hasattr(tarfile, "data_filter"):
        raise EnvironmentalError(
            "this Python's tarfile has no data filter, which results of a board go through: "
            "expected 3.10.12, 3.11.4 or later"
        )
    damaged: Exception | None = None
    with lease.session(FETCH, what) as session:
        try:
            with tarfile.open(
                fileobj=session.begin(), mode="r|", bufsize=_PIECE, tarinfo=_PlainInfo
            ) as tar:
                tar.extractall(into, members=_checked(tar), filter="data")
        except _RefusedError as e:
            raise EnvironmentalError(f"{lease.board.host} sent {e}; nothing of it is kept") from e
        # ValueError: what tarfile makes of some damaged headers.
        except (tarfile.TarError, EOFError, ValueError) as e:
            damaged = e
        _check_end(lease, session, "fetching results")
    if damaged is not None:
        raise EnvironmentalError(
            f"the results of {lease.board.host} did not arrive whole ({damaged}): run it again"
        )


def _check_end(lease: Lease, session: Session, doing: str) -> None:
    """Raise what keeps a transfer from having succeeded."""
    status = session.wait()
    if session.lost:
        raise lease.lost(doing)
    if status:
        raise EnvironmentalError(
            f"{lease.board.host}: {doing} failed there: {session.last_words or status}; free "
            "space on the board, or set TMPDIR there"
        )


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
    size = 0
    for count, member in enumerate(tar, 1):
        size += member.size
        if size > _MOST_BACK or count > _MOST_FILES_BACK:
            raise _RefusedError(f"more than {_MOST_BACK >> 30} GiB or {_MOST_FILES_BACK} files")
        name = member.name
        if plain(name) != name:
            # Names are shown to a person too.
            raise _RefusedError(f"{name!r}, which is no plain file of its results")
        if any(part.startswith(".") for part in PurePosixPath(name).parts):
            # What steers a shell or a repository is called so.
            raise _RefusedError(f"{name!r}, a hidden file or a path that leads elsewhere")
        yield member
