"""TOML reading on every supported Python: the standard library's parser, or `tomli` on 3.10."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from edgehp.errors import DataError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["load_toml"]

# Every TOML file edgehp reads is written by hand; a larger one is a mistaken path.
MAX_BYTES = 1 << 20


def load_toml(path: str | Path) -> dict[str, Any]:
    """Read a TOML file.

    Args:
        path: a UTF-8 TOML file of at most 1 MiB.

    Returns:
        The top-level table.

    Raises:
        DataError: the file is missing, unreadable, too large, not UTF-8 or not TOML; the message
            names the file and, for a syntax error, the line.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as e:
        raise DataError(f"{path}: cannot be read ({e.strerror or e}); expected a TOML file") from e
    if len(raw) > MAX_BYTES:
        raise DataError(f"{path}: larger than {MAX_BYTES} bytes; expected a small TOML file")
    try:
        return tomllib.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as e:
        raise DataError(f"{path}: not UTF-8 text (byte {e.start}); expected a TOML file") from e
    except (tomllib.TOMLDecodeError, RecursionError) as e:
        raise DataError(f"{path}: not valid TOML: {e}; correct the file") from e
