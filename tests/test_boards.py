"""What edgehp makes of the boards it was written for: their trees, meters, clocks and caps."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgehp.benchmark.host import HostState, describe_host, read_host
from edgehp.benchmark.power.base import Sample, energy_over
from edgehp.benchmark.power.jetson import Ina3221Meter, JtopMeter
from edgehp.benchmark.power.nvml import GpuState, NvmlMeter
from edgehp.benchmark.roofline import BOARDS, peaks_for
from edgehp.benchmark.validity import Evidence, Validity, assess
from edgehp.device import find_jetson
from edgehp.doctor.system import Probe, find_jetson_state
from edgehp.driver import run
from edgehp.errors import DataError, UsageError
from edgehp.targets import list_targets, load_target, resolve_target
from tests.boards import GPUS, JETSONS, Board, Jetson, NVMLError, put
from tests.driver.double import installed

_AGX_SUM = ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0")


@pytest.fixture(params=JETSONS)
def board(request: pytest.FixtureRequest) -> Jetson:
    return JETSONS[request.param]


@pytest.fixture
def tree(board: Jetson, tmp_path: Path) -> Path:
    return board.write(tmp_path)


def probe(tree: Path) -> Probe:
    return Probe(root=tree, runner=lambda words, s: run([tree / "bin" / words[0], *words[1:]], s))


def test_module_release_and_power_mode_are_known(board: Jetson, tree: Path) -> None:
    """Whatever the carrier, and flashed as the super variant or not."""
    found = find_jetson_state(probe(tree))
    assert found is not None and found.problem is None
    assert (found.target, found.power_mode) == (board.target, board.power_mode)
    target = load_target(board.target)
    assert target.compute_capabilities == (board.capability,)
    row = target.jetpack_for(found.l4t or "")
    assert row is not None and row.jetpack == found.jetpack and row.usable
    part = find_jetson(tree).part_number  # type: ignore[union-attr]
    assert part == board.compatible[-1], "the module, not the carrier or the variant"


def test_the_name_of_the_family_is_the_module(board: Jetson, tree: Path) -> None:
    if board.target.startswith("orin"):
        assert resolve_target("orin", root=tree).target.name == board.target
        return
    with pytest.raises(UsageError, match=f"no Orin module known here\nhint: .*: {board.target}$"):
        resolve_target("orin", root=tree)


def test_figures_are_of_the_active_mode_or_it_is_named(board: Jetson) -> None:
    target = load_target(board.target)
    if board.power_mode in {m.name for m in target.power_modes}:
        assert peaks_for(target, board.power_mode, "Orin", "int8").name == board.power_mode
        return
    words = f"no peaks for the power mode {board.power_mode}, only for "
    if not target.power_modes:
        words = f"the target {board.target} states no peak figures$"
    with pytest.raises(DataError, match=f"^unknown: {words}"):
        peaks_for(target, board.power_mode, "Orin", "int8")


def test_power_is_that_of_the_module_or_a_documented_sum(board: Jetson, tree: Path) -> None:
    meter = Ina3221Meter(tree)
    samples = []
    for i, factor in enumerate((1.0, 1.0, 2.0, 2.0, 2.0)):
        board.set_power(tree, factor)
        samples.append(Sample(100.0 + i / 8, meter.values()))
    energy = energy_over(meter.info, samples, [(100.0, 100.5)])
    # A line between the second and the third sample, which are an eighth of a second apart.
    assert energy.joules["total"] == pytest.approx(board.watts * 0.8125, rel=1e-3)
    rails = {label for channels in board.rails.values() for label, *_ in channels.values()}
    assert set(energy.joules) - {"total", "VIN"} == rails - {"NC"}
    summed = meter.info.total == _AGX_SUM
    assert summed == (board.target.startswith("orin-agx"))
    assert ("the sum that NVIDIA documents for AGX modules" in meter.info.includes) == summed


def library(tree: Path, interval: float) -> Any:
    """jetson-stats' own reading of a tree, with a client whose service reads it."""
    code = (
        "import json, sys; from jtop.core import power\n"
        "service = power.PowerService.__new__(power.PowerService)\n"
        "service._power_avg = {}\n"
        "service._power_sensor = power.find_all_i2c_power_monitor(sys.argv[1])\n"
        "print(json.dumps(service.get_status()))\n"
    )

    class Client:
        def __init__(self, interval: float) -> None:
            self.asked = interval

        interval = property(lambda self: interval)

        def start(self) -> None:
            """Connected."""

        def ok(self) -> bool:
            return True

        @property
        def power(self) -> Any:
            done = subprocess.run(
                [sys.executable, "-c", code, tree / "sys/bus/i2c/devices"],
                env={"PYTHONPATH": str(installed("jetson-stats==7.2.2"))},
                capture_output=True,
                text=True,
                check=True,
            )
            return json.loads(done.stdout)

    return SimpleNamespace(jtop=Client, JtopException=RuntimeError)


