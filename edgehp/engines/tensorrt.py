"""Running TensorRT engines: 8.6, 10.x and 11.x; TensorRT for RTX shares this code.

All work goes through one stream: crops to pinned memory, to the device, the engine, answers back.
For the batch size given at opening the engine's part is captured once as a CUDA graph, which saves
the processor most of the launching on small boards. The copies stay outside, so that events
between them and the graph can time each on the GPU.
"""

from __future__ import annotations

import logging
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgehp.driver import probe_driver
from edgehp.engines._trt_compat import dialect_of
from edgehp.engines._trt_inspect import inspect
from edgehp.engines._trt_log import logger_of
from edgehp.engines._trt_network import dimensions, need
from edgehp.engines.audit import PrecisionAudit
from edgehp.engines.base import (
    INPUT_NAME,
    OUTPUT_NAMES,
    Crops,
    EngineBase,
    EngineInfo,
    Prediction,
    StageTimes,
    check_crops,
    check_threads,
    import_runtime,
    prediction_from,
)
from edgehp.engines.cuda import Cuda, open_cuda
from edgehp.engines.graph_io import check_file, input_size_of
from edgehp.errors import CompatibilityError, DataError, EnvironmentalError, UsageError

if TYPE_CHECKING:
    # Checked where the package tensorrt-stubs is installed.
    from tensorrt import ICudaEngine, IExecutionContext, Runtime

__all__ = ["TensorRtEngine", "check_available", "import_tensorrt"]

_log = logging.getLogger(__name__)
_FLOAT_BYTES = 4
# Before and after each of upload, inference and download.
_EVENTS = 4


