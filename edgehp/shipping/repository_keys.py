"""The keys of a repository: made, and read for signing."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

from edgehp.errors import UsageError
from edgehp.shipping import disk
from edgehp.shipping.keys import read_private_key, require

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner
    from tuf.api.metadata import Metadata, Root

__all__ = ["check_apart", "new_key", "require_tuf", "revoked_root", "signer_of"]


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
    if path.exists():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    disk.replace_file(path, data, mode=0o600)


def check_apart(folder: Path, keys: Path) -> None:
    """Refuse to keep private keys where a web server would hand them out.

    Raises:
        UsageError: `keys` is in `folder`.
    """
    public, private = folder.resolve(), keys.resolve()
    if private == public or public in private.parents:
        raise UsageError(
            f"the keys would be in {keys}, inside the repository, and public with it; choose a "
            "folder elsewhere with --keys"
        )


def signer_of(path: Path, password: str | None) -> CryptoSigner:
    """A private key that signs.

    Raises:
        UsageError: the file is missing, holds no such key, or the password is missing or wrong.
    """
    from securesystemslib.signer import CryptoSigner

    key, _ = read_private_key(path, password)
    try:
        return CryptoSigner(key)
    except (ValueError, TypeError) as e:
        text = " ".join(str(e).split())[:120]
        raise UsageError(f"{path}: a key that signs no list ({text}); give another file") from e


def revoked_root(
    published: Metadata[Root], keys: Path, password: str | None, have: list[CryptoSigner]
) -> list[CryptoSigner]:
    """The public root's own key, where an unpublished rotation put it aside.

    Raises:
        UsageError: as `signer_of`.
    """
    wanted = set(published.signed.roles["root"].keyids) - {s.public_key.keyid for s in have}
    found = []
    for path in sorted(keys.glob("root.pem.*.revoked")) if wanted else []:
        signer = signer_of(path, password)
        if signer.public_key.keyid in wanted:
            found.append(signer)
    return found
