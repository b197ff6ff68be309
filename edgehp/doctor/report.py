"""The diagnosis: which packages there are, what was found, and what it means for each command.

What an extra brings is read from edgehp's own metadata (Core Metadata, "Requires-Dist"); here is
only which extra a command cannot do without, and whether it needs an engine.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
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
from edgehp.engines import ENGINE_KINDS

# The "extra" whose packages come with every installation.
BASE = ""
# Distributions whose module has another name; None: it has none.
_MODULES: dict[str, str | None] = {
    "cuda-bindings": "cuda.bindings",
    "jetson-stats": "jtop",
    "nvidia-cuda-nvrtc": None,
    "nvidia-cuda-nvrtc-cu12": None,
    "nvidia-ml-py": "pynvml",
    "opencv-python-headless": "cv2",
    "pyopenssl": "OpenSSL",
    "tensorrt-rtx-cu13": "tensorrt_rtx",
}
# Without it progress is plain lines.
_DISPENSABLE = frozenset({"rich"})


@dataclass(frozen=True)
class Needs:
    """What a command cannot do without.

    Attributes:
        extra: of edgehp, or `BASE`.
        only: packages of the extra that it uses; empty for all of them.
        engine: whether it runs artifacts, so that one engine must work.
    """

    extra: str = BASE
    only: tuple[str, ...] = ()
    engine: bool = False


# Every command is here.
NEEDS = {
    "describe": Needs("build", ("onnx", "onnxruntime")),
    "build": Needs("build", engine=True),
    "validate": Needs(engine=True),
    "bench": Needs(engine=True),
    "sensitivity": Needs("build", ("onnx",), engine=True),
    "predict": Needs(engine=True),
    "run": Needs(engine=True),
    "label": Needs("train", ("onnxruntime",)),
    "train": Needs("train"),
    "distill": Needs("train"),
    "bundle": Needs("sign"),
    "verify": Needs("ship", ("cryptography",)),
    "install": Needs("ship", ("cryptography",), engine=True),
    "repo": Needs("ship"),
    "update": Needs("ship", engine=True),
    "status": Needs(),
    "rollback": Needs(engine=True),
    "confirm": Needs(),
    "targets": Needs(),
    "doctor": Needs(),
    "init": Needs(),
    "completion": Needs(),
    "report": Needs("report"),
}


def requirements() -> dict[str, list[tuple[str, str]]]:
    """Distribution -> versions (``">=1.17"``) and extra, by each extra that asks for it here.

    `BASE` is first; the extra of edgehp's own developers is left out.
    """
    # Not above: its own absence is one of the things that are said here.
    from packaging.requirements import Requirement

    lines = [Requirement(line) for line in metadata.requires("edgehp") or ()]
    rows: dict[str, list[tuple[str, str]]] = {}
    for extra in (BASE, *(metadata.metadata("edgehp").get_all("Provides-Extra") or ())):
        for row in lines if extra != "dev" else ():
            inside = row.marker is None or row.marker.evaluate({"extra": extra})
            if inside and (extra == BASE) == ("extra" not in str(row.marker)):
                rows.setdefault(row.name, []).append((str(row.specifier), extra))
    return rows


def _module_of(distribution: str) -> str | None:
    return _MODULES.get(distribution, distribution.replace("-", "_"))


def how_to_install(module: str) -> str:
    """What to do to have `module` (``"cv2"``, ``"onnx.helper"``), as a clause for people."""
    missing = module.partition(".")[0]
    # The reader of requirements may be what is missing.
    for name, asked in requirements().items() if missing != "packaging" else ():
        of_it = _module_of(name)
        if of_it and (module == of_it or module.startswith(f"{of_it}.")):
            extra = asked[0][1]
            return f"install it with: {install_extra(extra) if extra else f'pip install {name}'}"
    return f"install it with: pip install {missing}"


# Not from the current directory, and not a directory that merely has the name (stubs leave such a
# namespace behind): neither is the package. Packages of the system may lack metadata (JetPack's).
IMPORT_CODE = """
import sys
from importlib.util import find_spec
sys.path[:] = [entry for entry in sys.path if entry]
try:
    if find_spec("{module}") is None:
        raise ModuleNotFoundError
except ModuleNotFoundError:
    sys.exit({missing})
import {module} as module
if getattr(module, "__file__", None) is None:
    raise ImportError("{module} is an empty namespace, not a package")
