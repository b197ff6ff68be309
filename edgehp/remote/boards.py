"""Which boards: their names as OpenSSH takes them, and lists of them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from edgehp.errors import DataError, UsageError
from edgehp.files import decode_text, read_bytes

DEFAULT_COMMAND = "edgehp"
# Neither part may begin with "-": ssh would read it as an option. Nothing here means anything to a
# shell, because ssh hands the names on to ProxyCommand and Match exec of the user's configuration.
_NAME = re.compile(
    r"(ssh://)?([\w.+][\w.+%-]*@)?(\[[0-9A-Fa-f:.]+(?:%[\w.-]+)?\](?::\d+)?|[\w.:][\w.:%-]*)",
    re.ASCII,
)
_MOST_BOARDS = 256
_LARGEST = 1 << 20


# As labgrid has them.
_TAG = re.compile(r"[a-z][a-z0-9_]+=[\w-]+", re.ASCII)


@dataclass(frozen=True)
class Board:
    """A board to reach.

    Attributes:
        host: as ssh takes it: ``orin``, ``user@orin``, ``ssh://user@orin:2222``, an alias of the
            user's configuration; empty for one of a lab that is not reserved yet.
        command: how edgehp is started there, word by word; ``~/`` at the start is its home.
        place: its name in a lab.
        tags: ``key=value`` that a board of a labgrid lab must have; ``name=PLACE`` for one of that
            name.
        power_cycle: whether to switch it off and on first.
    """

    host: str
    command: tuple[str, ...] = (DEFAULT_COMMAND,)
    place: str = ""
    tags: tuple[str, ...] = ()
    power_cycle: bool = False

    @property
    def name(self) -> str:
        """What people call it."""
        return self.place or self.host

    @property
    def folder(self) -> str:
        """The name of its folder of results."""
        return re.sub(r"[^\w.@-]", "_", self.name.removeprefix("ssh://"))


def parse_board(host: str, command: str = DEFAULT_COMMAND) -> Board:
    """A board by its name and the command that starts edgehp there.

    Raises:
        UsageError: a name that ssh could take for something else, or a command that is none.
    """
    if len(host) > 255 or not _NAME.fullmatch(host):
        raise UsageError(
            f"{host!r} cannot be a host: expected HOST, USER@HOST or ssh://USER@HOST:PORT of plain "
            "letters, digits and . _ - that does not begin with '-'"
        )
    return Board(host, _words(command))


def parse_lab(tags: str, command: str = DEFAULT_COMMAND, *, power_cycle: bool = False) -> Board:
    """A board of a lab by the tags it must have, ``KEY=VALUE`` with commas between them.

    Raises:
        UsageError: no tags as labgrid has them, or a command that is none.
    """
    found = tuple(tags.split(","))
    if wrong := [tag for tag in found if not _TAG.fullmatch(tag)]:
        raise UsageError(
            f"--lab {tags!r}: found {wrong[0]!r}, expected KEY=VALUE such as target=orin-nano-8gb"
        )
    return Board("", _words(command), tags, found, power_cycle)


def _words(command: str) -> tuple[str, ...]:
    """The words of ``--remote-command``."""
    try:
        words = shlex.split(command)
    except ValueError as e:
        raise UsageError(f"--remote-command {command!r}: {e}") from e
    if not words or any("\0" in w for w in words):
        raise UsageError(f"--remote-command {command!r}: expected a command such as 'edgehp'")
    return tuple(words)


def read_boards(path: Path, command: str = DEFAULT_COMMAND) -> tuple[Board, ...]:
    """The boards of a list.

    A host a line, after it the command that starts edgehp there if that is not `command`; ``#``
    begins a comment.

    Raises:
        DataError: the file cannot be read, is empty or names a board twice.
        UsageError: a line that names no board.
    """
    data = read_bytes(path, "a text file with a host a line", limit=_LARGEST)
    text = decode_text(data, str(path))
    boards: dict[str, Board] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split(None, 1)
        if not words:
            continue
        try:
            board = parse_board(words[0], words[1] if len(words) > 1 else command)
        except UsageError as e:
            raise UsageError(f"{path}, line {number}: {e}") from e
        # Results go to a folder of that name.
        if board.folder in boards:
            raise DataError(f"{path}, line {number}: {board.host} is in the list twice")
        boards[board.folder] = board
    if not boards or len(boards) > _MOST_BOARDS:
        raise DataError(
            f"{path}: found {len(boards)} hosts, expected 1 to {_MOST_BOARDS}, one a line"
        )
    return tuple(boards.values())
