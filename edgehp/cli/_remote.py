"""``--host`` and ``--hosts``: the same command on other boards, as one decorator a command."""

from __future__ import annotations

import functools
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edgehp.errors import UsageError
from edgehp.files import strict_json
from edgehp.remote.boards import DEFAULT_COMMAND, Board, parse_board, read_boards

if TYPE_CHECKING:
    from edgehp.remote.errand import Errand, Listener, Outcome, Returned, Sent

    Part = str | Sent | Returned | None
    Change = Part | tuple[Part, ...]

__all__ = ["Job", "Journey", "Trip", "over_ssh", "sent_artifact", "sent_if_found"]

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS = [
    click.option("--host", metavar="USER@HOST", help="Run there over SSH; results come back here."),
    click.option(
        "--hosts",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Run on many boards at once: a host a line, after it its --remote-command if need be.",
    ),
    click.option(
        "--remote-command",
        default=DEFAULT_COMMAND,
        show_default=True,
        metavar="COMMAND",
        help="How edgehp is started there, such as '~/venv/bin/edgehp'.",
    ),
    click.option(
        "--remote-timeout",
        type=click.FloatRange(min=1),
        metavar="SECONDS",
        help="Stop the command there after this time. Default: none.",
    ),
]
_DATA_ROOT = click.option(
    "--remote-data-root", metavar="DIR", help="Where the data set is on the board, not sent."
)
_OWN = ("host", "hosts", "remote_command", "remote_timeout", "remote_data_root")
# "edgehp: INFO: edgehp.pipeline.pipeline: quantise: 1.2 s", as the board's own -v writes it.
_LOGGED = re.compile(r"edgehp: (INFO|DEBUG|WARNING): [\w.]+: (.*)")
_ERROR = "edgehp: error: "
_REDRAW_S = 0.2


@dataclass(frozen=True)
class Job:
    """What one board is to do.

    Attributes:
        changes: what takes the place of a parameter, by its name: text, what travels, several of
            them, or None to leave it out. Parameters not named go along as they were typed.
        replace: a whole command line in place of the user's own, None to keep that.
    """

    changes: Mapping[str, Change] = field(default_factory=dict)
    replace: tuple[str | Sent | Returned, ...] | None = None


@dataclass(frozen=True)
class Trip:
    """What a journey is planned from.

    Attributes:
        given: the command's parameters, and ``remote_data_root`` where it has that.
        board: where to.
        several: whether other boards do the same, so that results must not have the same names.
        local: the command itself, to run a part of it here.
    """

    given: Mapping[str, Any]
    board: Board
    several: bool
    local: Callable[..., Any]


@dataclass(frozen=True)
class Journey:
    """How a command travels.

    Attributes:
        sends: parameters that name a file or folder here, which is sent.
        finds: parameters that may name one; other words go as they are.
        plan: for what this does not say. Called once a board.
        any_version: whether a board with another edgehp may run it.
        data_root: whether there is ``--remote-data-root``, for photos that are there already.
    """

    sends: tuple[str, ...] = ()
    finds: tuple[str, ...] = ()
    plan: Callable[[Trip], Job] | None = None
    any_version: bool = False
    data_root: bool = False


def over_ssh(journey: Journey) -> Callable[[F], F]:
    """Give a command ``--host`` and its companions. The lowest of its decorators."""

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def command(*args: Any, **parameters: Any) -> Any:
            own = {name: parameters.pop(name, None) for name in _OWN}
            if own["host"] is None and own["hosts"] is None:
                _refuse_lonely()
                return function(*args, **parameters)
            if own["host"] is not None and own["hosts"] is not None:
                raise UsageError("give --host or --hosts, not both")
            return _travel(journey, own, parameters, function)

        decorated: Any = command
        for option in reversed([*_OPTIONS, *([_DATA_ROOT] if journey.data_root else [])]):
            decorated = option(decorated)
        typed: F = decorated
        return typed

    return decorate


def _typed(name: str) -> bool:
    source = click.get_current_context().get_parameter_source(name)
    return source not in (None, click.core.ParameterSource.DEFAULT)


def _refuse_lonely() -> None:
    for name in ("remote_command", "remote_timeout", "remote_data_root"):
        if _typed(name):
            raise UsageError(f"--{name.replace('_', '-')} belongs to --host or --hosts")


