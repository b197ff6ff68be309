"""Sensitivity and predicted times on a small network; the search where the best is known."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from edgehp.errors import AccuracyError, UsageError
from edgehp.pipeline.mixed import rank_layers, shortest_prefix
from edgehp.pipeline.sensitivity import (
    LatencyModel,
    LayerSensitivity,
    Sensitivity,
    count_work,
    measure_sensitivity,
    predict_latency,
)
from edgehp.quantization.compare import Difference
from edgehp.quantization.qdq import Emitter, RoundedLayer, quantized_layers
from edgehp.quantization.table import calibrate
from edgehp.targets import load_target
from tests.helpers import random_crops
from tests.quantization_graphs import BINS, SIZE, node_of, small_network


def difference(angles: float) -> Difference:
    return Difference(angles, angles / 2, angles * 4, (0.0, 0.0, 0.0))


def ranked(errors: dict[str, float], costs: dict[str, float]) -> list[str]:
    """The ranking of layers whose errors add up."""
    rows = [LayerSensitivity(n, difference(e), difference(0), e) for n, e in errors.items()]
    sensitivity = Sensitivity(difference(sum(errors.values())), tuple(rows))
    floats = {n: 1.0 + c for n, c in costs.items()}
    return rank_layers(sensitivity, LatencyModel(dict.fromkeys(errors, 1.0), floats, "test"))


def test_the_search_is_near_the_best_assignment(rng: np.random.Generator) -> None:
    for _ in range(30):
        names = [f"l{i}" for i in range(8)]
        errors = dict(zip(names, rng.gamma(0.5, 1, 8), strict=True))
        costs = dict(zip(names, rng.uniform(0.1, 1, 8), strict=True))
        total = sum(errors.values())
        limit = float(rng.uniform(0.1, 0.9)) * total
        found = shortest_prefix(
            ranked(errors, costs),
            lambda kept, e=errors, t=total: (t - sum(e[n] for n in kept), kept),
            limit,
        )
        assert found.drop <= limit
        assert found.evaluations <= 5
        fits = [
            sum(costs[n] for n in kept)
            for k in range(9)
            for kept in itertools.combinations(names, k)
            if total - sum(errors[n] for n in kept) <= limit
        ]
        # Greedy against a knapsack: at most one layer worse.
        assert sum(costs[n] for n in found.float_layers) <= min(fits) + max(costs.values())


def test_a_layer_that_int8_does_not_speed_up_goes_back_first() -> None:
    assert ranked({"a": 0.5, "b": 0.1}, {"a": 1.0, "b": -0.1}) == ["b", "a"]


def test_an_unreachable_limit_is_an_accuracy_error() -> None:
    with pytest.raises(AccuracyError, match=r"within 0\.1 .* 2 layers .* 0\.5000") as e:
        shortest_prefix(["a", "b"], lambda kept: (0.5, kept), 0.1)
    assert e.value.exit_code == 3


@pytest.mark.parametrize("flavor", ["cpu", "tensorrt"])
def test_the_table_points_at_a_ruined_layer(flavor: str) -> None:
    network, crops = small_network(), random_crops(6, SIZE)
    table = calibrate(network, crops, threads=1)
    zeros = RoundedLayer(np.zeros((32, 32, 3, 3), np.int8), np.zeros(32, np.float32))
    model = Emitter(network, flavor)(table, "minmax", {"b.conv2": zeros})
    found = measure_sensitivity(model, network, np.stack(crops), threads=1)
    assert tuple(s.layer for s in found.layers) == quantized_layers(model)
    worst = max(found.layers, key=lambda s: s.gain)
    assert worst.layer == "b.conv2"
    assert worst.left_out.angles < 0.5 * found.full.angles
    for s in found.layers:
        assert np.isfinite([s.alone.angles, s.alone.spread, s.left_out.angles]).all()
        assert s.gain == pytest.approx(found.full.angles - s.left_out.angles)


def test_layers_that_cannot_be_compared_are_refused() -> None:
    network = small_network()
    with pytest.raises(UsageError, match="at least two"):
        measure_sensitivity(network, network, np.stack(random_crops(1, SIZE)), threads=1)


@pytest.mark.parametrize(("target", "width"), [("cpu", 4), ("orin-nano-8gb", 2)])
def test_the_roofline_takes_the_longer_of_operations_and_bytes(target: str, width: int) -> None:
    network, found = small_network(), load_target(target)
    table = calibrate(network, random_crops(4, SIZE), threads=1)
    model = Emitter(network, found.flavor)(table, "minmax")
    latency = predict_latency(model, network, found, batch=4)
    assert set(latency.integer_ms) == set(latency.float_ms) == set(quantized_layers(model))
    assert "at batch 4, not measured" in latency.source
    tops, bandwidth = 0.384e12, 10e9
    if target != "cpu":
        peaks = next(p for p in found.power_modes if f"roofline of {p.name} at" in latency.source)
        assert peaks.bandwidth_gb_s is not None
        tops, bandwidth = peaks.int8_tops * 1e12, peaks.bandwidth_gb_s * 1e9
    half = SIZE // 2
    work = {
        # operations, weights, elements read and written, counted by hand
        "conv1": (2 * 16 * 3 * 9 * half * half, 16 * 3 * 9, 3 * SIZE**2 + 16 * half**2),
        "a.add": (16 * half * half, 0, 3 * 16 * half * half),
        "maxpool": (16 * half * half, 0, 2 * 16 * half * half),
    }
    if target == "cpu":
        work["heads"] = (2 * 32 * 3 * BINS, 32 * 3 * BINS, 32 + 3 * BINS)
    for name, (operations, weights, activations) in work.items():
        # Weights are read once for a whole batch.
        moved = weights + 4 * activations
        expected = 1e3 * max(4 * operations / tops, moved / bandwidth)
        assert latency.integer_ms[name] == pytest.approx(expected)
        assert latency.float_ms[name] >= 1e3 * width * moved / bandwidth * (1 - 1e-9)


def computed_reshape(*, opaque: bool) -> onnx.ModelProto:
    """The small network with `features` as older exporters write `x.view(x.size(0), -1)`.

    Args:
        opaque: take the batch through an operator whose value ONNX's inference does not follow.
    """
    model = small_network()
    features = node_of(model, "features")
    features.op_type = "Reshape"
    del features.attribute[:]
    features.input.append("view")
    n, row = helper.make_node, "count" if opaque else "row"
    added = [
        n("Shape", ["avgpool"], ["size"], name="size"),
        n("Gather", ["size", "first"], ["rows"], name="rows", axis=0),
        n("Unsqueeze", ["rows", "front"], ["row"], name="row"),
        n("ReduceMax", ["row"], ["count"], name="count", axes=[0], keepdims=1),
        n("Concat", [row, "rest"], ["view"], name="view", axis=0),
    ]
    nodes = [*model.graph.node]
    at = nodes.index(features)
    del model.graph.node[:]
    model.graph.node.extend([*nodes[:at], *added, *nodes[at:]])
    for name, value in (("first", 0), ("front", [0]), ("rest", [-1])):
        model.graph.initializer.append(numpy_helper.from_array(np.array(value, np.int64), name))
    onnx.checker.check_model(model)
    return model


def test_layers_behind_a_computed_shape_are_counted() -> None:
    plain, computed = count_work(small_network()), count_work(computed_reshape(opaque=False))
    # The Reshape itself reads its shape besides.
    del plain["features"]
    assert {name: computed[name] for name in plain} == plain


@pytest.mark.parametrize("opaque", [False, True])
def test_a_network_with_a_computed_shape_has_its_table(opaque: bool) -> None:
    network, crops = computed_reshape(opaque=opaque), random_crops(4, SIZE)
    model = Emitter(network, "cpu")(calibrate(network, crops, threads=1), "minmax")
    latency = predict_latency(model, network, load_target("cpu"), batch=1)
    assert set(latency.integer_ms) == set(quantized_layers(model))
    # The weight of the last layer is known even where its input's shape is not.
    assert latency.float_ms["heads"] > latency.integer_ms["heads"] > 0
    assert ("shapes are unknown: heads" in latency.source) is opaque
    if opaque:
        found = measure_sensitivity(model, network, np.stack(crops), threads=1)
        assert "heads" in rank_layers(found, latency)


def test_products_of_two_activations_are_counted() -> None:
    n = helper.make_node
    graph = helper.make_graph(
        [n("Transpose", ["x"], ["t"], perm=[0, 2, 1]), n("MatMul", ["x", "t"], ["y"], name="y")],
        "products",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", 5, 7])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch", 5, 5])],
    )
    work = count_work(helper.make_model(graph))["y"]
    assert (work.operations, work.weights) == (2 * 5 * 7 * 5, 0)
    assert work.activations == 2 * 5 * 7 + 5 * 5
