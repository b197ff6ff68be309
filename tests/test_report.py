"""Reports: read strictly, shown on one page."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import math
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import cv2
import jsonschema
import numpy as np
import pytest
from msgspec import structs

from edgehp.benchmark.host import HostState
from edgehp.benchmark.lanes import Subject, Turn, WarmUp
from edgehp.benchmark.power.base import MeterInfo, PowerRecorder, Sample
from edgehp.benchmark.report import BenchmarkReport, Context, assemble, report_schema
from edgehp.benchmark.roofline import GraphCost, Roofline, peaks_for, place
from edgehp.benchmark.run import Measured, Plan
from edgehp.cli.main import main
from edgehp.crop import Preprocessing
from edgehp.engines.base import EngineInfo
from edgehp.errors import DataError
from edgehp.report.figures import Claim, figures, verdict
from edgehp.report.gather import gather, read_report, write_report
from edgehp.targets import load_target
from edgehp.validation import run as validated
from edgehp.validation.metrics import Accuracy, Band, Summary, Worst
from edgehp.validation.run import BandDrop, Drop, ValidationReport
from edgehp.validation.statistics import Interval
from tests.bench_artifact import make_artifact

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


def subject(name: str, precision: str) -> Subject:
    engine = EngineInfo("openvino", "2026.4", "Test CPU", 2, precision, {"spin": None})
    return Subject(
        name=name,
        network_digest="a" * 64,
        engine=engine,
        input_size=32,
        batch=1,
        precision=precision,
        target="cpu",
        tried={},
    )


@pytest.fixture(scope="module")
def benchmark_report() -> BenchmarkReport:
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
    measured = Measured(warm, tuple(turns), (2.0, 8.0), (10.0, 21.9), False)
    context = Context(
        plan=Plan(duration_s=6),
        subjects={"artifact": subject("kd-int8", "int8"), "reference": subject("kd-fp32", "fp32")},
        reference_reason=None,
        source="test",
        preprocessing=SPEC,
        host={"processor": "Test CPU", "power_mode": "15W", "governors": ["performance"]},
        recorder=recorder,
    )
    work = GraphCost(3_640_000_000, 11_700_000, 150_552, 9_000_000, 21)
    peaks = peaks_for(load_target("orin-nx-16gb"), "15W", "Orin", "int8")
    roofline = {"artifact": Roofline(None, None, place(work, peaks, 160.0, 1))}
    report = structs.replace(assemble(measured, context, states), roofline=roofline)
    jsonschema.validate(report.to_dict(), report_schema(), jsonschema.Draft202012Validator)
    assert report.validity.valid, report.validity.reasons
    return report


def interval(value: float, around: float = 0.01) -> Interval:
    return Interval(value, value - around, value + around, 0.95, "t", 300, "frame", 0, 0)


def accuracy(mae: float) -> Accuracy:
    def summary(frames: int, error: float) -> Summary:
        return Summary(frames, (error, error, error), error, 2 * error, error)

    bands = (
        Band(0, 30, summary(200, mae * 0.8)),
        Band(30, 60, summary(100, mae * 1.4)),
        Band(60, 99, None),
    )
    worst = (
        Worst("face<0>.png", 31.0, (1, 80, 3), (2, 50, 4)),
        Worst("gone.png", 21.0, (1, 70, 3), (2, 50, 4)),
    )
    return Accuracy(summary(300, mae), bands, worst)


def validation_report() -> ValidationReport:
    bands = (
        BandDrop(0, 30, 200, interval(0.01)),
        BandDrop(30, 60, 100, interval(0.04)),
        BandDrop(60, 99, 0, None),
    )
    overall = interval(0.02)
    return ValidationReport(
        protocol={"dataset": "rendered", "frames": 300},
        preprocessing=SPEC.to_dict(),
        preprocessing_digest=SPEC.digest,
        batch=32,
        reference=validated.Subject("kd-fp32", None, {}),
        artifact=validated.Subject("kd-int8", None, {}),
        reference_accuracy=accuracy(3.0),
        artifact_accuracy=accuracy(3.02),
        # Of so few units that it has no bounds.
        reference_mae=interval(3.0, math.inf),
        artifact_mae=interval(3.02),
        drop=Drop(overall, (overall, overall, overall), interval(0.03), bands, 0.09, 0.4, 0.03),
    )


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory, benchmark_report: BenchmarkReport) -> Path:
    """An artifact with both reports, from which ``edgehp report`` has made its page."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    folder = make_artifact(tmp_path_factory.mktemp("dist"), small=True)
    write_report(benchmark_report.to_dict(), folder / "reports", "bench-single-stream")
    write_report(validation_report().to_dict(), folder / "reports", "validation")
    (folder / "notes.json").write_text("[]")
    faces = tmp_path_factory.mktemp("faces")
    face = np.full((64, 64, 3), 90, np.uint8)
    cv2.circle(face, (32, 32), 20, (120, 160, 220), -1)
    cv2.imwrite(str(faces / "face<0>.png"), face)
    assert run(folder, "--faces", faces) == 0
    return folder


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as leaving:
        main(["report", *map(str, arguments)])
    return int(leaving.value.code or 0)


