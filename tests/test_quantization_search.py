"""Sensitivity on a real small network, and the search on models whose best answer is known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from edgehp.errors import AccuracyError, UsageError
from edgehp.quantization.compare import Comparison, Difference
from edgehp.quantization.qdq import Emitter, RoundedLayer, quantized_layers
from edgehp.quantization.search import NotReachedError, search
from edgehp.quantization.sensitivity import LayerSensitivity, Sensitivity, measure_sensitivity
from edgehp.quantization.table import calibrate
from tests.helpers import random_crops
from tests.quantization_graphs import SIZE, small_network


def difference(angles: float) -> Difference:
    return Difference(angles, angles / 2, angles * 4, (0.0, 0.0, 0.0))


def additive(errors: dict[str, float]) -> Sensitivity:
    """Layers whose errors add up."""
    rows = [LayerSensitivity(n, difference(e), difference(0), e) for n, e in errors.items()]
    return Sensitivity(difference(sum(errors.values())), tuple(rows))


def run(errors: dict[str, float], gains: dict[str, float], max_drop: float, **kw: object):  # type: ignore[no-untyped-def]
    total = sum(errors.values())
    return search(
        lambda kept: total - sum(errors[n] for n in kept),
        additive(errors),
        dict.fromkeys(errors, 1.0),
        {n: 1.0 + g for n, g in gains.items()},
        max_drop=max_drop,
        **kw,  # type: ignore[arg-type]
    )


def test_within_budget_everything_stays_in_int8() -> None:
    result = run({"a": 0.1, "b": 0.2}, {"a": 1, "b": 1}, 0.31)
    assert result.keep_float == ()
    assert (result.cost, result.evaluations) == (0, 1)
    assert result.latency == result.fastest == 2.0


def test_the_search_is_near_the_best_assignment(rng: np.random.Generator) -> None:
    for _ in range(30):
        names = [f"l{i}" for i in range(8)]
        errors = dict(zip(names, rng.gamma(0.5, 1, 8), strict=True))
        gains = dict(zip(names, rng.uniform(0.1, 1, 8), strict=True))
        budget = float(rng.uniform(0.1, 0.9)) * sum(errors.values())
        result = run(errors, gains, budget)
        assert result.drop <= budget
        fits = [
            sum(gains[n] for n in kept)
            for k in range(9)
            for kept in itertools.combinations(names, k)
            if sum(errors.values()) - sum(errors[n] for n in kept) <= budget
        ]
        # Greedy against a knapsack: at most one layer worse.
        assert result.cost <= min(fits) + max(gains.values())
        assert result.cost == pytest.approx(sum(gains[n] for n in result.keep_float))


def test_an_unreachable_budget_ends_with_the_best_found() -> None:
    with pytest.raises(NotReachedError, match=r"best found has 0\.5") as e:
        run({"a": 0.5, "b": 0.4}, {"a": 1, "b": 1}, 0.1, never_float=["a"])
    assert isinstance(e.value, AccuracyError)
    assert e.value.exit_code == 3
    assert e.value.best.keep_float == ("b",)
    assert e.value.best.drop == pytest.approx(0.5)


def test_the_number_of_measurements_is_bounded() -> None:
    errors = {f"l{i}": 1.0 for i in range(40)}
    with pytest.raises(NotReachedError) as e:
        run(errors, dict.fromkeys(errors, 1.0), 0.5, never_float=["l0"], max_evaluations=9)
    assert e.value.best.evaluations <= 9


def test_a_latency_model_without_a_layer_is_refused() -> None:
    with pytest.raises(UsageError, match="no figure for a"):
        search(lambda _: 1.0, additive({"a": 1.0}), {}, {}, max_drop=0.1)
    with pytest.raises(UsageError, match="make no sense"):
        run({"a": 1.0}, {"a": 1.0}, float("nan"))


@pytest.mark.parametrize("flavor", ["cpu", "tensorrt"])
def test_sensitivity_of_a_real_network(flavor: str) -> None:
    network = small_network()
    crops = random_crops(6, SIZE)
    table = calibrate(network, crops, threads=1)
    # One layer's weights are ruined on purpose: the table must point at it.
    zeros = RoundedLayer(np.zeros((32, 32, 3, 3), np.int8), np.zeros(32, np.float32))
    model = Emitter(network, flavor)(table, "minmax", {"b.conv2": zeros})
    found = measure_sensitivity(model, network, Comparison(network, crops, threads=1))
    assert tuple(s.layer for s in found.layers) == quantized_layers(model)
    assert found.ranked()[0].layer == "b.conv2"
    by_name = {s.layer: s for s in found.layers}
    assert by_name["b.conv2"].left_out.angles < 0.5 * found.full.angles
    for s in found.layers:
        assert np.isfinite([s.alone.angles, s.alone.spread, s.left_out.angles]).all()
        assert s.gain == pytest.approx(found.full.angles - s.left_out.angles)


def test_layers_that_cannot_be_compared_are_refused() -> None:
    network = small_network()
    comparison = Comparison(network, random_crops(1, SIZE), threads=1)
    with pytest.raises(UsageError, match="at least two"):
        measure_sensitivity(network, network, comparison)
