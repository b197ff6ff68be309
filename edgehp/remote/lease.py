"""The private folder on a board, which lives exactly as long as somebody here needs it."""

from __future__ import annotations

import logging
import re
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from edgehp import __version__
from edgehp.errors import EnvironmentalError
from edgehp.remote.boards import Board
from edgehp.remote.scripts import HOLD
from edgehp.remote.ssh import CONNECTION_FAILED, ConnectionLostError, Session, plain

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
    """

    def __init__(
        self,
        board: Board,
        *,
        beat_s: float = BEAT_S,
        patience_s: float = PATIENCE_S,
        track: Callable[[Session | None], None] | None = None,
    ) -> None:
        """Name the board.

        Args:
            board: where.
            beat_s: seconds between signs of life.
            patience_s: seconds without one after which the board gives up on this side.
            track: given the session while it connects, to end it from another thread.
        """
        self.board = board
        self.folder = ""
        self.version = ""
        self._beat_s = beat_s
        self._patience_s = patience_s
        self._track = track or (lambda _: None)
        self._session: Session | None = None
        self._private: tempfile.TemporaryDirectory[str] | None = None
        self._closing = threading.Event()
        self._beat: threading.Thread | None = None
        self._write = threading.Lock()

    def __enter__(self) -> Lease:
        """Connect, make the folder and ask edgehp there for its version.

        Raises:
            EnvironmentalError: no connection, an unknown host key, no edgehp, a tool that is
                missing there.
        """
        arguments = [f"{self._patience_s:g}", *self.board.command]
        self._private = tempfile.TemporaryDirectory(prefix="edgehp-")
        try:
            self._session = Session(
                self.board, HOLD, arguments, talk=True, control=self._control, master=True
            )
            self._greeted(self._session)
        except BaseException:
            self._close()
            raise
        self._beat = threading.Thread(target=self._keep_alive, daemon=True)
        self._beat.start()
        return self

    def _greeted(self, session: Session) -> None:
        """`_greet`, within `_OPENING_S`."""
        watchdog = threading.Timer(_OPENING_S, session.kill)
        watchdog.daemon = True
        watchdog.start()
        try:
            self._track(session)
            self._greet(session)
        finally:
            watchdog.cancel()
            self._track(None)

    def _greet(self, session: Session) -> None:
        out, said = session.begin(), {}
        while line := out.readline(_LINE):
            word, _, rest = plain(line.decode("utf-8", "replace").rstrip("\n")).partition(" ")
            said[word] = rest
            if word in ("ready", "lacks", "nofolder"):
                break
        host, command = self.board.host, " ".join(self.board.command)
        if "lacks" in said:
            raise EnvironmentalError(
                f"{host} lacks the command {said['lacks']!r}, which running there needs; install "
                "it (Debian, Ubuntu: coreutils, findutils, tar, util-linux)"
            )
        if "nofolder" in said:
            raise EnvironmentalError(
                f"{host}: no private folder can be made there ({session.last_words}); free space "
                "or set TMPDIR there"
            )
        if "ready" not in said:
            session.kill()
            if session.wait() not in (CONNECTION_FAILED, -9) and session.last_words:
                raise EnvironmentalError(f"{host} runs no commands: {session.last_words}")
            raise session.failure("connecting")
        if not re.fullmatch(r"/[^\0\n]*/edgehp-\w{8}", said.get("folder", "")):
            raise EnvironmentalError(f"{host} answered with {said.get('folder')!r}, not a folder")
        self.folder = said["folder"]
        status, _, words = said.get("version", "").partition(" ")
        if status != "0":
            reason = said.get("reason") or f"exit code {status}"
            raise EnvironmentalError(
                f"edgehp was not found on {host}: {command!r} ended with: {reason}; install "
                f"edgehp {__version__} there, or say where it is with --remote-command"
            )
        self.version = words.split()[-1] if words.split() else ""
        logger.debug("%s: %s, edgehp %s", host, self.folder, self.version)

    @property
    def _control(self) -> Path | None:
        return None if self._private is None else Path(self._private.name, "s")

    def session(
        self,
        script: str,
        arguments: Sequence[str],
        *,
        talk: bool = False,
        on_stderr: Callable[[str], None] | None = None,
    ) -> Session:
        """Start a script over the same connection; arguments as of `Session`."""
        return Session(
            self.board,
            script,
            [self.folder, *arguments],
            talk=talk,
            control=self._control,
            on_stderr=on_stderr,
        )

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
        return self._session is not None and self._session.process.poll() is None

    def lost(self, doing: str, session: Session) -> ConnectionLostError:
        """The error for a session that ended with its connection."""
        found = session
        if self._session is not None:
            with suppress(subprocess.TimeoutExpired):
                self._session.wait(1)
                # The one that made the connection knows why it ended.
                found = self._session
        return found.failure(doing)

    def interrupt(self) -> None:
        """Interrupt the command that runs in the folder, as Ctrl-C does."""
        self._send(b"i")

    def _keep_alive(self) -> None:
        while not self._closing.wait(self._beat_s) and self._send(b"."):
            pass

    def _send(self, byte: bytes) -> bool:
        session = self._session
        if session is None or self._closing.is_set():
            return False
        try:
            with self._write:
                session.stdin.write(byte)
                session.stdin.flush()
        except (OSError, ValueError):
            # The connection has ended, or is being closed: `alive` tells.
            return False
        return True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let the board tidy up, and wait until it has."""
        self._close()

    def _close(self) -> None:
        self._closing.set()
        session, self._session = self._session, None
        if session is not None:
            with session:
                with suppress(OSError), self._write:
                    session.stdin.close()
                try:
                    session.wait(_CLOSING_S)
                except subprocess.TimeoutExpired:
                    logger.warning(
                        "%s did not say that it has removed %s", self.board.host, self.folder
                    )
        if self._private is not None:
            self._private.cleanup()
            self._private = None
