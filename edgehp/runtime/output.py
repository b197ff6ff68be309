"""Where the lines go: a pipe or terminal, and readers of a Unix socket; none can hold the loop."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import stat
import threading
from collections import deque
from pathlib import Path
from typing import Protocol

from edgehp.errors import EnvironmentalError

__all__ = ["PipeSink", "Sink", "SocketSink"]

logger = logging.getLogger(__name__)

# Lines that wait for a slow pipe: half a minute at 30 frames a second.
_LINES = 1024
# Bytes that wait for a slow reader of the socket; lines that do not fit are dropped and counted.
_BYTES = 256 * 1024
_READERS = 16


class Sink(Protocol):
    """Takes lines."""

    @property
    def dropped(self) -> int:
        """Lines that a reader did not get because it was too slow."""

    @property
    def broken(self) -> bool:
        """Whether nobody will read any more."""

    def write(self, line: bytes) -> None:
        """Take one line with its newline; never waits for a reader (but see `PipeSink`)."""

    def pump(self) -> None:
        """Let in new readers and send what waits; called at least every tick."""

    def close(self) -> None:
        """Send what can be sent soon, and stop."""


class PipeSink:
    """A file descriptor, written by a thread of its own from a bounded queue.

    Standard output cannot be made non-blocking without doing so to everybody who shares it.
    """

    def __init__(self, descriptor: int, *, lossless: bool = False) -> None:
        """Start the thread.

        Args:
            descriptor: to write to; it stays open.
            lossless: wait for the reader instead of dropping the oldest line; for files played
                frame by frame.
        """
        self._descriptor, self._lossless = descriptor, lossless
        self._queue: deque[bytes] = deque()
        self._changed = threading.Condition()
        self._dropped = 0
        self._broken = self._closed = self._writing = False
        self._thread = threading.Thread(target=self._run, name="output", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """Lines dropped."""
        return self._dropped

    @property
    def broken(self) -> bool:
        """The reader went away."""
        return self._broken

    def write(self, line: bytes) -> None:
        """Queue a line."""
        with self._changed:
            while self._lossless and len(self._queue) >= _LINES and not self._broken:
                self._changed.wait(0.1)
            if len(self._queue) >= _LINES:
                self._queue.popleft()
                self._dropped += 1
            self._queue.append(line)
            self._changed.notify_all()

    def pump(self) -> None:
        """The thread does it."""

    def close(self) -> None:
        """Wait up to a second for the reader to take the rest (lossless: as long as it reads)."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(None if self._lossless else 1.0)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._queue and not self._closed:
                    self._changed.wait()
                if not self._queue:
                    return
                line = self._queue.popleft()
                self._changed.notify_all()
            try:
                view = memoryview(line)
                while view:
                    view = view[os.write(self._descriptor, view) :]
            except OSError as e:
                logger.info("output ended: %s", e.strerror)
                with self._changed:
                    self._broken = True
                    self._queue.clear()
                    self._changed.notify_all()
                return


class _Reader:
    """One connection, and the bytes it has not taken yet."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.connection = connection
        self.waiting = bytearray()
        self.missed = 0
        self.gone = False

    def offer(self, line: bytes) -> int:
        """Queue the line, or count it as missed; how many were missed by this call."""
        note = b'{"type":"missed","lines":%d}\n' % self.missed if self.missed else b""
        if len(self.waiting) + len(note) + len(line) > _BYTES:
            self.missed += 1
            return 1
        self.missed = 0
        self.waiting += note + line
        return 0

    def send(self) -> None:
        """Send what the reader takes now."""
        try:
            while self.waiting and not self.gone:
                del self.waiting[: self.connection.send(self.waiting)]
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.gone = True


class SocketSink:
    """A Unix stream socket; every reader that connects gets the lines from then on.

    Nothing here waits: connections and sends are non-blocking and happen in the caller's thread. A
    reader that is too slow loses whole lines, never halves, and is told how many by a line
    ``{"type":"missed","lines":N}``.
    """

    def __init__(self, path: Path, mode: int = 0o600) -> None:
        """Listen.

        Args:
            path: of the socket; one that nobody listens on any more is replaced.
            mode: its permissions; by default its owner alone may connect.

        Raises:
            EnvironmentalError: another process listens there, it is no socket, or the folder
                cannot be written.
        """
        self._path = path
        self._readers: list[_Reader] = []
        self._dropped = 0
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._server.setblocking(False)
        try:
            _remove_stale(path)
            # Bound without rights for anybody, so that no one connects before they are set.
            before = os.umask(0o777)
            try:
                self._server.bind(str(path))
            finally:
                os.umask(before)
            path.chmod(mode)
            self._server.listen(_READERS)
        except OSError as e:
            self._server.close()
            raise EnvironmentalError(
                f"{path}: cannot listen on this Unix socket ({e.strerror or e}); give a path of at "
                "most 107 bytes in a folder that you may write to"
            ) from e
        except EnvironmentalError:
            self._server.close()
            raise

    @property
    def dropped(self) -> int:
        """Lines dropped, over all readers."""
        return self._dropped

    @property
    def broken(self) -> bool:
        """Never: another reader may come."""
        return False

    @property
    def readers(self) -> int:
        """How many are connected."""
        return len(self._readers)

    def write(self, line: bytes) -> None:
        """Give the line to every reader."""
        for reader in self._readers:
            self._dropped += reader.offer(line)
        self.pump()

    def pump(self) -> None:
        """Let in new readers, send what waits, forget those that left."""
        # Nobody there, one that left again, no descriptors left: next time it may be better.
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._server.accept()
                if len(self._readers) >= _READERS:
                    connection.close()
                else:
                    self._readers.append(_Reader(connection))
        for reader in self._readers:
            reader.send()
        for reader in [r for r in self._readers if r.gone]:
            reader.connection.close()
            self._readers.remove(reader)

    def close(self) -> None:
        """Send once more, close everything, remove the socket."""
        self.pump()
        for reader in self._readers:
            reader.connection.close()
        self._readers.clear()
        self._server.close()
        self._path.unlink(missing_ok=True)


def _remove_stale(path: Path) -> None:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise EnvironmentalError(f"{path}: exists and is no socket; give another path")
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        probe.connect(str(path))
    except ConnectionRefusedError:
        path.unlink()
    else:
        raise EnvironmentalError(f"{path}: another process listens there; stop it first")
    finally:
        probe.close()
