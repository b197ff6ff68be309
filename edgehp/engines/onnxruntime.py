"""onnxruntime on the processor: where OpenVINO has no wheel, and a second opinion elsewhere."""

from __future__ import annotations

import platform
from pathlib import Path
from time import perf_counter
from typing import Any

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
    constant_types,
    import_runtime,
    input_size_of,
    prediction_from,
)
from edgehp.errors import DataError, EnvironmentalError

KIND = "onnxruntime"
PROVIDER = "CPUExecutionProvider"
# Up to 1.31.1 this optimizer computes FP16 graphs with Q/DQ wrongly (cosine 0.976 instead of
# 0.99999). In the others it must stay: it quantises the float biases without which no
# convolution becomes a QLinearConv, and all would silently run in FP32.
FP16_DISABLED_OPTIMIZERS = ("WeightBiasQuantization",)
_ERRORS_ONLY = 3
# onnx.TensorProto.DataType.
_UINT8, _INT8, _FLOAT16 = 2, 3, 10


class OnnxRuntimeEngine(EngineBase):
    """A graph in onnxruntime's CPU provider, with all graph optimisations.

    Args:
        path: ONNX graph with the inputs and outputs of `edgehp.networks.graph`.
        threads: for inference; None leaves the choice to onnxruntime.
        device: ``"CPU"``; nothing else is supported.
        batch: ignored: the session takes every batch size.

    Raises:
        DataError: the file is missing, damaged, or another kind of graph.
        EnvironmentalError: onnxruntime is not installed.
        UsageError: threads or device make no sense.
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
        del batch
        check_processor(device, "onnxruntime")
        self._path = check_file(path, "an ONNX graph")
        self._threads = check_threads(threads)
        self._session: Any = new_session(self._path, self._threads)
        inputs = {
            i.name: (i.type, [d if isinstance(d, int) else None for d in i.shape])
            for i in self._session.get_inputs()
        }
        outputs = [o.name for o in self._session.get_outputs()]
        self._size = input_size_of(inputs, outputs, self._path)
        self._answers = answers_of(outputs)

    @property
    def info(self) -> EngineInfo:
        """What is running; a session cannot be asked for its precision, the build's audit can."""
        return EngineInfo(
            kind=KIND,
            version=str(check_available().__version__),
            device=f"CPU ({platform.processor() or platform.machine()})",
            threads=self._threads,
            precision="unknown",
            details={
                "provider": PROVIDER,
                "disabled_optimizers": disabled_optimizers(self._path),
                "transfers": "none: crops are read where they are",
                # onnxruntime's default, which `new_session` leaves as it is.
                "spin_wait": "yes",
            },
        )

    def infer_timed(self, crops: Crops) -> tuple[Prediction, StageTimes]:
        """As `infer`, with what the session's call took, which hands over and brings back too."""
        crops = check_crops(crops, self._size)
        if self._session is None:
            raise self._closed_error()
        began = perf_counter()
        try:
            answers = self._session.run(list(self._answers), {INPUT_NAME: crops})
        except _failures() as e:
            raise EnvironmentalError(f"onnxruntime failed at inference: {_line(e)}") from e
        times = StageTimes(perf_counter() - began)
        return prediction_from(answers, len(crops), str(self._path)), times

    def close(self) -> None:
        """Free the session; calling it again does nothing."""
        self._session = None


def disabled_optimizers(path: Path) -> list[str]:
    """The optimizers of onnxruntime that compute this graph wrongly."""
    return list(FP16_DISABLED_OPTIMIZERS) if _FLOAT16 in constant_types(path) else []


def new_session(path: Path, threads: int | None, optimised: Path | None = None) -> Any:
    """An `onnxruntime.InferenceSession` with the settings every run of edgehp uses.

    Args:
        path: ONNX graph.
        threads: for inference, or None.
        optimised: where to write the optimised graph, for the audit.

    Raises:
        DataError: the file cannot be read.
        EnvironmentalError: onnxruntime is not installed.
    """
    ort = check_available()
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = _ERRORS_ONLY
    if threads is not None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
    types = constant_types(path)
    if _INT8 in types and _UINT8 not in types:
        # Symmetric INT8 is TensorRT's. Run as written, every processor gives its answers; the
        # integer kernels are no faster for it, and without VNNI they saturate (0.75 degrees).
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    try:
        return ort.InferenceSession(
            str(path),
            options,
            providers=[PROVIDER],
            disabled_optimizers=disabled_optimizers(path),
        )
    except _failures() as e:
        raise DataError(
            f"{path} cannot be read as an ONNX graph: {_line(e)}; it is truncated or damaged, or "
            "this onnxruntime is too old for it: build it again or upgrade onnxruntime"
        ) from e


def check_available() -> Any:
    """The module `onnxruntime`.

    Raises:
        EnvironmentalError: it cannot be imported.
    """
    return import_runtime("onnxruntime", "onnxruntime", "install it with: pip install onnxruntime")


def _failures() -> tuple[type[Exception], ...]:
    """What onnxruntime raises: its exceptions share no base of their own."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = (
        *("EPFail", "EngineError", "Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf"),
        *("NoModel", "NoSuchFile", "NotImplemented", "RuntimeException"),
    )
    found = [getattr(state, n) for n in names if hasattr(state, n)]
    return (*found, RuntimeError, ValueError)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
