"""Mutated photos, films, lists, ONNX files and descriptions: no traceback, no hang, no flood."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("scipy.io")

from tests.mutations import KINDS, MEMORY


@pytest.mark.parametrize("count", [120, pytest.param(1000, marks=pytest.mark.slow)])
def test_mutants_are_read_or_refused_with_a_sentence(repo: Path, seed: int, count: int) -> None:
    arguments = [sys.executable, "-m", "tests.mutations", str(seed), "0", str(count)]
    done = subprocess.run(arguments, cwd=repo, capture_output=True, timeout=1200)
    # Not as text: decoders write what they found there.
    assert done.returncode == 0, f"seed {seed}: {done.stderr[-6000:]!r}"
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["bytes"] < MEMORY, found
    # Neither are all of them harmless, nor is everything refused.
    assert min(found["refused"], found["read"]) > count / 20, found
    assert count >= 5 * len(KINDS)
