"""Reports: read strictly, shown on one page."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import cv2
import jsonschema
import numpy as np
import pytest

from edgehp.benchmark.host import HostState
from edgehp.benchmark.lanes import Frame, Frames, Turn, WarmUp
from edgehp.benchmark.power.base import MeterInfo, PowerRecorder, Sample
from edgehp.benchmark.report import Context, Subject, assemble
from edgehp.benchmark.roofline import GraphCost, roofline
from edgehp.benchmark.run import Measured, Plan
from edgehp.cli.main import main
from edgehp.cli.validate import default_report
from edgehp.crop import Preprocessing
from edgehp.errors import DataError
from edgehp.report.figures import figures, verdict
from edgehp.report.gather import gather, read_report
from edgehp.report.page import html_page
from edgehp.targets import load_target
from tests.bench_artifact import make_artifact, report_schema

SPEC = Preprocessing(32)


class ScriptedMeter:
    """12 W on the module's input, 5 W of it the GPU's, at every tenth of a second."""

    info = MeterInfo(
        "ina3221", "power", {"VDD_IN": "all", "VDD_GPU": "GPU"}, ("VDD_IN",), "all", 0.1
    )

    def read(self) -> Sample | None:
        return None

    def close(self) -> None:
        pass


def subject(name: str, sha: str, precision: str) -> dict[str, Any]:
    return {
        "name": name,
        "network_digest": "a" * 64,
        "engine": {
            "kind": "openvino",
            "version": "2026.4",
            "device": "Test CPU",
            "threads": 2,
            "precision": precision,
            "details": {"spin": None},
        },
        "input_size": 32,
        "batch": 1,
        "precision": precision,
        "target": "cpu",
        "engine_sha256": sha * 64,
        "manifest_digest": None,
    }


@pytest.fixture(scope="module")
def benchmark_report() -> dict[str, Any]:
    """A valid run of twelve turns on a quiet, scripted machine."""
    rng = np.random.default_rng(1)
    turns = []
    for i in range(12):
        role = ("artifact", "reference", "reference", "artifact")[i % 4]
        times = rng.lognormal(np.log(0.006 if role == "artifact" else 0.018), 0.05, 200)
        crop = np.full(200, 0.0004)
        stages = {
            "preprocessing": crop,
            "inference": times,
            "call": times,
            "end_to_end": times + crop,
        }
        turns.append(Turn(role, "end-to-end", 10.0 + i, 10.9 + i, 200, 200, stages, {}))
    recorder = PowerRecorder(ScriptedMeter())
    recorder._samples += [
        Sample(t, {"VDD_IN": 12 + np.sin(t), "VDD_GPU": 5.0}) for t in np.arange(0, 30, 0.1)
    ]
    states = [
        HostState(float(t), {"CPU": 50 + t / 10}, {"CPU": 95.0}, (2000.0,), 0.0, 0.0, {"x": 0})
        for t in range(9, 24)
    ]
    warm = tuple(WarmUp(r, 1.0, 50, True, 0.01) for r in ("artifact", "reference"))
    measured = Measured(warm, tuple(turns), (2.0, 8.0), (10.0, 21.9), False, 1.0, 1.7e9)
    frames = Frames("test", (Frame(np.zeros((32, 32, 3), np.uint8), None),))
    peaks = load_target("orin-nx-16gb").power_modes[0]
    work = GraphCost(3_640_000_000, 11_700_000, 150_552, 9_000_000, 21)
    context = Context(
        plan=Plan(duration_s=6),
        subjects={
            "artifact": Subject(subject("kd-int8", "b", "int8")),
            "reference": Subject(subject("kd-fp32", "c", "fp32")),
        },
        reference_reason=None,
        frames=frames,
        preprocessing=SPEC,
        host={"processor": "Test CPU", "power_mode": "15W", "governors": ["performance"]},
        states=states,
        recorder=recorder,
    )
    report = assemble(measured, context)
    roof = roofline(work, peaks, "int8", 160.0, 1)
    report["roofline"] = {"artifact": {"work": None, "reason": None, "roofline": roof}}
    jsonschema.validate(report, report_schema(), jsonschema.Draft202012Validator)
    assert report["validity"]["valid"], report["validity"]["reasons"]
    return report


def interval(value: float) -> dict[str, Any]:
    return {"value": value, "low": value - 0.01, "high": value + 0.01}


def accuracy(mae: float) -> dict[str, Any]:
    def summary(frames: int, error: float) -> dict[str, Any]:
        return {"frames": frames, "mae": [error] * 3, "mae_mean": error, "geodesic": 2 * error,
                "maev": error}  # fmt: skip

    return {
        "overall": summary(300, mae),
        "bands": [
            {"low": 0, "high": 30, "summary": summary(200, mae * 0.8)},
            {"low": 30, "high": 60, "summary": summary(100, mae * 1.4)},
            {"low": 60, "high": 99, "summary": None},
        ],
        "worst": [
            {"name": "face<0>.png", "error": 31.0, "truth": [1, 80, 3], "predicted": [2, 50, 4]},
            {"name": "gone.png", "error": 21.0, "truth": [1, 70, 3], "predicted": [2, 50, 4]},
        ],
    }


@pytest.fixture
def validation_report() -> dict[str, Any]:
    bands = [
        {"low": 0, "high": 30, "frames": 200, "drop": interval(0.01)},
        {"low": 30, "high": 60, "frames": 100, "drop": interval(0.04)},
        {"low": 60, "high": 99, "frames": 0, "drop": None},
    ]
    return {
        "kind": "validation",
        "schema": 2,
        "protocol": {"dataset": "rendered", "frames": 300},
        "preprocessing": SPEC.to_dict(),
        "reference": {"name": "kd-fp32"},
        "artifact": {"name": "kd-int8"},
        "reference_accuracy": accuracy(3.0),
        "artifact_accuracy": accuracy(3.02),
        "drop": {
            "overall": interval(0.02),
            "angles": [interval(0.02)] * 3,
            "geodesic": interval(0.03),
            "bands": bands,
            "mean_difference_overall": 0.09,
            "spread_difference_overall": 0.03,
        },
    }


@pytest.fixture
def sources(
    tmp_path: Path, benchmark_report: dict[str, Any], validation_report: dict[str, Any]
) -> Path:
    """A directory with both reports and a folder of faces."""
    (tmp_path / "a.json").write_text(json.dumps(benchmark_report))
    (tmp_path / "b.json").write_text(json.dumps(validation_report))
    (tmp_path / "notes.json").write_text("[]")
    (tmp_path / "faces").mkdir()
    face = np.full((64, 64, 3), 90, np.uint8)
    cv2.circle(face, (32, 32), 20, (120, 160, 220), -1)
    cv2.imwrite(str(tmp_path / "faces" / "face<0>.png"), face)
    return tmp_path


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as leaving:
        main(["report", *map(str, arguments)])
    return int(leaving.value.code or 0)


def page_of(sources: Path) -> Path:
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    assert run(sources, "--faces", sources / "faces", "--output", sources / "out") == 0
    return sources / "out" / "report.html"


def test_the_page_is_whole_and_needs_no_network(sources: Path) -> None:
    text = page_of(sources).read_text()
    # Histogram, timeline, roofline, error by yaw.
    assert text.count("<svg") == 4
    assert text.count("data:image/jpeg;base64,") == 1
    assert "no photo given" in text
    # Names come from files that anybody may have written.
    assert "face&lt;0&gt;.png" in text
    assert "<script" not in text
    for attribute in re.findall(r"""(?:src|href)=["']([^"']*)""", text):
        assert attribute.startswith(("data:", "#")), attribute
    assert not re.search(r"url\((?!#)|@import", text)
    assert "default-src 'none'" in text


def test_an_artifact_with_its_reports_shows_its_manifest(
    sources: Path, tmp_path: Path, benchmark_report: dict[str, Any]
) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    artifact = make_artifact(tmp_path / "dist")
    (artifact / "reports").mkdir()
    shutil.copy(sources / "a.json", artifact / "reports" / "bench-single-stream.json")
    assert run(artifact) == 0
    text = (artifact / "reports" / "report.html").read_text()
    assert "<h2>Manifest</h2>" in text
    sha = hashlib.sha256((artifact / "engine.onnx").read_bytes()).hexdigest()
    assert sha in text
    assert sha in (artifact / "reports" / "report.md").read_text()


def test_the_verdict_comes_first(
    sources: Path, tmp_path: Path, benchmark_report: dict[str, Any]
) -> None:
    artifact = make_artifact(tmp_path / "dist")
    (artifact / "reports").mkdir()
    for name in ("a.json", "b.json"):
        shutil.copy(sources / name, artifact / "reports")
    material = gather([artifact])
    claims = {c.name: c for c in verdict(figures(material))}
    assert claims["Measurement"].good and claims["Measurement"].text == "valid"
    assert "times as fast as FP32" in claims["Speed"].text
    # The meter is of the board's input: 12 W.
    assert re.search(r"mJ an image, 1[12](\.\d+)? W", claims["Power"].text), claims["Power"].text
    assert "+0.0200 degrees (+0.0100 to +0.0300) on rendered" in claims["Accuracy gate"].text
    bad = {**benchmark_report, "state": "partial"}
    (artifact / "reports" / "a.json").write_text(json.dumps(bad))
    claims = {c.name: c for c in verdict(figures(gather([artifact])))}
    assert claims["Measurement"].good is False and "interrupted" in claims["Measurement"].text
    nothing = {c.name: c for c in verdict(figures(gather([make_artifact(tmp_path / "other")])))}
    assert nothing["Speed"].text == "not measured" and nothing["Power"].good is None
    text = html_page(material)
    assert text.index("Accuracy gate") < text.index("<h2>")


def test_several_artifacts_have_a_row_each(
    sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dist = tmp_path / "dist"
    first = make_artifact(dist)
    (first / "reports").mkdir()
    for name in ("a.json", "b.json"):
        shutil.copy(sources / name, first / "reports")
    for name in ("two", "three"):
        shutil.copytree(first, dist / name)
    shutil.rmtree(dist / "three" / "reports")
    (dist / "other.txt").touch()
    assert run(*sorted(dist.iterdir())) == 0
    assert "passed over" in capsys.readouterr().err
    text = (dist / "report.html").read_text()
    table = text.partition("<tbody>")[2].partition("</tbody>")[0]
    assert table.count("<tr>") == 3
    assert table.count("<td>valid</td>") == 2
    assert text.count("<svg") == 1
    # The page's policy lets in its own script and no other.
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in html.unescape(text)
    assert (dist / "report.md").read_text().count("\n| ") == 5


def test_a_page_without_validation_says_how_to_make_one(
    sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    artifact = make_artifact(tmp_path / "my dist")
    assert run(artifact) == 0
    err = capsys.readouterr().err
    assert "no validation report was found" in err
    words = shlex.split(err.partition("make one with: ")[2])
    assert words == ["edgehp", "validate", str(artifact)]
    # What that command writes is what the page takes.
    report = default_report(artifact, None)
    report.parent.mkdir(exist_ok=True)
    shutil.copy(sources / "b.json", report)
    assert run(artifact) == 0
    assert capsys.readouterr().err == ""


def test_markdown_has_the_figures(sources: Path) -> None:
    page_of(sources)
    text = (sources / "out" / "report.md").read_text()
    assert "| MAE | 3.000 | 3.020 | +0.020 (+0.010 to +0.030) |" in text
    assert "| artifact inference | 1200 |" in text
    assert "face<0>.png (31.0°)" in text
    assert "mJ an image" in text


def test_the_page_in_a_real_browser(sources: Path, tmp_path: Path) -> None:
    """Chromium draws it, with the parts where they belong, and no error on its console."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("chromium is not installed")
    page = page_of(sources)
    shot = tmp_path / "page.png"
    done = subprocess.run(
        [chromium, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
         f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1000,3000",
         "--enable-logging=stderr", f"--screenshot={shot}", page.as_uri()],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-500:]
    assert "CONSOLE" not in done.stderr
    picture = cv2.imread(str(shot))
    assert picture is not None
    assert picture.shape[:2] == (3000, 1000)
    # The colours of both networks' plots and of the photo are on the page.
    for bgr in ((178, 114, 0), (0, 94, 213)):
        assert int((np.abs(picture.astype(int) - bgr).max(axis=2) < 12).sum()) > 200


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected object"),
        ("{}", "the kind None"),
        ('{"kind": "benchmark", "schema": 99}', "reads up to 3"),
        (None, "cannot be read"),
    ],
)
def test_what_is_no_report_is_refused(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "report.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=words):
        read_report(path)


def test_nothing_to_report_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path) == 1
    assert "edgehp bench" in capsys.readouterr().err
