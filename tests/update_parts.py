"""A fleet for tests: a repository made by the package's own code, a device, and tampering hands."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import patch

from edgehp.shipping import repository, slots
from edgehp.shipping.fetch import open_source
from edgehp.shipping.update import Update, update
from tests import ship_parts as parts

NOW = datetime.now(timezone.utc).replace(microsecond=0)


@dataclass(frozen=True)
class Fleet:
    """A repository, its keys, the release key, and the root metadata that devices came with."""

    folder: Path
    signer: parts.Signer
    root_metadata: Path

    @property
    def public(self) -> Path:
        return self.folder / "repository"

    @property
    def keys(self) -> Path:
        return self.folder / "keys"

    @property
    def metadata(self) -> Path:
        return self.public / "metadata"

    def bundle(self, name: str, **options: Any) -> Path:
        return parts.bundle(self.folder, name, self.signer, **options)

    def add(self, name: str, *, share: int = 100, **options: Any) -> str:
        bundle = self.bundle(name, **options)
        return repository.add(self.public, bundle, self.signer.trust, share=share).path

    def rollout(self, name: str, **change: Any) -> None:
        repository.set_rollout(self.public, name, **change)
        self.publish()

    def publish(self, days_ago: float = 0) -> dict[str, int]:
        at = NOW - timedelta(days=days_ago)
        with patch.object(repository, "_now", lambda: at):
            return repository.publish(self.public, self.keys)

    def release(self, *names: str, **options: Any) -> None:
        for name in names:
            self.add(name, **options)
        self.publish()

    def rotate(self, role: str) -> None:
        repository.rotate_key(self.public, role, self.keys)

    def update(
        self, root: Path, where: Any = None, *, device_id: str | None = None, **how: Any
    ) -> Update:
        source = open_source(str(where or self.public))
        with parts.on_device(**how), patch.object(slots, "_finish", parts.finish_tiny):
            return update(source, self.root_metadata, self.signer.trust, root, device_id=device_id)


def new_fleet(folder: Path, *names: str) -> Fleet:
    """A fleet whose repository publishes bundles of these names, one after another."""
    folder.mkdir(exist_ok=True)
    root = repository.init(folder / "repository", folder / "keys")
    given = folder / "root.json"
    shutil.copyfile(root, given)
    fleet = Fleet(folder, parts.new_signer(folder, "release"), given)
    if names:
        fleet.release(*names)
    return fleet


def name_here(root: Path) -> str | None:
    """The artifact that is current, None where nothing is."""
    found = slots.status(root).current if root.is_dir() else None
    return None if found is None else found.artifact_name


@dataclass
class Wire:
    """What a web server was asked for, and how it shall misbehave.

    Attributes:
        cut: bytes of a file's body after which the connection is closed, by part of its path.
        endless: paths that never end.
        ranges: whether ranges are answered.
        drip: seconds between bytes, by part of the path.
        status: HTTP status to answer with, by part of the path.
        length: what is said instead of a file's length.
        page: a web page to answer missing files with, or, where it is a log-in page, everything.
        login: whether it is.
        moved: where everything is now.
        asked: (path, Range) of every request.
        logins: the Authorization of every request.
        sent: bytes of files that never end.
    """

    cut: dict[str, int] = field(default_factory=dict)
    endless: tuple[str, ...] = ()
    ranges: bool = True
    drip: dict[str, float] = field(default_factory=dict)
    status: dict[str, int] = field(default_factory=dict)
    length: str | None = None
    page: bytes | None = None
    login: bool = False
    moved: str | None = None
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    logins: list[str | None] = field(default_factory=list)
    sent: int = 0


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, wire: Wire, folder: Path, pause: Callable[[float], object], *rest: Any):
        self.wire, self.folder, self.pause = wire, folder, pause
        super().__init__(*rest)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def _of(self, table: dict[str, Any]) -> Any:
        return next((v for k, v in table.items() if k in self.path), None)

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.wire.asked.append((self.path, wanted))
        self.wire.logins.append(self.headers.get("Authorization"))
        if self.wire.moved is not None:
            self.send_response(302)
            self.send_header("Location", self.wire.moved + self.path)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        path = self.folder / self.path.lstrip("/")
        status = self._of(self.wire.status)
        if self.wire.page is not None and (self.wire.login or not path.is_file()):
            self.send_response(200)
            self.send_header("Content-Length", str(len(self.wire.page)))
            self.end_headers()
            self.wfile.write(self.wire.page)
            return
        if status is not None or not path.is_file():
            self.send_error(status or 404)
            return
        data, start = path.read_bytes(), 0
        if wanted and self.wire.ranges:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        endless = any(e in self.path for e in self.wire.endless)
        if not endless:
            self.send_header("Content-Length", self.wire.length or str(len(data) - start))
        self.end_headers()
        body = data[start:]
        cut, drip = self._of(self.wire.cut), self._of(self.wire.drip)
        try:
            if drip is not None:
                for byte in body:
                    self.wfile.write(bytes([byte]))
                    self.pause(drip)
            self.wfile.write(body if cut is None else body[:cut])
            while endless:
                self.wfile.write(b" " * 65536)
                self.wire.sent += 65536
        except OSError:
            pass  # the client had enough


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, Wire]]:
    """A web server on loopback: its URL, and how it behaves."""
    wire, stop = Wire(), threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, wire, folder, stop.wait))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", wire
    finally:
        stop.set()
        server.shutdown()
        thread.join()
        server.server_close()
