"""The rows of the table: what each is called and how it is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

from quantizers import ours, peers
from quantizers.job import Job, Made

__all__ = ["FP32", "ROWS", "Row"]

FP32 = "fp32"


@dataclass(frozen=True)
class Row:
    """A way to quantise.

    Attributes:
        title: in the table.
        make: does it.
        packages: imported before the clock starts.
        group: ``"edgehp"``, ``"peer"`` or ``"reference"``.
    """

    title: str
    make: Callable[[Job], Made]
    packages: tuple[str, ...]
    group: str


_OURS = ("onnx", "onnxruntime", "openvino")
_ORT = ("onnx", "onnxruntime.quantization")
_NNCF = ("onnx", "openvino", "nncf")


def _edgehp(what: str, make: Callable[..., Made]) -> dict[str, Row]:
    return {
        f"edgehp-{what}-{f}": Row(
            f"edgehp {what}, {f}",
            partial(make, flavor=f),
            _OURS,
            "edgehp",
        )
        for f in ("cpu", "tensorrt")
    }


ROWS: Mapping[str, Row] = MappingProxyType(
    {
        FP32: Row("FP32", ours.float32, ("onnx",), "reference"),
        **_edgehp("default", ours.default),
        "ort-minmax": Row(
            "onnxruntime min-max", partial(peers.onnxruntime_static, method="MinMax"), _ORT, "peer"
        ),
        "ort-entropy": Row(
            "onnxruntime entropy", partial(peers.onnxruntime_static, method="Entropy"), _ORT, "peer"
        ),
        "ort-minmax-s8": Row(
            "onnxruntime min-max, symmetric int8",
            partial(peers.onnxruntime_static, method="MinMax", symmetric=True),
            _ORT,
            "peer",
        ),
        "nncf-default": Row("NNCF default", peers.nncf_default, _NNCF, "peer"),
        "nncf-controlled": Row("NNCF accuracy-controlled", peers.nncf_controlled, _NNCF, "peer"),
        "nncf-onnx": Row("NNCF default, of the ONNX model", peers.nncf_onnx, _NNCF, "peer"),
        "modelopt-max": Row("ModelOpt max", partial(peers.modelopt, method="max"), (), "peer"),
        "modelopt-entropy": Row(
            "ModelOpt entropy", partial(peers.modelopt, method="entropy"), (), "peer"
        ),
    }
)
