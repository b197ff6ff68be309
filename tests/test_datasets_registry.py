"""Data sets by name: roots, typing errors, options."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from edgehp.datasets import open_dataset
from edgehp.errors import DataError, UsageError
from tests.dataset_trees import write


@pytest.mark.parametrize(("typed", "meant"), [("alfw2000", "aflw2000"), ("BIWI", "biwi")])
def test_near_name_is_suggested(typed: str, meant: str) -> None:
    with pytest.raises(UsageError, match=f"did you mean {meant}"):
        open_dataset(typed, None)


def test_root_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"biwi: say where .* --data-root; .*frame_00003_rgb\.png"):
        open_dataset("biwi", None)
    with pytest.raises(DataError, match=r"not found at .*AFLW200; expected there: imageNNNNN"):
        open_dataset("aflw2000", tmp_path / "AFLW200")
    (tmp_path / "AFLW2000").mkdir()
    with pytest.raises(DataError, match="AFLW2000 is there"):
        open_dataset("aflw2000", tmp_path / "AFLW200")


def test_options_reach_the_reader_that_knows_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no 300W-LP photos"):
        open_dataset("300w-lp", tmp_path, boxes="landmarks", skip_bad=True)
    write(tmp_path / "a.jpg")
    assert len(open_dataset("faces", tmp_path, boxes=None, split=None)) == 1
    with pytest.raises(UsageError, match="faces has no option 'split'; it has: none"):
        open_dataset("faces", tmp_path, split="test")


def test_the_device_can_read_data_without_the_extras(repo: Path) -> None:
    """Importing the readers pulls in neither scipy nor torch nor onnx nor plotting."""
    code = (
        "import sys, edgehp.datasets; "
        "print([m for m in ('torch', 'onnx', 'scipy', 'matplotlib') if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=repo, capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "[]"
