"""The memory of a calibration, and of fitting weights, does not grow with the number of crops."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys
from functools import partial
import numpy as np
from edgehp.benchmark.host import peak_memory_mib
from edgehp.quantization.calibrate import calibrate
from edgehp.quantization.qdq import Recipe
from edgehp.quantization.quantise import emit
from edgehp.quantization.reconstruct import reconstruct
from tests.quantization_graphs import SIZE, small_network

class Crops:
    def __init__(self, count):
        self.count = count

    def __iter__(self):
        rng = np.random.default_rng(0)
        for _ in range(self.count):
            yield rng.integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)

crops = Crops(int(sys.argv[1]))
table = calibrate(small_network(), crops, threads=1)
emitter = partial(emit, small_network(), table, flavour="cpu")
reconstruct(small_network(), emitter, Recipe(), crops, threads=1)
assert table.crop_count == int(sys.argv[1])
print(peak_memory_mib())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_peak_memory_is_flat(repo: object) -> None:
    peaks = [
        float(
            subprocess.run(
                [sys.executable, "-c", PROGRAM, str(count)],
                cwd=str(repo),
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        )
        for count in (16, 2048)
    ]
    assert peaks[1] < 1.1 * peaks[0]
    assert peaks[1] < 700
