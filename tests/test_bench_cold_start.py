"""Cold starts: real processes that open a real artifact, and what is said of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgehp.benchmark import cold_start
from edgehp.benchmark.cold_start import STAGES, joined, start_rows
from edgehp.benchmark.host import HostState
from edgehp.cli.main import main
from tests.bench_artifact import make_artifact


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(tmp_path_factory.mktemp("cold"), small=True)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What takes the place of the kernel's switch: the machine is not the tests' own."""
    path = tmp_path / "drop_caches"
    path.touch()
    monkeypatch.setattr(cold_start, "_DROP_CACHES", path)
    return path


def bench(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main(["bench", *map(str, words), "--scenario", "cold-start"])
    out, err = capsys.readouterr()
    return int(stopped.value.code or 0), out, err


def test_starts_are_timed_from_process_to_answer(
    artifact: Path, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (artifact, "--starts", 2, "--threads", 1, "--allow-invalid", "--output", tmp_path)
    code, out, err = bench(capsys, *words, "--json")
    assert code == 0, err
    report = json.loads(out)
    assert json.loads((tmp_path / "bench-cold-start.json").read_text()) == report
    assert (report["kind"], report["state"], len(report["starts"])) == ("cold-start", "complete", 2)
    assert report["subject"]["engine"]["threads"] == 1
    for start in report["starts"]:
        assert tuple(start["stages"]) == STAGES
        assert all(seconds > 0 for seconds in start["stages"].values())
        assert sum(start["stages"].values()) == pytest.approx(start["seconds"])
        assert start["cache_kept"] is None
    assert cache.read_text() == "1"
    assert report["seconds"]["min"] <= report["seconds"]["median"] <= report["seconds"]["max"]
    # Where it may not, it says so.
    cache.unlink()
    cache.mkdir()
    code, out, err = bench(capsys, artifact, "--starts", 1, "--allow-invalid", "--output", tmp_path)
    assert code == 0, err
    assert "files of an earlier start were in memory" in out and "takes root" in out
    assert "first answer after" in out and "median of 1" in out


def test_a_start_that_fails_is_the_error_of_opening(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    altered = make_artifact(tmp_path, small=True)
    graph = altered / "engine.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"?")
    code, _, err = bench(capsys, altered, "--starts", 1)
    assert code == 4 and "was changed" in err
    assert not (altered / "reports").exists()


def test_options_of_other_scenarios(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (("--duration", 5), ("--scenario", "offline"), ("--power=none",)):
        code, _, err = bench(capsys, artifact, *words)
        assert code == 2 and "--scenario cold-start" in err
    with pytest.raises(SystemExit) as stopped:
        main(["bench", str(artifact), "--starts", "3"])
    assert stopped.value.code == 2
    assert "--starts is for --scenario cold-start" in capsys.readouterr().err


def test_nothing_that_a_start_reads_is_in_memory_before(artifact: Path, repo: Path) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(repo)!r})
from edgehp.benchmark import cold_start
from edgehp.benchmark.host import HostState
from edgehp.cli.main import main

def start(request):
    sys.exit(" ".join(sorted({{name.partition(".")[0] for name in sys.modules}})))

cold_start._start = start
main(["bench", {str(artifact)!r}, "--scenario", "cold-start"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    loaded = set(done.stderr.split())
    assert "edgehp" in loaded
    assert not loaded & {"cv2", "numpy", "onnxruntime", "openvino", "tensorrt", "torch"}


@pytest.mark.parametrize(("uptime", "valid"), [(60.0, True), (6000.0, False)])
def test_a_machine_that_was_just_switched_on_has_other_work(uptime: float, valid: bool) -> None:
    states = [HostState(t, busy_s=t, throttles={"x": 0}) for t in (0.0, 10.0)]
    found = cold_start._validity(states, [], {"jetson": None, "cpu_quota": None}, uptime)
    assert found["valid"] is valid
    said = found["conditions" if valid else "reasons"]
    assert any(text.startswith("foreign load") for text in said)


def report_of(seconds: float, uptime: float, reasons: list[str]) -> dict[str, Any]:
    stages = dict.fromkeys(STAGES, seconds / len(STAGES))
    validity = {"valid": not reasons, "reasons": reasons, "conditions": [], "unknown": ["clocks"]}
    return {
        "state": "complete",
        "scenario": {"starts": 1},
        "uptime_s": uptime,
        "starts": [{"seconds": seconds, "stages": stages, "cache_kept": None}],
        "validity": validity,
    }


def test_starts_after_power_cycles_are_one_report() -> None:
    found = joined([report_of(s, 40.0 - s, ["hot"] * (s == 3)) for s in (1.0, 3.0, 2.0)])
    assert (found["scenario"]["starts"], found["uptime_s"]) == (3, 37.0)
    assert found["seconds"] == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert found["validity"]["reasons"] == ["hot"] and not found["validity"]["valid"]
    assert found["validity"]["unknown"] == ["clocks"]
    rows, notes = start_rows(found)
    assert rows[-1] == ("first answer", "2.000", "1.000", "3.000")
    assert notes == []
