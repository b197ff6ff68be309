"""What leaves the loop: lines, signs of life, counters. No reader can hold it.

* Lines go to a pipe or terminal, and to the readers of a Unix socket.
* Signs of life go to systemd: a datagram of ``NAME=VALUE`` lines to the socket in
  ``$NOTIFY_SOCKET``, whose first character ``@`` stands for Linux's abstract namespace;
  ``$WATCHDOG_USEC`` is the longest silence. Both are described in systemd's manual pages
  sd_notify(3) and sd_watchdog_enabled(3), and are stable interfaces.
* Counters go to Prometheus on the loopback interface; needs the package ``prometheus-client``.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import socket
import stat
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgehp._installed import install_extra
from edgehp.errors import EnvironmentalError
from edgehp.runtime.records import json_line

logger = logging.getLogger(__name__)

# Lines that wait for a slow pipe: half a minute at 30 frames a second.
_LINES = 1024
# Bytes that wait for a slow reader of the socket; lines that do not fit are dropped and counted.
_BYTES = 256 * 1024
_READERS = 16
# Counters are served on no other interface: the numbers say when somebody drives.
_LOOPBACK = "127.0.0.1"
_BUCKETS = (0.005, 0.01, 0.02, 0.033, 0.05, 0.067, 0.1, 0.2, 0.3, 0.5, 1.0)


class Sink:
    """Takes lines.

    Attributes:
        dropped: lines that a reader did not get because it was too slow.
        broken: whether nobody will read any more.
    """

    dropped = 0
    broken = False

    def write(self, line: bytes) -> None:
        """Take one line with its newline; never waits for a reader (but see `PipeSink`)."""

    def pump(self) -> None:
        """Let in new readers and send what waits; called at least every tick."""

    def close(self) -> None:
        """Send what can be sent soon, and stop."""


class PipeSink(Sink):
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
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="output", daemon=True)
        self._thread.start()

    def write(self, line: bytes) -> None:
        """Queue a line."""
        with self._changed:
            while self._lossless and len(self._queue) >= _LINES and not self.broken:
                self._changed.wait(0.1)
            if len(self._queue) >= _LINES:
                self._queue.popleft()
                self.dropped += 1
            self._queue.append(line)
            self._changed.notify_all()

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
            # Whatever it is: a thread that ends unseen would leave nobody reading.
            except Exception as e:
                logger.info("output ended: %s", getattr(e, "strerror", None) or e)
                with self._changed:
                    self.broken = True
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
        note = json_line({"type": "missed", "lines": self.missed}) if self.missed else b""
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


class SocketSink(Sink):
    """A Unix stream socket; every reader that connects gets the lines from then on.

    Nothing here waits: connections and sends are non-blocking and happen in the caller's thread. A
    reader that is too slow loses whole lines, never halves, and is told how many by a line
    ``{"type": "missed", "lines": N}``.
    """

    def __init__(self, path: Path) -> None:
        """Listen.

        Args:
            path: of the socket, to which its owner alone may connect; one that nobody listens on
                any more is replaced.

        Raises:
            EnvironmentalError: another process listens there, it is no socket, or the folder
                cannot be written.
        """
        self._path = path
        self._readers: list[_Reader] = []
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
            path.chmod(0o600)
            self._server.listen(_READERS)
        except OSError as e:
            self._server.close()
            raise EnvironmentalError(
                f"{path}: cannot listen on this Unix socket ({e.strerror or e})\n"
                "hint: give a path of at most 107 bytes in a folder that you may write to"
            ) from e
        except EnvironmentalError:
            self._server.close()
            raise

    def write(self, line: bytes) -> None:
        """Give the line to every reader."""
        for reader in self._readers:
            self.dropped += reader.offer(line)
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


# --- signs of life and counters -------------------------------------------------------------------


class Watchdog:
    """Notifies the service manager; does nothing where there is none."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        """Read the environment.

        Args:
            environment: of the process by default.
        """
        env = os.environ if environment is None else environment
        address = env.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self.interval = _interval(env)
        self._next = 0.0
        self._socket: socket.socket | None = None
        if address[:1] in ("/", "@"):
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            # A manager that does not read must not hold the loop.
            self._socket.setblocking(False)

    @property
    def enabled(self) -> bool:
        """Whether somebody listens."""
        return self._socket is not None

    def ready(self, status: str) -> None:
        """The service has started."""
        self._send(f"READY=1\nSTATUS={_status_line(status)}")

    def status(self, status: str) -> None:
        """One line for ``systemctl status``."""
        self._send(f"STATUS={_status_line(status)}")

    def alive(self) -> None:
        """Call often: sends a sign of life when half of the allowed silence is over."""
        now = time.monotonic()
        if self.interval is not None and now >= self._next:
            self._next = now + self.interval
            self._send("WATCHDOG=1")

    def stopping(self) -> None:
        """The service stops on purpose."""
        self._send("STOPPING=1")

    def close(self) -> None:
        """Close the socket."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, message: str) -> None:
        if self._socket is None:
            return
        try:
            self._socket.sendto(message.encode(), self._address)
        except OSError as e:
            logger.warning("the service manager did not take %r: %s", message.split("\n")[0], e)


