"""The whole quantization: ranges and rounding chosen by measurement, and repeated from a recipe."""

from __future__ import annotations

import msgspec
import numpy as np
import onnx
import pytest

from edgehp.errors import DataError, UsageError
from edgehp.quantization.compare import Comparison, split_crops
from edgehp.quantization.placement import observed_tensors
from edgehp.quantization.quantize import QuantizationConfig, quantize
from edgehp.quantization.ranges import METHODS
from edgehp.quantization.recipe import Recipe
from edgehp.quantization.table import CalibrationTable, CropsDigest, calibrate
from tests.helpers import random_crops
from tests.quantization_graphs import SIZE, small_network

CROPS = random_crops(7, SIZE)


@pytest.fixture(scope="module")
def network() -> onnx.ModelProto:
    return small_network()


@pytest.fixture(scope="module")
def table(network: onnx.ModelProto) -> CalibrationTable:
    return calibrate(network, CROPS, threads=1)


@pytest.mark.parametrize(("flavor", "body"), [("cpu", "fp32"), ("tensorrt", "fp16")])
def test_the_nearest_candidate_wins_and_its_recipe_repeats_it(
    network: onnx.ModelProto, flavor: str, body: str
) -> None:
    crops = random_crops(40, SIZE, seed=6)
    made = quantize(network, crops, QuantizationConfig(flavor, body=body, threads=1))
    tried = {(c.recipe.method, c.recipe.rounding): c.difference for c in made.candidates}
    assert {m for m, r in tried if r == "nearest"} == set(METHODS)
    assert [r for _, r in tried].count("joint") == 1
    assert made.difference.angles == min(d.angles for d in tried.values())
    _, held = split_crops(crops)
    assert made.held_back == len(held) == 8
    comparison = Comparison(network, crops[held], threads=1)
    assert comparison(made.model) == made.difference
    # The recipe survives JSON and gives the same graph again.
    recipe = msgspec.json.decode(msgspec.json.encode(made.recipe), type=Recipe)
    assert recipe == made.recipe
    again = quantize(network, crops, QuantizationConfig.of(recipe, threads=1))
    assert again.model == made.model
    assert again.recipe == made.recipe


def test_what_is_asked_for_is_done(network: onnx.ModelProto) -> None:
    crops = random_crops(20, SIZE, seed=3)
    config = QuantizationConfig("cpu", "mse", rounding=False, float_layers=("a.conv1",), threads=1)
    made = quantize(network, crops, config)
    assert [str(c.recipe) for c in made.candidates] == ["mse"]
    assert made.recipe.float_layers == ("a.conv1",)
    joint = quantize(network, crops, QuantizationConfig("cpu", "mse", rounding=True, threads=1))
    assert str(joint.recipe) == "mse, joint rounding"


def test_the_split_does_not_depend_on_the_order(rng: np.random.Generator) -> None:
    crops = random_crops(30, SIZE)
    chosen, held = split_crops(crops)
    assert not set(chosen) & set(held)
    order = rng.permutation(30)
    _, other = split_crops(crops[order])
    assert {order[i] for i in other} == set(held)


def test_the_table_is_of_the_tensors_and_survives_json(
    table: CalibrationTable, network: onnx.ModelProto
) -> None:
    again = msgspec.json.decode(table.to_json(), type=CalibrationTable)
    assert again.to_json() == table.to_json()
    assert set(again.tensors) == set(observed_tensors(network))
    x = (CROPS.transpose(0, 3, 1, 2).astype(np.float32) - 120) / 58
    seen = table.tensors["normalised"]
    assert seen.minimum == pytest.approx(x.min(), rel=1e-6)
    assert seen.maximum == pytest.approx(x.max(), rel=1e-6)
    assert table.tensors["relu"].minimum == 0
    assert calibrate(network, iter(CROPS), threads=1).to_json() == table.to_json()
    small = calibrate(network, CROPS[:1], methods=("minmax",), threads=1)
    with pytest.raises(UsageError, match="no mse range of relu"):
        small.range_of("relu", "mse", "int8")


def test_the_digest_of_crops_notices_an_order_and_a_pixel() -> None:
    pixel = CROPS.copy()
    pixel[0, 0, 0, 0] ^= 1
    found = set()
    for crops in (CROPS, CROPS[::-1], pixel, CROPS[:-1]):
        digest = CropsDigest()
        for crop in crops:
            digest.update(crop)
        found.add(digest.hexdigest())
    assert len(found) == 4


def test_crops_and_settings_that_do_not_fit_are_refused(network: onnx.ModelProto) -> None:
    with pytest.raises(UsageError, match="unknown calibration method 'best'"):
        QuantizationConfig("cpu", "best")
    with pytest.raises(msgspec.ValidationError, match="int4"):
        msgspec.json.decode('{"flavor": "int4", "method": "mse"}', type=Recipe)
    for refuse in (
        lambda: quantize(network, [], QuantizationConfig("cpu")),
        lambda: calibrate(network, []),
    ):
        with pytest.raises(DataError, match="no calibration crops"):
            refuse()
    with pytest.raises(DataError, match=r"crops are \[8, 8, 3\], the network takes \[16, 16, 3\]"):
        calibrate(network, random_crops(2, 8))
    with pytest.raises(DataError, match="crop 1 is float32"):
        calibrate(network, [CROPS[0], CROPS[1].astype(np.float32)])
    with pytest.raises(DataError, match="crop 0 is uint8"):
        calibrate(network, [CROPS[0, 0]])
    with pytest.raises(UsageError, match="magic"):
        calibrate(network, CROPS, methods=("magic",))
