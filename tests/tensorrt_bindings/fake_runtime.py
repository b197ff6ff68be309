"""A TensorRT runtime that computes with numpy on a `FakeCuda`: the hardware's part, emulated."""

from __future__ import annotations

import json
from enum import Enum
from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.tensorrt_bindings.fake_cuda import FakeCuda

__all__ = ["FakeTensorRt", "expected_angles"]

SIZE = 8


class _Mode(Enum):
    INPUT = 1
    OUTPUT = 2


class _Type(Enum):
    FLOAT = 0
    UINT8 = 5


class _Logger:
    """The base class that the adapter's logger derives from."""


def expected_angles(crops: Any) -> Any:
    """What the emulated network computes: the mean of each channel."""
    return crops.reshape(len(crops), -1, 3).mean(1).astype(np.float32)


class FakeTensorRt:
    """The module, one instance a test, with switches for what shall go wrong."""

    __version__ = "10.3.0"
    ILogger = _Logger
    TensorIOMode = _Mode
    DataType = _Type
    LayerInformationFormat = SimpleNamespace(JSON="json")

    def __init__(self, cuda: FakeCuda, batches: tuple[int, int] = (1, 4)) -> None:
        self.cuda = cuda
        self.batches = batches
        self.refuses_plan = False
        self.fails_run = False
        self.refuses_address = ""
        self.outputs = ("angles", "spread")
        self.input_type = _Type.UINT8
        self.streams: list[int] = []
        self.addresses: dict[str, int] = {}

    def Runtime(self, logger: Any) -> Any:  # noqa: N802 - TensorRT's name
        def deserialize(plan: bytes) -> Any:
            if self.refuses_plan:
                severity = SimpleNamespace(name="ERROR")
                logger.log(severity, "built for compute capability 8.9,\n found 8.7")
                return None
            return _Engine(self, logger)

        return SimpleNamespace(deserialize_cuda_engine=deserialize)


class _Engine:
    def __init__(self, trt: FakeTensorRt, logger: Any) -> None:
        self._trt, self._logger = trt, logger
        self._names = ("crops", *trt.outputs)
        self.num_io_tensors = len(self._names)

    def get_tensor_name(self, index: int) -> str:
        return self._names[index]

    def get_tensor_mode(self, name: str) -> _Mode:
        return _Mode.INPUT if name == "crops" else _Mode.OUTPUT

    def get_tensor_dtype(self, name: str) -> _Type:
        return self._trt.input_type if name == "crops" else _Type.FLOAT

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, SIZE, SIZE, 3) if name == "crops" else (-1, 3)

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        low, high = self._trt.batches
        return [(n, SIZE, SIZE, 3) for n in (low, low, high)]

    def create_execution_context(self) -> Any:
        return _Context(self._trt, self._logger)

    def create_engine_inspector(self) -> Any:
        layer = {"Name": "conv1", "LayerType": "CaskConvolution", "Weights": {"Type": "Int8"}}
        text = json.dumps({"Layers": [layer]})
        return SimpleNamespace(get_engine_information=lambda form: text)


class _Context:
    def __init__(self, trt: FakeTensorRt, logger: Any) -> None:
        self._trt, self._logger, self._batch = trt, logger, 0

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, high = self._trt.batches
        if not low <= shape[0] <= high or shape[1:] != (SIZE, SIZE, 3):
            return False
        self._batch = shape[0]
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._trt.addresses[name] = address
        return name != self._trt.refuses_address

    def execute_async_v3(self, stream: int) -> bool:
        trt, batch = self._trt, self._batch
        trt.streams.append(stream)
        if trt.fails_run:
            self._logger.log(SimpleNamespace(name="ERROR"), "illegal memory access")
            return False

        def work() -> None:
            memory = trt.cuda.memory
            trt.cuda.clock += 1.5 * batch
            size = batch * SIZE * SIZE * 3
            crops = memory[trt.addresses["crops"]][:size].reshape(batch, SIZE, SIZE, 3)
            angles = expected_angles(crops)
            for name, values in (("angles", angles), ("spread", angles + 1)):
                memory[trt.addresses[name]][: batch * 12] = values.view(np.uint8).reshape(-1)

        trt.cuda.put(stream, work)
        return True
