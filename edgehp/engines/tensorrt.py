"""Running TensorRT engines: 8.6, 10.x and 11.x; TensorRT for RTX shares this code.

All work goes through one stream: crops to pinned memory, to the GPU, the engine, answers back. On
an integrated GPU the pinned memory is what the engine reads and writes, and nothing is copied.

For the batch sizes in use the whole of it, copies included, is captured once as a CUDA graph, which
saves the processor most of the launching. An execution context must not change after its work was
captured (https://docs.nvidia.com/deeplearning/tensorrt/latest/performance/best-practices.html,
"CUDA Graphs"), so each graph has a context of its own, and other batch sizes go through one more,
which captures nothing.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgehp.driver import probe_driver
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
    check_file,
    check_threads,
    import_runtime,
    input_size_of,
    prediction_from,
)
from edgehp.engines.cuda import Buffer, Cuda, GpuLostError, check_cuda_package, open_cuda
from edgehp.engines.trt import dialect_of, dimensions, inspect, logger_of, need
from edgehp.errors import CompatibilityError, DataError, EnvironmentalError, UsageError

if TYPE_CHECKING:
    # Checked where the package tensorrt-stubs is installed.
    from tensorrt import ICudaEngine, IExecutionContext, Runtime

__all__ = ["TensorRtEngine", "check_available", "import_tensorrt"]

_log = logging.getLogger(__name__)
_FLOAT_BYTES = 4
# Before and after each of upload, inference and download.
_EVENTS = 4


@dataclass(eq=False)
class _Lane:
    """One execution context, the batch size it is set to, and the graph captured of it if any."""

    context: IExecutionContext
    batch: int = 0
    graph: Any = None


class TensorRtEngine(EngineBase):
    """A plan on one GPU.

    Args:
        path: the plan, built for this GPU and this TensorRT.
        threads: ignored, the work is the GPU's.
        device: number of the GPU, or ``"dla:N"`` for an accelerator core of a Jetson; None is the
            first of each.
        batch: a batch size to capture a CUDA graph for, besides 1 and the engine's best; None
            captures none.
        wait: how the processor waits for the GPU, one of `edgehp.engines.cuda.WAITS`.

    Raises:
        DataError: the file is missing or not a head-pose engine.
        CompatibilityError: TensorRT refuses the plan: another GPU or version, or damaged bytes.
        EnvironmentalError: TensorRT, the driver or the CUDA package is missing or failed.
        UsageError: no such GPU, or a batch size the engine was not built for.
    """

    kind = "tensorrt"
    stage_clock = "CUDA events"
    # Whether CUDA graphs are captured here; TensorRT for RTX does it by itself.
    captures = True

    def __init__(
        self,
        path: str | Path,
        *,
        threads: int | None = None,
        device: str | None = None,
        batch: int | None = None,
        wait: str = "auto",
    ) -> None:
        check_threads(threads)
        self._path = check_file(path, "a TensorRT engine")
        # First of all: the driver is probed in a subprocess before any library can crash on it.
        gpu, _, core = (device or "0").partition("dla:")
        if core and not core.isdigit():
            raise UsageError(f"device {device!r}: expected a number, as in '0' or 'dla:0'")
        self._dla = int(core or 0)
        self._cuda = self._open_cuda(gpu or "0", wait)
        self._closed = False
        self._stream: int | None = None
        self._buffers: dict[str, Buffer] = {}
        self._events: list[Any] = []
        self._plain: _Lane | None = None
        # (batch size, whether its steps are timed) -> its graph.
        self._captured: dict[tuple[int, bool], _Lane] = {}
        self._engine: ICudaEngine | None = None
        self._runtime: Runtime | None = None
        try:
            self._trt = self._import()
            self._logger = logger_of(self._trt)
            with self._cuda.current():
                self._load()
                self._prepare(batch)
        except BaseException:
            self.close()
            raise

    def _open_cuda(self, device: str | None, wait: str) -> Cuda:
        return open_cuda(device, wait)

    def _import(self) -> Any:
        return import_tensorrt()

    def _load(self) -> None:
        runtime: Runtime = need(self._trt.Runtime(self._logger), "create a runtime", self._logger)
        if runtime.num_DLA_cores:
            # Before an engine is read, or it cannot use the accelerator; others ignore it.
            runtime.DLA_core = self._dla
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
        fixed = inputs[INPUT_NAME][1][0]
        if fixed > 0:
            self._batches = (fixed, fixed, fixed)
        else:
            low, best, high = engine.get_tensor_profile_shape(INPUT_NAME, 0)
            self._batches = (int(low[0]), int(best[0]), int(high[0]))

    def _prepare(self, batch: int | None) -> None:
        low, best, high = self._batches
        if batch is not None and not low <= batch <= high:
            raise UsageError(
                f"{self._path}: batch size {batch} asked for, the engine was built for {low} to "
                f"{high}; choose one of those or build it again"
            )
        sizes = {INPUT_NAME: high * self._crop_bytes}
        sizes.update(dict.fromkeys(OUTPUT_NAMES, high * 3 * _FLOAT_BYTES))
        for name, size in sizes.items():
            self._buffers[name] = self._cuda.buffer(size)
        self._stream = self._cuda.new_stream()
        for _ in range(_EVENTS):
            self._events.append(self._cuda.new_event())
        self._plain = self._new_lane(batch or high)
        engine = need(self._engine, "load the engine", self._logger)
        self._audit = inspect(self._trt, engine, self._plain.context, self._logger)
        self._graph_batches: set[int] = set()
        if batch is not None and self.captures and self._cuda.has_graphs:
            self._graph_batches = {n for n in (1, best, batch) if low <= n <= high}
            for n in sorted(self._graph_batches):
                self._lane(n, timed=False)

    @property
    def _crop_bytes(self) -> int:
        return self._size * self._size * 3

    def _new_lane(self, batch: int) -> _Lane:
        lane = _Lane(self._new_context())
        for name, buffer in self._buffers.items():
            given = lane.context.set_tensor_address(name, buffer.address)
            need(given, f"use the memory for {name!r}", self._logger)
        self._set_batch(lane, batch)
        return lane

    def _new_context(self) -> IExecutionContext:
        engine = need(self._engine, "load the engine", self._logger)
        context: IExecutionContext = need(
            engine.create_execution_context(), "create a context", self._logger
        )
        return context

    def _set_batch(self, lane: _Lane, batch: int) -> None:
        if batch != lane.batch:
            shape = (batch, self._size, self._size, 3)
            given = lane.context.set_input_shape(INPUT_NAME, shape)
            need(given, f"take a batch of {batch}", self._logger)
            lane.batch = batch

    def _lane(self, batch: int, timed: bool) -> _Lane:
        """What runs a batch of this size: a captured graph, or the context without one."""
        if batch in self._graph_batches:
            key = (batch, timed)
            if key in self._captured:
                return self._captured[key]
            lane = self._new_lane(batch)
            # TensorRT allocates and chooses at the first run, which a capture must not contain.
            self._put(lane, timed=False)
            self._cuda.synchronize(self._stream_handle())
            try:
                lane.graph = self._cuda.capture(
                    self._stream_handle(), lambda: self._put(lane, timed, captured=True)
                )
            except GpuLostError:
                raise
            except EnvironmentalError as e:
                # Slower and equally right; `info` says which of the two runs.
                _log.warning("no CUDA graph for batches of %d: %s", batch, e)
                self._graph_batches.discard(batch)
            else:
                self._captured[key] = lane
                return lane
        if self._plain is None:
            raise self._closed_error()
        self._set_batch(self._plain, batch)
        return self._plain

    def _put(self, lane: _Lane, timed: bool, captured: bool = False) -> None:
        """Put the upload, the engine and the downloads of one batch into the stream."""
        stream = self._stream_handle()
        marks = iter(self._events if timed else ())

        def mark() -> None:
            if (event := next(marks, None)) is not None:
                self._cuda.record(event, stream, captured)

        mark()
        self._cuda.upload(self._buffers[INPUT_NAME], lane.batch * self._crop_bytes, stream)
        mark()
        self._logger.forget()
        need(lane.context.execute_async_v3(stream), "run the engine", self._logger)
        mark()
        for name in OUTPUT_NAMES:
            self._cuda.download(self._buffers[name], lane.batch * 3 * _FLOAT_BYTES, stream)
        mark()

    @property
    def info(self) -> EngineInfo:
        """What is running."""
        mapped = self._cuda.integrated
        return EngineInfo(
            kind=self.kind,
            version=str(self._trt.__version__),
            device=self._cuda.name,
            threads=None,
            precision=self._audit.reached,
            details={
                "compute_capability": self._cuda.compute_capability,
                "cuda_package": self._cuda.package,
                "batch": [self._batches[0], self._batches[2]],
                "cuda_graph": bool(self._graph_batches),
                "cuda_graph_batches": sorted(self._graph_batches),
                "transfers": "none: the engine uses the processor's memory (integrated GPU)"
                if mapped
                else "pinned memory, asynchronous, in the engine's stream",
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
        high = self._batches[2]
        parts = []
        times: list[list[float]] = []
        with self._cuda.current():
            for i in range(0, len(crops), high):
                parts.append(self._run(crops[i : i + high], timed))
                if timed:
                    times.append([self._cuda.elapsed_ms(a, b) for a, b in pairwise(self._events)])
        angles, spread = (np.concatenate(part) for part in zip(*parts, strict=True))
        return prediction_from(angles, spread, len(crops), str(self._path)), times

    def _run(self, crops: Crops, timed: bool) -> tuple[Any, Any]:
        count = len(crops)
        # An engine built for larger batches gets whatever its memory holds as the rest.
        lane = self._lane(max(count, self._batches[0]), timed)
        self._buffers[INPUT_NAME].host[: crops.nbytes] = crops.reshape(-1)
        stream = self._stream_handle()
        if lane.graph is not None:
            self._cuda.launch(lane.graph, stream)
        else:
            self._put(lane, timed)
        self._cuda.synchronize(stream)
        size = count * 3 * _FLOAT_BYTES
        # Copied: the next call overwrites the memory.
        angles, spread = (
            self._buffers[name].host[:size].view(np.float32).reshape(count, 3).copy()
            for name in OUTPUT_NAMES
        )
        return angles, spread

    def _stream_handle(self) -> int:
        if self._stream is None:
            raise self._closed_error()
        return self._stream

    def close(self) -> None:
        """Free the GPU's memory; calling it again does nothing."""
        if self._closed:
            return
        self._closed = True
        graphs = [lane.graph for lane in self._captured.values()]
        try:
            with self._cuda.current():
                for graph in graphs:
                    self._cuda.free_graph(graph)
                # TensorRT's objects go in this order, and before the memory they point to.
                self._captured = {}
                self._plain = None
                self._engine = None
                self._runtime = None
                for buffer in self._buffers.values():
                    self._cuda.free(buffer)
                for event in self._events:
                    self._cuda.free_event(event)
                if self._stream is not None:
                    self._cuda.free_stream(self._stream)
        finally:
            self._stream, self._events, self._buffers = None, [], {}
            self._cuda.close()


def check_available() -> None:
    """Return if TensorRT, a driver, a GPU and a CUDA package for Python are here.

    Raises:
        EnvironmentalError: one of them is not.
        CompatibilityError: TensorRT has a version that edgehp does not know.
    """
    check_cuda_package(probe_driver())
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
