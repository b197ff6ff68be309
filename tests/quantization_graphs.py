"""A small network with everything that the quantization has rules for, built in milliseconds."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

SIZE = 16
BINS = 12


class Draft:
    """Nodes and constants of a graph, added one by one; every node is called as its output."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, name: str, values: npt.ArrayLike, kind: type = np.float32) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(values, kind), name))
        return name

    def node(self, kind: str, name: str, *inputs: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def normalised(self) -> str:
        """The crops as [N, 3, S, S], about zero."""
        x = self.node("Cast", "to_float", "crops", to=TensorProto.FLOAT)
        x = self.node("Transpose", "to_nchw", x, perm=[0, 3, 1, 2])
        x = self.node("Sub", "centred", x, self.constant("mean", np.full((1, 3, 1, 1), 120.0)))
        factor = self.constant("factor", np.full((1, 3, 1, 1), 1 / 58))
        return self.node("Mul", "normalised", x, factor)

    def model(self, *outputs: str, opset: int = 17) -> onnx.ModelProto:
        """The graph from crops of `SIZE` pixels to these outputs, [N, 3] each."""
        opsets = [helper.make_opsetid("", opset)]
        crops = helper.make_tensor_value_info("crops", TensorProto.UINT8, ["batch", SIZE, SIZE, 3])
        found = [helper.make_tensor_value_info(o, TensorProto.FLOAT, ["batch", 3]) for o in outputs]
        graph = helper.make_graph(self.nodes, "small", [crops], found, self.constants)
        return helper.make_model(
            graph, opset_imports=opsets, ir_version=helper.find_min_ir_version_for(opsets)
        )


def small_network(seed: int = 0, opset: int = 17) -> onnx.ModelProto:
    """Stem, an identity block, a downsampling block, pooling, head, decode: 16 and 32 channels."""
    rng = np.random.default_rng(seed)
    draft = Draft()
    node, constant = draft.node, draft.constant

    def conv(name: str, x: str, cin: int, cout: int, k: int, stride: int = 1) -> str:
        w = rng.normal(0, np.sqrt(2 / (cin * k * k)), (cout, cin, k, k))
        inputs = [constant(f"{name}.weight", w), constant(f"{name}.bias", rng.normal(0, 0.2, cout))]
        return node(
            "Conv", name, x, *inputs, kernel_shape=[k, k], strides=[stride] * 2, pads=[k // 2] * 4
        )

    x = node("Relu", "relu", conv("conv1", draft.normalised(), 3, 16, 3, 2))
    x = node("MaxPool", "maxpool", x, kernel_shape=[3, 3], strides=[1, 1], pads=[1] * 4)
    for block, cin, cout in (("a", 16, 16), ("b", 16, 32)):
        stride = 1 if cin == cout else 2
        y = node("Relu", f"{block}.relu1", conv(f"{block}.conv1", x, cin, cout, 3, stride))
        y = conv(f"{block}.conv2", y, cout, cout, 3)
        skip = x if cin == cout else conv(f"{block}.downsample", x, cin, cout, 1, stride)
        x = node("Relu", f"{block}.relu", node("Add", f"{block}.add", y, skip))
    x = node("Flatten", "features", node("GlobalAveragePool", "avgpool", x), axis=1)
    w = constant("heads.weight", rng.normal(0, 0.4, (3 * BINS, 32)))
    x = node("Gemm", "heads", x, w, constant("heads.bias", np.zeros(3 * BINS)), transB=1)
    x = node("Reshape", "logits", x, constant("shape", [0, 3, BINS], np.int64))
    p = node("Softmax", "probabilities", x, axis=2)
    values = constant("bins", np.linspace(-90, 90, BINS).reshape(1, 1, -1))
    axis = constant("axis", [2], np.int64)
    mean = node("ReduceSum", "expectation", node("Mul", "weighted", p, values), axis, keepdims=1)
    d = node("Sub", "deviation", values, mean)
    square = node("Mul", "deviation.squared", node("Mul", "deviation.weighted", p, d), d)
    node("Squeeze", "angles", mean, axis)
    node("Sqrt", "spread", node("ReduceSum", "variance", square, axis, keepdims=0))
    return draft.model("angles", "spread", opset=opset)


def node_of(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(n for n in model.graph.node if n.name == name)


def constant_of(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(t for t in model.graph.initializer if t.name == name)


def set_constant(model: onnx.ModelProto, name: str, values: npt.NDArray[np.generic]) -> None:
    constant_of(model, name).CopyFrom(numpy_helper.from_array(np.asarray(values), name))


def parse_rtx(model: onnx.ModelProto) -> tuple[Any, Any]:
    """The module tensorrt_rtx and the network that it parses; a refusal fails the test."""
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu13 is not installed")
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    net = builder.create_network()
    parser = trt.OnnxParser(net, trt.Logger(trt.Logger.ERROR))
    assert parser.parse(model.SerializeToString()), [
        parser.get_error(i).desc() for i in range(parser.num_errors)
    ]
    _KEPT.append((builder, parser))
    return trt, net


# A network is gone with its builder and parser.
_KEPT: list[Any] = []


def rtx_plan(model: onnx.ModelProto) -> int:
    """Size in bytes of the engine that TensorRT-RTX builds; a refusal fails the test."""
    trt, net = parse_rtx(model)
    builder = _KEPT[-1][0]
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    size = model.graph.input[0].type.tensor_type.shape.dim[1].dim_value
    shapes = [(b, size, size, 3) for b in (1, 4, 8)]
    assert profile.set_shape("crops", *shapes) is not False
    config.add_optimization_profile(profile)
    config.num_compute_capabilities = 1
    assert config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    plan = builder.build_serialized_network(net, config)
    assert plan is not None
    return int(plan.nbytes)
