"""A small real artifact on the processor, for tests of the benchmark and its reports."""

from __future__ import annotations

import hashlib
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from edgehp.artifact.manifest import EngineRecord, Golden, NetworkRecord
from edgehp.artifact.write import ArtifactWriter
from edgehp.engines.openvino import OpenVinoEngine
from edgehp.networks.graph import build_graph, graph_bytes
from tests.helpers import a_manifest, random_crops, random_network

GOLDEN = 4


def make_artifact(directory: Path, size: int = 32, name: str = "random-cpu-fp32") -> Path:
    """An FP32 artifact of an untrained network with its reference graph, under `directory`."""
    weights, spec = random_network(size=size)
    graph = graph_bytes(build_graph(weights, spec))
    crops = random_crops(GOLDEN, size)
    with ArtifactWriter(directory / name) as writer:
        (writer.path / "engine.onnx").write_bytes(graph)
        (writer.path / "reference.onnx").write_bytes(graph)
        with OpenVinoEngine(writer.path / "engine.onnx", threads=1) as engine:
            answer, version = engine.infer(crops), engine.info.version
        # PNG is lossless; OpenCV writes BGR.
        picture = np.ascontiguousarray(crops.reshape(GOLDEN * size, size, 3)[..., ::-1])
        cv2.imwrite(str(writer.path / "golden.png"), picture)
        golden = Golden(
            "golden.png",
            tuple(tuple(map(float, a)) for a in answer.angles),  # type: ignore[misc]
            tuple(tuple(map(float, s)) for s in answer.spread),  # type: ignore[misc]
            0.5,
        )
        engine_record = EngineRecord(
            "openvino", ("engine.onnx",), {"openvino": version}, 1, 1, 8, "x86_64"
        )
        weights_sha256 = hashlib.sha256(graph).hexdigest()
        manifest = a_manifest(
            spec,
            golden,
            name=name,
            network=NetworkRecord(spec.to_dict(), spec.digest, weights_sha256, "random", "none"),
            engine=engine_record,
        )
        roles = {"engine.onnx": "engine", "reference.onnx": "graph", "golden.png": "golden"}
        writer.commit(manifest, roles)
    return directory / name


def report_schema() -> dict[str, Any]:
    """The published JSON Schema of a benchmark report."""
    path = files("edgehp.benchmark") / "benchmark-report.schema.json"
    schema: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return schema
