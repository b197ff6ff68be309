"""Whom a device believes: public keys, or identities of a keyless signature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Identity", "PublicKey", "Trust", "read_public_key"]


@dataclass(frozen=True)
class PublicKey:
    """An elliptic-curve public key (P-256, P-384 or P-521).

    Attributes:
        fingerprint: SHA-256 (hex) of its PEM text as SubjectPublicKeyInfo, the form Model Signing
            puts into a signature as a hint.
        pem: that PEM text.
        source: where it was read, for messages.
    """

    fingerprint: str
    pem: bytes
    source: str


@dataclass(frozen=True)
class Identity:
    """Who signed without a key (Sigstore): an e-mail address or workflow, and who vouches for it.

    Attributes:
        name: such as ``"release@example.com"``.
        issuer: URL of the OpenID Connect issuer.
    """

    name: str
    issuer: str


# One of the keys, or this identity.
Trust = Sequence[PublicKey] | Identity


def read_public_key(path: Path) -> PublicKey:
    """Read a public key in PEM form.

    Raises:
        UsageError: the file is missing, holds no such key, or holds a private one.
        EnvironmentalError: the package ``cryptography`` is not installed.
    """
    raise NotImplementedError
