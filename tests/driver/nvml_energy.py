"""NVML's energy counter against its power integrated, idle and under load, on a real GPU.

Run as ``python -m tests.driver.nvml_energy``.
"""

from __future__ import annotations

import threading
from time import perf_counter, sleep

import pynvml
import torch

from edgehp.benchmark.power.nvml import NvmlMeter

SECONDS = 10.0


def measured(seconds: float) -> tuple[float, float]:
    """Mean power in W by the energy counter, and by the power reading integrated."""
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    meter = NvmlMeter()
    times, watts = [], []
    first = meter.read()
    start = perf_counter()
    while perf_counter() - start < seconds:
        times.append(perf_counter())
        watts.append(pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3)
        sleep(0.02)
    last = meter.read()
    meter.close()
    pynvml.nvmlInit()
    area = sum(
        (watts[i] + watts[i + 1]) / 2 * (times[i + 1] - times[i]) for i in range(len(times) - 1)
    )
    joules = last.values["gpu"] - first.values["gpu"]
    return joules / (last.time - first.time), area / (times[-1] - times[0])


def main() -> None:
    pynvml.nvmlInit()
    torch.cuda.init()
    sleep(2)
    rows = {"idle": measured(SECONDS / 2)}
    end = threading.Event()

    def load() -> None:
        a = torch.randn(8192, 8192, device="cuda", dtype=torch.float16)
        while not end.is_set():
            for _ in range(20):
                a @ a
            torch.cuda.synchronize()

    thread = threading.Thread(target=load)
    thread.start()
    sleep(2)
    rows["load"] = measured(SECONDS)
    end.set()
    thread.join()
    for name, (counter, integrated) in rows.items():
        difference = 100 * (counter / integrated - 1)
        print(
            f"{name}: {counter:.1f} W by the energy counter, {integrated:.1f} W by power "
            f"integrated, difference {difference:+.2f} %"
        )


if __name__ == "__main__":
    main()
