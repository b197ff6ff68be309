"""One connection to a board over the user's own ``ssh``.

It carries one script, which makes a private folder that lives exactly as long as the connection,
runs one command there and sends what that has written. The script is POSIX shell: a board needs
``sh`` and GNU coreutils, tar and util-linux, as every Debian, Ubuntu and JetPack has them, and
edgehp itself.
"""

from __future__ import annotations

import base64
import logging
import os
import re
import secrets
import shlex
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

from edgehp import __version__
from edgehp.errors import EnvironmentalError, UsageError
from edgehp.progress import Step
from edgehp.remote.boards import Board
from edgehp.remote.transfer import MOST_BACK, pack, plain, unpack

logger = logging.getLogger(__name__)

PROGRAM = "EDGEHP_SSH"
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
    # A connection of its own: a shared one would bring its own keep-alives, or none.
    "ControlMaster=no",
    "ControlPath=none",
    # The messages that `connection_error` reads.
    "LogLevel=INFO",
)
# After them: EDGEHP_SSH may set others.
_USUAL = ("ConnectTimeout=15", "ServerAliveInterval=5", "ServerAliveCountMax=3")
# Login shells may greet on stdout; what counts begins after this line.
MARK = b"edgehp-board-begins\n"
# Stands for the private folder in what a command is given.
FOLDER = "\0folder"
# Seconds between signs of life, and how many may be missing until the board tidies up by itself.
BEAT_S = 10.0
# More than a slow line may take for what is queued before a sign.
PATIENCE_S = 120.0
# The board gives an interrupted command ten seconds before it kills it.
_CLOSING_S = 20.0
# Logging in, and one start of Python on a slow board.
_OPENING_S = 120.0
# What ssh ends with when there is no connection any more, and when it was killed here.
_NO_CONNECTION = (255, -9)
_LONGEST_GREETING = 1 << 20
_LONGEST_LINE = 1 << 26
_PIECE = 1 << 18

# Files arrive in pieces with their lengths, so that the stream has an end before that of the
# connection. Then the command runs, in a process group of its own, so that it can be interrupted
# with all that it starts, as a terminal does. Beside it `watch` reads signs of life ("i" interrupts
# the command). When they end (the caller has finished, was killed, or the network is gone), it
# stops the command and removes the folder, whatever else is going on. What is in out/ comes back,
# and where the command ended with 0 what is in both/. A line with the token ends each part.
_SCRIPT = """
fail() { printf 'error %s\\n' "$1"; exit 0; }
for tool in mktemp timeout head tail setsid tar cat sleep rm; do
    command -v "$tool" >/dev/null 2>&1 ||
        fail "the command '$tool' is missing there (Debian, Ubuntu: coreutils, tar, util-linux)"
done
umask 077
d=$(cd "${TMPDIR:-/tmp}" 2>&1 && mktemp -d "$PWD/edgehp-XXXXXXXX" 2>&1) ||
    fail "no private folder can be made there ($d); free space or set TMPDIR there"
send() {
    p=$(cat "$d/pid" 2>/dev/null) && [ -n "$p" ] && kill -s "$1" -- "-$p" 2>/dev/null
}
tidy() {
    trap '' HUP INT TERM PIPE
    rmdir "$d/held"
    if send INT; then
        n=0
        while [ "$n" -lt 50 ] && send 0; do sleep 0.2; n=$((n + 1)); done
        send KILL
    fi
    rm -rf -- "$d" || { sleep 1; rm -rf -- "$d"; }
}
ends() { trap tidy EXIT; trap 'exit 1' HUP INT TERM PIPE; }
watch() {
    ends
    while :; do
        case $(timeout PATIENCE head -c 1) in
            .) ;;
            i) send INT ;;
            *) exit ;;
        esac
    done
}
run() {
    setsid sh -c 'echo $$ >"$0/pid" && exec "$@"' "$d" "$@" </dev/null
    rc=$?
    rm -f -- "$d/pid"
}
ends
mkdir "$d/in" "$d/out" "$d/both" "$d/held"
set -- PROGRAM
case $1 in "~/"*) first=$HOME/${1#"~/"}; shift; set -- "$first" "$@" ;; esac
printf 'folder %s\\n' "$d"
text=$(timeout 60 "$@" --version 2>"$d/version" </dev/null)
rc=$?
why=$(tail -n 1 "$d/version")
[ "$rc" = 0 ] || { printf 'missing %s\\n' "${why:-exit code $rc}"; exit 0; }
printf 'version %s\\n' "$(printf %s "$text" | tail -n 1)"
while n=$(timeout PATIENCE head -c 8) && [ "${n:-0}" -gt 0 ]; do
    timeout PATIENCE head -c "$n" || break
done | tar -xof - -C "$d" 2>"$d/said" ||
    fail "sending files failed there: $(tail -n 1 "$d/said"); free space, or set TMPDIR there"
# A stream that was cut between two pieces ends here.
[ "$(timeout PATIENCE head -c 1)" = . ] || exit 1
printf 'sent\\n'
exec 3<&0
watch <&3 >/dev/null 2>&1 &
trap - EXIT
PYTHONUNBUFFERED=1; export PYTHONUNBUFFERED
run "$@" WORDS
[ -d "$d/held" ] || exit 1
printf 'TOKEN %s\\n' "$rc"
if [ "$rc" = 0 ]; then set -- out both; else set -- out; fi
rc=1
cd "$d" && run tar --format=gnu -cf - "$@"
printf 'TOKEN %s\\n' "$rc"
wait
"""


