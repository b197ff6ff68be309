"""Running TensorRT engines: 8.6, 10.x and 11.x; TensorRT for RTX shares this code.

`edgehp.engines.gpu_stream` has what goes through the GPU's streams.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Sequence, Sized
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from edgehp.crop import Preprocessing
from edgehp.driver import probe_driver
from edgehp.engines.audit import PrecisionAudit
from edgehp.engines.base import (
    INPUT_NAME,
    Crops,
    EngineBase,
    EngineInfo,
    Face,
    Prediction,
    StageTimes,
    answers_of,
    check_crops,
    check_file,
    check_threads,
    import_runtime,
    input_size_of,
    prediction_from,
    sum_of,
)
from edgehp.engines.cuda import Cuda, GpuLostError, check_cuda_package, open_cuda
from edgehp.engines.gpu_crop import CropKernel, Load
from edgehp.engines.gpu_stream import GpuStream, Shapes
from edgehp.engines.trt import dialect_of, dimensions, inspect, logger_of, need
from edgehp.errors import CompatibilityError, DataError, EnvironmentalError, UsageError

if TYPE_CHECKING:
    # Checked where the package tensorrt-stubs is installed.
    from tensorrt import ICudaEngine, IExecutionContext, Runtime

_log = logging.getLogger(__name__)
_Batch = TypeVar("_Batch", bound=Sized)
# Of `stream`: one uploads while the other infers.
_STREAMS = 2


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
        self._streams: list[GpuStream] = []
        self._kernel: CropKernel | None = None
        self._kernel_reason = ""
        self._engine: ICudaEngine | None = None
        self._runtime: Runtime | None = None
        try:
            self._trt = self._import()
            self._logger = logger_of(self._trt)
            with self._cuda.current():
                self._load()
                low, high = self._shapes.smallest, self._shapes.largest
                if batch is not None and not low <= batch <= high:
                    raise UsageError(
                        f"{self._path}: batch size {batch} asked for, the engine was built for "
                        f"{low} to {high}\nhint: choose one of those or build it again"
                    )
                self._batch = batch
                first = self._new_stream()
                self._audit = inspect(self._trt, self._loaded, first.context, self._logger)
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
        # Of version-compatible engines; the file was checked against its manifest.
        runtime.engine_host_code_allowed = True
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
                        "expected FLOAT\nhint: build the engine from a deployed graph of edgehp"
                    )
        self._size = input_size_of(inputs, outputs, self._path)
        self._answers = answers_of(outputs)
        if set(outputs) != set(self._answers):
            raise DataError(f"{self._path}: the engine has outputs {outputs}; build it again")
        fixed = inputs[INPUT_NAME][1][0]
        if fixed > 0:
            batches = (fixed, fixed, fixed)
        else:
            shapes = engine.get_tensor_profile_shape(INPUT_NAME, 0)
            low, best, high = (int(shape[0]) for shape in shapes)
            batches = (low, best, high)
        self._shapes = Shapes(self._size, *batches, answers=self._answers)

    def _new_stream(self) -> GpuStream:
        stream = GpuStream(
            self._cuda,
            self._shapes,
            self._new_context,
            self._logger,
            batch=self._batch,
            captures=self.captures,
        )
        self._streams.append(stream)
        return stream

    @property
    def _loaded(self) -> ICudaEngine:
        return need(self._engine, "load the engine", self._logger)

    def _new_context(self) -> IExecutionContext:
        return need(self._loaded.create_execution_context(), "create a context", self._logger)

    @property
    def info(self) -> EngineInfo:
        """What is running."""
        mapped = self._cuda.integrated
        graphs = sorted(self._streams[0].graph_batches) if self._streams else []
        return EngineInfo(
            kind=self.kind,
            version=str(self._trt.__version__),
            device=self._cuda.name,
            threads=None,
            precision=self._audit.reached,
            details={
                "compute_capability": self._cuda.compute_capability,
                "cuda_package": self._cuda.package,
                "batch": [self._shapes.smallest, self._shapes.largest],
                "cuda_graph": self._graphs_words(graphs),
                "cuda_graph_batches": graphs,
                "cropping": "on the GPU"
                if self.crops_frames
                else f"on the processor: {self._kernel_reason}",
                "transfers": "none: the engine uses the processor's memory (integrated GPU)"
                if mapped
                else "pinned memory, asynchronous, in the engine's stream",
                "spin_wait": self._cuda.waiting,
                "convolutions": self._audit.convolutions,
            },
        )

    def _graphs_words(self, batches: list[int]) -> str:
        """How the GPU's work is launched, for reports."""
        if not self.captures:
            return "captured by TensorRT for RTX"
        if batches:
            return f"for batches of {', '.join(map(str, batches))}"
        if not self._cuda.has_graphs:
            return f"none: {self._cuda.package} has no CUDA graphs, cuda-bindings has"
        return "none was asked for" if self._batch is None else "none: capturing failed"

    @property
    def audit(self) -> PrecisionAudit:
        """What each layer runs in, by the inspector; empty if the engine does not tell."""
        return self._audit

    def infer(self, crops: Crops) -> Prediction:
        """As `edgehp.engines.base.Engine.infer`; larger batches run in parts."""
        return self._all(self._parts(crops))[0]

    def infer_timed(self, crops: Crops) -> tuple[Prediction, StageTimes]:
        """As `infer`, with what upload, inference and download took on the GPU.

        The times are between CUDA events in the stream, so that gaps in which the GPU waits for
        the processor to launch the next step are part of that step.
        """
        return self._all(self._parts(crops), timed=True)

    def stream(self, batches: Iterable[Crops]) -> Iterator[Prediction]:
        """Predictions of `batches` in their order: the next one's upload beside this inference.

        Two streams take turns, each with memory and contexts of its own.

        Raises:
            DataError: crops of another type, shape or size, or more than the largest batch.
            EnvironmentalError: the engine is closed, or the GPU failed.
        """
        crops = (check_crops(self._fitting(batch), self._size) for batch in batches)
        return (answer for answer, _ in self._run(crops, None, _STREAMS))

    @property
    def crops_frames(self) -> bool:
        """Whether the crop kernel can be had here; `info` says why not."""
        return self._crop_kernel() is not None

    def infer_frames(self, faces: Sequence[Face], spec: Preprocessing) -> Prediction:
        """As `infer`, of faces that the GPU cuts out of their frames.

        Raises:
            DataError: a box has no area inside its frame, or the crops have another size.
            EnvironmentalError: the engine is closed, or the GPU failed or has no crop kernel.
        """
        return self._all(self._loads(faces, spec), self._need_kernel())[0]

    def infer_frames_timed(
        self, faces: Sequence[Face], spec: Preprocessing
    ) -> tuple[Prediction, StageTimes]:
        """As `infer_frames`, with what upload, cropping, inference and download took on the GPU."""
        return self._all(self._loads(faces, spec), self._need_kernel(), timed=True)

    def stream_frames(
        self, groups: Iterable[Sequence[Face]], spec: Preprocessing
    ) -> Iterator[Prediction]:
        """As `stream`, of groups of faces that the GPU cuts out of their frames."""
        loads = (load for group in groups for load in self._loads(self._fitting(group), spec))
        return (answer for answer, _ in self._run(loads, self._need_kernel(), _STREAMS))

    def crop_frames(self, faces: Sequence[Face], spec: Preprocessing) -> Crops:
        """The crops that `infer_frames` makes, uint8 [N, S, S, 3]."""
        kernel = self._need_kernel()
        with self._cuda.current():
            return kernel.crop(faces, spec)

    def _fitting(self, batch: _Batch) -> _Batch:
        if len(batch) > self._shapes.largest:
            raise DataError(f"a batch of {len(batch)}, expected at most {self._shapes.largest}")
        return batch

    def _parts(self, crops: Crops) -> Iterator[Crops]:
        """The crops in batches that the engine takes."""
        crops = check_crops(crops, self._size)
        for begin in range(0, len(crops), self._shapes.largest):
            yield crops[begin : begin + self._shapes.largest]

    def _loads(self, faces: Sequence[Face], spec: Preprocessing) -> Iterator[Load]:
        """The faces in batches that the engine takes."""
        if spec.size != self._size or not faces:
            raise DataError(
                f"{len(faces)} faces for crops of {spec.size} pixels, expected at least one and "
                f"{self._size} pixels"
            )
        for begin in range(0, len(faces), self._shapes.largest):
            part = faces[begin : begin + self._shapes.largest]
            yield Load(part, spec, self._shapes.smallest)

    def _all(
        self,
        batches: Iterable[Crops | Load],
        kernel: CropKernel | None = None,
        timed: bool = False,
    ) -> tuple[Prediction, StageTimes]:
        """The answers of all batches in one, and the sum of their times."""
        answers, times = zip(*self._run(batches, kernel, 1, timed), strict=True)
        return Prediction.joined(answers), sum_of(times)

    def _run(
        self,
        batches: Iterable[Crops | Load],
        kernel: CropKernel | None,
        streams: int,
        timed: bool = False,
    ) -> Iterator[tuple[Prediction, StageTimes]]:
        """What goes through so many streams in turn, answered in order."""
        if self._closed:
            raise self._closed_error()
        with self._cuda.current():
            while len(self._streams) < streams:
                self._new_stream()
        turns, waiting = cycle(self._streams[:streams]), deque[GpuStream]()
        for batch in batches:
            if len(waiting) == streams:
                yield self._taken(waiting.popleft(), timed)
            waiting.append(next(turns))
            with self._cuda.current():
                waiting[-1].put(batch, kernel, timed)
        while waiting:
            yield self._taken(waiting.popleft(), timed)

    def _taken(self, stream: GpuStream, timed: bool) -> tuple[Prediction, StageTimes]:
        with self._cuda.current():
            answers = stream.take()
            times = stream.times() if timed else StageTimes(0.0)
        return prediction_from(answers, len(answers[0]), str(self._path)), times

    def _crop_kernel(self) -> CropKernel | None:
        if self._kernel is None and not self._kernel_reason and not self._closed:
            try:
                with self._cuda.current():
                    self._kernel = CropKernel(self._cuda)
            except GpuLostError:
                raise
            except EnvironmentalError as e:
                # The processor crops then, to the same pixels; `info` says so.
                self._kernel_reason = str(e).partition("\n")[0]
                _log.info("the processor crops: %s", e)
        return self._kernel

    def _need_kernel(self) -> CropKernel:
        kernel = self._crop_kernel()
        if kernel is None:
            raise self._closed_error() if self._closed else EnvironmentalError(self._kernel_reason)
        return kernel

    def close(self) -> None:
        """Free the GPU's memory; calling it again does nothing."""
        if self._closed:
            return
        self._closed = True
        streams, self._streams = self._streams, []
        kernel, self._kernel = self._kernel, None
        try:
            with self._cuda.current():
                # TensorRT's objects go in this order, and before the memory they point to.
                for stream in streams:
                    stream.release()
                self._engine = None
                self._runtime = None
                for stream in streams:
                    stream.close()
                if kernel is not None:
                    kernel.close()
        finally:
            self._cuda.close()


def check_available() -> None:
    """Return if TensorRT, a driver, a GPU and a CUDA package for Python are here.

    Raises:
        EnvironmentalError: one of them is not.
        CompatibilityError: TensorRT has a version that edgehp does not know.
    """
    check_cuda_package(probe_driver())
    import_tensorrt()


_HOW_TO_INSTALL = (
    "on a Jetson it comes with JetPack, into environments made with --system-site-packages; "
    "elsewhere: pip install tensorrt"
)


def import_tensorrt() -> Any:
    """The module `tensorrt`, of a version edgehp knows. Probe the driver first.

    Raises:
        EnvironmentalError: it is missing or broken.
        CompatibilityError: it is of another version.
    """
    tensorrt = import_runtime("tensorrt", "TensorRT", _HOW_TO_INSTALL)
    # A directory of type stubs imports as an empty module.
    if not hasattr(tensorrt, "__version__"):
        raise EnvironmentalError(
            f"TensorRT is not installed (only its type stubs are); {_HOW_TO_INSTALL}"
        )
    dialect_of(str(tensorrt.__version__))
    return tensorrt