def _status_line(text: str) -> str:
    """One line: another would be an assignment of its own to the service manager."""
    return " ".join(text.split())[:200]


def _interval(env: Mapping[str, str]) -> float | None:
    """Seconds between signs of life: half of what is allowed, as the manual page advises."""
    if env.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    try:
        microseconds = int(env.get("WATCHDOG_USEC", "0"))
    except ValueError:
        return None
    return microseconds / 2e6 if microseconds > 0 else None


class Metrics:
    """Serves http://127.0.0.1:PORT/metrics for Prometheus."""

    def __init__(self, port: int) -> None:
        """Start serving.

        Args:
            port: 1..65535; 0 takes a free one (see `port`).

        Raises:
            EnvironmentalError: the package is missing or the port is taken.
        """
        try:
            client = importlib.import_module("prometheus_client")
        except ImportError as e:
            raise EnvironmentalError(
                "--metrics needs the package prometheus-client; install it with "
                f"{install_extra('runtime')}"
            ) from e
        self._client = client
        # A registry of its own: the default one is the whole process's.
        self._registry = client.CollectorRegistry()
        self._records: Any = client.Counter(
            "edgehp_records", "Records by state", ["state"], registry=self._registry
        )
        self._latency: Any = client.Histogram(
            "edgehp_latency_seconds",
            "From the end of reading a frame to its result",
            buckets=_BUCKETS,
            registry=self._registry,
        )
        self._counters: dict[str, Any] = {}
        self._counted: dict[str, int] = {}
        try:
            self._server, self._thread = client.start_http_server(
                port, addr=_LOOPBACK, registry=self._registry
            )
        except OSError as e:
            raise EnvironmentalError(
                f"--metrics {port}: cannot listen on {_LOOPBACK}:{port} ({e.strerror or e}); "
                "give another port"
            ) from e
        self.port: int = self._server.server_port

    @property
    def alive(self) -> bool:
        """Whether the thread that serves still runs."""
        return bool(self._thread.is_alive())

    def result(self, state: str, latency: float | None) -> None:
        """Count one record with its state; for a frame also its latency in seconds."""
        self._records.labels(state).inc()
        if latency is not None:
            self._latency.observe(latency)

    def totals(self, values: Mapping[str, int]) -> None:
        """Set the counters ``edgehp_NAME_total`` to counts since the start, by name."""
        for name, value in values.items():
            if name not in self._counters:
                self._counters[name] = self._client.Counter(
                    f"edgehp_{name}", f"{name.replace('_', ' ')} since the start",
                    registry=self._registry,
                )  # fmt: skip
            self._counters[name].inc(max(0, value - self._counted.get(name, 0)))
            self._counted[name] = value

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(2.0)
