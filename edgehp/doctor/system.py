"""What the machine is made of: processor, disk, NVIDIA driver, Jetson.

Everything learned from outside Python goes through a `Probe`. Libraries are only ever loaded in a
subprocess with a time limit: a driver that crashes or hangs is reported, not suffered.
"""

from __future__ import annotations

import platform
import re
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

from edgehp.device import (
    POWER_MODE_COMMAND,
    SYSTEM_ROOT,
    find_jetson,
    l4t_release,
    memory_gib,
    power_mode_of,
    processor_name,
    read_text,
)
from edgehp.driver import TIMEOUT_SECONDS, Gpu, Runner, RunResult, probe_driver, run
from edgehp.errors import EdgehpError, EnvironmentalError
from edgehp.targets import resolve_target, target_of_part


@dataclass(frozen=True)
class Probe:
    """Where the doctor looks; tests hand in a tree and a runner of their own.

    Attributes:
        root: of the file system that ``/proc``, ``/sys`` and ``/etc`` are read from.
        runner: runs a command within a number of seconds.
        disk: directory whose free space counts.
    """

    root: Path = SYSTEM_ROOT
    runner: Runner = run
    disk: Path = field(default_factory=Path.cwd)

    def python_code(self, code: str) -> RunResult:
        """Run Python `code` in a process of its own."""
        return self.runner([sys.executable, "-c", code], TIMEOUT_SECONDS)


# What decides how fast INT8 is: dot-product instructions of x86-64, then of aarch64.
INT8_FLAGS = ("avx512_vnni", "avx_vnni", "amx_int8", "avx512f", "avx2", "asimddp", "i8mm")
# An artifact with reports is under 100 MB; labelling and training want far more.
DISK_WARNING_GB = 2.0


@dataclass(frozen=True)
class Cpu:
    """Processor: name, architecture, logical cores, memory in GiB, INT8 features it has."""

    name: str
    architecture: str
    cores: int
    memory_gib: float | None
    int8_features: tuple[str, ...]


@dataclass(frozen=True)
class Disk:
    """Free space in GB (10^9 bytes) at a directory, and a warning if it is little."""

    directory: str
    free_gb: float
    warning: str | None


@dataclass(frozen=True)
class Nvidia:
    """The NVIDIA driver.

    Attributes:
        driver: kernel module version, or None.
        cuda: newest CUDA version the driver runs, or None.
        gpus: what it drives.
        problem: why it cannot be used, or None.
    """

    driver: str | None
    cuda: str | None
    gpus: tuple[Gpu, ...]
    problem: str | None


@dataclass(frozen=True)
class Jetson:
    """A Jetson: model, target, L4T and JetPack release, and power mode, None where unknown."""

    model: str
    target: str | None
    l4t: str | None
    jetpack: str | None
    power_mode: str | None
    problem: str | None


def find_cpu(probe: Probe) -> Cpu:
    """The processor by ``/proc/cpuinfo``."""
    text = read_text(probe.root / "proc/cpuinfo", limit=1 << 20) or ""
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.M)
    present = set(flags.group(1).split()) if flags else set()
    return Cpu(
        name=processor_name(probe.root) or "unknown",
        architecture=platform.machine(),
        cores=len(re.findall(r"^processor\s*:", text, re.M)),
        memory_gib=memory_gib(probe.root),
        int8_features=tuple(flag for flag in INT8_FLAGS if flag in present),
    )


def find_disk(directory: Path) -> Disk:
    """Free space where artifacts would be written."""
    free = shutil.disk_usage(directory).free / 1e9
    warning = f"less than {DISK_WARNING_GB:g} GB free" if free < DISK_WARNING_GB else None
    return Disk(str(directory), round(free, 1), warning)


def find_nvidia(probe: Probe) -> Nvidia:
    """The driver and its GPUs, asked in a subprocess."""
    text = read_text(probe.root / "proc/driver/nvidia/version") or ""
    found = re.search(r"Kernel Module(?: for \S+)?\s+(?:for \S+\s+)?(\d+(?:\.\d+)+)", text)
    driver = found.group(1) if found else None
    try:
        answer = probe_driver(probe.runner)
    except EnvironmentalError as e:
        return Nvidia(driver, None, (), str(e))
    return Nvidia(driver, answer.cuda_version, answer.gpus, None)


def find_jetson_state(probe: Probe) -> Jetson | None:
    """The Jetson this is, or None."""
    module = find_jetson(probe.root)
    if module is None:
        return None
    l4t = l4t_release(probe.root)
    target, jetpack, problem = None, None, None
    try:
        found = target_of_part(module.part_number)
        found = found or resolve_target("orin", root=probe.root).target
        target = found.name
        row = found.jetpack_for(l4t) if l4t else None
        jetpack = row.jetpack if row else None
        if row is None:
            problem = f"L4T {l4t or 'unknown'} belongs to no JetPack release known for it"
        elif not row.usable:
            problem = f"JetPack {row.jetpack} has Python {row.python}; edgehp needs 3.10 or newer"
    except EdgehpError as e:
        problem = str(e)
    mode = power_mode_of(probe.runner(POWER_MODE_COMMAND, 10.0).stdout)
    return Jetson(module.model, target, l4t, jetpack, mode, problem)
