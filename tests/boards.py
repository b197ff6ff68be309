"""Boards as their own files and libraries show them: Jetson trees, and NVML of discrete GPUs.

Written after device trees, ``/etc/nv_tegra_release``, sysfs and ``nvpmodel -q`` of JetPack 6.0, 6.2
and 7.2 as users and NVIDIA's documents print them, and nvml.h; no board was at hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# Bus address -> channel -> label, millivolts, milliamperes; `loaded` of them are under load.
Monitors = Mapping[str, Mapping[int, tuple[str, int, int]]]
_NX_RAILS: Monitors = {
    "1-0040": {
        1: ("VDD_IN", 4960, 1256),
        2: ("VDD_CPU_GPU_CV", 4952, 408),
        3: ("VDD_SOC", 4952, 304),
    }
}
_AGX_RAILS: Monitors = {
    "1-0040": {
        1: ("VDD_GPU_SOC", 19_888, 204),
        2: ("VDD_CPU_CV", 19_912, 60),
        3: ("VIN_SYS_5V0", 5032, 664),
    },
    "1-0041": {1: ("NC", 0, 0), 2: ("VDDQ_VDD2_1V8AO", 5032, 120), 3: ("NC", 0, 0)},
}
_THOR_RAILS: Monitors = {
    "1-0040": {
        1: ("VDD_GPU", 20_000, 300),
        2: ("VDD_CPU_SOC_MSS", 20_000, 450),
        3: ("VIN_SYS_5V0", 5000, 900),
    }
}
# TensorRT is of the JetPack, CUDA as the driver reports it.
JETPACKS = {
    "6.0": ("# R36 (release), REVISION: 3.0, GCID: 36191598, BOARD: generic", "8.6.2", 12020),
    "6.2": ("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic", "10.3.0", 12060),
    "7.1": ("# R38 (release), REVISION: 4.0, GCID: 43000001, BOARD: generic", "10.13.3", 13000),
    "7.2": ("# R39 (release), REVISION: 2.0, GCID: 45000001, BOARD: generic", "10.16.2", 13020),
}


@dataclass(frozen=True)
class Jetson:
    """One board with its JetPack.

    Attributes:
        compatible: of the device tree, without the chip.
        model: of the device tree.
        jetpack: key of `JETPACKS`.
        modes: names in nvpmodel.conf, by their number.
        mode: number of the active one.
        gpu_mhz: lowest, highest and present clock.
        emc_mhz: cap of the memory's clock in the active mode.
        memory_kib: ``MemTotal``.
        target: what edgehp calls the module.
        watts: of the total below, idle.
        rails: INA3221 monitors.
        ina238: millivolts and milliamperes of the carrier's input, which Thor's kit measures.
        gpu: name in ``/sys/class/devfreq``.
        chip: of the device tree.
        super_: flashed as the variant with more power.
    """

    compatible: tuple[str, ...]
    model: str
    jetpack: str
    modes: tuple[str, ...]
    mode: int
    gpu_mhz: tuple[int, int, int]
    emc_mhz: int
    memory_kib: int
    target: str
    watts: float
    rails: Monitors = field(default_factory=lambda: _NX_RAILS)
    ina238: tuple[int, int] | None = None
    gpu: str = "17000000.gpu"
    chip: str = "tegra234"

    @property
    def power_mode(self) -> str:
        """Name of the active mode, without the prefix that some have."""
        return self.modes[self.mode].removeprefix("MODE_")

    @property
    def capability(self) -> str:
        """Compute capability of the GPU."""
        return "8.7" if self.chip == "tegra234" else "11.0"

    def write(self, root: Path) -> Path:
        """Write the tree under `root`, and programs ``nvpmodel`` and ``jetson_clocks``."""
        tree = root / "proc/device-tree"
        tree.mkdir(parents=True)
        names = (*self.compatible, self.chip)
        lines = [name if "," in name else f"nvidia,{name}" for name in names]
        (tree / "compatible").write_bytes("".join(f"{line}\0" for line in lines).encode())
        (tree / "model").write_bytes(f"{self.model}\0".encode())
        zones = {"cpu-thermal": 48_250, "gpu-thermal": 46_500, "tj-thermal": 49_000}
        gpu = f"sys/class/devfreq/{self.gpu}"
        files: dict[str, object] = {
            "etc/nv_tegra_release": f"{JETPACKS[self.jetpack][0]}, EABI: aarch64",
            "etc/nvpmodel.conf": "\n".join(
                f"< POWER_MODEL ID={i} NAME={name} >" for i, name in enumerate(self.modes)
            ),
            "proc/meminfo": f"MemTotal:  {self.memory_kib} kB\nMemAvailable:  5200000 kB",
            "proc/stat": "cpu 1000 0 500 9000 0 0 0 0 0 0",
            "proc/cpuinfo": "processor\t: 0\nmodel name\t: ARMv8 Processor rev 1 (v8l)\n"
            "Features\t: fp asimd evtstrm aes crc32 atomics fphp asimdhp cpuid asimddp",
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "schedutil",
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_min_freq": 729_600,
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_max_freq": 1_728_000,
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": 1_728_000,
            "sys/kernel/nvpmodel_clk_cap/emc": self.emc_mhz * 1_000_000,
            "sys/class/hwmon/hwmon0/oc1_event_cnt": 0,
            f"{gpu}/device/load": 0,
        }
        for name, mhz in zip(("min_freq", "max_freq", "cur_freq"), self.gpu_mhz, strict=True):
            files[f"{gpu}/{name}"] = mhz * 1_000_000
        for i, (zone, milli) in enumerate(zones.items()):
            files[f"sys/class/thermal/thermal_zone{i}/type"] = zone
            files[f"sys/class/thermal/thermal_zone{i}/temp"] = milli
            files[f"sys/class/thermal/thermal_zone{i}/trip_point_0_type"] = "passive"
            files[f"sys/class/thermal/thermal_zone{i}/trip_point_0_temp"] = 99_000
        put(root, files)
        self.set_power(root)
        mode = self.modes[self.mode]
        # The fan's line comes before the mode's on kits.
        program(root / "bin/nvpmodel", f"echo 'NV Power Mode: {mode}'; echo {self.mode}")
        program(
            root / "bin/jetson_clocks", f"cat '{root}/{gpu}/max_freq' > '{root}/{gpu}/min_freq'"
        )
        return root

    def set_power(self, root: Path, factor: float = 1.0) -> None:
        """Let the monitors read their currents times `factor`."""
        monitors = dict(self.rails)
        for i, (address, channels) in enumerate(monitors.items()):
            device = f"sys/bus/i2c/devices/{address}"
            at = f"{device}/hwmon/hwmon{i + 1}"
            put(root, {f"{device}/name": "ina3221", f"{at}/in7_label": "sum of shunt voltages"})
            for n, (label, millivolts, milliamperes) in channels.items():
                put(root, {f"{at}/in{n}_label": label, f"{at}/in{n}_input": millivolts})
                put(root, {f"{at}/curr{n}_input": round(milliamperes * factor)})
        if self.ina238 is not None:
            at = "sys/bus/i2c/devices/2-0044/hwmon/hwmon5"
            millivolts, milliamperes = self.ina238
            put(root, {"sys/bus/i2c/devices/2-0044/name": "ina238"})
            put(root, {f"{at}/in0_input": 4, f"{at}/in1_input": millivolts})
            put(root, {f"{at}/curr1_input": round(milliamperes * factor)})
            put(root, {f"{at}/power1_input": round(millivolts * milliamperes * factor)})


def put(root: Path, files: Mapping[str, object]) -> None:
    """Write files of a line each."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")


