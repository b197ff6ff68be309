"""One connection to a board over the user's own ``ssh``.

It carries one script, which makes a private folder that lives exactly as long as the connection,
and what `connection_error` says where it ends. The script is POSIX shell: a board needs ``sh`` and
GNU coreutils, tar and util-linux, as every Debian, Ubuntu and JetPack has them, and edgehp itself.
"""

from __future__ import annotations

import base64
import io
import logging
import os
import re
import secrets
import shlex
import subprocess
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO

from edgehp import __version__
from edgehp.errors import EnvironmentalError, UsageError
from edgehp.remote.boards import Board

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

# Files arrive in pieces with their lengths, so that the stream has an end before that of the
# connection. Then the command runs, in a process group of its own, so that it can be interrupted
# with all that it starts, as a terminal does. Beside it `watch` reads signs of life ("i" interrupts
# the command). When they end (the caller has finished, was killed, or the network is gone), it
# stops the command and removes the folder, whatever else is going on.
_SCRIPT = """
for tool in mktemp timeout head tail setsid tar cat wc sleep rm; do
    command -v "$tool" >/dev/null 2>&1 || { printf 'lacks %s\\n' "$tool"; exit 0; }
done
umask 077
d=$(mktemp -d "${TMPDIR:-/tmp}/edgehp-XXXXXXXX") || { printf 'nofolder\\n'; exit 0; }
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
mkdir "$d/in" "$d/out" "$d/held"
set -- PROGRAM
case $1 in "~/"*) first=$HOME/${1#"~/"}; shift; set -- "$first" "$@" ;; esac
printf 'folder %s\\n' "$d"
text=$(timeout 60 "$@" --version 2>"$d/version" </dev/null)
printf 'version %s %s\\n' "$?" "$(printf %s "$text" | tail -n 1)"
printf 'reason %s\\n' "$(tail -n 1 "$d/version")"
printf 'ready\\n'
while n=$(timeout PATIENCE head -c 8) && [ "${n:-0}" -gt 0 ]; do
    timeout PATIENCE head -c "$n" || break
done | tar -xof - -C "$d/in" 2>"$d/said" ||
    { printf 'tar: %s\\n' "$(tail -n 1 "$d/said")"; exit 1; }
printf 'sent\\n'
exec 3<&0
watch <&3 >/dev/null 2>&1 &
trap - EXIT
PYTHONUNBUFFERED=1; export PYTHONUNBUFFERED
run "$@" WORDS
[ -d "$d/held" ] || exit 1
ended=$rc
if [ "$rc" = 0 ]; then set -- BACK; else set -- REPORT; fi
: >"$d/back"
rc=0
[ "$#" = 0 ] || { cd "$d" && run tar --format=gnu -cf - -- "$@" >"$d/back"; }
printf 'TOKEN %s %s %s\\n' "$ended" "$rc" "$(wc -c <"$d/back")"
# Whoever awaits nothing may have gone, and the folder with it.
[ ! -s "$d/back" ] || run cat "$d/back"
wait
"""


