"""Joint rounding: weights of a layer that are rounded together, and layers fitted one by one."""

from __future__ import annotations

import numpy as np
import pytest

from edgehp.quantization.compare import Comparison
from edgehp.quantization.qdq import Emitter, quantize_weight, weight_scales
from edgehp.quantization.rounding import round_jointly, round_layers
from edgehp.quantization.table import calibrate
from tests.helpers import random_crops
from tests.quantization_graphs import SIZE, small_network


def test_joint_rounding_leaves_less_error_than_rounding_to_nearest(
    rng: np.random.Generator,
) -> None:
    mixing = rng.normal(size=(40, 40)) * np.geomspace(1, 0.01, 40)[:, None]
    x = (rng.normal(size=(2000, 40)) @ mixing + rng.normal(size=40)).astype(np.float32)
    weight = rng.normal(size=(8, 40)).astype(np.float32)
    wanted = x @ weight.T
    scales = weight_scales(weight) * 8  # coarse, so that the grid matters
    q, found = round_jointly(weight, scales, x, damping=1e-4)
    assert q.dtype == np.int8
    assert np.abs(q.astype(int)).max() <= 127

    def error(integers: np.ndarray, offset: np.ndarray) -> float:
        answer = x @ (integers * scales[:, None]).T + offset
        return float(np.mean((answer - wanted) ** 2))

    nearest = quantize_weight(weight, scales)
    # Of 300 seeds the median is 0.21, the largest 0.36.
    assert error(q, found) < 0.4 * error(nearest, np.zeros(8))
    np.testing.assert_allclose(found, (wanted - x @ (q * scales[:, None]).T).mean(0), atol=1e-3)


def test_where_the_samples_say_nothing_the_weights_stay(rng: np.random.Generator) -> None:
    weight = rng.normal(size=(4, 6)).astype(np.float32)
    scales = weight_scales(weight)
    x = np.zeros((50, 6), np.float32)
    x[:, 0] = rng.normal(size=50)
    q, _ = round_jointly(weight, scales, x)
    np.testing.assert_array_equal(q, quantize_weight(weight, scales))
    # The largest integer that may be is kept to.
    inputs = rng.normal(size=(50, 6)).astype(np.float32)
    q, _ = round_jointly(weight, weight_scales(weight, largest=64), inputs, largest=64)
    assert np.abs(q.astype(int)).max() == 64


@pytest.mark.parametrize(
    ("flavor", "body"), [("cpu", "fp32"), ("tensorrt", "fp32"), ("tensorrt", "fp16")]
)
def test_fitted_weights_are_nearer_to_fp32_on_other_crops(flavor: str, body: str) -> None:
    network = small_network()
    crops = random_crops(96, SIZE, seed=5)
    table = calibrate(network, crops[:32], threads=1)
    emitter = Emitter(network, flavor, body, ("a.conv1",))
    fitted = round_layers(emitter, table, "minmax", crops[:64], threads=1)
    assert "a.conv1" not in fitted
    assert {"conv1", "a.conv2", "b.downsample"} <= set(fitted)
    comparison = Comparison(network, crops[64:], threads=1)
    nearest = comparison(emitter(table, "minmax")).angles
    assert comparison(emitter(table, "minmax", fitted)).angles < 0.9 * nearest
    again = round_layers(emitter, table, "minmax", crops[:64], threads=1)
    for name, layer in fitted.items():
        np.testing.assert_array_equal(layer.weight, again[name].weight)
