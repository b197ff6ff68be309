"""Whether crops look like the calibration's: a warning where they do not, silence where they do."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
import pytest

from edgehp.errors import DataError
from edgehp.quantization.compare import ClippingMeter
from edgehp.quantization.quantize import QuantizationConfig, quantize
from edgehp.validation.appearance import (
    CONDITIONS,
    STATISTICS,
    AppearanceCheck,
    Clipped,
    appearance_of,
    measure_crops,
)
from tests.helpers import random_crops
from tests.quantization_graphs import SIZE, small_network


def checked(calibration: np.ndarray, validation: np.ndarray, **more: object) -> AppearanceCheck:
    own = appearance_of(measure_crops(calibration))
    return AppearanceCheck.of(own, measure_crops(validation), **more)  # type: ignore[arg-type]


def darker(crops: np.ndarray, gain: float) -> np.ndarray:
    return (crops * gain).astype(np.uint8)


def test_crops_of_one_kind_do_not_warn(seed: int) -> None:
    check = checked(random_crops(66, 48, seed), random_crops(64, 48, seed + 1))
    assert check.warning is None
    assert set(check.outside) == set(STATISTICS)
    assert max(map(sum, check.outside.values())) < 0.3


def test_what_is_outside_warns_with_the_figures() -> None:
    crops = random_crops(132, 48, 1)
    check = checked(darker(crops[:66], 0.04), crops[66:])
    assert check.outside["brightness"] == (0, 1)
    text = str(check.warning)
    assert "look unlike" in text and "100% are brighter than nearly all of the former" in text
    assert f"median brightness {check.validation.brightness[1]:.3g} against 4." in text
    for condition, word in (("dark", "darker"), ("blurred", "softer"), ("near-infrared", "paler")):
        assert word in str(checked(crops[:66], CONDITIONS[condition](crops[66:])).warning)
    # Both sides are said where both are outside.
    grey = darker(crops[66:], 0.1)
    check = checked(crops[:66], np.concatenate([grey[::2], 255 - grey[1::2]]))
    assert "100% are darker or brighter" in str(check.warning)
    # Varied calibration crops cover what is narrower.
    varied = np.concatenate([darker(crops[:33], 0.2), darker(crops[33:66], 0.6), crops[66:99]])
    assert checked(varied, darker(crops[99:], 0.5)).warning is None


def test_clipped_activations_warn_by_themselves() -> None:
    crops = random_crops(130, 48, 1)
    same = (crops[:66], crops[66:])
    check = checked(*same, clipped=Clipped(0.02, 0.001, ("conv1", 0.11)))
    assert "2.00% of their activations lie beyond the calibrated ranges" in str(check.warning)
    assert "most at conv1 with 11.0%" in str(check.warning)
    # What a method clips on purpose is no news.
    assert checked(*same, clipped=Clipped(0.004, 0.001, ("conv1", 0.01))).warning is None
    assert checked(*same, clipped=Clipped(0.0008, 0.0, ("conv1", 0.01))).warning is None


@pytest.fixture(scope="module", params=["cpu", "tensorrt"])
def quantized(request: pytest.FixtureRequest) -> onnx.ModelProto:
    crops = list(random_crops(40, SIZE, 1))
    config = QuantizationConfig(request.param, "minmax", rounding=False, threads=1)
    return quantize(small_network(), crops, config).model


def test_clipping_is_counted_beyond_the_last_level(quantized: onnx.ModelProto) -> None:
    crops = random_crops(40, SIZE, 1)
    meter = ClippingMeter(quantized, threads=1)
    usual = meter(crops)
    # Min-max of four in five of these crops: hardly anything lies beyond.
    assert usual.share < 0.002
    harsh = np.where(crops > 127, 255, 0).astype(np.uint8)
    beyond = meter(harsh)
    assert beyond.share > 5 * usual.share
    assert beyond.worst[1] > beyond.share


def test_a_tensor_that_is_squeezed_shows_its_own_share(quantized: onnx.ModelProto) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(quantized)
    node = next(n for n in _quantizers(model) if n.input[0] == "relu")
    scale = next(t for t in model.graph.initializer if t.name == node.input[1])
    small = onnx.numpy_helper.to_array(scale) / 8
    scale.CopyFrom(onnx.numpy_helper.from_array(small.astype(np.float32), scale.name))
    found = ClippingMeter(model, threads=1)(random_crops(8, SIZE, 1))
    assert found.worst[0] == "relu"
    assert found.worst[1] > 0.1


def _quantizers(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    return (n for n in model.graph.node if n.op_type == "QuantizeLinear")


def test_a_float_graph_and_no_crops_are_refused(quantized: onnx.ModelProto) -> None:
    with pytest.raises(DataError, match="no QuantizeLinear"):
        ClippingMeter(small_network())
    with pytest.raises(DataError, match="no crops"):
        appearance_of(measure_crops([]))
    with pytest.raises(DataError, match="no crops"):
        ClippingMeter(quantized, threads=1)([])
