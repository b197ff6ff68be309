"""The CUDA adapter and the engine on it against the driver double, with real CUDA packages."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from edgehp.engines.gpu_crop import kernel_path
from tests.boards import JETSONS
from tests.driver.double import built_pycuda, environment, installed

REPO = Path(__file__).resolve().parents[2]


def run(*arguments: str, version: int, devices: str, packages: Path, cache: Path) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=REPO,
        timeout=100,
        env=environment(version, devices)
        | {"PYTHONPATH": str(packages), "XDG_CACHE_HOME": str(cache)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# cuda-bindings 13 with a driver of CUDA 12 is refused: see below.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("requirement", "version"),
    [
        ("cuda-bindings>=12.9,<13", 12020),
        ("cuda-bindings>=12.9,<13", 12060),
        ("cuda-bindings>=12.9,<13", 13000),
        ("cuda-bindings>=13,<14", 13000),
    ],
)
@pytest.mark.parametrize("device", ["L4;8;9;0", "Orin;8;7;1"])
def test_whole_adapter_with_real_bindings(
    requirement: str, version: int, device: str, tmp_path: Path
) -> None:
    packages = installed(requirement)
    module = "tests.driver.adapter_checks"
    said = run("-m", module, version=version, devices=device, packages=packages, cache=tmp_path)
    assert "ok: batches, times, graphs, streams, frames, threads, waiting, closing" in said
    assert f"integrated {device.endswith('1')}" in said


@pytest.mark.slow
@pytest.mark.parametrize("version", [12020, 12060, 13000])
@pytest.mark.parametrize("device", ["L4;8;9;0", "Orin;8;7;1"])
def test_whole_adapter_with_real_pycuda(version: int, device: str, tmp_path: Path) -> None:
    """pycuda, built from its source against the double, where cuda-bindings is not installed."""
    code = (
        "import importlib.util, sys\n"
        "real = importlib.util.find_spec\n"
        "def without(name, package=None):\n"
        "    return None if name == 'cuda.bindings' else real(name, package)\n"
        "importlib.util.find_spec = without\n"
        "from tests.driver.adapter_checks import main\n"
        "main('pycuda', nvrtc=False)\n"
    )
    found = {"version": version, "devices": device, "packages": built_pycuda(), "cache": tmp_path}
    said = run("-c", code, **found)
    assert "ok: batches, times, graphs, streams, frames, threads, waiting, closing" in said
    assert f"pycuda, integrated {device.endswith('1')}" in said


@pytest.mark.slow
def test_doctor_tests_a_gpu(tmp_path: Path) -> None:
    packages = installed("cuda-bindings>=12.9,<13")
    found = {"version": 12060, "devices": "Tesla V100;7;0;0", "packages": packages}
    with_kernel(tmp_path, "7.0")
    said = run("-m", "edgehp", "doctor", "--test", **found, cache=tmp_path)
    for name in ("NVIDIA driver", "CUDA package", "copies", "CUDA graph", "crop kernel"):
        assert f"ok: {name}:" in said, said


def with_kernel(cache: Path, capability: str) -> None:
    """Keep a crop kernel: the double runs the C itself, whatever the image is."""
    kept = cache / "edgehp" / "kernels" / kernel_path(capability).name
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"double")


@pytest.mark.slow
def test_a_jetson_says_what_its_page_says(tmp_path: Path) -> None:
    """`docs/jetson.md`, line by line but for the numbers."""
    board = "Nano super kit, 6.2"
    root = JETSONS[board].write(tmp_path / "root")
    with_kernel(tmp_path, "8.7")
    packages = installed("cuda-bindings>=12.9,<13")
    found = {"version": 12060, "devices": "Orin;8;7;1", "packages": packages, "cache": tmp_path}
    said = run("-m", "tests.driver.jetson", str(root), board, "doctor", "--test", **found)
    page = (REPO / "docs/jetson.md").read_text(encoding="utf-8")
    shown = re.findall(r"^(?:ok|not tested): .*$", page, re.MULTILINE)
    assert len(shown) > 12
    for line in shown:
        # Any number for a number, anything for three dots.
        pattern = re.sub(r"\d[\d.]*", r"\\d[\\d.]*", re.escape(line).replace(r"\.\.\.", ".*"))
        assert re.search(f"^{pattern}$", said, re.MULTILINE), f"{line!r} is not in\n{said}"


def test_package_that_needs_a_newer_driver_is_refused_with_the_right_one() -> None:
    pytest.importorskip("cuda.bindings")
    code = "from edgehp.engines import engine_available; print(engine_available('tensorrt'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=REPO,
        env=environment(12060, "Orin;8;7;1"),
    )
    assert "needs a driver of CUDA 13, the driver here is of CUDA 12.6" in done.stdout
    assert "[cuda12]" in done.stdout
