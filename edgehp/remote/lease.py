"""The private folder on a board, which lives exactly as long as somebody here needs it."""

from __future__ import annotations

import logging
import re
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from edgehp import __version__
from edgehp.errors import EnvironmentalError
from edgehp.remote.boards import Board
from edgehp.remote.ssh import (
    CONNECTION_FAILED,
    HOLD,
    Session,
    connection_error,
    encode,
    plain,
    ssh_command,
)

__all__ = ["Lease"]

logger = logging.getLogger(__name__)

# Seconds between signs of life, and how many may be missing until the board tidies up by itself.
BEAT_S = 10.0
# More than a slow line may take for what is queued before a sign.
PATIENCE_S = 120.0
# The board gives an interrupted command ten seconds before it kills it.
_CLOSING_S = 20.0
# Logging in, and one start of Python on a slow board.
_OPENING_S = 120.0
_LINE = 1 << 16


class Lease:
    """A private folder on a board; a context manager.

    One connection holds it. When that ends, for whatever reason, the board stops the command that
    runs in the folder and removes the folder: nothing is left behind by a crash on this side or by
    a network that is gone.

    Attributes:
        board: where.
        folder: the absolute path there; ``in/`` and ``out/`` are in it.
        version: of the edgehp there.
        abandoned: whether `abandon` was called.
    """

    def __init__(
        self, board: Board, *, beat_s: float = BEAT_S, patience_s: float = PATIENCE_S
    ) -> None:
        """Name the board.

        Args:
            board: where.
            beat_s: seconds between signs of life.
            patience_s: seconds without one after which the board gives up on this side.
        """
        self.board = board
        self.folder = ""
        self.version = ""
        self.abandoned = False
        self._beat_s, self._patience_s = beat_s, patience_s
        self._private: tempfile.TemporaryDirectory[str] | None = None
        self._holder: Session | None = None
        # What is going on: the holder while it connects, later the session over its connection.
        self._current: Session | None = None
        self._closing = threading.Event()
        self._write, self._lock = threading.Lock(), threading.Lock()

    def __enter__(self) -> Lease:
        """Connect, make the folder and ask edgehp there for its version.

        Raises:
            EnvironmentalError: no connection, an unknown host key, no edgehp, a tool that is
                missing there.
        """
        self._private = tempfile.TemporaryDirectory(prefix="edgehp-")
        try:
            arguments = [f"{self._patience_s:g}", *self.board.command]
            self._holder = self._start(HOLD, arguments, talk=True, master=True)
            watchdog = threading.Timer(_OPENING_S, self._holder.kill)
            watchdog.daemon = True
            watchdog.start()
            try:
                self._greet(self._holder)
            finally:
                watchdog.cancel()
                self._current = None
        except BaseException:
            self.close()
            raise
        threading.Thread(target=self._keep_alive, daemon=True).start()
        return self

    def _start(
        self,
        script: str,
        arguments: Sequence[str],
        *,
        talk: bool,
        master: bool = False,
        on_stderr: Callable[[str], None] | None = None,
    ) -> Session:
        if self._private is None:
            raise ValueError("the lease was not entered")
        words = ssh_command(Path(self._private.name), master)
        words += ["--", self.board.host, encode(script, arguments)]
        with self._lock:
            if self.abandoned:
                raise EnvironmentalError("interrupted")
            self._current = Session(words, talk=talk, on_stderr=on_stderr)
            return self._current

    def _greet(self, holder: Session) -> None:
        out, said = holder.begin(), {}
        while line := out.readline(_LINE):
            word, _, rest = plain(line.decode("utf-8", "replace").rstrip("\n")).partition(" ")
            said[word] = rest
            if word in ("ready", "lacks", "nofolder"):
                break
        host, command = self.board.host, " ".join(self.board.command)
        if "lacks" in said:
            raise EnvironmentalError(
                f"{host} lacks the command {said['lacks']!r}, which running there needs\n"
                "hint: install it (Debian, Ubuntu: coreutils, tar, util-linux)"
            )
        if "nofolder" in said:
            raise EnvironmentalError(
                f"{host}: no private folder can be made there ({holder.last_words}); free space "
                "or set TMPDIR there"
            )
        if "ready" not in said:
            holder.kill()
            if holder.wait() not in (CONNECTION_FAILED, -9) and holder.last_words:
                raise EnvironmentalError(f"{host} runs no commands: {holder.last_words}")
            raise self.lost("connecting")
        if not re.fullmatch(r"/[^\0\n]*/edgehp-\w{8}", said.get("folder", "")):
            raise EnvironmentalError(f"{host} answered with {said.get('folder')!r}, not a folder")
        self.folder = said["folder"]
        status, _, words = said.get("version", "").partition(" ")
        if status != "0":
            reason = said.get("reason") or f"exit code {status}"
            raise EnvironmentalError(
                f"edgehp was not found on {host}: {command!r} ended with: {reason}\nhint: install "
                f"edgehp {__version__} there, or say where it is with --remote-command"
            )
        self.version = words.split()[-1] if words.split() else ""
        logger.debug("%s: %s, edgehp %s", host, self.folder, self.version)

    @contextmanager
    def session(
        self,
        script: str,
        arguments: Sequence[str] = (),
        *,
        talk: bool = False,
        on_stderr: Callable[[str], None] | None = None,
    ) -> Iterator[Session]:
        """Run a script in the folder over the same connection; arguments as of `Session`."""
        words = [self.folder, *arguments]
        with self._start(script, words, talk=talk, on_stderr=on_stderr) as session:
            try:
                yield session
            finally:
                self._current = None

    def require_same_version(self) -> None:
        """Refuse a board whose edgehp is not this one.

        Raises:
            EnvironmentalError: it is another.
        """
        if self.version != __version__:
            raise EnvironmentalError(
                f"{self.board.host} has edgehp {self.version or 'of an unknown version'}, this "
                f"machine {__version__}: install the same version on both"
            )

    @property
    def alive(self) -> bool:
        """Whether the connection that holds the folder still stands."""
        return self._holder is not None and self._holder.process.poll() is None

    def lost(self, doing: str) -> EnvironmentalError:
        """The error for a connection that ended while `doing`."""
        text = ""
        if self._holder is not None and self._private is not None:
            # The one that made the connection knows why it ended.
            with suppress(subprocess.TimeoutExpired):
                self._holder.wait(1)
            with suppress(OSError):
                text = Path(self._private.name, "log").read_text("utf-8", "replace")
            text = text or self._holder.last_words
        return connection_error(self.board.host, doing, text)

    def interrupt(self) -> None:
        """Interrupt the command that runs in the folder, as Ctrl-C does."""
        self._send(b"i")

    def abandon(self) -> None:
        """End what is going on and let nothing begin; the board tidies up."""
        with self._lock:
            self.abandoned = True
            if self._current is not None:
                self._current.kill()

    def _keep_alive(self) -> None:
        while not self._closing.wait(self._beat_s) and self._send(b"."):
            pass

    def _send(self, byte: bytes) -> bool:
        holder = self._holder
        if holder is None or self._closing.is_set():
            return False
        try:
            with self._write:
                holder.stdin.write(byte)
                holder.stdin.flush()
        except (OSError, ValueError):
            # The connection has ended, or is being closed: `alive` tells.
            return False
        return True

    def __exit__(self, *_: object) -> None:
        """Let the board tidy up, and wait until it has."""
        self.close()

    def close(self) -> None:
        """Let the board end the command and tidy up, and wait until it has."""
        self._closing.set()
        holder, self._holder = self._holder, None
        if holder is not None:
            with holder:
                with suppress(OSError), self._write:
                    holder.stdin.close()
                try:
                    holder.wait(_CLOSING_S)
                except subprocess.TimeoutExpired:
                    logger.warning(
                        "%s did not say that it has removed %s", self.board.host, self.folder
                    )
        if self._private is not None:
            self._private.cleanup()
            self._private = None
