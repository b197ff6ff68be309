"""What runs on a board: small POSIX shell scripts, and how they get past its login shell.

A board needs ``sh`` and GNU coreutils, tar and util-linux, as every Debian, Ubuntu and
JetPack has them, and edgehp itself. Arguments reach a script as ``$1 $2 ...``: nothing of a name or
path is ever read as shell text.
"""

from __future__ import annotations

import base64
import shlex
from collections.abc import Sequence

__all__ = ["FETCH", "FOLDER_GONE", "HOLD", "MARK", "RUN", "SEND", "encode"]

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
