"""The commands of the field update guide, run as they stand on the page."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

from tests import ship_parts as parts

BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_the_guide_runs_as_written(repo: Path, tmp_path: Path) -> None:
    page = (repo / "docs" / "field-updates.md").read_text(encoding="utf-8")
    blocks = BLOCK.findall(page)
    assert len(blocks) >= 7
    parts.tiny_artifact(tmp_path / "artifact")
    binaries = tmp_path / "bin"
    binaries.mkdir()
    program = binaries / "edgehp"
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
    outputs = []
    for block in blocks:
        done = subprocess.run(
            ["sh", "-eu", "-c", block],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
        outputs.append(done.stdout)
    said = "".join(outputs)
    # Installed once; then nothing is newer, also after every key was rotated.
    assert said.count("(current): artifact") == 2
    assert said.count("no update: nothing newer than serial 1") == 2
    assert not (tmp_path / "keys" / "root.pem").exists()
    # Every command that the page shows for a publisher was among them.
    for command in ("init", "add", "publish", "rotate-key"):
        assert f"edgehp repo {command}" in "".join(blocks)
