"""Small deterministic parts that several tests share."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from msgspec.structs import replace

from edgehp.artifact.manifest import (
    BuildRecord,
    EngineRecord,
    Golden,
    Manifest,
    NetworkRecord,
    PrecisionRecord,
    TargetRecord,
)
from edgehp.networks.graph import INPUT, build_graph, graph_bytes
from edgehp.networks.layout import ANGLES, Weights, expected_shapes, heads_prefix
from edgehp.networks.spec import EHPNET, KD_RESNET, NetworkSpec

_SPECS = {"kd-resnet18": KD_RESNET, "ehpnet": EHPNET}


def random_network(
    name: str = "kd-resnet18", size: int | None = None, seed: int = 0
) -> tuple[Weights, NetworkSpec]:
    """Weights and specification of an untrained network whose answer varies over crops.

    Convolutions are He-initialised; the batch normalisation's statistics and scales are random
    about those values that keep activations near unit size through the depth, so that folding
    them wrongly shows; the heads give Gaussians over the bins, as trained ones do, whose centres
    differ over `random_crops` with a standard deviation of about 20 degrees.

    Args:
        name: ``kd-resnet18``, any other ``kd-resnetNN``, or ``ehpnet``.
        size: input size in pixels; None keeps the network's own.
        seed: of everything random.
    """
    if name in _SPECS:
        spec = _SPECS[name]
    else:
        spec = replace(KD_RESNET, name=name, depth=int(name.removeprefix("kd-resnet")))
    if size is not None:
        spec = spec.with_size(size)
    rng = np.random.default_rng(seed)
    weights = {k: _values(rng, k, s) for k, s in expected_shapes(spec).items()}
    features = _features(weights, spec)
    # The directions in which the features of crops differ, most telling first.
    directions = np.linalg.svd(features - features.mean(0), full_matrices=False)[2]
    for i, angle in enumerate(ANGLES):
        u = directions[i] * 20.0 / (features @ directions[i]).std()
        name = f"{heads_prefix(spec)}{angle}"
        _gaussian_head(rng, weights, name, spec.bins.values, u, features.mean(0))
    return weights, spec


def _features(weights: Weights, spec: NetworkSpec) -> npt.NDArray[np.float64]:
    """What reaches the heads for 24 crops: [24, width]."""
    model = build_graph(weights, spec)
    name = next(n.input[0] for n in model.graph.node if n.name == "heads")
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        graph_bytes(model), options, providers=["CPUExecutionProvider"]
    )
    crops = random_crops(24, spec.preprocessing.size, seed=12345)
    out = session.run([name], {INPUT: crops})[0]
    return np.asarray(out, np.float64)


def _gaussian_head(
    rng: np.random.Generator,
    weights: Weights,
    name: str,
    values: npt.NDArray[np.float64],
    u: npt.NDArray[np.float64],
    mean: npt.NDArray[np.float64],
) -> None:
    """Logits -(v - u (f - mean))^2 / 2 sigma^2, up to what softmax cancels, and some noise."""
    # Wide enough for the logits to stay within +-100, where single precision resolves angles
    # far better than the 0.001 degrees that tests ask for.
    sigma = 10.0
    weight = values[:, None] * u / sigma**2
    # Without noise every crop would have the spread sigma.
    weight += rng.normal(0, 1, weight.shape) * np.linalg.norm(u) / 40
    bias = -(values**2) / (2 * sigma**2) - weight @ mean
    weights[f"{name}.weight"] = weight.astype(np.float32)
    weights[f"{name}.bias"] = bias.astype(np.float32)


def _values(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    if len(shape) == 4:
        fan_in = int(np.prod(shape[1:]))
        out = rng.normal(0, np.sqrt(2 / fan_in), shape)
    elif len(shape) == 2:
        out = rng.normal(0, 3 / np.sqrt(shape[1]), shape)
    elif name.endswith("running_var"):
        out = rng.uniform(0.5, 2.0, shape)
    elif name.endswith(".weight"):
        # The last normalisation of a block is kept small, or the residual sums would grow.
        last = ".bn2." in name or ".bn3." in name
        out = rng.uniform(0.2, 0.6, shape) if last else rng.uniform(0.6, 1.4, shape)
    else:
        out = rng.normal(0, 0.2, shape)
    return out.astype(np.float32)


def random_crops(count: int, size: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Smooth coloured pictures uint8 [count, size, size, 3] that differ much from each other."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 255, (count, 8, 8, 3))
    index = np.minimum(np.arange(size) * 8 // size, 7)
    smooth = coarse[:, index][:, :, index]
    noisy = smooth + rng.normal(0, 15, smooth.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8)


def a_manifest(spec: NetworkSpec, golden: Golden, **changes: Any) -> Manifest:
    """The manifest of a complete FP32 artifact for the processor; its files are not listed yet."""
    values = {
        "state": "complete",
        "name": "small-cpu-fp32",
        "created": "2026-01-02T03:04:05Z",
        "edgehp_version": "0",
        "network": NetworkRecord(spec.to_dict(), spec.digest, "a" * 64, "random", "none"),
        "preprocessing": spec.preprocessing,
        "target": TargetRecord("cpu"),
        "precision": PrecisionRecord("fp32", "fp32", "compiled model", {"fp32": 1}, ()),
        "engine": EngineRecord("openvino", ("engine.onnx",), {"openvino": "1"}, 1, 1, 8, "x86_64"),
        "graph": "engine.onnx",
        "calibration": None,
        "accuracy": None,
        "golden": golden,
        "build": BuildRecord({}, (), ()),
        "files": (),
    }
    return Manifest(**{**values, **changes})