class Stop:
    """Ends what one errand is doing here, from another thread.

    Attributes:
        gently: how the first press asks what goes on to end, None where it is killed at once.
        presses: how often somebody wanted an end.
    """

    def __init__(self) -> None:
        self.gently: Callable[[], None] | None = None
        self.presses, self._lock = 0, threading.Lock()
        self._process: subprocess.Popen[Any] | None = None

    def press(self) -> None:
        """End what is going on and let nothing begin; a second time, at once."""
        with self._lock:
            self.presses += 1
            if self.presses == 1 and self.gently is not None:
                self.gently()
            elif self._process is not None:
                self._process.kill()

    def check(self) -> None:
        """Raise `EnvironmentalError` where it was pressed."""
        if self.presses:
            raise EnvironmentalError("interrupted")

    def start(
        self, command: Sequence[str], hint: str, *, anyway: bool = False, **how: Any
    ) -> subprocess.Popen[Any]:
        """Start a program that a press ends; one that tidies up (`anyway`) starts and goes on.

        Raises:
            EnvironmentalError: it cannot be started (`hint` says what to do), or this was pressed.
        """
        pipe = subprocess.PIPE
        with self._lock:
            if not anyway:
                self.check()
            try:
                # Ctrl-C is for edgehp to pass on in order, not for the terminal to send to all.
                process = subprocess.Popen(
                    command, stdout=pipe, stderr=pipe, start_new_session=True, **how
                )
            except OSError as e:
                raise EnvironmentalError(
                    f"{command[0]} cannot be started ({e.strerror or e})\nhint: {hint}"
                ) from e
            self._process = None if anyway else process
            return process


@contextmanager
def connected(
    board: Board, words: Sequence[str], stop: Stop, hear: Callable[[str], None]
) -> Iterator[Link]:
    """A private folder on a board, which is removed at the end with whatever runs there.

    Args:
        board: where.
        words: of the command after those that start edgehp; `FOLDER` in them stands for the folder.
        stop: ends it from elsewhere.
        hear: given every line of the command's stderr, from a thread.

    Raises:
        EnvironmentalError: no connection, an unknown host key, no edgehp, a tool that is missing
            there.
    """
    token = secrets.token_hex(8)
    # Nothing of a name or path is ever read as shell text.
    values = {"PROGRAM": _quoted(board.command), "WORDS": _quoted(words)}
    values |= {"PATIENCE": f"{PATIENCE_S:g}", "TOKEN": token}
    script = re.sub(rf"\b({'|'.join(values)})\b", lambda match: values[match[1]], _SCRIPT)
    with TemporaryDirectory(prefix="edgehp-") as folder:
        log = Path(folder, "log")
        command = [*ssh_command(log), "--", board.host, encode(script)]
        hint = f"install OpenSSH's (apt install openssh-client) or name another client in {PROGRAM}"
        link = Link(board, stop.start(command, hint, stdin=subprocess.PIPE), token, log, hear)
        try:
            link.greet()
            yield link
        finally:
            link.close()


