"""The diagnosis: which packages there are, what was found, and what it means for each command."""

from __future__ import annotations

import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

from edgehp import __version__
from edgehp._installed import install_extra
from edgehp.doctor.system import (
    Cpu,
    Disk,
    Jetson,
    Nvidia,
    Probe,
    find_cpu,
    find_disk,
    find_jetson_state,
    find_nvidia,
)

__all__ = [
    "BASE",
    "CPU_ENGINES",
    "ENGINES",
    "FAILED",
    "GPU_ENGINES",
    "NEEDS",
    "NOT_TESTED",
    "OK",
    "PACKAGES",
    "SCHEMA_VERSION",
    "CommandState",
    "Diagnosis",
    "Package",
    "PackageState",
    "diagnose",
    "find_packages",
    "how_to_install",
]


@dataclass(frozen=True)
class Package:
    """A package that some command needs.

    Attributes:
        module: what is imported.
        distributions: names it may be installed under, the one to install first.
        extra: the extra of edgehp that brings it; None for a dependency of every installation.
        note: how to get it where no extra brings it.
    """

    module: str
    distributions: tuple[str, ...]
    extra: str | None
    note: str = ""


PACKAGES = (
    Package("click", ("click",), None),
    Package("numpy", ("numpy",), None),
    Package("cv2", ("opencv-python-headless", "opencv-python", "opencv-contrib-python"), None),
    Package("onnx", ("onnx",), "build"),
    Package("onnxsim", ("onnxsim",), "build"),
    Package("safetensors", ("safetensors",), "build"),
    Package("onnxruntime", ("onnxruntime", "onnxruntime-gpu"), "cpu"),
    Package("openvino", ("openvino",), "cpu"),
    Package("tensorrt_rtx", ("tensorrt-rtx-cu13", "tensorrt_rtx"), "rtx"),
    Package(
        "tensorrt",
        ("tensorrt", "tensorrt-cu12", "tensorrt-cu13"),
        None,
        "it comes with JetPack, or from NVIDIA's own package index",
    ),
    Package("cuda.bindings", ("cuda-bindings",), "cuda12"),
    Package("pycuda", ("pycuda",), None, "JetPack images have it; elsewhere cuda-bindings does"),
    Package("torch", ("torch",), "train"),
    Package("tensorboard", ("tensorboard",), "train"),
    Package("distributed", ("distributed",), "cluster"),
    Package("jinja2", ("jinja2",), "report"),
    Package("matplotlib", ("matplotlib",), "report"),
    Package("jtop", ("jetson-stats",), "jetson"),
    Package("pynvml", ("nvidia-ml-py",), "nvml"),
    Package("cryptography", ("cryptography",), "ship"),
    Package("tuf", ("tuf",), "ship"),
    Package("model_signing", ("model-signing",), "sign"),
)
BASE = ("click", "numpy", "cv2")
# Any one of these runs an artifact (each its own kind); the second pair only on a GPU.
CPU_ENGINES = ("openvino", "onnxruntime")
GPU_ENGINES = ("tensorrt_rtx", "tensorrt")
ENGINES = CPU_ENGINES + GPU_ENGINES
# Command -> packages it cannot do without; True: and one of `ENGINES`. Every command is here.
NEEDS: dict[str, tuple[tuple[str, ...], bool]] = {
    "build": (("onnx", "onnxsim", "safetensors"), True),
    "validate": ((), True),
    "bench": ((), True),
    "sensitivity": (("onnx",), True),
    "predict": ((), True),
    "run": ((), True),
    "label": (("onnxruntime",), False),
    "train": (("torch", "safetensors", "tensorboard"), False),
    "distill": (("torch", "safetensors", "tensorboard"), False),
    "bundle": (("cryptography", "model_signing"), False),
    "verify": (("cryptography",), False),
    "install": (("cryptography",), True),
    "repo": (("cryptography", "tuf"), False),
    "update": (("cryptography", "tuf"), True),
    "status": ((), False),
    "rollback": ((), True),
    "confirm": ((), False),
    "targets": ((), False),
    "doctor": ((), False),
    "init": ((), False),
    "completion": ((), False),
    "report": (("jinja2", "matplotlib"), False),
}


# Not from the current directory, and not a directory that merely has the name (stubs leave such a
# namespace behind): neither is the package.
IMPORT_CODE = """
import sys
sys.path[:] = [entry for entry in sys.path if entry]
import {module} as module
if getattr(module, "__file__", None) is None:
    raise ImportError("{module} is an empty namespace, not a package")
print(getattr(module, "__version__", "unknown"))
"""


