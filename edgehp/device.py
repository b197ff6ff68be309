"""What device this is: the Jetson module and its L4T release, read from the system's own files.

Every function takes the root of the file system, so that a test can hand in a tree of its own.
`HostProbe` has what an artifact is checked against.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from edgehp.driver import Gpu, probe_driver
from edgehp.files import write_whole

_log = logging.getLogger(__name__)

SYSTEM_ROOT = Path("/")
# Prints what `power_mode_of` reads.
POWER_MODE_COMMAND = ("nvpmodel", "-q")
# Modules: p3701 is AGX Orin, p3767 Orin NX and Nano, p3834 Thor. Every other number is a carrier.
_MODULE_PART = re.compile(r"\bp(?:3701|3767|3834)-\d{4}(?!\d)")


def cache_folder() -> Path:
    """Where this user keeps what can be computed again: kernels and their timings."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgehp"


def keep(path: Path, content: bytes, what: str, level: int = logging.WARNING) -> None:
    """Write a file of `cache_folder`; where that fails, the log says that `what` is not there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
    except OSError as e:
        _log.log(level, "%s not kept in %s: %s", what, path, e)


@dataclass(frozen=True)
class JetsonModule:
    """A Jetson as its device tree describes it.

    Attributes:
        model: the device tree's ``model``, for people.
        compatible: its ``compatible`` strings, most specific first, such as
            ``nvidia,p3768-0000+p3767-0000``.
        memory_gib: memory that Linux sees, in GiB: less than the module's nominal figure.
    """

    model: str
    compatible: tuple[str, ...]
    memory_gib: float | None

    @property
    def part_number(self) -> str | None:
        """Of the module, such as ``"p3767-0005"``; None where the device tree does not say."""
        return module_part(" ".join(self.compatible))

    @property
    def description(self) -> str:
        """The model with the module's part number, which tells memory sizes apart."""
        return f"{self.model} ({self.part_number})" if self.part_number else self.model


def module_part(text: str) -> str | None:
    """The part number of the Jetson module in `text`, or None.

    Args:
        text: ``compatible`` strings of a device tree, such as
            ``nvidia,p3768-0000+p3767-0005-super``, or a `JetsonModule.description`. The carrier
            (p3768) and the flash variant (``-super``) make no difference to an engine.
    """
    found = _MODULE_PART.search(text)
    return found.group() if found else None


def read_text(path: Path, limit: int = 1 << 16) -> str | None:
    """The first `limit` bytes of a system file as text, or None where it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(limit).decode("utf-8", "replace")
    except OSError:
        return None


def read_integer(path: Path) -> int | None:
    """The decimal whole number that a system file holds, or None where there is none."""
    text = (read_text(path, 64) or "").strip()
    return int(text) if re.fullmatch(r"-?\d+", text) else None


def processor_name(root: Path = SYSTEM_ROOT) -> str | None:
    """The processor as ``/proc/cpuinfo`` names it, or None where it does not."""
    # On ARM the name follows the lists of all cores.
    text = read_text(root / "proc/cpuinfo", limit=1 << 20) or ""
    for key in ("model name", "Model", "Hardware"):
        if found := re.search(rf"^{key}\s*:\s*(.+)$", text, re.M):
            return found.group(1).strip()
    return None


def memory_gib(root: Path = SYSTEM_ROOT) -> float | None:
    """Memory in GiB by ``/proc/meminfo``, or None where that is missing."""
    found = re.search(r"^MemTotal:\s+(\d+) kB", read_text(root / "proc/meminfo") or "", re.M)
    return int(found.group(1)) / 2**20 if found else None


def find_jetson(root: Path = SYSTEM_ROOT) -> JetsonModule | None:
    """The Jetson this is, or None on any other machine."""
    tree = root / "proc/device-tree"
    compatible = (read_text(tree / "compatible") or "").strip("\0\n").split("\0")
    if not any(name.startswith("nvidia,tegra") for name in compatible):
        return None
    model = (read_text(tree / "model") or "unnamed Jetson").strip("\0\n")
    return JetsonModule(model, tuple(compatible), memory_gib(root))


def l4t_release(root: Path = SYSTEM_ROOT) -> str | None:
    """The L4T release such as ``"36.4.3"`` from ``/etc/nv_tegra_release``, or None."""
    text = read_text(root / "etc/nv_tegra_release") or ""
    found = re.search(r"R(\d+)\s*\(release\),\s*REVISION:\s*([\d.]+)", text)
    return f"{found.group(1)}.{found.group(2)}" if found else None


def power_mode_of(answer: str) -> str | None:
    """A Jetson's active power mode, such as ``"15W"``, in what `POWER_MODE_COMMAND` printed."""
    found = re.search(r"NV Power Mode:\s*(\S+)", answer)
    return found.group(1).removeprefix("MODE_") if found else None


# Distributions that carry a runtime, by engine kind. TensorRT's are named after the CUDA version.
DISTRIBUTIONS = {
    "openvino": ("openvino",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-cu11"),
    "tensorrt-rtx": ("tensorrt-rtx-cu13", "tensorrt-rtx", "tensorrt-rtx-cu12"),
}


class DeviceProbe(Protocol):
    """Facts about a device; tests inject their own."""

    def gpus(self) -> tuple[Gpu, ...]:
        """GPUs in the driver's order; empty where there is none."""

    def module(self) -> str | None:
        """The Jetson module's model and part number, None elsewhere."""

    def version(self, kind: str) -> str | None:
        """Version of the runtime of engine `kind`, None where it is not installed."""


class HostProbe:
    """The device this process runs on; its driver is asked once."""

    def __init__(self) -> None:
        self._gpus: tuple[Gpu, ...] | None = None

    def gpus(self) -> tuple[Gpu, ...]:
        """GPUs in the driver's order.

        Raises:
            EnvironmentalError: there is no driver, or it fails or crashes.
        """
        if self._gpus is None:
            self._gpus = probe_driver().gpus
        return self._gpus

    def module(self) -> str | None:
        """Model and part number of the Jetson module."""
        found = find_jetson()
        return found.description if found else None

    def version(self, kind: str) -> str | None:
        """Version of the runtime, read from package metadata: nothing is imported."""
        for name in DISTRIBUTIONS[kind]:
            try:
                return importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        return None
