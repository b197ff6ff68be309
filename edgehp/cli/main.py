"""The root of the command line: finds commands lazily and turns errors into exit codes."""

from __future__ import annotations

import difflib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import FrameType

import click

from edgehp import __version__
from edgehp.cli._command import LOUDNESS_OPTIONS, start_logging
from edgehp.errors import EdgehpError, EnvironmentalError, without_password

logger = logging.getLogger(__name__)

# In the order of the help. The texts stand here and not in the commands' modules, so that
# `edgehp --help` imports none of them.
COMMANDS = {
    "init": "Write a project file, so that commands need no options.",
    "describe": "Begin the description of any ONNX pose network.",
    "build": "Turn a checkpoint into a checked INT8 artifact for a target.",
    "validate": "Measure an artifact's accuracy against its FP32 reference.",
    "bench": "Measure latency, throughput and power on this device.",
    "sensitivity": "Say what each layer's INT8 costs in degrees.",
    "predict": "Head pose of the faces in a photo, folder, video or camera.",
    "run": "Follow a driver's head: camera to JSON lines, without end.",
    "label": "Let teacher networks label face crops.",
    "train": "Train a network, or the base network of the offset ensemble.",
    "distill": "Distil teachers or an offset ensemble into one small network.",
    "bundle": "Put an artifact into one signed file.",
    "verify": "Check the signature and the hashes of a bundle.",
    "install": "Install a bundle beside what runs, test it, switch to it.",
    "repo": "Keep a repository of bundles for a fleet.",
    "update": "Install the newest bundle of a repository that fits here.",
    "status": "Say what is installed on this device.",
    "confirm": "Say that the slot in use runs well.",
    "rollback": "Test the other slot and switch to it.",
    "targets": "List the targets an artifact can be built for, or explain one.",
    "doctor": "Say what this machine can run and what to install for the rest.",
    "report": "Turn results into Markdown, HTML and plots.",
    "completion": "Print the completion of edgehp for your shell.",
}
# Commands of one subject share a module; each other one is `command` in the module of its name.
_SHARED = {
    "project": ("init", "completion"),
    "training": ("train", "distill"),
    "shipping": ("bundle", "verify", "install", "update", "status", "confirm", "rollback"),
}
_PLACES = {name: (module, name) for module, names in _SHARED.items() for name in names}
INTERRUPTED = 130


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands, in the order of the help."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command called `cmd_name`; its module is imported now."""
        if cmd_name not in COMMANDS:
            return None
        module, attribute = _PLACES.get(cmd_name, (cmd_name, "command"))
        command: click.Command = getattr(import_module(f"edgehp.cli.{module}"), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click, but an unknown name is answered with the near one."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "edgehp --help lists all"
            raise click.UsageError(f"no command {args[0]!r}\nhint: {hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="edgehp")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Head-pose networks from checkpoint to a measured INT8 engine in the car.

    Exit codes: 0 ok, 1 error, 2 usage, 3 accuracy gate, 4 artifact and device do not match,
    5 environment, 6 invalid measurement, 130 interrupted (Ctrl-C or SIGTERM).
    """
    if Path("edgehp.toml").is_file() and ctx.invoked_subcommand not in ("init", "completion"):
        from edgehp.cli.project import PROJECT, read_project

        ctx.obj = read_project(Path(PROJECT))
        ctx.default_map = {k: dict(v) for k, v in ctx.obj.defaults.items()}


cli.params += LOUDNESS_OPTIONS


def _fail(message: str, code: int) -> int:
    """Say what is wrong, its hints on lines of their own, and give the exit code."""
    from edgehp.cli._output import say, styled

    sentence, _, hints = without_password(message).partition("\nhint: ")
    lines = [f"edgehp: {styled('error', 'red', sys.stderr, bold=True)}: {sentence}"]
    if hints:
        lines += [
            line.replace("hint:", styled("hint:", "cyan", sys.stderr), 1)
            for line in f"hint: {hints}".splitlines()
        ]
    say("\n".join(lines), err=True)
    return code


def _quiet_stdout() -> None:
    # The interpreter flushes stdout on exit; a reader that has gone away must not make it complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _termination_interrupts() -> Iterator[list[int]]:
    """Treat SIGTERM inside as Ctrl-C, so that every command tidies up; gives what has arrived.

    Commands with a handler of their own put it in place of this one. Where SIGTERM is ignored it
    stays so. Further ones are passed over: `timeout` sends two, and the second must not end the
    tidying up.
    """
    arrived: list[int] = []
    before = signal.getsignal(signal.SIGTERM)
    process = os.getpid()

    def interrupt(number: int, _: FrameType | None) -> None:
        if os.getpid() != process:
            # A forked child is ended by whoever made it, at once.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        arrived.append(number)
        if len(arrived) == 1:
            raise KeyboardInterrupt

    # The main thread alone has handlers.
    ours = before is signal.SIG_DFL and threading.current_thread() is threading.main_thread()
    if ours:
        signal.signal(signal.SIGTERM, interrupt)
    try:
        yield arrived
    finally:
        if ours:
            signal.signal(signal.SIGTERM, before)


def _code(arguments: Sequence[str] | None, arrived: Sequence[int]) -> int:
    try:
        result = cli.main(
            args=None if arguments is None else list(arguments),
            prog_name="edgehp",
            standalone_mode=False,
        )
        sys.stdout.flush()
    except click.exceptions.Exit as e:
        return e.exit_code
    except click.UsageError as e:
        if isinstance(e, getattr(click.exceptions, "NoArgsIsHelpError", ())):
            # From click 8.2 on; until then click shows the page itself.
            click.echo(e.format_message())
            return e.exit_code
        command = "edgehp" if e.ctx is None else e.ctx.command_path
        words, _, hint = e.format_message().partition("\nhint: ")
        return _fail(f"{words}\nhint: {hint or f'{command} --help'}", e.exit_code)
    except click.ClickException as e:
        return _fail(e.format_message(), e.exit_code)
    except (click.Abort, KeyboardInterrupt):
        words = "ended by SIGTERM; what was unfinished is removed" if arrived else "interrupted"
        return _fail(words, INTERRUPTED)
    except EdgehpError as e:
        logger.debug("where the error came from", exc_info=True)
        return _fail(str(e), e.exit_code)
    except ModuleNotFoundError as e:
        if (e.name or "").partition(".")[0] == "edgehp":
            raise  # a fault of this package, not of the environment
        from edgehp.doctor.report import how_to_install

        logger.debug("where the error came from", exc_info=True)
        return _fail(
            f"the Python package {e.name!r} is missing\nhint: {how_to_install(e.name or '')}",
            EnvironmentalError.exit_code,
        )
    except BrokenPipeError:
        _quiet_stdout()
        return EdgehpError.exit_code
    except OSError as e:
        logger.debug("where the error came from", exc_info=True)
        name = f"{e.filename}: " if e.filename else ""
        return _fail(f"{name}{e.strerror or e}", EdgehpError.exit_code)
    # click hands back the code of ctx.exit() as the result; commands themselves return None.
    return result if isinstance(result, int) else 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave the process with its exit code.

    Args:
        arguments: without the program's name; None takes those of the process.

    Raises:
        SystemExit: always.
    """
    start_logging()
    with _termination_interrupts() as arrived:
        code = _code(arguments, arrived)
    sys.exit(code)
