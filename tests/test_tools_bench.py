"""What the tools that judge the benchmark say, given figures."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def peers(repo: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(repo / "tools"))
    monkeypatch.delitem(sys.modules, "bench_peers", raising=False)
    import bench_peers

    return bench_peers


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.97, 1.01, "no slower"),
        (1.01, 1.02, "slower"),
        # An interval as wide as that holds 1 on any noisy machine.
        (0.80, 1.30, "cannot tell"),
    ],
)
def test_noise_is_no_proof_of_speed(
    peers: ModuleType, low: float, high: float, expected: str
) -> None:
    assert peers.verdict({"value": (low + high) / 2, "low": low, "high": high}) == expected


def test_the_ratio_is_of_turns_that_follow_each_other(peers: ModuleType) -> None:
    """A machine that slows down for both alike changes nothing."""
    machine = [1.0, 1.0, 2.0, 2.0, 3.0, 3.0]
    ratio = peers.ratio([1.1 * m for m in machine], machine)
    assert ratio["low"] == pytest.approx(1.1) == ratio["high"]
    assert peers.verdict(ratio) == "slower"
