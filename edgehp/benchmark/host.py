"""What the machine is and how it is set: without this, a latency is a number about nothing."""

from __future__ import annotations

import os
import platform
import re
import resource
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import cv2

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

__all__ = ["changed_settings", "describe_host", "peak_memory_mib", "power_mode"]

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
    jetson = find_jetson(root)
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
        "power_mode": power_mode() if jetson is not None else None,
        "governors": sorted(_each(root, "scaling_governor")),
        "cpu_mhz_limits": _limits(root),
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
            ("cpu_mhz_limits", "clock limits in MHz"),
            ("processors_usable", "number of usable processors"),
        )
        if before[key] != after[key]
    ]


def power_mode() -> str | None:
    """The name of a Jetson's active power mode by ``nvpmodel -q``, None where it cannot be had."""
    try:
        done = subprocess.run(
            POWER_MODE_COMMAND, capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return power_mode_of(done.stdout)


def peak_memory_mib() -> float:
    """The most memory this process has held, MiB."""
    # Not ru_maxrss where it can be helped: that of a process started from a larger one begins with
    # the larger one's memory.
    status = read_text(Path("/proc/self/status")) or ""
    found = re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)
    # Linux counts in KiB.
    peak = int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1024


def _each(root: Path, name: str) -> set[str]:
    found = (root / "sys/devices/system/cpu").glob(f"cpu[0-9]*/cpufreq/{name}")
    return {text.strip() for p in found if (text := read_text(p)) is not None}


def _limits(root: Path) -> list[float] | None:
    low, high = _each(root, "scaling_min_freq"), _each(root, "scaling_max_freq")
    if not low or not high:
        return None
    return [min(float(v) for v in low) / 1e3, max(float(v) for v in high) / 1e3]


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
