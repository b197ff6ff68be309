"""The user's own ``ssh``: one script on one board in one process, and what its failures mean."""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO

from edgehp.errors import EnvironmentalError, UsageError
from edgehp.remote.boards import Board
from edgehp.remote.scripts import MARK, encode

__all__ = [
    "CONNECTION_FAILED",
    "PROGRAM",
    "ConnectionLostError",
    "Session",
    "plain",
    "ssh_command",
]

PROGRAM = "EDGEHP_SSH"
# What ssh itself ends with when there is no connection, or no longer.
CONNECTION_FAILED = 255
# Before the user's own options, where ssh lets the first value win: never decided elsewhere.
_FIRM = (
    "StrictHostKeyChecking=yes",
    "NoHostAuthenticationForLocalhost=no",
    "BatchMode=yes",
    "RequestTTY=no",
    "RemoteCommand=none",
    "ForwardAgent=no",
    "ForwardX11=no",
    "ClearAllForwardings=yes",
    "PermitLocalCommand=no",
    # The messages that `Session.failure` reads.
    "LogLevel=INFO",
)
# After them: EDGEHP_SSH may set others.
_USUAL = ("ConnectTimeout=15", "ServerAliveInterval=5", "ServerAliveCountMax=3")
_LONGEST_GREETING = 1 << 20
_LONGEST_LINE = 1 << 26


# A socket's name has about 100 characters, and ssh adds some while it makes it.
_LONGEST_SOCKET = 80


def ssh_command(control: Path | None = None, master: bool = False) -> list[str]:
    """The program and its options: ``$EDGEHP_SSH``, else ``ssh``.

    Args:
        control: the socket over which sessions share one connection. Never the user's own: that
            would bring its own keep-alives, or none.
        master: whether this is the session that makes the connection.

    Raises:
        UsageError: the variable holds no command.
    """
    text = os.environ.get(PROGRAM, "ssh")
    try:
        words = shlex.split(text)
    except ValueError as e:
        raise UsageError(f"{PROGRAM}={text!r}: {e}") from e
    if not words:
        raise UsageError(f"{PROGRAM} is empty: expected a command such as 'ssh -F FILE', or unset")
    shared = control is not None and len(os.fsencode(control)) <= _LONGEST_SOCKET
    control_options = (
        f"ControlPath={control if shared else 'none'}",
        f"ControlMaster={'yes' if shared and master else 'no'}",
    )
    firm = [word for option in (*_FIRM, *control_options) for word in ("-o", option)]
    usual = [word for option in _USUAL for word in ("-o", option)]
    return [words[0], *firm, *words[1:], *usual, "-T"]


def plain(text: str) -> str:
    """`text` without control characters: what a board writes must not steer this terminal."""
    return "".join(c for c in text if c == "\t" or (c >= " " and not "\x7f" <= c <= "\x9f"))


class ConnectionLostError(EnvironmentalError):
    """There is no connection to a board, or no longer."""


