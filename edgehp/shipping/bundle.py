"""Bundles: an artifact in one signed file.

The layout:

====================  ===========================================================
24 bytes              header: magic, version, number of files, length of the
                      signature section, a zero (little endian)
8 bytes a file        its length, in the order of the signed statement
n * 4096 bytes        the signature: JSON, padded with blanks
the rest              the files end to end
====================  ===========================================================

Nothing is compressed, so that a small bundle cannot become a large folder, and the lengths must add
up to the length of the file. They are not signed and need not be: a wrong one gives a wrong hash.

The names of the files stand nowhere but in the signed statement, so that nothing unsigned decides
what is written where.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import struct
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from edgehp.artifact import Artifact, Manifest, load_artifact
from edgehp.artifact.manifest import (
    LARGEST_MANIFEST,
    MANIFEST_NAME,
    FileRecord,
    SoftwareId,
    parse_manifest,
)
from edgehp.errors import CompatibilityError, DataError, EdgehpError, EnvironmentalError, UsageError
from edgehp.files import sha256_bytes, stand_in
from edgehp.shipping import disk
from edgehp.shipping.sbom import SBOM_NAME, measured_energy, spdx_document
from edgehp.shipping.signature import (
    MAX_FILES,
    PublicKey,
    Statement,
    described,
    read_private_key,
    require,
    verify_signature,
)

SUFFIX = ".edgehp"
# The resolution of events that EU 2023/2590 asks of a driver-monitoring function.
DEFAULT_LATENCY_MS = 50.0
MAGIC = b"\x89EDGEHP\n"
VERSION = 1
_HEADER = struct.Struct("<8sIIII")
_SIZE = struct.Struct("<Q")
# The manifest's own limit for a file.
MAX_FILE_SIZE = 2**32
SIGNATURE_BLOCK = 4096
# A signature over 64 files is about 25 kB.
_MAX_SIGNATURE = 64 * SIGNATURE_BLOCK
_CHUNK = 2**20
# Of a file that is fetched for a bundle; a network has some hundred megabytes at most.
MAX_BUNDLE_SIZE = 2**36


@dataclass(frozen=True)
class BundleFile:
    """One file of a bundle: its path in the artifact, SHA-256 (hex) and size in bytes."""

    path: str
    sha256: str
    size: int


@dataclass(frozen=True)
class VerifiedBundle:
    """A bundle whose signature, hashes and manifest were right when it was looked at.

    Attributes:
        path: the bundle file.
        digest: SHA-256 (hex) over the files' SHA-256 in the order of the signed statement: names
            the content, whoever signed it.
        signer: fingerprint of the key.
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
                    self._extract(container, folder)
            except (OSError, EdgehpError):
                disk.remove_tree(folder)
                raise
        except OSError as e:
            raise EnvironmentalError(
                f"cannot unpack {self.path} into {folder} ({e.strerror or e}); make room or choose "
                "another place"
            ) from e

    def _extract(self, container: Container, folder: Path) -> None:
        if container.sizes != tuple(f.size for f in self.files):
            raise _altered(self.path, "other files than a moment ago")
        for index, file in enumerate(self.files):
            target = folder / file.path
            disk.make_folder(target.parent)
            fault = f"{file.path} has changed since it was verified"
            disk.write_file(target, container.checked(index, file.sha256, fault))
        for inner in sorted({(folder / f.path).parent for f in self.files}, reverse=True):
            disk.flush_folder(inner)
        disk.flush_folder(folder.parent)


