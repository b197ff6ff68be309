"""``--host``, ``--hosts`` and ``--lab``: the same command on other boards, one decorator each."""

from __future__ import annotations

import functools
import json
import logging
import shutil
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edgehp.cli._command import PATH, live, loudness, note, typed
from edgehp.cli._output import print_columns, print_json, say, styled
from edgehp.errors import UsageError

if TYPE_CHECKING:
    from edgehp.remote.boards import Board
    from edgehp.remote.errand import Errand, Outcome, Parcel

    # What takes the place of a parameter, by its name; nothing where it is left out.
    Changes = Mapping[str, Sequence[str | Parcel]]
    # Given the values of the parameters, what is sent and what comes back: a function of the name
    # of the board's own folder of results, which is empty where there is one board.
    Plan = Callable[[Mapping[str, Any]], Callable[[str], Changes]]

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS = {
    "host": click.option(
        "--host", metavar="USER@HOST", help="Run there over SSH; results come back here."
    ),
    "hosts": click.option(
        "--hosts",
        type=PATH,
        metavar="FILE",
        help="Run on many boards at once: a host a line, after it its --remote-command if need be.",
    ),
    "lab": click.option(
        "--lab",
        metavar="KEY=VALUE",
        help="Run on a free board of the labgrid lab with this tag, such as target=orin-nano-8gb; "
        "several with commas.",
    ),
    "all_boards": click.option(
        "--all", "all_boards", is_flag=True, help="With --lab: on every such board."
    ),
    "power_cycle": click.option(
        "--power-cycle", is_flag=True, help="With --lab: switch the board off and on before."
    ),
    "remote_command": click.option(
        "--remote-command",
        default="edgehp",
        metavar="COMMAND",
        help="How edgehp is started there, such as '~/venv/bin/edgehp'.",
    ),
    "remote_timeout": click.option(
        "--remote-timeout",
        type=click.FloatRange(min=1),
        metavar="SECONDS",
        help="Stop the command there after this time. Default: none.",
    ),
}
_ERROR = "edgehp: error: "
# Where values come from that the board does not have by itself.
_SAID = (click.core.ParameterSource.COMMANDLINE, click.core.ParameterSource.DEFAULT_MAP)


def over_ssh(
    *sends: str, plan: Plan | None = None, any_version: bool = False, own_all: str = "all_boards"
) -> Callable[[F], F]:
    """Give a command ``--host`` and its companions. The lowest of its decorators.

    Args:
        sends: parameters that name a file or folder here, which is sent; a text that names none
            goes as it is.
        plan: what else of its parameters changes.
        any_version: whether a board with another edgehp may run it.
        own_all: the parameter of ``--all`` where the command has one anyway, which with ``--lab``
            is about boards.
    """

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def command(**given: Any) -> None:
            own = {name: given.pop(name, None) for name in _OPTIONS}
            if own["lab"] is not None and own_all in given:
                own["all_boards"] = given.pop(own_all)
            boards = _boards(own)
            if not boards:
                function(**given)
                return
            from edgehp.remote.errand import Errand

            changes = {n: _sent(given[n]) for n in sends if given[n] is not None}
            change = plan(given | {"power_cycle": own["power_cycle"]}) if plan else lambda _: {}
            several = own["hosts"] is not None or own["all_boards"]
            # Measured one after each power cycle.
            cold = own["power_cycle"] and "cold-start" in given.get("scenarios", ())
            left_out = {own_all, *_OPTIONS} if own["lab"] else {*_OPTIONS}
            errands = [
                Errand(
                    board,
                    _words({**changes, **change(board.folder if several else "")}, left_out),
                    any_version,
                    own["remote_timeout"],
                    bool(given.get("as_json")),
                    given["starts"] if cold else 1,
                )
                for board in boards
            ]
            _run(errands, several)

        decorated: Any = command
        for name, option in reversed(_OPTIONS.items()):
            if name != "all_boards" or own_all == name:
                decorated = option(decorated)
        found: F = decorated
        return found

    return decorate


def _boards(own: Mapping[str, Any]) -> Sequence[Board]:
    """The boards that the user named."""
    from edgehp.remote.boards import parse_board, parse_lab, read_boards

    command = own["remote_command"]
    if sum(own[name] is not None for name in ("host", "hosts", "lab")) > 1:
        raise UsageError("give one of --host, --hosts and --lab")
    if own["lab"] is not None:
        wanted = parse_lab(own["lab"], command, power_cycle=own["power_cycle"])
        if not own["all_boards"]:
            return (wanted,)
        from edgehp.remote.lab import Lab
        from edgehp.remote.ssh import Stop

        names = Lab(Stop(), note).places(wanted.tags)
        return [replace(wanted, place=name, tags=(f"name={name}",)) for name in names]
    for name, flag in (("all_boards", "--all"), ("power_cycle", "--power-cycle")):
        if own[name]:
            raise UsageError(f"{flag} belongs to --lab")
    if own["hosts"] is not None:
        return read_boards(own["hosts"], command)
    if own["host"] is not None:
        return (parse_board(own["host"], command),)
    for name in ("remote_command", "remote_timeout"):
        if typed(name):
            raise UsageError(f"--{name.replace('_', '-')} belongs to --host, --hosts or --lab")
    return ()


