"""The doctor: real crashes and hangs, fake trees, and what it tells each command."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import pytest

from edgehp.cli.main import COMMANDS, main
from edgehp.doctor.report import (
    BASE,
    IMPORT_CODE,
    MISSING,
    NEEDS,
    PackageState,
    command_state,
    commands_of,
    diagnose,
    find_engines,
    find_packages,
    how_to_install,
    requirements,
)
from edgehp.doctor.system import Probe, find_cpu, find_jetson_state, find_nvidia
from edgehp.driver import RunResult, run
from tests.boards import JETSONS


def answering(result: RunResult) -> Probe:
    def runner(command: Sequence[str], timeout: float) -> RunResult:
        return result

    return Probe(runner=runner)


def states(**problems: str | None) -> list[PackageState]:
    """Every package works, but for those given: a problem, or None for not installed."""
    return [
        PackageState(
            name,
            None if name in problems and problems[name] is None else "1.0",
            problems.get(name),
            extras := tuple(extra for _, extra in asked),
            commands_of(name, extras),
            how_to_install(name) if name in problems else None,
        )
        for name, asked in sorted(requirements().items())
    ]


def test_what_does_not_end_start_or_survive_is_reported() -> None:
    found = run([sys.executable, "-c", "import time; time.sleep(60)"], timeout=0.5)
    assert found.code is None and "0.5 s" in str(found.problem)
    found = Probe().python_code("import ctypes; ctypes.string_at(0)")
    assert found.problem == "crashed with SIGSEGV"
    assert run(["/nonexistent/program"]).problem is not None


def test_driver_with_a_gpu(tmp_path: Path) -> None:
    version = tmp_path / "proc/driver/nvidia/version"
    version.parent.mkdir(parents=True)
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct\n")
    answer = json.dumps({"version": 12020, "gpus": [["Tesla V100", 7, 0]]})
    probe = answering(RunResult(0, answer, "", None))
    nvidia = find_nvidia(Probe(root=tmp_path, runner=probe.runner))
    assert (nvidia.driver, nvidia.cuda, nvidia.problem) == ("535.129.03", "12.2", None)
    assert nvidia.gpus[0].compute_capability == "7.0"
    for answer in ("", "{}", '{"version": 13000, "gpus": [1]}'):
        nvidia = find_nvidia(answering(RunResult(0, answer, "", None)))
        assert "gave no answer" in str(nvidia.problem) and not nvidia.gpus


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
        ("# R35 (release), REVISION: 4.1, GCID: 1, BOARD: t186ref", "5.1.x", "Python 3.8"),
        ("# R99 (release), REVISION: 1.0, GCID: 1", None, "99.1.0"),
        ("nothing", None, "unknown"),
    ],
)
def test_a_jetpack_that_is_old_or_unknown_is_said(
    tmp_path: Path, release: str, jetpack: str | None, complaint: str
) -> None:
    root = JETSONS["NX kit, 6.0"].write(tmp_path)
    (root / "etc/nv_tegra_release").write_text(f"{release}\n")
    found = find_jetson_state(Probe(root=root))
    assert found is not None and found.problem is not None and complaint in found.problem
    assert (found.target, found.jetpack, found.power_mode) == ("orin-nx-16gb", jetpack, None)


def test_namespace_left_by_stubs_is_no_package(tmp_path: Path) -> None:
    (tmp_path / "hollow").mkdir()
    code = f"import sys; sys.path.append({str(tmp_path)!r})\n"
    found = Probe().python_code(code + IMPORT_CODE.format(module="hollow", missing=MISSING))
    assert found.problem is not None and "namespace" in found.problem


@pytest.mark.parametrize("module", ["no_such_module", "no_such_parent.module"])
def test_a_module_that_is_not_there_is_told_from_one_that_fails(module: str) -> None:
    assert Probe().python_code(IMPORT_CODE.format(module=module, missing=MISSING)).code == MISSING


def test_command_without_its_packages_says_what_to_install() -> None:
    state = command_state("train", states(torch=None, tensorboard=None), engine=False)
    assert not state.ok
    (remedy,) = state.remedies
    assert remedy.startswith("tensorboard, torch: not installed; ") and "[train]'" in remedy
    assert command_state("train", states(), engine=False).ok


def test_package_that_crashes_stops_its_command_and_no_other() -> None:
    crashed = states(onnxruntime="crashed with SIGILL")
    assert any("SIGILL" in r for r in command_state("label", crashed, engine=True).remedies)
    # It uses nothing else of its extra; progress is drawn by rich where that is installed.
    assert command_state("label", states(torch=None), engine=False).ok
    assert command_state("train", states(rich=None), engine=False).ok
    assert command_state("bench", states(), engine=True).ok
    assert not command_state("bench", states(), engine=False).ok


def test_needs_are_extras_of_the_package_and_every_command_has_its_own() -> None:
    assert set(NEEDS) == set(COMMANDS)
    brought = {(extra, name) for name, asked in requirements().items() for _, extra in asked}
    for needs in NEEDS.values():
        assert needs.extra in {extra for extra, _ in brought}, needs
        assert {(needs.extra, name) for name in needs.only} <= brought


def test_what_is_needed_is_read_from_the_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        "click>=999",
        "tomli>=2; python_version < '3.11'",
        "new-thing>=1; extra == 'build'",
        "elsewhere>=1; sys_platform == 'plan9' and extra == 'build'",
    ]
    monkeypatch.setattr(metadata, "requires", lambda name: lines)
    found = {state.name: state for state in find_packages(Probe())}
    assert set(found) - {"tomli"} == {"click", "new-thing"}
    assert "expected >=999" in str(found["click"].problem)
    assert found["click"].install == "pip install 'click>=999'"
    assert (found["new-thing"].version, found["new-thing"].commands) == (None, ("build",))
    assert "[build]'" in str(found["new-thing"].install)
    assert "[build]'" in how_to_install("new_thing.part")


def test_the_reader_of_requirements_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "packaging.requirements", None)
    assert how_to_install("packaging.version") == "install it with: pip install packaging"


def test_a_package_of_the_system_needs_no_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    """JetPack's OpenCV is no wheel."""
    monkeypatch.setattr(metadata, "requires", lambda name: ["opencv-python-headless>=4.8"])

    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    (found,) = find_packages(Probe())
    assert found.works and found.version is not None and found.version[0].isdigit()


