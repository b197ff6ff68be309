"""Boards of a labgrid lab, reserved and given back by the user's own ``labgrid-client``.

labgrid stays a program beside edgehp: nothing of it is imported. Where its coordinator is, it reads
from its own configuration (``LG_COORDINATOR``, ``LG_ENV``).
"""

from __future__ import annotations

import ast
import logging
import os
import re
import socket
import subprocess
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from edgehp.errors import EnvironmentalError
from edgehp.remote.boards import Board, parse_board
from edgehp.remote.ssh import Stop

logger = logging.getLogger(__name__)

CLIENT = "labgrid-client"
_LONGEST_S = 60.0
_SSH = 22
# Between two looks at the queue, and until a board that was switched on takes connections.
_LOOK_S = 3.0
_BOOT_S = 300.0
_RESOURCE = re.compile(
    r"^Acquired resource '.*' \(\S+?/(\w+)/[^/]+\):\n((?:  .*\n?)+)", re.MULTILINE
)


class Lab:
    """The lab, and at most one board of it that is ours.

    Args:
        stop: ends what is going on; what was taken is given back.
        say: told what is going on, in words for a person.
    """

    def __init__(self, stop: Stop, say: Callable[[str], None]) -> None:
        self._stop, self._say = stop, say
        self._token = self._place = ""
        self._power, self._address = False, ("", 0)

    @contextmanager
    def taken(self, board: Board) -> Iterator[Board]:
        """Reserve a board with the tags of `board`, wait for it, and give it back at the end.

        Yields:
            The board as ssh reaches it, named as its place.

        Raises:
            EnvironmentalError: no labgrid, no coordinator, no such board, or one that has gone.
        """
        try:
            self._reserve(board.tags)
            yield self._acquire(board)
        finally:
            release = ("-p", self._place, "release") if self._place else ()
            for words in (release, ("cancel-reservation", self._token) if self._token else ()):
                try:
                    if words:
                        self._client(*words, anyway=True)
                except EnvironmentalError as e:
                    logger.warning("the board may still be reserved: %s", e)

    def _acquire(self, board: Board) -> Board:
        # The place that is reserved, until its name is known.
        mine = self._place = f"+{self._token}"
        self._client("-p", mine, "acquire")
        shown = self._client("-p", mine, "show")
        name = self._place = shown.partition("'")[2].partition("'")[0]
        self._say(f"has {name}")
        resources: dict[str, Mapping[str, Any]] = {
            kind: ast.literal_eval(textwrap.dedent(text).strip())
            for kind, text in _RESOURCE.findall(shown)
        }
        service = resources.get("NetworkService", {}).get("params", {})
        if not service.get("address"):
            raise EnvironmentalError(
                f"the place {name} has no NetworkService, so nobody knows its address\n"
                "hint: export one for it and add its match"
            )
        address, port = self._address = str(service["address"]), int(service.get("port") or _SSH)
        self._power = any("Power" in kind or kind == "PDUDaemonPort" for kind in resources)
        host = f"[{address}]" if ":" in address else address
        user = f"{service['username']}@" if service.get("username") else ""
        # A plain name may be one of the user's SSH configuration, which knows the port.
        url = f"{user}{host}" if port == _SSH else f"ssh://{user}{host}:{port}"
        return replace(board, host=parse_board(url).host, place=name)

    def power_cycle(self) -> None:
        """Switch the board off and on, and wait until it takes connections.

        Raises:
            EnvironmentalError: it has no power port, or does not come back.
        """
        if not self._power:
            raise EnvironmentalError(f"the place {self._place} has no power port to cycle")
        self._say("power cycle")
        self._client("-p", self._place, "power", "cycle")
        end = time.monotonic() + _BOOT_S
        while time.monotonic() < end:
            self._stop.check()
            with suppress(OSError), socket.create_connection(self._address, 5):
                return
            time.sleep(1)
        raise EnvironmentalError(
            f"{self._place} does not answer {_BOOT_S:g} s after its power cycle"
        )

    def places(self, tags: Sequence[str]) -> list[str]:
        """The names of all boards of the lab with the tags, whoever has them now.

        Raises:
            EnvironmentalError: no labgrid, no coordinator, or no such board.
        """
        found = [
            name
            for name, shown in _shown("Place", self._client("-v", "places")).items()
            if {*tags} <= {f"name={name}", *shown.get("tags", "").split(", ")}
        ]
        if not found:
            raise EnvironmentalError(
                f"the lab has no board with {' '.join(tags)}\n"
                f"hint: '{CLIENT} -v places' lists the boards and their tags"
            )
        return found

    def _reserve(self, tags: Sequence[str]) -> None:
        """Reserve a board and wait until it is ours, saying our place in the queue."""
        said = ""
        with self._start("reserve", "--wait", *tags) as waiting:
            try:
                # Nothing is longer than a few lines, so what follows the token may stay unread.
                self._token = waiting.stdout.readline().partition("'")[2].partition("'")[0]
                while True:
                    with suppress(subprocess.TimeoutExpired):
                        waiting.wait(_LOOK_S)
                        break
                    if not said:
                        # Or it would wait for ever.
                        self.places(tags)
                    text = self._queue()
                    if text != said:
                        self._say(text)
                    said = text
            finally:
                waiting.kill()
            err = waiting.stderr.read()
        self._stop.check()
        if waiting.returncode:
            raise _failed(waiting.args, err)
        if not self._token:
            raise EnvironmentalError(f"{CLIENT} reserve answered with no reservation")

    def _queue(self) -> str:
        """The place in the queue of those who want the same, in words."""
        found = _shown("Reservation", self._client("reservations"))
        wanted = found.get(self._token, {}).get("main")
        same = (t for t, shown in found.items() if shown.get("main") == wanted)
        queue = [token for token in same if found[token].get("state") == "waiting"]
        if self._token not in queue:
            return "reserved"
        return f"waits: {queue.index(self._token) + 1} of {len(queue)} in the queue"

    def _start(self, *words: str, anyway: bool = False) -> Any:
        return self._stop.start(
            [CLIENT, *words],
            "'pipx install labgrid' brings it",
            anyway=anyway,
            stdin=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )

    def _client(self, *words: str, anyway: bool = False) -> str:
        """What ``labgrid-client`` prints; an error where it fails or was stopped."""
        with self._start(*words, anyway=anyway) as process:
            try:
                out, err = process.communicate(timeout=_LONGEST_S)
            except subprocess.TimeoutExpired:
                process.kill()
                out, err = process.communicate()
                err += f"\nno answer within {_LONGEST_S:g} s"
        if not anyway:
            self._stop.check()
        if process.returncode:
            raise _failed(process.args, err)
        return str(out)


def _failed(command: Sequence[str], err: str) -> EnvironmentalError:
    last = next((s for s in reversed(err.splitlines()) if s.strip()), "no reason given")
    return EnvironmentalError(f"{' '.join(command)}: {last.removeprefix(f'{CLIENT}: Error: ')}")


def _shown(kind: str, text: str) -> dict[str, dict[str, str]]:
    """What ``labgrid-client`` shows of each place or reservation, in its order, by its name.

    Of a key that is there twice it is the first value: ``main`` is what a reservation's filter asks
    for, and later what it got.
    """
    return {
        name: dict(reversed(re.findall(r"^ +(\w+): (.+)$", block, re.MULTILINE)))
        for name, block in re.findall(rf"^{kind} '(.*)':\n((?:  .*\n?)*)", text, re.MULTILINE)
    }
