"""The calibration table: round trip, refusal of stale and of hostile files, memory of one pass."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from edgehp.errors import CompatibilityError, DataError, UsageError
from edgehp.quantization.calibrate import calibrate
from edgehp.quantization.graphview import GraphView, network_digest
from edgehp.quantization.placement import observed_tensors
from edgehp.quantization.table import CalibrationTable, crops_digest
from edgehp.quantization.thresholds import METHODS
from tests.helpers import random_crops
from tests.quantization_graphs import SIZE, set_constant, small_network

CROPS = random_crops(7, SIZE)


@pytest.fixture(scope="module")
def network() -> onnx.ModelProto:
    return small_network()


@pytest.fixture(scope="module")
def table(network: onnx.ModelProto) -> CalibrationTable:
    return calibrate(network, CROPS, threads=1)


def keys(network: onnx.ModelProto) -> dict[str, str]:
    return {"network": network_digest(network), "crops": crops_digest(CROPS), "preprocessing": ""}


def test_the_table_survives_a_file(
    table: CalibrationTable, network: onnx.ModelProto, tmp_path: Path
) -> None:
    path = tmp_path / "table.json"
    table.save(path)
    again = CalibrationTable.load(path)
    again.require(**keys(network), methods=METHODS)
    assert again.to_json() == table.to_json()
    assert again.methods == tuple(METHODS)
    assert set(again.tensors) == set(observed_tensors(network))
    assert [p.name for p in tmp_path.iterdir()] == ["table.json"]


def test_the_ranges_are_those_of_the_tensors(
    table: CalibrationTable, network: onnx.ModelProto
) -> None:
    x = (CROPS.transpose(0, 3, 1, 2).astype(np.float32) - 120) / 58
    seen = table.tensors["normalised"]
    assert seen.minimum == pytest.approx(x.min(), rel=1e-6)
    assert seen.maximum == pytest.approx(x.max(), rel=1e-6)
    np.testing.assert_allclose(seen.channel_mean, x.mean((0, 2, 3)), atol=1e-5)
    assert table.tensors["relu"].minimum == 0
    assert "normalised" in GraphView(network).producer


def test_the_table_does_not_depend_on_how_the_crops_come(
    table: CalibrationTable, network: onnx.ModelProto
) -> None:
    assert calibrate(network, iter(CROPS), threads=1).to_json() == table.to_json()


@pytest.mark.parametrize("what", ["network", "crops", "preprocessing"])
def test_a_stale_table_is_refused_by_name(
    table: CalibrationTable, network: onnx.ModelProto, what: str
) -> None:
    with pytest.raises(CompatibilityError, match=f"stale: {what} .*calibrate again") as e:
        table.require(**{**keys(network), what: "f" * 64})
    assert str(e.value).count("expected") == 1


def test_digests_notice_a_weight_an_order_and_a_pixel(network: onnx.ModelProto) -> None:
    changed = onnx.ModelProto()
    changed.CopyFrom(network)
    set_constant(changed, "factor", np.full((1, 3, 1, 1), 1 / 57, np.float32))
    assert network_digest(changed) != network_digest(network)
    renamed = onnx.ModelProto()
    renamed.CopyFrom(network)
    renamed.producer_name = "somebody else"
    assert network_digest(renamed) == network_digest(network)
    pixel = CROPS.copy()
    pixel[0, 0, 0, 0] ^= 1
    digests = [crops_digest(c) for c in (CROPS, CROPS[::-1], pixel, CROPS[:-1])]
    assert len(set(digests)) == 4


def test_a_table_with_one_method_lacks_the_others(network: onnx.ModelProto) -> None:
    small = calibrate(network, CROPS[:1], methods=("minmax",), threads=1)
    assert small.methods == ("minmax",)
    with pytest.raises(UsageError, match="no mse range of relu"):
        small.range_of("relu", "mse", "int8")
    with pytest.raises(CompatibilityError, match="no ranges by mse"):
        small.require(**{**keys(network), "crops": crops_digest(CROPS[:1])}, methods=("mse",))


def damaged(table: CalibrationTable, **changes: object) -> str:
    document = json.loads(table.to_json())
    tensor = document["tensors"]["relu"]
    for key, value in changes.items():
        (document if key in document else tensor)[key] = value
    return json.dumps(document)


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 99},
        {"schema": None},
        {"network": "abc"},
        {"crops": 5},
        {"preprocessing": None},
        {"crop_count": -1},
        {"crop_count": True},
        {"crop_count": 10**400},
        {"tensors": {}},
        {"tensors": []},
        {"tensors": {"x": 3}},
        {"minimum": "low"},
        {"maximum": float("nan")},
        {"maximum": 10**400},
        {"channel_mean": []},
        {"channel_mean": [None]},
        {"channel_peak": [1, "x"]},
        {"ranges": {"magic": {}}},
        {"ranges": {"mse": {"int8": [-1, 1]}}},
        {"ranges": {"mse": {"int8": [1, 2], "uint8": [0, 1]}}},
        {"ranges": {"mse": {"int8": [0, 0], "uint8": [0, 1]}}},
        {"ranges": {"mse": {"int8": [0], "uint8": [0, 1]}}},
        {"ranges": 4},
    ],
)
def test_a_damaged_table_is_refused(table: CalibrationTable, change: dict[str, object]) -> None:
    with pytest.raises(DataError, match="again"):
        CalibrationTable.from_json(damaged(table, **change))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, "\x00", '{"schema": 1}'])
def test_what_is_no_table_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"t\.json"):
        CalibrationTable.load(path)


def test_missing_binary_and_unwritable_files_are_refused(
    table: CalibrationTable, tmp_path: Path
) -> None:
    (tmp_path / "b.json").write_bytes(b"\xff\xfe\x00")
    for name in ("none.json", "b.json", "."):
        with pytest.raises(DataError, match="cannot be read"):
            CalibrationTable.load(tmp_path / name)
    with pytest.raises(DataError, match="cannot be written"):
        table.save(tmp_path / "no" / "t.json")


def test_crops_that_do_not_fit_are_refused(network: onnx.ModelProto) -> None:
    with pytest.raises(DataError, match="no calibration crops"):
        calibrate(network, [])
    with pytest.raises(DataError, match=r"crops are \[8, 8, 3\], the network takes \[16, 16, 3\]"):
        calibrate(network, random_crops(2, 8))
    with pytest.raises(DataError, match="crop 1 is float32"):
        calibrate(network, [CROPS[0], CROPS[1].astype(np.float32)])
    with pytest.raises(DataError, match="crop 0 is uint8"):
        calibrate(network, [CROPS[0, 0]])
    with pytest.raises(UsageError, match="magic"):
        calibrate(network, CROPS, methods=("magic",))
