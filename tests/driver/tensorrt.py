"""A TensorRT runtime as its documents describe it, which launches one kernel of the driver.

It runs on the driver double and, with an image of the kernel, on a real GPU. What the documents
forbid is kept in `violations`: a shape set on a context whose work was captured, a first run inside
a capture, a run without addresses or shape.
"""

from __future__ import annotations

import ctypes
import json
from enum import Enum
from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.driver.double import Driver

SIZE = 16
# For NVRTC: what driver.c computes.
KERNEL = b"""
extern "C" __global__ void head(const unsigned char* crops, float* angles, float* spread,
                                int batch, int side) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= batch * 3) return;
  int pixels = side * side;
  const unsigned char* first = crops + (i / 3) * pixels * 3 + i % 3;
  double sum = 0;
  for (int p = 0; p < pixels; p++) sum += first[p * 3];
  angles[i] = (float)(sum / pixels);
  spread[i] = angles[i] + batch;
}
"""


class _Mode(Enum):
    INPUT = 1
    OUTPUT = 2


class _Type(Enum):
    FLOAT = 0
    UINT8 = 5


class _Logger:
    """The base class that the adapter's logger derives from."""


def expected(crops: Any, batch: int) -> tuple[Any, Any]:
    """Angles and spreads of a run with this batch size."""
    angles = crops.reshape(len(crops), -1, 3).mean(1).astype(np.float32)
    return angles, angles + batch


class TensorRtDouble:
    """The module `tensorrt`, one instance a test, with switches for what shall go wrong."""

    __version__ = "10.3.0"
    ILogger = _Logger
    TensorIOMode = _Mode
    DataType = _Type
    LayerInformationFormat = SimpleNamespace(JSON="json")

    def __init__(
        self, batches: tuple[int, int, int] = (1, 4, 8), image: bytes = b"the double's own"
    ) -> None:
        self.driver = Driver()
        self.batches = batches
        self.image = image
        self.function = ctypes.c_void_p()
        self.refuses_plan = False
        self.fails_run = False
        self.refuses_address = ""
        self.outputs = ("angles", "spread")
        self.input_type = _Type.UINT8
        self.violations: list[str] = []
        self.contexts = 0
        self.dla_cores = 0
        self.dla: int | None = None

    def Runtime(self, logger: Any) -> Any:  # noqa: N802 - TensorRT's name
        def deserialize(plan: bytes) -> Any:
            current = ctypes.c_void_p()
            self.driver.call("cuCtxGetCurrent", ctypes.byref(current))
            if not current.value:
                self.violations.append("no CUDA context is current")
            if self.refuses_plan:
                severity = SimpleNamespace(name="ERROR")
                logger.log(severity, "built for compute capability 8.9,\n found 8.7")
                return None
            module = ctypes.c_void_p()
            self.driver.call("cuModuleLoadData", ctypes.byref(module), self.image)
            self.driver.call("cuModuleGetFunction", ctypes.byref(self.function), module, b"head")
            return _Engine(self, logger)

        return _Runtime(self, deserialize)


class _Runtime:
    """Refuses, by a violation, a DLA core that is set after an engine was read."""

    def __init__(self, trt: TensorRtDouble, deserialize: Any) -> None:
        self._trt, self._deserialize, self._read = trt, deserialize, False
        self.num_DLA_cores = trt.dla_cores

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "DLA_core":
            self._trt.dla = value
            if self._read:
                self._trt.violations.append("DLA_core was set after an engine was read")
        object.__setattr__(self, name, value)

    def deserialize_cuda_engine(self, plan: bytes) -> Any:
        self._read = True
        return self._deserialize(plan)


class _Engine:
    def __init__(self, trt: TensorRtDouble, logger: Any) -> None:
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
        return [(n, SIZE, SIZE, 3) for n in self._trt.batches]

    def create_execution_context(self) -> Any:
        self._trt.contexts += 1
        return _Context(self._trt, self._logger)

    def create_engine_inspector(self) -> Any:
        layer = {"Name": "conv1", "LayerType": "CaskConvolution", "Weights": {"Type": "Int8"}}
        text = json.dumps({"Layers": [layer]})
        return SimpleNamespace(get_engine_information=lambda form: text)


class _Context:
    def __init__(self, trt: TensorRtDouble, logger: Any) -> None:
        self._trt, self._logger, self._batch = trt, logger, 0
        self._addresses: dict[str, int] = {}
        self._runs = 0
        self._captured = False

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self._trt.batches
        if self._captured:
            self._trt.violations.append("a shape was set on a context that was captured")
        if not low <= shape[0] <= high or tuple(shape[1:]) != (SIZE, SIZE, 3):
            return False
        self._batch = shape[0]
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        if self._captured:
            self._trt.violations.append("an address was set on a context that was captured")
        self._addresses[name] = address
        return name != self._trt.refuses_address

    def execute_async_v3(self, stream: int) -> bool:
        trt = self._trt
        if trt.fails_run or not self._batch or set(self._addresses) != {"crops", *trt.outputs}:
            self._logger.log(SimpleNamespace(name="ERROR"), "shapes or addresses are missing")
            return False
        capturing = ctypes.c_int()
        handle = ctypes.c_void_p(stream)
        trt.driver.call("cuStreamIsCapturing", handle, ctypes.byref(capturing))
        if capturing.value and not self._runs:
            trt.violations.append("the first run of a context was captured")
        self._captured |= bool(capturing.value)
        self._runs += 1
        values = [
            *(ctypes.c_uint64(self._addresses[n]) for n in ("crops", "angles", "spread")),
            ctypes.c_int(self._batch),
            ctypes.c_int(SIZE),
        ]
        arguments = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        trt.driver.call(
            "cuLaunchKernel", trt.function, *(1, 1, 1), *(64, 1, 1), 0, handle, arguments, None
        )
        return True
