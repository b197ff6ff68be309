"""The rows of other quantisers, with the settings their own documentation recommends.

All of them get the float core (`quantizers.cores`), the same crops and every crop of them.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgehp.engines.base import import_runtime
from edgehp.errors import EnvironmentalError
from edgehp.networks.graph import graph_bytes
from quantizers import cores
from quantizers.job import Job, Made

__all__ = ["modelopt", "nncf_controlled", "nncf_default", "nncf_onnx", "onnxruntime_static"]

# NNCF divides by the metric of FP32, whose difference to itself is 0.
_PERFECT = 100.0
_WORKER = Path(__file__).with_name("modelopt_worker.py")


def onnxruntime_static(job: Job, method: str, *, symmetric: bool = False) -> Made:
    """``onnxruntime.quantization``: pre-processing, then ``quantize_static``.

    Q/DQ format with weights per channel; uint8 activations, which its documentation recommends
    for x86-64, or `symmetric` int8 with float biases, which TensorRT asks for.
    """
    quantization = import_runtime(
        "onnxruntime.quantization", "onnxruntime", "install it with: pip install onnxruntime"
    )
    preprocess = import_module("onnxruntime.quantization.preprocess").quant_pre_process
    mean = cores.mean_of(_model(job))
    feed = cores.batches_of(_crops(job, "calibration"), mean)

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc, name-defined]
        def get_next(self) -> dict[str, npt.NDArray[np.float32]] | None:
            batch = next(feed, None)
            return None if batch is None else {cores.FIRST: batch}

    prepared, quantised = job.result("prepared.onnx"), job.result("core.onnx")
    preprocess(str(cores.core_file(Path(job.work))), str(prepared))
    options = {"ActivationSymmetric": True, "QuantizeBias": False} if symmetric else {}
    kinds = quantization.QuantType
    quantization.quantize_static(
        str(prepared),
        str(quantised),
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        activation_type=kinds.QInt8 if symmetric else kinds.QUInt8,
        weight_type=kinds.QInt8,
        calibrate_method=getattr(quantization.CalibrationMethod, method),
        extra_options=options,
    )
    return _joined(job, quantised)


def nncf_default(job: Job) -> Made:
    """``nncf.quantize`` of the OpenVINO model."""
    import openvino

    nncf = _nncf()
    core = openvino.Core().read_model(cores.core_file(Path(job.work)))
    crops = _Prepared(job, "calibration")
    made = nncf.quantize(core, nncf.Dataset(crops), subset_size=len(crops))
    return _saved(job, made)


def nncf_onnx(job: Job) -> Made:
    """``nncf.quantize`` of the ONNX model, for runtimes other than OpenVINO."""
    import onnx

    nncf = _nncf()
    crops = _Prepared(job, "calibration", named=True)
    core = onnx.load(str(cores.core_file(Path(job.work))))
    made = nncf.quantize(core, nncf.Dataset(crops), subset_size=len(crops))
    path = job.result("core.onnx")
    onnx.save(made, str(path))
    return _joined(job, path)


def nncf_controlled(job: Job) -> Made:
    """``nncf.quantize_with_accuracy_control``, with the control crops and the budget of edgehp."""
    import openvino

    nncf, model = _nncf(), _model(job)
    runtime = openvino.Core()
    core = runtime.read_model(cores.core_file(Path(job.work)))
    crops, control = _Prepared(job, "calibration"), _Prepared(job, "control")
    config = {"INFERENCE_PRECISION_HINT": "f32"}

    def angles(compiled: Any, data: Any) -> npt.NDArray[np.float64]:
        request = compiled.create_infer_request()
        scores = [np.array(request.infer([b])[compiled.output(0)]) for b in data]
        return cores.decode(model, np.concatenate(scores))

    truth = angles(runtime.compile_model(core, "CPU", config), control)

    def validate(compiled: Any, data: Any) -> tuple[float, list[float] | None]:
        # NNCF ranks layers on a part of the control crops, in their order.
        items = list(data)
        chosen = [control.index_of(i) for i in items]
        apart = np.abs(angles(compiled, items) - truth[chosen]).mean(axis=1)
        return _PERFECT - float(apart.mean()), (_PERFECT - apart).tolist()

    made = nncf.quantize_with_accuracy_control(
        core,
        nncf.Dataset(crops),
        nncf.Dataset(control),
        validate,
        max_drop=job.budget,
        drop_type=nncf.DropType.ABSOLUTE,
        subset_size=len(crops),
    )
    apart = np.abs(angles(runtime.compile_model(made, "CPU", config), control) - truth).mean()
    verdict = "reached" if apart <= job.budget else "not reached"
    return replace(_saved(job, made), note=f"{job.budget:g} {verdict}: {apart:.3f}")


def modelopt(job: Job, method: str) -> Made:
    """NVIDIA ModelOpt's ONNX quantisation, in an interpreter of its own (``--modelopt-python``).

    Its default: FP16 outside the convolutions, FP32 in and out.
    """
    if not job.given:
        raise EnvironmentalError("no interpreter with nvidia-modelopt: give --modelopt-python")
    mean = cores.mean_of(_model(job))
    crops = np.concatenate(list(cores.batches_of(_crops(job, "calibration"), mean, 64)))
    feed, quantised = job.result("crops.npy"), job.result("core.onnx")
    np.save(feed, crops)
    report = job.result("worker.json")
    core = cores.core_file(Path(job.work))
    command = [job.given, str(_WORKER), str(core), str(feed), method, str(quantised), str(report)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    print(done.stderr, file=sys.stderr)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise EnvironmentalError(f"ModelOpt ended with {done.returncode}: {lines[-1]}")
    feed.unlink()
    return _joined(job, quantised)


def _crops(job: Job, name: str) -> npt.NDArray[np.uint8]:
    return np.asarray(np.load(job.path(f"{name}.npy"), mmap_mode="r"))


class _Prepared:
    """Crops as NNCF reads them: one float batch of one at a time."""

    def __init__(self, job: Job, name: str, *, named: bool = False) -> None:
        self._crops = _crops(job, name)
        self._mean = cores.mean_of(_model(job))
        self._named = named
        self._first: dict[bytes, int] = {}

    def __iter__(self) -> Iterator[Any]:
        for batch in cores.batches_of(self._crops, self._mean):
            yield {cores.FIRST: batch} if self._named else batch

    def __len__(self) -> int:
        return len(self._crops)

    def index_of(self, batch: npt.NDArray[np.float32]) -> int:
        """The number of the crop that a batch was made of."""
        if not self._first:
            made = cores.batches_of(self._crops, self._mean)
            self._first = {b.tobytes(): i for i, b in enumerate(made)}
        return self._first[np.asarray(batch).tobytes()]


def _model(job: Job) -> Any:
    import onnx

    return onnx.load(str(job.path("fp32.onnx")))


def _joined(job: Job, core: Path) -> Made:
    import onnx

    path = job.result("model.onnx")
    path.write_bytes(graph_bytes(cores.joined(_model(job), onnx.load(str(core)))))
    return Made(str(path), (str(path),))


def _saved(job: Job, core: Any) -> Made:
    import openvino

    model = openvino.Core().read_model(job.path("fp32.onnx"))
    path = job.result("model.xml")
    # As in NNCF's own examples: biases and scales stay in FP32.
    openvino.save_model(cores.joined_openvino(model, core), path, compress_to_fp16=False)
    return Made(str(path), (str(path), str(path.with_suffix(".bin"))))


def _nncf() -> Any:
    return import_runtime("nncf", "NNCF", "install it with: pip install nncf")
