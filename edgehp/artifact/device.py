"""What an artifact is checked against: the GPUs, the Jetson module and the runtime versions here.

The driver is asked in a subprocess: a broken driver may crash the process that loads it, and a
check must report that instead of dying of it.
"""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from edgehp.errors import EnvironmentalError

__all__ = ["DeviceProbe", "Gpu", "HostProbe"]

# Distributions that carry a runtime, by engine kind. TensorRT's are named after the CUDA version.
_DISTRIBUTIONS = {
    "openvino": ("openvino",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-cu11"),
    "tensorrt-rtx": ("tensorrt-rtx-cu13", "tensorrt-rtx", "tensorrt-rtx-cu12"),
}
_DEVICE_TREE_MODEL = Path("/proc/device-tree/model")
_PROBE_SECONDS = 30

# CUDA driver API: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR is 75, MINOR is 76 (cuda.h).
_PROBE = """
import ctypes, sys
try:
    cuda = ctypes.CDLL("libcuda.so.1")
except OSError:
    sys.exit(0)
code = cuda.cuInit(0)
if code == 100:  # CUDA_ERROR_NO_DEVICE
    sys.exit(0)
if code:
    sys.exit(f"cuInit returned CUDA error {code}")
count, number = ctypes.c_int(), ctypes.c_int()
cuda.cuDeviceGetCount(ctypes.byref(count))
for device in range(count.value):
    name = ctypes.create_string_buffer(256)
    cuda.cuDeviceGetName(name, 256, device)
    capability = []
    for attribute in (75, 76):
        cuda.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
        capability.append(str(number.value))
    print(".".join(capability), name.value.decode("utf-8", "replace"))
"""


@dataclass(frozen=True)
class Gpu:
    """One GPU: its marketing name and compute capability, ``"8.7"``."""

    name: str
    compute_capability: str


class DeviceProbe(Protocol):
    """Facts about a device; tests inject their own."""

    def gpus(self) -> tuple[Gpu, ...]:
        """GPUs in the driver's order; empty where there is none."""

    def module(self) -> str | None:
        """The Jetson module's model text, None elsewhere."""

    def version(self, kind: str) -> str | None:
        """Version of the runtime of engine `kind`, None where it is not installed."""


class HostProbe:
    """The device this process runs on."""

    def gpus(self) -> tuple[Gpu, ...]:
        """See `DeviceProbe.gpus`.

        Raises:
            EnvironmentalError: there is a driver, but it fails or crashes.
        """
        try:
            done = subprocess.run(
                [sys.executable, "-c", _PROBE],
                capture_output=True,
                text=True,
                timeout=_PROBE_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as e:
            raise EnvironmentalError(
                f"the NVIDIA driver gave no answer within {_PROBE_SECONDS} s; "
                "run 'edgehp doctor' and restart the machine if it does not help"
            ) from e
        if done.returncode != 0:
            reason = done.stderr.strip().splitlines()[-1:] or [f"signal {-done.returncode}"]
            raise EnvironmentalError(
                f"the NVIDIA driver is there but does not work: {reason[0]}; run 'edgehp doctor'"
            )
        rows = (line.partition(" ") for line in done.stdout.splitlines() if line)
        return tuple(Gpu(name, capability) for capability, _, name in rows)

    def module(self) -> str | None:
        """See `DeviceProbe.module`."""
        try:
            text = _DEVICE_TREE_MODEL.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None
        model = text.strip("\0 \n")
        return model if "Jetson" in model or "Orin" in model else None

    def version(self, kind: str) -> str | None:
        """See `DeviceProbe.version`; read from package metadata, nothing is imported."""
        for name in _DISTRIBUTIONS[kind]:
            try:
                return importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        return None

    @staticmethod
    def machine() -> str:
        """Processor architecture, ``"x86_64"`` or ``"aarch64"``."""
        return platform.machine()
