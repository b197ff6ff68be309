"""The options that name the trusted keys and the slots."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from edgehp.errors import UsageError

if TYPE_CHECKING:
    from edgehp.shipping.keys import PublicKey

__all__ = ["read_keys", "root_option", "trust_option"]

_F = TypeVar("_F", bound=Callable[..., None])


def trust_option(function: _F) -> _F:
    """``--public-key``, again and again."""
    return click.option(
        "--public-key",
        "public_keys",
        type=click.Path(path_type=Path),
        multiple=True,
        help="A key that is trusted (PEM). Several may be given.",
    )(function)


def root_option(function: _F) -> _F:
    """``--root``: where the slots are."""
    return click.option(
        "--root",
        type=click.Path(path_type=Path),
        help="Where the slots are. Default: $EDGEHP_ROOT, else /var/lib/edgehp.",
    )(function)


def read_keys(public_keys: tuple[Path, ...]) -> list[PublicKey]:
    """The keys that were given.

    Raises:
        UsageError: none was given, or one cannot be read.
    """
    from edgehp.shipping.keys import read_public_key

    if not public_keys:
        raise UsageError("no trusted key was given; add --public-key FILE")
    return [read_public_key(path) for path in public_keys]