class TensorRtEngine(EngineBase):
    """A plan on one GPU.

    Args:
        path: the plan, built for this GPU and this TensorRT.
        threads: ignored, the work is the GPU's.
        device: number of the GPU; None is the first.
        batch: the batch size to capture a CUDA graph for; None captures none.

    Raises:
        DataError: the file is missing or not a head-pose engine.
        CompatibilityError: TensorRT refuses the plan: another GPU or version, or damaged bytes.
        EnvironmentalError: TensorRT, the driver or the CUDA package is missing or failed.
        UsageError: no such GPU, or a batch size the engine was not built for.
    """

    kind = "tensorrt"
    stage_clock = "CUDA events"

    def __init__(
        self,
        path: str | Path,
        *,
        threads: int | None = None,
        device: str | None = None,
        batch: int | None = None,
    ) -> None:
        check_threads(threads)
        self._path = check_file(path, "a TensorRT engine")
        # First of all: the driver is probed in a subprocess before any library can crash on it.
        self._cuda = self._open_cuda(device)
        self._closed = False
        self._graph: Any = None
        self._stream: int | None = None
        self._addresses: dict[str, int] = {}
        self._host: dict[str, Any] = {}
        self._events: list[Any] = []
        self._context: IExecutionContext | None = None
        self._engine: ICudaEngine | None = None
        self._runtime: Runtime | None = None
        try:
            self._trt = self._import()
            self._logger = logger_of(self._trt)
            self._load()
            self._prepare(batch)
        except BaseException:
            self.close()
            raise

    def _open_cuda(self, device: str | None) -> Cuda:
        return open_cuda(device)

    def _import(self) -> Any:
        return import_tensorrt()

    def _load(self) -> None:
        runtime: Runtime = need(self._trt.Runtime(self._logger), "create a runtime", self._logger)
        self._logger.forget()
        self._runtime, engine = runtime, runtime.deserialize_cuda_engine(self._path.read_bytes())
        if engine is None:
            raise CompatibilityError(
                f"{self._path}: TensorRT {self._trt.__version__} on {self._cuda.name} refuses the "
                f"engine: {self._logger.reasons()}; build it again on this device"
            )
        self._engine, inputs, outputs = engine, {}, []
        for i in range(engine.num_io_tensors):
            name = engine.get_tensor_name(i)
            if engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT:
                shape = dimensions(engine.get_tensor_shape(name))
                inputs[name] = (engine.get_tensor_dtype(name).name, shape)
            else:
                outputs.append(name)
                if engine.get_tensor_dtype(name) != self._trt.DataType.FLOAT:
                    raise DataError(
                        f"{self._path}: output {name!r} is {engine.get_tensor_dtype(name).name}, "
                        "expected FLOAT; build the engine from a deployed graph of edgehp"
                    )
        self._size = input_size_of(inputs, outputs, self._path)
        if set(outputs) != set(OUTPUT_NAMES):
            raise DataError(f"{self._path}: the engine has outputs {outputs}; build it again")
        low, _, high = engine.get_tensor_profile_shape(INPUT_NAME, 0)
        self._batches = (int(low[0]), int(high[0]))

    def _prepare(self, batch: int | None) -> None:
        low, high = self._batches
        if batch is not None and not low <= batch <= high:
            raise UsageError(
                f"{self._path}: batch size {batch} asked for, the engine was built for {low} to "
                f"{high}; choose one of those or build it again"
            )
        engine = need(self._engine, "load the engine", self._logger)
        context = need(engine.create_execution_context(), "create a context", self._logger)
        self._context = context
        sizes = {INPUT_NAME: high * self._size * self._size * 3}
        sizes.update(dict.fromkeys(OUTPUT_NAMES, high * 3 * _FLOAT_BYTES))
        for name, size in sizes.items():
            self._addresses[name] = self._cuda.allocate(size)
            self._host[name] = self._cuda.pinned(size)
            given = context.set_tensor_address(name, self._addresses[name])
            need(given, f"use the memory for {name!r}", self._logger)
        self._stream = self._cuda.new_stream()
        for _ in range(_EVENTS):
            self._events.append(self._cuda.new_event())
        self._shape = 0
        self._set_batch(batch or high)
        self._audit = inspect(self._trt, engine, context, self._logger)
        self._graph_batch = batch
        if batch is not None:
            self._capture(batch)

    def _capture(self, batch: int) -> None:
        if not self._cuda.has_graphs:
            _log.info("%s has no CUDA graphs: launching layer by layer", self._cuda.package)
            return
        # TensorRT allocates and chooses at the first run, which a capture must not contain.
        self._execute()
        self._cuda.synchronise(self._stream_handle())
        try:
            self._graph = self._cuda.capture(self._stream_handle(), self._execute)
        except EnvironmentalError as e:
            # Slower and equally right; `info` says which of the two runs.
            _log.warning("no CUDA graph for this engine, launching layer by layer: %s", e)

    @property
    def info(self) -> EngineInfo:
        """What is running."""
        return EngineInfo(
            kind=self.kind,
            version=str(self._trt.__version__),
            device=self._cuda.name,
            threads=None,
            precision=self._audit.reached,
            details={
                "compute_capability": self._cuda.compute_capability,
                "cuda_package": self._cuda.package,
                "batch": list(self._batches),
                "cuda_graph": self._graph is not None,
                "cuda_graph_batch": self._graph_batch if self._graph is not None else None,
                "transfers": "pinned memory, asynchronous, in the engine's stream",
                "spin_wait": self._cuda.waiting,
                "convolutions": self._audit.convolutions,
            },
        )

    @property
    def audit(self) -> PrecisionAudit:
        """What each layer runs in, by the inspector; empty if the engine does not tell."""
        return self._audit

    def infer(self, crops: Crops) -> Prediction:
        """Angles and spreads of uint8 RGB crops [N, S, S, 3]; larger batches run in parts.

        Raises:
            DataError: the crops have another type, shape or size.
            EnvironmentalError: the engine is closed, or the GPU failed.
        """
        return self._infer(crops, timed=False)[0]

    def infer_timed(self, crops: Crops) -> tuple[Prediction, StageTimes]:
        """As `infer`, with what upload, inference and download took on the GPU.

        The times are between CUDA events in the stream, so that gaps in which the GPU waits for
        the processor to launch the next step are part of that step.

        Raises:
            DataError, EnvironmentalError: as of `infer`.
        """
        prediction, times = self._infer(crops, timed=True)
        upload, inference, download = np.sum(times, axis=0) / 1e3
        return prediction, StageTimes(float(inference), float(upload), float(download))

    def _infer(self, crops: Crops, timed: bool) -> tuple[Prediction, list[list[float]]]:
        """The answer, and for each part of the crops the milliseconds of upload to download."""
        crops = check_crops(crops, self._size)
        if self._closed:
            raise self._closed_error()
        self._cuda.activate()
        high = self._batches[1]
        parts = []
        times: list[list[float]] = []
        for i in range(0, len(crops), high):
            parts.append(self._run(crops[i : i + high], timed))
            if timed:
                times.append([self._cuda.elapsed_ms(a, b) for a, b in pairwise(self._events)])
        angles, spread = (np.concatenate(part) for part in zip(*parts, strict=True))
        return prediction_from(angles, spread, len(crops), str(self._path)), times

    def _run(self, crops: Crops, timed: bool) -> tuple[Any, Any]:
        count = len(crops)
        # An engine built for larger batches gets whatever its memory holds as the rest.
        batch = max(count, self._batches[0])
        self._host[INPUT_NAME][: crops.nbytes] = crops.reshape(-1)
        stream = self._stream_handle()
        marks = iter(self._events if timed else ())

        def mark() -> None:
            if (event := next(marks, None)) is not None:
                self._cuda.record(event, stream)

        mark()
        self._upload(batch)
        mark()
        if self._graph is not None and batch == self._graph_batch:
            self._cuda.launch(self._graph, stream)
        else:
            self._set_batch(batch)
            self._execute()
        mark()
        self._download(batch)
        mark()
        self._cuda.synchronise(stream)
        size = count * 3 * _FLOAT_BYTES
        # Copied: the next call overwrites the pinned memory.
        angles, spread = (
            self._host[name][:size].view(np.float32).reshape(count, 3).copy()
            for name in OUTPUT_NAMES
        )
        return angles, spread

    def _set_batch(self, batch: int) -> None:
        if batch != self._shape:
            shape = (batch, self._size, self._size, 3)
            given = self._live_context().set_input_shape(INPUT_NAME, shape)
            need(given, f"take a batch of {batch}", self._logger)
            self._shape = batch

    def _upload(self, batch: int) -> None:
        size = batch * self._size * self._size * 3
        host = self._host[INPUT_NAME][:size]
        self._cuda.upload(self._addresses[INPUT_NAME], host, self._stream_handle())

    def _execute(self) -> None:
        self._logger.forget()
        done = self._live_context().execute_async_v3(self._stream_handle())
        need(done, "run the engine", self._logger)

    def _download(self, batch: int) -> None:
        stream = self._stream_handle()
        size = batch * 3 * _FLOAT_BYTES
        for name in OUTPUT_NAMES:
            self._cuda.download(self._host[name][:size], self._addresses[name], stream)

    def _live_context(self) -> IExecutionContext:
        if self._context is None:
            raise self._closed_error()
        return self._context

    def _stream_handle(self) -> int:
        if self._stream is None:
            raise self._closed_error()
        return self._stream

    def close(self) -> None:
        """Free the GPU's memory; calling it again does nothing."""
        if self._closed:
            return
        self._closed = True
        try:
            self._cuda.activate()
            if self._graph is not None:
                self._cuda.free_graph(self._graph)
            # TensorRT's objects go in this order, and before the memory they point to.
            self._context = self._engine = self._runtime = None
            for address in self._addresses.values():
                self._cuda.free(address)
            for memory in self._host.values():
                self._cuda.free_pinned(memory)
            for event in self._events:
                self._cuda.free_event(event)
            if self._stream is not None:
                self._cuda.free_stream(self._stream)
        finally:
            self._graph, self._stream, self._events = None, None, []
            self._addresses, self._host = {}, {}
            self._cuda.close()


def check_available() -> None:
    """Return if TensorRT, a driver and a GPU are here.

    Raises:
        EnvironmentalError: one of them is not.
        CompatibilityError: TensorRT has a version that edgehp does not know.
    """
    probe_driver()
    import_tensorrt()


def import_tensorrt() -> Any:
    """The module `tensorrt`, of a version edgehp knows. Probe the driver first.

    Raises:
        EnvironmentalError: it is missing or broken.
        CompatibilityError: it is of another version.
    """
    tensorrt = import_runtime(
        "tensorrt",
        "TensorRT",
        "on a Jetson it comes with JetPack, elsewhere: pip install tensorrt",
    )
    # A directory of type stubs imports as an empty module.
    if not hasattr(tensorrt, "__version__"):
        raise EnvironmentalError(
            "TensorRT is not installed (only its type stubs are); on a Jetson it comes with "
            "JetPack, elsewhere: pip install tensorrt"
        )
    dialect_of(str(tensorrt.__version__))
    return tensorrt
