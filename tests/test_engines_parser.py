"""Graphs that the ONNX parser of a target's TensorRT does not take."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from edgehp.engines.trt import newest_opset, require_parsable
from edgehp.errors import CompatibilityError
from edgehp.pipeline.pipeline import build
from edgehp.pipeline.plan import BuildRequest
from tests.pose_graphs import pose_graph


@pytest.mark.parametrize(
    ("version", "opset"),
    [("8.6.2", 17), ("9.2", 19), ("10.3.0.30", 20), ("10.16.2.10", 24), ("11.5", 25)],
)
def test_newest_opset(version: str, opset: int) -> None:
    assert newest_opset(version) == opset


def test_operator_sets_and_element_types_are_refused(tmp_path: Path) -> None:
    model = onnx.load(pose_graph(tmp_path / "net.onnx"))
    with pytest.raises(CompatibilityError, match=r"set 18; TensorRT 8\.6 of orin reads at most 17"):
        require_parsable(model, "8.6", "orin")
    require_parsable(model, "10.3", "orin")
    cast = next(n for n in model.graph.node if n.op_type == "Cast")
    for name, version in (("BFLOAT16", "8.6"), ("INT4", "9.2"), ("UINT4", "11.5")):
        cast.attribute[0].i = onnx.TensorProto.DataType.Value(name)
        model.opset_import[0].version = 17
        with pytest.raises(CompatibilityError, match=f"holds {name}, which TensorRT {version}"):
            require_parsable(model, version, "orin")


def test_a_deferred_build_is_refused_before_its_work(tmp_path: Path) -> None:
    path = pose_graph(tmp_path / "net.onnx")
    model = onnx.load(path)
    model.opset_import[0].version = 25
    onnx.save(model, path)
    request = BuildRequest("orin-agx-64gb", network=str(path), output=tmp_path / "dist", defer=True)
    with pytest.raises(CompatibilityError, match=r"TensorRT 10\.16\.2\.10 of orin"):
        build(request)
    assert not list((tmp_path / "dist").glob("*"))
