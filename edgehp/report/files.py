"""Reading and writing report files."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgehp.errors import DataError, EnvironmentalError
from edgehp.files import output_to, read_json, write_whole

__all__ = ["KINDS", "read_report", "require_writable", "write_report", "write_text"]

KINDS = {"benchmark": 3, "validation": 1}
# A benchmark of ten minutes has about 2 MB.
_LARGEST = 256 << 20


def write_report(report: Mapping[str, Any], directory: Path, name: str) -> Path:
    """Write ``name.json`` into `directory`, which is made where it is missing.

    Raises:
        EnvironmentalError: it cannot be written.
    """
    text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    return write_text(directory / f"{name}.json", text)


def require_writable(path: Path, option: str = "--output") -> None:
    """Refuse a file that cannot be written, before the work whose result it is to hold.

    Nothing is left behind, and missing folders are not made: what is tried is a file in the
    nearest folder that is there.

    Args:
        path: the file to be.
        option: what the user chooses the place with, for the message.

    Raises:
        EnvironmentalError: it is a folder, or no file can be made there.
    """
    place = path.parent
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    trial = place / f".{path.name[:100]}.{secrets.token_hex(4)}"
    try:
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder, a file is expected")
        os.close(os.open(trial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        trial.unlink()
    except OSError as e:
        raise EnvironmentalError(
            f"{path} cannot be written ({e.strerror or e}); nothing was measured: choose another "
            f"{option}"
        ) from e


def write_text(path: Path, text: str, option: str = "--output") -> Path:
    """Replace `path` by `text`, whole or not at all.

    Args:
        path: the file.
        text: what it is to hold.
        option: what the user chooses the place with, for the message.

    Raises:
        EnvironmentalError: it cannot be written.
    """
    with output_to(path, option):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    return path


def read_report(path: Path) -> dict[str, Any]:
    """Read a report of edgehp.

    Raises:
        DataError: it is missing, no JSON, no report, or of a newer schema.
    """
    expected = "expected a report of 'edgehp bench' or 'edgehp validate'"
    values = read_json(path, dict, limit=_LARGEST)
    kind = values.get("kind")
    if kind not in KINDS:
        raise DataError(f"{path} holds the kind {kind!r}; {expected}")
    schema = values.get("schema")
    if not isinstance(schema, int) or schema > KINDS[kind]:
        raise DataError(
            f"{path}: found schema {schema!r} of a {kind} report, this edgehp reads up to "
            f"{KINDS[kind]}: use a newer edgehp, or measure again"
        )
    found: dict[str, Any] = values
    return found
