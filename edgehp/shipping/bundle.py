"""Bundles: an artifact in one signed file.

A bundle is a fixed header, a table of file sizes, an OpenSSF Model Signing signature and the files
end to end, uncompressed (`edgehp.shipping.container`). The names of the files stand nowhere but in
the signed statement, so that nothing unsigned decides what is written where.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from edgehp._json import strict_json
from edgehp.artifact import Artifact, Manifest, load_artifact
from edgehp.artifact.manifest import LARGEST_MANIFEST, MANIFEST_NAME, parse_manifest
from edgehp.errors import CompatibilityError, EdgehpError, EnvironmentalError, UsageError
from edgehp.shipping import disk
from edgehp.shipping.container import Container, is_container, open_container, pack_front
from edgehp.shipping.keys import PublicKey, Trust, described, read_private_key, require
from edgehp.shipping.signature import (
    Statement,
    canonical_signature,
    parse_statement,
    verify_signature,
)

logger = logging.getLogger(__name__)

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
        try:
            disk.make_folder(folder.parent)
            os.mkdir(folder, 0o755)  # noqa: PTH102 - by the names of os, see edgehp.shipping.disk
            try:
                disk.allow(folder, 0o755)
                with open_container(self.path) as container:
                    _extract(container, self.files, folder)
            except (OSError, EdgehpError):
                disk.remove_tree(folder)
                raise
        except OSError as e:
            raise EnvironmentalError(
                f"cannot unpack {self.path} into {folder} ({e.strerror or e}); make room or choose "
                "another place"
            ) from e


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
        output: the bundle; ``<name>.edgehp`` beside the artifact when omitted. An older bundle is
            replaced whole; anything else that is there stays, and is an error.
        key: private key (PEM, elliptic curve); without one the signature is keyless (Sigstore),
            which needs the network and a person or workflow to log in.
        password: of the private key.
        max_latency_ms: the latency budget of the self-test for one crop, written into the
            manifest that travels; None keeps what the manifest says.

    Raises:
        DataError: no such artifact.
        CompatibilityError: the artifact was altered.
        UsageError: the key cannot be used, or `output` is something else than a bundle.
        EnvironmentalError: the package ``model-signing`` is missing, or the disk refuses.
    """
    source = load_artifact(artifact, bytes_only=True)
    name = source.manifest.name
    if output is None:
        whole = artifact.resolve()
        output = whole.parent / f"{whole.name}{SUFFIX}"
    _check_output(output)
    signer = None
    if key is not None:
        private, password = read_private_key(key, password)
        signer = described(private.public_key(), key)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as work:
            folder = Path(work) / name
            _copy(source, folder, max_latency_ms)
            # Hashed again, as copied: what is signed is what was checked.
            manifest = load_artifact(folder, bytes_only=True).manifest
            section = _sign(folder, Path(work) / "signature.json", key, password)
            made = _pack(folder, manifest, section, Path(work) / "bundle", signer)
            os.replace(made.path, output)  # noqa: PTH105
            disk.flush_folder(output.parent)
    except OSError as e:
        raise EnvironmentalError(
            f"cannot write {output} ({e.strerror or e}); choose another place with --output"
        ) from e
    return replace(made, path=output)


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
    with open_container(path) as container:
        statement, signer = verify_signature(container.signature, trust, path)
        return _verified(container, statement, signer)


def _verified(container: Container, statement: Statement, signer: str) -> VerifiedBundle:
    """The bundle, after hashing its files against the statement."""
    path = container.path
    if len(container.sizes) != len(statement.files):
        raise _altered(path, f"{len(container.sizes)} files, {len(statement.files)} were signed")
    files = tuple(
        BundleFile(name, sha256, size, offset)
        for (name, sha256), size, offset in zip(
            statement.files, container.sizes, container.offsets, strict=True
        )
    )
    for index, file in enumerate(files):
        digest = hashlib.sha256()
        for piece in container.pieces(index):
            digest.update(piece)
        if digest.hexdigest() != file.sha256:
            raise _altered(path, f"{file.path} is not what was signed")
    manifest = _manifest(container, files, statement)
    return VerifiedBundle(path, statement.digest, signer, manifest, files)


def _manifest(
    container: Container, files: tuple[BundleFile, ...], statement: Statement
) -> Manifest:
    """The manifest inside, which must list exactly the signed files."""
    where = f"{container.path}: {MANIFEST_NAME}"
    found = [i for i, f in enumerate(files) if f.path == MANIFEST_NAME]
    if not found or files[found[0]].size > LARGEST_MANIFEST:
        raise CompatibilityError(
            f"{where} is {'too large' if found else 'missing'}, so this is not an artifact; make "
            "the bundle again with 'edgehp bundle'"
        )
    manifest = parse_manifest(b"".join(container.pieces(found[0])), where)
    listed = {(f.path, f.sha256, f.size) for f in manifest.files}
    if listed != {(f.path, f.sha256, f.size) for f in files if f.path != MANIFEST_NAME}:
        raise CompatibilityError(
            f"{where} lists other files than were signed; make the bundle again with 'edgehp "
            "bundle'"
        )
    if manifest.name != statement.name:
        raise CompatibilityError(
            f"{where} is of {manifest.name}, signed was {statement.name[:80]!r}; make the bundle "
            "again with 'edgehp bundle'"
        )
    return manifest


