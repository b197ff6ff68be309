"""SHA-256 of files, bytes and JSON values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["json_digest", "sha256_bytes", "sha256_file"]

_CHUNK = 2**20


def sha256_bytes(data: bytes) -> str:
    """SHA-256 (hex) of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 (hex) of the file's content, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while piece := f.read(_CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def json_digest(values: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of the canonical JSON of `values`: keys sorted, no spaces, ASCII only."""
    return sha256_bytes(json.dumps(values, sort_keys=True, separators=(",", ":")).encode())
