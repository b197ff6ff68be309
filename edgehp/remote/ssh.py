"""The user's own ``ssh``: one script on one board in one process, and what its failures mean.

The scripts are POSIX shell. A board needs ``sh`` and GNU coreutils, tar and util-linux, as every
Debian, Ubuntu and JetPack has them, and edgehp itself. Arguments reach a script as ``$1 $2 ...``:
nothing of a name or path is ever read as shell text.
"""

from __future__ import annotations

import base64
import os
import shlex
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from edgehp.errors import EnvironmentalError, UsageError

__all__ = [
    "CONNECTION_FAILED",
    "FETCH",
    "FOLDER_GONE",
    "HOLD",
    "MARK",
    "PROGRAM",
    "RUN",
    "SEND",
    "Session",
    "connection_error",
    "encode",
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
    # The messages that `connection_error` reads.
    "LogLevel=INFO",
)
# After them: EDGEHP_SSH may set others.
_USUAL = ("ConnectTimeout=15", "ServerAliveInterval=5", "ServerAliveCountMax=3")
_LONGEST_GREETING = 1 << 20
_LONGEST_LINE = 1 << 26
# A socket's name has about 100 characters, and ssh adds some while it makes it.
_LONGEST_SOCKET = 80
# Login shells may greet on stdout; what counts begins after this line.
MARK = b"edgehp-board-begins\n"
FOLDER_GONE = 97

_HOME = """
case $1 in "~/"*) first=$HOME/${1#"~/"}; shift; set -- "$first" "$@" ;; esac
"""

# $1 seconds of patience, then how edgehp is started. Makes the private folder and lives as long as
# the caller: every byte on stdin is a sign of life, "i" interrupts the command. When the signs end
# (the caller has finished, was killed, or the network is gone) the command is stopped and the
# folder removed, whatever the other connections are doing.
HOLD = (
    """
patience=$1; shift
"""
    + _HOME
    + """
for tool in mktemp timeout head tail setsid tar sleep rm; do
    command -v "$tool" >/dev/null 2>&1 || { printf 'lacks %s\\n' "$tool"; exit 0; }
done
umask 077
d=$(mktemp -d "${TMPDIR:-/tmp}/edgehp-XXXXXXXX") || { printf 'nofolder\\n'; exit 0; }
send() {
    p=$(cat "$d/pid" 2>/dev/null) && [ -n "$p" ] && kill -s "$1" -- "-$p" 2>/dev/null
}
tidy() {
    trap '' HUP INT TERM PIPE
    if send INT; then
        n=0
        while [ "$n" -lt 50 ] && send 0; do sleep 0.2; n=$((n + 1)); done
        send KILL
    fi
    rm -rf -- "$d" || { sleep 1; rm -rf -- "$d"; }
}
trap tidy EXIT
trap 'exit 1' HUP INT TERM PIPE
mkdir "$d/in" "$d/out"
printf 'folder %s\\n' "$d"
text=$(timeout 60 "$@" --version 2>"$d/version" </dev/null)
printf 'version %s %s\\n' "$?" "$(printf %s "$text" | tail -n 1)"
printf 'reason %s\\n' "$(tail -n 1 "$d/version")"
printf 'ready\\n'
while :; do
    case $(timeout "$patience" head -c 1) in
        .) ;;
        i) send INT ;;
        *) break ;;
    esac
done
"""
)

# $1 folder, then the command. It gets a process group of its own, so that it can be interrupted
# with all that it starts, as a terminal does.
RUN = (
    """
d=$1; shift
"""
    + _HOME
    + f"""
[ -d "$d/in" ] || exit {FOLDER_GONE}
PYTHONUNBUFFERED=1; export PYTHONUNBUFFERED
setsid sh -c 'echo $$ >"$0/pid" && exec "$@"' "$d" "$@" </dev/null
rc=$?
rm -f -- "$d/pid"
exit "$rc"
"""
)

# $1 folder: unpacks a tar from stdin.
SEND = f"""
umask 077
cd "$1/in" || exit {FOLDER_GONE}
exec tar -xof -
"""

# $1 folder, then what of it: a tar of that. The format has no extended headers.
FETCH = f"""
cd "$1" || exit {FOLDER_GONE}
shift
exec tar --format=gnu -cf - -- "$@"
"""


def encode(script: str, arguments: Sequence[str]) -> str:
    """The command line that runs `script` with `arguments` on the other side.

    The login shell there sees two quoted words of letters and digits only, so that bash, zsh, fish
    and csh agree on what they mean.
    """
    words = "".join(f" {shlex.quote(a)}" for a in arguments)
    whole = f"set --{words}\nprintf '\\n%s' '{MARK.decode()}'\n{script}"
    text = base64.b64encode(whole.encode("utf-8", "surrogateescape")).decode("ascii")
    return f"""exec /bin/sh -c 'eval "$(printf %s {text} | base64 -d)"'"""


