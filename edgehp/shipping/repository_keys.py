"""The keys of a repository: made, and read for signing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from edgehp.errors import UsageError
from edgehp.shipping import disk
from edgehp.shipping.keys import read_key_file, require

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner

__all__ = ["new_key", "require_tuf", "signer_of"]


def require_tuf() -> None:
    """Say what to install where the packages are missing.

    Raises:
        EnvironmentalError: they are.
    """
    require("tuf.api.metadata", "sign")
    require("cryptography", "sign")


def new_key(path: Path, password: str | None) -> None:
    """Make a P-256 key, in a file that only its owner reads.

    Raises:
        OSError: it exists, or the disk refuses.
    """
    ec = require("cryptography.hazmat.primitives.asymmetric.ec", "sign")
    serialization = require("cryptography.hazmat.primitives.serialization", "sign")
    encryption = (
        serialization.BestAvailableEncryption(password.encode())
        if password
        else serialization.NoEncryption()
    )
    data = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
    )
    if not path.parent.is_dir():
        disk.make_folder(path.parent)
        os.chmod(path.parent, 0o700)  # noqa: PTH101
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    disk.flush_folder(path.parent)


def signer_of(path: Path, password: str | None) -> CryptoSigner:
    """A private key that signs.

    Raises:
        UsageError: the file is missing, holds no such key, or the password is missing or wrong.
    """
    from securesystemslib.signer import CryptoSigner

    data = read_key_file(path)
    serialization = require("cryptography.hazmat.primitives.serialization", "sign")
    unsupported = require("cryptography.exceptions", "sign").UnsupportedAlgorithm
    try:
        secret = password.encode() if password and b"ENCRYPTED" in data else None
        return CryptoSigner(serialization.load_pem_private_key(data, secret))
    except (ValueError, TypeError, unsupported) as e:
        text = " ".join(str(e).split())[:120]
        raise UsageError(
            f"{path}: no private key that can be used ({text}); give its password in "
            "$EDGEHP_KEY_PASSWORD, or another file"
        ) from e
