"""Prices of layers: counted work, the roofline, shares of measured engines, and real counters."""

from __future__ import annotations

import pytest

from edgehp.errors import DataError, UsageError
from edgehp.quantization.graph import GraphView
from edgehp.quantization.latency import (
    counted_latency,
    layer_work,
    roofline_latency,
    shared_latency,
)
from edgehp.quantization.placement import quantizable_layers
from edgehp.quantization.qdq import Emitter
from edgehp.quantization.table import calibrate
from tests.helpers import random_crops
from tests.quantization_graphs import BINS, SIZE, small_network

LAYERS = ("conv1", "maxpool", "a.conv1", "a.add", "b.downsample", "heads")


def test_the_work_of_each_kind_of_layer() -> None:
    work = layer_work(small_network(), LAYERS)
    half = SIZE // 2
    assert work["conv1"].weights == 16 * 3 * 9
    assert work["conv1"].operations == 2 * 16 * 3 * 9 * half * half
    assert work["conv1"].activations == 3 * SIZE * SIZE + 16 * half * half
    assert work["a.add"].operations == 16 * half * half
    assert work["a.add"].activations == 3 * 16 * half * half
    assert (work["maxpool"].weights, work["maxpool"].activations) == (0, 2 * 16 * half * half)
    assert work["heads"].operations == 2 * 32 * 3 * BINS
    with pytest.raises(DataError, match="no node 'nonesuch'"):
        layer_work(small_network(), ["nonesuch"])


def test_the_roofline_takes_the_longer_of_operations_and_bytes() -> None:
    def priced(bytes_per_s: float | None, batch: int = 1):  # type: ignore[no-untyped-def]
        return roofline_latency(
            small_network(),
            LAYERS,
            integer_ops_per_s=4e12,
            float_ops_per_s=2e12,
            bytes_per_s=bytes_per_s,
            float_bytes=2,
            batch=batch,
            source="a board",
        )

    work = layer_work(small_network(), LAYERS)["a.conv1"]
    compute, memory = priced(None), priced(1e6)
    assert compute.integer_ms["a.conv1"] == pytest.approx(work.operations / 4e12 * 1e3)
    assert compute.float_ms["a.conv1"] == pytest.approx(work.operations / 2e12 * 1e3)
    moved = work.weights + work.activations
    assert memory.integer_ms["a.conv1"] == pytest.approx(moved / 1e6 * 1e3)
    assert memory.float_ms["a.conv1"] == pytest.approx(2 * moved / 1e6 * 1e3)
    # Weights are read once for a whole batch.
    more = priced(1e6, batch=4).integer_ms["a.conv1"]
    assert more == pytest.approx((work.weights + 4 * work.activations) / 1e6 * 1e3)
    assert (compute.source, compute.measured) == ("a board", False)
    with pytest.raises(UsageError, match="positive"):
        priced(-1.0)


def test_measured_engines_are_shared_out_by_operations() -> None:
    model = shared_latency(
        small_network(), LAYERS, integer_ms=1.5, float_ms=6.0, source="two engines"
    )
    assert sum(model.integer_ms.values()) == pytest.approx(1.5)
    assert sum(model.float_ms.values()) == pytest.approx(6.0)
    work = layer_work(small_network(), LAYERS)
    ratio = work["a.conv1"].operations / work["conv1"].operations
    assert model.float_ms["a.conv1"] / model.float_ms["conv1"] == pytest.approx(ratio)
    assert model.measured


def test_openvinos_counters_price_every_convolution() -> None:
    network = small_network()
    crops = random_crops(6, SIZE)
    layers = quantizable_layers(GraphView(network), "cpu")
    table = calibrate(network, crops, threads=1)
    quantised = Emitter(network, "cpu")(table, "minmax")
    model = counted_latency(network, quantised, layers, threads=1)
    assert set(model.integer_ms) == set(model.float_ms) == set(layers)
    for name in layers:
        assert model.integer_ms[name] >= 0
        assert model.float_ms[name] >= 0
    for name in ("a.conv1", "a.conv2", "b.conv1", "b.conv2", "b.downsample"):
        assert model.integer_ms[name] > 0
        assert model.float_ms[name] > 0
    # Added inside the convolution's kernel: charged there, not twice.
    assert model.float_ms["a.add"] == 0
    assert "counters of OpenVINO" in model.source
