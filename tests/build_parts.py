"""What the build tests share: networks on disk, zips of pictures, and a request that is quick."""

from __future__ import annotations

import csv
import io
import zipfile
from pathlib import Path

import cv2
import numpy as np
import onnx
from msgspec.structs import replace
from onnx import numpy_helper

from edgehp.networks.checkpoint import save_weights
from edgehp.networks.graph import DIGEST_KEY, graph_bytes
from edgehp.networks.spec import KD_RESNET, SPEC_KEY
from edgehp.pipeline.plan import BuildRequest
from tests import helpers, quantization_graphs
from tests.quantization_graphs import constant_of, node_of, set_constant

SIZE = 64
# Of the small network, which is built, searched and measured many times in a test.
SPEC = replace(KD_RESNET, name="small").with_size(quantization_graphs.SIZE)
CONVOLUTIONS = 6
# An untrained network makes no accuracy; what is tested is that it is measured and recorded.
ANYTHING = 90.0


def checkpoint(path: Path, size: int = SIZE, seed: int = 3) -> Path:
    """A random ResNet18 for crops of `size` pixels."""
    weights, spec = helpers.random_network(size=size, seed=seed)
    save_weights(path, weights, spec)
    return path


def small_graph(path: Path) -> Path:
    """The small network as a deployed graph file that `edgehp build --network` takes."""
    model = quantization_graphs.small_network()
    # The factor of the normalisation goes into the weights, as edgehp's own graphs have it.
    conv1, factor = node_of(model, "conv1"), node_of(model, "normalised")
    weight = numpy_helper.to_array(constant_of(model, "conv1.weight")) / np.float32(58)
    set_constant(model, "conv1.weight", weight.astype(np.float32))
    # One mean for all channels OpenVINO would fold, and compute the convolution in FP32.
    mean = np.array([124, 116, 104], np.float32).reshape(1, 3, 1, 1)
    set_constant(model, "mean", mean)
    conv1.input[0] = factor.input[0]
    model.graph.node.remove(factor)
    model.graph.initializer.remove(constant_of(model, "factor"))
    model.metadata_props.add(key=SPEC_KEY, value=SPEC.to_json())
    model.metadata_props.add(key=DIGEST_KEY, value=SPEC.digest)
    path.write_bytes(graph_bytes(model))
    return path


def small_request(folder: Path) -> BuildRequest:
    """The small network's INT8 build for the processor, whose files lie in `folder`.

    They are network, calibration crops, held-out crops with and without labels, near-black crops.
    """
    size = SPEC.preprocessing.size
    faces(folder / "bare.zip", 64, 2, size=size)
    faces(folder / "black.zip", 66, 3, size=size, gain=0.04)
    return BuildRequest(
        target="cpu",
        network=str(small_graph(folder / "small.onnx")),
        calibration=faces(folder / "cal.zip", 66, 1, size=size),
        calibration_method="minmax",
        validate_on=faces(folder / "val.zip", 64, 2, labels=True, size=size),
        max_drop=ANYTHING,
        output=folder / "dist",
        threads=1,
    )


def convolutions_in_float(path: Path) -> set[str]:
    """Names of a Q/DQ graph's convolutions whose input or weight is not dequantised."""
    graph = onnx.load(str(path)).graph
    made = {o for n in graph.node if n.op_type == "DequantizeLinear" for o in n.output}
    return {n.name for n in graph.node if n.op_type == "Conv" and not set(n.input[:2]) <= made}


def faces(
    path: Path,
    count: int,
    seed: int,
    *,
    labels: bool = False,
    size: int = SIZE,
    gain: float = 1.0,
) -> Path:
    """A zip of `count` pictures, darker by `gain`, with random labels if asked for."""
    crops = (helpers.random_crops(count, size, seed) * gain).astype(np.uint8)
    rng = np.random.default_rng(seed)
    with zipfile.ZipFile(path, "w") as archive:
        rows = []
        for i, crop in enumerate(crops):
            name = f"{path.stem}/{i:05d}.png"
            archive.writestr(name, cv2.imencode(".png", crop[..., ::-1])[1].tobytes())
            pitch, yaw, roll = rng.uniform(-40, 40, 3).round(2)
            rows.append((name, size, size, 0, 0, size, size, pitch, yaw, roll))
        if labels:
            text = io.StringIO()
            writer = csv.writer(text)
            corners = ("x_min", "y_min", "x_max", "y_max")
            writer.writerow(("image", "width", "height", *corners, "pitch", "yaw", "roll"))
            writer.writerows(rows)
            archive.writestr(f"{path.stem}/boxes.csv", text.getvalue())
    return path
