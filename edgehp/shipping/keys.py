"""The keys that a device trusts, and the private ones that sign."""

from __future__ import annotations

import hashlib
import logging
import stat
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from edgehp._installed import install_extra
from edgehp.errors import EnvironmentalError, UsageError

__all__ = [
    "PASSWORD_VARIABLE",
    "PublicKey",
    "described",
    "fingerprint_of",
    "read_private_key",
    "read_public_key",
    "require",
]

logger = logging.getLogger(__name__)

# Holds the password of encrypted private keys: not an option, which every process could read.
PASSWORD_VARIABLE = "EDGEHP_KEY_PASSWORD"
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


def require(module: str, extra: str) -> Any:
    """Import a module that an extra brings.

    Raises:
        EnvironmentalError: it is not installed, or something it needs is missing.
    """
    try:
        return import_module(module)
    except ImportError as e:
        raise EnvironmentalError(
            f"{module.partition('.')[0]} cannot be used ({e}); install it with: "
            + install_extra(extra)
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
    return described(key, path)


def read_private_key(path: Path, password: str | None) -> tuple[Any, str | None]:
    """A private key in PEM form, and the password that opened it: None where it is not encrypted.

    One file of several may be encrypted, so a password that nothing asks for is no mistake.

    Raises:
        UsageError: the file is missing, holds no such key, or the password is missing or wrong.
        EnvironmentalError: the package ``cryptography`` is not installed.
    """
    data = read_key_file(path)
    serialization = require("cryptography.hazmat.primitives.serialization", "ship")
    unsupported = require("cryptography.exceptions", "ship").UnsupportedAlgorithm
    _warn_of_readers(path)
    try:
        try:
            return serialization.load_pem_private_key(data, None), None
        except TypeError:
            if not password:
                raise UsageError(
                    f"{path} is encrypted and no password was given; put it into "
                    f"${PASSWORD_VARIABLE}"
                ) from None
        try:
            return serialization.load_pem_private_key(data, password.encode()), password
        except ValueError as e:
            raise UsageError(
                f"the password in ${PASSWORD_VARIABLE} does not open {path}; give the right one, "
                "or another copy of the file if it was damaged"
            ) from e
    except (ValueError, unsupported) as e:
        raise _no_key(path, e) from e


def _warn_of_readers(path: Path) -> None:
    # Bundles and lists can be signed by whoever reads it.
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        logger.warning("%s can be read by others than its owner; chmod 600 it", path)


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


def described(key: Any, path: Path) -> PublicKey:
    """A ``cryptography`` public key that was read from `path`.

    Raises:
        UsageError: it is of a kind that signs no bundle.
    """
    curve = getattr(getattr(key, "curve", None), "name", type(key).__name__)
    if curve not in CURVES:
        raise UsageError(
            f"{path} is a key of the kind {curve}, expected one of {', '.join(CURVES)}; make one "
            "with: openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256"
        )
    return PublicKey(*fingerprint_of(key), str(path))


def fingerprint_of(key: Any) -> tuple[str, bytes]:
    """Fingerprint and PEM text of a ``cryptography`` public key."""
    serialization = require("cryptography.hazmat.primitives.serialization", "ship")
    pem: bytes = key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return hashlib.sha256(pem).hexdigest(), pem


def _no_key(path: Path, error: Exception) -> UsageError:
    text = " ".join(str(error).split())[:120]
    return UsageError(f"{path} holds no elliptic-curve key in PEM form ({text}); give another file")
