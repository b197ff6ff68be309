"""Files to a board and back: every one is hashed on both sides, and none is ever half there."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from edgehp.errors import DataError, EnvironmentalError
from edgehp.remote.lease import Lease
from edgehp.remote.scripts import FETCH, FOLDER_GONE, NOTHING_THERE, SEND
from edgehp.remote.ssh import CONNECTION_FAILED, Session, plain

__all__ = ["Cargo", "Watch", "fetch", "files_below", "send"]

logger = logging.getLogger(__name__)

_ATTEMPTS = 3
_MOST_FILES = 1_000_000
# Of what comes back: an artifact is some tens of megabytes, a report two.
_MOST_BACK = 4 << 30
_MOST_FILES_BACK = 10_000
_LISTING = 1 << 28
_PIECE = 1 << 18
# The longest path that Linux knows.
_LONGEST_NAME = 4096

# Told (bytes done, bytes in all).
Watch = Callable[[int, int], None]


@dataclass(frozen=True)
class Cargo:
    """One file to send.

    Attributes:
        source: here.
        name: its path below ``in/`` there, with ``/``.
    """

    source: Path
    name: str


def files_below(path: Path, name: str) -> Iterator[Cargo]:
    """The regular files of a file or folder, links followed, as cargo called `name` (``/...``).

    Raises:
        DataError: nothing is there, or it cannot be read.
    """

    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror}), so not be sent")

    if path.is_file():
        yield Cargo(path, name)
        return
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder to send")
    seen: set[tuple[int, int]] = set()
    count = 0
    for root, folders, files in os.walk(path, followlinks=True, onerror=fail):
        status = Path(root).stat()
        if (status.st_dev, status.st_ino) in seen:
            # A link to a folder above: it would never end.
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        below = PurePosixPath(name, PurePosixPath(Path(root).relative_to(path).as_posix()))
        for file in sorted(files):
            source = Path(root, file)
            if source.is_file():
                count += 1
                if count > _MOST_FILES:
                    raise DataError(f"{path}: more than {_MOST_FILES} files; send less of it")
                yield Cargo(source, str(below / file))


def send(
    lease: Lease, cargo: Sequence[Cargo], watch: Watch, track: Callable[[Session], None]
) -> None:
    """Put files into ``in/`` on the board, and see by their hashes that they are there.

    What did not arrive as it was is sent again.

    Args:
        lease: of the board.
        cargo: what.
        watch: told how far it is.
        track: given each session, to end it from another thread.

    Raises:
        ConnectionLostError: the connection was lost, and the folder with it.
        EnvironmentalError: the board has no space, or files do not arrive as they were sent.
        DataError: a file here changed or went away meanwhile.
    """
    missing = {c.name: c for c in cargo}
    for _ in range(_ATTEMPTS):
        hashes: dict[str, str] = {}
        there = _send_once(lease, list(missing.values()), hashes, watch, track)
        missing = _without(missing, hashes, there)
        if not missing:
            return
        logger.warning("%s: %d files did not arrive as sent", lease.board.host, len(missing))
    raise EnvironmentalError(
        f"{lease.board.host}: {len(missing)} of {len(cargo)} files did not arrive as they were "
        f"sent, in {_ATTEMPTS} attempts ({next(iter(missing))!r}): check its disk and the network"
    )


def _without(
    missing: Mapping[str, Cargo], sent: Mapping[str, str], there: Mapping[str, str]
) -> dict[str, Cargo]:
    return {n: c for n, c in missing.items() if n not in there or there[n] != sent.get(n)}


def _send_once(
    lease: Lease,
    cargo: Sequence[Cargo],
    hashes: dict[str, str],
    watch: Watch,
    track: Callable[[Session], None],
) -> dict[str, str]:
    """Send all, note in `hashes` what was sent, and return what the board says it has."""
    try:
        total = sum(c.source.stat().st_size for c in cargo)
    except OSError as e:
        raise DataError(f"{e.filename}: cannot be read ({e.strerror}), so not be sent") from e
    with lease.session(SEND, [], talk=True) as session:
        track(session)
        done = 0
        # Either side may go away while this one writes; the exit status then says why.
        with (
            suppress(BrokenPipeError),
            tarfile.open(
                fileobj=session.stdin,
                mode="w|",
                bufsize=_PIECE,
                format=tarfile.GNU_FORMAT,
            ) as tar,
        ):
            for c in cargo:
                try:
                    with c.source.open("rb") as file:
                        info = tarfile.TarInfo(c.name)
                        status = os.fstat(file.fileno())
                        info.size, info.mode = status.st_size, 0o600
                        info.mtime = int(status.st_mtime)
                        reader = _Reader(file, lambda n: watch(n, total), done)
                        tar.addfile(info, reader)
                except BrokenPipeError:
                    raise
                except OSError as e:
                    raise DataError(f"{c.source}: changed or went away while sent ({e})") from e
                hashes[c.name] = reader.digest
                done += info.size
        with suppress(BrokenPipeError):
            session.stdin.close()
        return _answer(session, lease, "sending files")


def _answer(session: Session, lease: Lease, doing: str) -> dict[str, str]:
    """The hashes that a script printed."""
    data = session.begin().read(_LISTING)
    status = session.wait()
    if status in (CONNECTION_FAILED, FOLDER_GONE) or status < 0:
        raise lease.lost(doing, session)
    if status:
        raise EnvironmentalError(
            f"{lease.board.host}: {doing} failed there: {session.last_words or status}; free "
            "space on the board, or set TMPDIR there"
        )
    return _hashes(data, "./")


def _hashes(data: bytes, prefix: str) -> dict[str, str]:
    """What ``sha256sum -z`` printed: hex digest by name."""
    found: dict[str, str] = {}
    for record in data.split(b"\0"):
        digest, _, name = record.decode("utf-8", "surrogateescape").partition(" ")
        # A space or "*" comes before the name.
        name = name[1:].removeprefix(prefix)
        if re.fullmatch("[0-9a-f]{64}", digest) and name:
            found[name] = digest
    return found


class _Reader:
    """A file that is hashed and counted as it is read."""

    def __init__(self, file: IO[bytes], watch: Callable[[int], None], before: int) -> None:
        self._file, self._watch, self._done = file, watch, before
        self._digest = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._digest.update(data)
        self._done += len(data)
        self._watch(self._done)
        return data

    @property
    def digest(self) -> str:
        return self._digest.hexdigest()


def fetch(lease: Lease, what: str, into: Path, track: Callable[[Session], None]) -> Path | None:
    """Bring what lies below `what` in the board's folder here.

    Args:
        lease: of the board.
        what: ``"out"``, or something below ``"in"``.
        into: an empty folder here.
        track: given each session, to end it from another thread.

    Returns:
        Where it is now, each hash compared; None where there is nothing on the board.

    Raises:
        ConnectionLostError: the connection was lost.
        EnvironmentalError: what came is not what was there, or nothing one would ask for.
    """
    for attempt in range(_ATTEMPTS):
        here = into / str(attempt)
        here.mkdir()
        found = _fetch_once(lease, what, here, track)
        if found is not None:
            return here / what if found else None
        logger.warning("%s: results did not arrive as sent", lease.board.host)
    raise EnvironmentalError(
        f"the results of {lease.board.host} did not arrive as they were sent, in {_ATTEMPTS} "
        "attempts: check its disk and the network, and run it again"
    )


def _fetch_once(
    lease: Lease, what: str, here: Path, track: Callable[[Session], None]
) -> bool | None:
    """Whether something was there; None where it did not arrive as it was sent."""
    doing = "fetching results"
    with lease.session(FETCH, [what]) as session:
        track(session)
        listed: dict[str, str] | None = None
        found: dict[str, str] = {}
        try:
            with tarfile.open(
                fileobj=session.begin(), mode="r|", bufsize=_PIECE, tarinfo=_Header
            ) as tar:
                listed, found = _unpack(tar, what, here)
        # ValueError: what tarfile makes of some damaged headers.
        except (tarfile.TarError, EOFError, ValueError) as e:
            logger.debug("%s: %s", lease.board.host, e)
        except _Unwanted as e:
            raise EnvironmentalError(f"{lease.board.host} sent {e}; nothing of it is kept") from e
        status = session.wait()
        if status == NOTHING_THERE:
            return False
        if status in (CONNECTION_FAILED, FOLDER_GONE) or status < 0:
            raise lease.lost(doing, session)
        if status or listed != found:
            return None
        return bool(found)


class _Header(tarfile.TarInfo):
    """A header that is judged before tarfile does what it asks for.

    tarfile reads an extended header whole, however long it says it is, and lets it rename the next
    member, change its size, or make it a sparse one. GNU tar, which is asked for its own format,
    needs one of its kinds: the name of more than 100 characters.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        """As tarfile calls it."""
        header = super().frombuf(buf, encoding, errors)
        long_name = header.type == tarfile.GNUTYPE_LONGNAME and header.size <= _LONGEST_NAME
        ordinary = header.type in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE)
        if header.size < 0 or not (ordinary or long_name):
            raise _Unwanted(f"{plain(header.name)!r}, which is no plain file of its results")
        return header


