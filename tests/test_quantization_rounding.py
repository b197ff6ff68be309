"""Joint rounding, the exact picture, and weights fitted layer by layer."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest

from edgehp.networks.graph import build_graph
from edgehp.pipeline.sensitivity import _choices
from edgehp.quantization.calibrate import calibrate, with_outputs
from edgehp.quantization.exact_input import with_exact_input
from edgehp.quantization.lint import lint
from edgehp.quantization.qdq import Recipe, quantise_weight, weight_scales
from edgehp.quantization.quantise import AUTO, emit, quantise
from edgehp.quantization.reconstruct import reconstruct
from edgehp.quantization.rounding import Moments, round_jointly
from edgehp.quantization.runner import Runner
from edgehp.quantization.select import Judge
from edgehp.quantization.table import CalibrationTable
from tests.helpers import random_crops, random_network
from tests.quantization_graphs import SIZE, node_of, rtx_plan, small_network

FLAVOURS = ("cpu", "tensorrt")


@pytest.fixture(scope="module")
def network() -> onnx.ModelProto:
    return build_graph(*random_network(size=32))


@pytest.fixture(scope="module")
def table(network: onnx.ModelProto) -> CalibrationTable:
    return calibrate(network, random_crops(12, 32), threads=1)


def test_joint_rounding_leaves_less_error_than_rounding_to_nearest(
    rng: np.random.Generator,
) -> None:
    mixing = rng.normal(size=(40, 40)) * np.geomspace(1, 0.01, 40)[:, None]
    x = (rng.normal(size=(2000, 40)) @ mixing + rng.normal(size=40)).astype(np.float32)
    weight = rng.normal(size=(8, 40)).astype(np.float32)
    wanted = x @ weight.T
    scales = weight_scales(weight) * 8  # coarse, so that the grid matters
    moments = Moments(40)
    for part in np.array_split(x, 7):
        moments.update(part)
    q, found = round_jointly(weight, scales, moments, damping=1e-4)
    assert q.dtype == np.int8
    assert np.abs(q.astype(int)).max() <= 127

    def error(integers: np.ndarray, offset: np.ndarray) -> float:
        answer = x @ (integers * scales[:, None]).T + offset
        return float(np.mean((answer - wanted) ** 2))

    nearest = quantise_weight(weight, scales)
    assert error(q, found) < 0.3 * error(nearest, np.zeros(8))
    np.testing.assert_allclose(found, (wanted - x @ (q * scales[:, None]).T).mean(0), atol=1e-3)


def test_where_the_samples_say_nothing_the_weights_stay(rng: np.random.Generator) -> None:
    weight = rng.normal(size=(4, 6)).astype(np.float32)
    scales = weight_scales(weight)
    moments = Moments(6)
    x = np.zeros((50, 6), np.float32)
    x[:, 0] = rng.normal(size=50)
    moments.update(x)
    q, _ = round_jointly(weight, scales, moments)
    np.testing.assert_array_equal(q, quantise_weight(weight, scales))


@pytest.mark.parametrize(("flavour", "grid"), [("cpu", "uint8"), ("tensorrt", "int8")])
def test_the_picture_is_quantised_without_error(
    network: onnx.ModelProto, table: CalibrationTable, flavour: str, grid: str
) -> None:
    crops = random_crops(4, 32, seed=9)
    exact, more = with_exact_input(network, table, grid)
    onnx.checker.check_model(exact, full_check=True)
    for a, b in zip(
        Runner(network, threads=1)(crops), Runner(exact, threads=1)(crops), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=0.25)
    assert set(more.tensors) - set(table.tensors) == {"shifted"}
    graph = emit(network, table, Recipe("mse", exact_input=True), flavour=flavour)
    assert lint(graph, flavour, head=flavour == "cpu") == ()
    names = [node_of(graph, "conv1").input[0], "shifted"]
    after, before = Runner(with_outputs(graph, names), names, threads=1)(crops)
    np.testing.assert_array_equal(after, before)
    inside = before[:, :, 3:-3, 3:-3] + (128 if grid == "int8" else 0)
    np.testing.assert_array_equal(inside, crops.transpose(0, 3, 1, 2))


@pytest.mark.parametrize("body", ["fp32", "fp16"])
def test_the_full_stem_has_half_the_step_and_the_same_answer(
    network: onnx.ModelProto, table: CalibrationTable, body: str
) -> None:
    crops = random_crops(6, 32, seed=11)
    graphs = [
        emit(network, table, Recipe("minmax", full_stem=f), flavour="tensorrt", body=body)
        for f in (False, True)
    ]
    assert not [n for n in graphs[1].graph.node if n.name == "relu"]
    truth = Runner(with_outputs(network, ["maxpool"]), ["maxpool"], threads=1)(crops)[0]
    rms = []
    for graph in graphs:
        tensor = node_of(graph, "layer1.0.add").input[1]
        names = [tensor if ".dq" in tensor else node_of(graph, "layer1.0.add").input[0]]
        got = Runner(with_outputs(graph, names), names, threads=1)(crops)[0]
        got = got - got.min()  # the shift of the full stem
        rms.append(float(np.sqrt(np.mean((got - truth) ** 2))))
    assert rms[1] < 0.75 * rms[0]
    judge = Judge(network, crops, threads=1)
    assert judge(graphs[1]).angles < 1.2 * judge(graphs[0]).angles + 0.2


def test_a_float_layer_in_the_stem_leaves_it_as_it_is(
    network: onnx.ModelProto, table: CalibrationTable
) -> None:
    kept = frozenset({"layer1.0.conv1"})
    plain, full = (
        emit(network, table, Recipe("mse", keep_float=kept, full_stem=f), flavour="tensorrt")
        for f in (False, True)
    )
    assert plain.SerializeToString() == full.SerializeToString()


@pytest.mark.parametrize("body", ["fp32", "fp16"])
def test_tensorrt_rtx_builds_the_exact_picture_and_the_full_stem(
    network: onnx.ModelProto, table: CalibrationTable, body: str
) -> None:
    recipe = Recipe("mse", exact_input=True, full_stem=True)
    model = emit(network, table, recipe, flavour="tensorrt", body=body)
    assert lint(model, "tensorrt") == ()
    assert rtx_plan(model) > 1000


def test_a_graph_that_begins_otherwise_is_left_alone() -> None:
    other = small_network()
    seen = calibrate(other, random_crops(4, SIZE), threads=1)
    assert with_exact_input(other, seen, "int8") == (other, seen)


@pytest.mark.parametrize("body", ["cpu", "tensorrt", "tensorrt-fp16"])
def test_fitted_weights_are_nearer_to_fp32_on_other_crops(body: str) -> None:
    flavour, _, half = body.partition("-")
    network = small_network()
    crops = random_crops(96, SIZE, seed=5)
    seen = calibrate(network, crops[:32], threads=1)
    emitter = partial(emit, network, seen, flavour=flavour, body=half or "fp32")
    recipe = Recipe("minmax", keep_float=frozenset({"a.conv1"}))
    fitted = reconstruct(network, emitter, recipe, list(crops[:64]), threads=1)
    assert "a.conv1" not in fitted.weights
    assert {"conv1", "a.conv2", "b.downsample"} <= set(fitted.weights)
    judge = Judge(network, crops[64:], threads=1)
    assert judge(emitter(fitted)).angles < 0.9 * judge(emitter(recipe)).angles
    once_more = reconstruct(network, emitter, recipe, list(crops[:64]), threads=1)
    for name, values in fitted.weights.items():
        np.testing.assert_array_equal(values, once_more.weights[name])


def test_rounding_is_recorded_and_can_be_asked_for() -> None:
    network = small_network()
    crops = random_crops(40, SIZE, seed=6)
    asked = quantise(network, crops, flavour="cpu", method="mse", rounding=True, threads=1)
    assert asked.chosen == "mse+exact+rounded"
    assert asked.recipe.weights
    assert asked.recipe.exact_input
    plain = quantise(network, crops, flavour="cpu", method="mse", table=asked.table, threads=1)
    assert not plain.recipe.weights
    redone = emit(asked.source, asked.source_table, asked.recipe, flavour="cpu")
    assert redone.SerializeToString() == asked.model.SerializeToString()


@pytest.mark.parametrize("flavour", ["cpu", "tensorrt"])
def test_every_choice_can_be_repeated_from_its_name(flavour: str) -> None:
    """``edgehp sensitivity`` quantises again by the name that the artifact's manifest holds."""
    network = small_network()
    crops = random_crops(40, SIZE, seed=6)
    found = quantise(network, crops, flavour=flavour, threads=1)
    names = [*found.scores, "mse+exact", "mse+equal0.5+exact+full", "mse+exact+full+rounded"]
    for name in names:
        method, options = _choices(name, Path("artifact"))
        assert method in (name.split("+")[0], AUTO)
        assert options.get("rounding", False) == ("rounded" in name)
    method, options = _choices(found.chosen, Path("artifact"))
    again = quantise(
        network, crops, flavour=flavour, method=method, table=found.table, threads=1, **options
    )
    assert again.chosen == found.chosen
    assert again.model.SerializeToString() == found.model.SerializeToString()
