"""Asking the NVIDIA driver what there is, in a process of its own.

A broken driver can kill the process that loads it, and so can some TensorRT libraries where there
is no driver at all; so nothing that touches a GPU is imported here before this probe has passed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass

from edgehp.errors import EnvironmentalError

_TIMEOUT_S = 60
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


def probe_driver() -> DriverProbe:
    """Ask the driver in a subprocess; takes a fraction of a second.

    Raises:
        EnvironmentalError: there is no driver or GPU, or the driver fails, hangs or crashes.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", PROBE_CODE],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as e:
        raise EnvironmentalError(
            f"the NVIDIA driver did not answer within {_TIMEOUT_S} s; look at dmesg and restart "
            "the machine"
        ) from e
    except OSError as e:
        raise EnvironmentalError(f"the driver probe could not be started: {e}") from e
    if done.returncode < 0:
        raise EnvironmentalError(
            f"the NVIDIA driver crashed when asked for its GPUs (signal {-done.returncode}); "
            "install the driver again"
        )
    return read_answer(done.stdout, done.stderr)


def read_answer(text: str, complaint: str = "") -> DriverProbe:
    """What the driver said, from what `PROBE_CODE` wrote.

    Args:
        text: its standard output.
        complaint: its standard error, for the message where there is no answer.

    Raises:
        EnvironmentalError: there is no driver or GPU, the driver failed, or this is no answer.
    """
    try:
        answer = json.loads(text)
        if not {"missing", "failed"} & answer.keys():
            return _probe_of(answer["version"], answer["gpus"])
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        tail = " ".join(complaint.split())[-200:]
        raise EnvironmentalError(f"the driver probe gave no answer: {tail}") from e
    if "missing" in answer:
        raise NoDriverError(
            f"no NVIDIA driver found ({answer['missing']}); install it, or use a processor engine"
        )
    raise EnvironmentalError(
        f"the NVIDIA driver failed: {answer['failed']}; check nvidia-smi and the permissions of "
        "/dev/nvidia*"
    )


def _probe_of(version: int, gpus: list[tuple[str, int, int]]) -> DriverProbe:
    if not gpus:
        raise EnvironmentalError("the NVIDIA driver is there but finds no GPU")
    return DriverProbe(
        cuda_version=f"{version // 1000}.{version % 1000 // 10}",
        gpus=tuple(Gpu(name, f"{major}.{minor}") for name, major, minor in gpus),
    )
