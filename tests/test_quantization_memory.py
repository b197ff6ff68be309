"""The memory of a calibration does not grow with the number of crops."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys
import numpy as np
from edgehp.benchmark.host import peak_memory_mib
from edgehp.quantization.calibrate import calibrate
from tests.quantization_graphs import SIZE, small_network

def crops(count):
    rng = np.random.default_rng(0)
    for _ in range(count):
        yield rng.integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)

table = calibrate(small_network(), crops(int(sys.argv[1])), threads=1)
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
