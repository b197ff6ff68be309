"""What an artifact is checked against: GPUs, Jetson module and runtime versions."""

from __future__ import annotations

import importlib.metadata
from typing import Protocol

from edgehp.device import find_jetson
from edgehp.driver import Gpu, probe_driver

__all__ = ["DISTRIBUTIONS", "DeviceProbe", "Gpu", "HostProbe"]

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
        """See `DeviceProbe.gpus`.

        Raises:
            EnvironmentalError: there is no driver, or it fails or crashes.
        """
        if self._gpus is None:
            self._gpus = probe_driver().gpus
        return self._gpus

    def module(self) -> str | None:
        """See `DeviceProbe.module`."""
        found = find_jetson()
        return found.description if found else None

    def version(self, kind: str) -> str | None:
        """See `DeviceProbe.version`; read from package metadata, nothing is imported."""
        for name in DISTRIBUTIONS[kind]:
            try:
                return importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        return None
