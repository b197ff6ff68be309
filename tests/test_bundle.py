"""Bundles: deterministic, verified before they are unpacked, and refused when anything is odd."""

from __future__ import annotations

import base64
import io
import json
import os
import random
import shutil
import stat
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from edgehp.artifact import load_artifact
from edgehp.artifact.manifest import Accuracy, Calibration, sealed
from edgehp.errors import CompatibilityError, DataError, EdgehpError, EnvironmentalError, UsageError
from edgehp.shipping.bundle import (
    MAX_FILE_SIZE,
    VerifiedBundle,
    make_bundle,
    pack_front,
    verify_bundle,
)
from edgehp.shipping.sbom import SBOM_NAME, spdx_document
from edgehp.shipping.signature import read_public_key
from tests import ship_parts as parts

NAME = "colours-cpu-fp32"
# Of a manifest: free objects and texts, its own digest, and the keys that older ones lack.
_FREE = ("recipe", "spec", "protocol", "versions", "counts", "licence", "source")
_DEFAULTS = (
    "appearance", "box_rule", "box_scale", "clipped", "colour", "compute_capabilities", "detail",
    "difference", "gpu", "int8_against_fp16", "max_latency_ms", "mean", "measured_all_int8_ms",
    "measured_ms", "mixed", "module", "protocol", "resize", "rxswin", "spread_difference", "std",
    "subsets",
)  # fmt: skip
SPARE = frozenset((*_FREE, "digest", *_DEFAULTS))
HEADER = 24


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> parts.Signer:
    return parts.new_signer(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return parts.tiny_artifact(tmp_path_factory.mktemp("dist") / NAME)


@pytest.fixture(scope="module")
def bundle(
    tmp_path_factory: pytest.TempPathFactory, artifact: Path, signer: parts.Signer
) -> VerifiedBundle:
    """Made by OpenSSF Model Signing."""
    return make_bundle(artifact, tmp_path_factory.mktemp("out") / "b.edgehp", key=signer.private)


def section_of(path: Path) -> tuple[int, int]:
    """Where the signature section of a bundle begins and ends."""
    data = path.read_bytes()
    count, size = int.from_bytes(data[12:16], "little"), int.from_bytes(data[16:20], "little")
    return HEADER + 8 * count, HEADER + 8 * count + size


def payload_of(path: Path) -> Any:
    start, end = section_of(path)
    envelope = json.loads(path.read_bytes()[start:end])["dsseEnvelope"]
    return json.loads(base64.b64decode(envelope["payload"]))


# --- what is made ---------------------------------------------------------------------------------


def test_what_is_bundled_is_what_comes_out(
    bundle: VerifiedBundle, artifact: Path, signer: parts.Signer, tmp_path: Path
) -> None:
    found = verify_bundle(bundle.path, signer.trust)
    assert found == bundle
    assert found.signer == signer.trust[0].fingerprint
    found.extract(tmp_path / "out" / "artifact")
    made, source = dict(parts.files_of(tmp_path / "out" / "artifact")), parts.files_of(artifact)
    assert made.keys() == {*dict(source), SBOM_NAME}
    assert all(made[path] == data for path, data in source if path != "manifest.json")
    assert load_artifact(tmp_path / "out" / "artifact", device=parts.Device())
    # For all to read and none to run.
    files = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert all(stat.S_IMODE(p.stat().st_mode) & 0o133 == 0 for p in files)


def test_every_bundle_says_what_it_is_made_of_in_spdx(
    bundle: VerifiedBundle, tmp_path: Path
) -> None:
    """Read and checked by the model that is generated from the specification."""
    from spdx_python_model import v3_0_1 as spdx

    bundle.extract(tmp_path / "out")
    text = (tmp_path / "out" / SBOM_NAME).read_bytes()
    found = spdx.SHACLObjectSet()
    spdx.JSONLDDeserializer().read(io.BytesIO(text), found)
    assert not found.missing_ids
    # Writing checks that nothing is missing that must be there.
    spdx.JSONLDSerializer().write(found, io.BytesIO())
    (document,) = found.foreach_type(spdx.SpdxDocument)
    (network,) = found.foreach_type(spdx.ai_AIPackage)
    assert [root.spdxId for root in document.rootElement] == [network.spdxId]
    assert spdx.ProfileIdentifierType.ai in document.profileConformance
    # What the AI profile asks for beyond the model's own minima.
    for name in ("suppliedBy", "releaseTime", "software_packageVersion",
                 "software_downloadLocation", "software_primaryPurpose"):  # fmt: skip
        assert getattr(network, name), name
    manifest = bundle.manifest
    assert manifest.preprocessing.digest in network.ai_modelDataPreprocessing[0]
    hashes = {f.name: f.verifiedUsing[0].hashValue for f in found.foreach_type(spdx.software_File)}
    assert hashes == {f.path: f.sha256 for f in manifest.files if f.path != SBOM_NAME}
    packages = {
        p.name: p.software_packageVersion
        for p in found.foreach_type(spdx.software_Package)
        if type(p) is spdx.software_Package
    }
    assert packages["onnxruntime"] == parts.VERSION and "numpy" in packages
    kinds = {r.relationshipType.rpartition("/")[2] for r in found.foreach_type(spdx.Relationship)}
    assert {"trainedOn", "contains", "dependsOn", "hasDeclaredLicense"} <= kinds


def test_spdx_has_the_gate_the_data_and_measured_energy(artifact: Path) -> None:
    manifest = load_artifact(artifact, bytes_only=True).manifest
    names = ("test crops", 500, "mae-drop", 2.0, 2.05, 0.05, (0.01, 0.09), 0.1, "openvino")
    gate = Accuracy(*names, {"sha256": "c" * 64})
    licence = "research only: trained on AFLW and LFW photos"
    manifest = msgspec.structs.replace(
        manifest,
        accuracy=gate,
        network=msgspec.structs.replace(manifest.network, licence=licence),
        calibration=Calibration("faces.zip", 512, 0, "crops.txt", "b" * 64, "mse", None),
    )
    text = spdx_document(manifest, {"VDD": 0.25}).decode()
    for part in ("AFLW and LFW photos", "faces.zip", "b" * 64, "test crops", "c" * 64, licence,
                 '"0.050000"', "0.010000 to 0.090000", '"value": "0.1"', "2.5e-07"):  # fmt: skip
        assert part in text, part


def test_model_signing_verifies_what_is_unpacked(
    bundle: VerifiedBundle, signer: parts.Signer, tmp_path: Path
) -> None:
    """The signature is OpenSSF Model Signing's: its own verifier agrees, and disagrees."""
    verifying = pytest.importorskip("model_signing.verifying")
    bundle.extract(tmp_path / NAME)
    start, end = section_of(bundle.path)
    (tmp_path / "sig").write_bytes(bundle.path.read_bytes()[start:end])
    config = verifying.Config().use_elliptic_key_verifier(public_key=signer.public)
    config.verify(tmp_path / NAME, tmp_path / "sig")
    (tmp_path / NAME / "engine.onnx").write_bytes(b"other")
    with pytest.raises(ValueError, match="mismatch"):
        config.verify(tmp_path / NAME, tmp_path / "sig")


def test_the_same_artifact_gives_the_same_bytes_but_for_the_signature(
    bundle: VerifiedBundle, artifact: Path, signer: parts.Signer, tmp_path: Path
) -> None:
    again = make_bundle(artifact, tmp_path / "again.edgehp", key=signer.private)
    start, end = section_of(bundle.path)
    first, second = bundle.path.read_bytes(), again.path.read_bytes()
    assert section_of(again.path) == (start, end)
    assert first[:start] == second[:start]
    assert first[end:] == second[end:]
    assert payload_of(bundle.path) == payload_of(again.path)
    assert again.digest == bundle.digest
    assert [p.name for p in tmp_path.iterdir()] == ["again.edgehp"]


@pytest.mark.parametrize("curve", [ec.SECP384R1(), ec.SECP521R1()])
def test_other_curves_and_encrypted_keys(
    artifact: Path, tmp_path: Path, curve: ec.EllipticCurve
) -> None:
    signer = parts.new_signer(tmp_path, curve=curve)
    signer.private.write_bytes(
        signer.key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    # One sentence for each, that says which file and where its password belongs.
    for password, words in ((None, "is encrypted and no password"), ("wrong", "does not open")):
        with pytest.raises(UsageError, match=words) as caught:
            make_bundle(artifact, tmp_path / "b", key=signer.private, password=password)
        assert str(signer.private) in str(caught.value)
        assert "$EDGEHP_KEY_PASSWORD" in str(caught.value)
        assert not (tmp_path / "b").exists()
    # One that is not encrypted asks for none: the password may be that of a repository's keys.
    for each in (signer, parts.new_signer(tmp_path, "plain")):
        made = make_bundle(artifact, tmp_path / "b", key=each.private, password="secret")
        assert verify_bundle(made.path, each.trust).digest == made.digest


def identity(path: Path) -> tuple[int, ...]:
    """What tells whether a file is still the same; not when it was last read."""
    found = path.lstat()
    return found.st_ino, found.st_mode, found.st_size, found.st_mtime_ns


def test_only_a_bundle_is_overwritten(artifact: Path, tmp_path: Path) -> None:
    signer = parts.new_signer(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").touch()
    inside = tmp_path / "copy"
    shutil.copytree(artifact, inside)
    for name in ("key.pem", "key.pub", "link", "pipe", "empty", "copy/manifest.json"):
        before = identity(tmp_path / name)
        with pytest.raises(UsageError, match="is no bundle, so it is not overwritten"):
            make_bundle(inside, tmp_path / name, key=signer.private)
        assert identity(tmp_path / name) == before
    # An older one, even a damaged one, gives way.
    for content in (None, b"\x89EDGEHP\nhalf"):
        if content is not None:
            (tmp_path / "b").write_bytes(content)
        made = make_bundle(inside, tmp_path / "b", key=signer.private)
        assert verify_bundle(made.path, signer.trust).digest == made.digest


def test_a_budget_and_the_software_identification_number_travel_in_the_manifest(
    artifact: Path, signer: parts.Signer, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"key": signer.private}
    number = "E4*79R04/00*0001 HP"
    made = make_bundle(artifact, tmp_path / "b", rxswin=number, max_latency_ms=33.0, **options)
    assert (made.manifest.rxswin, made.manifest.golden.max_latency_ms) == (number, 33.0)
    assert load_artifact(artifact, device=parts.Device()).manifest.golden.max_latency_ms == 60_000
    made.extract(tmp_path / "out")
    assert number.encode() in (tmp_path / "out" / SBOM_NAME).read_bytes()
    # Bundled again it stays, unless another is given.
    again = make_bundle(tmp_path / "out", tmp_path / "c", **options)
    assert again.manifest.rxswin == made.manifest.rxswin
    for wrong in ("", " x", "x\n", "x" * 101, "ü", "\x1b[0m"):
        with pytest.raises(UsageError, match="RXSWIN"):
            make_bundle(artifact, tmp_path / "d", rxswin=wrong, **options)
    assert not (tmp_path / "d").exists()


def test_reports_stay_at_home_and_altered_artifacts_too(
    artifact: Path, signer: parts.Signer, tmp_path: Path
) -> None:
    copy = shutil.copytree(artifact, tmp_path / NAME)
    (copy / "reports").mkdir()
    (copy / "reports" / "secret.html").write_text("what the customer said")
    made = make_bundle(copy, tmp_path / "b", key=signer.private)
    assert b"customer" not in made.path.read_bytes()
    (copy / "engine.onnx").unlink()
    (copy / "engine.onnx").symlink_to("/etc/hostname")
    with pytest.raises(CompatibilityError, match="symbolic link"):
        make_bundle(copy, tmp_path / "c", key=signer.private)
    with pytest.raises(DataError, match="no such artifact"):
        make_bundle(tmp_path / "none", key=signer.private)
    assert not (tmp_path / "c").exists()


# --- keys -----------------------------------------------------------------------------------------


def test_only_trusted_keys_are_believed(
    bundle: VerifiedBundle, signer: parts.Signer, tmp_path: Path
) -> None:
    other = parts.new_signer(tmp_path, "other")
    with pytest.raises(CompatibilityError, match="signed with the key"):
        verify_bundle(bundle.path, other.trust)
    with pytest.raises(CompatibilityError, match="no public key"):
        verify_bundle(bundle.path, [])
    assert verify_bundle(bundle.path, [*other.trust, *signer.trust]).digest == bundle.digest
    # A key that only claims to be the trusted one.
    (mine,), (theirs,) = signer.trust, other.trust
    with pytest.raises(CompatibilityError, match="not by the key"):
        verify_bundle(bundle.path, [replace(theirs, fingerprint=mine.fingerprint)])


def test_what_is_no_public_key(signer: parts.Signer, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="private key"):
        read_public_key(signer.private)
    edwards = ed25519.Ed25519PrivateKey.generate().public_key()
    (tmp_path / "ed").write_bytes(
        edwards.public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    (tmp_path / "text").write_text("-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n")
    (tmp_path / "empty").touch()
    # As PowerShell's ">" writes what openssl prints.
    (tmp_path / "utf16").write_bytes((tmp_path / "text").read_text().encode("utf-16"))
    for name, words in {
        "ed": "kind",
        "text": "no elliptic-curve key",
        "empty": "an empty file, expected a key",
        "utf16": "UTF-16",
        "none": "cannot be read",
    }.items():
        with pytest.raises(UsageError, match=words):
            read_public_key(tmp_path / name)


# --- what is refused ------------------------------------------------------------------------------


def test_what_is_no_file(tmp_path: Path, signer: parts.Signer) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "text").write_text("# a text of more than twenty-four bytes\n")
    for path in [*tmp_path.iterdir(), tmp_path / "none", Path("/dev/zero")]:
        with pytest.raises(DataError):
            verify_bundle(path, signer.trust)
    (tmp_path / "text").write_text("version https://git-lfs.github.com/spec/v1\nsize 1\n")
    with pytest.raises(DataError, match=r"Git LFS pointer, not the data\nhint: run 'git lfs"):
        verify_bundle(tmp_path / "text", signer.trust)


def test_a_medium_that_is_swapped_after_the_check(
    bundle: VerifiedBundle, signer: parts.Signer, tmp_path: Path
) -> None:
    path = tmp_path / "b.edgehp"
    data = bytearray(bundle.path.read_bytes())
    path.write_bytes(data)
    found = verify_bundle(path, signer.trust)
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CompatibilityError, match="changed since"):
        found.extract(tmp_path / "out")
    path.write_bytes(data[:-1])
    with pytest.raises(DataError):
        found.extract(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["b.edgehp"]
    path.write_bytes(bundle.path.read_bytes())
    (tmp_path / "out").mkdir()
    with pytest.raises(EnvironmentalError, match="cannot unpack"):
        found.extract(tmp_path / "out")
    assert (tmp_path / "out").is_dir()


def test_a_full_disk_leaves_nothing(
    bundle: VerifiedBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(EnvironmentalError, match="No space left"):
        bundle.extract(tmp_path / "out")
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("thin", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_two_thousand_mutants_are_refused(
    bundle: VerifiedBundle, artifact: Path, signer: parts.Signer, tmp_path: Path, seed: int,
    thin: int,
) -> None:  # fmt: skip
    """None ends in anything but an error of edgehp, or in the very content that was signed."""
    rng = random.Random(seed)
    (tmp_path / "canary").write_text("untouched")
    mutant = tmp_path / "mutant.edgehp"
    good = bundle.path.read_bytes()
    count = 0
    mutants = chain(damaged(good, section_of(bundle.path), rng), hostile(artifact, signer, rng))
    for label, data in islice(mutants, seed % thin, None, thin):
        if data == good:
            continue
        mutant.write_bytes(data)
        try:
            found = verify_bundle(mutant, signer.trust)
        except EdgehpError as e:
            assert len(str(e)) < 2000, label
            assert not isinstance(e, EnvironmentalError), (label, str(e), seed)
            count += 1
        else:
            # The same signature in another spelling.
            assert "signature" in label, (label, seed)
            assert replace(found, path=bundle.path) == bundle, (label, seed)
        assert {p.name for p in tmp_path.iterdir()} == {"canary", "mutant.edgehp"}, (label, seed)
    assert count >= 2000 // thin
    assert (tmp_path / "canary").read_text() == "untouched"


Mutants = Iterator[tuple[str, bytes]]


def damaged(good: bytes, section: tuple[int, int], rng: random.Random) -> Mutants:
    """Without the key: flips, cuts, moves and forged numbers anywhere."""
    start, end = section
    regions = {"header": (0, HEADER), "sizes": (HEADER, start), "signature": (start, end)}
    for name, (low, high) in {**regions, "files": (end, len(good))}.items():
        for _ in range(200):
            data = bytearray(good)
            data[rng.randrange(low, high)] ^= 1 << rng.randrange(8)
            yield f"flip in {name}", bytes(data)
    for _ in range(150):
        yield "truncated", good[: rng.randrange(len(good))]
    for _ in range(50):
        yield "trailing", good + rng.randbytes(rng.randrange(1, 5000))
    for _ in range(150):
        low, high = sorted(rng.randrange(len(good)) for _ in range(2))
        at = rng.randrange(len(good))
        piece = good[low:high]
        kinds = {
            "removed": good[:low] + good[high:],
            "repeated": good[:at] + piece + good[at:],
            "overwritten": (good[:at] + piece + good[at + len(piece) :])[: len(good)],
            "zeroed": good[:low] + bytes(high - low) + good[high:],
        }
        yield rng.choice(list(kinds.items()))
    sizes = [int.from_bytes(good[i : i + 8], "little") for i in range(HEADER, start, 8)]
    for _ in range(200):
        yield "forged sizes", good[:HEADER] + _forged(sizes, rng) + good[start:]
    yield from _reordered(good, sizes, end)
    for _ in range(100):
        at = rng.choice((8, 12, 16, 20))
        number = rng.choice((0, 1, 2, 65, 66, 2**16, 2**31, 2**32 - 1, rng.randrange(2**32)))
        yield "forged header", good[:at] + number.to_bytes(4, "little") + good[at + 4 :]
    text = good[start:end].rstrip()
    for _ in range(150):
        yield "rewritten signature", good[:start] + _rewritten(text, rng, end - start) + good[end:]


def _forged(sizes: list[int], rng: random.Random) -> bytes:
    sizes = list(sizes)
    i, j = rng.sample(range(len(sizes)), 2)
    kind = rng.randrange(4)
    if kind == 0:
        sizes[i], sizes[j] = sizes[j], sizes[i]
    elif kind == 1:
        moved = rng.randrange(1, sizes[i] + 1)
        sizes[i], sizes[j] = sizes[i] - moved, sizes[j] + moved
    elif kind == 2:
        sizes[i] = rng.choice((2**64 - 1, MAX_FILE_SIZE, MAX_FILE_SIZE + 1, 2**63, 0))
    else:
        # The sum overflows to the right one in 64 bits.
        sizes[i] = (sizes[i] + 2**63) % 2**64
        sizes[j] = (sizes[j] + 2**63) % 2**64
    return b"".join(s.to_bytes(8, "little") for s in sizes)


def _reordered(good: bytes, sizes: list[int], end: int) -> Mutants:
    """The members in other orders, their sizes with them."""
    ends = [end + sum(sizes[: i + 1]) for i in range(len(sizes))]
    members = [good[e - s : e] for s, e in zip(sizes, ends, strict=True)]
    order = list(range(len(members)))
    start = HEADER + 8 * len(sizes)
    for i in range(len(order) - 1):
        swapped = list(order)
        swapped[i], swapped[i + 1] = swapped[i + 1], swapped[i]
        if [members[k] for k in swapped] == members:
            continue
        table = b"".join(sizes[k].to_bytes(8, "little") for k in swapped)
        body = b"".join(members[k] for k in swapped)
        yield "reordered", good[:HEADER] + table + good[start:end] + body


def _rewritten(text: bytes, rng: random.Random, length: int) -> bytes:
    """The same signature in other words, or parts of it changed."""
    values = json.loads(text)
    envelope = values["dsseEnvelope"]
    kind = rng.randrange(8)
    if kind == 0:
        return json.dumps(values, indent=1).encode().ljust(length)[:length]
    if kind == 1:
        envelope["signatures"] *= rng.randrange(2, 4)
    elif kind == 2:
        envelope["signatures"][0]["keyid"] = "mine"
    elif kind == 3:
        values["verificationMaterial"]["publicKey"]["hint"] = rng.choice(("", "0" * 64, None, 7))
    elif kind == 4:
        values["extra"] = "x" * rng.randrange(10)
    elif kind == 5:
        envelope["payloadType"] = rng.choice(("text/plain", None, [], "application/json"))
    elif kind == 6:
        payload = json.loads(base64.b64decode(envelope["payload"]))
        payload["predicate"]["resources"].pop(rng.randrange(3))
        envelope["payload"] = base64.b64encode(json.dumps(payload).encode()).decode()
    else:
        values = rng.choice(([], None, 1, "text", {"dsseEnvelope": []}, {"dsseEnvelope": None}))
    return json.dumps(values, sort_keys=True, separators=(",", ":")).encode().ljust(length)[:length]


def hostile(artifact: Path, signer: parts.Signer, rng: random.Random) -> Mutants:
    """With the key: whoever holds it still cannot write outside or crash the device."""
    files = parts.files_of(artifact)
    for path in (
        "../evil", "/etc/evil", "a/../../evil", "..", ".", "", "a/", "/", "a//b", "a/b/c", "~/x",
        "con\x00", "line\nbreak", "evil\n", ".hidden", "a/.hidden", "a\\b", "C:evil", "x" * 300,
        "ünlich", "engine.onnx/x", "ENGINE.ONNX", "a b", "-rf", "$(evil)", "\udcff",
    ):  # fmt: skip
        for extra in (b"", b"evil"):
            yield f"path {path!r}", parts.pack(signer, NAME, [*files, (path, extra)])
            renamed = [(path if n == "golden.png" else n, d) for n, d in files]
            yield f"renamed to {path!r}", parts.pack(signer, NAME, renamed)
    for index, (name, data) in enumerate(files):
        others = files[:index] + files[index + 1 :]
        yield f"without {name}", parts.pack(signer, NAME, others)
        yield f"twice {name}", parts.pack(signer, NAME, [*files, (name, data)])
        yield f"empty {name}", parts.pack(signer, NAME, [*others, (name, b"")])
        for other, _ in others:
            swapped = {name: other, other: name}
            exchanged = [(swapped.get(n, n), d) for n, d in files]
            if dict(exchanged) != dict(files):
                yield f"{name} as {other}", parts.pack(signer, NAME, exchanged)
    yield "unlisted file", parts.pack(signer, NAME, [*files, ("unlisted", b"x")])
    yield "other name", parts.pack(signer, "other", files)
    yield "too many", parts.pack(signer, NAME, [(f"f{i}", b"") for i in range(65)])
    yield from _hostile_statements(files, signer, rng)
    yield from _hostile_manifests(files, signer, rng)


def _hostile_statements(
    files: list[tuple[str, bytes]], signer: parts.Signer, rng: random.Random
) -> Mutants:
    sizes = tuple(len(d) for _, d in files)
    body = b"".join(d for _, d in files)
    texts = [
        b"", b"null", b"[]", b"{}", b"[" * 20_000, b'{"a":' * 5_000, b"\xff\xfe", b"1e999", b"NaN",
        json.dumps(parts.statement(NAME, files)).encode().replace(b"{", b'{"_type":"x",', 1),
    ]  # fmt: skip
    junk = (None, [], {}, 0, -1, 1e308, "", "x" * 1000, True, [[]], {"sha256": 5}, "../x", 2**70)
    while len(texts) < 160:
        values = parts.statement(NAME, files)
        _poke(values, rng, junk)
        if values != parts.statement(NAME, files):
            texts.append(json.dumps(values).encode())
    for text in texts:
        yield f"statement {text[:60]!r}", pack_front(parts.signed(signer, text), sizes) + body


def _hostile_manifests(
    files: list[tuple[str, bytes]], signer: parts.Signer, rng: random.Random
) -> Mutants:
    original = dict(files)["manifest.json"]
    others = [(n, d) for n, d in files if n != "manifest.json"]
    texts = [b"", b"{}", b"[" * 50_000, b"\x00" * 1000, original[:-5], original + b"{}"]
    for _ in range(150):
        data = bytearray(original)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        texts.append(bytes(data))
    # No key without a default can go, and none takes these; the digest is made to fit.
    junk = ([[]], {"x": {}}, "../" * 300, -(10**30), [None] * 5000)
    while len(texts) < 450:
        values = json.loads(original)
        _poke(values, rng, junk, spare=SPARE)
        text = sealed({"schema_version": 3, **values})
        if text != original:
            texts.append(text)
    for text in texts:
        if text != original:
            packed = parts.pack(signer, NAME, sorted([*others, ("manifest.json", text)]))
            yield f"manifest {text[:60]!r}", packed


def _poke(
    value: Any, rng: random.Random, junk: tuple[Any, ...], spare: frozenset[str] = frozenset()
) -> None:
    """Remove, replace or add something somewhere in a JSON value."""
    while True:
        inside = value if isinstance(value, dict) else range(len(value))
        keys = [key for key in inside if key not in spare]
        if not keys:
            key = next(iter(value), "x") if isinstance(value, dict) else slice(0)
            value[key] = rng.choice(junk)
            return
        key = rng.choice(keys)
        if isinstance(value[key], (dict, list)) and value[key] and rng.random() < 0.7:
            value = value[key]
            continue
        kind = rng.randrange(3)
        if kind == 0 and isinstance(value, dict):
            del value[key]
        elif kind == 1 and isinstance(value, dict):
            value["unknown"] = rng.choice(junk)
        else:
            value[key] = rng.choice(junk)
        return
