"""NVML: energy, power, clocks and throttling of NVIDIA GPUs, through ``nvidia-ml-py``.

The energy counter counts millijoules since the driver was loaded, on Volta and newer; the power
reading is a fallback for older boards.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from typing import Any

from edgehp._installed import install_extra
from edgehp.benchmark.host import HostState
from edgehp.benchmark.power.base import ENERGY, POWER, Meter, MeterInfo
from edgehp.errors import EnvironmentalError, MeasurementError

# The counter moves about every 100 ms; reading faster only repeats values.
_PERIOD_S = 0.1
# nvmlClocksEventReason* of nvml.h that mean the board went below what was asked of it.
_POWER_CAP = 0x04
# Boards without a power connector (T4, A2, L4) work at their cap whenever they are busy.
_SLOT_W = 75.0
THROTTLE_REASONS = {
    _POWER_CAP: "power cap",
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}


class NvmlMeter(Meter):
    """The energy counter of CUDA's first GPU, or its power where there is no counter."""

    def __init__(self, module: Any = None) -> None:
        """Open the driver's library.

        Args:
            module: stands for the package ``pynvml``; imported when omitted.

        Raises:
            EnvironmentalError: the package, the driver or the GPU is missing.
        """
        self._nvml, self._handle = _open(module)
        self._joules_at_open = self._counter()
        kind = POWER if self._joules_at_open is None else ENERGY
        if kind == POWER:
            self._watts()
        self.info = MeterInfo(
            "nvml",
            kind,
            {"gpu": "the whole GPU board with its memory"},
            ("gpu",),
            "the GPU board with its memory; not the processor or the rest of the machine",
            _PERIOD_S,
        )

    def values(self) -> dict[str, float]:
        """Joules since it was opened, or watts."""
        if self._joules_at_open is None:
            return {"gpu": self._watts()}
        counted = self._counter()
        if counted is None or counted < self._joules_at_open:
            raise MeasurementError("the GPU's energy counter stopped or was set back")
        return {"gpu": counted - self._joules_at_open}

    def close(self) -> None:
        """Let go of the library."""
        with suppress(self._nvml.NVMLError):
            self._nvml.nvmlShutdown()

    def _counter(self) -> float | None:
        try:
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3
        except self._nvml.NVMLError:
            return None

    def _watts(self) -> float:
        try:
            return float(self._nvml.nvmlDeviceGetPowerUsage(self._handle)) / 1e3
        except self._nvml.NVMLError as e:
            raise MeasurementError(f"the GPU does not tell its power ({e})") from e


class GpuState:
    """Adds a GPU's temperature, clock and throttling to the state of the machine."""

    def __init__(self, module: Any = None) -> None:
        """Open the driver's library; arguments and errors as of `NvmlMeter`."""
        self._nvml, self._handle = _open(module)
        milliwatts = self._ask(lambda n, h: float(n.nvmlDeviceGetEnforcedPowerLimit(h)))
        self._cap_w = None if milliwatts is None else milliwatts / 1e3

    def fill(self, state: HostState) -> HostState:
        """The state with what the GPU tells; what it does not tell stays as it was."""
        reasons = self._ask(lambda n, h: int(n.nvmlDeviceGetCurrentClocksEventReasons(h)))
        if reasons is None:
            # Drivers before 535 know them by their old name alone, whatever the package knows.
            reasons = self._ask(lambda n, h: int(n.nvmlDeviceGetCurrentClocksThrottleReasons(h)))
        reasons = reasons or 0
        mhz = self._ask(lambda n, h: float(n.nvmlDeviceGetClockInfo(h, 1)))
        degrees = self._ask(lambda n, h: float(n.nvmlDeviceGetTemperature(h, 0)))
        load = self._ask(lambda n, h: float(n.nvmlDeviceGetUtilizationRates(h).gpu) / 100)
        holders = self._ask(lambda n, h: len(n.nvmlDeviceGetComputeRunningProcesses(h)))
        conditions: tuple[str, ...] = ()
        if reasons & _POWER_CAP and self._cap_w is not None and self._cap_w <= _SLOT_W:
            reasons &= ~_POWER_CAP
            conditions = (f"the GPU works at its power cap of {self._cap_w:.0f} W",)
        return replace(
            state,
            reasons=tuple(text for bit, text in THROTTLE_REASONS.items() if reasons & bit),
            conditions=conditions,
            # NVML on a Jetson tells little; what the kernel said stays.
            gpu_mhz=state.gpu_mhz if mhz is None else mhz,
            gpu_load=state.gpu_load if load is None else load,
            # One of them is this process, under whatever number a container gives it.
            gpu_others=None if holders is None else max(0, holders - 1),
            temperatures=state.temperatures | ({} if degrees is None else {"GPU": degrees}),
        )

    def _ask(self, call: Callable[[Any, Any], Any]) -> Any:
        """What NVML answers, None where this GPU or driver does not know."""
        try:
            return call(self._nvml, self._handle)
        except (self._nvml.NVMLError, AttributeError):
            return None


def open_gpu_state() -> GpuState | None:
    """The first GPU's state, None where NVML cannot be used."""
    try:
        return GpuState()
    except EnvironmentalError:
        return None


def _open(module: Any) -> tuple[Any, Any]:
    try:
        nvml = import_module("pynvml") if module is None else module
    except ImportError as e:
        raise EnvironmentalError(
            f"NVML cannot be used ({e}); install it with: {install_extra('nvml')}"
        ) from e
    try:
        nvml.nvmlInit()
        return nvml, _first_of_cuda(nvml)
    except nvml.NVMLError as e:
        raise EnvironmentalError(f"NVML finds no GPU ({e})") from e


def _first_of_cuda(nvml: Any) -> Any:
    """The GPU that CUDA counts first, which is where engines run.

    NVML counts by the bus, CUDA by speed unless told otherwise, and sees only what
    ``CUDA_VISIBLE_DEVICES`` names: with several GPUs the power of another one would be read.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
    if visible.startswith("GPU-"):
        return nvml.nvmlDeviceGetHandleByUUID(visible)
    count = nvml.nvmlDeviceGetCount()
    if count > 1 and os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        raise EnvironmentalError(
            f"there are {count} GPUs, and NVML may count them in another order than CUDA: set "
            "CUDA_DEVICE_ORDER=PCI_BUS_ID, and CUDA_VISIBLE_DEVICES to the one that is measured"
        )
    return nvml.nvmlDeviceGetHandleByIndex(int(visible) if visible.isdigit() else 0)
