"""The diagnosis: what was found, and what it means for each command."""

from __future__ import annotations

import platform
import sys
from dataclasses import asdict, dataclass
from typing import Any

from edgehp import __version__
from edgehp._installed import install_extra
from edgehp.doctor.packages import (
    BASE,
    CPU_ENGINES,
    GPU_ENGINES,
    NEEDS,
    PackageState,
    find_packages,
)
from edgehp.doctor.probe import Probe
from edgehp.doctor.system import (
    Cpu,
    Disk,
    Jetson,
    Nvidia,
    find_cpu,
    find_disk,
    find_jetson_state,
    find_nvidia,
)

__all__ = ["FAILED", "NOT_TESTED", "OK", "SCHEMA_VERSION", "CommandState", "Diagnosis", "diagnose"]

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
