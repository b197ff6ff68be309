"""What every command is made with: its class, and the options that several have."""

from __future__ import annotations

import difflib
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edgehp.cli._output import say
from edgehp.errors import UsageError, without_password
from edgehp.shipping import PASSWORD_VARIABLE

if TYPE_CHECKING:
    from edgehp.datasets.base import Dataset
    from edgehp.shipping.signature import PublicKey

F = TypeVar("F", bound=Callable[..., Any])

# Of options and arguments that name a file or folder; whether it is there is said by its reader.
PATH = click.Path(path_type=Path)

# Where a context's `meta` holds how much the user wants to hear: -1 with --quiet, 1 with -v, 2 with
# -vv.
_LOUDNESS = "edgehp.cli.loudness"


class Notes(logging.Handler):
    """Writes what is logged to stderr as a line for people: without module names.

    Attributes:
        say: called with every line in place of stderr, while a live display owns the terminal.
    """

    say: Callable[[str, int], None] | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line; one who stopped reading must not end a command."""
        text = without_password(record.getMessage())
        if record.levelno <= logging.DEBUG:
            text = f"{record.name}: {text}"
        if record.exc_info:
            text += "\n" + (self.formatter or logging.Formatter()).formatException(record.exc_info)
        try:
            if self.say is not None:
                self.say(text, record.levelno)
            else:
                mark = "warning: " if record.levelno >= logging.WARNING else ""
                say(f"edgehp: {mark}{text}", err=True)
        except Exception:  # as every handler of logging does
            self.handleError(record)


def loudness() -> int:
    """How much the user wants to hear: -1 quiet, 0 as usual, 1 and more with ``-v``."""
    context = click.get_current_context(silent=True)
    return 0 if context is None else int(context.meta.get(_LOUDNESS, 0))


def typed(name: str) -> bool:
    """Whether the user typed the parameter: others may come from the project file or a recipe."""
    source = click.get_current_context().get_parameter_source(name)
    return source is click.core.ParameterSource.COMMANDLINE


def note(text: str, *, always: bool = False) -> None:
    """Say something beside the results on stderr; ``--quiet`` leaves it out unless `always`."""
    if not always and loudness() < 0:
        return
    text = without_password(text)
    if (show := live()) is not None:
        show(text, logging.INFO)
    else:
        say(f"edgehp: {text}", err=True)


def live() -> Callable[[str, int], None] | None:
    """Where lines for people go while a live display owns the terminal; None where none does."""
    return next((h.say for h in logging.getLogger().handlers if isinstance(h, Notes)), None)


def _hear(context: click.Context, parameter: click.Parameter, value: int | bool) -> None:
    """Take ``-v`` and ``--quiet`` into account, wherever on the line they are."""
    change = int(value) if parameter.name == "verbose" else -int(value)
    heard = context.meta[_LOUDNESS] = int(context.meta.get(_LOUDNESS, 0)) + change
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[max(0, min(heard, 2))]
    # Only this package: at DEBUG the libraries underneath would drown it.
    logging.getLogger("edgehp").setLevel(level)


# Of the program and of each command, so that their place is free.
LOUDNESS_OPTIONS = (
    click.Option(
        ["-v", "--verbose"],
        count=True,
        expose_value=False,
        is_eager=True,
        callback=_hear,
        help="Say more on stderr; -vv: everything.",
    ),
    click.Option(
        ["-q", "--quiet"],
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=_hear,
        help="No progress and no notes: results, warnings and errors only.",
    ),
)


class _Common(click.Command):
    """What commands and groups of commands share.

    Attributes:
        examples: command lines that work, shown by ``--help``.
        renamed: options of the last release -> their names now. They work for one more release
            and are not shown.
    """

    def __init__(
        self,
        *arguments: Any,
        examples: Sequence[str] = (),
        renamed: Mapping[str, str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        self.examples = tuple(examples)
        self.renamed = dict(renamed or {})
        taken = {name for p in self.params for name in p.opts}
        for option in self.params:
            if isinstance(option, click.Option) and option.show_default is None:
                option.show_default = True
        self.params += [o for o in LOUDNESS_OPTIONS if not taken & set(o.opts)]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click, with the old names replaced by the new ones."""
        typed = list(self._current(args))
        for word in typed:
            if not word.isascii():
                from edgehp.files import require_utf8

                require_utf8(word)
        # Those of a group are tables of its commands.
        if ctx.default_map and not isinstance(self, click.Group):
            ctx.default_map = self._defaults(ctx.default_map)
        try:
            rest = super().parse_args(ctx, list(typed))
            for parameter in self.params:
                value = ctx.params.get(str(parameter.name))
                # click takes NaN and infinities for numbers in any range.
                if isinstance(value, float) and not math.isfinite(value):
                    raise click.BadParameter(f"{value} is no finite number", ctx, parameter)
            return rest
        except click.BadParameter as e:
            if ctx.default_map and e.param is not None and e.param.name in ctx.default_map:
                words = (
                    f"{e.message}\nhint: if you did not type it, edgehp.toml or the recipe has it"
                )
                raise click.BadParameter(words, e.ctx, e.param) from e
            raise

    def _defaults(self, project: Mapping[str, Any]) -> dict[str, Any]:
        """The values of the project file by parameters' names.

        Raises:
            UsageError: an option that this command does not have.
        """
        flags = {f.lstrip("-"): p for p in self.params for f in (*p.opts, *p.secondary_opts)}
        found: dict[str, Any] = {}
        for key, value in project.items():
            if key not in flags:
                near = difflib.get_close_matches(key, flags, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"edgehp {self.name} --help"
                raise UsageError(
                    f"edgehp.toml: [{self.name}] has {key!r}, which is no option of the command\n"
                    f"hint: {hint}"
                )
            parameter = flags[key]
            several = parameter.multiple and not isinstance(value, list)
            found[str(parameter.name)] = [value] if several else value
        return found

    def _current(self, args: Sequence[str]) -> Iterator[str]:
        rest = iter(args)
        for word in rest:
            if word == "--":
                yield word
                break
            flag, equals, value = word.partition("=")
            if (name := self.renamed.get(flag)) is not None:
                note(f"{flag} is called {name} now; the old name goes with the next release")
            yield f"{name or flag}{equals}{value}"
        yield from rest

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The examples, a line each."""
        if self.examples:
            with formatter.section("Examples"):
                for line in self.examples:
                    formatter.write(f"{'':>{formatter.current_indent}}{line}\n")
        super().format_epilog(ctx, formatter)


class Command(_Common):
    """A command of edgehp: with examples in its help, and names that it had before."""

    def invoke(self, ctx: click.Context) -> Any:
        """As click, with what goes on shown on stderr, and OpenCV's own words at ``-vv`` alone."""
        from edgehp.cli._display import Display

        if loudness() < 2:
            # Read when OpenCV is imported, which is later.
            os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
            os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
        with Display():
            return super().invoke(ctx)


class Group(_Common, click.Group):
    """Commands under one name, such as ``edgehp repo``."""

    command_class = Command


def subcommand(
    name: str, *examples: str, renamed: Mapping[str, str] | None = None
) -> Callable[[Callable[..., Any]], Command]:
    """Make a function the command called `name`, as which its module is looked up by `main`.

    Args:
        name: of the command.
        examples: command lines that work, for its help.
        renamed: options of the last release -> their names now.
    """
    return click.command(name, cls=Command, examples=examples, renamed=renamed)


class Positional(click.Argument):
    """An argument of the last release: still taken, not shown."""

    def get_usage_pieces(self, ctx: click.Context) -> list[str]:
        """Nothing: the option that took its place is shown."""
        return []


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
threads_option = click.option(
    "--threads", type=click.IntRange(1), help="Processor threads for inference."
)
trust_option = click.option(
    "--public-key",
    "public_keys",
    type=PATH,
    multiple=True,
    help="A key that is trusted (PEM). Several may be given.",
)
DATASETS = ("aflw2000", "biwi", "aflw", "300w-lp", "rendered", "faces")

# Of every command that reads photos. Nothing is guessed: 10 bits in 16 look like a dark photo.
photo_depth_option = click.option(
    "--photo-depth",
    type=click.IntRange(8, 16),
    metavar="BITS",
    envvar="EDGEHP_PHOTO_BITS",
    help="Of photos with 16 bits a sample: the camera's bits, 10, 12, 14 or 16.",
)
skip_bad_option = click.option(
    "--skip-bad", is_flag=True, help="Leave damaged photos out, counted and listed."
)


def _root(_: click.Context, __: click.Parameter, given: Path | None) -> Path:
    from edgehp.shipping import slots

    return slots.default_root() if given is None else given


root_option = click.option(
    "--root",
    type=PATH,
    callback=_root,
    help="Where the slots are. Default: $EDGEHP_ROOT, else /var/lib/edgehp.",
)


# Which of a checkpoint's sets; see `with_weights`.
weights_option = click.option(
    "--weights",
    metavar="KEY",
    help="Of a checkpoint with several sets of weights: the one to take, as state_dict_ema.",
)


def with_weights(network: str | None, weights: str | None) -> str | None:
    """``--network`` and ``--weights`` in one: ``FILE#KEY``.

    Raises:
        UsageError: a key, and no file that it could belong to.
    """
    if weights is None:
        return network
    if network is None or not Path(network).is_file():
        raise UsageError(
            f"--weights {weights} chooses among the weights in a checkpoint, and --network is "
            f"{network or 'not given'}\nhint: give the checkpoint's file with --network"
        )
    return f"{network}#{weights}"


def worker_options(function: F) -> F:
    """Give a command the options that say where it works."""
    for option in (
        click.option(
            "--cluster",
            metavar="ADDRESS",
            help="Work on the Dask cluster of the scheduler at tls://HOST:PORT.",
        ),
        click.option(
            "--workers",
            type=click.IntRange(0, 1024),
            default=0,
            help="Work in this many processes of this machine; 0: in this one.",
        ),
    ):
        function = option(function)
    return function


def output_option(
    text: str, *, required: bool = False, default: Path | None = None
) -> Callable[[F], F]:
    """``-o, --output``: where a command writes, said by `text`."""
    return click.option(
        "-o",
        "--output",
        type=PATH,
        required=required,
        default=default,
        help=text,
    )


def read_keys(public_keys: Sequence[Path]) -> list[PublicKey]:
    """The keys that were given.

    Raises:
        UsageError: none was given, or one cannot be read.
    """
    from edgehp.shipping.signature import read_public_key

    if not public_keys:
        raise UsageError("no trusted key was given\nhint: add --public-key FILE")
    return [read_public_key(path) for path in public_keys]


def key_password() -> str | None:
    """The password of encrypted private keys, None where there is none."""
    return os.environ.get(PASSWORD_VARIABLE) or None


def open_photos(
    sources: Sequence[Path], dataset: str | None, skip_bad: bool, depth: int | None = None
) -> Dataset:
    """Folders and zips of faces as one data set, or a named data set at one root.

    Raises:
        UsageError: a named data set without one root, or nothing at all.
        DataError: as the readers say.
    """
    from edgehp.datasets import open_dataset
    from edgehp.datasets.base import join_datasets
    from edgehp.datasets.faces import read_faces

    if dataset is not None:
        if len(sources) != 1:
            raise UsageError(f"--dataset {dataset} takes one root, found {len(sources)}")
        return open_dataset(dataset, sources[0], skip_bad=skip_bad).with_depth(depth)
    if not sources:
        raise UsageError("name at least one folder or zip of faces, or a --dataset")
    parts = [read_faces(source, skip_bad=skip_bad) for source in sources]
    found = parts[0] if len(parts) == 1 else join_datasets("faces", parts)
    return found.with_depth(depth)


def start_logging() -> None:
    """Send what the package logs to stderr."""
    logging.basicConfig(handlers=[Notes()], force=True)
    logging.getLogger("edgehp").setLevel(logging.WARNING)
