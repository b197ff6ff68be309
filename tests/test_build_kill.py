"""Killed at any step, a build leaves the old artifact whole and is tidied up by the next one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgehp.artifact import load_artifact
from edgehp.artifact.write import ArtifactWriter
from tests import build_parts
from tests.test_artifact import ROLES, Device, write

STEPS = ("target", "network", "graph", "crops", "precision", "engine", "accuracy", "artifact")

WRITER = """
import sys
from pathlib import Path
from tests.test_artifact import write
print("ready", flush=True)
while True:
    write(Path(sys.argv[1]))
"""


def _environment(repo: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(repo), "OMP_NUM_THREADS": "1"}


def test_writers_killed_at_random_moments(tmp_path: Path, repo: Path, seed: int) -> None:
    import random

    rng = random.Random(seed)
    target = tmp_path / "dist" / "artifact"
    seen = set()
    for _ in range(6):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(target)],
            stdout=subprocess.PIPE,
            env=_environment(repo),
        )
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
        time.sleep(rng.uniform(0.0, 0.2))
        writer.kill()
        writer.wait()
        writer.stdout.close()
        seen.add(target.exists())
        if target.exists():
            assert load_artifact(target, device=Device()).manifest.files
        # The next writer finds no lock, puts back what was being replaced and tidies up.
        had_old = (target.parent / f".{target.name}.old").exists() or target.exists()
        with ArtifactWriter(target):
            assert target.exists() == had_old
        left = [p.name for p in target.parent.iterdir()]
        assert left == ([target.name] if had_old else []), seed
    write(target)
    assert {f.path for f in load_artifact(target, device=Device()).manifest.files} == set(ROLES)


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_a_build_killed_after_each_step(tmp_path: Path, repo: Path, every: int) -> None:
    arguments = _build(tmp_path)
    dist, path = tmp_path / "dist", tmp_path / "dist" / "small-cpu-fp32"
    environment = _environment(repo)

    for step in STEPS[:-1][::every]:
        _killed(arguments, environment, step)
        assert not path.exists(), step
    subprocess.run(arguments, env=environment, check=True, capture_output=True)
    assert [p.name for p in dist.iterdir()] == [path.name]
    first = (path / "manifest.json").read_bytes()
    # The last one is where the old artifact is replaced.
    for step in ("artifact", "accuracy", "graph")[::every]:
        _killed(arguments, environment, step)
        now = (path / "manifest.json").read_bytes()
        assert load_artifact(path).manifest.state == "complete"
        if step == "artifact":
            first = now  # whichever is there after it: the old one or the new one, whole
        assert now == first, step
    with ArtifactWriter(path):
        pass
    assert [p.name for p in dist.iterdir()] == [path.name]


def _build(folder: Path) -> list[str]:
    """The command line of a build into `folder`/dist, and the files that it names."""
    network = build_parts.small_graph(folder / "small.onnx")
    faces = build_parts.faces(
        folder / "val.zip", 64, 2, labels=True, size=build_parts.SPEC.preprocessing.size
    )
    arguments = [sys.executable, "-m", "edgehp", "-v", "build", "--target", "cpu"]
    arguments += ["--precision", "fp32", "--network", str(network), "--validate-on", str(faces)]
    arguments += ["--output", str(folder / "dist"), "--max-drop", "90", "--threads", "1"]
    return arguments


def _at(arguments: list[str], environment: dict[str, str], step: str) -> subprocess.Popen[str]:
    """A build that has just reported `step` as done."""
    build = subprocess.Popen(
        arguments, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment
    )
    assert build.stderr is not None
    lines = []
    for line in build.stderr:
        lines.append(line)
        if f" {step}: " in line:
            break
    assert f" {step}: " in lines[-1], "".join(lines)
    return build


def _killed(arguments: list[str], environment: dict[str, str], step: str) -> None:
    """Run a build until it reports `step` as done, and kill it there and then."""
    build = _at(arguments, environment, step)
    build.kill()
    build.communicate()


def test_a_build_ended_by_sigterm_leaves_nothing(tmp_path: Path, repo: Path) -> None:
    arguments = _build(tmp_path)
    build = _at(arguments, _environment(repo), "graph")
    assert any((tmp_path / "dist").iterdir())
    build.terminate()
    _, rest = build.communicate(timeout=120)
    assert build.returncode == 130
    assert "edgehp: error: ended by SIGTERM; what was unfinished is removed\n" in rest
    assert list((tmp_path / "dist").iterdir()) == []
