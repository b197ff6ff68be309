"""The rows of edgehp itself."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from edgehp.errors import DataError
from edgehp.networks.graph import graph_bytes
from edgehp.quantization.graphview import GraphView
from edgehp.quantization.latency import LatencyModel, counted_latency, roofline_latency
from edgehp.quantization.placement import quantisable_layers
from edgehp.quantization.quantise import QuantisedModel, emit, quantise
from edgehp.quantization.search import NotReachedError, SearchResult, search
from edgehp.quantization.select import Judge
from edgehp.quantization.sensitivity import measure_sensitivity
from edgehp.targets import load_target
from quantizers.job import Job, Made

if TYPE_CHECKING:
    import onnx

__all__ = ["controlled", "default", "float32"]

# Ranking layers needs fewer crops than measuring an assignment.
_RANKING = 64
_BODY = {"cpu": "fp32", "tensorrt": "fp16"}
# Whose peaks price the layers of the tensorrt flavour.
_BOARD = "orin-nx-16gb"


def float32(job: Job) -> Made:
    """The deployed float graph as it is."""
    path = shutil.copyfile(job.path("fp32.onnx"), job.result("model.onnx"))
    return Made(str(path), (str(path),))


def default(job: Job, flavour: str) -> Made:
    """``edgehp build`` without options: calibration method and corrections chosen by error."""
    found = _quantised(job, flavour)
    note = f"{found.chosen}, held-back difference {found.difference.angles:.3f}"
    return _written(job, found.model, note)


def controlled(job: Job, flavour: str) -> Made:
    """The fastest mixed precision whose difference to FP32 on the control crops fits."""
    found = _quantised(job, flavour)
    control = list(np.load(job.path("control.npy"), mmap_mode="r"))
    model = _model(job)
    judge = Judge(model, control, threads=job.threads)
    ranking = Judge(model, control[:_RANKING], threads=job.threads)
    emitter = partial(emit, found.source, found.source_table, flavour=flavour, body=_BODY[flavour])
    view = GraphView(found.source)
    layers = quantisable_layers(view, flavour)
    sensitivity = measure_sensitivity(emitter, found.recipe, layers, ranking)
    prices = _prices(flavour, found, layers, job.threads)

    def drop(kept: frozenset[str]) -> float:
        recipe = replace(found.recipe, keep_float=found.recipe.keep_float | kept)
        return judge(emitter(recipe)).angles

    try:
        result = search(drop, sensitivity, prices.integer_ms, prices.float_ms, max_drop=job.budget)
        reached = f"reached {result.drop:.3f} <= {job.budget:g}"
    except NotReachedError as e:
        result = e.best
        reached = f"{job.budget:g} not reached, best {result.drop:.3f}"
    recipe = replace(found.recipe, keep_float=found.recipe.keep_float | set(result.keep_float))
    note = f"{reached}; {_kept(result, len(layers))}; prices: {prices.source}"
    return _written(job, emitter(recipe), note)


def _kept(result: SearchResult, total: int) -> str:
    if not result.keep_float:
        return f"all {total} layers in INT8"
    names = ", ".join(result.keep_float[:6]) + (", ..." if len(result.keep_float) > 6 else "")
    return f"{len(result.keep_float)} of {total} layers in floating point: {names}"


def _quantised(job: Job, flavour: str) -> QuantisedModel:
    crops = list(np.load(job.path("calibration.npy"), mmap_mode="r"))
    found = quantise(_model(job), crops, flavour=flavour, body=_BODY[flavour], threads=job.threads)
    if found.findings:
        raise DataError(f"the lint finds {found.findings[0].rule}: {found.findings[0].message}")
    return found


def _model(job: Job) -> onnx.ModelProto:
    import onnx

    return onnx.load(str(job.path("fp32.onnx")))


def _written(job: Job, model: onnx.ModelProto, note: str) -> Made:
    path = job.result("model.onnx")
    path.write_bytes(graph_bytes(model))
    return Made(str(path), (str(path),), note=note)


def _prices(
    flavour: str, found: QuantisedModel, layers: tuple[str, ...], threads: int
) -> LatencyModel:
    """The processor is measured; a GPU that is not here is what its peaks say."""
    if flavour == "cpu":
        return counted_latency(found.source, found.model, layers, threads=threads)
    target = load_target(_BOARD)
    peaks = target.power_modes[0]
    bandwidth = peaks.bandwidth_gb_s
    return roofline_latency(
        found.source,
        layers,
        integer_ops_per_s=peaks.int8_tops * 1e12,
        float_ops_per_s=peaks.fp16_tflops * 1e12,
        bytes_per_s=None if bandwidth is None else bandwidth * 1e9,
        float_bytes=2,
        batch=1,
        source=f"roofline of {target.name}, {peaks.name}",
    )