class _Unwanted(Exception):  # noqa: N818 - never leaves this module
    """Something in an archive that no board has a reason to send."""


def _unpack(tar: tarfile.TarFile, what: str, here: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Write the files below `what`; (hashes the board listed, hashes of what was written)."""
    listed: dict[str, str] = {}
    found: dict[str, str] = {}
    size = 0
    for member in tar:
        name = member.name
        parts = name.split("/")
        plain_path = not (
            name.startswith("/")
            or ".." in parts
            or "" in parts
            or "." in parts
            # Names are shown to a person too.
            or plain(name) != name
        )
        size += member.size
        if size > _MOST_BACK or len(found) >= _MOST_FILES_BACK:
            raise _Unwanted(f"more than {_MOST_BACK >> 30} GiB or {_MOST_FILES_BACK} files")
        if member.isdir() and plain_path:
            continue
        source = tar.extractfile(member) if member.isreg() else None
        if source is None or not plain_path:
            raise _Unwanted(f"{name!r}, which is no plain file of its results")
        if name == "sums" and not found:
            listed = _hashes(source.read(_LISTING), "")
            continue
        if not name.startswith(f"{what}/"):
            raise _Unwanted(f"{name!r}, which was not asked for")
        target = here / name
        target.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        # "x": a name that comes twice is refused.
        with target.open("xb") as file:
            while data := source.read(_PIECE):
                digest.update(data)
                file.write(data)
        found[name] = digest.hexdigest()
    return listed, found
