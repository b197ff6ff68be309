"""Where updates come from: a web server or a folder, read within bounds, resumed where cut."""

from __future__ import annotations

import base64
import http.client
import logging
import os
import stat
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from edgehp import __version__
from edgehp.errors import CompatibilityError, DataError, EnvironmentalError
from edgehp.progress import step
from edgehp.shipping import disk

logger = logging.getLogger(__name__)

_CHUNK = 256 * 1024
# How slow a server may be: the longest wait for a connection and for the next byte, in seconds, and
# the least mean speed of a file, of which nothing is said before so many seconds.
_SILENCE_S, _GRACE_S, _BYTES_PER_S = 30.0, 60.0, 1000.0


class MissingError(DataError):
    """The repository has no such file."""


@dataclass(frozen=True)
class DirectorySource:
    """A repository in a folder, such as a USB stick."""

    folder: Path

    @property
    def name(self) -> str:
        """The folder."""
        return str(self.folder)

    @contextmanager
    def pieces(self, path: str, start: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        """The file `path` from byte `start` on: where it begins, and what comes.

        Raises:
            MissingError: there is no such file.
            EnvironmentalError: it cannot be read, now or while it is read.
        """
        full = self.folder / path
        try:
            # O_NONBLOCK: a named pipe must not make us wait for a writer.
            descriptor = os.open(full, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (FileNotFoundError, NotADirectoryError) as e:
            raise MissingError(f"{full}: there is no such file in the repository") from e
        except OSError as e:
            raise EnvironmentalError(f"{full} cannot be read ({e.strerror or e})") from e
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise MissingError(f"{full} is no regular file")
            yield start, self._read(descriptor, start, full)
        finally:
            os.close(descriptor)

    @staticmethod
    def _read(descriptor: int, at: int, full: Path) -> Iterator[bytes]:
        try:
            while piece := os.pread(descriptor, _CHUNK, at):
                at += len(piece)
                yield piece
        except OSError as e:
            raise EnvironmentalError(
                f"{full} cannot be read on from byte {at} ({e.strerror or e}); check the medium"
            ) from e


@dataclass(frozen=True)
class HttpSource:
    """A repository on a web server. What it says is believed by signatures alone, TLS or not.

    Attributes:
        name: the URL, without a login.
        login: ``USER:PASSWORD``, sent to that server alone; empty for none.
    """

    name: str
    login: str = field(default="", repr=False)

    @contextmanager
    def pieces(self, path: str, start: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        """As of a folder, by a range where `start` is not 0; from 0 where that cannot be."""
        url = f"{self.name.rstrip('/')}/{urllib.parse.quote(path)}"
        response, begin = self._open(url, start)
        try:
            yield begin, self._read(response, url)
        finally:
            response.close()

    def _open(self, url: str, start: int) -> tuple[http.client.HTTPResponse, int]:
        opener = urllib.request.OpenerDirector()
        # No handler for file:, ftp: and data:, wherever a redirection leads.
        for handler in (
            urllib.request.ProxyHandler,
            urllib.request.HTTPHandler,
            urllib.request.HTTPSHandler,
            urllib.request.HTTPRedirectHandler,
            urllib.request.HTTPDefaultErrorHandler,
            urllib.request.HTTPErrorProcessor,
            urllib.request.UnknownHandler,
        ):
            opener.add_handler(handler())
        headers = {"User-Agent": f"edgehp/{__version__}", "Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        try:
            request = urllib.request.Request(url, headers=headers)
            if self.login:
                # Not for the server that a redirection leads to.
                secret = base64.b64encode(self.login.encode()).decode()
                request.add_unredirected_header("Authorization", f"Basic {secret}")
            response = opener.open(request, timeout=_SILENCE_S)
        except urllib.error.HTTPError as e:
            e.close()
            if start and e.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                return self._open(url, 0)
            if e.code in (
                http.HTTPStatus.NOT_FOUND,
                http.HTTPStatus.FORBIDDEN,
                http.HTTPStatus.GONE,
            ):
                raise MissingError(f"{url}: the server has no such file ({e.code})") from e
            if e.code == http.HTTPStatus.UNAUTHORIZED:
                raise EnvironmentalError(
                    f"{url}: the server wants another user or password ({e.code})\n"
                    "hint: give them in the URL, as in https://USER:PASSWORD@HOST/PATH"
                ) from e
            if e.code < http.HTTPStatus.BAD_REQUEST:
                raise EnvironmentalError(
                    f"{url}: the server leads in a circle or away from the web ({e.code})\n"
                    "hint: open the address in a browser, and check --repository"
                ) from e
            raise EnvironmentalError(
                f"{url}: the server answers {e.code} {e.reason}; try again later"
            ) from e
        except (OSError, http.client.HTTPException, ValueError) as e:
            reason = getattr(e, "reason", None) or e
            raise EnvironmentalError(
                f"{url} cannot be reached ({reason}); check the network and --repository"
            ) from e
        if not start or response.status != http.HTTPStatus.PARTIAL_CONTENT:
            return response, 0
        if not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            response.close()
            return self._open(url, 0)
        return response, start

    @staticmethod
    def _read(response: http.client.HTTPResponse, url: str) -> Iterator[bytes]:
        began, count = time.monotonic(), 0
        promised = response.headers.get("Content-Length", "")
        while True:
            try:
                piece = response.read1(_CHUNK)
            except (OSError, http.client.HTTPException) as e:
                raise EnvironmentalError(
                    f"{url}: the connection was lost ({e}); run the command again"
                ) from e
            if not piece:
                break
            count += len(piece)
            seconds = time.monotonic() - began
            if seconds > _GRACE_S and count < seconds * _BYTES_PER_S:
                raise EnvironmentalError(
                    f"{url} came at {count / seconds:.0f} bytes a second, expected "
                    f"{_BYTES_PER_S:.0f} at least\n"
                    "hint: use a better connection or a USB stick"
                )
            yield piece
        # Twenty digits are more than any file has; Python refuses to read some thousand.
        if promised.isdecimal() and len(promised) < 20 and count < int(promised):
            raise EnvironmentalError(
                f"{url}: the connection ended after {count} of {promised} bytes\n"
                "hint: run the command again, it goes on from there"
            )


Source = DirectorySource | HttpSource


def open_source(repository: str) -> Source:
    """The repository behind a URL (``http://``, ``https://``, ``file://``) or the path of a folder.

    Raises:
        DataError: there is no such folder, or it holds no repository.
    """
    parts = urllib.parse.urlsplit(repository)
    if parts.scheme in ("http", "https"):
        login, _, place = parts.netloc.rpartition("@")
        return HttpSource(parts._replace(netloc=place).geturl(), urllib.parse.unquote(login))
    folder = Path(urllib.parse.unquote(parts.path) if parts.scheme == "file" else repository)
    if not (folder / "metadata").is_dir():
        raise DataError(
            f"{folder} is no repository: it has no folder 'metadata'\n"
            "hint: give the folder made by 'edgehp repo init', or a URL that begins with http:// "
            "or https://"
        )
    return DirectorySource(folder)


def read_bounded(source: Source, path: str, limit: int) -> bytes:
    """A whole file of at most `limit` bytes.

    Raises:
        MissingError: there is no such file.
        CompatibilityError: it goes on after `limit` bytes.
        EnvironmentalError: it cannot be read.
    """
    data = bytearray()
    with source.pieces(path, 0) as (_, pieces):
        for piece in pieces:
            data += piece
            if len(data) > limit:
                raise _endless(source, path, limit)
    return bytes(data)


def download(source: Source, path: str, target: Path, length: int) -> None:
    """Make `target` the file `path` of `length` bytes; what it holds already is not fetched again.

    Nothing is verified. What was fetched stays when this raises `EnvironmentalError`.

    Args:
        source: the repository.
        path: in it.
        target: on this disk.
        length: in bytes, as signed.

    Raises:
        MissingError: there is no such file.
        CompatibilityError: it goes on after `length` bytes; `target` is removed.
        EnvironmentalError: it cannot be read, or ended early.
        OSError: the disk is full or refuses.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(target, flags, 0o644)
    try:
        at = os.fstat(descriptor).st_size
        if at > length:
            os.ftruncate(descriptor, 0)
            at = 0
        if at < length:
            with step("download", length, "B") as going, source.pieces(path, at) as (start, pieces):
                if start:
                    logger.info("%s: going on from byte %d of %d", path, start, length)
                if start != at:
                    os.ftruncate(descriptor, start)
                at = start
                for piece in pieces:
                    at += len(piece)
                    if at > length:
                        raise _endless(source, path, length)
                    left = memoryview(piece)
                    while left:
                        left = left[os.write(descriptor, left) :]
                    going.update(at)
        if at < length:
            raise EnvironmentalError(
                f"{source.name}: {path} ended after {at} of {length} bytes; copy or publish the "
                "repository again"
            )
    except CompatibilityError:
        disk.remove_tree(target)
        raise
    finally:
        os.fsync(descriptor)
        os.close(descriptor)
    disk.flush_folder(target.parent)


def _endless(source: Source, path: str, limit: int) -> CompatibilityError:
    return CompatibilityError(
        f"{source.name}: {path} does not end after the {limit} bytes it may have (endless data); "
        "nothing of it is kept: somebody alters the repository, or a copy of it is broken"
    )
