"""``edgehp bench`` from the command line, on a real engine."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import jsonschema
import pytest
from msgspec import structs

from edgehp.benchmark import session
from edgehp.benchmark.host import HostWatch
from edgehp.benchmark.power.base import POWER, Meter, MeterInfo, PowerRecorder, Sample
from edgehp.benchmark.power.jetson import Ina3221Meter
from edgehp.benchmark.report import BenchmarkReport, report_schema
from edgehp.benchmark.roofline import BOARDS, Roof, graph_cost, measure_peaks, peaks_for, place
from edgehp.cli.main import main
from edgehp.device import SYSTEM_ROOT
from edgehp.errors import DataError, MeasurementError, UsageError
from edgehp.files import parse_json
from edgehp.shipping.sbom import measured_energy
from edgehp.targets import list_targets, load_target
from tests.bench_artifact import make_artifact
from tests.boards import JETSONS

QUICK = ("--duration", "0.3", "--warm-up", "0", "--threads", "1", "--idle", "0.3")
ALONE = ("--against", "none")
METER = "command:echo 12.5"
Bench = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of some kilobytes, without a convolution."""
    return make_artifact(tmp_path_factory.mktemp("dist"), small=True)


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(tmp_path_factory.mktemp("resnet"))


@pytest.fixture(autouse=True)
def roof(monkeypatch: pytest.MonkeyPatch) -> Roof:
    """The roof of a known processor: measuring the real one takes seconds, once, below."""
    found = Roof("test processor", 1e13, 20.0, "made up", measured=True)
    monkeypatch.setattr(session, "measure_peaks", lambda *_, **__: found)
    return found


def watch(root: Path = SYSTEM_ROOT) -> Callable[..., HostWatch]:
    """Makes recorders of the machine under `root` that look often."""

    def make(fill: Any) -> HostWatch:
        found = HostWatch(fill, root)
        found.period_s = 0.05
        return found

    return make


