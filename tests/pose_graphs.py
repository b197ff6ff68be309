"""Networks that read the head pose from a photo's colour, so that their error is known."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from msgspec.structs import replace
from onnx import helper, numpy_helper

from edgehp.networks.graph import DIGEST_KEY, INPUT
from edgehp.networks.spec import KD_RESNET, SPEC_KEY

SPEC = replace(KD_RESNET, name="colour-reader").with_size(48)
_ZERO = 128.0


def colour_photo(angles, width: int = 90, height: int = 80) -> np.ndarray:
    """A photo whose red, green, blue are pitch, yaw, roll (whole degrees) + 128."""
    return np.full((height, width, 3), np.asarray(angles) + _ZERO, np.uint8)


def graph_of(text: str, constants: Mapping[str, npt.ArrayLike], opset: int = 17) -> onnx.ModelProto:
    """A model from ONNX's textual form, and its constants: float32, integers int64."""
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]> {text}')
    for name, value in constants.items():
        array = np.asarray(value)
        array = array.astype(np.int64 if array.dtype.kind == "i" else np.float32)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    return model


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
    model = graph_of(
        f"""
        reader (uint8[N, {size}, {size}, 3] {INPUT}) => (float[N, 3] angles, float[N, 3] spread) {{
            f = Cast <to = 1> ({INPUT})
            c = Sub (f, zero)
            m = ReduceMean <keepdims = 0> (c, axes)
            s = Mul (m, keep)
            angles = Add (s, shift)
            z = Mul (angles, nothing)
            spread = Add (z, wide)
        }}""",
        {
            "zero": _ZERO,
            "axes": [1, 2],
            "keep": float(constant is None),
            "shift": np.asarray(offset if constant is None else constant, np.float32),
            "nothing": 0.0,
            "wide": float(spread),
        },
        opset=18,
    )
    helper.set_model_props(model, {SPEC_KEY: spec.to_json(), DIGEST_KEY: spec.digest})
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    return path
