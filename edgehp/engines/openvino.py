"""OpenVINO on the processor: the engine of the ``cpu`` target.

The engine file is the ONNX graph itself, not OpenVINO's IR: IR files carry names that change from
one conversion to the next, so their hash would too, and they would tie the artifact to one
release; reading the ONNX costs well under a second.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from edgehp.engines.audit import LayerPrecision, PrecisionAudit
from edgehp.engines.base import (
    INPUT_NAME,
    Crops,
    EngineBase,
    EngineInfo,
    Prediction,
    StageTimes,
    answers_of,
    check_crops,
    check_file,
    check_processor,
    check_threads,
    import_runtime,
    input_size_of,
    prediction_from,
)
from edgehp.errors import DataError, EnvironmentalError, UsageError

KIND = "openvino"
_TELEMETRY = "openvino_telemetry"
# Kinds of the runtime model that move or hold data and compute nothing.
_IDLE = frozenset({"Input", "Output", "Const", "Constant", "Parameter", "Result"})


def check_available() -> Any:
    """The module ``openvino``, imported without its telemetry. Nothing else imports it.

    Since 2024 ``import openvino`` reports to its maker that it was imported, from a process that it
    forks, unless CI is set or a consent file says no. Neither a car nor a calibration has to tell
    anybody that it runs; and a fork of a process with threads can hang for ever on a lock that one
    of them held. OpenVINO has a stub of its own for where the package ``openvino_telemetry`` is
    missing (``openvino/tools/ovc/telemetry_utils.py``): it finds it missing here.

    Raises:
        EnvironmentalError: it is missing or cannot load its libraries.
    """
    absent = object()
    before: Any = sys.modules.get(_TELEMETRY, absent)
    # None is what the import system takes for "not there" (importlib, `sys.modules`).
    sys.modules[_TELEMETRY] = None  # type: ignore[assignment]
    try:
        return import_runtime("openvino", "OpenVINO", "install it with: pip install openvino")
    finally:
        if before is absent:
            del sys.modules[_TELEMETRY]
        else:
            sys.modules[_TELEMETRY] = before


class _Bound:
    """A request whose input and outputs are bound once to memory of ours.

    Binding anew for every call costs about as much as copying a crop, and a hundredth of a small
    network's time in all.
    """

    def __init__(self, ov: Any, request: Any, batch: int, size: int, names: Sequence[str]) -> None:
        self.request = request
        self.crops = np.zeros((batch, size, size, 3), np.uint8)
        self.answers = [np.zeros((batch, 3), np.float32) for _ in names]
        for name, memory in zip((INPUT_NAME, *names), (self.crops, *self.answers), strict=True):
            request.set_tensor(name, ov.Tensor(memory, shared_memory=True))


class OpenVinoEngine(EngineBase):
    """A graph compiled for this processor.

    One model is compiled for the batch size given (static shapes), one more with a free batch
    dimension when another size is first asked for: at most two, whatever sizes come.

    Args:
        path: ONNX graph with the inputs and outputs of `edgehp.networks.graph`.
        threads: for inference; None leaves the choice to OpenVINO.
        device: ``"CPU"``; nothing else is supported.
        batch: the batch size to compile at once; None means 1.

    Raises:
        DataError: the file is missing, damaged, or another kind of graph.
        EnvironmentalError: OpenVINO is not installed or cannot compile the graph.
        UsageError: threads, batch or device make no sense.
    """

    stage_clock = "host"

    def __init__(
        self,
        path: str | Path,
        *,
        threads: int | None = None,
        device: str | None = None,
        batch: int | None = None,
    ) -> None:
        check_processor(device, "OpenVINO")
        batch = 1 if batch is None else batch
        if not 1 <= batch <= 4096:
            raise UsageError(f"batch size {batch} is outside 1..4096")
        self._path = check_file(path, "an ONNX graph")
        self._threads = check_threads(threads)
        self._ov = check_available()
        self._core = self._ov.Core()
        try:
            self._model = self._core.read_model(self._path)
        except RuntimeError as e:
            raise DataError(
                f"{self._path} cannot be read as an ONNX graph: {_last_line(e)}; it is truncated "
                "or damaged: copy or build it again"
            ) from e
        inputs = {
            i.get_any_name(): (
                i.get_element_type().get_type_name(),
                [None if d.is_dynamic else d.get_length() for d in i.get_partial_shape()],
            )
            for i in self._model.inputs
        }
        outputs = [name for o in self._model.outputs for name in o.get_names()]
        self._answers = answers_of(outputs)
        self._size = input_size_of(inputs, outputs, self._path)
        self._batch = batch
        compiled = self._compile(batch, "LATENCY")
        self._audit = audit_model(compiled)
        self._used_threads = int(compiled.get_property("INFERENCE_NUM_THREADS"))
        request = compiled.create_infer_request()
        try:
            self._static: _Bound | None = _Bound(
                self._ov, request, batch, self._size, self._answers
            )
        except RuntimeError as e:
            raise DataError(
                f"{self._path}: its answers are not float32 [N, 3] ({_last_line(e)}); the file is "
                "not a head-pose graph of edgehp: build it again"
            ) from e
        self._dynamic: Any = None
        self._throughput: list[Any] = []

    @property
    def info(self) -> EngineInfo:
        """What is running."""
        return EngineInfo(
            kind=KIND,
            version=str(self._ov.__version__),
            device=str(self._core.get_property("CPU", "FULL_DEVICE_NAME")).strip(),
            threads=self._used_threads,
            precision=self._audit.reached,
            details={
                "performance_hint": "LATENCY",
                "inference_precision_hint": "f32",
                "static_batch": self._batch,
                "convolutions": self._audit.convolutions,
                "transfers": "copied at the static batch, else crops are read where they are",
                "spin_wait": "as oneTBB does",
                "capabilities": list(self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")),
            },
        )

    @property
    def audit(self) -> PrecisionAudit:
        """What each layer of the compiled model runs in."""
        return self._audit

    def infer_timed(self, crops: Crops) -> tuple[Prediction, StageTimes]:
        """As `infer`, with what its parts took: handing over the crops, inference, the answers."""
        began = perf_counter()
        crops = check_crops(crops, self._size)
        bound = self._static
        if bound is None:
            raise self._closed_error()
        if len(crops) == self._batch:
            np.copyto(bound.crops, crops)
            request = bound.request
        else:
            crops = _shareable(crops)
            if self._dynamic is None:
                self._dynamic = self._compile(None, "LATENCY").create_infer_request()
            request = self._dynamic
        try:
            if request is not bound.request:
                request.set_input_tensor(self._ov.Tensor(crops, shared_memory=True))
            given = perf_counter()
            # Not infer(): the binding collects the outputs there once more.
            request.start_async()
            request.wait()
        except RuntimeError as e:
            raise EnvironmentalError(_failed("inference", e)) from e
        done = perf_counter()
        if request is bound.request:
            # Copied because the next inference writes to the same memory.
            answers = [a.copy() for a in bound.answers]
            prediction = prediction_from(answers, len(crops), str(self._path))
        else:
            prediction = self._prediction(request, len(crops))
        return prediction, StageTimes(done - given, given - began, perf_counter() - done)

    def stream(self, batches: Iterable[Crops]) -> Iterator[Prediction]:
        """As `edgehp.engines.base.StreamingEngine.stream`.

        Not more batches are taken than are in flight, so a generator keeps memory bounded.
        """
        if not self._throughput:
            compiled = self._compile(None, "THROUGHPUT")
            count = int(compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"))
            # As many again wait: a stream that is done takes the next, while whoever makes the
            # crops shares a processor with another stream, which is then behind.
            self._throughput = [compiled.create_infer_request() for _ in range(2 * max(count, 1))]
        free = deque(self._throughput)
        busy: deque[tuple[Any, Crops]] = deque()
        try:
            for batch in batches:
                crops = _shareable(check_crops(batch, self._size))
                if not free:
                    yield self._finish(*busy[0])
                    free.append(busy.popleft()[0])
                request = free.popleft()
                request.set_input_tensor(self._ov.Tensor(crops, shared_memory=True))
                request.start_async()
                # OpenVINO reads the crops where they are and holds no reference to them.
                busy.append((request, crops))
            while busy:
                yield self._finish(*busy[0])
                busy.popleft()
        finally:
            # A consumer that stops early must not free memory that is still being read.
            for request, _ in busy:
                request.wait()

    def close(self) -> None:
        """Free the compiled models; calling it again does nothing."""
        self._static = self._dynamic = None
        self._throughput = []
        self._model = None

    def _compile(self, batch: int | None, hint: str) -> Any:
        config: dict[str, Any] = {
            "PERFORMANCE_HINT": hint,
            # Without this hint a processor with bfloat16 silently computes FP32 layers in it.
            "INFERENCE_PRECISION_HINT": "f32",
        }
        if self._threads is not None:
            config["INFERENCE_NUM_THREADS"] = self._threads
        model = self._model
        if model is None:
            raise self._closed_error()
        try:
            if batch is not None:
                model = model.clone()
                model.reshape({INPUT_NAME: [batch, self._size, self._size, 3]})
            return self._core.compile_model(model, "CPU", config)
        except RuntimeError as e:
            raise EnvironmentalError(_failed(f"compiling {self._path.name}", e)) from e

    def _finish(self, request: Any, crops: Crops) -> Prediction:
        try:
            request.wait()
        except RuntimeError as e:
            raise EnvironmentalError(_failed("inference", e)) from e
        return self._prediction(request, len(crops))

    def _prediction(self, request: Any, count: int) -> Prediction:
        # Copied because the next inference overwrites the request's own memory.
        answers = [request.get_tensor(name).data.copy() for name in self._answers]
        return prediction_from(answers, count, str(self._path))


def _shareable(crops: Crops) -> Crops:
    """The crops in writable memory, the only kind OpenVINO shares; a memory map is read-only."""
    return crops if crops.flags.writeable else crops.copy()


def audit_model(compiled: Any) -> PrecisionAudit:
    """The layers of an `openvino.CompiledModel` with the precision each computes in."""
    rows = []
    for op in compiled.get_runtime_model().get_ordered_ops():
        info = op.get_rt_info()
        kind = _text(info, "layerType")
        if kind in _IDLE:
            continue
        rows.append(
            LayerPrecision.of(
                op.get_friendly_name(),
                kind,
                _text(info, "runtimePrecision"),
                _text(info, "primitiveType"),
            )
        )
    return PrecisionAudit("compiled model", tuple(rows))


def _text(info: Any, key: str) -> str:
    if key not in info:
        return ""
    value = info[key]
    # OVAny in the releases before 2024.6, a plain value since.
    return str(getattr(value, "value", value))


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


def _failed(what: str, error: Exception) -> str:
    return f"OpenVINO failed at {what}: {_last_line(error)}; try another OpenVINO release"