print(getattr(module, "__version__", "unknown"))
"""
# Exit status of `IMPORT_CODE` where there is no such module.
MISSING = 77
_ENGINE_CODE = """
from edgehp.engines import engine_available
print(engine_available("{kind}") or "")
"""


@dataclass(frozen=True)
class PackageState:
    """What was found of a package.

    Attributes:
        name: of the distribution.
        version: installed version, or None if the package is not installed.
        problem: why it cannot be used although it is installed, or None.
        extras: of edgehp that bring it; `BASE` of every installation.
        commands: commands that need it.
        install: what to do to have it, or None where it works.
    """

    name: str
    version: str | None
    problem: str | None
    extras: tuple[str, ...]
    commands: tuple[str, ...]
    install: str | None

    @property
    def works(self) -> bool:
        """Whether it is installed and can be imported."""
        return self.version is not None and self.problem is None


@dataclass(frozen=True)
class EngineState:
    """An engine, and why it cannot be opened here, None where it can."""

    kind: str
    problem: str | None


def _state(name: str, asked: list[tuple[str, str]], probe: Probe) -> PackageState:
    """The state of a package that extras ask for, each with the versions that it takes."""
    from packaging.specifiers import SpecifierSet

    module, version, problem = _module_of(name), None, None
    with suppress(metadata.PackageNotFoundError):
        version = metadata.version(name)
    if module is not None:
        found = probe.python_code(IMPORT_CODE.format(module=module, missing=MISSING))
        if found.problem is None:
            version = version or found.stdout.strip() or "unknown"
        elif version is not None or found.code != MISSING:
            problem = "its module is missing" if found.code == MISSING else found.problem
            version = version or "unknown"
    # Which of cuda12 and cuda13 fits is the driver's matter: see the engines.
    fits = version is None or not version[0].isdigit()
    if not fits and problem is None:
        fits = any(SpecifierSet(v).contains(str(version), prereleases=True) for v, _ in asked)
        problem = None if fits else f"found {version}, expected {' or '.join(v for v, _ in asked)}"
    versions, extra = asked[0]
    install = install_extra(extra) if extra else f"pip install '{name}{versions}'"
    extras = tuple(extra for _, extra in asked)
    works = version is not None and problem is None
    commands = commands_of(name, extras)
    return PackageState(name, version, problem, extras, commands, None if works else install)


def commands_of(name: str, extras: Collection[str]) -> tuple[str, ...]:
    """Commands that cannot do without the distribution `name`, which these extras bring."""
    return tuple(
        command
        for command, needs in NEEDS.items()
        if BASE in extras or (needs.extra in extras and (not needs.only or name in needs.only))
        if name not in _DISPENSABLE
    )


def find_packages(probe: Probe) -> tuple[PackageState, ...]:
    """The state of every package of every extra; each is imported in a process of its own."""
    rows = requirements()
    with ThreadPoolExecutor(max_workers=2) as pool:
        return tuple(pool.map(lambda name: _state(name, rows[name], probe), rows))


def find_engines(probe: Probe) -> tuple[EngineState, ...]:
    """What `edgehp.engines.engine_available` says of each engine, in a process of its own."""

    def state(kind: str) -> EngineState:
        found = probe.python_code(_ENGINE_CODE.format(kind=kind))
        return EngineState(kind, found.problem or found.stdout.strip() or None)

    with ThreadPoolExecutor(max_workers=2) as pool:
        return tuple(pool.map(state, ENGINE_KINDS))


SCHEMA_VERSION = 2
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
    engines: tuple[EngineState, ...]
    commands: tuple[CommandState, ...]

    @property
    def ok(self) -> bool:
        """Whether the dependencies of every installation work."""
        return all(state.works for state in self.packages if BASE in state.extras)

    def to_dict(self) -> dict[str, Any]:
        """A dictionary for JSON."""
        return {"schema_version": SCHEMA_VERSION, "ok": self.ok, **asdict(self)}


def command_state(name: str, packages: Iterable[PackageState], engine: bool) -> CommandState:
    """What the packages and whether an `engine` works mean for the command `name`."""
    needs = NEEDS[name]
    broken = [p for p in packages if name in p.commands and not p.works]
    # What an extra lacks is installed at once; what is broken or of every installation, by itself.
    lacking = [p.name for p in broken if p.version is None and BASE not in p.extras]
    remedies = [
        f"{p.name}: {p.problem or 'not installed'}; {p.install}"
        for p in broken
        if p.name not in lacking
    ]
    if lacking:
        remedies.append(f"{', '.join(lacking)}: not installed; {install_extra(needs.extra)}")
    if needs.engine and not engine:
        remedies.append(f"no engine: {install_extra('cpu')} brings OpenVINO and onnxruntime")
    return CommandState(name, not remedies, tuple(remedies))


def diagnose(probe: Probe | None = None) -> Diagnosis:
    """Look at this machine; takes some seconds, because every package is imported apart.

    Args:
        probe: where to look; this machine by default.
    """
    probe = probe or Probe()
    packages = find_packages(probe)
    engines = find_engines(probe)
    works = any(state.problem is None for state in engines)
    return Diagnosis(
        edgehp=__version__,
        python=f"{platform.python_version()} ({sys.executable})",
        platform=platform.platform(),
        cpu=find_cpu(probe),
        disk=find_disk(probe.disk),
        nvidia=find_nvidia(probe),
        jetson=find_jetson_state(probe),
        packages=packages,
        engines=engines,
        commands=tuple(command_state(name, packages, works) for name in NEEDS),
    )
