"""What the tests of shipping share: a tiny real artifact, keys, and bundles signed by hand."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import cv2
import numpy as np
import onnxruntime
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from edgehp.artifact.manifest import EngineRecord, Golden, Manifest, PrecisionRecord
from edgehp.artifact.write import ArtifactWriter
from edgehp.driver import Gpu
from edgehp.shipping import slots, update
from edgehp.shipping.bundle import pack_front, verify_bundle
from edgehp.shipping.selftest import SelfTestResult, self_test
from edgehp.shipping.signature import PublicKey, read_public_key
from tests.helpers import a_manifest
from tests.pose_graphs import SPEC, pose_graph

SIZE = 16
GOLDEN = np.array([[10, -20, 5], [-30, 40, 0], [0, 60, -15]], np.float32)
ROLES = {"engine.onnx": "engine", "golden.png": "golden", "graph.onnx": "graph"}
VERSION = str(onnxruntime.__version__)


@dataclass
class Device:
    """A processor with the onnxruntime that is really there."""

    runtime: str | None = VERSION

    def gpus(self) -> tuple[Gpu, ...]:
        return ()

    def module(self) -> str | None:
        return None

    def version(self, kind: str) -> str | None:
        return self.runtime if kind == "onnxruntime" else None


def here(artifact: Path) -> SelfTestResult:
    """The real self-test, in this process and on `Device`."""
    return self_test(artifact, Device())


@contextmanager
def on_device(device: Device | None = None, selftest: Any = here) -> Iterator[None]:
    """All inside runs on this device, and its self-tests in this process."""
    names = {"HostProbe": lambda: device or Device(), "run_self_test": selftest}
    with patch.multiple(slots, **names), patch.object(update, "HostProbe", names["HostProbe"]):
        yield


def install(bundle: Path, signer: Signer, root: Path, **how: Any) -> slots.Slot:
    """Verify and install a bundle on `Device`."""
    finisher = how.pop("finisher", finish_tiny)
    with on_device(**how):
        return slots.install(verify_bundle(bundle, signer.trust), root, finisher=finisher)


def rollback(root: Path, selftest: Any = here) -> slots.Slot:
    """Go back on `Device`."""
    with on_device(selftest=selftest):
        return slots.rollback(root)


def started_whole(root: Path) -> str:
    """The name of the artifact that starts; everything in both slots is whole."""
    found = slots.boot(root, here)
    assert found.fell_back is None
    for name in slots.SLOT_NAMES:
        if (root / "slots" / name).exists():
            slot = slots.read_slot(root, name)
            assert slot is not None
            assert slots.is_whole(slot)
    return found.slot.artifact_name


def tiny_manifest(name: str, *, deferred: bool = False, budget: float | None = 60_000) -> Manifest:
    engine = EngineRecord("onnxruntime", ("engine.onnx",), {"onnxruntime": VERSION}, 1, 1, 8, "any")
    angles = tuple((float(p), float(y), float(r)) for p, y, r in GOLDEN)
    return a_manifest(
        SPEC.with_size(SIZE),
        Golden("golden.png", angles, ((2.0, 2.0, 2.0),) * len(GOLDEN), 0.5, budget),
        state="deferred" if deferred else "complete",
        name=name,
        precision=PrecisionRecord("fp32", None if deferred else "fp32", "graph", {}, ()),
        engine=None if deferred else engine,
        graph="graph.onnx",
    )


def tiny_artifact(
    path: Path, *, offset: float = 0.0, deferred: bool = False, budget: float | None = 60_000
) -> Path:
    """An artifact of a few kilobytes whose engine is off by `offset` degrees."""
    with ArtifactWriter(path) as writer:
        pose_graph(writer.path / "graph.onnx", offset=(offset, 0, 0), size=SIZE)
        if not deferred:
            (writer.path / "engine.onnx").write_bytes((writer.path / "graph.onnx").read_bytes())
        crops = np.broadcast_to(GOLDEN[:, None, None] + 128, (len(GOLDEN), SIZE, SIZE, 3))
        picture = crops.reshape(-1, SIZE, 3).astype(np.uint8)
        cv2.imwrite(str(writer.path / "golden.png"), np.ascontiguousarray(picture[..., ::-1]))
        roles = {k: v for k, v in ROLES.items() if not (deferred and v == "engine")}
        writer.commit(tiny_manifest(path.name, deferred=deferred, budget=budget), roles)
    return path


def finish_tiny(path: Path) -> None:
    """Finish a deferred tiny artifact: the real writer, and the graph as its engine."""
    from edgehp.artifact import load_artifact

    artifact = load_artifact(path, allow_deferred=True)
    complete = tiny_manifest(artifact.manifest.name)
    with ArtifactWriter(path) as writer:
        for file in artifact.manifest.files:
            (writer.path / file.path).write_bytes((path / file.path).read_bytes())
        (writer.path / "engine.onnx").write_bytes((path / "graph.onnx").read_bytes())
        writer.commit(complete, ROLES)


@dataclass(frozen=True)
class Signer:
    """A key pair on disk."""

    private: Path
    public: Path
    key: ec.EllipticCurvePrivateKey

    @property
    def trust(self) -> list[PublicKey]:
        return [read_public_key(self.public)]


def new_signer(folder: Path, name: str = "key", curve: ec.EllipticCurve | None = None) -> Signer:
    key = ec.generate_private_key(curve or ec.SECP256R1())
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.touch(0o600)
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    public.write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return Signer(private, public, key)


def statement(name: str, files: list[tuple[str, bytes]]) -> dict[str, Any]:
    """A statement as Model Signing makes it, about whatever is asked for."""
    digests = [hashlib.sha256(data).digest() for _, data in files]
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [
            {"name": name, "digest": {"sha256": hashlib.sha256(b"".join(digests)).hexdigest()}}
        ],
        "predicateType": "https://model_signing/signature/v1.0",
        "predicate": {
            "serialization": {"method": "files", "hash_type": "sha256", "allow_symlinks": False},
            "resources": [
                {"name": path, "algorithm": "sha256", "digest": digest.hex()}
                for (path, _), digest in zip(files, digests, strict=True)
            ],
        },
    }


def signed(signer: Signer, payload: bytes) -> bytes:
    """The signature section, before padding, for any payload."""
    kind = b"application/vnd.in-toto+json"
    message = b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)
    signature = signer.key.sign(message, ec.ECDSA(hashes.SHA256()))
    (key,) = signer.trust
    values = {
        "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
        "verificationMaterial": {"publicKey": {"hint": key.fingerprint}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": kind.decode(),
            "signatures": [{"keyid": "", "sig": base64.b64encode(signature).decode()}],
        },
    }
    return json.dumps(values, sort_keys=True, separators=(",", ":")).encode()


def pack(signer: Signer, name: str, files: list[tuple[str, bytes]]) -> bytes:
    """The bytes of a bundle of any files under any names, rightly signed."""
    payload = json.dumps(statement(name, files)).encode()
    front = pack_front(signed(signer, payload), tuple(len(data) for _, data in files))
    return front + b"".join(data for _, data in files)


def files_of(artifact: Path) -> list[tuple[str, bytes]]:
    """The files of an artifact, sorted by path."""
    found = sorted(p for p in artifact.rglob("*") if p.is_file())
    return [(p.relative_to(artifact).as_posix(), p.read_bytes()) for p in found]


def quick_bundle(path: Path, artifact: Path, signer: Signer) -> Path:
    """A bundle of an artifact without the package model-signing, which takes seconds to import."""
    path.write_bytes(pack(signer, artifact.name, files_of(artifact)))
    return path


def bundle(folder: Path, name: str, signer: Signer, **options: Any) -> Path:
    """The bundle of a tiny artifact in `folder`, made where it is not there yet."""
    path = folder / f"{name}.edgehp"
    if not path.exists():
        quick_bundle(path, tiny_artifact(folder / name, **options), signer)
    return path
