"""Makes the tiny INT8 graph of ``edgehp doctor --test``: ``python -m tests.selftest_graph``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

PATH = Path(__file__).resolve().parent.parent / "edgehp/doctor/selftest.onnx"
SIZE, CHANNELS = 32, 16


def selftest_graph() -> onnx.ModelProto:
    """Two INT8 convolutions with ReLU, global pooling, and a matrix product to six numbers.

    The weights have seven bits: AVX2 adds two products in 16 bits, which eight would overflow.
    """
    rng = np.random.default_rng(1)
    constants: dict[str, np.ndarray] = {
        "scale255": np.float32(1 / 255),
        "zero": np.int8(0),
        "x_scale": np.float32(1 / 127),
        "y_scale": np.float32(2 / 127),
        "w1": rng.integers(-63, 64, (CHANNELS, 3, 3, 3)).astype(np.int8),
        "w1_scale": np.full(CHANNELS, 0.2 / 63, np.float32),
        "w2": rng.integers(-63, 64, (CHANNELS, CHANNELS, 3, 3)).astype(np.int8),
        "w2_scale": np.full(CHANNELS, 0.1 / 63, np.float32),
        "zeros": np.zeros(CHANNELS, np.int8),
        "fc": rng.normal(0, 40, (CHANNELS, 6)).astype(np.float32),
        "three": np.array([3, 3], np.int64),
    }
    n = helper.make_node
    nodes = [
        n("Cast", ["crops"], ["f"], to=TensorProto.FLOAT),
        n("Transpose", ["f"], ["t"], perm=[0, 3, 1, 2]),
        n("Mul", ["t", "scale255"], ["x"]),
        n("QuantizeLinear", ["x", "x_scale", "zero"], ["xq"]),
        n("DequantizeLinear", ["xq", "x_scale", "zero"], ["xd"]),
        n("DequantizeLinear", ["w1", "w1_scale", "zeros"], ["w1d"], axis=0),
        n("Conv", ["xd", "w1d"], ["c1"], "conv1", pads=[1, 1, 1, 1], strides=[2, 2]),
        n("Relu", ["c1"], ["r1"]),
        n("QuantizeLinear", ["r1", "y_scale", "zero"], ["yq"]),
        n("DequantizeLinear", ["yq", "y_scale", "zero"], ["yd"]),
        n("DequantizeLinear", ["w2", "w2_scale", "zeros"], ["w2d"], axis=0),
        n("Conv", ["yd", "w2d"], ["c2"], "conv2", pads=[1, 1, 1, 1]),
        n("Relu", ["c2"], ["r2"]),
        n("GlobalAveragePool", ["r2"], ["g"]),
        n("Flatten", ["g"], ["flat"]),
        n("MatMul", ["flat", "fc"], ["six"]),
        n("Split", ["six", "three"], ["angles", "spread"], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "edgehp-selftest",
        [helper.make_tensor_value_info("crops", TensorProto.UINT8, ["N", SIZE, SIZE, 3])],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 3])
            for name in ("angles", "spread")
        ],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


if __name__ == "__main__":
    PATH.write_bytes(selftest_graph().SerializeToString())
