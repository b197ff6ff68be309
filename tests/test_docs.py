"""What pages, sentences, helps and scripts say of commands and formats is what there is."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import click
import jsonschema
import pytest

from edgehp.cli.main import COMMANDS, cli
from edgehp.runtime.capture import CapturedFrame
from edgehp.runtime.records import Pose, end_record, frame_record, status_record

REPO = Path(__file__).resolve().parent.parent
PAGES = sorted(
    path
    for path in [REPO / "README.md", *REPO.glob("docs/**/*.md"), *REPO.glob("networks/**/*.md")]
    if "reference" not in path.parts
)


OTHERS = ("Makefile", "edgehp/runtime/edgehp-run.service", "examples/**/*")


@pytest.fixture(autouse=True)
def _files_need_not_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(click.Path, "convert", lambda self, value, *_: Path(value))
    monkeypatch.setattr("edgehp.cli.project.read_recipe", lambda _: ({}, None))


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    sys.path.insert(0, str(REPO / "tools"))
    try:
        return importlib.import_module("docs_reference")
    finally:
        sys.path.remove(str(REPO / "tools"))


def edgehp_lines(text: str) -> Iterator[str]:
    """Each whole line of a fenced block that calls edgehp, as a shell takes it."""
    for block in re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            # Others are output.
            if re.match(r"(\$ )?edgehp ", line) and " ... " not in line:
                yield line.removeprefix("$ ")


def command_lines(text: str) -> Iterator[list[str]]:
    """The words after each ``edgehp`` of these lines."""
    for line in edgehp_lines(text):
        words = shlex.split(line, comments=True)
        ends = [i for i, w in enumerate(words) if w in {"|", ">", "&&", ";"}]
        for first, last in zip([0, *(i + 1 for i in ends)], [*ends, len(words)], strict=True):
            if words[first : first + 1] == ["edgehp"]:
                yield words[first + 1 : last]


def parse(group: click.Group, words: list[str], context: click.Context) -> None:
    """Parse options and arguments as the command would, without running it."""
    command = group.get_command(context, words[0])
    if command is None:
        raise click.UsageError(f"no command {words[0]!r}")
    if isinstance(command, click.Group) and len(words) > 1:
        parse(command, words[1:], click.Context(command, context, info_name=words[0]))
    else:
        command.make_context(words[0], words[1:], context).close()


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


def test_every_command_line_of_the_documentation_is_understood() -> None:
    found = [(p, words) for p in PAGES for words in command_lines(p.read_text(encoding="utf-8"))]
    faults = [f"{p.relative_to(REPO)}: {fault}" for p, words in found if (fault := wrong(words))]
    assert not faults, "\n".join(faults)
    seen = {words[0] for _, words in found}
    assert {"build", "validate", "bench", "report", "predict", "run", "install"} <= seen


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


def test_the_reference_has_every_command_and_format(reference: ModuleType, tmp_path: Path) -> None:
    reference.main(tmp_path)
    page = (tmp_path / "commands.md").read_text(encoding="utf-8")
    assert [n for n in COMMANDS if f"## edgehp {n}\n" not in page] == []
    formats = (tmp_path / "formats.md").read_text(encoding="utf-8")
    for name in reference.schemas():
        assert f"schemas/{name}.schema.json" in formats
        assert (tmp_path / "schemas" / f"{name}.schema.json").is_file()
    # Every key of a line says what it means.
    assert not re.findall(r"^\| `.*\|  \|$", formats.partition("## Runtime line")[2], re.MULTILINE)


def test_runtime_lines_keep_to_their_schema(reference: ModuleType) -> None:
    schemas = reference.schemas()
    for schema in schemas.values():
        jsonschema.Draft202012Validator.check_schema(schema)
    line = jsonschema.Draft202012Validator(schemas["runtime-line"])
    frame = CapturedFrame.__new__(CapturedFrame)
    for name, value in {"number": 1, "utc_ns": 10**18, "monotonic_ns": 5, "seconds": 0.5}.items():
        object.__setattr__(frame, name, value)
    pose = Pose(None, True, (1.0, 2.0, 3.0), None, (1.0, float("nan"), 1.0), 0.9)
    for record in (
        frame_record(frame, 9, "ok", None, pose, 0),
        status_record("camera_lost", "no frame", 1, 2, 10**18),
        end_record("SIGTERM", {"captured": 3}, 10**18),
    ):
        line.validate(record)
        for wrong in (
            {**record, "type": "other"},
            {k: v for k, v in record.items() if k != "type"},
        ):
            assert not line.is_valid(wrong)
    assert not line.is_valid({**frame_record(frame, 9, "ok", None, pose, 0), "state": "well"})
