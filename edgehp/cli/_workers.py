"""``--workers`` and ``--cluster``: the same work in more than one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

__all__ = ["worker_options"]

F = TypeVar("F", bound=Callable[..., Any])


def worker_options(function: F) -> F:
    """Give a command the options that say where it works."""
    for option in (
        click.option(
            "--cluster",
            metavar="ADDRESS",
            help="Work on the Dask cluster of the scheduler at tls://HOST:PORT.",
        ),
        click.option(
            "--workers",
            type=click.IntRange(0, 1024),
            default=0,
            help="Work in this many processes of this machine; 0: in this one.",
        ),
    ):
        function = option(function)
    return function
