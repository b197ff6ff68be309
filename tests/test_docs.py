"""What the README and the documentation say is what the program does."""

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


def test_every_command_line_of_the_documentation_is_understood(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The files of the examples need not be there.
    monkeypatch.setattr(click.Path, "convert", lambda self, value, *_: Path(value))
    seen, wrong = set(), []
    for page in PAGES:
        for words in command_lines(page.read_text(encoding="utf-8")):
            seen.add(words[0])
            try:
                parse(cli, words, click.Context(cli, info_name="edgehp"))
            except click.exceptions.Exit:
                pass
            except click.UsageError as e:
                wrong.append(f"{page.relative_to(REPO)}: {shlex.join(words)}: {e.format_message()}")
    assert not wrong, "\n".join(wrong)
    assert {"build", "validate", "bench", "report", "predict", "run", "install"} <= seen


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
