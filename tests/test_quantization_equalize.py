"""Channels of unequal size between depthwise convolutions, and what INT8 makes of them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from edgehp.quantization.compare import Comparison
from edgehp.quantization.equalize import equalize
from edgehp.quantization.graph import GraphView
from edgehp.quantization.qdq import Emitter
from edgehp.quantization.rounding import round_layers
from edgehp.quantization.table import calibrate
from tests.helpers import random_crops
from tests.quantization_graphs import SIZE, Draft, small_network

CROPS = random_crops(24, SIZE)


@pytest.fixture(scope="module")
def network() -> onnx.ModelProto:
    """A separable network whose channels differ by a factor of a hundred."""
    rng = np.random.default_rng(3)
    draft = Draft()
    node, constant = draft.node, draft.constant

    def conv(name: str, x: str, cin: int, k: int, uneven: np.ndarray, group: int = 1) -> str:
        w = rng.normal(0, np.sqrt(2 / (cin * k * k)), (32, cin, k, k))
        given = (
            constant(f"{name}.weight", w * uneven.reshape(-1, 1, 1, 1)),
            constant(f"{name}.bias", rng.normal(0, 0.2, 32) * uneven),
        )
        return node("Conv", name, x, *given, pads=[k // 2] * 4, group=group)

    sizes = np.geomspace(1, 0.01, 32)
    x = node("Relu", "relu0", conv("first", draft.normalised(), 3, 3, sizes))
    x = node("Relu", "relu1", conv("depthwise", x, 1, 3, rng.permutation(1 / sizes), group=32))
    x = node("Relu", "relu2", conv("pointwise", x, 32, 1, np.ones(32)))
    x = node("Flatten", "features", node("GlobalAveragePool", "pooled", x), axis=1)
    head = constant("head.weight", rng.normal(0, 2, (3, 32)))
    node("Gemm", "angles", x, head, constant("head.bias", np.zeros(3)), transB=1)
    return draft.model("angles")


def test_the_network_is_the_same_and_its_int8_nearer(network: onnx.ModelProto) -> None:
    made = equalize(network, CROPS, threads=1)
    onnx.checker.check_model(made, full_check=True)
    compare = Comparison(network, random_crops(12, SIZE, seed=9), threads=1)
    scale = float(np.abs(compare.outputs(network)[0]).mean())
    assert compare(made).angles < 1e-5 * scale
    before, after = (
        compare(Emitter(m, "cpu")(calibrate(m, CROPS, threads=1), "minmax")).angles
        for m in (network, made)
    )
    assert after < 0.8 * before
    sizes = np.abs(GraphView(made).array("first.weight")).max((1, 2, 3))
    assert sizes.max() / sizes.min() < 10  # a factor of a hundred before


def test_a_network_without_depthwise_convolutions_is_left_alone() -> None:
    network = small_network()
    assert equalize(network, CROPS) is network


def test_depthwise_weights_are_rounded_jointly_too(network: onnx.ModelProto) -> None:
    table = calibrate(network, CROPS, threads=1)
    emitter = Emitter(network, "cpu")
    rounded = round_layers(emitter, table, "minmax", CROPS, threads=1)
    assert set(rounded) == {"first", "depthwise", "pointwise"}
    weight = emitter.weight("depthwise")
    assert rounded["depthwise"].weight.shape == weight.shape
    compare = Comparison(network, random_crops(12, SIZE, seed=9), threads=1)
    nearest, joint = (compare(emitter(table, "minmax", r)) for r in (None, rounded))
    assert joint.angles < nearest.angles
