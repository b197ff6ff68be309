"""The rows of the table: what each is called and how it is made.

Other quantizers get the float core (`quantizers.cores`), the same crops and every crop of them,
with the settings that their own documentation recommends.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from edgehp.engines.base import import_runtime
from edgehp.errors import EnvironmentalError
from edgehp.networks.graph import graph_bytes
from edgehp.quantization.quantize import QuantizationConfig, quantize
from quantizers import cores

# The float core of a comparison, in its folder.
CORE = "core.onnx"
FP32 = "fp32"
_BODY = {"cpu": "fp32", "tensorrt": "fp16"}
# NNCF divides by the metric of FP32, whose difference to itself is 0.
_PERFECT = 100.0
_WORKER = Path(__file__).with_name("modelopt_worker.py")


@dataclass(frozen=True)
class Job:
    """One row to quantise.

    Attributes:
        row: key of `quantizers.rows.ROWS`.
        work: folder with ``fp32.onnx``, ``core.onnx``, ``calibration.npy`` and ``control.npy``.
        out: folder for the result.
        threads: processor threads, where a tool lets itself be told.
        budget: degrees of mean |angle difference| to FP32 that controlled precision may reach.
        given: the interpreter of a row that needs its own.
    """

    row: str
    work: str
    out: str
    threads: int
    budget: float
    given: str = ""

    def path(self, name: str) -> Path:
        """A file of the comparison."""
        return Path(self.work) / name

    def result(self, name: str) -> Path:
        """A file of this row."""
        return Path(self.out) / name


@dataclass(frozen=True)
class Made:
    """A quantised network.

    Attributes:
        file: what OpenVINO reads.
        megabytes: of all files that have to be shipped.
        note: what is worth knowing of the settings or the result.
        seconds: of quantising, without loading packages and crops.
        peak_mib: most memory the process held, packages and crops included.
    """

    file: str
    megabytes: float
    note: str = ""
    seconds: float = 0.0
    peak_mib: float = 0.0

    @classmethod
    def of(cls, *files: Path, note: str = "") -> Made:
        """Of its files, the one that is opened first."""
        return cls(str(files[0]), sum(f.stat().st_size for f in files) / 1e6, note)


@dataclass(frozen=True)
class Row:
    """A way to quantise.

    Attributes:
        title: in the table.
        make: does it.
        packages: imported before the clock starts.
    """

    title: str
    make: Callable[[Job], Made]
    packages: tuple[str, ...] = ()


def float32(job: Job) -> Made:
    """The deployed float graph as it is."""
    return Made.of(shutil.copyfile(job.path("fp32.onnx"), job.result("model.onnx")))


def default(job: Job, flavor: str) -> Made:
    """``edgehp build`` without options: ranges and rounding chosen by error."""
    import onnx

    crops = list(np.load(job.path("calibration.npy"), mmap_mode="r"))
    config = QuantizationConfig(flavor, body=_BODY[flavor], threads=job.threads)
    found = quantize(onnx.load(str(job.path("fp32.onnx"))), crops, config)
    path = job.result("model.onnx")
    path.write_bytes(graph_bytes(found.model))
    note = f"{found.recipe}, held-back difference {found.difference.angles:.3f}"
    return Made.of(path, note=note)


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
    preprocess(str(job.path(CORE)), str(prepared))
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
    core = openvino.Core().read_model(job.path(CORE))
    crops = _Prepared(job, "calibration")
    made = nncf.quantize(core, nncf.Dataset(crops), subset_size=len(crops))
    return _saved(job, made)


def nncf_onnx(job: Job) -> Made:
    """``nncf.quantize`` of the ONNX model, for runtimes other than OpenVINO."""
    import onnx

    nncf = _nncf()
    crops = _Prepared(job, "calibration", named=True)
    core = onnx.load(str(job.path(CORE)))
    made = nncf.quantize(core, nncf.Dataset(crops), subset_size=len(crops))
    path = job.result("core.onnx")
    onnx.save(made, str(path))
    return _joined(job, path)


def nncf_controlled(job: Job) -> Made:
    """``nncf.quantize_with_accuracy_control``, with the control crops and the budget of edgehp."""
    import openvino

    nncf, model = _nncf(), _model(job)
    runtime = openvino.Core()
    core = runtime.read_model(job.path(CORE))
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
    core = job.path(CORE)
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
    return Made.of(path)


def _saved(job: Job, core: Any) -> Made:
    import openvino

    model = openvino.Core().read_model(job.path("fp32.onnx"))
    path = job.result("model.xml")
    # As in NNCF's own examples: biases and scales stay in FP32.
    openvino.save_model(cores.joined_openvino(model, core), path, compress_to_fp16=False)
    return Made.of(path, path.with_suffix(".bin"))


def _nncf() -> Any:
    return import_runtime("nncf", "NNCF", "install it with: pip install nncf")


_OURS = ("onnx", "onnxruntime", "openvino")
_ORT = ("onnx", "onnxruntime.quantization")
_NNCF = ("onnx", "openvino", "nncf")


ROWS: Mapping[str, Row] = MappingProxyType(
    {
        FP32: Row("FP32", float32, ("onnx",)),
        "edgehp-default-cpu": Row("edgehp default, cpu", partial(default, flavor="cpu"), _OURS),
        "edgehp-default-tensorrt": Row(
            "edgehp default, tensorrt", partial(default, flavor="tensorrt"), _OURS
        ),
        "ort-minmax": Row(
            "onnxruntime min-max", partial(onnxruntime_static, method="MinMax"), _ORT
        ),
        "ort-entropy": Row(
            "onnxruntime entropy", partial(onnxruntime_static, method="Entropy"), _ORT
        ),
        "ort-minmax-s8": Row(
            "onnxruntime min-max, symmetric int8",
            partial(onnxruntime_static, method="MinMax", symmetric=True),
            _ORT,
        ),
        "nncf-default": Row("NNCF default", nncf_default, _NNCF),
        "nncf-controlled": Row("NNCF accuracy-controlled", nncf_controlled, _NNCF),
        "nncf-onnx": Row("NNCF default, of the ONNX model", nncf_onnx, _NNCF),
        "modelopt-max": Row("ModelOpt max", partial(modelopt, method="max")),
        "modelopt-entropy": Row("ModelOpt entropy", partial(modelopt, method="entropy")),
    }
)
