"""Mutated inputs, read in a process of their own: ``python -m tests.mutations SEED FIRST LAST``.

Every mutant is a photo, film, list, zip, `.mat`, ONNX file or description with something wrong in
it: bytes changed, cut off, doubled or swapped. It is read as its command would read it. Refusing it
with an `EdgehpError` and reading it are both right; everything else is printed and ends the process
with 1. A reader that hangs ends it too, and a crash ends it by itself.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import random
import resource
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import onnx

from edgehp.benchmark.host import peak_memory_mib
from edgehp.datasets import open_dataset
from edgehp.datasets.faces import read_faces
from edgehp.errors import EdgehpError
from edgehp.images import decode_photo
from edgehp.networks.description import load_description
from edgehp.networks.graph import load_graph
from edgehp.remote.boards import read_boards
from edgehp.report.gather import read_report
from edgehp.runtime.settings import load_settings
from edgehp.runtime.sources import parse_source
from edgehp.training.labelling import Teacher, read_labels
from tests.dataset_trees import encoded, photo, write, zip_of
from tests.pose_graphs import pose_graph

Read = Callable[[Path], object]
# Seconds that reading one mutant may take on a busy machine, and bytes that all of it may hold.
PATIENCE, MEMORY = 60.0, 2 * 2**30
TEACHER = """name = "small"
files = ["net.onnx"]
weight = 2.0
[input]
name = "img"
size = 64
mean = [123.675, 116.28, 103.53]
std = [58.395, 57.12, 57.375]
[output]
kind = "euler"
order = ["yaw", "pitch", "roll"]
[grid]
size = 3
step = 0.05
"""


def photos(folder: Path) -> None:
    """All photos of the folder, as `predict` and as calibration read them."""
    for frame in parse_source(str(folder)).frames():
        assert frame.photo is not None or frame.problem
    for sample in read_faces(folder).samples:
        sample.load()


def film(folder: Path) -> None:
    """Up to 200 frames of the one film of the folder."""
    (path,) = folder.iterdir()
    for i, _ in enumerate(parse_source(str(path)).frames()):
        if i == 200:
            break


def faces(folder: Path) -> None:
    """A folder or zip of faces with a list."""
    (path,) = folder.iterdir()
    for sample in read_faces(path).samples:
        sample.load()


def teacher(folder: Path) -> None:
    """A description with its network, asked for one photo."""
    pixels = photo(96, 96)
    Teacher(load_description(folder / "t.toml")).rotations(pixels, None)


def make(kind: str, folder: Path) -> tuple[Path, Read]:
    """A good input of a kind in an empty folder: the file to mutate, and what reads the folder."""
    name, _, suffix = kind.partition(".")
    if name in ("photo", "deep"):
        pixels = photo()
        if name == "deep":
            data = cv2.imencode(f".{suffix}", pixels[..., 0].astype(np.uint16) << 8)[1].tobytes()
        else:
            data = encoded(pixels, f".{suffix}")
        return write(folder / f"a.{suffix}", data), photos
    if name == "film":
        path = folder / f"a.{suffix}"
        codec = cv2.VideoWriter.fourcc(*("MJPG" if suffix == "avi" else "mp4v"))
        film_ = cv2.VideoWriter(str(path), codec, 25, (64, 48))
        for i in range(12):
            film_.write(np.roll(photo(), i, axis=1))
        film_.release()
        return path, film
    if kind == "faces.csv":
        write(folder / "f" / "b.jpg")
        rows = "f/b.jpg,64,48,1,2,31,42,1,-2.5,3\n"
        header = "image,width,height,x_min,y_min,x_max,y_max,pitch,yaw,roll\n"
        return write(folder / "f" / "boxes.csv", header + rows), faces
    if kind == "faces.zip":
        members = {"f/b.jpg": encoded(), "f/boxes.csv": "image,x,y,w,h\nb.jpg,4,4,30,30\n"}
        return zip_of(folder / "a.zip", members), faces
    if kind in ("aflw2000.json", "aflw2000.mat"):
        from scipy.io import savemat

        write(folder / "image00002.jpg")
        values = {"Pose_Para": np.full((1, 7), 0.2), "pt2d": np.array([[9.0, 50], [5, 40]])}
        savemat(folder / "image00002.mat", values, do_compression=True)
        if suffix == "mat":
            return folder / "image00002.mat", lambda f: open_dataset("aflw2000", f)
        listed = {"image00002.jpg": [{"bbox": [4, 5, 50, 45.5], "type": "test", "faceid": 7}]}
        path = write(folder / "boxes.json", json.dumps(listed))
        return path, lambda f: open_dataset("aflw2000", f)
    if kind == "labels.csv":
        columns = ["image", "pitch", "yaw", "roll", *(f"r{i}{j}" for i in (0, 1, 2) for j in "012")]
        numbers = "0,0,0,1,0,0,0,1,0,0,0,1,0.5"
        text = f"{','.join(columns)},spread\na.jpg,{numbers}\nb.jpg,{numbers}\n"
        return write(folder / "labels.csv", text), lambda f: read_labels([f])
    if kind == "hosts.txt":
        text = "orin\nme@xavier ~/venv/bin/edgehp  # the old one\nssh://a@b:22\n"
        return write(folder / "hosts", text), lambda f: read_boards(f / "hosts")
    if kind == "run.toml":
        text = "[capture]\nstale = 0.5\nrotate = 90\nbit_depth = 10\n[filter]\nbeta = 0.2\n"
        return write(folder / "run.toml", text), lambda f: load_settings(f / "run.toml")
    if kind == "report.json":
        from tests.test_report import validation_report

        text = json.dumps(validation_report().to_dict())
        return write(folder / "r.json", text), lambda f: read_report(f / "r.json")
    if kind == "graph.onnx":
        return pose_graph(folder / "g.onnx"), lambda f: load_graph(f / "g.onnx")
    small_network(folder / "net.onnx")
    write(folder / "t.toml", TEACHER)
    return folder / ("t.toml" if kind == "teacher.toml" else "net.onnx"), teacher


def small_network(path: Path) -> None:
    """An image [N, 3, 64, 64] to three angles."""
    helper, nh = onnx.helper, onnx.numpy_helper
    nodes = [
        helper.make_node("GlobalAveragePool", ["img"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("MatMul", ["f", "w"], ["angles"]),
    ]
    kind = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("img", kind, ["N", 3, 64, 64])],
        [helper.make_tensor_value_info("angles", kind, ["N", 3])],
        [nh.from_array(np.eye(3, dtype=np.float32), "w")],
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), str(path))


KINDS = (
    "photo.jpg", "film.avi", "faces.csv", "graph.onnx", "photo.png", "faces.zip", "teacher.toml",
    "photo.tiff", "film.mp4", "aflw2000.json", "teacher.onnx", "photo.webp", "aflw2000.mat",
    "deep.png", "film.mkv", "labels.csv", "hosts.txt", "deep.tiff", "run.toml", "report.json",
)  # fmt: skip
_TEXT = (".csv", ".json", ".toml", "")
_JUNK = (
    b"\xff\xfe", b"\xef\xbb\xbf", b"\0", b"\xe9", b"nan", b"-1", b"1e999", b'"', b";", b"\r", b"{",
    b"[" * 500, b"0" * 400, b"../", b"\n", b",", b"9" * 19, b"", b"true", b"\xff\xd9", b"0.001",
)  # fmt: skip


def mutate(data: bytes, text: bool, rng: random.Random) -> bytes:
    """One or two changes somewhere in `data`."""
    for _ in range(rng.choice((1, 1, 2))):
        at = rng.randrange(len(data) + 1)
        # Headers decide more than what follows.
        at = min(at, rng.randrange(256)) if rng.random() < 0.3 else at
        length = min(len(data) - at, rng.choice((1, 1, 4, 16, 300)))
        how = rng.randrange(7)
        if how == 0:
            data = data[:at] + rng.choice(_JUNK) + data[at:]
        elif how == 1:
            data = data[:at] + rng.choice(_JUNK) + data[at + length :]
        elif how == 2:
            data = data[:at]
        elif how == 3:
            data = data[:at] + data[at : at + length] * rng.randrange(2, 5) + data[at + length :]
        elif how == 4:
            data = data[:at] + data[at + length :]
        elif text:
            lines = data.splitlines(keepends=True)
            rng.shuffle(lines)
            data = b"".join(lines[: rng.randrange(len(lines) + 1)]) if how == 5 else data.upper()
        else:
            data = data[:at] + rng.randbytes(length) + data[at + length :]
    return data


def run(seed: int, first: int, last: int) -> tuple[int, int]:
    """Read the mutants from `first` to before `last`; how many were refused, and how many failed.

    What a reader raises that is no EdgehpError is a failure, and printed.
    """
    refused = failed = 0
    for number in range(first, last):
        kind = KINDS[number % len(KINDS)]
        rng = random.Random(f"{seed} {number}")
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            path, read = make(kind, folder)
            if number < len(KINDS):
                read(folder)  # what is not mutated is read
            mutant = mutate(path.read_bytes(), path.suffix in _TEXT, rng)
            path.write_bytes(mutant)
            print(number, kind, file=sys.stderr, flush=True)
            faulthandler.dump_traceback_later(PATIENCE, exit=True)
            try:
                if kind.startswith(("photo", "deep")):
                    with contextlib.suppress(EdgehpError):
                        decode_photo(mutant, "here", upright=True, bits=12)
                read(folder)
            except EdgehpError as e:
                refused += 1
                assert str(e), "an error without words"
            except Exception:
                failed += 1
                traceback.print_exc()
            finally:
                faulthandler.cancel_dump_traceback_later()
    return refused, failed


def main() -> None:
    """Run, and print how many mutants were refused and the most memory that was held."""
    seed, first, last = map(int, sys.argv[1:])
    # Beyond it, memory is not given: what asks for it fails, and is told.
    resource.setrlimit(resource.RLIMIT_DATA, (2 * MEMORY, 2 * MEMORY))
    os.environ["OPENCV_FFMPEG_LOGLEVEL"] = "-8"
    cv2.setNumThreads(1)
    refused, failed = run(seed, first, last)
    held = round(peak_memory_mib() * 2**20)
    print(json.dumps({"refused": refused, "read": last - first - refused, "bytes": held}))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
