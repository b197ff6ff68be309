"""Files to a board and back, as one tar stream each way.

SSH sees to it that no byte changes on the way and artifacts carry their hashes, so that nothing is
hashed here: a stream arrives whole, or the errand fails.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import IO, Any

from edgehp.errors import DataError, EnvironmentalError
from edgehp.progress import Step
from edgehp.remote.ssh import Link, plain

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


class _Pieces:
    """Takes a stream as the board takes it: in pieces, each after its length."""

    def __init__(self, stdin: IO[bytes], going: Step) -> None:
        self._stdin, self._going = stdin, going

    def write(self, data: bytes) -> None:
        self._stdin.write(b"%08d" % len(data))
        self._stdin.write(data)
        # An archive is more than its files.
        self._going.update(min(self._going.done + len(data), self._going.total or 0))


def send(link: Link, files: Mapping[str, Path], going: Step) -> None:
    """Put files into ``in/`` on the board, and let the command there begin.

    Args:
        link: to the board.
        files: by their paths below ``in/``, with ``/``.
        going: is told of the bytes that are on their way.

    Raises:
        EnvironmentalError: the connection was lost, and the folder with it; the board has no space.
        DataError: a file here changed or went away meanwhile.
    """
    pieces: Any = _Pieces(link.stdin, going)
    # The board may go away while this side writes; `begin` then says why.
    with (
        suppress(BrokenPipeError),
        tarfile.open(fileobj=pieces, mode="w|", bufsize=_PIECE, format=tarfile.GNU_FORMAT) as tar,
    ):
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
    link.begin()


class _Part:
    """The next `size` bytes of a stream."""

    def __init__(self, stream: IO[bytes], size: int) -> None:
        self._stream, self._left = stream, size
        # Whether the stream ended before them.
        self.cut = False

    def read(self, size: int) -> bytes:
        asked = min(size, self._left)
        data = self._stream.read(asked)
        self._left -= len(data)
        self.cut = len(data) < asked
        return data


def fetch(link: Link, size: int, into: Path) -> None:
    """Bring here what the board sends after its command has ended.

    Args:
        link: to the board.
        size: bytes of the archive.
        into: an empty folder here, which gets it under the names it has below the board's own.

    Raises:
        EnvironmentalError: the connection was lost, or what came is nothing one would ask for.
    """
    if not hasattr(tarfile, "data_filter"):
        raise EnvironmentalError(
            "this Python's tarfile has no data filter, which results of a board go through: "
            "expected 3.10.12, 3.11.4 or later"
        )
    part: Any = _Part(link.stdout, size)
    try:
        with tarfile.open(fileobj=part, mode="r|", bufsize=_PIECE, tarinfo=_PlainInfo) as tar:
            tar.extractall(into, members=_checked(tar), filter="data")
        while part.read(_PIECE):
            pass
    except _RefusedError as e:
        raise EnvironmentalError(f"{link.board.host} sent {e}; nothing of it is kept") from e
    # ValueError: what tarfile makes of some damaged headers.
    except (tarfile.TarError, EOFError, ValueError) as e:
        if part.cut:
            raise link.lost("fetching results") from e
        raise EnvironmentalError(
            f"the results of {link.board.host} did not arrive whole ({e}): run it again"
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
