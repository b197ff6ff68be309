"""The comparison of quantisers on a tiny network: real quantisers, real children."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest

from edgehp.networks.graph import graph_bytes
from tests.helpers import random_crops
from tests.quantization_graphs import SIZE, small_network

REPO = Path(__file__).resolve().parent.parent
SEED = 3


def tool(name: str) -> ModuleType:
    folder = str(REPO / "tools")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command prepares for its rows, from a small network and random crops."""
    work = tmp_path_factory.mktemp("comparison")
    model = small_network(SEED)
    core = tool("quantizers.cores").split(model)
    (work / "fp32.onnx").write_bytes(graph_bytes(model))
    (work / "core.onnx").write_bytes(graph_bytes(core))
    for name, count in (("calibration", 20), ("control", 8), ("photos", 12)):
        np.save(work / f"{name}.npy", random_crops(count, SIZE, seed=count))
    np.save(work / "truth.npy", np.random.default_rng(SEED).uniform(-80, 80, (12, 3)))
    return work


def run(folder: Path, row: str, **changes: object):  # type: ignore[no-untyped-def]
    values = {"threads": 1, "budget": 0.5, "given": "", **changes}
    job = tool("quantizers.job").Job(row, str(folder), str(folder / row), **values)
    return tool("quantizers.parent").run_row(job, 120.0, ("fp32.onnx", "calibration.npy"))


def test_the_core_put_back_computes_the_same(folder: Path) -> None:
    import onnxruntime

    cores = tool("quantizers.cores")
    model, core = onnx.load(str(folder / "fp32.onnx")), onnx.load(str(folder / "core.onnx"))
    joined = cores.joined(model, core)
    onnx.checker.check_model(joined, full_check=True)
    crops = np.load(folder / "photos.npy")
    answers = []
    for m in (model, joined):
        session = onnxruntime.InferenceSession(
            m.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        answers.append(session.run(["angles"], {"crops": crops})[0])
    np.testing.assert_array_equal(*answers)
    # And the core itself, fed and decoded as the peers' control does.
    session = onnxruntime.InferenceSession(
        core.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    feed = cores.batches_of(crops, cores.mean_of(model), 5)
    scores = np.concatenate([session.run(None, {cores.FIRST: b})[0] for b in feed])
    np.testing.assert_allclose(cores.decode(model, scores), answers[0], atol=1e-3)


def test_rows_are_measured_and_a_failing_one_is_a_reason(folder: Path) -> None:
    parent, table = tool("quantizers.parent"), tool("quantizers.table")
    outcomes = {n: run(folder, n) for n in ("fp32", "edgehp-default-cpu", "ort-minmax")}
    outcomes["modelopt-max"] = run(folder, "modelopt-max", given="/nowhere/python")
    truth = np.load(folder / "truth.npy")
    reference = outcomes["fp32"].answers
    assert reference is not None
    figures = {
        n: tool("quantizers.figures").figures(o.answers, reference, truth)
        for n, o in outcomes.items()
        if o.answers
    }
    assert set(figures) == {"fp32", "edgehp-default-cpu", "ort-minmax"}, outcomes
    assert figures["fp32"].difference == 0
    for name in ("edgehp-default-cpu", "ort-minmax"):
        made = outcomes[name].made
        assert 0 < figures[name].difference < 3
        assert made.seconds > 0
        assert 20 < made.peak_mib < 2000
        assert made.size_mb < outcomes["fp32"].made.size_mb
    assert "nowhere" in outcomes["modelopt-max"].reason
    times = parent.measure_latency(
        folder, [outcomes[n].made.file for n in figures], threads=1, rounds=2, limit=60
    )
    assert set(times) == {outcomes[n].made.file for n in figures}
    text = table.markdown(outcomes, figures, times, "a heading")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in rows[:5]}) == 1
    assert "- ModelOpt max: " in text
    assert "not measured" not in text


def test_finished_steps_are_kept_until_their_input_changes(folder: Path) -> None:
    first = run(folder, "fp32")
    stamp = first.answers.stat().st_mtime_ns
    assert run(folder, "fp32").answers.stat().st_mtime_ns == stamp
    assert run(folder, "fp32", budget=0.7).answers.stat().st_mtime_ns != stamp


def test_a_step_that_takes_too_long_is_ended(folder: Path) -> None:
    job = tool("quantizers.job").Job("fp32", str(folder), str(folder / "slow"), 1, 0.1)
    outcome = tool("quantizers.parent").run_row(job, 0.01, ("fp32.onnx",))
    assert outcome.made is None
    assert "took longer" in outcome.reason


def test_a_trained_row_without_its_file_says_so(folder: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "network.safetensors"
    wrong.write_bytes(b"no weights")
    outcome = run(folder, "edgehp-quantisation-aware-cpu", given=str(wrong))
    assert outcome.made is None
    assert "network.safetensors" in outcome.reason


def test_peak_memory_is_the_childs_own(folder: Path) -> None:
    ballast = np.ones(200 << 20, np.uint8)
    run(folder, "ort-minmax", budget=0.9)
    made = json.loads((folder / "ort-minmax" / "made.json").read_text(encoding="utf-8"))
    assert ballast.all()
    # With this process's memory counted in, it would be several hundred MiB more.
    assert made["peak_mib"] < 600
