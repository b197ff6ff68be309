"""A very small graph with the inputs and outputs of the deployed one, for fast builds."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SIZE = 32
CHANNELS = 16


def tiny_graph(kind: str = "fp32", seed: int = 0) -> bytes:
    """Two convolutions and a matrix product in ``fp32``, ``fp16`` or ``int8`` (FP16 around it)."""
    half = kind != "fp32"
    float_type = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    dtype = np.float16 if half else np.float32
    rng = np.random.default_rng(seed)
    constants: list[onnx.TensorProto] = []
    nodes: list[onnx.NodeProto] = []

    def constant(name: str, values: object, type_: type = dtype) -> str:
        constants.append(numpy_helper.from_array(np.asarray(values, type_), name))
        return name

    def node(op: str, name: str, inputs: list[str], **attributes: object) -> str:
        nodes.append(helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    def quantised(x: str) -> str:
        if kind != "int8":
            return x
        scale, zero = constant(f"{x}.s", 0.02), constant(f"{x}.z", 0, np.int8)
        return node(
            "DequantizeLinear",
            f"{x}.dq",
            [node("QuantizeLinear", f"{x}.q", [x, scale, zero]), scale, zero],
        )

    def conv(name: str, x: str, inputs: int) -> str:
        shape = (CHANNELS, inputs, 3, 3)
        if kind == "int8":
            weight = constant(f"{name}.w", rng.integers(-90, 90, shape), np.int8)
            scale = constant(f"{name}.ws", np.full(CHANNELS, 0.003))
            zero = constant(f"{name}.wz", np.zeros(CHANNELS), np.int8)
            w = node("DequantizeLinear", f"{name}.wdq", [weight, scale, zero], axis=0)
        else:
            w = constant(f"{name}.w", rng.normal(0, 0.2, shape))
        bias = constant(f"{name}.b", np.zeros(CHANNELS))
        return node("Conv", name, [quantised(x), w, bias], pads=[1] * 4, kernel_shape=[3, 3])

    x = node("Cast", "to_float", ["crops"], to=float_type)
    x = node("Transpose", "to_nchw", [x], perm=[0, 3, 1, 2])
    x = node("Mul", "normalised", [x, constant("factor", 1 / 255)])
    x = node("Relu", "relu1", [conv("conv1", x, 3)])
    x = node("Relu", "relu2", [conv("conv2", x, CHANNELS)])
    x = node("Flatten", "features", [node("GlobalAveragePool", "pool", [x])])
    weight = constant("heads.w", rng.normal(0, 3, (CHANNELS, 3)))
    x = node("Gemm", "heads", [x, weight, constant("heads.b", np.zeros(3))])
    x = node("Cast", "logits", [x], to=TensorProto.FLOAT)
    node("Identity", "angles", [x])
    node("Softplus", "spread", [x])
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "tiny",
        [value("crops", TensorProto.UINT8, ["batch", SIZE, SIZE, 3])],
        [value(n, TensorProto.FLOAT, ["batch", 3]) for n in ("angles", "spread")],
        constants,
    )
    opsets = [helper.make_opsetid("", 19)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()
