"""``--host`` and ``--hosts``: the same command on other boards, as one decorator a command."""

from __future__ import annotations

import functools
import json
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edgehp.cli._command import PATH, live, loudness, note
from edgehp.cli._output import print_json, print_table, say, styled
from edgehp.errors import UsageError

if TYPE_CHECKING:
    from edgehp.remote.boards import Board
    from edgehp.remote.errand import Errand, Outcome, Returned, Sent

    Part = str | Sent | Returned
    # What takes the place of a parameter, by its name; nothing where it is left out.
    Changes = Mapping[str, Sequence[Part]]

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS = [
    click.option("--host", metavar="USER@HOST", help="Run there over SSH; results come back here."),
    click.option(
        "--hosts",
        type=PATH,
        metavar="FILE",
        help="Run on many boards at once: a host a line, after it its --remote-command if need be.",
    ),
    click.option(
        "--lab",
        metavar="KEY=VALUE",
        help="Run on a free board of the labgrid lab with this tag, such as target=orin-nano-8gb; "
        "several with commas.",
    ),
    click.option("--all", "all_boards", is_flag=True, help="With --lab: on every such board."),
    click.option(
        "--power-cycle", is_flag=True, help="With --lab: switch the board off and on before."
    ),
    click.option(
        "--remote-command",
        default="edgehp",
        metavar="COMMAND",
        help="How edgehp is started there, such as '~/venv/bin/edgehp'.",
    ),
    click.option(
        "--remote-timeout",
        type=click.FloatRange(min=1),
        metavar="SECONDS",
        help="Stop the command there after this time. Default: none.",
    ),
    click.option(
        "--remote-data-root", metavar="DIR", help="Where the data set is on the board, not sent."
    ),
]
_OWN = (
    "host",
    "hosts",
    "lab",
    "all_boards",
    "power_cycle",
    "remote_command",
    "remote_timeout",
    "remote_data_root",
)
_ERROR = "edgehp: error: "
# Where values come from that the board does not have by itself.
_SAID = (click.core.ParameterSource.COMMANDLINE, click.core.ParameterSource.DEFAULT_MAP)


@dataclass(frozen=True)
class Trip:
    """What a command's way to a board is planned from.

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

    def own(self, folder: Path) -> Path:
        """The board's own folder in `folder` where there are several, else `folder`."""
        return folder / self.board.folder if self.several else folder


def over_ssh(
    *sends: str,
    any_version: bool = False,
    data_root: bool = False,
    own_all: str | None = None,
) -> Callable[[F], F]:
    """Give a command ``--host`` and its companions. The lowest of its decorators.

    What else of its parameters changes is said by ``plan_COMMAND`` in `edgehp.cli._remote_plans`.

    Args:
        sends: parameters that name a file or folder here, which is sent; a text that names none
            goes as it is.
        any_version: whether a board with another edgehp may run it.
        data_root: whether there is ``--remote-data-root``, for photos that are there already.
        own_all: the parameter of an ``--all`` that the command has anyway; with ``--lab`` it is
            about boards.
    """

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def command(**parameters: Any) -> None:
            own = {name: parameters.pop(name, None) for name in _OWN}
            dropped: dict[str, Sequence[Part]] = {}
            if own_all is not None and own["lab"] is not None:
                own["all_boards"], parameters[own_all] = parameters[own_all], False
                dropped[own_all] = ()
            boards = _boards(own)
            if not boards:
                if parameters.get("cluster") is not None:
                    parameters["remote_data_root"] = own["remote_data_root"]
                function(**parameters)
                return
            from edgehp.cli import _remote_plans
            from edgehp.remote.errand import Errand

            name = click.get_current_context().command.name
            plan = getattr(_remote_plans, f"plan_{name}", None)
            turns = getattr(_remote_plans, f"turns_{name}", None)
            given = parameters | {"remote_data_root": own["remote_data_root"]}
            several = own["hosts"] is not None or own["all_boards"]
            errands = []
            for board in boards:
                changes = dict(dropped)
                changes |= {n: _sent(given[n]) for n in sends if given[n] is not None}
                if plan is not None:
                    changes.update(plan(Trip(given, board, several, function)))
                as_json = bool(given.get("as_json"))
                often = turns(given) if turns is not None and board.power_cycle else 1
                words, limit = _words(changes), own["remote_timeout"]
                errands.append((board, Errand(words, any_version, limit, as_json, often)))
            _run(errands, several)

        decorated: Any = command
        left_out = {"all_boards"} if own_all else set()
        left_out |= set() if data_root else {"remote_data_root"}
        for name, option in reversed([*zip(_OWN, _OPTIONS, strict=True)]):
            decorated = decorated if name in left_out else option(decorated)
        typed: F = decorated
        return typed

    return decorate


