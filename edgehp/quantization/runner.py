"""Run a float or Q/DQ graph on the processor with the arithmetic that its operators define.

Not a deployed engine (`edgehp.engines`): integer kernels of engines round in places of their own,
and on processors without VNNI they saturate. Here every machine gives the same numbers.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgehp._installed import import_package
from edgehp._memory import give_back
from edgehp.datasets.base import prefetch
from edgehp.errors import DataError
from edgehp.progress import track

if TYPE_CHECKING:
    import onnx

Crop = npt.NDArray[np.uint8]
_BATCH = 8
# Batches that are computed at once: each holds its activations.
_WORKERS = 4


def batches(crops: Iterable[Crop], size: int) -> Iterator[npt.NDArray[np.uint8]]:
    """Stack crops [S, S, 3] into batches [<= size, S, S, 3].

    Raises:
        DataError: a crop is not uint8 [S, S, 3], or the shapes differ.
    """
    pending: list[Crop] = []
    shape: tuple[int, ...] | None = None
    for i, crop in enumerate(crops):
        shape = shape or crop.shape
        if crop.dtype != np.uint8 or crop.ndim != 3 or crop.shape != shape:
            raise DataError(
                f"crop {i} is {crop.dtype} {list(crop.shape)}, expected uint8 {list(shape)} "
                "(height, width, 3)"
            )
        pending.append(crop)
        if len(pending) == size:
            yield np.stack(pending)
            pending = []
    if pending:
        yield np.stack(pending)


def input_of(model: onnx.ModelProto) -> tuple[str, int, int]:
    """Name of the only input, and height and width that it asks for (uint8 NHWC).

    Raises:
        DataError: the graph has another kind of input.
    """
    weights = {t.name for t in model.graph.initializer}
    inputs = [i for i in model.graph.input if i.name not in weights]
    tensor = inputs[0].type.tensor_type if inputs else None
    dims = [d.dim_value for d in tensor.shape.dim] if tensor is not None else []
    uint8 = tensor is not None and tensor.elem_type == 2  # TensorProto.UINT8
    if len(inputs) != 1 or not uint8 or len(dims) != 4 or dims[3] != 3 or min(dims[1:3]) < 1:
        raise DataError(
            f"the graph's input is {[i.name for i in inputs]} of shape {dims}; expected one uint8 "
            "input [batch, S, S, 3] of fixed size, as edgehp builds it"
        )
    return inputs[0].name, dims[1], dims[2]


class Runner:
    """Computes outputs of a graph for crops.

    Args:
        model: float or Q/DQ graph with one uint8 input [batch, S, S, 3].
        outputs: names of graph outputs; None takes all.
        threads: of the processor; None takes all cores.
        batch: crops per run.

    Raises:
        EnvironmentalError: onnxruntime is not installed.
        DataError: onnxruntime refuses the graph.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        outputs: Sequence[str] | None = None,
        *,
        threads: int | None = None,
        batch: int = _BATCH,
    ) -> None:
        onnxruntime = import_package("onnxruntime", "quantization needs")
        give_back()  # the memory of the session, and the graph, before this one
        self.input, self.height, self.width = input_of(model)
        self.outputs = tuple(outputs or [o.name for o in model.graph.output])
        self._batch = batch
        options = onnxruntime.SessionOptions()
        threads = threads or os.cpu_count() or 1
        # Threads that share the work on a batch wait for each other at every layer.
        self._workers = min(_WORKERS, threads)
        options.intra_op_num_threads = -(-threads // self._workers)
        options.log_severity_level = 3
        # Threads that wait in a loop take the processor from whatever else runs.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # Q/DQ as written: integer kernels saturate on processors without VNNI, and the fusion of
        # weights and biases computes FP16 graphs wrongly (onnxruntime <= 1.31).
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        try:
            self._session = onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except onnxruntime.capi.onnxruntime_pybind11_state.RuntimeException as e:
            raise DataError(f"onnxruntime refuses the graph: {e}") from e
        give_back()  # what opening took

    def stream(self, crops: Iterable[Crop]) -> Iterator[tuple[npt.NDArray[np.float32], ...]]:
        """Outputs batch by batch, in the order of `outputs`."""
        expected = (self.height, self.width, 3)

        def run(batch: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.float32], ...]:
            if batch.shape[1:] != expected:
                raise DataError(
                    f"the crops are {list(batch.shape[1:])}, the network takes {list(expected)}\n"
                    "hint: crop them with the network's preprocessing"
                )
            return tuple(self._session.run(list(self.outputs), {self.input: batch}))

        many = batches(track(crops, "crops"), self._batch)
        yield from prefetch(many, run, workers=self._workers, ahead=self._workers + 1)

    def __call__(self, crops: Iterable[Crop]) -> tuple[npt.NDArray[np.float32], ...]:
        """Outputs for all crops, concatenated along the batch.

        Raises:
            DataError: no crops, or crops of the wrong size.
        """
        parts = list(self.stream(crops))
        if not parts:
            raise DataError("no crops: expected at least one")
        return tuple(np.concatenate(p) for p in zip(*parts, strict=True))
