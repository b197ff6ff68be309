"""The meters on emulated hardware: a tree of sysfs files, a fake NVML and a fake jtop."""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgehp.benchmark import power
from edgehp.benchmark.power import open_meter
from edgehp.benchmark.power.base import PowerRecorder, Sample, energy_over
from edgehp.benchmark.power.jetson import Ina3221Meter, JtopMeter
from edgehp.benchmark.power.nvml import NvmlMeter
from edgehp.benchmark.power.rapl import RaplMeter
from edgehp.benchmark.power.text import CommandMeter, CsvMeter, parse_time
from edgehp.errors import DataError, EnvironmentalError, MeasurementError, UsageError
from tests.boards import GPUS, JETSONS, NVMLError, put


def test_ina3221_that_goes_away_is_an_error(tmp_path: Path) -> None:
    root = JETSONS["NX kit, 6.0"].write(tmp_path)
    meter = Ina3221Meter(root)
    assert set(meter.values()) == {"VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"}
    for file in root.glob("sys/bus/i2c/devices/1-0040/hwmon/hwmon*/curr*_input"):
        file.unlink()
    with pytest.raises(MeasurementError, match="no longer answer"):
        meter.read()


def rapl(root: Path, name: str, domain: str, count: int, largest: int = 10**9) -> None:
    base = f"sys/class/powercap/{name}"
    put(root, {f"{base}/name": domain, f"{base}/max_energy_range_uj": largest})
    put(root, {f"{base}/energy_uj": count % largest})


def test_rapl_counts_over_a_wrap_and_adds_no_part_twice(tmp_path: Path) -> None:
    def count(i: int) -> None:
        # 40 W of the package, whose counter wraps after a quarter of a second; 5 W of the memory.
        rapl(tmp_path, "intel-rapl:0", "package-0", 990_000_000 + i * 4_000_000)
        rapl(tmp_path, "intel-rapl:0:0", "core", 5)
        rapl(tmp_path, "intel-rapl:0:1", "dram", i * 500_000)
        rapl(tmp_path, "intel-rapl:1", "psys", 0)

    count(0)
    meter = RaplMeter(tmp_path)
    assert meter.info.total == ("package-0", "dram-0")
    samples = []
    for i in range(41):
        count(i)
        samples.append(Sample(100 + i / 10, meter.values()))
    energy = energy_over(meter.info, samples, [(100.05, 103.05)])
    assert energy.joules["total"] == pytest.approx(3 * 45, rel=0.01)
    assert energy.joules["psys"] == pytest.approx(0)


def test_rapl_that_only_root_may_read_says_so(tmp_path: Path) -> None:
    rapl(tmp_path, "intel-rapl:0", "package-0", 1)
    file = tmp_path / "sys/class/powercap/intel-rapl:0/energy_uj"
    file.unlink()
    file.mkdir()  # cannot be read, whoever runs the test
    with pytest.raises(EnvironmentalError, match="root only"):
        RaplMeter(tmp_path)
    with pytest.raises(EnvironmentalError, match="no RAPL"):
        RaplMeter(tmp_path / "elsewhere")


def fake_nvml(**answers: Any) -> Any:
    """NVML of a T4 whose functions give these answers; those of a list in turn, errors raised."""

    def call(value: Any) -> Any:
        answers = iter(value) if isinstance(value, list) else itertools.repeat(value)

        def function(*_: Any) -> Any:
            answer = next(answers)
            if isinstance(answer, Exception):
                raise answer
            return answer

        return function

    nvml = GPUS["T4"].nvml()
    vars(nvml).update({name: call(value) for name, value in answers.items()})
    return nvml


def test_nvml_without_a_counter_reads_power() -> None:
    nvml = fake_nvml(nvmlDeviceGetTotalEnergyConsumption=NVMLError("not supported"))
    meter = NvmlMeter(module=nvml)
    assert meter.info.kind == "power"
    assert meter.values()["gpu"] == pytest.approx(70.0)


@pytest.mark.parametrize("second", [4_000_000, NVMLError("GPU is lost")])
def test_nvml_that_restarts_or_dies_is_an_error(second: Any) -> None:
    counter = [5_000_000, second]
    meter = NvmlMeter(module=fake_nvml(nvmlDeviceGetTotalEnergyConsumption=counter))
    with pytest.raises(MeasurementError, match="stopped or was set back"):
        meter.read()


def test_nvml_without_a_driver_says_so() -> None:
    with pytest.raises(EnvironmentalError, match="driver not loaded"):
        NvmlMeter(module=fake_nvml(nvmlInit=NVMLError("driver not loaded")))


def test_of_several_gpus_the_one_that_is_measured_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = fake_nvml(nvmlDeviceGetCount=2)
    asked: list[Any] = []
    for name in ("nvmlDeviceGetHandleByIndex", "nvmlDeviceGetHandleByUUID"):
        setattr(nvml, name, lambda which: asked.append(which))
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(EnvironmentalError, match="set CUDA_DEVICE_ORDER=PCI_BUS_ID"):
        NvmlMeter(module=nvml)
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    NvmlMeter(module=nvml)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-5ebe9f43")
    NvmlMeter(module=nvml)
    assert asked == [1, "GPU-5ebe9f43"]


class JtopException(Exception):  # noqa: N818 - as jetson-stats names it
    pass


def fake_jtop(active: bool = True, ok: bool = True) -> SimpleNamespace:
    """The library with a service of two rails, none of which is the input."""
    rails = {"GPU": {"power": 4000, "avg": 1}, "CPU": {"power": 2000, "avg": 1}}

    def start() -> None:
        if not active:
            raise JtopException("The jtop.service is not active")

    service = SimpleNamespace(
        start=start,
        ok=lambda: ok,
        interval=0.2,
        power={"tot": {"power": 6000, "avg": 1}, "rail": rails},
        close=lambda: None,
    )
    return SimpleNamespace(jtop=lambda interval: service, JtopException=JtopException)


