"""Strict reading of a TOML table: every mistake is an error that names file, key and reason."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from edgehp.errors import DataError

__all__ = ["Fields"]

_MISSING = object()


class Fields:
    """The keys of one table; each is taken once, and `done` refuses those left over."""

    def __init__(self, file: str, values: dict[str, Any], prefix: str = "") -> None:
        self._file = file
        self._values = dict(values)
        self._prefix = prefix

    def error(self, key: str, reason: str) -> DataError:
        """The error to raise about `key`."""
        return DataError(f"{self._file}: key '{self._prefix}{key}' {reason}")

    def has(self, key: str) -> bool:
        """Whether `key` is there and not yet taken."""
        return key in self._values

    def done(self) -> None:
        """Refuse keys that nothing asked for.

        Raises:
            DataError: there is one.
        """
        for key in self._values:
            raise self.error(key, "is not known here; correct its spelling or remove it")

    def _take(self, key: str, kinds: tuple[type, ...], what: str, default: object) -> Any:
        if key not in self._values:
            if default is _MISSING:
                raise self.error(key, f"is missing; expected {what}")
            return default
        value = self._values.pop(key)
        # A bool is an int to Python, but `sms = true` is a mistake.
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise self.error(key, f"is {value!r}; expected {what}")
        return value

    def text(self, key: str, default: object = _MISSING) -> str:
        """A string."""
        return str(self._take(key, (str,), "a string", default))

    def choice(self, key: str, known: Sequence[str]) -> str:
        """A string that is one of `known`."""
        value = self.text(key)
        if value not in known:
            raise self.error(key, f"is {value!r}; expected one of {', '.join(known)}")
        return value

    def boolean(self, key: str, default: object = _MISSING) -> bool:
        """True or false."""
        return bool(self._take(key, (bool,), "true or false", default))

    def number(self, key: str) -> float:
        """A positive finite number."""
        value = float(self._take(key, (int, float), "a positive number", _MISSING))
        if not (math.isfinite(value) and value > 0):
            raise self.error(key, f"is {value!r}; expected a positive number")
        return value

    def optional_number(self, key: str) -> float | None:
        """As `number`, or None where the key is absent."""
        return self.number(key) if self.has(key) else None

    def integer(self, key: str) -> int:
        """A positive whole number."""
        value = int(self._take(key, (int,), "a positive whole number", _MISSING))
        if value <= 0:
            raise self.error(key, f"is {value}; expected a positive whole number")
        return value

    def optional_integer(self, key: str) -> int | None:
        """As `integer`, or None where the key is absent."""
        return self.integer(key) if self.has(key) else None

    def texts(self, key: str, default: object = _MISSING) -> tuple[str, ...]:
        """A list of strings."""
        values = self._take(key, (list, tuple), "a list of strings", default)
        if not all(isinstance(value, str) for value in values):
            raise self.error(key, f"is {values!r}; expected a list of strings")
        return tuple(values)

    def table(self, key: str) -> Fields:
        """A table that must be there."""
        values = self._take(key, (dict,), "a table", _MISSING)
        return Fields(self._file, values, f"{self._prefix}{key}.")

    def tables(self, key: str) -> list[Fields]:
        """An array of tables; empty where the key is absent."""
        values = self._take(key, (list,), "an array of tables", [])
        if not all(isinstance(value, dict) for value in values):
            raise self.error(key, "holds something else than tables; expected [[" + key + "]]")
        return [
            Fields(self._file, value, f"{self._prefix}{key}[{i}].")
            for i, value in enumerate(values)
        ]