def test_engines_are_judged_where_they_are_opened() -> None:
    crashed = find_engines(answering(RunResult(-11, "", "", "crashed with SIGSEGV")))
    assert {state.problem for state in crashed} == {"crashed with SIGSEGV"}
    said = "no CUDA package for Python is installed\nhint: pip install '.[cuda12]'"
    found = find_engines(answering(RunResult(0, said + "\n", "", None)))
    assert {state.problem for state in found} == {said}
    assert find_engines(answering(RunResult(0, "\n", "", None)))[0].problem is None


def test_broken_base_is_not_ok(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    only_base = {name: asked for name, asked in requirements().items() if asked[0][1] == BASE}
    monkeypatch.setattr("edgehp.doctor.report.requirements", lambda: only_base)

    def runner(command: Sequence[str], timeout: float) -> RunResult:
        broken = "cv2" in command[-1]
        return (
            RunResult(-4, "", "", "crashed with SIGILL") if broken else RunResult(0, "", "", None)
        )

    found = diagnose(Probe(root=tmp_path, runner=runner, disk=tmp_path))
    assert not found.ok
    targets = next(state for state in found.commands if state.name == "targets")
    assert "SIGILL" in targets.remedies[0]


def test_command_gives_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # One package and no engine: each is imported in a process of its own.
    monkeypatch.setattr("edgehp.doctor.report.requirements", lambda: {"click": [(">=8", BASE)]})
    monkeypatch.setattr("edgehp.doctor.report.ENGINE_KINDS", ("onnxruntime",))
    with pytest.raises(SystemExit) as leaving:
        main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (leaving.value.code or 0, found["schema_version"], found["ok"]) == (0, 2, True)
    assert {row["name"] for row in found["commands"]} == set(NEEDS)
    assert [engine["kind"] for engine in found["engines"]] == ["onnxruntime"]


def test_a_bare_machine_is_tested_as_far_as_it_goes() -> None:
    """With numpy, OpenCV, click and msgspec alone; the rest is named, not tripped over."""
    code = (
        "import sys\n"
        "for name in ('onnx', 'onnxruntime', 'openvino', 'packaging', 'pynvml', 'rich', 'scipy',\n"
        "             'tensorrt_rtx', 'torch', 'tuf'):\n"
        "    sys.modules[name] = None\n"
        "from edgehp.cli.main import main\n"
        "main(['doctor', '--test'])\n"
    )
    done = run([sys.executable, "-c", code], 100.0)
    assert done.code == 0, done.stdout + done.stderr
    assert "not tested: INT8 engine, openvino" in done.stdout
    assert "ok: free memory" in done.stdout