def sent_if_found(value: object) -> str | Sent:
    """A parameter that may name a file here: sent if it does, else the word itself."""
    from edgehp.remote.errand import Sent

    path = Path(str(value))
    return Sent(path) if path.exists() else str(value)


def sent_artifact(
    path: Path | None,
    *,
    allow_deferred: bool = False,
    keep: Callable[[Path], Sequence[Path]] | None = None,
    shown: Path | None = None,
) -> Sent:
    """An artifact's own files, checked here before they travel; reports beside them stay.

    Args:
        path: its directory, None for the newest under ``dist``.
        allow_deferred: whether one without engine may go.
        keep: given the artifact as it came back; returns what it has made of it.
        shown: what stands for its path in the command's output.

    Raises:
        DataError, CompatibilityError: there is none, or it was altered.
    """
    from edgehp.artifact import load_artifact, newest_artifact
    from edgehp.artifact.manifest import MANIFEST_NAME
    from edgehp.remote.errand import Sent

    found = newest_artifact() if path is None else path
    artifact = load_artifact(found, bytes_only=True, allow_deferred=allow_deferred)
    names = tuple(f.path for f in artifact.manifest.files)
    return Sent(found, (MANIFEST_NAME, *names), keep, shown)


def _travel(
    journey: Journey,
    own: dict[str, Any],
    parameters: dict[str, Any],
    local: Callable[..., Any],
) -> None:
    from edgehp.remote.fleet import exit_code, run_all

    context = click.get_current_context()
    command = own["remote_command"]
    several = own["hosts"] is not None
    boards = read_boards(own["hosts"], command) if several else (parse_board(own["host"], command),)
    given = parameters | {"remote_data_root": own["remote_data_root"]}
    errands = [
        (board, _errand(journey, Trip(given, board, several, local), own["remote_timeout"]))
        for board in boards
    ]
    as_json = bool(parameters.get("as_json"))
    show = _Show(boards, stdout=not several)
    outcomes = run_all(errands, show.listener)
    if show.reader_gone:
        # As a command here would end.
        raise BrokenPipeError
    show.clear()
    if several:
        _print_all(outcomes, as_json)
    elif (error := outcomes[0].error) and error not in show.said:
        click.echo(f"edgehp: error: {error}", err=True)
    context.exit(exit_code(outcomes))


def _errand(journey: Journey, trip: Trip, timeout_s: float | None) -> Errand:
    from edgehp.remote.errand import Errand, Sent

    parameters = trip.given
    changes: dict[str, Change] = {}
    for name in journey.sends:
        value = parameters.get(name)
        if isinstance(value, tuple):
            changes[name] = tuple(Sent(Path(v)) for v in value)
        elif value is not None:
            changes[name] = Sent(Path(value))
    for name in journey.finds:
        if parameters.get(name) is not None:
            changes[name] = sent_if_found(parameters[name])
    words: tuple[str | Sent | Returned, ...] | None = None
    if journey.plan is not None:
        job = journey.plan(trip)
        changes |= job.changes
        words = job.replace
    return Errand(
        _before() + (_words(parameters, changes) if words is None else words),
        any_version=journey.any_version,
        timeout_s=timeout_s,
        stdout_json=bool(parameters.get("as_json")),
    )


def _before() -> tuple[str, ...]:
    """The verbosity: once at least, or no progress would be heard of where there is no terminal."""
    verbose = int(click.get_current_context().find_root().params.get("verbose") or 0)
    return ("-" + "v" * max(1, min(verbose, 2)),)


def _words(
    parameters: Mapping[str, Any], changes: Mapping[str, Change]
) -> tuple[str | Sent | Returned, ...]:
    """The command line again, from what click has read of it."""
    context = click.get_current_context()
    words: list[str | Sent | Returned] = [str(context.info_name)]
    arguments: list[str | Sent | Returned] = []
    for parameter in context.command.params:
        name = str(parameter.name)
        if name in _OWN:
            continue
        if name in changes:
            change = changes[name]
            for part in change if isinstance(change, tuple) else (change,):
                if part is None:
                    continue
                if isinstance(parameter, click.Argument):
                    arguments.append(part)
                else:
                    words += [_flag(parameter), part]
        elif not _typed(name):
            continue
        elif isinstance(parameter, click.Argument):
            value = parameters[name]
            arguments += [str(v) for v in (value if parameter.nargs != 1 else [value])]
        else:
            words += _option(parameter, parameters[name])
    return (*words, *(["--", *arguments] if arguments else []))


