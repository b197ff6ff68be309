"""Keys, and the signature of a bundle: who signed which hashes.

It is what OpenSSF Model Signing writes: a Sigstore bundle around a DSSE envelope (a statement in
in-toto's form, signed together with its type). It is checked here and not by the package
``model-signing``, which verifies unpacked folders only and brings 25 packages to the device; see
``docs/adr/0008-bundles-and-slots.md``. The statement is parsed after the signature is right.

Formats: https://github.com/secure-systems-lab/dsse (v1.0.0),
https://github.com/in-toto/attestation (Statement v1), https://docs.sigstore.dev/about/bundle (0.3).
"""

from __future__ import annotations

import base64
import binascii
import codecs
import logging
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from edgehp._installed import install_extra
from edgehp.artifact.manifest import FileName, Sha256
from edgehp.errors import CompatibilityError, EnvironmentalError, UsageError
from edgehp.files import Record, decode_text, read_bytes, sha256_bytes, strict_json
from edgehp.shipping import PASSWORD_VARIABLE

logger = logging.getLogger(__name__)

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
    data = _key_file(path)
    if b"PRIVATE KEY" in data:
        raise UsageError(
            f"{path} is a private key, expected the public one: it belongs on no device\n"
            f"hint: make the public half with: openssl ec -in {path.name} -pubout"
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
    data = _key_file(path)
    serialization = require("cryptography.hazmat.primitives.serialization", "sign")
    unsupported = require("cryptography.exceptions", "sign").UnsupportedAlgorithm
    # Bundles and lists can be signed by whoever reads it.
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        logger.warning("%s can be read by others than its owner; chmod 600 it", path)
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
                f"the password in ${PASSWORD_VARIABLE} does not open {path}\n"
                "hint: give the right one, or another copy of the file if it was damaged"
            ) from e
    except (ValueError, unsupported) as e:
        raise _no_key(path, e) from e


def _key_file(path: Path) -> bytes:
    """The bytes of a key file.

    Raises:
        UsageError: it is missing, too large to be one, a pointer or page, or UTF-16 text.
    """
    data = read_bytes(path, "a key in PEM form", limit=_LARGEST_KEY, error=UsageError)
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # of PowerShell's ">"
        decode_text(data, str(path), UsageError)
    return data


def described(key: Any, path: Path) -> PublicKey:
    """A ``cryptography`` public key that was read from `path`.

    Raises:
        UsageError: it is of a kind that signs no bundle.
    """
    curve = getattr(getattr(key, "curve", None), "name", type(key).__name__)
    if curve not in CURVES:
        raise UsageError(
            f"{path} is a key of the kind {curve}, expected one of {', '.join(CURVES)}\n"
            "hint: make one with: openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256"
        )
    serialization = require("cryptography.hazmat.primitives.serialization", "ship")
    pem: bytes = key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return PublicKey(sha256_bytes(pem), pem, str(path))


def _no_key(path: Path, error: Exception) -> UsageError:
    text = " ".join(str(error).split())[:120]
    return UsageError(f"{path} holds no elliptic-curve key in PEM form ({text}); give another file")


# --- the signature -------------------------------------------------------------------------------

# 64 files of a manifest and the manifest.
MAX_FILES = 65
_PAYLOAD_TYPE = "application/vnd.in-toto+json"
# Hash that goes with a curve, after Sigstore's registry of algorithms.
_HASHES = {256: "SHA256", 384: "SHA384", 521: "SHA512"}

_T = TypeVar("_T")


class _Key(Record, frozen=True):
    hint: str


class _Material(Record, frozen=True):
    publicKey: _Key  # noqa: N815 - as the format spells it
    tlogEntries: Annotated[list[None], Meta(max_length=0)]  # noqa: N815


class _Signature(Record, frozen=True):
    sig: str
    keyid: Literal[""]


class _Envelope(Record, frozen=True):
    payload: str
    payloadType: Literal["application/vnd.in-toto+json"]  # noqa: N815
    signatures: Annotated[list[_Signature], Meta(min_length=1, max_length=1)]


class _SigstoreBundle(Record, frozen=True):
    """The section in the file. Nothing of it is signed but the payload and its type."""

    mediaType: Literal["application/vnd.dev.sigstore.bundle.v0.3+json"]  # noqa: N815
    verificationMaterial: _Material  # noqa: N815
    dsseEnvelope: _Envelope  # noqa: N815


class _Digest(Record, frozen=True):
    sha256: Sha256


class _Subject(Record, frozen=True):
    name: str
    digest: _Digest


class _Resource(Record, frozen=True):
    name: FileName
    algorithm: Literal["sha256"]
    digest: Sha256


class _Serialization(Record, frozen=True):
    """Whole files, SHA-256, nothing ignored: the one form that a device accepts."""

    method: Literal["files"]
    hash_type: Literal["sha256"]
    allow_symlinks: bool


