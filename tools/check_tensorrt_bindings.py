"""Check the TensorRT adapter against the real Python bindings of several versions, without a GPU.

The bindings install without TensorRT's libraries; empty libraries with the missing names let them
be imported, and the adapter runs against stand-ins that allow only what those bindings declare.
Then mypy checks the adapter against the types of `tensorrt-stubs`.

    python tools/check_tensorrt_bindings.py [--cache DIRECTORY] [VERSION ...]

Exit code 0: all versions pass; 1: one does not; 5: bindings or compiler are missing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
PROBE = REPO / "tests" / "tensorrt_bindings" / "probe.py"
# The versions of JetPack 6.0, 6.1 to 6.2, the last for Volta, 7.0, 7.2 and the newest
# line -> the package with them.
PACKAGES = {
    "8.6.1": "tensorrt_bindings",
    "10.3.0": "tensorrt-cu12-bindings",
    "10.4.0": "tensorrt-cu12-bindings",
    "10.13.3.9": "tensorrt-cu12-bindings",
    "10.16.1.11": "tensorrt-cu12-bindings",
    "11.4.0.106": "tensorrt-cu12-bindings",
}


STUBS = "tensorrt-stubs==10.13.0.35.1"
ENGINES = REPO / "edgehp" / "engines"
MYPY = """[mypy]
strict = True
ignore_missing_imports = True
[mypy-tensorrt_bindings.*,tensorrt.*]
ignore_errors = True
"""


class Unavailable(Exception):  # noqa: N818 - a state of this machine, not a mistake
    """The check cannot be made here."""


def default_cache() -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    given = os.environ.get("EDGEHP_TENSORRT_BINDINGS")
    return Path(given) if given else root / "edgehp" / "tensorrt-bindings"


def check(version: str, cache: Path) -> dict[str, Any]:
    """What the adapter did with this version, or a RuntimeError with the reason it failed."""
    directory = _bindings(version, cache)
    libraries = _stub_libraries(directory)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(libraries), "PYTHONDONTWRITEBYTECODE": "1"}
    done = _run([sys.executable, str(PROBE), str(directory)], env=environment)
    if done.returncode:
        raise RuntimeError(f"TensorRT {version}: {done.stderr.strip()[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def check_types(cache: Path, sources: tuple[Path, ...] = (ENGINES,)) -> str:
    """What mypy says about the adapter with the types of `tensorrt-stubs`; empty if nothing."""
    if importlib.util.find_spec("mypy") is None:
        raise Unavailable("mypy is not installed")
    directory = _unpacked(STUBS, cache / "stubs-10.13")
    config = directory / "mypy.ini"
    config.write_text(MYPY, encoding="utf-8")
    environment = {**os.environ, "MYPYPATH": f"{directory}{os.pathsep}{REPO}"}
    command = [sys.executable, "-m", "mypy", "--config-file", str(config)]
    command += ["--cache-dir", str(directory / "cache"), *map(str, sources)]
    done = _run(command, env=environment, cwd=directory)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"mypy failed: {(done.stdout + done.stderr)[-2000:]}")
    return done.stdout.strip() if done.returncode else ""


def _bindings(version: str, cache: Path) -> Path:
    tag = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    return _unpacked(f"{PACKAGES[version]}=={version}", cache / f"{version}-{tag}")


def _unpacked(package: str, directory: Path) -> Path:
    """The wheel of a package for this Python, downloaded once and unpacked into a directory."""
    if (directory / "complete").is_file():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(directory)]
    done = _run([*command, "--only-binary", ":all:", package])
    wheels = sorted(directory.glob("*.whl"))
    if done.returncode or not wheels:
        raise Unavailable(f"{package} could not be downloaded: {done.stderr[-300:]}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extractall(directory)
    # The published stubs were generated and never parsed: this makes them valid Python.
    for path in directory.glob("tensorrt_bindings/tensorrt.pyi"):
        text = re.sub(r"\bin: ", "in_: ", path.read_text(encoding="utf-8"))
        text = text.replace("power: Weights = None, channel_axis: int)", "power: Weights = None)")
        path.write_text(text, encoding="utf-8")
    (directory / "complete").touch()
    return directory


def _stub_libraries(directory: Path) -> Path:
    """Libraries that define the functions the bindings need, doing nothing."""
    stubs = directory / "stubs"
    binary = directory / "tensorrt_bindings" / "tensorrt.so"
    symbols = _tool(["nm", "-D", "--undefined-only", str(binary)]).splitlines()
    # Symbols with a version come from libc and libstdc++, Py* from the interpreter; old wheels
    # have libc's without a version.
    names = [s.split()[-1] for s in symbols if "@" not in s and s.split()[-2] == "U"]
    own = [n for n in names if not re.match(r"_?Py|__|dl|pthread_", n)]
    needed = re.findall(r"\[(libnv[^\]]+)\]", _tool(["readelf", "-d", str(binary)]))
    stubs.mkdir(exist_ok=True)
    source = stubs / "stubs.c"
    source.write_text("".join(f"void {n}(void) {{}}\n" for n in own), encoding="utf-8")
    for library in needed:
        options = ["-w", "-shared", "-fPIC", f"-Wl,-soname,{library}"]
        _tool(["gcc", *options, "-o", str(stubs / library), str(source)])
    return stubs


def _tool(command: list[str]) -> str:
    try:
        done = _run(command)
    except FileNotFoundError as e:
        raise Unavailable(f"{command[0]} is missing: install gcc and binutils") from e
    if done.returncode:
        raise Unavailable(f"{command[0]} failed: {done.stderr[-300:]}")
    return done.stdout


def _run(
    command: list[str], env: dict[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env=env, cwd=cwd
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="*", metavar="VERSION", default=list(PACKAGES))
    parser.add_argument("--cache", type=Path, default=default_cache(), help="where wheels are kept")
    arguments = parser.parse_args()
    code = 0
    for version in arguments.versions:
        if version not in PACKAGES:
            parser.error(f"unknown version {version}; known: {', '.join(PACKAGES)}")
        try:
            result = check(version, arguments.cache)
        except Unavailable as e:
            print(f"{version:12} not checked: {e}")
            code = max(code, 5)
        except RuntimeError as e:
            print(f"{version:12} FAILED\n{e}")
            return 1
        else:
            int8 = result["build"]["int8"]
            calls = {c for b in result["build"].values() for c in b["calls"]}
            calls |= set(result["run"]["calls"])
            print(
                f"{version:12} ok: {len(calls)} attributes and methods; network "
                f"{','.join(int8['network'])}; int8 flags {','.join(int8['set'])}"
            )
    try:
        complaints = check_types(arguments.cache)
    except Unavailable as e:
        print(f"types        not checked: {e}")
        return max(code, 5)
    print(f"types        {complaints or f'ok: {STUBS}'}")
    return 1 if complaints else code


if __name__ == "__main__":
    sys.exit(main())