class Session:
    """A script that runs on a board; a context manager that ends it.

    Attributes:
        process: the ssh client; its exit status is the script's, or `CONNECTION_FAILED`.
    """

    def __init__(
        self,
        board: Board,
        script: str,
        arguments: Sequence[str],
        *,
        talk: bool = False,
        control: Path | None = None,
        master: bool = False,
        on_stderr: Callable[[str], None] | None = None,
    ) -> None:
        """Start it.

        Args:
            board: where.
            script: what, one of `edgehp.remote.scripts`.
            arguments: of the script.
            talk: whether stdin is a pipe to write into; it is empty otherwise.
            control: the socket of the connection to use or make; see `ssh_command`.
            master: whether to make it.
            on_stderr: given every line of its stderr, from a thread.

        Raises:
            EnvironmentalError: there is no ssh client here.
        """
        self.board = board
        command = ssh_command(control, master)
        handle, name = tempfile.mkstemp(prefix="edgehp-ssh-")
        os.close(handle)
        self._log = Path(name)
        self._on_stderr = on_stderr
        self._last: deque[str] = deque(maxlen=20)
        try:
            self.process = subprocess.Popen(
                [
                    *command,
                    *("-E", name, "--", board.host, encode(script, arguments)),
                ],
                stdin=subprocess.PIPE if talk else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                # Ctrl-C is for edgehp to pass on in order, not for the terminal to send to all.
                start_new_session=True,
            )
        except OSError as e:
            self._log.unlink()
            raise EnvironmentalError(
                f"the SSH client cannot be started ({e.strerror or e}: {e.filename}); install "
                f"OpenSSH's (apt install openssh-client) or name one in {PROGRAM}"
            ) from e
        self._stderr = threading.Thread(target=self._drain, daemon=True)
        self._stderr.start()

    @property
    def stdin(self) -> IO[bytes]:
        """Where `talk` writes."""
        if self.process.stdin is None:
            raise ValueError("the session was not started to talk to")
        return self.process.stdin

    def begin(self) -> IO[bytes]:
        """Its stdout from where the script's own output begins; empty if it never does."""
        out = self.process.stdout
        if out is None:
            raise ValueError("the session has no stdout")
        seen = 0
        while line := out.readline(1 << 16):
            if line == MARK:
                break
            seen += len(line)
            if seen > _LONGEST_GREETING:
                self.kill()
        return out

    def _drain(self) -> None:
        err = self.process.stderr
        if err is None:
            return
        while data := err.readline(_LONGEST_LINE):
            line = plain(data.decode("utf-8", "replace").rstrip("\r\n"))
            self._last.append(line)
            if self._on_stderr is not None:
                self._on_stderr(line)

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status, once it has ended and all its stderr was read.

        Raises:
            subprocess.TimeoutExpired: it has not ended.
        """
        status = self.process.wait(timeout)
        self._stderr.join(5)
        return status

    def kill(self) -> None:
        """End the ssh client at once."""
        self.process.kill()

    @property
    def last_words(self) -> str:
        """The last line of its stderr, if any."""
        return next((line for line in reversed(self._last) if line.strip()), "")

    def failure(self, doing: str) -> ConnectionLostError:
        """Why there is no connection, in one sentence with a remedy.

        Args:
            doing: what was going on, ``"connecting"`` or ``"sending"``.
        """
        try:
            text = plain(self._log.read_text("utf-8", "replace").replace("\n", "\t"))
        except OSError:
            text = ""
        lines = [line.strip() for line in text.split("\t") if line.strip()]
        return ConnectionLostError(_sentence(self.board.host, doing, lines or [self.last_words]))

    def __enter__(self) -> Session:
        """The session itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the client if it still runs, close its pipes and remove its log."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._stderr.join(5)
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            # What was still to be sent has no receiver any more.
            with suppress(BrokenPipeError):
                if pipe is not None:
                    pipe.close()
        self._log.unlink(missing_ok=True)


def _sentence(host: str, doing: str, lines: Sequence[str]) -> str:
    text = "\n".join(lines)
    last = lines[-1] if lines else ""
    if "HOST IDENTIFICATION HAS CHANGED" in text:
        return (
            f"the host key of {host} is not the one in your known hosts: the board was set up anew "
            "or something answers in its place; compare its fingerprint at the board, then remove "
            f"the old key with 'ssh-keygen -R' and connect once with 'ssh {host}'"
        )
    if "Host key verification failed" in text or "host key is known" in text:
        return (
            f"the host key of {host} is not among your known hosts and is not accepted unseen: "
            f"connect once with 'ssh {host}', compare the fingerprint with the board's, and repeat"
        )
    if "Permission denied" in text or "Too many authentication failures" in text:
        return (
            f"{host} accepts none of your keys, and passwords are not asked for: make 'ssh {host}' "
            f"work without one (ssh-copy-id, ssh-add) and repeat ({last})"
        )
    if "Could not resolve hostname" in text:
        return f"no address is known for {host}: check the name, or add it to your SSH config"
    if doing == "connecting":
        return (
            f"{host} cannot be reached ({last or 'no reason given'}): check that it is on and that "
            f"'ssh {host}' works"
        )
    return (
        f"the connection to {host} was lost while {doing} ({last or 'no reason given'}): check the "
        "board and the network, and repeat; what ran there is stopped and removed by itself"
    )
