"""Write the documentation's reference pages from the code they describe; `make docs` runs it.

    python tools/docs_reference.py docs/reference

Commands come from click, the tables of the file formats from the JSON Schemas and the docstrings of
the records, the model card and the changelog from their own files.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import msgspec

from edgehp.artifact.manifest import Manifest, manifest_schema
from edgehp.benchmark.report import report_schema
from edgehp.cli.main import cli
from edgehp.networks.bundled import bundled_path
from edgehp.runtime.records import EndRecord, FrameRecord, StatusRecord
from edgehp.validation.run import ValidationReport

ROOT = Path(__file__).resolve().parent.parent
_EVERYWHERE = {"--verbose", "--quiet", "--help"}
_DRAFT = "https://json-schema.org/draft/2020-12/schema"


def commands() -> str:
    """Every command and its options."""
    context = click.Context(cli, info_name="edgehp")
    parts = [
        "# Commands",
        "Results go to stdout, progress and messages to stderr. `edgehp COMMAND --help` says "
        "the same in a terminal.",
        *_command(cli, context),
    ]
    return "\n\n".join(parts) + "\n"


def schemas() -> dict[str, dict[str, Any]]:
    """The JSON Schemas (draft 2020-12) of what edgehp writes, by the name of the format."""
    lines, shared = msgspec.json.schema_components(
        [FrameRecord, StatusRecord, EndRecord], ref_template="#/$defs/{name}"
    )
    return {
        "manifest": manifest_schema(),
        "validation-report": {
            "$schema": _DRAFT,
            "title": "edgehp validation report",
            **msgspec.json.schema(ValidationReport),
        },
        "benchmark-report": report_schema(),
        "runtime-line": {
            "$schema": _DRAFT,
            "title": "a line of edgehp run",
            "anyOf": list(lines),
            "$defs": shared,
        },
    }


def formats(found: Mapping[str, Mapping[str, Any]]) -> str:
    """A page of tables for the schemas, with a link to each as a file."""
    about = {
        "manifest": "`manifest.json`, in every artifact.",
        "validation-report": "`reports/validation-*.json`, of `edgehp validate`.",
        "benchmark-report": "`reports/*.json`, a file a scenario, of `edgehp bench`.",
        "runtime-line": "What `edgehp run` writes, an object a line; `type` says which it is.",
    }
    parts = [
        "# File formats",
        "Made from the code that reads and writes them. edgehp refuses keys of a manifest that it "
        "does not know; a format that changes gets another number in `schema`.",
    ]
    for name, schema in found.items():
        parts += [
            f"## {name.replace('-', ' ').capitalize()}",
            f"{about[name]} [JSON Schema](schemas/{name}.schema.json)",
        ]
        if "properties" in schema:
            parts.append(_fields(schema, {}))
        for key, record in schema.get("$defs", {}).items():
            text = inspect.cleandoc(record.get("description", ""))
            summary, _, rest = text.partition("\n\n")
            # The document of an artifact is its manifest and what follows from it.
            meanings = _attributes(inspect.getdoc(Manifest) if key == "_Document" else rest)
            parts += [f"### {key.lstrip('_')}", _prose(summary)]
            if "properties" in record:
                parts.append(_fields(record, meanings))
    return "\n\n".join(part for part in parts if part) + "\n"


def _command(command: click.Command, context: click.Context) -> Iterator[str]:
    if context.parent is not None:
        level = "##" if context.parent.parent is None else "###"
        yield f"{level} {context.command_path}"
    yield (
        "```\n" + " ".join([context.command_path, *command.collect_usage_pieces(context)]) + "\n```"
    )
    yield _prose(inspect.cleandoc(command.help or ""))
    # What every command has stands once, with the program's own.
    shown = [
        p
        for p in command.get_params(context)
        if context.parent is None or p.expose_value or not _EVERYWHERE & set(p.opts)
    ]
    rows = [record for p in shown if (record := p.get_help_record(context))]
    if rows:
        yield _table(("option", "meaning"), [(f"`{name}`", _prose(text)) for name, text in rows])
    if examples := getattr(command, "examples", ()):
        yield "```\n" + "\n".join(examples) + "\n```"
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            if child is not None and not child.hidden:
                yield from _command(child, click.Context(child, context, info_name=name))


def _fields(record: Mapping[str, Any], meanings: Mapping[str, str]) -> str:
    required = record.get("required", ())
    rows = [
        (
            f"`{name}`" + ("" if name in required else ", optional"),
            _kind(value),
            _prose(value.get("description") or meanings.get(name, "")),
        )
        for name, value in record["properties"].items()
    ]
    return _table(("key", "type", "meaning"), rows)


def _kind(value: Mapping[str, Any]) -> str:
    """A type of a schema in a few words."""
    if "$ref" in value:
        return str(value["$ref"]).rpartition("/")[2].lstrip("_")
    if "anyOf" in value:
        return " or ".join(dict.fromkeys(_kind(v) for v in value["anyOf"]))
    if "const" in value:
        return f"`{json.dumps(value['const'])}`"
    if "enum" in value:
        return ", ".join(f"`{v}`" for v in value["enum"])
    kind = value.get("type", "any")
    if isinstance(kind, list):
        return " or ".join(kind)
    if kind == "array" and isinstance(value.get("items"), Mapping):
        return f"array of {_kind(value['items'])}"
    if kind == "object" and isinstance(value.get("additionalProperties"), Mapping):
        return f"object of {_kind(value['additionalProperties'])}"
    return str(kind)


def _attributes(docstring: str | None) -> dict[str, str]:
    """The section ``Attributes:`` of a docstring, by name."""
    _, _, section = (docstring or "").partition("Attributes:\n")
    found: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        if match := re.match(r" {4}(\w+): (.*)", line):
            name, found[match[1]] = match[1], match[2]
        elif line.startswith(" " * 8) and name:
            found[name] += " " + line.strip()
        elif line.strip():
            break
    return found


def _prose(text: str) -> str:
    """Text of help or a docstring as Markdown: its own signs are meant as they are."""
    text = re.sub(r"``(.+?)``", r"`\1`", text)
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(
        p if p.startswith("`") else re.sub(r"([*_\[\]])", r"\\\1", p).replace("<", "&lt;")
        for p in parts
    )


def _table(headers: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [headers, ("---",) * len(headers), *rows]
    cells = [[" ".join(c.split()).replace("|", "\\|") for c in row] for row in lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def main(folder: Path) -> None:
    """Write all pages into `folder`."""
    (folder / "schemas").mkdir(parents=True, exist_ok=True)
    found = schemas()
    card = bundled_path("kd-resnet18").with_name("MODEL_CARD.md")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    pages = {
        "commands.md": commands(),
        "formats.md": formats(found),
        "model-card.md": card.read_text(encoding="utf-8"),
        # One folder below the other pages, where the changelog is beside docs/.
        "changelog.md": changelog.replace("](docs/", "](../"),
        **{f"schemas/{n}.schema.json": json.dumps(s, indent=2) + "\n" for n, s in found.items()},
    }
    for name, text in pages.items():
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