def test_without_an_input_or_a_documented_sum_the_total_is_that_of_jtop() -> None:
    meter = JtopMeter(fake_jtop())
    assert meter.info.total == ("tot",) and "jetson-stats adds" in meter.info.includes
    assert meter.read().values == {"GPU": 4.0, "CPU": 2.0, "tot": 6.0}


def test_jtop_whose_service_is_dead_or_dies_says_so() -> None:
    with pytest.raises(EnvironmentalError, match=r"restart jtop\.service"):
        JtopMeter(fake_jtop(active=False))
    meter = JtopMeter(fake_jtop(ok=False))
    with pytest.raises(MeasurementError, match="stopped during the run"):
        meter.read()


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A CSV with a row from before; its clock is that of `opened`."""
    path = tmp_path / "wall.csv"
    path.write_text("Time,Watts,Remark\n1000.5,40,\n")
    return path


def opened(path: Path) -> CsvMeter:
    return CsvMeter(path, clock=lambda: 100.0, wall=lambda: 1000.0)


def append(path: Path, data: str | bytes) -> None:
    with path.open("ab") as file:
        file.write(data if isinstance(data, bytes) else data.encode())


def test_a_csv_is_read_from_its_end_as_it_grows(log: Path) -> None:
    append(log, "1000.9,4")
    with contextlib.closing(opened(log)) as meter:
        assert meter.read() is None
        append(log, "1,the row that was being written\n1970-01-01T00:16:41Z,4")
        assert meter.read() is None, "half a row is none"
        append(log, "2,\n\n1003,43,\n")
        first, nothing, second = meter.read(), meter.read(), meter.read()
    assert first is not None and second is not None and nothing is None
    assert (first.time, first.values) == (101.0, {"wall": 42.0})
    assert (second.time, second.values) == (103.0, {"wall": 43.0})


def test_all_waiting_rows_of_a_csv_are_taken_at_once(log: Path) -> None:
    with contextlib.closing(opened(log)) as meter:
        append(log, "".join(f"{1000 + i},5,\n" for i in range(50)))
        recorder = PowerRecorder(meter)
        recorder._look()
    assert len(recorder.samples) == 50


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("1001,41.5 mW,", "the unit is mW"),
        ("1001,41.5 VA,", "the unit is VA"),
        ("1001,230 V 41.5 W,", "found 2 numbers"),
        ("1001,41,5,", "found 4 columns"),
        ('1001,"41,5",', "a comma"),
        ("1001,-3,", "-3 W is not between"),
        ("1001,5200000,", "5.2e.06 W is not between"),
        ("1001,nan,", "found no numbers"),
        ("1001000,41,", "from this machine's clock"),
        ("yesterday,41,", "Invalid isoformat"),
        ("1001", "found 1 columns"),
        ("1002,41,\n1001.5,43,", r"0\.5 s before the last row's"),
    ],
)
def test_a_row_that_is_no_plausible_power_is_an_error(log: Path, row: str, words: str) -> None:
    with contextlib.closing(opened(log)) as meter:
        append(log, row + "\n")
        with pytest.raises(MeasurementError, match=words):
            assert meter.read() is not None and meter.read() is not None


def test_other_columns_may_be_in_any_encoding(log: Path) -> None:
    """A remark in Latin-1 in the middle of a run is nobody's power; a meter's thread goes on."""
    log.write_bytes(b"\xef\xbb\xbftime,watts,Temp [\xb0C]\n")
    with contextlib.closing(opened(log)) as meter:
        append(log, b"1001,5.0 W,41 \xb0C\n1002,5.\xb00,\n")
        sample = meter.read()
        assert sample is not None and sample.values == {"wall": 5.0}
        with pytest.raises(MeasurementError, match="is not a time and watts"):
            meter.read()


@pytest.mark.parametrize(
    "header",
    [b"when,volts\n", b"time,power_mW\n", b"time;watts\n", "time,watts\n".encode("utf-16"), b""],
)
def test_a_csv_without_the_columns_is_refused(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "wall.csv"
    path.write_bytes(header)
    with pytest.raises(DataError, match=r"columns time and watts\nhint: .* UTF-8 with commas"):
        CsvMeter(path)
    with pytest.raises(ValueError, match="no time zone"):
        parse_time("2026-01-01T00:00:00")


@pytest.mark.parametrize(
    ("printed", "words"), [("none", "found no numbers"), ("230.1 V 41.5 W", "found 2 numbers")]
)
def test_a_command_prints_watts_or_is_refused(printed: str, words: str) -> None:
    assert CommandMeter("echo power 41.5 W").values() == {"wall": 41.5}
    with pytest.raises(EnvironmentalError, match=f"expected a number of watts: .*{words}"):
        CommandMeter(f"echo {printed}")
    with pytest.raises(EnvironmentalError, match="failed"):
        CommandMeter("/no/such/command")


def test_choosing_a_meter(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise EnvironmentalError("not here")

    fake = SimpleNamespace(info="it")
    monkeypatch.setattr(power, "METERS", {"a": broken, "nvml": lambda: fake})
    assert open_meter("auto") == (fake, None)
    assert open_meter("none")[0] is None
    # The power of an idle GPU says nothing about a processor engine.
    found, why = open_meter("auto", "openvino")
    assert found is None
    assert str(why).startswith("no power meter works here: a: not here; nvml: measures a GPU")
    with pytest.raises(EnvironmentalError, match="not here"):
        open_meter("a")
    with pytest.raises(UsageError, match="no power meter 'sun'"):
        open_meter("sun")