def ssh_command(private: Path, master: bool = False) -> list[str]:
    """The program and its options: ``$EDGEHP_SSH``, else ``ssh``.

    Args:
        private: a folder for ssh's messages and for the socket over which sessions share one
            connection. Never the user's own socket: that would bring its own keep-alives, or none.
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
    socket = private / "s"
    shared = len(os.fsencode(socket)) <= _LONGEST_SOCKET
    firm = (
        *_FIRM,
        f"ControlPath={socket if shared else 'none'}",
        f"ControlMaster={'yes' if shared and master else 'no'}",
    )
    options = [[w for option in part for w in ("-o", option)] for part in (firm, _USUAL)]
    return [words[0], *options[0], *words[1:], *options[1], "-T", "-E", str(private / "log")]


def plain(text: str) -> str:
    """`text` without control characters: what a board writes must not steer this terminal."""
    return "".join(c for c in text if c == "\t" or (c >= " " and not "\x7f" <= c <= "\x9f"))


class Session:
    """A script that runs on a board; a context manager that ends it.

    Attributes:
        process: the ssh client; its exit status is the script's, or `CONNECTION_FAILED`.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        talk: bool = False,
        on_stderr: Callable[[str], None] | None = None,
    ) -> None:
        """Start it.

        Args:
            command: of `ssh_command`, then the host and what it runs.
            talk: whether stdin is a pipe to write into; it is empty otherwise.
            on_stderr: given every line of its stderr, from a thread.

        Raises:
            EnvironmentalError: there is no ssh client here.
        """
        self._on_stderr = on_stderr
        self._last: deque[str] = deque(maxlen=20)
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE if talk else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                # Ctrl-C is for edgehp to pass on in order, not for the terminal to send to all.
                start_new_session=True,
            )
        except OSError as e:
            raise EnvironmentalError(
                f"the SSH client cannot be started ({e.strerror or e}: {e.filename})\n"
                f"hint: install OpenSSH's (apt install openssh-client) or name one in {PROGRAM}"
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
        while (line := out.readline(1 << 16)) and line != MARK:
            seen += len(line)
            if seen > _LONGEST_GREETING:
                self.kill()
        return out

    def _drain(self) -> None:
        err = self.process.stderr
        while err is not None and (data := err.readline(_LONGEST_LINE)):
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
    def lost(self) -> bool:
        """Whether it has ended with its connection or with the folder on the board."""
        status = self.process.poll()
        return status is not None and (status in (CONNECTION_FAILED, FOLDER_GONE) or status < 0)

    @property
    def last_words(self) -> str:
        """The last line of its stderr, if any."""
        return next((line for line in reversed(self._last) if line.strip()), "")

    def __enter__(self) -> Session:
        """The session itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the client if it still runs and close its pipes."""
        if self.process.poll() is None:
            self.process.kill()
        self.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            # What was still to be sent has no receiver any more.
            with suppress(BrokenPipeError):
                if pipe is not None:
                    pipe.close()


def connection_error(host: str, doing: str, text: str) -> EnvironmentalError:
    """Why there is no connection, in one sentence with a remedy.

    Args:
        host: of the board.
        doing: what was going on, ``"connecting"`` or such as ``"sending files"``.
        text: what ssh has said.
    """
    last = next((line for line in reversed(text.splitlines()) if line.strip()), "no reason given")
    last = plain(last).strip()
    if "HOST IDENTIFICATION HAS CHANGED" in text:
        sentence = (
            f"the host key of {host} is not the one in your known hosts: the board was set up anew "
            "or something answers in its place; compare its fingerprint at the board, then remove "
            f"the old key with 'ssh-keygen -R' and connect once with 'ssh {host}'"
        )
    elif "Host key verification failed" in text or "host key is known" in text:
        sentence = (
            f"the host key of {host} is not among your known hosts and is not accepted unseen: "
            f"connect once with 'ssh {host}', compare the fingerprint with the board's, and repeat"
        )
    elif "Permission denied" in text or "Too many authentication failures" in text:
        sentence = (
            f"{host} accepts none of your keys, and passwords are not asked for: make 'ssh {host}' "
            f"work without one (ssh-copy-id, ssh-add) and repeat ({last})"
        )
    elif "Could not resolve hostname" in text:
        sentence = f"no address is known for {host}: check the name, or add it to your SSH config"
    elif doing == "connecting":
        sentence = (
            f"{host} cannot be reached ({last}): check that it is on and that 'ssh {host}' works"
        )
    else:
        sentence = (
            f"the connection to {host} was lost while {doing} ({last}): check the board and the "
            "network, and repeat; what ran there is stopped and removed by itself"
        )
    return EnvironmentalError(sentence)
