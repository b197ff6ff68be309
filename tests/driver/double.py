"""Builds and controls the driver double of ``driver.c``."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest

from edgehp.engines.gpu_crop import KERNEL

SOURCE = Path(__file__).with_name("driver.c")
NAME = "libcuda.so.1"
PYCUDA = "2026.1"


@cache
def double_folder() -> Path:
    """The folder with the compiled ``libcuda.so.1``; the test is skipped without a C compiler."""
    digest = hashlib.sha256(SOURCE.read_bytes() + KERNEL.read_bytes()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"edgehp-driver-double-{os.getuid()}-{digest}"
    if not (folder / NAME).exists():
        folder.mkdir(mode=0o700, exist_ok=True)
        built = folder / f"{os.getpid()}.so"
        options = ("-shared", "-fPIC", "-O1", "-Wall", "-Wno-misleading-indentation", "-Werror")
        try:
            subprocess.run(
                [
                    *("cc", *options, f"-I{KERNEL.parent}", f"-Wl,-soname,{NAME}"),
                    *("-o", built, SOURCE, "-lpthread", "-lm"),
                ],
                check=True,
                capture_output=True,
                text=True,
            )
        except FileNotFoundError:
            pytest.skip("no C compiler: the driver double cannot be built")
        except subprocess.CalledProcessError as e:
            pytest.fail(f"the driver double does not compile: {e.stderr}")
        built.replace(folder / NAME)
    return folder


@cache
def installed(*requirements: str) -> Path:
    """A folder with these packages of the index, installed once for the machine."""
    name = "".join(c if c.isalnum() else "-" for c in "-".join(requirements))
    python = f"{sys.version_info[0]}{sys.version_info[1]}"
    folder = Path(tempfile.gettempdir()) / f"edgehp-{name}-{python}"
    if not (folder / "complete").exists():
        done = subprocess.run(
            [sys.executable, "-m", "pip", "install", "-q", "--target", folder, *requirements],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            pytest.skip(f"{', '.join(requirements)} cannot be installed: {done.stderr[-200:]}")
        (folder / "complete").touch()
    return folder


# The headers of CUDA 12.6 that pycuda includes: of the index's wheels, as no toolkit is installed.
_HEADERS = (
    *("nvidia-cuda-runtime-cu12>=12.6,<12.7", "nvidia-cuda-nvcc-cu12>=12.6,<12.7"),
    *("nvidia-curand-cu12>=10.3,<10.4", "nvidia-cuda-profiler-api-cu12>=12.6,<12.7"),
)
# pycuda's own settings file. Unoptimized, it compiles in a third of the time.
_PYCUDA_SETTINGS = """\
CUDA_ROOT = {root!r}
CUDA_ENABLE_CURAND = False
CXXFLAGS = ["-O0", "-g0", "-w"]
"""


@cache
def built_pycuda() -> Path:
    """A folder with pycuda, built from its source against the double once for the machine.

    It takes some minutes; the test is skipped where it cannot be built.
    """
    python = f"{sys.version_info[0]}{sys.version_info[1]}"
    folder = Path(tempfile.gettempdir()) / f"edgehp-pycuda-{PYCUDA}-{python}-{os.getuid()}"
    if (folder / "complete").exists():
        return folder
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler: pycuda cannot be built")
    headers = installed(*_HEADERS)
    with tempfile.TemporaryDirectory() as name:
        home, root = Path(name), Path(name) / "cuda"
        for found in headers.glob("nvidia/*/include"):
            shutil.copytree(found, root / "include", dirs_exist_ok=True)
        (root / "lib64").mkdir()
        (root / "lib64/libcuda.so").symlink_to(double_folder() / NAME)
        (home / ".aksetup-defaults.py").write_text(_PYCUDA_SETTINGS.format(root=str(root)))
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-cache-dir"),
                *("--no-binary", "pycuda", "--target", folder, f"pycuda=={PYCUDA}"),
            ],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "HOME": name},
        )
    if done.returncode:
        pytest.skip(f"pycuda cannot be built: {done.stderr[-300:]}")
    (folder / "complete").touch()
    return folder


def environment(version: int = 13000, devices: str = "Double GPU;8;9;0") -> dict[str, str]:
    """The environment of a process that finds the double as its driver."""
    return {
        **os.environ,
        "LD_LIBRARY_PATH": str(double_folder()),
        "DOUBLE_VERSION": str(version),
        "DOUBLE_DEVICES": devices,
    }


def load_double() -> Driver:
    """Let this process use the double; whoever asks for ``libcuda.so.1`` from now on gets it."""
    ctypes.CDLL(str(double_folder() / NAME), ctypes.RTLD_GLOBAL)
    return Driver()


class Driver:
    """The driver that this process has loaded, by plain ctypes; `double` says which it is."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(NAME)
        self.double = hasattr(self.library, "double_live")

    @property
    def live(self) -> int:
        """What the double holds: memory, streams, events, graphs, references to contexts."""
        return int(self.library.double_live()) if self.double else 0

    @property
    def abandoned(self) -> int:
        """Threads that ended with a context on their stack, this one's depth added."""
        return int(self.library.double_abandoned()) if self.double else 0

    def fail(self, name: str, status: int, after: int = 0) -> None:
        """Let the call `name` answer `status` once."""
        self.library.double_fail(name.encode(), status, after)

    def fault(self, status: int) -> None:
        """Let every kernel end with a sticky error; 0 mends it."""
        self.library.double_fault(status)

    def call(self, name: str, *arguments: object) -> None:
        """Call the driver; RuntimeError where it does not answer 0."""
        status = getattr(self.library, name)(*arguments)
        if status:
            raise RuntimeError(f"{name} answered {status}")
