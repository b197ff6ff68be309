"""Small labelled photos whose pose can be read off the picture, and teachers that do so."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import onnx
from onnx import TensorProto, helper

from edgehp.datasets.base import Dataset
from edgehp.datasets.faces import read_faces
from edgehp.pose import matrix_from_euler

SIZE = 48


def draw_face(angles: np.ndarray) -> np.ndarray:
    """uint8 RGB [48, 48, 3]: the mean of R, G and B stands for pitch, yaw and roll.

    A channel's mean level is 128 + angle. A gradient makes shifts of the box visible.
    """
    photo = np.zeros((SIZE, SIZE, 3), np.float32) + 128 + np.asarray(angles, np.float32)
    photo += np.linspace(-6, 6, SIZE, dtype=np.float32)[None, :, None]
    return np.clip(np.round(photo), 0, 255).astype(np.uint8)


def write_faces(
    folder: Path, count: int, rng: np.random.Generator, labelled: bool = True
) -> Dataset:
    """`count` lossless faces of random pose within +-60 degrees, as a folder data set."""
    folder.mkdir(parents=True, exist_ok=True)
    header = "image,width,height,x_min,y_min,x_max,y_max"
    names = [f"r{i}{j}" for i in range(3) for j in range(3)]
    lines = [",".join([header, "pitch,yaw,roll", *names]) if labelled else header]
    for i in range(count):
        angles = rng.uniform(-60, 60, 3)
        name = f"{i:05d}.png"
        cv2.imwrite(str(folder / name), draw_face(angles)[..., ::-1])
        row = [f"{folder.name}/{name}", SIZE, SIZE, 8, 8, 40, 40]
        if labelled:
            row += [f"{v:.6f}" for v in (*angles, *matrix_from_euler(angles).ravel())]
        lines.append(",".join(map(str, row)))
    (folder / "boxes.csv").write_text("\n".join(lines) + "\n")
    return read_faces(folder)


def mean_colour_teacher(path: Path, size: int = 16, offset: tuple[float, ...] = (0, 0, 0)) -> None:
    """An ONNX network [N, 3, size, size] -> [N, 3]: the channels' means plus `offset`."""
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMean", ["x"], ["mean"], axes=[2, 3], keepdims=0),
            helper.make_node("Add", ["mean", "offset"], ["angles"]),
        ],
        "teacher",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, size, size])],
        [helper.make_tensor_value_info("angles", TensorProto.FLOAT, ["n", 3])],
        [helper.make_tensor("offset", TensorProto.FLOAT, [3], offset)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(path))


def teacher_toml(
    folder: Path,
    name: str = "colour",
    *,
    offset: tuple[float, ...] = (0, 0, 0),
    colour: str = "RGB",
    order: str = '["pitch", "yaw", "roll"]',
    convention: str = "aflw2000",
    more: str = "",
) -> Path:
    """A description of `mean_colour_teacher`, written with its network into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    mean_colour_teacher(folder / f"{name}.onnx", offset=offset)
    path = folder / f"{name}.toml"
    path.write_text(
        f"""
name = "{name}"
files = ["{name}.onnx"]
[input]
size = 16
colour = "{colour}"
mean = [128, 128, 128]
std = [1, 1, 1]
[output]
kind = "euler"
order = {order}
convention = "{convention}"
{more}
"""
    )
    return path