def make_bundle(
    artifact: Path,
    output: Path | None = None,
    *,
    key: Path,
    password: str | None = None,
    max_latency_ms: float | None = None,
    rxswin: str | None = None,
) -> VerifiedBundle:
    """Make a bundle from an artifact directory, complete or deferred.

    An SPDX document of the artifact is added to its files (`edgehp.shipping.sbom`).

    The same artifact, options and installed packages give the same file, but for the signature:
    ECDSA draws a random number, and the order of keys in the signed JSON is not fixed. It has the
    same length each time, so that no other byte moves.

    Args:
        artifact: the directory; ``reports/`` and unlisted files do not travel.
        output: the bundle; ``<name>.edgehp`` beside the artifact when omitted. An older bundle is
            replaced whole; anything else that is there stays, and is an error.
        key: private key (PEM, elliptic curve).
        password: of the private key.
        max_latency_ms: the latency budget of the self-test for one crop, written into the
            manifest that travels; None takes what the manifest says, else `DEFAULT_LATENCY_MS`.
        rxswin: software identification number of the type approval (UNECE R156), written into the
            manifest that travels; None keeps what the manifest says.

    Raises:
        DataError: no such artifact.
        CompatibilityError: the artifact was altered.
        UsageError: the key cannot be used, `rxswin` is no plain text, or `output` is something else
            than a bundle.
        EnvironmentalError: the package ``model-signing`` is missing, or the disk refuses.
    """
    if rxswin is not None:
        try:
            msgspec.convert(rxswin, SoftwareId)
        except msgspec.ValidationError as e:
            raise UsageError(
                f"the RXSWIN is {rxswin[:100]!r}, expected 1 to 100 printable ASCII characters"
            ) from e
    source = load_artifact(artifact, bytes_only=True)
    name = source.manifest.name
    if output is None:
        whole = artifact.resolve()
        output = whole.parent / f"{whole.name}{SUFFIX}"
    _check_output(output)
    private, password = read_private_key(key, password)
    signer = described(private.public_key(), key)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as work:
            folder = Path(work) / name
            _copy(source, folder, max_latency_ms, rxswin)
            section = _sign(folder, Path(work) / "signature.json", key, password)
            packed = Path(work) / "bundle"
            statement, _ = verify_signature(section, [signer], packed)
            _pack([folder / name for name, _ in statement.files], section, packed)
            # As a device would: the copy must be what the manifest lists, and the key must fit.
            made = verify_bundle(packed, [signer])
            os.replace(packed, output)  # noqa: PTH105
            disk.flush_folder(output.parent)
    except OSError as e:
        raise EnvironmentalError(
            f"cannot write {output} ({e.strerror or e}); choose another place with --output"
        ) from e
    return replace(made, path=output)


def verify_bundle(path: Path, trust: Sequence[PublicKey]) -> VerifiedBundle:
    """Verify a bundle; nothing is written, unpacked or deserialised.

    In this order: layout and sizes against the length of the file, the signature, the hash of
    every file, and only then the manifest inside, which must list exactly these files.

    Args:
        path: the bundle.
        trust: public keys, one of which must have signed it.

    Raises:
        DataError: missing, truncated, too long, or no bundle at all.
        CompatibilityError: signed by somebody else, altered, or its content is not an artifact
            that can be accepted.
        EnvironmentalError: a package is missing.
    """
    with open_container(path) as container:
        statement, signer = verify_signature(container.signature, trust, path)
        sizes, signed = container.sizes, statement.files
        if len(sizes) != len(signed):
            raise _altered(path, f"{len(sizes)} files, {len(signed)} were signed")
        files = tuple(BundleFile(*file, size) for file, size in zip(signed, sizes, strict=True))
        for index, file in enumerate(files):
            for _ in container.checked(index, file.sha256, f"{file.path} is not what was signed"):
                pass
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


def _altered(path: Path, found: str) -> CompatibilityError:
    return CompatibilityError(f"{path} was altered: found {found}; get the bundle again")


def _check_output(output: Path) -> None:
    """Refuse to replace what is no bundle: a slip of the keyboard must not cost the key."""
    if output.is_dir():
        raise UsageError(f"{output} is a folder; name the file to write with --output")
    if not os.path.lexists(output):
        return
    if output.is_file():  # nothing else is opened: a named pipe would wait for a writer
        with output.open("rb") as file:
            if file.read(len(MAGIC)) == MAGIC:
                return
    raise UsageError(
        f"{output} is there and is no bundle, so it is not overwritten; choose another --output, "
        "or remove it"
    )


