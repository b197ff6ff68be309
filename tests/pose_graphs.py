"""Networks that read the head pose from a photo's colour, so that their error is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from msgspec.structs import replace
from onnx import TensorProto, helper, numpy_helper

from edgehp.networks.graph import DIGEST_KEY, INPUT
from edgehp.networks.spec import KD_RESNET, SPEC_KEY

SPEC = replace(KD_RESNET, name="colour-reader").with_size(48)
_ZERO = 128.0


def colour_photo(angles, width: int = 90, height: int = 80) -> np.ndarray:
    """A photo whose red, green, blue are pitch, yaw, roll (whole degrees) + 128."""
    return np.full((height, width, 3), np.asarray(angles) + _ZERO, np.uint8)


def pose_graph(
    path: Path,
    *,
    offset=(0.0, 0.0, 0.0),
    constant=None,
    spread: float = 2.0,
    size: int = SPEC.preprocessing.size,
) -> Path:
    """A deployed graph: the mean colour is the pose, then `offset`.

    Args:
        path: where to write it.
        offset: the network's error in degrees.
        constant: answer this whatever the photo shows.
        spread: of every angle.
        size: input size.
    """
    spec = SPEC.with_size(size)
    shift = np.asarray(offset if constant is None else constant, np.float32)
    constants = {
        "zero": np.float32(_ZERO),
        "axes": np.array([1, 2], np.int64),
        "keep": np.float32(constant is None),
        "shift": shift,
        "nothing": np.float32(0),
        "wide": np.float32(spread),
    }
    n = helper.make_node
    nodes = [
        n("Cast", [INPUT], ["f"], to=TensorProto.FLOAT),
        n("Sub", ["f", "zero"], ["c"]),
        n("ReduceMean", ["c", "axes"], ["m"], keepdims=0),
        n("Mul", ["m", "keep"], ["s"]),
        n("Add", ["s", "shift"], ["angles"]),
        n("Mul", ["angles", "nothing"], ["z"]),
        n("Add", ["z", "wide"], ["spread"]),
    ]
    graph = helper.make_graph(
        nodes,
        "colour-reader",
        [helper.make_tensor_value_info(INPUT, TensorProto.UINT8, ["N", size, size, 3])],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 3])
            for name in ("angles", "spread")
        ],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    helper.set_model_props(model, {SPEC_KEY: spec.to_json(), DIGEST_KEY: spec.digest})
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    return path