def claims_of(folder: Path) -> dict[str, Claim]:
    return {c.name: c for c in verdict(figures(gather([folder])))}


def test_the_page_is_whole_and_needs_no_network(reported: Path) -> None:
    text = (reported / "reports" / "report.html").read_text()
    # The verdict first.
    assert text.index("Accuracy gate") < text.index("<h2>")
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
    # The manifest is there, with the hash of each file.
    assert "<h2>Manifest</h2>" in text
    assert hashlib.sha256((reported / "engine.onnx").read_bytes()).hexdigest() in text


def test_markdown_has_the_figures(reported: Path) -> None:
    text = (reported / "reports" / "report.md").read_text()
    assert "| MAE | 3.000 | 3.020 | +0.020 (+0.010 to +0.030) |" in text
    assert "| artifact inference | 1200 |" in text
    assert "face<0>.png (31.0°)" in text
    assert "mJ an image" in text
    assert hashlib.sha256((reported / "engine.onnx").read_bytes()).hexdigest() in text


def test_the_verdict_of_an_artifact(
    reported: Path, tmp_path: Path, benchmark_report: BenchmarkReport
) -> None:
    claims = claims_of(reported)
    assert claims["Measurement"].good and claims["Measurement"].text == "valid"
    assert "times as fast as FP32" in claims["Speed"].text
    # The meter is of the board's input: 12 W.
    assert re.search(r"mJ an image, 1[12](\.\d+)? W", claims["Power"].text), claims["Power"].text
    assert "+0.0200 degrees (+0.0100 to +0.0300) on rendered" in claims["Accuracy gate"].text
    partial = structs.replace(benchmark_report, state="partial")
    write_report(partial.to_dict(), tmp_path, "bench")
    claims = claims_of(tmp_path)
    assert claims["Measurement"].good is False and "interrupted" in claims["Measurement"].text
    nothing = claims_of(make_artifact(tmp_path / "other", small=True))
    assert nothing["Speed"].text == "not measured" and nothing["Power"].good is None