def _copy(
    artifact: Artifact, folder: Path, max_latency_ms: float | None, rxswin: str | None
) -> None:
    """What travels: the listed files, the SPDX document, and the manifest with all that."""
    folder.mkdir()
    files = [f for f in artifact.manifest.files if f.path != SBOM_NAME]
    for file in files:
        target = folder / file.path
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(artifact.path / file.path, target, follow_symlinks=False)
    golden = artifact.manifest.golden
    budget = max_latency_ms or golden.max_latency_ms or DEFAULT_LATENCY_MS
    manifest = msgspec.structs.replace(
        artifact.manifest,
        golden=msgspec.structs.replace(golden, max_latency_ms=budget),
        files=tuple(files),
        rxswin=rxswin or artifact.manifest.rxswin,
    )
    energy = measured_energy(artifact.path, artifact.manifest.digest)
    document = spdx_document(manifest, energy)
    (folder / SBOM_NAME).write_bytes(document)
    listed = FileRecord(SBOM_NAME, sha256_bytes(document), len(document), "report")
    manifest = manifest.with_files((*manifest.files, listed))
    (folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")


def _sign(folder: Path, signature: Path, key: Path, password: str | None) -> bytes:
    """The signature of a folder by OpenSSF Model Signing: JSON, keys sorted, no blanks."""
    hashing = require("model_signing.hashing", "sign")
    signing = require("model_signing.signing", "sign")
    # Nothing ignored, not even files that belong to git: every file of the folder is signed.
    config = hashing.Config().use_file_serialization(hashing_algorithm="sha256")
    config.set_ignored_paths(paths=[], ignore_git_paths=False)
    signer = signing.Config().set_hashing_config(config)
    # Bytes: the text its signature asks for is refused by the package underneath.
    signer.use_elliptic_key_signer(
        private_key=key, password=password.encode() if password else None
    )
    signer.sign(folder, signature)
    values = json.loads(signature.read_bytes())
    return json.dumps(values, sort_keys=True, separators=(",", ":")).encode()


def _pack(paths: list[Path], section: bytes, target: Path) -> None:
    with target.open("xb") as file:
        file.write(pack_front(section, tuple(p.stat().st_size for p in paths)))
        for path in paths:
            with path.open("rb") as content:
                shutil.copyfileobj(content, file)
        file.flush()
        os.fsync(file.fileno())


# --- the layout -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Container:
    """An open bundle file whose lengths add up.

    Attributes:
        path: for messages.
        signature: the section as it stands in the file, with its padding.
        sizes: of the files, in bytes.
        offsets: of the files.
    """

    path: Path
    signature: bytes
    sizes: tuple[int, ...]
    offsets: tuple[int, ...]
    _descriptor: int

    def pieces(self, index: int) -> Iterator[bytes]:
        """The content of file number `index`, in pieces of at most 1 MiB.

        Raises:
            DataError: the file cannot be read, or was truncated meanwhile.
        """
        at, end = self.offsets[index], self.offsets[index] + self.sizes[index]
        while at < end:
            piece = _read(self._descriptor, min(_CHUNK, end - at), at, self.path)
            at += len(piece)
            yield piece

    def checked(self, index: int, sha256: str, fault: str) -> Iterator[bytes]:
        """As `pieces`, with a check at the end.

        Raises:
            CompatibilityError: the SHA-256 (hex) is another one; `fault` says so.
            DataError: as of `pieces`.
        """
        digest = hashlib.sha256()
        for piece in self.pieces(index):
            digest.update(piece)
            yield piece
        if digest.hexdigest() != sha256:
            raise _altered(self.path, fault)


@contextmanager
def open_container(path: Path) -> Iterator[Container]:
    """Open a bundle file and check its layout.

    Raises:
        DataError: missing, not a regular file, truncated, too long, or no bundle.
    """
    try:
        # O_NONBLOCK: a named pipe must not make us wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as e:
        raise DataError(f"{path}: the bundle cannot be opened ({e.strerror or e})") from e
    try:
        yield _checked(descriptor, path)
    finally:
        os.close(descriptor)


def pack_front(signature: bytes, sizes: tuple[int, ...]) -> bytes:
    """Everything before the files: header, lengths and the padded signature.

    Raises:
        DataError: more files, or a longer signature, than a bundle holds.
    """
    padded = signature.ljust(-(-len(signature) // SIGNATURE_BLOCK) * SIGNATURE_BLOCK)
    if not 1 <= len(sizes) <= MAX_FILES or len(padded) > _MAX_SIGNATURE:
        raise DataError(
            f"{len(sizes)} files with a signature of {len(signature)} bytes; a bundle holds at "
            f"most {MAX_FILES} and {_MAX_SIGNATURE}"
        )
    header = _HEADER.pack(MAGIC, VERSION, len(sizes), len(padded), 0)
    return header + b"".join(_SIZE.pack(s) for s in sizes) + padded


def _checked(descriptor: int, path: Path) -> Container:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path} is no regular file; give a bundle made by 'edgehp bundle'")
    length = status.st_size
    if (other := stand_in(_read(descriptor, min(length, 512), 0, path))) is not None:
        raise DataError(f"{path} is {other}")
    if length < _HEADER.size:
        raise DataError(f"{path}: {length} bytes are no bundle; copy it again")
    magic, version, count, signature_size, zero = _HEADER.unpack(
        _read(descriptor, _HEADER.size, 0, path)
    )
    if magic != MAGIC:
        raise DataError(f"{path} is no bundle; give a file made by 'edgehp bundle'")
    if version != VERSION:
        raise DataError(
            f"{path} is a bundle of version {version}, this edgehp reads {VERSION}\n"
            "hint: install a newer edgehp or make the bundle with this one"
        )
    if not 1 <= count <= MAX_FILES:
        raise _damaged(path, f"{count} files, expected 1 to {MAX_FILES}")
    if not 1 <= signature_size <= _MAX_SIGNATURE or signature_size % SIGNATURE_BLOCK:
        raise _damaged(path, f"a signature of {signature_size} bytes")
    if zero != 0:
        raise _damaged(path, "a header that is not zero where it must be")
    start = _HEADER.size + count * _SIZE.size + signature_size
    if length < start:
        raise _damaged(path, f"{length} bytes, expected at least {start}")
    table = _read(descriptor, count * _SIZE.size, _HEADER.size, path)
    sizes = tuple(s for (s,) in _SIZE.iter_unpack(table))
    if (largest := max(sizes)) > MAX_FILE_SIZE:
        raise _damaged(path, f"a file of {largest} bytes, expected at most {MAX_FILE_SIZE}")
    if length != start + sum(sizes):
        raise _damaged(path, f"{length} bytes, its lengths add up to {start + sum(sizes)}")
    signature = _read(descriptor, signature_size, start - signature_size, path)
    offsets = tuple(start + sum(sizes[:i]) for i in range(count))
    return Container(path, signature, sizes, offsets, descriptor)


def _read(descriptor: int, count: int, at: int, path: Path) -> bytes:
    """Exactly `count` bytes at offset `at`."""
    found = b""
    while len(found) < count:
        try:
            piece = os.pread(descriptor, count - len(found), at + len(found))
        except OSError as e:
            raise DataError(f"{path}: the bundle cannot be read ({e.strerror or e})") from e
        if not piece:
            raise _damaged(path, "it was truncated while it was read")
        found += piece
    return found


def _damaged(path: Path, found: str) -> DataError:
    return DataError(f"{path} is a damaged bundle: found {found}; copy it again")
