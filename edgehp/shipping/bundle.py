"""Bundles: an artifact in one signed file.

A bundle is a fixed header, a table of file sizes, an OpenSSF Model Signing signature and the files
end to end, uncompressed (`edgehp.shipping.container`). The names of the files stand nowhere but in
the signed statement, so that nothing unsigned decides what is written where.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgehp.artifact import Manifest
from edgehp.shipping.keys import Trust

__all__ = ["SUFFIX", "BundleFile", "VerifiedBundle", "make_bundle", "verify_bundle"]

SUFFIX = ".edgehp"


@dataclass(frozen=True)
class BundleFile:
    """One file of a bundle: its path in the artifact, SHA-256 (hex), size and offset in bytes."""

    path: str
    sha256: str
    size: int
    offset: int


@dataclass(frozen=True)
class VerifiedBundle:
    """A bundle whose signature, hashes and manifest were right when it was looked at.

    Attributes:
        path: the bundle file.
        digest: SHA-256 (hex) over the files' SHA-256 in the order of the signed statement: names
            the content, whoever signed it.
        signer: fingerprint of the key, or the identity and its issuer.
        manifest: of the artifact inside.
        files: what is inside, in the order of the signed statement.
    """

    path: Path
    digest: str
    signer: str
    manifest: Manifest
    files: tuple[BundleFile, ...]

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(f.size for f in self.files)

    def extract(self, folder: Path) -> None:
        """Write the files into the new directory `folder`, flushed to disk.

        Every file is hashed again while it is copied: the medium may have been swapped since.

        Raises:
            CompatibilityError: a byte differs from what was verified.
            EnvironmentalError: the disk is full or refuses; `folder` is removed.
        """
        raise NotImplementedError


def make_bundle(
    artifact: Path,
    output: Path | None = None,
    *,
    key: Path | None = None,
    password: str | None = None,
    max_latency_ms: float | None = None,
) -> VerifiedBundle:
    """Make a bundle from an artifact directory, complete or deferred.

    The same artifact and the same options give the same file, but for the signature: ECDSA draws
    a random number, and the order of keys in the signed JSON is not fixed. Its section has the same
    length each time, so that no other byte moves.

    Args:
        artifact: the directory; ``reports/`` and unlisted files do not travel.
        output: the bundle; ``<name>.edgehp`` beside the artifact when omitted. Replaced whole.
        key: private key (PEM, elliptic curve); without one the signature is keyless (Sigstore),
            which needs the network and a person or workflow to log in.
        password: of the private key.
        max_latency_ms: the latency budget of the self-test for one crop, written into the
            manifest that travels; None keeps what the manifest says.

    Raises:
        DataError: no such artifact.
        CompatibilityError: the artifact was altered.
        UsageError: the key cannot be used.
        EnvironmentalError: the package ``model-signing`` is missing, or the disk refuses.
    """
    raise NotImplementedError


def verify_bundle(path: Path, trust: Trust) -> VerifiedBundle:
    """Verify a bundle; nothing is written, unpacked or deserialised.

    In this order: layout and sizes against the length of the file, the signature, the hash of
    every file, and only then the manifest inside, which must list exactly these files.

    Args:
        path: the bundle.
        trust: public keys, one of which must have signed it, or an identity.

    Raises:
        DataError: missing, truncated, too long, or no bundle at all.
        CompatibilityError: signed by somebody else, altered, or its content is not an artifact
            that can be accepted.
        EnvironmentalError: a package is missing.
    """
    raise NotImplementedError

