"""Command lines outside the fenced examples of the documents, and what every command has."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from edgehp.cli.main import cli
from tests.test_docs import PAGES, REPO, parse

OTHERS = ("Makefile", "edgehp/runtime/edgehp-run.service", "examples/**/*")


@pytest.fixture(autouse=True)
def _files_need_not_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(click.Path, "convert", lambda self, value, *_: Path(value))
    monkeypatch.setattr("edgehp.cli.project.read_recipe", lambda _: ({}, None))


def lines_of(text: str) -> Iterator[list[str]]:
    """The words after ``edgehp`` of each command line in `text`, up to a pipe or redirection."""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        found = re.match(r"(?:[\s$]*|.*(?:[/=] ?|-m |&& |\| ))\bedgehp ([a-z][a-z-]* .*)", line)
        if found is None or line.startswith("#"):
            continue
        words = shlex.split(found[1], comments=True)
        end = next((i for i, w in enumerate(words) if re.match(r"[|;&]|2?>", w)), None)
        yield words[:end]


def wrong(words: list[str], *, mention: bool = False) -> str | None:
    """What is wrong with a command line; of a mention in a sentence its options alone are read."""
    try:
        parse(cli, words, click.Context(cli, info_name="edgehp"))
    except click.exceptions.Exit:
        return None
    except click.UsageError as e:
        if mention and not isinstance(e, click.NoSuchOption):
            return None
        return f"edgehp {shlex.join(words)}: {e.format_message()}"
    return None


def commands() -> Iterator[tuple[str, click.Command]]:
    for name in cli.list_commands(click.Context(cli)):
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        yield name, command
        if isinstance(command, click.Group):
            for part in command.commands.values():
                yield f"{name} {part.name}", part


def test_commands_that_sentences_mention() -> None:
    found = []
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
        for line in re.findall(r"`edgehp ([a-z][^`\n]*)`", text):
            if (fault := wrong(shlex.split(line), mention=True)) is not None:
                found.append(f"{page.relative_to(REPO)}: {fault}")
    assert not found, "\n".join(found)


def test_commands_of_makefile_unit_and_examples() -> None:
    files = [f for o in OTHERS for f in sorted(REPO.glob(o)) if f.is_file()]
    texts = [re.sub(r"\$\(\w+\)", "1", f.read_text(encoding="utf-8")) for f in files]
    lines = [words for text in texts for words in lines_of(text)]
    assert len(lines) >= 5
    assert [fault for words in lines if (fault := wrong(words)) is not None] == []


def test_every_help_has_examples_that_work_and_explains_every_option() -> None:
    for name, command in commands():
        examples = getattr(command, "examples", ())
        assert examples, f"edgehp {name} --help shows no example"
        for words in lines_of("\n".join(examples)):
            assert wrong(words) is None, wrong(words)
        text = command.get_help(click.Context(command, info_name=f"edgehp {name}"))
        assert "Examples:" in text and "\\b" not in text and "\b" not in text, name
        for option in command.params:
            if isinstance(option, click.Option) and not option.hidden:
                assert option.help, f"edgehp {name} {option.opts[0]} has no help"


@pytest.mark.parametrize(
    "line",
    ["build --targe-t cpu", "bench --fps fast", "repo bury x", "validate --dataset nonesuch"],
)
def test_a_wrong_command_line_is_found(line: str) -> None:
    assert wrong(line.split()) is not None


def test_old_names_still_work_and_say_the_new_ones(capsys: pytest.CaptureFixture[str]) -> None:
    for name, command in commands():
        known = {flag for p in command.params for flag in p.opts}
        for old, new in getattr(command, "renamed", {}).items():
            assert new in known and old not in known, (name, old, new)
            command.parse_args(click.Context(command, resilient_parsing=True), [f"{old}=1"])
            assert f"{old} is called {new} now" in capsys.readouterr().err
