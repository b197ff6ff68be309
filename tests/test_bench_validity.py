"""A disturbed run is called invalid, with the reason; on an emulated machine."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgehp.benchmark.host import (
    HostState,
    HostWatch,
    changed_settings,
    cpu_quota,
    describe_host,
    read_host,
)
from edgehp.benchmark.lanes import WarmUp
from edgehp.benchmark.stats import summarize
from edgehp.benchmark.validity import Evidence, Validity, assess
from tests.boards import put

WINDOW = (0.0, 10.0)
CPU = "sys/devices/system/cpu/cpu0"


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A quiet machine of two processors."""
    put(
        tmp_path,
        {
            "proc/stat": "cpu 1000 0 500 9000 0 0 0 100 0 0",
            "proc/cpuinfo": "model name\t: Test CPU",
            f"{CPU}/cpufreq/scaling_cur_freq": 2_000_000,
            f"{CPU}/cpufreq/scaling_min_freq": 800_000,
            f"{CPU}/cpufreq/scaling_max_freq": 2_400_000,
            f"{CPU}/cpufreq/scaling_governor": "performance",
            f"{CPU}/thermal_throttle/core_throttle_count": 7,
            "sys/class/thermal/thermal_zone0/type": "CPU-therm",
            "sys/class/thermal/thermal_zone0/temp": 51_500,
            "sys/class/thermal/thermal_zone0/trip_point_0_type": "passive",
            "sys/class/thermal/thermal_zone0/trip_point_0_temp": 95_000,
            "sys/class/thermal/thermal_zone1/type": "PMIC-off",
            "sys/class/thermal/thermal_zone1/temp": -256_000,
            "sys/class/hwmon/hwmon3/oc1_event_cnt": 0,
            "sys/class/devfreq/17000000.gpu/cur_freq": 918_000_000,
        },
    )
    return tmp_path


def run(
    machine: Path,
    changes: dict[str, object],
    steps: int = 5,
    jetson: bool = False,
    quota: float | None = None,
) -> Validity:
    """States before and after the changes, spread over the window."""
    times = iter(range(2 * steps))
    states = [read_host(machine, lambda: float(next(times))) for _ in range(steps)]
    put(machine, changes)
    states += [read_host(machine, lambda: float(next(times))) for _ in range(steps)]
    # What this process itself burns while it tests is not part of the test.
    quiet = [HostState(**{**vars(s), "own_s": 0.0}) for s in states]
    return assess(Evidence(quiet, WINDOW, 2, jetson=jetson, quota=quota))


def test_a_quiet_machine_is_valid(machine: Path) -> None:
    state = read_host(machine)
    assert state.temperatures == {"CPU-therm": 51.5}
    assert state.trips == {"CPU-therm": 95.0}
    assert state.mhz == (2000.0,)
    assert state.gpu_mhz == 918.0
    found = run(machine, {})
    assert found.valid, found.reasons
    assert found.unknown == found.conditions == []
    assert found.figures["foreign_load"] == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {f"{CPU}/thermal_throttle/core_throttle_count": 9},
            "cpu0 core thermal throttle counted 2",
        ),
        ({"sys/class/hwmon/hwmon3/oc1_event_cnt": 1}, "over-current event oc1 counted 1"),
        ({"sys/class/thermal/thermal_zone0/temp": 95_100}, "CPU-therm reached 95.1 °C"),
        ({"sys/class/thermal/thermal_zone0/temp": 70_000}, "drifted by +18.5 °C"),
        ({f"{CPU}/cpufreq/scaling_cur_freq": 1_500_000}, "between 1500 and 2000 MHz"),
        ({"proc/stat": "cpu 1900 0 500 9000 0 0 0 100 0 0"}, "took 1.00 of 2 processors"),
        ({"proc/stat": "cpu 1000 0 500 9000 0 0 0 1000 0 0"}, "took 1.00 of 2 processors"),
        ({"sys/class/devfreq/17000000.gpu/cur_freq": 306_000_000}, "GPU went between 306 and 918"),
    ],
)
def test_each_disturbance_has_its_reason(
    machine: Path, changes: dict[str, object], words: str
) -> None:
    found = run(machine, changes)
    assert not found.valid
    assert any(words in reason for reason in found.reasons), found.reasons


def loads(*foreign: float, own: float = 0.5) -> list[HostState]:
    """Looks every half second; others take `foreign` processors until each, this process `own`."""
    states, busy, mine = [HostState(0.0, busy_s=0.0, own_s=0.0)], 0.0, 0.0
    for i, others in enumerate(foreign, 1):
        busy, mine = busy + (others + own) / 2, mine + own / 2
        states.append(HostState(i / 2, busy_s=busy, own_s=mine))
    return states


def test_a_short_burst_of_other_work_is_not_lost_in_the_mean() -> None:
    # Two seconds of one processor in a minute: 1.7 % of the machine in the mean.
    burst = assess(Evidence(loads(*[0.0] * 58, *[1.0] * 4, *[0.0] * 58), (0, 60), 2))
    assert burst.figures["foreign_load"] < 0.02
    assert any("1.00 of 2 processors for 2 s (50%" in r for r in burst.reasons), burst.reasons
    # What a quiet machine does all the time is no burst, whatever this process takes itself.
    quiet = assess(Evidence(loads(*[0.05, 0.0, 0.3, 0.0] * 30, own=1.9), (0, 60), 2))
    assert quiet.valid, quiet.reasons
    assert not assess(Evidence(loads(*[0.12] * 120), (0, 60), 2)).valid