def program(path: Path, script: str) -> None:
    """A program of a board as a shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


_NANO_SUPER = Jetson(
    compatible=("p3768-0000+p3767-0005-super", "p3767-0005"),
    model="NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
    jetpack="6.2",
    modes=("15W", "25W", "MAXN_SUPER", "7W"),
    mode=1,
    gpu_mhz=(306, 918, 306),
    emc_mhz=3199,
    memory_kib=7_802_304,
    target="orin-nano-8gb",
    watts=4.96 * 1.256,
)
_NX = replace(
    _NANO_SUPER,
    compatible=("p3768-0000+p3767-0000", "p3767-0000"),
    model="NVIDIA Jetson Orin NX Engineering Reference Developer Kit",
    jetpack="6.0",
    modes=("MAXN", "MODE_10W", "MODE_15W", "MODE_25W"),
    mode=2,
    gpu_mhz=(306, 612, 306),
    memory_kib=15_900_000,
    target="orin-nx-16gb",
)
_AGX = replace(
    _NX,
    compatible=("p3737-0000+p3701-0005", "p3701-0005"),
    model="NVIDIA Jetson AGX Orin Developer Kit",
    jetpack="7.2",
    modes=("MAXN", "MODE_15W", "MODE_30W", "MODE_50W"),
    memory_kib=64_300_000,
    target="orin-agx-64gb",
    watts=19.888 * 0.204 + 19.912 * 0.060 + 5.032 * 0.664,
    rails=_AGX_RAILS,
)
JETSONS = {
    "Nano super kit, 6.2": _NANO_SUPER,
    "Nano on another carrier, 6.2": replace(
        _NANO_SUPER,
        compatible=("acme,vision-box", "p3767-0003"),
        model="Acme Vision Box",
        modes=("15W", "7W"),
        mode=0,
        gpu_mhz=(306, 612, 306),
        emc_mhz=2133,
    ),
    "NX kit, 6.0": _NX,
    "NX super on an older carrier, 6.2": replace(
        _NX,
        compatible=("p3509-0000+p3767-0001-super", "p3767-0001"),
        jetpack="6.2",
        modes=("MAXN_SUPER", "10W", "15W", "20W", "40W"),
        mode=4,
        gpu_mhz=(306, 1173, 306),
        memory_kib=7_900_000,
        target="orin-nx-8gb",
    ),
    "NX kit, 7.2": replace(_NX, jetpack="7.2"),
    "AGX kit, 6.2": replace(_AGX, jetpack="6.2"),
    "AGX kit, 7.2": _AGX,
    "AGX 32 GB on another carrier, 7.2": replace(
        _AGX,
        compatible=("acme,box", "p3701-0004"),
        model="Acme Box",
        modes=("MAXN", "MODE_15W", "MODE_30W", "MODE_40W"),
        memory_kib=31_200_000,
        target="orin-agx-32gb",
    ),
    "Thor kit, 7.1": replace(
        _AGX,
        compatible=("p4071-0000+p3834-0008", "p3834-0008"),
        model="NVIDIA Jetson AGX Thor Developer Kit",
        jetpack="7.1",
        modes=("MAXN", "120W"),
        mode=1,
        gpu_mhz=(315, 1386, 315),
        emc_mhz=4266,
        memory_kib=128_700_000,
        target="thor",
        watts=20.0 * 1.5,
        rails=_THOR_RAILS,
        ina238=(20_000, 1500),
        gpu="gpu-gpc-0",
        chip="tegra264",
    ),
}


class NVMLError(Exception):
    """As of the package."""


@dataclass(frozen=True)
class Board:
    """What NVML tells of a discrete GPU under load.

    Attributes:
        name: as the driver spells it.
        cap_w: enforced power limit.
        capability: compute capability.
        mhz: highest clock of the processors.
        old: the driver is older than 535 and calls the clock reasons throttle reasons.
    """

    name: str
    cap_w: float
    capability: str
    mhz: int
    old: bool = False

    def nvml(self, *, reasons: int = 0, mhz: int | None = None, others: int = 0) -> Any:
        """A module ``pynvml`` for a machine with this board alone.

        Args:
            reasons: bits of the clock event reasons.
            mhz: present clock; None is the highest.
            others: processes besides this one that hold the GPU.
        """
        answers: dict[str, Any] = {
            "nvmlInit": None,
            "nvmlShutdown": None,
            "nvmlDeviceGetCount": 1,
            "nvmlDeviceGetHandleByIndex": "handle",
            "nvmlDeviceGetName": self.name,
            "nvmlDeviceGetTotalEnergyConsumption": iter(range(5_000_000, 9_000_000, 7000)),
            "nvmlDeviceGetPowerUsage": round(1000 * self.cap_w),
            "nvmlDeviceGetEnforcedPowerLimit": round(1000 * self.cap_w),
            "nvmlDeviceGetClockInfo": mhz or self.mhz,
            "nvmlDeviceGetTemperature": 61,
            "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=40, memory=10),
            "nvmlDeviceGetComputeRunningProcesses": ("this process", *["another"] * others),
            f"nvmlDeviceGetCurrentClocks{'Throttle' if self.old else 'Event'}Reasons": reasons,
        }

        def call(answer: Any) -> Any:
            return lambda *_: next(answer) if hasattr(answer, "__next__") else answer

        functions = {name: call(answer) for name, answer in answers.items()}
        return SimpleNamespace(NVMLError=NVMLError, **functions)


GPUS = {
    "V100": Board("Tesla V100-SXM2-16GB", 300, "7.0", 1530, old=True),
    "T4": Board("Tesla T4", 70, "7.5", 1590),
    "L4": Board("NVIDIA L4", 72, "8.9", 2040),
    "A100": Board("NVIDIA A100-SXM4-80GB", 400, "8.0", 1410),
    "L40S": Board("NVIDIA L40S", 350, "8.9", 2520),
    "H100": Board("NVIDIA H100 80GB HBM3", 700, "9.0", 1980),
    "RTX 4090": Board("NVIDIA GeForce RTX 4090", 450, "8.9", 3105),
}
