"""Running a program whatever becomes of it, and asking the NVIDIA driver what there is so.

A broken driver can kill the process that loads it, and so can some TensorRT libraries where there
is no driver at all; so nothing that touches a GPU is imported here before this probe has passed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edgehp.errors import EnvironmentalError

# A first import of torch from an SD card takes half a minute.
TIMEOUT_SECONDS = 60.0
# Plain ctypes: the question is whether the driver works, not whether a Python binding is there.
# The numbers 75 and 76 are CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of cuda.h.
PROBE_CODE = """
import ctypes, json, sys
try:
    cuda = ctypes.CDLL("libcuda.so.1")
except OSError as e:
    print(json.dumps({"missing": str(e)}))
    sys.exit(0)
def check(status, call):
    if status:
        text = ctypes.c_char_p()
        cuda.cuGetErrorString(status, ctypes.byref(text))
        reason = (text.value or b"unknown error").decode()
        print(json.dumps({"failed": f"{call} returned {status}: {reason}"}))
        sys.exit(0)
check(cuda.cuInit(0), "cuInit")
number = ctypes.c_int()
check(cuda.cuDriverGetVersion(ctypes.byref(number)), "cuDriverGetVersion")
version = number.value
check(cuda.cuDeviceGetCount(ctypes.byref(number)), "cuDeviceGetCount")
gpus = []
for index in range(number.value):
    device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    check(cuda.cuDeviceGet(ctypes.byref(device), index), "cuDeviceGet")
    check(cuda.cuDeviceGetName(name, 256, device), "cuDeviceGetName")
    capability = []
    for attribute in (75, 76):
        value = ctypes.c_int()
        check(cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device), "attribute")
        capability.append(value.value)
    gpus.append([name.value.decode(errors="replace"), *capability])
print(json.dumps({"version": version, "gpus": gpus}))
"""


@dataclass(frozen=True)
class RunResult:
    """How a subprocess ended.

    Attributes:
        code: exit status, negative for the signal that killed it; None if it never ran or was
            stopped by the time limit.
        stdout: what it wrote.
        stderr: what it complained.
        problem: None for exit status 0, else one clause for people.
    """

    code: int | None
    stdout: str
    stderr: str
    problem: str | None


Runner = Callable[[Sequence[str], float], RunResult]


def run(command: Sequence[str], timeout: float = TIMEOUT_SECONDS) -> RunResult:
    """Run `command` without a shell and without input; never raises for what it does."""
    try:
        done = subprocess.run(
            list(command),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout,
            check=False,
            encoding="utf-8",
            errors="replace",
            env={**os.environ, "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired:
        return RunResult(None, "", "", f"did not end within {timeout:g} s")
    except OSError as e:
        return RunResult(None, "", "", f"cannot be run ({e.strerror or e})")
    code, problem = done.returncode, None
    if code < 0:
        known = {s.value: s.name for s in signal.Signals}
        problem = f"crashed with {known.get(-code, f'signal {-code}')}"
    elif code:
        lines = done.stderr.strip().splitlines()
        problem = lines[-1].strip() if lines else f"ended with status {code}"
    return RunResult(code, done.stdout, done.stderr, problem)


class NoDriverError(EnvironmentalError):
    """This machine has no NVIDIA driver."""


@dataclass(frozen=True)
class Gpu:
    """One GPU: its name and compute capability, such as ``"8.7"``."""

    name: str
    compute_capability: str


@dataclass(frozen=True)
class DriverProbe:
    """What the driver answered.

    Attributes:
        cuda_version: the newest CUDA the driver supports, such as ``"12.6"``.
        gpus: in the driver's order; at least one.
    """

    cuda_version: str
    gpus: tuple[Gpu, ...]


def probe_driver(runner: Runner = run) -> DriverProbe:
    """Ask the driver in a subprocess; takes a fraction of a second.

    Raises:
        EnvironmentalError: there is no driver or GPU, or the driver fails, hangs or crashes.
    """
    done = runner([sys.executable, "-I", "-c", PROBE_CODE], TIMEOUT_SECONDS)
    if done.code is None or done.code < 0:
        raise EnvironmentalError(
            f"the NVIDIA driver {done.problem} when asked for its GPUs; look at dmesg, restart "
            "the machine or install the driver again"
        )
    try:
        answer = json.loads(done.stdout)
        if not {"missing", "failed"} & answer.keys():
            version = answer["version"]
            gpus = [Gpu(name, f"{major}.{minor}") for name, major, minor in answer["gpus"]]
            if not gpus:
                raise EnvironmentalError("the NVIDIA driver is there but finds no GPU")
            return DriverProbe(f"{version // 1000}.{version % 1000 // 10}", tuple(gpus))
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        tail = " ".join(done.stderr.split())[-200:]
        raise EnvironmentalError(f"the driver probe gave no answer: {tail}") from e
    if "missing" in answer:
        raise NoDriverError(
            f"no NVIDIA driver found ({answer['missing']}); install it, or use a processor engine"
        )
    raise EnvironmentalError(
        f"the NVIDIA driver failed: {answer['failed']}; check nvidia-smi and the permissions of "
        "/dev/nvidia*"
    )
