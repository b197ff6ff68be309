"""Every command line that the README, the documents and the help show is one that edgehp takes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from edgehp.cli.main import cli

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES += sorted((ROOT / "edgehp").rglob("*.md"))
OTHERS = [ROOT / "Makefile", ROOT / "edgehp/runtime/edgehp-run.service", ROOT / "examples"]


def blocks(page: Path) -> str:
    """The code of a page: what stands between fences, and in backticks."""
    text = page.read_text(encoding="utf-8")
    fenced = re.findall(r"^ *```[^\n]*\n(.*?)^ *```", text, re.M | re.S)
    inline = re.findall(r"`(edgehp [^`\n]*)`", re.sub(r"```.*?```", "", text, flags=re.S))
    return "\n".join([*fenced, *inline])


def lines_of(text: str) -> Iterator[list[str]]:
    """The words after ``edgehp`` of each command line in `text`, up to a pipe or redirection."""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        found = re.match(
            r"(?:[\s$]*|.*(?:[/=] ?|-m |&& |\| ))\bedgehp ((?:-v+ )?[a-z][a-z-]* .*)", line
        )
        if found is None or line.startswith("#"):
            continue
        words = shlex.split(found[1], comments=True)
        end = next((i for i, w in enumerate(words) if re.match(r"[|;&]|2?>", w)), None)
        yield words[:end]


def check(words: list[str]) -> None:
    """Parse as click would, except that the files need not be there."""
    command: click.Command = cli
    context = click.Context(cli, info_name="edgehp")
    if words and re.fullmatch("-v+", words[0]):
        words = words[1:]
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        found = command.get_command(context, words[0])
        if found is None:
            raise click.UsageError(f"no such command: {words[0]}")
        context = click.Context(found, context, words[0])
        command, words = found, words[1:]
    try:
        given, _, _ = command.make_parser(context).parse_args(list(words))
    except click.BadOptionUsage as e:
        if "requires an argument" in e.format_message():
            return  # a mention, such as `edgehp build --finish`
        raise
    for parameter in command.params:
        value = given.get(str(parameter.name))
        # A placeholder such as N or MIN,MAX has no value of the right type.
        placeholder = isinstance(value, str) and value.isupper()
        if not isinstance(parameter, click.Option) or not isinstance(value, str) or placeholder:
            continue
        if not isinstance(parameter.type, click.Path):
            parameter.type.convert(value, parameter, context)


def commands() -> Iterator[tuple[str, click.Command]]:
    context = click.Context(cli)
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None
        yield name, command
        if isinstance(command, click.Group):
            for part in command.commands.values():
                yield f"{name} {part.name}", part


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_of_a_page(page: Path) -> None:
    for words in lines_of(blocks(page)):
        try:
            check(words)
        except click.ClickException as e:
            pytest.fail(f"edgehp {shlex.join(words)}: {e.format_message()}")


def test_commands_of_makefile_unit_and_examples() -> None:
    files = [f for o in OTHERS for f in ([o] if o.is_file() else sorted(o.rglob("*")))]
    seen = 0
    for file in files:
        if not file.is_file():
            continue
        for words in lines_of(file.read_text(encoding="utf-8")):
            seen += 1
            try:
                check(words)
            except click.ClickException as e:
                pytest.fail(f"{file.name}: edgehp {shlex.join(words)}: {e.format_message()}")
    assert seen >= 5


def test_the_check_finds_what_is_wrong() -> None:
    for line in (
        "edgehp build --targe-t cpu",
        "edgehp bench --fps fast",
        "edgehp repo bury x",
        "edgehp validate --dataset nonesuch",
    ):
        with pytest.raises(click.ClickException):
            for words in lines_of(line):
                check(words)


def test_every_help_has_examples_that_work_and_no_control_characters() -> None:
    for name, command in commands():
        examples = getattr(command, "examples", ())
        assert examples, f"edgehp {name} --help shows no example"
        for words in lines_of("\n".join(examples)):
            check(words)
        help_ = command.get_help(click.Context(command, info_name=f"edgehp {name}"))
        assert "\\b" not in help_ and "\b" not in help_, name
        assert "Examples:" in help_
        for option in command.params:
            if isinstance(option, click.Option) and not option.hidden:
                assert option.help, f"edgehp {name} {option.opts[0]} has no help"


def test_old_names_still_work_and_say_the_new_ones(capsys: pytest.CaptureFixture[str]) -> None:
    for name, command in commands():
        known = {flag for p in command.params for flag in p.opts}
        for old, new in getattr(command, "renamed", {}).items():
            assert new in known and old not in known, (name, old, new)
            command.parse_args(click.Context(command, resilient_parsing=True), [f"{old}=1"])
            assert f"{old} is called {new} now" in capsys.readouterr().err