class Link:
    """A private folder on a board and one command that runs there; a context manager.

    Attributes:
        board: where.
        folder: the absolute path there; ``in/`` and ``out/`` are in it.
        last_words: the last line of stderr there, if any.
        stdin: takes what goes there.
        stdout: has what comes from there.
    """

    def __init__(self, board: Board, hear: Callable[[str], None]) -> None:
        """Name the board.

        Args:
            board: where.
            hear: given every line of stderr there, from a thread.
        """
        self.board = board
        self.folder = self.last_words = ""
        self.stdin: IO[bytes] = io.BytesIO()
        self.stdout: IO[bytes] = io.BytesIO()
        self._hear = hear
        self._token = secrets.token_hex(8)
        self._process: subprocess.Popen[bytes] | None = None
        self._abandoned = False
        self._closing = threading.Event()
        self._start, self._write = threading.Lock(), threading.Lock()
        self._watchdog = threading.Timer(0, self.abandon)
        self._stack = ExitStack()

    def __enter__(self) -> Link:
        """The link itself; `open` connects it."""
        self._log = Path(self._stack.enter_context(TemporaryDirectory(prefix="edgehp-")), "log")
        return self

    def open(self, words: Sequence[str], back: Sequence[str], report: Sequence[str]) -> str:
        """Connect, make the folder and ask edgehp there for its version, which is returned.

        Args:
            words: of the command after those that start edgehp; `FOLDER` in them stands for the
                folder.
            back: what of the folder comes back after the command has ended with 0.
            report: and after it has failed.

        Raises:
            EnvironmentalError: no connection, an unknown host key, no edgehp, a tool that is
                missing there.
        """
        lists = {"PROGRAM": self.board.command, "WORDS": words, "BACK": back, "REPORT": report}
        # Nothing of a name or path is ever read as shell text.
        values = {name: " ".join(map(_quoted, found)) for name, found in lists.items()}
        values |= {"PATIENCE": f"{PATIENCE_S:g}", "TOKEN": self._token}
        script = re.sub(rf"\b({'|'.join(values)})\b", lambda match: values[match[1]], _SCRIPT)
        command = [*ssh_command(self._log), "--", self.board.host, encode(script)]
        with self._start:
            if self._abandoned:
                raise EnvironmentalError("interrupted")
            process = self._process = _started(command)
        self.stdin, self.stdout = _pipe(process.stdin), _pipe(process.stdout)
        self._stderr = threading.Thread(target=self._drain, args=(process,), daemon=True)
        self._stderr.start()
        self._watch(_OPENING_S)
        version = self._greet()
        self._watchdog.cancel()
        return version

    def _drain(self, process: subprocess.Popen[bytes]) -> None:
        with _pipe(process.stderr) as err:
            while data := err.readline(_LONGEST_LINE):
                line = plain(data.decode("utf-8", "replace").rstrip("\r\n"))
                self.last_words = line if line.strip() else self.last_words
                self._hear(line)

    def _greet(self) -> str:
        out, said, seen = self.stdout, {}, 0
        while (line := out.readline(1 << 16)) and line != MARK:
            seen += len(line)
            if seen > _LONGEST_GREETING:
                self.abandon()
        while line := out.readline(1 << 16):
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
            self._ended()
            raise EnvironmentalError(
                f"{host}: no private folder can be made there ({self.last_words}); free space "
                "or set TMPDIR there"
            )
        if "ready" not in said:
            if self._ended() not in _NO_CONNECTION and self.last_words:
                raise EnvironmentalError(f"{host} runs no commands: {self.last_words}")
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
        version = words.split()[-1] if words.split() else ""
        logger.debug("%s: %s, edgehp %s", host, self.folder, version)
        return version

    def begin(self) -> None:
        """Let the command begin: all that it needs was sent.

        Raises:
            EnvironmentalError: the connection was lost, or the files do not fit there.
        """
        with suppress(BrokenPipeError):
            self.stdin.write(b"%08d" % 0)
            self.stdin.flush()
        said = plain(self.stdout.readline(1 << 16).decode("utf-8", "replace").rstrip())
        if not said:
            raise self.lost("sending files")
        if said != "sent":
            raise EnvironmentalError(
                f"{self.board.host}: sending files failed there: {said}; free space on the board, "
                "or set TMPDIR there"
            )
        threading.Thread(target=self._keep_alive, daemon=True).start()

    def read(self, tell: Callable[[str], None]) -> tuple[int, int]:
        """The exit status of the command, at its end, and the bytes of the archive that follow.

        Args:
            tell: gets each line of its stdout.

        Raises:
            EnvironmentalError: the connection was lost, and the folder with it.
        """
        mark = f"{self._token} ".encode()
        while data := self.stdout.readline(_LONGEST_LINE):
            # The command's last line may have no end.
            line, marked, rest = data.partition(mark)
            if line:
                tell(plain(line.decode("utf-8", "replace").rstrip("\r\n")))
            if marked and (found := re.fullmatch(rb"(\d{1,3}) (\d{1,3}) (\d{1,15})\n", rest)):
                status, failed, size = map(int, found.groups())
                if failed:
                    raise EnvironmentalError(
                        f"{self.board.host}: its results cannot be read there: "
                        f"{self.last_words or failed}"
                    )
                return status, size
        # Whatever ssh's status says: without its connection the board has stopped the command.
        raise self.lost("the command ran")

    def lost(self, doing: str) -> EnvironmentalError:
        """The error for a connection that ended while `doing`."""
        self._ended()
        text = ""
        with suppress(OSError):
            text = self._log.read_text("utf-8", "replace")
        return connection_error(self.board.host, doing, text or self.last_words)

    def _ended(self) -> int:
        """The exit status of ssh, once it has ended and all its stderr was read."""
        if self._process is None:
            return 0
        self.stop()
        status = self._process.wait()
        self._watchdog.cancel()
        self._stderr.join(5)
        return status

    def interrupt(self) -> None:
        """Interrupt the command, as Ctrl-C does."""
        self._send(b"i")

    def stop(self) -> None:
        """Let the board end the command and tidy up; it has some seconds for that."""
        if self._closing.is_set() or self._process is None:
            return
        self._closing.set()
        self._watch(_CLOSING_S)
        with self._write, suppress(OSError):
            self.stdin.close()

    def _watch(self, seconds: float) -> None:
        """End ssh after that time."""
        self._watchdog.cancel()
        self._watchdog = threading.Timer(seconds, self._overdue)
        self._watchdog.daemon = True
        self._watchdog.start()

    def _overdue(self) -> None:
        if self.folder:
            logger.warning("%s did not say that it has removed %s", self.board.host, self.folder)
        self.abandon()

    def abandon(self) -> None:
        """End what is going on and let nothing begin; the board tidies up."""
        with self._start:
            self._abandoned = True
            if self._process is not None:
                self._process.kill()

    def _keep_alive(self) -> None:
        while not self._closing.wait(BEAT_S):
            self._send(b".")

    def _send(self, byte: bytes) -> None:
        # The connection may have ended, or is being closed: whoever reads from it notices.
        with self._write, suppress(OSError, ValueError):
            self.stdin.write(byte)
            self.stdin.flush()

    def __exit__(self, *_: object) -> None:
        """Let the board end the command and tidy up, and wait until it has."""
        # What it still sends has no reader any more, and would keep it from coming to an end.
        self.stdout.close()
        self._ended()
        self._stack.close()


def _quoted(word: str) -> str:
    return '"$d"'.join(map(shlex.quote, word.split(FOLDER)))


def _started(command: Sequence[str]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
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


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    if pipe is None:
        raise ValueError("the process was started without this pipe")
    return pipe


def encode(script: str) -> str:
    """The command line that runs `script`, POSIX shell, on the other side.

    The login shell there sees two quoted words of letters and digits only, so that bash, zsh, fish
    and csh agree on what they mean.
    """
    whole = f"printf '\\n%s' '{MARK.decode()}'\n{script}"
    text = base64.b64encode(whole.encode("utf-8", "surrogateescape")).decode("ascii")
    return f"""exec /bin/sh -c 'eval "$(printf %s {text} | base64 -d)"'"""


def ssh_command(log: Path) -> list[str]:
    """The program and its options: ``$EDGEHP_SSH``, else ``ssh``.

    Args:
        log: the file that gets ssh's own messages.

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


def plain(text: str) -> str:
    """`text` without control characters: what a board writes must not steer this terminal."""
    return "".join(c for c in text if c == "\t" or (c >= " " and not "\x7f" <= c <= "\x9f"))


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
