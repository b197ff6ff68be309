"""Whom a device believes: public keys, or the identity behind a keyless signature."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from edgehp.errors import EnvironmentalError, UsageError

__all__ = [
    "Identity",
    "PublicKey",
    "Trust",
    "fingerprint_of",
    "public_half",
    "read_public_key",
    "require",
]

# Those that Model Signing signs with.
CURVES = ("secp256r1", "secp384r1", "secp521r1")
# A PEM text of the longest curve is below 1 kB; more is a mistake.
_LARGEST_KEY = 64 * 1024


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


# One of these keys, or this identity.
Trust = Sequence[PublicKey] | Identity


def require(module: str, extra: str) -> Any:
    """Import a module that an extra brings.

    Raises:
        EnvironmentalError: it is not installed, or something it needs is missing.
    """
    try:
        return import_module(module)
    except ImportError as e:
        raise EnvironmentalError(
            f"{module.partition('.')[0]} cannot be used ({e}); install edgehp[{extra}]"
        ) from e


def read_public_key(path: Path) -> PublicKey:
    """Read a public key in PEM form.

    Raises:
        UsageError: the file is missing, holds no such key, or holds a private one.
        EnvironmentalError: the package ``cryptography`` is not installed.
    """
    data = read_key_file(path)
    if b"PRIVATE KEY" in data:
        raise UsageError(
            f"{path} is a private key, expected the public one: it belongs on no device; make the "
            f"public half with: openssl ec -in {path.name} -pubout"
        )
    serialization = require("cryptography.hazmat.primitives.serialization", "ship")
    unsupported = require("cryptography.exceptions", "ship").UnsupportedAlgorithm
    try:
        key = serialization.load_pem_public_key(data)
    except (ValueError, TypeError, unsupported) as e:
        raise _no_key(path, e) from e
    return _described(key, path)


def public_half(path: Path, password: str | None = None) -> PublicKey:
    """The public half of the private key in a PEM file.

    Raises:
        UsageError: the file is missing, holds no such key, or the password is missing or wrong.
        EnvironmentalError: the package ``cryptography`` is not installed.
    """
    data = read_key_file(path)
    serialization = require("cryptography.hazmat.primitives.serialization", "ship")
    unsupported = require("cryptography.exceptions", "ship").UnsupportedAlgorithm
    try:
        key = serialization.load_pem_private_key(data, password.encode() if password else None)
    except TypeError as e:
        state = "is not encrypted: give no" if password else "is encrypted: give its"
        raise UsageError(f"{path} {state} password ({e})") from e
    except (ValueError, unsupported) as e:
        raise _no_key(path, e) from e
    return _described(key.public_key(), path)


def read_key_file(path: Path) -> bytes:
    """The bytes of a key file.

    Raises:
        UsageError: it is missing, or too large to be one.
    """
    try:
        with path.open("rb") as f:
            data = f.read(_LARGEST_KEY + 1)
    except OSError as e:
        raise UsageError(f"{path}: the key cannot be read ({e.strerror or e})") from e
    if len(data) > _LARGEST_KEY:
        raise UsageError(f"{path}: more than {_LARGEST_KEY} bytes, expected a key in PEM form")
    return data


def fingerprint_of(key: Any) -> tuple[str, bytes]:
    """Fingerprint and PEM text of a ``cryptography`` public key."""
    serialization = require("cryptography.hazmat.primitives.serialization", "ship")
    pem: bytes = key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return hashlib.sha256(pem).hexdigest(), pem


def _described(key: Any, path: Path) -> PublicKey:
    curve = getattr(getattr(key, "curve", None), "name", type(key).__name__)
    if curve not in CURVES:
        raise UsageError(
            f"{path} is a key of the kind {curve}, expected one of {', '.join(CURVES)}; make one "
            "with: openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256"
        )
    return PublicKey(*fingerprint_of(key), str(path))


def _no_key(path: Path, error: Exception) -> UsageError:
    text = " ".join(str(error).split())[:120]
    return UsageError(f"{path} holds no elliptic-curve key in PEM form ({text}); give another file")