def _boards(own: Mapping[str, Any]) -> Sequence[Board]:
    """The boards that the user named."""
    from edgehp.remote.boards import parse_board, parse_lab, read_boards

    context, command = click.get_current_context(), own["remote_command"]
    if sum(own[name] is not None for name in ("host", "hosts", "lab")) > 1:
        raise UsageError("give one of --host, --hosts and --lab")
    if own["lab"] is not None:
        wanted = parse_lab(own["lab"], command, power_cycle=own["power_cycle"])
        if not own["all_boards"]:
            return (wanted,)
        from edgehp.remote.lab import Booking

        names = Booking(wanted, note).places()
        return [replace(wanted, place=name, tags=(f"name={name}",)) for name in names]
    for name, flag in (("all_boards", "--all"), ("power_cycle", "--power-cycle")):
        if own[name]:
            raise UsageError(f"{flag} belongs to --lab")
    if own["hosts"] is not None:
        return read_boards(own["hosts"], command)
    if own["host"] is not None:
        return (parse_board(own["host"], command),)
    # On a cluster too, photos may be where the work is.
    for name in _OWN[5:-1] if context.params.get("cluster") else _OWN[5:]:
        source = context.get_parameter_source(name)
        if source is click.core.ParameterSource.COMMANDLINE:
            raise UsageError(f"--{name.replace('_', '-')} belongs to --host, --hosts or --lab")
    return ()


def _sent(value: Any) -> list[Part]:
    """A parameter's files."""
    from edgehp.remote.errand import Sent

    values = value if isinstance(value, tuple) else (value,)
    return [Sent(Path(v)) if isinstance(v, Path) or Path(v).exists() else v for v in values]


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


def _words(changes: Changes) -> tuple[Part, ...]:
    """The command line anew: what was typed or a project file says, changed, without `_OPTIONS`."""
    context = click.get_current_context()
    options: list[Part] = []
    arguments: list[Part] = []
    for parameter in context.command.params:
        name = str(parameter.name)
        values: Sequence[Any]
        if name in changes:
            values = changes[name]
        elif name in _OWN or context.get_parameter_source(name) not in _SAID:
            continue
        else:
            value = context.params.get(name, ())
            values = value if isinstance(value, tuple) else (value,)
        parts = [str(v) if isinstance(v, (Path, int, float)) else v for v in values]
        if isinstance(parameter, click.Argument):
            arguments += parts
        elif isinstance(parameter, click.Option) and parameter.is_flag:
            flags = (parameter.opts if v else parameter.secondary_opts for v in values)
            options += [max(names, key=len) for names in flags if names]
        else:
            options += [word for part in parts for word in (max(parameter.opts, key=len), part)]
    # Verbose once at least, or no progress would be heard of where there is no terminal.
    loud = "-" + "v" * max(1, min(loudness(), 2))
    return (loud, str(context.info_name), *options, *(["--", *arguments] if arguments else ()))


def _run(errands: Sequence[tuple[Board, Errand]], several: bool) -> None:
    """Do the errands, show what the boards say, and end with their exit code."""
    from edgehp.remote.errand import exit_code, run_all

    show = _Show(stdout=not several)
    outcomes = run_all(errands, show)
    if show.reader_gone:
        # As a command here would end.
        raise BrokenPipeError
    if several:
        _print_all(outcomes, errands[0][1].stdout_json)
    elif (error := outcomes[0].error) and error not in show.said:
        say(f"{_ERROR}{error}", err=True)
    click.get_current_context().exit(exit_code(outcomes))


class _Show:
    """Shows what the boards do and say, a line each."""

    def __init__(self, stdout: bool) -> None:
        self.said: set[str] = set()
        self.reader_gone = False
        self._stdout = stdout
        self._lock = threading.Lock()

    def __call__(self, board: Board, kind: str, text: str) -> None:
        """As a `Listener` is called."""
        if kind == "stderr":
            if text.startswith(_ERROR):
                self.said.add(text.removeprefix(_ERROR))
            self._line(f"{board.name}: {text.removeprefix('edgehp: ')}", err=True)
        elif self._stdout:
            self._line(text, err=False)

    def _line(self, text: str, err: bool) -> None:
        with self._lock:
            try:
                if err and (show := live()) is not None:
                    show(text, logging.INFO)
                else:
                    say(text, err)
            except BrokenPipeError:
                # Raised in a thread, it would leave what the board still says unread, and the
                # board's command waiting for ever.
                self.reader_gone = True


def _print_all(outcomes: list[Outcome], as_json: bool) -> None:
    if as_json:
        print_json(
            [
                {
                    "host": o.board.name,
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
                click.echo(f"{o.board.name}\n{'-' * len(o.board.name)}\n{o.stdout}\n")
        print_table(
            ("board", "state", "exit", "seconds", "what"),
            [
                (
                    o.board.name,
                    styled("FAILED", "red") if o.exit_code else styled("ok", "green"),
                    o.exit_code,
                    f"{o.seconds:.1f}",
                    o.error or ", ".join(str(p) for p in o.results) or None,
                )
                for o in outcomes
            ],
            right=(2, 3),
        )
    if failed := [o.board.name for o in outcomes if o.exit_code]:
        click.echo(
            f"{_ERROR}{len(failed)} of {len(outcomes)} boards failed: {', '.join(failed)}",
            err=True,
        )


def _json(text: str) -> Any:
    """What a board printed, None where it is no JSON: no board may cost the others their rows."""
    from edgehp.files import strict_json

    try:
        value = strict_json(text.encode())
        # A lone surrogate is JSON, but nothing that can be printed.
        json.dumps(value, ensure_ascii=False).encode()
    except ValueError:
        return None
    return value
