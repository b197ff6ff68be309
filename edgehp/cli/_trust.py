"""The options that say whom to believe, shared by the commands that verify bundles."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from edgehp.errors import UsageError

if TYPE_CHECKING:
    from edgehp.shipping.keys import Trust

__all__ = ["read_trust", "root_option", "trust_options"]

_F = TypeVar("_F", bound=Callable[..., None])


def trust_options(function: _F) -> _F:
    """``--public-key`` (again and again), or ``--identity`` with ``--issuer``."""
    for option in (
        click.option("--issuer", help="With --identity: URL of who vouches for it."),
        click.option("--identity", help="Instead of a key: who signed with Sigstore."),
        click.option(
            "--public-key",
            "public_keys",
            type=click.Path(path_type=Path),
            multiple=True,
            help="A key that is trusted (PEM). Several may be given.",
        ),
    ):
        function = option(function)
    return function


def root_option(function: _F) -> _F:
    """``--root``: where the slots are."""
    return click.option(
        "--root",
        type=click.Path(path_type=Path),
        help="Where the slots are. Default: $EDGEHP_ROOT, else /var/lib/edgehp.",
    )(function)


def read_trust(public_keys: tuple[Path, ...], identity: str | None, issuer: str | None) -> Trust:
    """What the options mean.

    Raises:
        UsageError: neither or both kinds were given, or a key cannot be read.
    """
    from edgehp.shipping.keys import Identity, read_public_key

    if (identity is None) != (issuer is None):
        raise UsageError("--identity and --issuer belong together")
    if bool(public_keys) == (identity is not None):
        raise UsageError("say whom to believe: --public-key FILE, or --identity and --issuer")
    if identity is not None and issuer is not None:
        return Identity(identity, issuer)
    return [read_public_key(path) for path in public_keys]
