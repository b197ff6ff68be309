"""The signature of a bundle: who signed which hashes.

It is what OpenSSF Model Signing writes: a Sigstore bundle around a DSSE envelope (a statement in
in-toto's form, signed together with its type). With a key it is checked here and not by the package
``model-signing``, which verifies unpacked folders only and brings 25 packages to the device; see
``docs/adr/0008-bundles-and-slots.md``. The statement is parsed after the signature is right.

Formats: https://github.com/secure-systems-lab/dsse (v1.0.0),
https://github.com/in-toto/attestation (Statement v1), https://docs.sigstore.dev/about/bundle (0.3).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgehp._json import strict_json
from edgehp.artifact.schema import manifest_schema
from edgehp.errors import CompatibilityError, EnvironmentalError
from edgehp.shipping.container import MAX_FILES, SIGNATURE_BLOCK
from edgehp.shipping.keys import Identity, PublicKey, Trust, require

__all__ = ["Statement", "canonical_signature", "parse_statement", "verify_signature"]

logger = logging.getLogger(__name__)

_BUNDLE_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_PAYLOAD_TYPE = "application/vnd.in-toto+json"
_STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
_PREDICATE_TYPE = "https://model_signing/signature/v1.0"
# Whole files, SHA-256, nothing ignored: the one form that a device accepts.
_SERIALIZATION = {"method": "files", "hash_type": "sha256", "allow_symlinks": False}
# Hash that goes with a curve, after Sigstore's registry of algorithms.
_HASHES = {256: "SHA256", 384: "SHA384", 521: "SHA512"}
_SHA256 = re.compile(r"[0-9a-f]{64}")


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


def canonical_signature(text: bytes) -> bytes:
    """The one way to write this JSON: keys sorted, no blanks, ASCII.

    Raises:
        ValueError: it is no JSON.
    """
    return json.dumps(strict_json(text), sort_keys=True, separators=(",", ":")).encode()


def verify_signature(section: bytes, trust: Trust, path: Path) -> tuple[Statement, str]:
    """Check the signature section of the bundle `path` and parse what it signs.

    Args:
        section: as it stands in the file, with its padding.
        trust: the keys or the identity to believe.
        path: of the bundle, for messages.

    Returns:
        The statement, and the fingerprint of the key or the identity that signed it.

    Raises:
        CompatibilityError: signed by somebody else, not signed at all, or altered.
        EnvironmentalError: a package or, for an identity, Sigstore's service is missing.
    """
    text = section.rstrip(b" ")
    try:
        # One form only, so that no byte of the section can change unnoticed.
        if len(section) - len(text) >= SIGNATURE_BLOCK or canonical_signature(text) != text:
            raise ValueError("it is not in its canonical form")
    except ValueError as e:
        raise _altered(path, f"the signature cannot be read: {e}") from e
    if isinstance(trust, Identity):
        payload, signer = _identity_payload(text, trust, path)
    else:
        payload, signer = _key_payload(strict_json(text), trust, path)
    return parse_statement(payload, path), signer


def parse_statement(payload: bytes, path: Path) -> Statement:
    """Parse the signed statement of the bundle `path`.

    Raises:
        CompatibilityError: it is not a statement about an artifact.
    """
    try:
        return _statement(strict_json(payload))
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise CompatibilityError(
            f"{path} is signed, but not an artifact: its statement has {e}; make the bundle again "
            "with 'edgehp bundle'"
        ) from e


def _key_payload(values: Any, keys: Trust, path: Path) -> tuple[bytes, str]:
    """The signed bytes and the fingerprint of the key that signed them."""
    if isinstance(keys, Identity) or not keys:
        raise CompatibilityError(f"{path}: no public key was given to verify it with")
    try:
        envelope = values["dsseEnvelope"]
        hint = values["verificationMaterial"]["publicKey"]["hint"]
        payload = _base64(envelope["payload"])
        signature = _base64(envelope["signatures"][0]["sig"])
    except (KeyError, IndexError, TypeError, ValueError) as e:
        raise _altered(path, f"no signature made with a key was found ({e})") from e
    # Written again from its parts: no other key, signature or material can hide in it.
    expected = {
        "mediaType": _BUNDLE_TYPE,
        "verificationMaterial": {"publicKey": {"hint": hint}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": envelope["payload"],
            "payloadType": _PAYLOAD_TYPE,
            "signatures": [{"keyid": "", "sig": envelope["signatures"][0]["sig"]}],
        },
    }
    if values != expected:
        raise _altered(path, "the signature is not of the form that Model Signing writes")
    for key in keys:
        if key.fingerprint == hint:
            _check(key, payload, signature, path)
            return payload, key.fingerprint
    known = ", ".join(f"{k.fingerprint[:16]} ({k.source})" for k in keys)
    raise CompatibilityError(
        f"{path} was signed with the key {str(hint)[:16]!r}, trusted: {known}; get a bundle from "
        "whoever holds a trusted key"
    )


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


def _identity_payload(text: bytes, identity: Identity, path: Path) -> tuple[bytes, str]:
    """The signed bytes of a keyless signature; asks Sigstore for its current roots."""
    sigstore = require("sigstore.verify", "sign")
    models = require("sigstore.models", "sign")
    errors = require("sigstore.errors", "sign")
    try:
        bundle = models.Bundle.from_json(text)
    except (errors.Error, ValueError) as e:
        raise _altered(path, f"no keyless signature was found ({_short(e)})") from e
    try:
        verifier = sigstore.Verifier.production()
    except (errors.Error, OSError) as e:
        raise EnvironmentalError(
            f"Sigstore's roots of trust cannot be fetched ({_short(e)}); a device without a "
            "network takes bundles signed with a key"
        ) from e
    policy = sigstore.policy.Identity(identity=identity.name, issuer=identity.issuer)
    try:
        kind, payload = verifier.verify_dsse(bundle, policy)
    except errors.Error as e:
        raise _altered(path, f"it was not signed by {identity.name} ({_short(e)})") from e
    if kind != _PAYLOAD_TYPE:
        raise _altered(path, f"the signed content is {kind}")
    return bytes(payload), f"{identity.name} ({identity.issuer})"


def _statement(values: Any) -> Statement:
    _require(values.keys() == {"_type", "subject", "predicateType", "predicate"}, "other keys")
    _require(values["_type"] == _STATEMENT_TYPE, "another type")
    _require(values["predicateType"] == _PREDICATE_TYPE, "another predicate")
    (subject,) = values["subject"]
    predicate = values["predicate"]
    _require(subject.keys() == {"name", "digest"}, "other keys in its subject")
    _require(predicate.keys() == {"resources", "serialization"}, "other keys in its predicate")
    _require(predicate["serialization"] == _SERIALIZATION, "another way of hashing")
    # Equality alone would take 0 for False.
    _require(predicate["serialization"]["allow_symlinks"] is False, "another way of hashing")
    resources = predicate["resources"]
    _require(isinstance(resources, list) and 1 <= len(resources) <= MAX_FILES, "too many files")
    files = tuple(_resource(r) for r in resources)
    _check_paths([path for path, _ in files])
    digest = hashlib.sha256(b"".join(bytes.fromhex(d) for _, d in files)).hexdigest()
    _require(subject["digest"] == {"sha256": digest}, "a digest that does not fit its files")
    _require(isinstance(subject["name"], str), "no name")
    return Statement(subject["name"], digest, files)


def _resource(values: Mapping[str, Any]) -> tuple[str, str]:
    _require(values.keys() == {"algorithm", "name", "digest"}, "other keys in a file")
    _require(values["algorithm"] == "sha256", "another hash than SHA-256")
    name, digest = values["name"], values["digest"]
    _require(isinstance(digest, str) and _SHA256.fullmatch(digest) is not None, "no SHA-256")
    _require(isinstance(name, str), "a file without a name")
    return name, digest


def _check_paths(paths: list[str]) -> None:
    """Refuse what could leave the folder, or mean two things."""
    rule = manifest_schema()["$defs"]["path"]
    for path in paths:
        fine = len(path) <= rule["maxLength"] and re.search(rule["pattern"], path) is not None
        # "$" also matches before a final newline.
        _require(fine and not path.endswith("\n"), f"the path {path[:80]!r}")
    folded = [p.lower() for p in paths]
    _require(len(set(folded)) == len(folded), "a path twice")
    folders = {p.partition("/")[0] for p in folded if "/" in p}
    _require(not folders & set(folded), "a path that is a file and a folder")


def _require(fine: bool, found: str) -> None:
    if not fine:
        raise ValueError(found)


def _base64(text: Any) -> bytes:
    if not isinstance(text, str):
        raise ValueError("no base64 text")
    try:
        data = base64.b64decode(text.encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError) as e:
        raise ValueError(f"no base64 text: {e}") from e
    # Unused bits of the last character could differ unnoticed.
    if base64.b64encode(data).decode() != text:
        raise ValueError("no canonical base64 text")
    return data


def _altered(path: Path, found: str) -> CompatibilityError:
    return CompatibilityError(
        f"{path} is not signed by anybody trusted, or was altered: {found}; get the bundle again"
    )


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
