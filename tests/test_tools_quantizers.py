"""The comparison of quantisers on a tiny network: real quantisers, real children."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import onnx
import pytest

from edgehp.crop import Preprocessing
from edgehp.errors import UsageError
from edgehp.networks.graph import graph_bytes
from tests import build_parts
from tests.helpers import random_crops
from tests.quantization_graphs import SIZE, small_network

REPO = Path(__file__).resolve().parent.parent
SEED = 3


@pytest.fixture(scope="module", autouse=True)
def _path() -> Iterator[None]:
    """Where the steps' own processes find the tools, too."""
    sys.path.insert(0, str(REPO / "tools"))
    yield
    sys.path.remove(str(REPO / "tools"))


def tool(name: str) -> ModuleType:
    return importlib.import_module(name)


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


def run(folder: Path, row: str, given: str = "", limit: float = 120.0):  # type: ignore[no-untyped-def]
    job = tool("quantizers.rows").Job(row, str(folder), str(folder / row), 1, 0.5, given)
    return tool("quantizers.run").run_row(job, limit)


def at_once(step: Callable[..., object], limit: float, *arguments: object) -> tuple[object, str]:
    """A step in this process: the imports of another take longer than all else."""
    try:
        return step(*arguments), ""
    except Exception as e:
        return None, str(e)


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


def test_rows_are_measured_and_a_failing_one_is_a_reason(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tool("quantizers.table")
    outcomes = {"modelopt-max": run(folder, "modelopt-max", "/nowhere/python")}
    outcomes["ort-minmax"] = run(folder, "ort-minmax")
    monkeypatch.setattr(tool("quantizers.run"), "_in_child", at_once)
    outcomes |= {n: run(folder, n) for n in ("fp32", "edgehp-default-cpu")}
    truth = np.load(folder / "truth.npy")
    reference = outcomes["fp32"].answers
    assert reference is not None
    figures = {
        n: table.figures(o.answers, reference, truth)
        for n, o in outcomes.items()
        if o.answers is not None
    }
    assert set(figures) == {"fp32", "edgehp-default-cpu", "ort-minmax"}, outcomes
    assert figures["fp32"].difference == 0
    for name in ("edgehp-default-cpu", "ort-minmax"):
        made = outcomes[name].made
        assert 0 < figures[name].difference < 3
        assert made.seconds > 0
        assert 20 < made.peak_mib < 2000
        assert made.megabytes < outcomes["fp32"].made.megabytes
    assert "nowhere" in outcomes["modelopt-max"].reason
    files = [outcomes[n].made.file for n in figures]
    times = tool("quantizers.run").measure_latency(files, threads=1, rounds=2, limit=60)
    assert set(times) == {outcomes[n].made.file for n in figures}
    text = table.markdown(outcomes, figures, times, "a heading")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in rows[:5]}) == 1
    assert "- ModelOpt max: " in text
    assert "not measured" not in text


def test_a_step_that_takes_too_long_is_ended(folder: Path) -> None:
    outcome = run(folder, "fp32", limit=0.01)
    assert outcome.made is None
    assert "took longer" in outcome.reason


def test_crops_are_chosen_by_seed_and_never_serve_twice(tmp_path: Path) -> None:
    prepare = tool("quantizers.prepare")
    spec = SimpleNamespace(name="small", preprocessing=Preprocessing(SIZE))
    network = SimpleNamespace(graph=lambda: small_network(SEED), spec=spec, source="n.safetensors")
    faces = build_parts.faces(tmp_path / "faces.zip", 12, 1, size=32)
    photos = build_parts.faces(tmp_path / "photos.zip", 6, 2, labels=True, size=32)
    found = []
    for seed in (0, 0, 1):
        chosen = prepare.Crops(str(faces), 8, 4, photos, limit=3, seed=seed)
        heading = prepare.prepare(tmp_path / "work", network, chosen)
        found.append([np.load(tmp_path / "work" / f"{n}.npy") for n in ("calibration", "control")])
    assert "8 calibration crops of faces.zip (seed 1); 3 photos of photos.zip" in heading
    np.testing.assert_array_equal(found[0][0], found[1][0])
    assert (found[0][0] != found[2][0]).any()
    for calibration, control in found:
        both = np.concatenate([calibration, control])
        assert len({c.tobytes() for c in both}) == len(both) == 12
    assert np.load(tmp_path / "work" / "truth.npy").shape == (3, 3)
    with pytest.raises(UsageError, match="12 faces, 10 to calibrate and 4 to control"):
        prepare.prepare(tmp_path / "work", network, prepare.Crops(str(faces), 10, 4, photos))
