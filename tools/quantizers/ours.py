"""The rows of edgehp itself."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import numpy as np

from edgehp.networks.graph import graph_bytes
from edgehp.quantization.quantize import QuantizationConfig, quantize
from quantizers.job import Job, Made

if TYPE_CHECKING:
    pass

__all__ = ["default", "float32"]

_BODY = {"cpu": "fp32", "tensorrt": "fp16"}


def float32(job: Job) -> Made:
    """The deployed float graph as it is."""
    path = shutil.copyfile(job.path("fp32.onnx"), job.result("model.onnx"))
    return Made(str(path), (str(path),))


def default(job: Job, flavor: str) -> Made:
    """``edgehp build`` without options: ranges and rounding chosen by error."""
    import onnx

    crops = list(np.load(job.path("calibration.npy"), mmap_mode="r"))
    config = QuantizationConfig(flavor, body=_BODY[flavor], threads=job.threads)
    found = quantize(onnx.load(str(job.path("fp32.onnx"))), crops, config)
    path = job.result("model.onnx")
    path.write_bytes(graph_bytes(found.model))
    note = f"{found.recipe}, held-back difference {found.difference.angles:.3f}"
    return Made(str(path), (str(path),), note=note)
