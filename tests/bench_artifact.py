"""A small real artifact on the processor, for tests of the benchmark and its reports."""

from __future__ import annotations

import hashlib
import tempfile
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from edgehp.artifact.manifest import EngineRecord, Golden, NetworkRecord
from edgehp.artifact.write import ArtifactWriter
from edgehp.engines.openvino import OpenVinoEngine
from edgehp.networks.graph import build_graph, graph_bytes
from edgehp.networks.spec import NetworkSpec
from tests.helpers import a_manifest, random_crops, random_network
from tests.pose_graphs import SPEC, pose_graph

GOLDEN = 4


@cache
def _network(
    size: int, small: bool
) -> tuple[NetworkSpec, bytes, npt.NDArray[np.uint8], Golden, str]:
    """An untrained network, its graph, crops with their answers, and the version of OpenVINO."""
    crops = random_crops(GOLDEN, size)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "engine.onnx"
        if small:
            spec = SPEC.with_size(size)
            pose_graph(path, size=size)
        else:
            weights, spec = random_network(size=size)
            path.write_bytes(graph_bytes(build_graph(weights, spec)))
        graph = path.read_bytes()
        with OpenVinoEngine(path, threads=1) as engine:
            answer, version = engine.infer(crops), engine.info.version
    golden = Golden(
        "golden.png",
        tuple(tuple(map(float, a)) for a in answer.angles),  # type: ignore[misc]
        tuple(tuple(map(float, s)) for s in answer.spread),  # type: ignore[misc]
        0.5,
    )
    return spec, graph, crops, golden, version


def make_artifact(
    directory: Path, size: int = 32, name: str = "random-cpu-fp32", *, small: bool = False
) -> Path:
    """An FP32 artifact of an untrained network with its reference graph, under `directory`.

    A small one reads the pose from the colour instead, and has kilobytes.
    """
    spec, graph, crops, golden, version = _network(size, small)
    with ArtifactWriter(directory / name) as writer:
        (writer.path / "engine.onnx").write_bytes(graph)
        (writer.path / "reference.onnx").write_bytes(graph)
        # PNG is lossless; OpenCV writes BGR.
        picture = np.ascontiguousarray(crops.reshape(GOLDEN * size, size, 3)[..., ::-1])
        cv2.imwrite(str(writer.path / "golden.png"), picture)
        engine = EngineRecord(
            "openvino", ("engine.onnx",), {"openvino": version}, 1, 1, 8, "x86_64"
        )
        weights_sha256 = hashlib.sha256(graph).hexdigest()
        network = NetworkRecord(spec.to_dict(), spec.digest, weights_sha256, "random", "none")
        roles = {"engine.onnx": "engine", "reference.onnx": "graph", "golden.png": "golden"}
        writer.commit(a_manifest(spec, golden, name=name, network=network, engine=engine), roles)
    return directory / name
