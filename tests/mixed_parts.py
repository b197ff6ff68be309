"""A network small enough to be built, searched and measured many times in a test."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from edgehp.networks.graph import DIGEST_KEY, graph_bytes
from edgehp.networks.spec import KD_RESNET, SPEC_KEY
from tests import build_parts
from tests.quantization_graphs import SIZE, constant_of, node_of, set_constant, small_network

SPEC = replace(KD_RESNET, name="small").with_size(SIZE)
CONVOLUTIONS = 6


def small_graph(path: Path) -> Path:
    """The small network as a deployed graph file that `edgehp build --network` takes."""
    model = small_network()
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


def small_parts(folder: Path) -> Path:
    """Network, calibration crops, held-out crops with and without labels, near-black crops."""
    small_graph(folder / "small.onnx")
    build_parts.faces(folder / "cal.zip", 66, 1, size=SIZE)
    build_parts.faces(folder / "val.zip", 64, 2, labels=True, size=SIZE)
    build_parts.faces(folder / "bare.zip", 64, 2, size=SIZE)
    build_parts.faces(folder / "black.zip", 66, 3, size=SIZE, gain=0.04)
    return folder


def convolutions_in_float(path: Path) -> set[str]:
    """Names of a Q/DQ graph's convolutions whose input or weight is not dequantised."""
    graph = onnx.load(str(path)).graph
    made = {o for n in graph.node if n.op_type == "DequantizeLinear" for o in n.output}
    return {n.name for n in graph.node if n.op_type == "Conv" and not set(n.input[:2]) <= made}
