"""JSON that somebody else may have written: refused where it is ambiguous or out of bounds."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

__all__ = ["strict_json"]

# No document of this package nests deeper than ten; the limit keeps every later walk over the
# value far from the interpreter's own.
_DEEPEST = 64
_LARGEST_INTEGER = 2**63


def strict_json(data: bytes) -> Any:
    """The value of a JSON text in UTF-8. Bound the length of `data` before calling.

    Raises:
        ValueError: it is no JSON, a key appears twice, a number is not finite or beyond 64 bits,
            or it is nested deeper than 64 levels.
    """
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_constant,
            parse_float=_finite,
            parse_int=_integer,
        )
    except RecursionError as e:
        raise ValueError("it is nested too deeply") from e
    level = [value]
    for _ in range(_DEEPEST):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return value
    raise ValueError("it is nested too deeply")


def _inside(value: Any) -> list[Any]:
    """The objects and arrays directly inside `value`."""
    if isinstance(value, dict):
        return [v for v in value.values() if isinstance(v, (dict, list))]
    if isinstance(value, list):
        return [v for v in value if isinstance(v, (dict, list))]
    return []


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key appears twice")
    return found


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is not finite")
    return number


def _integer(text: str) -> int:
    number = int(text) if len(text) <= 20 else _LARGEST_INTEGER
    if not -_LARGEST_INTEGER <= number < _LARGEST_INTEGER:
        raise ValueError(f"{text[:40]} does not fit into 64 bits")
    return number
