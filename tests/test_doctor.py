"""The doctor: real crashes and hangs, fake trees, and what it tells each command."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from edgehp.cli.main import COMMANDS
from edgehp.doctor import Probe, RunResult, diagnose, how_to_install
from edgehp.doctor import report as packages_module
from edgehp.doctor.report import IMPORT_CODE, NEEDS, PACKAGES, PackageState, command_state
from edgehp.doctor.system import find_cpu, find_jetson_state, find_nvidia, run


def answering(result: RunResult) -> Probe:
    def runner(command: Sequence[str], timeout: float) -> RunResult:
        return result

    return Probe(runner=runner, which=lambda name: f"/bin/{name}")


def states(**problems: str | None) -> dict[str, PackageState]:
    """Every package works, but for those given: a problem, or None for not installed."""
    return {
        p.module: PackageState(
            p.module,
            None if p.module in problems and problems[p.module] is None else "1.0",
            problems.get(p.module),
            (),
            how_to_install(p.module) if p.module in problems else None,
        )
        for p in PACKAGES
    }


def test_native_crash_is_reported_not_suffered() -> None:
    found = Probe().python_code("import ctypes; ctypes.string_at(0)")
    assert found.problem == "crashed with SIGSEGV"


def test_hang_is_ended() -> None:
    found = run([sys.executable, "-c", "import time; time.sleep(60)"], timeout=0.5)
    assert found.code is None
    assert found.problem is not None and "0.5 s" in found.problem


def test_missing_program_is_reported() -> None:
    assert run(["/nonexistent/program"]).problem is not None


def test_driver_crash_becomes_a_line() -> None:
    nvidia = find_nvidia(answering(RunResult(-11, "", "", "crashed with SIGSEGV")))
    assert nvidia.problem == "the CUDA driver probe crashed with SIGSEGV"


@pytest.mark.parametrize("answer", ["", "[]", "{}", "not json", '{"version": 13000, "gpus": [1]}'])
def test_unreadable_driver_answer(answer: str) -> None:
    nvidia = find_nvidia(answering(RunResult(0, answer, "", None)))
    assert nvidia.problem is not None and not nvidia.gpus


def test_driver_with_a_gpu(tmp_path: Path) -> None:
    version = tmp_path / "proc/driver/nvidia/version"
    version.parent.mkdir(parents=True)
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct\n")
    answer = json.dumps({"version": 12020, "gpus": [["Tesla V100", 7, 0]]})
    probe = answering(RunResult(0, answer, "", None))
    nvidia = find_nvidia(Probe(root=tmp_path, runner=probe.runner))
    assert (nvidia.driver, nvidia.cuda, nvidia.problem) == ("535.129.03", "12.2", None)
    assert nvidia.gpus[0].compute_capability == "7.0"


def test_cpu_features_from_a_tree(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(
        "processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx2 avx512_vnni\n"
        "processor\t: 1\nmodel name\t: Some CPU\nflags\t\t: fpu avx2 avx512_vnni\n"
    )
    cpu = find_cpu(Probe(root=tmp_path))
    assert (cpu.name, cpu.cores) == ("Some CPU", 2)
    assert cpu.int8_features == ("avx512_vnni", "avx2")
    assert cpu.memory_gib is None


@pytest.mark.parametrize(
    ("release", "jetpack", "complaint"),
    [
        ("# R36 (release), REVISION: 4.3, GCID: 1, BOARD: generic\n", "6.1 to 6.2.2", None),
        ("# R35 (release), REVISION: 4.1, GCID: 1, BOARD: t186ref\n", "5.1.x", "Python 3.8"),
        ("# R99 (release), REVISION: 1.0, GCID: 1\n", None, "99.1.0"),
        (None, None, "unknown"),
    ],
)
def test_jetson_from_a_tree(
    tmp_path: Path, release: str | None, jetpack: str | None, complaint: str | None
) -> None:
    tree = tmp_path / "proc/device-tree"
    tree.mkdir(parents=True)
    (tree / "compatible").write_bytes(b"nvidia,p3768-0000+p3767-0000\0nvidia,tegra234\0")
    (tree / "model").write_bytes(b"NVIDIA Jetson Orin NX\0")
    if release:
        (tmp_path / "etc").mkdir()
        (tmp_path / "etc/nv_tegra_release").write_text(release)
    fake = answering(RunResult(0, "NV Power Mode: MODE_15W\n2\n", "", None))
    found = find_jetson_state(Probe(root=tmp_path, runner=fake.runner, which=fake.which))
    assert found is not None
    assert (found.target, found.jetpack, found.power_mode) == ("orin-nx-16gb", jetpack, "15W")
    if complaint is None:
        assert found.problem is None
    else:
        assert found.problem is not None and complaint in found.problem


def test_no_jetson_here(tmp_path: Path) -> None:
    assert find_jetson_state(Probe(root=tmp_path)) is None


def test_namespace_left_by_stubs_is_no_package(tmp_path: Path) -> None:
    (tmp_path / "hollow").mkdir()
    code = f"import sys; sys.path.append({str(tmp_path)!r})\n" + IMPORT_CODE.format(module="hollow")
    found = Probe().python_code(code)
    assert found.problem is not None and "namespace" in found.problem


def test_command_without_its_package_says_what_to_install() -> None:
    state = command_state("train", states(torch=None), gpu=False)
    assert not state.ok
    assert any("[train]'" in remedy for remedy in state.remedies)
    assert command_state("train", states(), gpu=False).ok


def test_package_that_crashes_stops_its_command() -> None:
    state = command_state("label", states(onnxruntime="crashed with SIGILL"), gpu=False)
    assert any("SIGILL" in remedy for remedy in state.remedies)


def test_gpu_engine_needs_a_gpu() -> None:
    only_gpu = states(openvino=None, onnxruntime=None)
    assert command_state("bench", only_gpu, gpu=True).ok
    assert not command_state("bench", only_gpu, gpu=False).ok


def test_every_needed_package_is_known() -> None:
    known = {package.module for package in PACKAGES}
    assert {module for modules, _ in NEEDS.values() for module in modules} <= known


def test_every_command_has_its_line() -> None:
    assert set(NEEDS) == set(COMMANDS)


def test_broken_base_is_not_ok(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    few = tuple(p for p in PACKAGES if p.module in ("click", "numpy", "cv2"))
    monkeypatch.setattr(packages_module, "PACKAGES", few)
    monkeypatch.setattr("edgehp.doctor.report.NEEDS", {"targets": ((), False)})

    def runner(command: Sequence[str], timeout: float) -> RunResult:
        broken = "cv2" in command[-1]
        return (
            RunResult(-4, "", "", "crashed with SIGILL") if broken else RunResult(0, "", "", None)
        )

    found = diagnose(Probe(root=tmp_path, runner=runner, disk=tmp_path))
    assert not found.ok
    assert "SIGILL" in found.commands[0].remedies[0]


def test_command_gives_json() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "edgehp", "doctor", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    found = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    assert found["schema_version"] == 1
    assert {row["name"] for row in found["commands"]} == set(NEEDS)


def test_a_bare_machine_is_tested_as_far_as_it_goes() -> None:
    """With numpy, OpenCV, click and msgspec alone; the rest is named, not tripped over."""
    code = (
        "import sys\n"
        "for name in ('onnx', 'onnxruntime', 'openvino', 'packaging', 'pynvml', 'rich', 'scipy',\n"
        "             'tensorrt_rtx', 'tomli', 'torch', 'tuf'):\n"
        "    sys.modules[name] = None\n"
        "from edgehp.cli.main import main\n"
        "main(['doctor', '--test'])\n"
    )
    done = run([sys.executable, "-c", code], 100.0)
    assert done.code == 0, done.stdout + done.stderr
    assert "not tested: INT8 engine, openvino" in done.stdout
    assert "ok: free memory" in done.stdout