class _Predicate(Record, frozen=True):
    resources: Annotated[list[_Resource], Meta(min_length=1, max_length=MAX_FILES)]
    serialization: _Serialization


class _InToto(Record, frozen=True, rename={"type_": "_type"}):
    type_: Literal["https://in-toto.io/Statement/v1"]
    subject: Annotated[list[_Subject], Meta(min_length=1, max_length=1)]
    predicateType: Literal["https://model_signing/signature/v1.0"]  # noqa: N815
    predicate: _Predicate


@dataclass(frozen=True)
class Statement:
    """What was signed.

    Attributes:
        name: of the artifact.
        digest: SHA-256 (hex) over the files' SHA-256 in their order.
        files: path and SHA-256 (hex) of every file; the paths are plain, relative and distinct.
    """

    name: str
    digest: str
    files: tuple[tuple[str, str], ...]


def verify_signature(
    section: bytes, trust: Sequence[PublicKey], path: Path
) -> tuple[Statement, str]:
    """Check the signature section of the bundle `path` and parse what it signs.

    Args:
        section: as it stands in the file, with its padding.
        trust: the keys to believe.
        path: of the bundle, for messages.

    Returns:
        The statement, and the fingerprint of the key that signed it.

    Raises:
        CompatibilityError: signed by somebody else, not signed at all, or altered.
        EnvironmentalError: the package ``cryptography`` is missing.
    """
    if not trust:
        raise CompatibilityError(f"{path}: no public key was given to verify it with")
    try:
        outer = _parsed(section, _SigstoreBundle)
        payload = _base64(outer.dsseEnvelope.payload)
        signature = _base64(outer.dsseEnvelope.signatures[0].sig)
    except ValueError as e:
        raise _altered(path, f"no signature made with a key was found ({e})") from e
    hint = outer.verificationMaterial.publicKey.hint
    for key in trust:
        if key.fingerprint == hint:
            _check(key, payload, signature, path)
            return _statement(payload, path), key.fingerprint
    known = ", ".join(f"{k.fingerprint[:16]} ({k.source})" for k in trust)
    raise CompatibilityError(
        f"{path} was signed with the key {hint[:16]!r}, trusted: {known}\nhint: get a bundle from "
        "whoever holds a trusted key"
    )


def _statement(payload: bytes, path: Path) -> Statement:
    """The signed statement of the bundle `path`.

    Raises:
        CompatibilityError: it is not a statement about an artifact.
    """
    try:
        values = _parsed(payload, _InToto)
        if values.predicate.serialization.allow_symlinks:
            raise ValueError("symbolic links allowed")
        files = tuple((r.name, r.digest) for r in values.predicate.resources)
        folded = [name.lower() for name, _ in files]
        if len(set(folded)) != len(folded):
            raise ValueError("a path twice")
        if {p.partition("/")[0] for p in folded if "/" in p} & set(folded):
            raise ValueError("a path that is a file and a folder")
        digest = sha256_bytes(b"".join(bytes.fromhex(d) for _, d in files))
        (subject,) = values.subject
        if subject.digest.sha256 != digest:
            raise ValueError("a digest that does not fit its files")
    except ValueError as e:
        raise CompatibilityError(
            f"{path} is signed, but not an artifact: its statement has {e}\n"
            "hint: make the bundle again with 'edgehp bundle'"
        ) from e
    return Statement(subject.name, digest, files)


def _check(key: PublicKey, payload: bytes, signature: bytes, path: Path) -> None:
    serialization = require("cryptography.hazmat.primitives.serialization", "ship")
    hashes = require("cryptography.hazmat.primitives.hashes", "ship")
    ec = require("cryptography.hazmat.primitives.asymmetric.ec", "ship")
    exceptions = require("cryptography.exceptions", "ship")
    public = serialization.load_pem_public_key(key.pem)
    algorithm = getattr(hashes, _HASHES[public.curve.key_size])()
    # DSSE's pre-authentication encoding: the type is signed with the payload.
    message = b"DSSEv1 %d %s %d " % (len(_PAYLOAD_TYPE), _PAYLOAD_TYPE.encode(), len(payload))
    try:
        public.verify(signature, message + payload, ec.ECDSA(algorithm))
    except exceptions.InvalidSignature as e:
        raise _altered(path, f"the signature is not by the key {key.fingerprint[:16]}") from e


def _parsed(data: bytes, kind: type[_T]) -> _T:
    """The JSON text as a `kind`; ValueError says what is wrong with it."""
    values: Any = strict_json(data)
    return msgspec.convert(values, kind)


def _base64(text: str) -> bytes:
    try:
        return base64.b64decode(text.encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError) as e:
        raise ValueError(f"no base64 text: {e}") from e


def _altered(path: Path, found: str) -> CompatibilityError:
    return CompatibilityError(
        f"{path} is not signed by anybody trusted, or was altered: {found}; get the bundle again"
    )