class Link:
    """A connection and the command at its other end; see `connected`.

    Attributes:
        board: where.
        folder: the absolute path there; what is in its ``out/`` comes back, and of a command that
            ended with 0 what is in ``both/``.
        version: of edgehp there.
    """

    def __init__(
        self,
        board: Board,
        process: subprocess.Popen[bytes],
        token: str,
        log: Path,
        hear: Callable[[str], None],
    ) -> None:
        self.board = board
        self.folder = self.version = self._last_words = ""
        self._process, self._log, self._hear = process, log, hear
        self._end = re.compile(rb"%b (\d{1,3})\n\Z" % token.encode())
        self._stdin: Any = process.stdin
        self._stdout: Any = process.stdout
        self._begun, self._closing = threading.Event(), threading.Event()
        self._watchdog = self._after(_OPENING_S, process.kill)
        self._stderr = threading.Thread(target=self._drain, args=(process.stderr,), daemon=True)
        self._stderr.start()

    def _after(self, seconds: float, do: Callable[[], None]) -> threading.Timer:
        timer = threading.Timer(seconds, do)
        timer.daemon = True
        timer.start()
        return timer

    def _drain(self, stderr: Any) -> None:
        with stderr:
            while data := stderr.readline(_LONGEST_LINE):
                line = _line(data)
                self._last_words = line if line.strip() else self._last_words
                # Before that it is a login shell's.
                if self._begun.is_set():
                    self._hear(line)

    def greet(self) -> None:
        """Read what the board says of itself, until it waits for files."""
        seen = 0
        while (data := self._stdout.readline(1 << 16)) and data != MARK:
            seen += len(data)
            if seen > _LONGEST_GREETING:
                self._process.kill()
        self.folder, host = self._said("folder", "connecting"), self.board.host
        version = self._said("version", "connecting")
        self.version = version.split()[-1] if version.split() else ""
        self._watchdog.cancel()
        self._begun.set()
        logger.debug("%s: %s, edgehp %s", host, self.folder, self.version)

    def _said(self, expected: str, doing: str) -> str:
        """What follows the word that is expected next; an error says why there is none."""
        word, _, rest = _line(self._stdout.readline(1 << 16)).partition(" ")
        if word == expected:
            return rest
        host, command = self.board.host, " ".join(self.board.command)
        if word == "missing":
            raise EnvironmentalError(
                f"edgehp was not found on {host}: {command!r} ended with: {rest}\n"
                f"hint: install edgehp {__version__} there, or say where it is with "
                "--remote-command"
            )
        if word == "error":
            raise EnvironmentalError(f"{host}: {rest}")
        if expected != "sent" and self._ended() not in _NO_CONNECTION and self._last_words:
            raise EnvironmentalError(f"{host} runs no commands: {self._last_words}")
        raise self._lost(doing)

    def send(self, files: Mapping[str, Path], going: Step) -> None:
        """Put files into the folder, by their paths below it, and let the command begin.

        Raises:
            EnvironmentalError: the connection was lost, and the folder with it; no space there.
            DataError: a file here changed or went away meanwhile.
        """

        def write(data: bytes) -> None:
            self._stdin.write(b"%08d" % len(data))
            self._stdin.write(data)
            # An archive is more than its files.
            going.update(min(going.done + len(data), going.total or 0))

        # The board may go away while this side writes; what it says then is why.
        with suppress(BrokenPipeError):
            pack(files, write, _PIECE)
            write(b"")
            self._stdin.write(b".")
            self._stdin.flush()
        self._said("sent", "sending files")
        threading.Thread(target=self._keep_alive, daemon=True).start()

    def run(self, tell: Callable[[str], None], limit_s: float | None = None) -> int:
        """The exit status of the command, at its end; `tell` gets each line of its stdout.

        Raises:
            EnvironmentalError: it took longer than `limit_s`, or the connection was lost.
        """
        timer = None if limit_s is None else self._after(limit_s, self.stop)
        try:
            while data := self._stdout.readline(_LONGEST_LINE):
                # The command's last line may have no end.
                ended = self._end.search(data)
                if line := data[: ended.start()] if ended else data:
                    tell(_line(line))
                if ended:
                    return int(ended[1])
        finally:
            if timer is not None:
                timer.cancel()
        if limit_s is not None and self._closing.is_set():
            raise EnvironmentalError(
                f"the command did not end on {self.board.name} within {limit_s:g} s and was "
                "stopped\nhint: allow more with --remote-timeout, or look at the board"
            )
        # Whatever ssh's status says: without its connection the board has stopped the command.
        raise self._lost("the command ran")

    def fetch(self, into: Path | None) -> None:
        """Bring what came of the command into the empty folder `into`, whole or not at all.

        Where nothing is awaited (None), it is read to its end alone.

        Raises:
            EnvironmentalError: the connection was lost, it cannot be read there, or what came is
                nothing one would ask for.
        """
        with TemporaryFile() as archive:
            ended, tail = None, b""
            while ended is None and (data := self._stdout.read1(_PIECE)):
                archive.write(data)
                if archive.tell() > MOST_BACK:
                    raise EnvironmentalError(
                        f"{self.board.host} sent more than {MOST_BACK >> 30} GiB"
                    )
                tail = (tail + data)[-32:]
                ended = self._end.search(tail)
            if ended is None:
                raise self._lost("fetching results")
            if int(ended[1]):
                said = self._last_words or int(ended[1])
                raise EnvironmentalError(
                    f"{self.board.host}: its results cannot be read there: {said}"
                )
            if into is not None:
                archive.seek(0)
                unpack(archive, into, self.board.host)

    def _lost(self, doing: str) -> EnvironmentalError:
        """The error for a connection that ended while `doing`."""
        self._ended()
        text = ""
        with suppress(OSError):
            text = self._log.read_text("utf-8", "replace")
        return connection_error(self.board.host, doing, text or self._last_words)

    def _ended(self) -> int:
        """The exit status of ssh, once it has ended and all its stderr was read."""
        self.stop()
        status = self._process.wait()
        self._watchdog.cancel()
        self._stderr.join(5)
        return status

    def interrupt(self) -> None:
        """Interrupt the command, as Ctrl-C does."""
        self._sign(b"i")

    def stop(self) -> None:
        """Let the board end the command and tidy up; it has some seconds for that."""
        if not self._closing.is_set():
            self._closing.set()
            self._watchdog.cancel()
            self._watchdog = self._after(_CLOSING_S, self._overdue)
            with suppress(OSError):
                self._stdin.close()

    def _overdue(self) -> None:
        if self.folder:
            logger.warning("%s did not say that it has removed %s", self.board.host, self.folder)
        self._process.kill()

    def _keep_alive(self) -> None:
        while not self._closing.wait(BEAT_S):
            self._sign(b".")

    def _sign(self, byte: bytes) -> None:
        # The connection may have ended, or is being closed: whoever reads from it notices.
        with suppress(OSError, ValueError):
            self._stdin.write(byte)
            self._stdin.flush()

    def close(self) -> None:
        """Let the board end the command and tidy up, and wait until it has."""
        # What it still sends has no reader any more, and would keep it from coming to an end.
        self._stdout.close()
        self._ended()


