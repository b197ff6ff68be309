"""The machine: how it is set, and what disturbs a measurement while it runs.

Without its settings a latency says nothing; heat, clocks, throttling and the work of others decide
whether it is valid.
"""

from __future__ import annotations

import os
import platform
import re
import resource
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Any

from edgehp.device import (
    POWER_MODE_COMMAND,
    SYSTEM_ROOT,
    find_jetson,
    l4t_release,
    memory_gib,
    power_mode_of,
    processor_name,
    read_integer,
    read_text,
)
from edgehp.driver import run

_PACKAGES = (
    *("numpy", "opencv-python-headless", "openvino", "onnxruntime", "tensorrt"),
    *("tensorrt-rtx-cu13", "cuda-bindings", "pycuda", "jetson-stats", "nvidia-ml-py"),
)
# What changes how threads are placed, or how long they wait for work.
_VARIABLES = re.compile(r"^(OMP|MKL|KMP|GOMP|OV|ORT|CUDA|TBB|OPENBLAS)_[A-Z_]+$")


def describe_host(root: Path = SYSTEM_ROOT) -> dict[str, Any]:
    """Processor, memory, governor, clocks, power mode, versions and environment, for JSON.

    Host names and paths are left out: a report is shown to others.
    """
    jetson, quota = find_jetson(root), cpu_quota(root)
    low, high = _mhz(root, "scaling_min_freq"), _mhz(root, "scaling_max_freq")
    gpu = [_devfreq_gpu(root, name) for name in ("min_freq", "max_freq")]
    # Imported here: a cold start is measured before anything has read the libraries.
    import cv2

    return {
        "system": platform.system(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "processor": processor_name(root) or platform.processor() or platform.machine(),
        "processors": os.cpu_count(),
        "processors_usable": len(os.sched_getaffinity(0)),
        "memory_gib": memory_gib(root),
        "jetson": None if jetson is None else jetson.model,
        "l4t": l4t_release(root),
        "power_mode": None
        if jetson is None
        else power_mode_of(run(POWER_MODE_COMMAND, 10.0).stdout),
        "governors": sorted(set(_each(root, "scaling_governor"))),
        "cpu_mhz_limits": [min(low), max(high)] if low and high else None,
        "cpu_quota": None if quota is None else quota.processors,
        "gpu_mhz_limits": None if None in gpu else gpu,
        "emc_mhz": _emc_mhz(root),
        "virtual_machine": "hypervisor" in (read_text(root / "proc/cpuinfo") or ""),
        "python": platform.python_version(),
        "python_gc": "off while measuring",
        "opencv_threads": cv2.getNumThreads(),
        "packages": _versions(),
        "environment": {k: v for k, v in sorted(os.environ.items()) if _VARIABLES.match(k)},
    }


def changed_settings(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Settings that decide about speed and are not what they were, a phrase each.

    Args:
        before: what `describe_host` gave before a run.
        after: and after it.
    """
    return [
        f"the {what} went from {before[key]} to {after[key]}"
        for key, what in (
            ("power_mode", "power mode"),
            ("governors", "governor"),
            ("cpu_mhz_limits", "processor's clock limits in MHz"),
            ("cpu_quota", "quota of processors"),
            ("gpu_mhz_limits", "GPU's clock limits in MHz"),
            ("processors_usable", "number of usable processors"),
        )
        if before[key] != after[key]
    ]


@dataclass(frozen=True)
class Quota:
    """A limit of processor time: processors, and periods in which it stopped its control group."""

    processors: float
    stops: int | None


def cpu_quota(root: Path = SYSTEM_ROOT) -> Quota | None:
    """The tightest limit on the control group of this process and those above it.

    Containers get one by ``docker run --cpus``. Control groups of version 2 keep it in ``cpu.max``,
    those of version 1 in ``cpu.cfs_quota_us`` and ``cpu.cfs_period_us``.
    """
    found = []
    for line in (read_text(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        # In a container the path may be that of the host, with the group itself at the base.
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            if (quota := _quota_of(folder)) is not None:
                found.append(quota)
            if folder == base:
                break
    return min(found, key=lambda q: q.processors, default=None)


def _quota_of(folder: Path) -> Quota | None:
    words = (read_text(folder / "cpu.max", 64) or "").split()
    if len(words) == 2 and words[0].isdigit():
        limit, period = int(words[0]), int(words[1])
    else:
        limit = read_integer(folder / "cpu.cfs_quota_us") or -1
        period = read_integer(folder / "cpu.cfs_period_us") or 0
    if limit <= 0 or period <= 0:
        return None
    stops = re.search(r"^nr_throttled (\d+)", read_text(folder / "cpu.stat") or "", re.MULTILINE)
    return Quota(limit / period, None if stops is None else int(stops[1]))


def peak_memory_mib() -> float:
    """The most memory this process has held, MiB."""
    # Not ru_maxrss where it can be helped: that of a process started from a larger one begins with
    # the larger one's memory.
    status = read_text(Path("/proc/self/status")) or ""
    found = re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)
    # Linux counts in KiB.
    peak = int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1024


def _each(root: Path, name: str) -> list[str]:
    """What the file `name` of each processor's clock says."""
    found = (root / "sys/devices/system/cpu").glob(f"cpu[0-9]*/cpufreq/{name}")
    return [text.strip() for p in found if (text := read_text(p))]


def _mhz(root: Path, name: str) -> list[float]:
    return [int(khz) / 1000 for khz in _each(root, name) if khz.isdigit()]


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


# A thread that hangs in a driver must not keep the command from ending.
_JOIN_S = 10.0


@dataclass(frozen=True)
class HostState:
    """The machine at one instant; whatever it does not tell is empty or None.

    Attributes:
        time: monotonic seconds.
        temperatures: thermal zone -> degrees Celsius.
        trips: thermal zone -> temperature at which the kernel begins to slow it down.
        mhz: clock of each processor.
        busy_s: processor seconds spent on anything since boot, stolen time included.
        own_s: processor seconds of this process and its children.
        throttles: counter -> how often the hardware throttled or an over-current event came.
        reasons: what is being throttled right now, as the GPU says.
        gpu_mhz: clock of the GPU; of a Jetson's by ``/sys/class/devfreq``.
        gpu_load: of whoever uses the GPU, 0..1.
        gpu_others: other processes that hold the GPU.
        conditions: what holds the GPU back by design, such as the cap of a board without a power
            connector.
        quota_stops: periods in which the kernel stopped this process's control group.
    """

    time: float
    temperatures: dict[str, float] = field(default_factory=dict)
    trips: dict[str, float] = field(default_factory=dict)
    mhz: tuple[float, ...] = ()
    busy_s: float | None = None
    own_s: float = 0.0
    throttles: dict[str, int] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()
    gpu_mhz: float | None = None
    gpu_load: float | None = None
    gpu_others: int | None = None
    conditions: tuple[str, ...] = ()
    quota_stops: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """The part of it that a timeline shows, for JSON."""
        return {
            "time": self.time,
            "temperatures": self.temperatures,
            "mhz_max": max(self.mhz, default=None),
            "gpu_mhz": self.gpu_mhz,
            "gpu_load": self.gpu_load,
            "reasons": list(self.reasons),
        }


def read_host(root: Path = SYSTEM_ROOT, clock: Callable[[], float] = perf_counter) -> HostState:
    """Read the machine's state from its ``/proc`` and ``/sys``."""
    temperatures, trips = _zones(root)
    own, quota = os.times(), cpu_quota(root)
    load = next((root / "sys/class/devfreq").glob("*gpu*/device/load"), None)
    per_mille = None if load is None else read_integer(load)
    return HostState(
        time=clock(),
        temperatures=temperatures,
        trips=trips,
        mhz=tuple(_mhz(root, "scaling_cur_freq")),
        busy_s=_busy(root),
        own_s=own.user + own.system + own.children_user + own.children_system,
        throttles=_counters(root),
        gpu_mhz=_devfreq_gpu(root, "cur_freq"),
        gpu_load=None if per_mille is None else per_mille / 1000,
        quota_stops=None if quota is None else quota.stops,
    )


class Recorder:
    """Looks at something in the background, every `period_s` seconds from `start` to `stop`."""

    def __init__(self, period_s: float) -> None:
        self.period_s = period_s
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name=type(self).__name__, daemon=True)

    def _look(self) -> bool:
        """Look once; False where there is nothing more to see."""
        raise NotImplementedError

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """End looking."""
        self._end.set()
        self._thread.join(_JOIN_S)

    def _run(self) -> None:
        due = perf_counter()
        while self._look():
            # On a grid, so that a slow look does not shift all that follow.
            due = max(due + self.period_s, perf_counter())
            if self._end.wait(due - perf_counter()):
                return


class HostWatch(Recorder):
    """Samples the machine's state."""

    def __init__(
        self, fill: Callable[[HostState], HostState] | None = None, root: Path = SYSTEM_ROOT
    ) -> None:
        """Watch the file system under `root`, and what `fill` adds, such as a GPU's driver."""
        super().__init__(period_s=0.5)
        self._fill = fill
        self._root = root
        self._states: list[HostState] = []

    @property
    def states(self) -> tuple[HostState, ...]:
        """What was seen until now."""
        return tuple(self._states)

    def stop(self) -> None:
        """End watching, with a last look."""
        super().stop()
        self._look()

    def _look(self) -> bool:
        state = read_host(self._root)
        self._states.append(state if self._fill is None else self._fill(state))
        return True


def _zones(root: Path) -> tuple[dict[str, float], dict[str, float]]:
    temperatures: dict[str, float] = {}
    trips: dict[str, float] = {}
    for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        milli = read_integer(zone / "temp")
        # Zones of parts that are switched off read as an error or as far below zero.
        if milli is None or not -40_000 <= milli <= 200_000:
            continue
        name = (read_text(zone / "type") or zone.name).strip() or zone.name
        if name in temperatures:
            name = f"{name}-{zone.name.removeprefix('thermal_zone')}"
        temperatures[name] = milli / 1000
        passive = [
            degrees
            for p in sorted(zone.glob("trip_point_*_type"))
            if (read_text(p) or "").strip() == "passive"
            and (degrees := read_integer(p.with_name(p.name.replace("_type", "_temp")))) is not None
            and degrees > 0
        ]
        if passive:
            trips[name] = min(passive) / 1000
    return temperatures, trips


def _devfreq_gpu(root: Path, name: str) -> float | None:
    """A clock of a Jetson's GPU in MHz: ``17000000.gpu`` on Orin, ``gpu-gpc-0`` on Thor."""
    for path in sorted((root / "sys/class/devfreq").glob(f"*gpu*/{name}")):
        if (hertz := read_integer(path)) is not None:
            return hertz / 1e6
    return None


def _emc_mhz(root: Path) -> float | None:
    """The clock of a Jetson's memory: as it is where root may read it, else its cap."""
    for name in ("debug/bpmp/debug/clk/emc/rate", "nvpmodel_clk_cap/emc"):
        if hertz := read_integer(root / "sys/kernel" / name):
            return hertz / 1e6
    return None


def _busy(root: Path) -> float | None:
    """Busy processor seconds by ``/proc/stat``: user nice system irq softirq and steal."""
    fields = (read_text(root / "proc/stat", 4096) or "").split("\n", 1)[0].split()
    if len(fields) < 8 or fields[0] != "cpu":
        return None
    user, nice, system, _idle, _iowait, irq, softirq = (int(f) for f in fields[1:8])
    steal = int(fields[8]) if len(fields) > 8 else 0
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _counters(root: Path) -> dict[str, int]:
    """Counters that go up when hardware throttles: x86 packages and Jetson's over-current."""
    found: dict[str, int] = {}
    cpus = root / "sys/devices/system/cpu"
    for path in sorted(cpus.glob("cpu[0-9]*/thermal_throttle/*_throttle_count")):
        if (count := read_integer(path)) is not None:
            kind = path.name.removesuffix("_throttle_count")
            found[f"{path.parent.parent.name} {kind} thermal throttle"] = count
    for path in sorted((root / "sys/class/hwmon").glob("hwmon*/oc*_event_cnt")):
        if (count := read_integer(path)) is not None:
            found[f"over-current event {path.name.split('_')[0]}"] = count
    return found