def _sent(value: Any) -> list[str | Parcel]:
    """A parameter's files."""
    from edgehp.remote.errand import sent

    values = value if isinstance(value, tuple) else (value,)
    return [sent(Path(v)) if isinstance(v, Path) or Path(v).exists() else v for v in values]


def sent_artifact(
    path: Path | None,
    *,
    allow_deferred: bool = False,
    here: Path | None = None,
    keep: Callable[[Path], Sequence[Path]] | None = None,
) -> Parcel:
    """An artifact's own files, checked here before they travel; reports beside them stay.

    Args:
        path: its directory, None for the newest under ``dist``.
        allow_deferred: whether one without engine may go.
        here: what stands for its path in the command's output; `path` if None.
        keep: given the artifact as it came back; returns what it has made of it.

    Raises:
        DataError, CompatibilityError: there is none, or it was altered.
    """
    from edgehp.artifact import load_artifact, newest_artifact
    from edgehp.artifact.manifest import MANIFEST_NAME
    from edgehp.remote.errand import Parcel

    found = newest_artifact() if path is None else path
    artifact = load_artifact(found, bytes_only=True, allow_deferred=allow_deferred)
    names = (MANIFEST_NAME, *(f.path for f in artifact.manifest.files))
    return Parcel(here or found, {name: found / name for name in names}, keep)


def keep_artifact(found: Path, destination: Path) -> list[Path]:
    """Check an artifact that came back and put it in place as ``build`` would, or not at all."""
    from edgehp.artifact import load_artifact
    from edgehp.artifact.write import ArtifactWriter

    manifest = load_artifact(found, bytes_only=True, allow_deferred=True).manifest
    with ArtifactWriter(destination) as writer:
        for record in manifest.files:
            target = writer.path / record.path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(found / record.path, target)
        writer.commit(manifest, {f.path: f.role for f in manifest.files})
    return [destination]


def _words(changes: Changes, left_out: Collection[str]) -> tuple[str | Parcel, ...]:
    """The command line anew: what was typed or a project file says, changed, without `left_out`."""
    context = click.get_current_context()
    options: list[str | Parcel] = []
    arguments: list[str | Parcel] = []
    for parameter in context.command.params:
        name = str(parameter.name)
        values: Sequence[Any]
        if name in changes:
            values = changes[name]
        elif name in left_out or context.get_parameter_source(name) not in _SAID:
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


def _run(errands: Sequence[Errand], several: bool) -> None:
    """Do the errands, show what the boards say, and end with their exit code."""
    from edgehp.remote.errand import exit_code, run_all

    said: set[str] = set()
    reader_gone = False
    lock = threading.Lock()

    def hear(board: Board, kind: str, text: str) -> None:
        nonlocal reader_gone
        err = kind == "stderr"
        if err and text.startswith(_ERROR):
            said.add(text.removeprefix(_ERROR))
        if several and not err:
            return
        line = f"{board.name}: {text.removeprefix('edgehp: ')}" if err else text
        with lock:
            try:
                if err and (show := live()) is not None:
                    show(line, logging.INFO)
                else:
                    say(line, err)
            except BrokenPipeError:
                # Raised in a thread, it would leave what the board still says unread, and the
                # board's command waiting for ever.
                reader_gone = True

    outcomes = run_all(errands, hear)
    if reader_gone:
        # As a command here would end.
        raise BrokenPipeError
    if several:
        print_outcomes(outcomes, errands[0].stdout_json)
    elif (error := outcomes[0].error) and error not in said:
        say(f"{_ERROR}{error}", err=True)
    click.get_current_context().exit(exit_code(outcomes))


def print_outcomes(outcomes: Sequence[Outcome], as_json: bool) -> None:
    """Print how the same command ended on each board."""
    if as_json:
        print_json(
            [
                {
                    "host": o.board.name,
                    "exit_code": o.exit_code,
                    "error": o.error,
                    "seconds": round(o.seconds, 3),
                    "files": o.results,
                    "result": _json(o.stdout),
                }
                for o in outcomes
            ]
        )
    else:
        for o in outcomes:
            if o.stdout:
                click.echo(f"{o.board.name}\n{'-' * len(o.board.name)}\n{o.stdout}\n")
        print_columns(
            outcomes,
            {
                "board": lambda o: o.board.name,
                "state": lambda o: styled(*(("FAILED", "red") if o.exit_code else ("ok", "green"))),
                "exit": lambda o: o.exit_code,
                "seconds": lambda o: f"{o.seconds:.1f}",
                "what": lambda o: o.error or ", ".join(map(str, o.results)) or None,
            },
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