def _extract(container: Container, files: tuple[BundleFile, ...], folder: Path) -> None:
    if container.sizes != tuple(f.size for f in files):
        raise _altered(container.path, "other files than a moment ago")
    for index, file in enumerate(files):
        target = folder / file.path
        disk.make_folder(target.parent)
        digest = hashlib.sha256()
        disk.write_file(target, _hashed(container, index, digest))
        if digest.hexdigest() != file.sha256:
            raise _altered(container.path, f"{file.path} has changed since it was verified")
    for inner in sorted({(folder / f.path).parent for f in files}, reverse=True):
        disk.flush_folder(inner)
    disk.flush_folder(folder.parent)


def _hashed(container: Container, index: int, digest: hashlib._Hash) -> Iterator[bytes]:
    for piece in container.pieces(index):
        digest.update(piece)
        yield piece


def _altered(path: Path, found: str) -> CompatibilityError:
    return CompatibilityError(f"{path} was altered: found {found}; get the bundle again")


def _check_output(output: Path) -> None:
    """Refuse to replace what is no bundle: a slip of the keyboard must not cost the key."""
    if output.is_dir():
        raise UsageError(f"{output} is a folder; name the file to write with --output")
    if os.path.lexists(output) and not is_container(output):
        raise UsageError(
            f"{output} is there and is no bundle, so it is not overwritten; choose another "
            "--output, or remove it"
        )


def _copy(artifact: Artifact, folder: Path, max_latency_ms: float | None) -> None:
    """What travels: the listed files and the manifest, with the budget if one is given."""
    folder.mkdir()
    for file in artifact.manifest.files:
        target = folder / file.path
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(artifact.path / file.path, target, follow_symlinks=False)
    if max_latency_ms is None:
        shutil.copyfile(artifact.path / MANIFEST_NAME, folder / MANIFEST_NAME)
        return
    golden = replace(artifact.manifest.golden, max_latency_ms=max_latency_ms)
    text = replace(artifact.manifest, golden=golden).to_json()
    (folder / MANIFEST_NAME).write_text(text, encoding="utf-8")


def _sign(folder: Path, signature: Path, key: Path | None, password: str | None) -> bytes:
    """The signature of a folder by OpenSSF Model Signing, in its one canonical form."""
    hashing = require("model_signing.hashing", "sign")
    signing = require("model_signing.signing", "sign")
    # Nothing ignored, not even files that belong to git: every file of the folder is signed.
    config = hashing.Config().use_file_serialization(hashing_algorithm="sha256")
    config.set_ignored_paths(paths=[], ignore_git_paths=False)
    signer = signing.Config().set_hashing_config(config)
    if key is None:
        failed, oidc = require("sigstore.errors", "sign").Error, require("sigstore.oidc", "sign")
        try:
            # Asks for Sigstore's roots at once.
            signer.use_sigstore_signer(use_ambient_credentials=True)
            signer.sign(folder, signature)
        except (failed, oidc.IssuerError, oidc.ExpiredIdentity, OSError) as e:
            raise EnvironmentalError(
                f"Sigstore gave no signature ({' '.join(str(e).split())[:200]}); check the network "
                "and the log-in, or sign with --key"
            ) from e
    else:
        # Bytes: the text its signature asks for is refused by the package underneath.
        signer.use_elliptic_key_signer(
            private_key=key, password=password.encode() if password else None
        )
        signer.sign(folder, signature)
    return canonical_signature(signature.read_bytes())


def _pack(
    folder: Path, manifest: Manifest, section: bytes, target: Path, signer: PublicKey | None
) -> VerifiedBundle:
    """Write the bundle and verify it as a device would."""
    envelope = strict_json(section)["dsseEnvelope"]
    statement = parse_statement(base64.b64decode(envelope["payload"]), target)
    paths = [folder / name for name, _ in statement.files]
    with target.open("xb") as file:
        file.write(pack_front(section, tuple(p.stat().st_size for p in paths)))
        for path in paths:
            with path.open("rb") as content:
                shutil.copyfileobj(content, file)
        file.flush()
        os.fsync(file.fileno())
    if signer is not None:
        return verify_bundle(target, [signer])
    # Who will be believed is for the device to say; everything else can be checked here.
    with open_container(target) as container:
        return _verified(container, statement, "keyless")