def test_other_work_on_this_very_machine_is_seen() -> None:
    """A child that burns a processor is foreign until it is waited for; idle time is nobody's."""
    watch = HostWatch()
    watch.period_s = 0.1
    spin = "import time\nend = time.monotonic() + 60\nwhile time.monotonic() < end: pass"
    before = read_host()
    child = subprocess.Popen([sys.executable, "-S", "-c", spin])
    try:
        watch.start()
        # Until the child has had half a second of processor time, however busy the machine is.
        for _ in range(600):
            if read_host().busy_s - before.busy_s > 1.0:  # type: ignore[operator]
                break
            time.sleep(0.1)
        watch.stop()
    finally:
        child.kill()
        child.wait()
    first, last = watch.states[0], watch.states[-1]
    found = assess(Evidence(watch.states, (first.time, last.time), os.cpu_count() or 1))
    assert found.figures["foreign_load"] > 0.2 / (os.cpu_count() or 1)


def test_settings_that_change_during_a_run_are_a_reason(machine: Path) -> None:
    before = describe_host(machine)
    assert (before["processor"], before["cpu_mhz_limits"]) == ("Test CPU", [800, 2400])
    assert changed_settings(before, describe_host(machine)) == []
    put(machine, {f"{CPU}/cpufreq/scaling_governor": "powersave"})
    changes = changed_settings(before, describe_host(machine))
    found = assess(Evidence((), WINDOW, 2, changes=changes))
    assert found.reasons == [
        "settings: the governor went from ['performance'] to ['powersave'] during the run"
    ]


def test_what_cannot_be_checked_is_said(tmp_path: Path) -> None:
    times = iter(range(9))
    states = [read_host(tmp_path, lambda: float(next(times))) for _ in range(9)]
    found = assess(Evidence(states, WINDOW, 2))
    assert found.valid
    said = " ".join(found.unknown)
    assert all(word in said for word in ("throttling", "temperature", "clocks", "foreign load"))


def test_a_short_sample_and_a_restless_warm_up_are_reasons(machine: Path) -> None:
    few = summarize([0.01] * 43)
    found = assess(
        Evidence((), WINDOW, 2, [WarmUp("artifact", 30, 99, False, 0.2)], (90.0, {"artifact": few}))
    )
    assert "artifact did not settle in 30 s (still 20% apart)" in found.reasons[0]
    assert "43 of artifact are too few for a bound on p90, 44 are needed" in found.reasons[1]
    enough = summarize([0.01] * 44)
    assert assess(Evidence((), WINDOW, 2, (), (90.0, {"artifact": enough}))).valid
    assert not assess(Evidence((), WINDOW, 2, (), (90.0, {"artifact": None}))).valid


def quota_files(version: int, group: str, stops: int) -> dict[str, object]:
    """A limit of 0.6 processors on a control group, as docker sets it."""
    stat = f"nr_periods 900\nnr_throttled {stops}"
    if version == 2:
        base = f"sys/fs/cgroup/{group}"
        return {"proc/self/cgroup": "0::/docker/abc", f"{base}/cpu.max": "60000 100000",
                f"{base}/cpu.stat": stat}  # fmt: skip
    base = f"sys/fs/cgroup/cpu/{group}"
    return {"proc/self/cgroup": "4:memory:/\n3:cpu,cpuacct:/docker/abc",
            f"{base}/cpu.cfs_quota_us": 60000, f"{base}/cpu.cfs_period_us": 100_000,
            f"{base}/cpu.stat": stat}  # fmt: skip


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("group", ["docker/abc", "docker", ""])
def test_a_processor_quota_that_stops_the_run_is_a_reason(
    machine: Path, version: int, group: str
) -> None:
    """Of its own group, of one above it, and as a container sees it, without the path."""
    assert cpu_quota(machine) is None
    put(machine, quota_files(version, group, 7))
    quota = describe_host(machine)["cpu_quota"]
    assert quota == 0.6
    quiet = run(machine, {}, quota=quota)
    assert quiet.valid and "limit of 0.60 processors" in quiet.conditions[0]
    found = run(machine, quota_files(version, group, 40), quota=quota)
    assert found.reasons == [
        "quota: the control group's limit of 0.60 processors stopped this process in 33 periods: "
        "run the container without --cpus"
    ]
    (next(machine.glob("sys/fs/cgroup/**/cpu.stat"))).unlink()
    assert "nothing tells whether" in run(machine, {}, quota=quota).reasons[0]


def test_a_group_without_a_limit_is_no_quota(machine: Path) -> None:
    put(machine, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"})
    put(machine, {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": -1})
    assert cpu_quota(machine) is None


def test_gpu_load_of_others_is_looked_for_before_the_run() -> None:
    def seen(load: float, idle: tuple[float, float] | None) -> Validity:
        # Opening the engine is this process's own work; from second 2 on nothing of it runs.
        states = [
            HostState(float(t), gpu_load=0.9 if t < 2 or t > 5 else load, gpu_others=1)
            for t in range(12)
        ]
        return assess(Evidence(states, (6.0, 11.0), 2, idle=idle))

    assert seen(0.0, (0.0, 5.0)).valid
    assert any("GPU was 40% busy" in r for r in seen(0.4, (0.0, 5.0)).reasons)
    assert any("foreign GPU load" in u for u in seen(0.4, None).unknown)
    assert "1 other processes hold this GPU" in seen(0.0, None).conditions
