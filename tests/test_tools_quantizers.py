"""The comparison of quantisers on a tiny network: real quantisers, real children."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest

from edgehp.errors import UsageError
from edgehp.networks.bundled import resolve_network
from edgehp.networks.graph import graph_bytes
from tests import build_parts
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


def test_crops_are_chosen_by_seed_and_never_serve_twice(tmp_path: Path) -> None:
    prepare = tool("quantizers.prepare")
    network = resolve_network(str(build_parts.checkpoint(tmp_path / "n.safetensors", 32)))
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


def test_the_sweep_shows_both_kinds_of_weights(tmp_path: Path) -> None:
    sweep = tool("input_size_sweep")
    own = str(build_parts.checkpoint(tmp_path / "own.safetensors", 64))
    tuned = str(build_parts.checkpoint(tmp_path / "tuned.safetensors", 32))
    networks = sweep._networks(own, (32, 64), [f"32={tuned}"])
    assert [(size, kind) for size, kind, _ in networks] == [
        (32, "as shipped"),
        (32, "fine-tuned"),
        (64, "as shipped"),
    ]
    assert [n.spec.preprocessing.size for *_, n in networks] == [32, 32, 64]
    with pytest.raises(UsageError, match="takes 64 pixels"):
        sweep._networks(own, (32,), [f"32={own}"])
    points = [
        sweep.Point(s, k, s * s / 28000, 5.0, 5.1, (-0.1, 0.3), ms, ms)
        for s, k, ms in ((32, "as shipped", 1.0), (32, "fine-tuned", 1.0), (64, "as shipped", None))
    ]
    lines = sweep.table(points, "heading").splitlines()
    assert len({line.count("|") for line in lines[2:]}) == 1
    assert lines[-1].endswith("| not measured | not measured |")
    for name in ("a.svg", "b.svg"):
        sweep.draw(points, tmp_path / name, 64)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_the_memory_of_a_calibration_is_measured_in_a_child(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = build_parts.checkpoint(tmp_path / "n.safetensors", 32)
    faces = build_parts.faces(tmp_path / "faces.zip", 4, 1, size=32)
    arguments = [str(faces), "--network", str(network), "--counts", "4,12", "--threads", "1"]
    ballast = np.ones(700 << 20, np.uint8)
    assert tool("calibration_memory").main([*arguments, "--step", "calibrate"]) == 0
    assert ballast.all()
    cells = capsys.readouterr().out.splitlines()[-1].split("|")
    few, many = (float(c) for c in cells[2:4])
    # Neither this process's memory nor that of more crops is in it.
    assert 100 < few < 700
    assert abs(many - few) < 0.1 * few