@dataclass(frozen=True)
class PackageState:
    """What was found of a package.

    Attributes:
        module: what is imported.
        version: installed version, or None if the package is not installed.
        problem: why importing it fails although it is installed, or None.
        commands: commands that need it.
        install: what to do to have it, or None where it works.
    """

    module: str
    version: str | None
    problem: str | None
    commands: tuple[str, ...]
    install: str | None

    @property
    def works(self) -> bool:
        """Whether it is installed and can be imported."""
        return self.version is not None and self.problem is None


def how_to_install(module: str) -> str:
    """What to do to have `module` (``"cv2"``, ``"onnx.helper"``), as a clause for people."""
    for package in PACKAGES:
        if module == package.module or module.startswith(f"{package.module}."):
            if package.note:
                return package.note
            if package.extra:
                return f"install it with: {install_extra(package.extra)}"
            return f"install it with: pip install {package.distributions[0]}"
    return f"install it with: pip install {module.partition('.')[0]}"


def _version(package: Package) -> str | None:
    for name in package.distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _state(package: Package, probe: Probe) -> PackageState:
    version = _version(package)
    commands = tuple(
        name
        for name, (modules, engine) in NEEDS.items()
        if package.module in (*BASE, *modules) or (engine and package.module in ENGINES)
    )
    problem = None
    # JetPack's TensorRT and pycuda may be there without the metadata that pip leaves.
    if version is not None or package.note:
        found = probe.python_code(IMPORT_CODE.format(module=package.module))
        if found.problem is None:
            version = version or found.stdout.strip()
        elif version is not None or found.code is None or found.code < 0:
            version, problem = version or "unknown", found.problem
    install = None if version and not problem else how_to_install(package.module)
    return PackageState(package.module, version, problem, commands, install)


def find_packages(probe: Probe) -> tuple[PackageState, ...]:
    """The state of every package of `PACKAGES`; each is imported in a process of its own."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        return tuple(pool.map(lambda package: _state(package, probe), PACKAGES))


SCHEMA_VERSION = 1
# How a check of `edgehp doctor --test` ends.
OK, FAILED, NOT_TESTED = "ok", "failed", "not tested"


@dataclass(frozen=True)
class CommandState:
    """Whether a command can run here, and what to do if not (each a clause)."""

    name: str
    ok: bool
    remedies: tuple[str, ...]


@dataclass(frozen=True)
class Diagnosis:
    """Everything `edgehp doctor` says."""

    edgehp: str
    python: str
    platform: str
    cpu: Cpu
    disk: Disk
    nvidia: Nvidia
    jetson: Jetson | None
    packages: tuple[PackageState, ...]
    commands: tuple[CommandState, ...]

    @property
    def ok(self) -> bool:
        """Whether the dependencies of every installation work."""
        return all(state.works for state in self.packages if state.module in BASE)

    def to_dict(self) -> dict[str, Any]:
        """A dictionary for JSON."""
        return {"schema_version": SCHEMA_VERSION, "ok": self.ok, **asdict(self)}


def command_state(name: str, packages: dict[str, PackageState], gpu: bool) -> CommandState:
    """What the packages (by module) and a working `gpu` mean for the command `name`."""
    modules, engine = NEEDS[name]
    remedies = [
        f"{module}: {state.problem or 'is missing'}; {state.install}"
        for module in (*BASE, *modules)
        if not (state := packages[module]).works
    ]
    engines = CPU_ENGINES + GPU_ENGINES if gpu else CPU_ENGINES
    if engine and not any(packages[module].works for module in engines):
        remedies.append(f"no engine: {install_extra('cpu')} brings OpenVINO and onnxruntime")
    return CommandState(name, not remedies, tuple(remedies))


def diagnose(probe: Probe | None = None) -> Diagnosis:
    """Look at this machine; takes some seconds, because every package is imported apart.

    Args:
        probe: where to look; this machine by default.
    """
    probe = probe or Probe()
    packages = find_packages(probe)
    by_module = {state.module: state for state in packages}
    nvidia = find_nvidia(probe)
    return Diagnosis(
        edgehp=__version__,
        python=f"{platform.python_version()} ({sys.executable})",
        platform=platform.platform(),
        cpu=find_cpu(probe),
        disk=find_disk(probe.disk),
        nvidia=nvidia,
        jetson=find_jetson_state(probe),
        packages=packages,
        commands=tuple(command_state(name, by_module, nvidia.problem is None) for name in NEEDS),
    )
