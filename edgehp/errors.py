"""The errors edgehp raises on purpose, each with the exit code the command line ends with.

EdgehpError (1)
├── UsageError (2)            an argument, option or configuration that cannot be right
├── DataError (1)             a file or data set that is missing, truncated or not what it claims
├── CheckpointError (1)       weights that do not fit the network
├── AccuracyError (3)         an accuracy gate that was not met
├── CompatibilityError (4)    an artifact that does not belong on this device, or was altered
├── EnvironmentalError (5)    a driver, package or service that is missing or broken
└── MeasurementError (6)      a measurement that must not be believed

Every message says what was found, what was expected and what to do about it, in one or two
sentences that a person can act on.
"""

from __future__ import annotations

import re
from typing import ClassVar

_URL_PASSWORD = re.compile(r"(://[^/\s:@]*):\S*@")
_SETTING = re.compile(
    r"([\w-]*(?:pw|pwd|pass|password|passwd|token|secret|api_?key))"
    r"=(?!\*{3})(\"[^\"]*\"|\S+)",
    re.IGNORECASE,
)


def without_password(text: str) -> str:
    """`text` with the passwords of URLs and pipelines replaced by ``***``.

    The command line does so with every message; whoever writes a URL elsewhere does it there.
    """
    return _SETTING.sub(r"\1=***", _URL_PASSWORD.sub(r"\1:***@", text))


class EdgehpError(Exception):
    """Base of every error that edgehp raises on purpose."""

    exit_code: ClassVar[int] = 1

    @property
    def sentence(self) -> str:
        """What is wrong, without its hints: for a message that goes on after it."""
        return str(self).partition("\nhint: ")[0]


class UsageError(EdgehpError):
    """An argument, option or configuration value that cannot be right."""

    exit_code = 2


class DataError(EdgehpError):
    """A file or data set is missing, truncated, corrupted or not what it claims to be."""


class CheckpointError(EdgehpError):
    """Weights that do not fit the network they are loaded into."""


class AccuracyError(EdgehpError):
    """An accuracy gate that was not met."""

    exit_code = 3


class CompatibilityError(EdgehpError):
    """An artifact that does not belong on this device, or whose bytes were altered."""

    exit_code = 4


class EnvironmentalError(EdgehpError):
    """A driver, package or service that is missing or broken."""

    exit_code = 5


class MeasurementError(EdgehpError):
    """A measurement that must not be believed."""

    exit_code = 6