def test_several_artifacts_have_a_row_each(
    reported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
        shutil.copy(reported / "manifest.json", tmp_path / name)
    for name in ("one", "two"):
        shutil.copytree(reported / "reports", tmp_path / name / "reports")
    (tmp_path / "other.txt").touch()
    assert run(*sorted(tmp_path.iterdir())) == 0
    assert "passed over" in capsys.readouterr().err
    text = (tmp_path / "report.html").read_text()
    table = text.partition("<tbody>")[2].partition("</tbody>")[0]
    assert table.count("<tr>") == 3
    assert table.count("<td>valid</td>") == 2
    assert text.count("<svg") == 1
    # The page's policy lets in its own script and no other.
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in html.unescape(text)
    assert (tmp_path / "report.md").read_text().count("\n| ") == 5


def test_a_page_without_a_report_says_how_to_make_one(
    reported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = tmp_path / "my dist"
    artifact.mkdir()
    shutil.copy(reported / "manifest.json", artifact)
    assert run(artifact) == 0
    err = capsys.readouterr().err
    for kind, made_by in (("validation", "validate"), ("benchmark", "bench")):
        command = re.search(rf"no {kind} report was found.* make one with: (.*)", err)
        assert command is not None
        assert shlex.split(command[1]) == ["edgehp", made_by, str(artifact)]
    # What those commands write is what the page takes.
    place = artifact / "reports" / "validation-rendered.json"
    place.parent.mkdir(exist_ok=True)
    shutil.copy(reported / "reports" / "validation.json", place)
    shutil.copy(reported / "reports" / "bench-single-stream.json", place.parent)
    assert run(artifact) == 0
    assert capsys.readouterr().err == ""


def test_the_page_in_a_real_browser(reported: Path, tmp_path: Path) -> None:
    """Chromium draws it, with the parts where they belong, and no error on its console."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("chromium is not installed")
    page = reported / "reports" / "report.html"
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
        ('{"kind": "benchmark", "schema": 99}', "schema 99 of a benchmark report, expected 4"),
        ('{"kind": "benchmark", "schema": 4}', "key '.*' is missing"),
        ('{"kind": "validation", "schema": 2}', "key '.*' is missing"),
        (None, "cannot be read"),
    ],
)
def test_what_is_no_report_is_refused(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "report.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=words):
        read_report(path)


def test_a_validation_reads_as_it_was_written(tmp_path: Path) -> None:
    report = validation_report()
    assert read_report(write_report(report.to_dict(), tmp_path, "v")) == report
    broken = report.to_dict()
    del broken["artifact_mae"]["low"]
    with pytest.raises(DataError, match=r"key 'artifact_mae.low' is missing"):
        read_report(write_report(broken, tmp_path, "u"))
    broken = report.to_dict()
    broken["drop"]["overall"]["value"] = "much"
    path = write_report(broken, tmp_path, "w")
    with pytest.raises(DataError, match=r"'drop.overall.value' is 'much'; expected float"):
        read_report(path)


def test_a_benchmark_without_its_artifact_is_refused(
    benchmark_report: BenchmarkReport, tmp_path: Path
) -> None:
    broken = benchmark_report.to_dict()
    del broken["results"]["artifact"]["stages"]["call"]
    with pytest.raises(DataError, match=r"results.artifact.* has other stages"):
        read_report(write_report(broken, tmp_path, "b"))
    del broken["results"]["artifact"]
    with pytest.raises(DataError, match=r"'results' has no 'artifact'"):
        read_report(write_report(broken, tmp_path, "b"))


def test_reports_of_earlier_releases_stop_no_page(
    reported: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "artifact"
    shutil.copytree(reported, folder)
    write_report({"kind": "benchmark", "schema": 3}, folder / "reports", "bench-offline")
    assert len(gather([folder]).benchmarks) == 1
    assert "found schema 3 of a benchmark report, expected 4" in caplog.text


def test_an_interval_without_ends_is_no_verdict(reported: Path) -> None:
    report = validation_report()
    assert report.drop is not None
    unbounded = dataclasses.replace(report.drop, overall=interval(0.02, math.inf))
    material = dataclasses.replace(
        gather([reported]), validations=(dataclasses.replace(report, drop=unbounded),)
    )
    assert figures(material).passed is None
    assert "inf" not in verdict(figures(material))[0].text


def test_nothing_to_report_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, hint in ((tmp_path, "'edgehp bench'"), (tmp_path / "none", "'edgehp build'")):
        assert run(folder) == 1
        assert re.search(rf"hint: .*{hint}", capsys.readouterr().err)