def test_jtop_and_sysfs_agree_on_every_board(board: Jetson, tree: Path) -> None:
    """By the library itself: what it takes out of the rails as the total, and what it adds up."""
    sysfs = Ina3221Meter(tree)
    jtop = JtopMeter(library(tree, 1.0))
    # With its window open the service keeps its own interval; gaps are judged by it.
    assert jtop.info.period_s == 1.0
    assert (jtop.info.total, jtop.info.includes) == (sysfs.info.total, sysfs.info.includes)
    watts, other = sysfs.read().values, jtop.read().values
    assert other == {**{n: pytest.approx(w, abs=2e-3) for n, w in watts.items()},
                     **({"tot": other["tot"]} if "tot" in other else {})}  # fmt: skip
    # Its own sum has what is behind another rail; the documented one has not.
    assert ("tot" in other) == (jtop.info.total == _AGX_SUM)


def states(tree: Path, changes: dict[str, object]) -> list[HostState]:
    """Looks before and after `changes`, a second apart."""
    times = iter(range(100))
    found = [read_host(tree, lambda: float(next(times))) for _ in range(4)]
    put(tree, changes)
    found += [read_host(tree, lambda: float(next(times))) for _ in range(4)]
    # What this process burns while it tests is not part of the test.
    return [replace(state, own_s=0.0) for state in found]


def judged(seen: list[HostState], **more: Any) -> Validity:
    return assess(Evidence(seen, (0.0, 9.0), 6, jetson=True, **more))


def test_clocks_are_in_the_report_and_move_unless_they_were_fixed(
    board: Jetson, tree: Path
) -> None:
    lowest, highest, _ = board.gpu_mhz
    host = describe_host(tree)
    assert host["jetson"] == board.model
    assert (host["gpu_mhz_limits"], host["emc_mhz"]) == ([lowest, highest], board.emc_mhz)
    at_rest = judged(states(tree, {}))
    assert at_rest.valid, at_rest.reasons
    moved = judged(states(tree, {f"sys/class/devfreq/{board.gpu}/cur_freq": highest * 1_000_000}))
    assert moved.reasons == [
        f"clocks: the GPU went between {lowest} and {highest} MHz; run: sudo jetson_clocks"
    ]
    subprocess.run([tree / "bin/jetson_clocks"], check=True)
    assert describe_host(tree)["gpu_mhz_limits"] == [highest, highest]


def test_the_load_of_others_is_a_reason(board: Jetson, tree: Path) -> None:
    put(tree, {f"sys/class/devfreq/{board.gpu}/device/load": 430})
    busy = judged(states(tree, {}), idle=(0.0, 7.0))
    assert busy.reasons == [
        "foreign load: the GPU was 43% busy before the run began (at most 5% allowed)"
    ]


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_gpus_count_their_energy_and_tell_their_clocks(gpu: Board) -> None:
    meter = NvmlMeter(module=gpu.nvml())
    assert (meter.info.kind, meter.info.total) == ("energy", ("gpu",))
    assert [meter.values()["gpu"] for _ in range(2)] == pytest.approx([7.0, 14.0])
    state = GpuState(module=gpu.nvml(others=1)).fill(HostState(0.0))
    assert (state.gpu_mhz, state.temperatures) == (gpu.mhz, {"GPU": 61.0})
    assert (state.reasons, state.conditions) == ((), ())
    assert (state.gpu_load, state.gpu_others) == (0.4, 1)


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_at_its_cap_a_board_without_a_connector_is_as_it_always_is(gpu: Board) -> None:
    """A T4 or L4 slows down to 70 W whenever it is busy; an H100 does not."""
    seen = []
    for second in range(10):
        nvml = gpu.nvml(reasons=0x4 if second % 2 else 0, mhz=gpu.mhz * (10 - second % 2 * 3) // 10)
        seen.append(GpuState(module=nvml).fill(HostState(float(second))))
    found = assess(Evidence(seen, (0.0, 9.0), 6))
    clocks = f"clocks: the GPU went between {gpu.mhz * 7 // 10} and {gpu.mhz} MHz"
    if gpu.cap_w <= 75:
        assert found.valid, found.reasons
        assert found.conditions == [
            f"the GPU works at its power cap of {gpu.cap_w:.0f} W",
            clocks,
        ]
    else:
        assert found.conditions == []
        assert found.reasons == [
            "throttling: power cap in 5 of 10 looks",
            f"{clocks}; fix its frequency or its governor",
        ]


@pytest.mark.parametrize(
    ("bits", "words"),
    [
        (0x1, ()),  # idle is no throttling
        (0x8, ("hardware slowdown",)),
        (0x20, ("software thermal slowdown",)),
        (0x40 | 0x80, ("hardware thermal slowdown", "power brake")),
    ],
)
def test_throttling_is_named_on_every_board(bits: int, words: tuple[str, ...]) -> None:
    def unknown(*_: object) -> int:
        raise NVMLError("Function Not Found")

    for gpu in GPUS.values():
        nvml = gpu.nvml(reasons=bits)
        if gpu.old:
            # A newer package has both names, an older driver the old one.
            nvml.nvmlDeviceGetCurrentClocksEventReasons = unknown
        assert GpuState(module=nvml).fill(HostState(0.0)).reasons == words


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_a_gpus_peaks_are_found_by_its_exact_name(gpu: Board) -> None:
    board = BOARDS[gpu.name]
    fitting = [
        t
        for t in map(load_target, list_targets())
        if gpu.capability in t.compute_capabilities and board in {b.name for b in t.boards}
    ]
    assert fitting, f"no target knows {gpu.name}"
    assert {peaks_for(t, None, gpu.name, "int8").name for t in fitting} == {board}
    assert {b.power_w for t in fitting for b in t.boards if b.name == board} == {gpu.cap_w}