def _flag(parameter: click.Parameter) -> str:
    return max(parameter.opts, key=len)


def _option(parameter: click.Parameter, value: Any) -> list[str]:
    name = _flag(parameter)
    if isinstance(parameter, click.Option) and parameter.is_flag:
        if value:
            return [name]
        return [parameter.secondary_opts[0]] if parameter.secondary_opts else []
    values = value if parameter.multiple else [value]
    # One word each: a value may begin with "-".
    return [f"{name}={v}" for v in values]


class _Show:
    """What the boards do, as lines on stderr and, on a terminal, one line that moves."""

    def __init__(self, boards: tuple[Board, ...], stdout: bool) -> None:
        self.said: set[str] = set()
        self.reader_gone = False
        self._stdout = stdout
        self._live = sys.stderr.isatty()
        self._steps = {b.host: "" for b in boards}
        self._drawn = 0.0
        self._lock = threading.Lock()

    def listener(self, board: Board) -> Listener:
        """For the errand of one board."""
        from edgehp.remote.errand import Listener

        def stderr(line: str) -> None:
            if line.startswith(_ERROR):
                self.said.add(line.removeprefix(_ERROR))
            logged = _LOGGED.fullmatch(line)
            text = logged[2] if logged else line.removeprefix("edgehp: ")
            self._line(f"{board.host}: {text}", err=True)

        def stdout(line: str) -> None:
            if self._stdout:
                self._line(line, err=False)

        return Listener(stdout, stderr, lambda text: self._step(board, text))

    def _line(self, text: str, err: bool) -> None:
        with self._lock:
            try:
                self._wipe()
                click.echo(text, err=err)
            except BrokenPipeError:
                # Raised in a thread, it would leave what the board still says unread, and the
                # board's command waiting for ever.
                self.reader_gone = True

    def _step(self, board: Board, text: str) -> None:
        with self._lock:
            changed = self._steps[board.host].split()[:1] != text.split()[:1]
            self._steps[board.host] = text
            now = time.monotonic()
            if self._live and (changed or now - self._drawn > _REDRAW_S):
                self._drawn = now
                line = "  ".join(f"{h}: {s}" for h, s in self._steps.items() if s)
                self._wipe()
                sys.stderr.write(line[:200])
                sys.stderr.flush()

    def _wipe(self) -> None:
        if self._live:
            sys.stderr.write("\r\x1b[K")

    def clear(self) -> None:
        """Take the moving line away."""
        with self._lock:
            self._wipe()
            sys.stderr.flush()


def _print_all(outcomes: list[Outcome], as_json: bool) -> None:
    from edgehp.cli._output import print_json, print_table, styled

    if as_json:
        print_json(
            [
                {
                    "host": o.board.host,
                    "exit_code": o.exit_code,
                    "error": o.error,
                    "seconds": round(o.seconds, 3),
                    "files": [str(p) for p in o.results],
                    "result": _json(o.stdout),
                }
                for o in outcomes
            ]
        )
    else:
        for o in outcomes:
            if o.stdout:
                click.echo(f"{o.board.host}\n{'-' * len(o.board.host)}\n{o.stdout}\n")
        print_table(
            ("board", "state", "exit", "seconds", "what"),
            [
                (
                    o.board.host,
                    styled("FAILED", "red") if o.exit_code else styled("ok", "green"),
                    o.exit_code,
                    f"{o.seconds:.1f}",
                    o.error or ", ".join(str(p) for p in o.results) or None,
                )
                for o in outcomes
            ],
            right=(2, 3),
        )
    if failed := [o.board.host for o in outcomes if o.exit_code]:
        click.echo(
            f"edgehp: error: {len(failed)} of {len(outcomes)} boards failed: {', '.join(failed)}",
            err=True,
        )


def _json(text: str) -> Any:
    """What a board printed, None where it is no JSON: no board may cost the others their rows."""
    try:
        value = strict_json(text.encode())
        # A lone surrogate is JSON, but nothing that can be printed.
        json.dumps(value, ensure_ascii=False).encode()
    except ValueError:
        return None
    return value