def _line(data: bytes) -> str:
    return plain(data.decode("utf-8", "replace").rstrip("\r\n"))


def _quoted(words: Sequence[str]) -> str:
    return " ".join('"$d"'.join(map(shlex.quote, word.split(FOLDER))) for word in words)


def encode(script: str) -> str:
    """The command line that runs `script`, POSIX shell, on the other side.

    The login shell there sees two quoted words of letters and digits only, so that bash, zsh, fish
    and csh agree on what they mean.
    """
    whole = f"printf '\\n%s' '{MARK.decode()}'\n{script}"
    text = base64.b64encode(whole.encode("utf-8", "surrogateescape")).decode("ascii")
    return f"""exec /bin/sh -c 'eval "$(printf %s {text} | base64 -d)"'"""


def ssh_command(log: Path) -> list[str]:
    """The program and its options: ``$EDGEHP_SSH``, else ``ssh``; `log` gets its own messages.

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
    firm, usual = ([w for o in part for w in ("-o", o)] for part in (_FIRM, _USUAL))
    return [words[0], *firm, *words[1:], *usual, "-T", "-E", str(log)]


# What ssh says -> what that means, and what helps.
_REASONS = {
    "HOST IDENTIFICATION HAS CHANGED": "the host key of {host} is not the one in your known hosts: "
    "the board was set up anew or something answers in its place; compare its fingerprint at the "
    "board, then remove the old key with 'ssh-keygen -R' and connect once with 'ssh {host}'",
    "Host key verification failed|host key is known": "the host key of {host} is not among your "
    "known hosts and is not accepted unseen: connect once with 'ssh {host}', compare the "
    "fingerprint with the board's, and repeat",
    "Permission denied|Too many authentication failures": "{host} accepts none of your keys, and "
    "passwords are not asked for: make 'ssh {host}' work without one (ssh-copy-id, ssh-add) and "
    "repeat ({last})",
    "Could not resolve hostname": "no address is known for {host}: check the name, or add it to "
    "your SSH config",
}


def connection_error(host: str, doing: str, text: str) -> EnvironmentalError:
    """Why there is no connection while `doing`, where ssh has said `text`, with a remedy."""
    last = next((line for line in reversed(text.splitlines()) if line.strip()), "no reason given")
    sentence = next((s for said, s in _REASONS.items() if re.search(said, text)), None)
    if sentence is None and doing == "connecting":
        sentence = (
            "{host} cannot be reached ({last}): check that it is on and that 'ssh {host}' works"
        )
    elif sentence is None:
        sentence = (
            "the connection to {host} was lost while {doing} ({last}): check the board and the "
            "network, and repeat; what ran there is stopped and removed by itself"
        )
    return EnvironmentalError(sentence.format(host=host, doing=doing, last=plain(last).strip()))
