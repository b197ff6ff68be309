"""Check a JSON value against the published JSON Schema of the manifest, with nothing installed.

The device has no ``jsonschema`` package, and a second description of the manifest in code would
drift from the published one. This reads the same file and knows the keywords it uses, no others:
an unknown keyword is an error, so that the schema cannot promise what is not checked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgehp.errors import EdgehpError

__all__ = ["first_fault", "manifest_schema"]

_ANNOTATIONS = frozenset({"$schema", "$defs", "title", "description"})


def manifest_schema() -> dict[str, Any]:
    """The JSON Schema of the manifest (draft 2020-12)."""
    path = Path(__file__).with_name("manifest.schema.json")
    schema: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return schema


def first_fault(value: object, schema: Mapping[str, Any]) -> str | None:
    """The first thing wrong with `value`, as ``key: what was found and expected``, or None."""
    return next(_faults(value, schema, schema, ""), None)


def _faults(
    value: object, schema: Mapping[str, Any], root: Mapping[str, Any], at: str
) -> Iterator[str]:
    for keyword, wanted in schema.items():
        if keyword in _ANNOTATIONS:
            continue
        if keyword == "$ref":
            yield from _faults(value, _definition(wanted, root), root, at)
        elif keyword == "anyOf":
            found = [next(_faults(value, s, root, at), None) for s in wanted]
            if all(found):
                yield str(found[0])
        elif keyword in ("type", "const", "enum"):
            yield from _value_fault(value, keyword, wanted, at)
        elif keyword in ("pattern", "maxLength"):
            yield from _text_fault(value, keyword, wanted, at)
        elif keyword in ("minimum", "maximum"):
            yield from _number_fault(value, keyword, wanted, at)
        elif keyword in ("items", "minItems", "maxItems"):
            yield from _array_faults(value, keyword, wanted, root, at)
        elif keyword in ("required", "properties", "additionalProperties"):
            yield from _object_faults(value, keyword, schema, root, at)
        else:
            raise EdgehpError(f"the manifest schema uses {keyword!r}, which is not implemented")


def _definition(reference: str, root: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = root["$defs"][reference.removeprefix("#/$defs/")]
    return found


def _name(at: str) -> str:
    return at or "the manifest"


def _is(value: object, kind: str) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    checks = {
        "object": isinstance(value, dict),
        "array": isinstance(value, list),
        "string": isinstance(value, str),
        "null": value is None,
        "number": number,
        # JSON Schema counts 1.0 as an integer.
        "integer": number and float(value).is_integer(),  # type: ignore[arg-type]
        "boolean": isinstance(value, bool),
    }
    return checks[kind]


def _show(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _value_fault(value: object, keyword: str, wanted: Any, at: str) -> Iterator[str]:
    if keyword == "type":
        kinds = [wanted] if isinstance(wanted, str) else wanted
        if not any(_is(value, k) for k in kinds):
            yield f"{_name(at)}: found {_show(value)}, expected {' or '.join(kinds)}"
        return
    allowed = [wanted] if keyword == "const" else wanted
    if isinstance(value, bool) or value not in allowed:
        yield f"{_name(at)}: found {_show(value)}, expected {' or '.join(map(_show, allowed))}"


def _text_fault(value: object, keyword: str, wanted: Any, at: str) -> Iterator[str]:
    if not isinstance(value, str):
        return
    # "$" also matches before a final newline, in Python though not in JSON Schema.
    if keyword == "pattern" and (value.endswith("\n") or not re.search(wanted, value)):
        yield f"{_name(at)}: found {_show(value)}, expected the form {wanted}"
    if keyword == "maxLength" and len(value) > wanted:
        yield f"{_name(at)}: {len(value)} characters, expected at most {wanted}"


def _number_fault(value: object, keyword: str, wanted: Any, at: str) -> Iterator[str]:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return
    if keyword == "minimum" and value < wanted:
        yield f"{_name(at)}: found {value}, expected at least {wanted}"
    if keyword == "maximum" and value > wanted:
        yield f"{_name(at)}: found {value}, expected at most {wanted}"


def _array_faults(
    value: object, keyword: str, wanted: Any, root: Mapping[str, Any], at: str
) -> Iterator[str]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        return
    if keyword == "minItems" and len(value) < wanted:
        yield f"{_name(at)}: {len(value)} entries, expected at least {wanted}"
    if keyword == "maxItems" and len(value) > wanted:
        yield f"{_name(at)}: {len(value)} entries, expected at most {wanted}"
    if keyword == "items":
        for i, item in enumerate(value):
            yield from _faults(item, wanted, root, f"{at}[{i}]")


def _object_faults(
    value: object, keyword: str, schema: Mapping[str, Any], root: Mapping[str, Any], at: str
) -> Iterator[str]:
    if not isinstance(value, dict):
        return
    dot = f"{at}." if at else ""
    if keyword == "required":
        yield from (f"{dot}{k}: missing" for k in schema["required"] if k not in value)
        return
    known = schema.get("properties", {})
    if keyword == "properties":
        for key, inner in known.items():
            if key in value:
                yield from _faults(value[key], inner, root, f"{dot}{key}")
        return
    extra = schema["additionalProperties"]
    for key in value.keys() - known.keys():
        if extra is False:
            yield f"{dot}{key}: unknown key"
        else:
            yield from _faults(value[key], extra, root, f"{dot}{key}")
