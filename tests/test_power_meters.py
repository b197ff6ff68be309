"""The meters on emulated hardware: a tree of sysfs files, a fake NVML and a fake jtop."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgehp.benchmark.host import HostState
from edgehp.benchmark.power import PowerRecorder, energy_over, open_meter
from edgehp.benchmark.power.jetson import Ina3221Meter, JtopMeter
from edgehp.benchmark.power.nvml import GpuState, NvmlMeter
from edgehp.benchmark.power.rapl import RaplMeter
from edgehp.benchmark.power.text import CommandMeter, CsvMeter, parse_time
from edgehp.errors import DataError, EnvironmentalError, MeasurementError, UsageError


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def put(root: Path, files: dict[str, object]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")


def ina(root: Path, device: str, channels: dict[int, tuple[str, int, int]]) -> None:
    base = f"sys/bus/i2c/devices/{device}"
    put(root, {f"{base}/name": "ina3221"})
    for n, (label, mv, ma) in channels.items():
        monitor = f"{base}/hwmon/hwmon1"
        put(
            root,
            {
                f"{monitor}/in{n}_label": label,
                f"{monitor}/in{n}_input": mv,
                f"{monitor}/curr{n}_input": ma,
            },
        )


def test_ina3221_reads_rails_and_leaves_out_what_is_not_connected(tmp_path: Path) -> None:
    ina(
        tmp_path,
        "1-0040",
        {
            1: ("VDD_IN", 5000, 1200),
            2: ("NC", 5000, 999),
            3: ("VDD_SOC", 5000, 300),
            7: ("sum of shunt voltages", 9, 9),
        },
    )
    put(tmp_path, {"sys/bus/i2c/devices/1-0050/name": "24c02"})
    meter = Ina3221Meter(tmp_path)
    assert meter.read().values == pytest.approx({"VDD_IN": 6.0, "VDD_SOC": 1.5})
    assert meter.info.total == ("VDD_IN",)


def test_ina3221_of_an_agx_orin_states_no_total(tmp_path: Path) -> None:
    ina(
        tmp_path,
        "1-0040",
        {
            1: ("VDD_GPU_SOC", 19000, 100),
            2: ("VDD_CPU_CV", 19000, 50),
            3: ("VIN_SYS_5V0", 5000, 800),
        },
    )
    ina(tmp_path, "1-0041", {1: ("NC", 0, 0), 2: ("VDDQ_VDD2_1V8AO", 5000, 200)})
    clock = Clock()
    meter = Ina3221Meter(tmp_path, clock)
    samples = []
    for _ in range(21):
        samples.append(meter.read())
        clock.now += 0.1
    energy = energy_over(meter.info, samples, [(100.5, 101.5)])
    assert energy.total is None
    assert "VIN_SYS_5V0" in energy.reasons["total"]
    assert energy.joules["VIN_SYS_5V0"] == pytest.approx(4.0)
    assert energy.joules["VDD_GPU_SOC"] == pytest.approx(1.9)


def test_ina3221_that_goes_away_is_an_error(tmp_path: Path) -> None:
    ina(tmp_path, "1-0040", {1: ("VDD_IN", 5000, 1200)})
    meter = Ina3221Meter(tmp_path)
    (tmp_path / "sys/bus/i2c/devices/1-0040/hwmon/hwmon1/curr1_input").unlink()
    with pytest.raises(MeasurementError, match="no longer answer"):
        meter.read()


def rapl(root: Path, name: str, domain: str, count: int, largest: int = 262143328850) -> None:
    base = f"sys/class/powercap/{name}"
    put(
        root,
        {
            f"{base}/name": domain,
            f"{base}/energy_uj": count,
            f"{base}/max_energy_range_uj": largest,
        },
    )


def test_rapl_counts_over_a_wrap_and_adds_no_part_twice(tmp_path: Path) -> None:
    clock = Clock()
    rapl(tmp_path, "intel-rapl:0", "package-0", 990_000_000, largest=1_000_000_000)
    rapl(tmp_path, "intel-rapl:0:0", "core", 5)
    rapl(tmp_path, "intel-rapl:0:1", "dram", 0)
    rapl(tmp_path, "intel-rapl:1", "psys", 0)
    meter = RaplMeter(tmp_path, clock)
    assert meter.info.total == ("package-0", "dram-0")
    samples = []
    for i in range(41):
        # 40 W of the package, 5 W of the memory; the package's counter wraps after 0.25 s.
        rapl(
            tmp_path,
            "intel-rapl:0",
            "package-0",
            (990_000_000 + i * 4_000_000) % 1_000_000_000,
            largest=1_000_000_000,
        )
        rapl(tmp_path, "intel-rapl:0:1", "dram", i * 500_000)
        samples.append(meter.read())
        clock.now += 0.1
    energy = energy_over(meter.info, samples, [(100.05, 103.05)])
    assert energy.total == pytest.approx(3 * 45, rel=0.01)
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


class NVMLError(Exception):
    pass


def fake_nvml(**answers: Any) -> SimpleNamespace:
    """A module ``pynvml`` whose functions give the answers; an exception is raised."""

    def call(value: Any) -> Any:
        def function(*_: Any) -> Any:
            answer = value.pop(0) if isinstance(value, list) else value
            if isinstance(answer, Exception):
                raise answer
            return answer

        return function

    defaults = {
        "nvmlInit": None,
        "nvmlShutdown": None,
        "nvmlDeviceGetCount": 1,
        "nvmlDeviceGetHandleByIndex": "handle",
        "nvmlDeviceGetTotalEnergyConsumption": NVMLError("not supported"),
        "nvmlDeviceGetPowerUsage": 70_000,
        "nvmlDeviceGetClockInfo": 1500,
        "nvmlDeviceGetTemperature": 61,
        "nvmlDeviceGetCurrentClocksEventReasons": 0,
    }
    functions = {name: call(value) for name, value in (defaults | answers).items()}
    return SimpleNamespace(NVMLError=NVMLError, **functions)


def test_nvml_prefers_the_energy_counter() -> None:
    counter = [5_000_000, 5_010_000, 5_020_000]
    meter = NvmlMeter(module=fake_nvml(nvmlDeviceGetTotalEnergyConsumption=counter))
    assert meter.info.kind == "energy"
    assert [meter.read().values["gpu"] for _ in range(2)] == pytest.approx([10.0, 20.0])


def test_nvml_without_a_counter_reads_power() -> None:
    meter = NvmlMeter(module=fake_nvml())
    assert meter.info.kind == "power"
    assert meter.read().values["gpu"] == pytest.approx(70.0)


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
    NvmlMeter(0, nvml)
    assert asked == [1, "GPU-5ebe9f43", 0]


def test_throttling_of_a_gpu_is_named() -> None:
    nvml = fake_nvml(nvmlDeviceGetCurrentClocksEventReasons=0x1 | 0x4 | 0x40)
    state = GpuState(module=nvml).fill(HostState(0.0))
    # 0x1 is idleness, no throttling.
    assert state.reasons == ("power cap", "hardware thermal slowdown")
    assert (state.gpu_mhz, state.temperatures) == (1500.0, {"GPU": 61.0})


class JtopException(Exception):  # noqa: N818 - as jetson-stats names it
    pass


def fake_jtop(readings: list[Any]) -> SimpleNamespace:
    class Service:
        def __init__(self, interval: float) -> None:
            self.at = 0
            self.closed = False

        def start(self) -> None:
            if not readings:
                raise JtopException("The jtop.service is not active")

        def ok(self) -> bool:
            self.at += 1
            return self.at < len(readings) and readings[self.at] is not None

        @property
        def power(self) -> dict[str, Any]:
            return {"rail": readings[self.at], "tot": {"power": 99999, "avg": 5}}

        def close(self) -> None:
            self.closed = True

    return SimpleNamespace(jtop=Service, JtopException=JtopException)


def rail(milliwatts: int) -> dict[str, Any]:
    return {"VDD_IN": {"power": milliwatts, "avg": 1}, "NC": {"power": 5, "avg": 5}}


def test_jtop_uses_instantaneous_power_of_connected_rails() -> None:
    meter = JtopMeter(fake_jtop([rail(5000), rail(6000), rail(7000)]))
    assert meter.info.total == ("VDD_IN",)
    assert [meter.read().values for _ in range(2)] == [{"VDD_IN": 6.0}, {"VDD_IN": 7.0}]


def test_jtop_whose_service_is_dead_or_dies_says_so() -> None:
    with pytest.raises(EnvironmentalError, match=r"restart jtop\.service"):
        JtopMeter(fake_jtop([]))
    meter = JtopMeter(fake_jtop([rail(5000), None]))
    with pytest.raises(MeasurementError, match="stopped during the run"):
        meter.read()


def test_a_csv_that_grows_is_read_as_it_grows(tmp_path: Path) -> None:
    path = tmp_path / "wall.csv"
    path.write_text("Time,Watts\n1000.5,40\n")
    clock = Clock()
    meter = CsvMeter(path, clock=clock, wall=lambda: 1000.0)
    first = meter.read()
    assert first is not None
    assert (first.time, first.values) == (100.5, {"wall": 40.0})
    assert meter.read() is None
    with path.open("a") as file:
        file.write("1970-01-01T00:16:41Z,4")
        file.flush()
        assert meter.read() is None, "half a row is none"
        file.write("2\n")
    second = meter.read()
    assert second is not None
    assert (second.time, second.values) == (101.0, {"wall": 42.0})
    with path.open("a") as file:
        file.write("yesterday,many\n")
    with pytest.raises(MeasurementError, match="line 4"):
        meter.read()
    meter.close()


def test_all_waiting_rows_of_a_csv_are_taken_at_once(tmp_path: Path) -> None:
    path = tmp_path / "wall.csv"
    path.write_text("time,watts\n" + "".join(f"{i},5\n" for i in range(50)))
    meter = CsvMeter(path, period_s=0.01)
    recorder = PowerRecorder(meter)
    recorder._read()
    assert len(recorder.samples) == 50
    meter.close()


def test_a_csv_without_the_columns_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "wall.csv"
    path.write_text("when,volts\n")
    with pytest.raises(DataError, match="columns time and watts"):
        CsvMeter(path)
    with pytest.raises(ValueError, match="no time zone"):
        parse_time("2026-01-01T00:00:00")


def test_a_command_prints_watts_or_is_refused() -> None:
    python = sys.executable
    meter = CommandMeter(f"{python} -c 'print(\"power 41.5 W\")'")
    assert meter.read().values == {"wall": 41.5}
    with pytest.raises(EnvironmentalError, match="expected a number"):
        CommandMeter(f"{python} -c 'print(\"none\")'")
    with pytest.raises(EnvironmentalError, match="failed"):
        CommandMeter("/no/such/command")


def test_choosing_a_meter() -> None:
    def broken() -> Any:
        raise EnvironmentalError("not here")

    fake = SimpleNamespace(info="it")
    assert open_meter("auto", meters={"a": broken, "b": lambda: fake}) == (fake, None)
    assert open_meter("auto", meters={"a": broken}) == (
        None,
        "no power meter works here: a: not here",
    )
    assert open_meter("none")[0] is None
    # The power of an idle GPU says nothing about a processor engine.
    found, why = open_meter("auto", "openvino", {"nvml": lambda: fake})
    assert found is None
    assert "runs on the processor" in str(why)
    with pytest.raises(EnvironmentalError, match="not here"):
        open_meter("a", meters={"a": broken})
    with pytest.raises(UsageError, match="no power meter 'sun'"):
        open_meter("sun")