@pytest.fixture
def bench(
    artifact: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Bench:
    """Run ``edgehp bench`` on the artifact, quickly and with its reports in `tmp_path`.

    Meters are read more often than they say, so that no pause of a busy machine is a hole.
    """

    def record(meter: Meter) -> PowerRecorder:
        found = PowerRecorder(meter)
        found.period_s = 0.1
        return found

    def run(*arguments: object, of: Path = artifact) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as leaving:
            main(["bench", *map(str, (of, *QUICK, "--output", tmp_path, *arguments))])
        out = capsys.readouterr()
        return int(leaving.value.code or 0), out.out, out.err

    monkeypatch.setattr(session, "PowerRecorder", record)
    monkeypatch.setattr(session, "HostWatch", watch())
    return run


def report_of(text: str) -> BenchmarkReport:
    # The published schema, by the checker that others use, and edgehp's own reader.
    jsonschema.validate(json.loads(text), report_schema(), jsonschema.Draft202012Validator)
    return parse_json(text.encode(), BenchmarkReport, "report")


def measured(bench: Bench, *arguments: object, **options: Path) -> BenchmarkReport:
    """The report of a run that ends well."""
    code, out, err = bench(*arguments, "--allow-invalid", "--json", **options)
    assert code == 0, err
    return report_of(out)


@pytest.mark.parametrize("scenario", ["single-stream", "offline", "multi-camera"])
def test_every_scenario_measures_both_networks(bench: Bench, tmp_path: Path, scenario: str) -> None:
    words = ("--scenario", scenario, "--batch", "2", "--cameras", "2", "--fps", "50")
    report = measured(bench, *words)
    assert report_of((tmp_path / f"bench-{scenario}.json").read_text()) == report
    for result in report.results.values():
        assert result.images > 0
        stages = result.stages
        # What is null has a reason, and only that.
        assert set(result.absent) == {s for s, v in stages.items() if v is None}
        if scenario == "single-stream":
            mean = {k: v.mean_ms for k, v in stages.items() if v is not None}
            assert stages["inference"].count == result.calls  # type: ignore[union-attr]
            assert mean["end_to_end"] == pytest.approx(mean["preprocessing"] + mean["call"])
            assert mean["upload"] + mean["inference"] + mean["download"] <= mean["call"]
            assert "part of the deployed graph" in result.absent["decode"]
        if scenario == "multi-camera":
            assert result.arrived == result.images + (result.dropped or 0)
        if scenario == "offline":
            assert result.offline is not None and (result.offline.overlap or 0) > 0
    assert report.comparison[0].ratio > 0
    assert "nothing multiplies" in str(report.roofline["artifact"].reason)
    artifact, reference = report.subjects.values()
    assert (artifact.engine.threads, artifact.clock, artifact.cropping_clock) == (1, "host", "host")
    assert artifact.manifest_digest is not None and reference.manifest_digest is None


def test_an_invalid_run_is_written_and_ends_with_6(bench: Bench, tmp_path: Path) -> None:
    # Two cameras for a fifth of a second: far below the 459 frames that p99 needs.
    words = ("--scenario", "multi-camera", "--cameras", "2", "--duration", "0.2", *ALONE)
    code, out, err = bench(*words)
    assert code == 6
    assert "INVALID" in out
    assert "459 are needed" in err
    report = report_of((tmp_path / "bench-multi-camera.json").read_text())
    assert not report.validity.valid
    assert report.reference_reason == "measured alone, as asked for"


def test_power_is_measured_in_the_same_run_gross_and_net(bench: Bench, tmp_path: Path) -> None:
    report = measured(
        bench, *ALONE, "--power", METER, "--require-power", "--duration", "0.6",
        "--output", tmp_path / "reports",
    )  # fmt: skip
    result, idle = report.results["artifact"], report.power.idle
    energy = result.energy
    assert energy is not None and idle is not None
    # What a bundle of the artifact says of it.
    digest = str(report.subjects["artifact"].manifest_digest)
    (tmp_path / "reports" / "other.json").write_text("[]")
    assert measured_energy(tmp_path, digest) == energy.joules_per_image
    assert measured_energy(tmp_path, "another") == {}
    assert energy.watts["total"] == idle.watts["total"] == pytest.approx(12.5)
    per_image = 12.5 * energy.seconds / result.images
    assert energy.joules_per_image["total"] == pytest.approx(per_image)
    assert energy.net_joules_per_image["total"] == pytest.approx(0, abs=1e-6)


def test_power_that_cannot_be_had_is_null_with_a_reason_or_exit_6(bench: Bench) -> None:
    common = (*ALONE, "--power", "none")
    report = measured(bench, *common)
    assert report.results["artifact"].energy is None
    assert report.power.reason == "not measured, as asked for"
    code, _, err = bench(*common, "--require-power")
    assert code == 6 and "power was required" in err
    # A meter asked for by name is never replaced.
    code, _, err = bench("--power", "jtop")
    assert code == 5 and "jetson-stats" in err


def test_another_artifact_takes_turns(bench: Bench, artifact: Path) -> None:
    subjects = measured(bench, "--against", artifact).subjects
    assert subjects["reference"].manifest_digest == subjects["artifact"].manifest_digest is not None


class ThrottlingMeter(Ina3221Meter):
    """Each reading brings an over-current event."""

    def __init__(self, root: Path) -> None:
        self.root, self.reads = root, 0
        super().__init__(root)
        self.info = structs.replace(self.info, period_s=1.0)

    def values(self) -> dict[str, float]:
        self.reads += 1
        # Renamed, so that whoever reads it meanwhile never finds it empty.
        new = self.root / "count"
        new.write_text(f"{self.reads}\n")
        new.replace(self.root / "sys/class/hwmon/hwmon0/oc1_event_cnt")
        return super().values()


def test_a_jetson_that_throttles_is_invalid_and_its_energy_stands(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    board = JETSONS["NX kit, 6.0"]
    root = board.write(tmp_path / "root")
    monkeypatch.setattr(session, "open_meter", lambda *_: (ThrottlingMeter(root), None))
    monkeypatch.setattr(session, "HostWatch", watch(root))
    code, out, err = bench("--duration", "1", *ALONE, "--require-power")
    assert code == 6
    assert re.search(r"throttling: over-current event oc1 counted \d+ more", err), err
    report = report_of((tmp_path / "bench-single-stream.json").read_text())
    assert report.power.meter is not None
    assert set(report.power.meter.rails) == {"VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"}
    energy = report.results["artifact"].energy
    assert energy is not None
    assert energy.watts["total"] == energy.watts["VDD_IN"] == pytest.approx(board.watts)
    assert "6.23 W" in out


class DyingMeter:
    """10 W, five times; then its service is gone."""

    info = MeterInfo("jtop", POWER, {"VDD_IN": "all"}, ("VDD_IN",), "all", 0.01)

    def __init__(self) -> None:
        self.left = 5

    def read(self) -> Sample:
        self.left -= 1
        if self.left < 0:
            raise MeasurementError("the service of jetson-stats stopped during the run")
        return Sample(perf_counter(), {"VDD_IN": 10.0})

    def close(self) -> None:
        pass


def test_a_service_that_dies_leaves_no_energy_and_fails_where_power_is_required(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "open_meter", lambda *_: (DyingMeter(), None))
    code, _, err = bench(*ALONE, "--allow-invalid", "--require-power")
    assert code == 6
    assert "stopped during the run" in err
    report = measured(bench, *ALONE)
    result = report.results["artifact"]
    assert report.power.reason == "the service of jetson-stats stopped during the run"
    assert result.energy is not None and result.energy.joules == {"VDD_IN": None, "total": None}
    assert "before the measured time: the meter stopped" in result.energy.reasons["VDD_IN"]
    # The latencies of the same run stand.
    assert result.stages["inference"] is not None


def test_an_interruption_before_the_first_turn_leaves_an_honest_report(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("edgehp.benchmark.run.warm_up", interrupted)
    code, _, err = bench(*ALONE)
    assert code == 130
    assert "marked partial" in err
    report = report_of((tmp_path / "bench-single-stream.json").read_text())
    result = report.results["artifact"]
    assert (report.state, report.validity.valid, result.images) == ("partial", False, 0)
    assert result.absent["inference"] == "no turn was finished"


def test_ctrl_c_writes_what_a_terminal_was_shown(artifact: Path, tmp_path: Path) -> None:
    ours, theirs = os.openpty()
    words = "-v bench --duration 10 --warm-up 0 --threads 1 --against none --power none"
    process = subprocess.Popen(
        [sys.executable, "-m", "edgehp", *words.split(" "), "--output", tmp_path, artifact],
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)},
        # A test run in the background inherits that interruptions are ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    os.close(theirs)
    shown = ""
    try:
        while "turn 2:" not in shown or "p99" not in shown:
            shown += os.read(ours, 4096).decode(errors="replace")
        process.send_signal(signal.SIGINT)
        while True:
            shown += os.read(ours, 4096).decode(errors="replace")
    except OSError:
        pass  # what reading a terminal gives whose other end was closed
    finally:
        os.close(ours)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    drawn = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert re.search(r"single-stream .*/10 s", drawn)
    assert re.search(r"measure  artifact  p50 [\d.]+ ms  p99 [\d.]+ ms", drawn)
    assert "interrupted; the report is marked partial" in shown
    report = report_of((tmp_path / "bench-single-stream.json").read_text())
    assert report.state == "partial"
    assert len(report.timeline.turns) >= 2
    assert "PARTIAL" in out and "\x1b" not in out


def test_a_place_that_cannot_be_written_is_found_before_measuring(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise RuntimeError("measured")

    monkeypatch.setattr(session, "benchmark", never)
    (tmp_path / "file").touch()
    code, out, err = bench("--output", tmp_path / "file" / "reports")
    assert (code, out) == (5, "")
    assert "cannot be written" in err and "another --output" in err
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_disk_that_fills_meanwhile_costs_the_file_but_not_the_figures(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("edgehp.files.write_whole", full)
    code, out, err = bench(*ALONE, "--output", tmp_path / "r", "--allow-invalid")
    assert code == 5
    assert "No space left" in err and "another --output" in err
    assert "single-stream:" in out and "INVALID" in out and "\nmeasured" not in out


def test_frames_that_are_none_are_found_before_networks_are_opened(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(session, "open_artifact")
    (tmp_path / "empty").mkdir()
    code, _, err = bench("--frames", tmp_path / "empty")
    assert code == 1 and "empty: no photos" in err


def test_a_run_is_placed_under_the_roof(bench: Bench, resnet: Path, roof: Roof) -> None:
    placed = measured(bench, *ALONE, of=resnet).roofline["artifact"].roofline
    # At 32 pixels the weights take longer to read than the operations.
    assert placed is not None and (placed.bound, placed.peaks) == ("memory", roof)
    assert 0 < placed.fraction_of_compute < 1


def test_work_is_counted_from_the_graph(resnet: Path, tmp_path: Path) -> None:
    work = graph_cost(resnet / "engine.onnx", "fp32")
    # ResNet18 at 32 pixels: 37.2 M multiply-accumulates (3.64 G operations at 224, over 49).
    assert work.operations == pytest.approx(2 * 1.82e9 / 49, rel=0.1)
    assert work.weight_bytes == pytest.approx(4 * 11.4e6, rel=0.03)
    assert work.layers == 21
    assert graph_cost(resnet / "engine.onnx", "fp16").weight_bytes == work.weight_bytes / 2
    broken = tmp_path / "broken.onnx"
    broken.write_bytes((resnet / "engine.onnx").read_bytes()[:1000])
    with pytest.raises(DataError):
        graph_cost(broken, "fp32")


@pytest.mark.parametrize("precision", ["int8", "fp32"])
def test_the_roof_of_this_processor_is_measured(precision: str) -> None:
    found = measure_peaks(precision, 1, seconds=0.01)
    assert precision in found.source
    assert found.ops_per_s > 1e8
    assert found.bandwidth_gb_s > 0.1
    assert "with 1 threads" in found.source
    with pytest.raises(UsageError, match="fp16"):
        measure_peaks("fp16", 1)


def test_the_roof_is_that_of_the_active_power_mode(resnet: Path) -> None:
    work = graph_cost(resnet / "engine.onnx", "fp16")
    orin = load_target("orin-agx-64gb")
    peaks = peaks_for(orin, "MODE_50W", "Orin", "int8")
    (mode,) = (p for p in orin.power_modes if p.name == "50W")
    assert (peaks.name, peaks.ops_per_s) == ("50W", mode.int8_tops * 1e12)
    found = place(work, peaks, 1000.0, batch=1)
    assert found.reached_ops_per_s == work.operations * 1000.0
    assert found.fraction_of_compute == pytest.approx(work.operations * 1000.0 / peaks.ops_per_s)
    # At batch 1 the weights alone take longer to read than the operations: memory binds.
    assert found.bound == "memory"


@pytest.mark.parametrize(
    ("target", "device"),
    [
        ("cpu", "CPU"),
        ("orin-agx-64gb", "Orin"),
        ("l4", "NVIDIA L40S"),
        ("a10", "NVIDIA A10G"),
        ("h100", "NVIDIA H100 PCIe"),
        ("h100", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"),
        ("rtx-40", "NVIDIA GeForce RTX 4060 Ti"),
    ],
)
def test_no_peak_is_taken_from_a_similar_name(target: str, device: str) -> None:
    for mode in (None, "50W_CUSTOM"):
        with pytest.raises(DataError, match=r"^unknown: "):
            peaks_for(load_target(target), mode, device, "int8")


def test_every_board_of_the_targets_has_a_device_name() -> None:
    boards = {b.name for name in list_targets() for b in load_target(name).boards}
    assert boards <= set(BOARDS.values())
