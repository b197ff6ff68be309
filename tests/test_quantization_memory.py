"""The memory of a calibration, and of fitting weights, does not grow with the number of crops."""

from __future__ import annotations

import gc
import subprocess
import sys

import numpy as np
import onnx
import pytest

from edgehp.quantization.graph import drop_unread, with_constants
from edgehp.quantization.qdq import Emitter
from edgehp.quantization.table import calibrate
from tests.quantization_graphs import SIZE, small_network

PROGRAM = """
import sys
import numpy as np
from edgehp.benchmark.host import peak_memory_mib
from edgehp.quantization.qdq import Emitter
from edgehp.quantization.rounding import round_layers
from edgehp.quantization.table import calibrate
from tests.quantization_graphs import SIZE, small_network

class Crops:
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index >= self.count:
            raise IndexError(index)
        return np.random.default_rng(index).integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)

crops = Crops(int(sys.argv[1]))
table = calibrate(small_network(), crops, threads=1)
round_layers(Emitter(small_network(), "cpu"), table, "minmax", crops, threads=1)
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
        for count in (144, 2304)
    ]
    assert peaks[1] < 1.1 * peaks[0]
    assert peaks[1] < 700


def test_a_copy_with_the_same_constants_is_the_same() -> None:
    model = small_network()
    model.graph.doc_string = "a text"
    copy = with_constants(model, model.graph.initializer)
    assert copy == model
    assert not with_constants(model, ()).graph.initializer


def test_constants_that_nobody_reads_go() -> None:
    model = small_network()
    expected = small_network()
    for position in (0, 2, len(model.graph.initializer)):
        model.graph.initializer.insert(position, onnx.TensorProto(name=f"unread{position}"))
    drop_unread(model)
    assert model == expected


@pytest.mark.parametrize(("flavor", "body"), [("cpu", "fp32"), ("tensorrt", "fp16")])
def test_a_graph_that_was_emitted_goes_with_its_last_reference(flavor: str, body: str) -> None:
    """Without waiting for the garbage collector: a candidate is as large as the network."""
    model = small_network()
    crops = np.zeros((1, SIZE, SIZE, 3), np.uint8)
    table = calibrate(model, crops, threads=1)
    Emitter(model, flavor, body)(table, "minmax")  # what a first call keeps
    gc.collect()
    gc.disable()
    try:
        Emitter(model, flavor, body)(table, "minmax")
        assert gc.collect() == 0
    finally:
        gc.enable()
