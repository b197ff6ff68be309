"""The user's own ``ssh``: its options, how a script reaches a board, what its failures mean."""

from __future__ import annotations

import base64
import os
import shlex
from pathlib import Path

from edgehp.errors import EnvironmentalError, UsageError

__all__ = ["MARK", "PROGRAM", "connection_error", "encode", "plain", "ssh_command"]

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
