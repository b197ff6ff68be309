"""The C++ library against edgehp's engine on one artifact: latency of a call, and memory.

    cmake -S examples/cpp -B build/cpp -DBUILD_SHARED_LIBS=ON -DOpenVINO_DIR=...
    cmake --build build/cpp
    python tools/cpp_latency.py build/cpp dist/kd-resnet18-112-cpu-int8

In one process and in turns of a tenth of a second, one thread each: `edgehp_infer` of the C
interface, and what `edgehp bench` times, the crop and the engine's call. Once of a ready crop, once
of a face in a 1920x1080 frame. Figures are medians of the turns' medians; the ratio is the median
of the turns' ratios, which resists neighbours. Memory is the peak of a process of its own for
each. Prints the table of docs/cpp.md. A quiet machine is needed.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

import cv2
import numpy as np
import numpy.typing as npt

from edgehp.artifact import golden_crops
from edgehp.artifact.open import open_artifact
from edgehp.benchmark.lanes import camera_frames
from edgehp.crop import Box, crop_face

_TURN_S = 0.1
Faces = list[tuple[npt.NDArray[np.uint8], Box]]
Angles = npt.NDArray[np.float32]


class _Image(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("width", ctypes.c_int),
        ("height", ctypes.c_int),
        ("stride", ctypes.c_size_t),
        ("pixels", ctypes.c_int),
    )


class _Box(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_double) for name in ("x_min", "y_min", "x_max", "y_max"))


class _Pose(ctypes.Structure):
    _fields_ = (
        ("angles", ctypes.c_float * 3),
        ("spread", ctypes.c_float * 3),
        ("confidence", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("has_spread", "out_of_range", "usable")),
    )


def _c_calls(library: Path, artifact: Path, photos: Faces) -> Callable[[int], Angles]:
    """A function that infers photo i by the C interface and gives its angles."""
    c = ctypes.CDLL(str(library))
    c.edgehp_open.restype = ctypes.c_void_p
    c.edgehp_last_error.restype = ctypes.c_char_p
    opened = ctypes.c_void_p(c.edgehp_open(os.fsencode(artifact), 1))
    if not opened:
        sys.exit(c.edgehp_last_error().decode())
    pose, ready = _Pose(), []
    for photo, box in photos:
        height, width = photo.shape[:2]
        image = _Image(photo.ctypes.data, width, height, photo.strides[0], 0)
        ready.append((image, _Box(box.x_min, box.y_min, box.x_max, box.y_max)))

    def call(i: int) -> Angles:
        image, box = ready[i]
        if c.edgehp_infer(opened, ctypes.byref(image), ctypes.byref(box), 1, ctypes.byref(pose)):
            sys.exit(c.edgehp_last_error().decode())
        return np.array(pose.angles, np.float32)

    return call


def _turn(call: Callable[[int], object], count: int) -> float:
    """The median time of a call in milliseconds, in a turn."""
    times: list[float] = []
    deadline = perf_counter() + _TURN_S
    while (began := perf_counter()) < deadline:
        call(len(times) % count)
        times.append(perf_counter() - began)
    return 1e3 * median(times)


def _peak_mib(*command: str | Path) -> float:
    """The most memory that a process had, in MiB.

    It is started by a small one: Linux counts in what its parent had when it was forked.
    """
    code = (
        "import resource as r, subprocess as s, sys; s.run(sys.argv[1:], stdout=s.DEVNULL, "
        "stderr=s.DEVNULL, check=True); print(r.getrusage(r.RUSAGE_CHILDREN).ru_maxrss)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *command], check=True, capture_output=True, text=True
    )
    return int(done.stdout) / 1024


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("build", type=Path, help="where the library was built, as a shared one")
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--turns", type=int, default=100, help="of each (default: 100)")
    options = parser.parse_args()
    with open_artifact(options.artifact, threads=1) as network:
        loaded, spec, infer = network.artifact, network.preprocessing, network.engine.infer
        if loaded is None:
            sys.exit(f"{options.artifact} is no artifact")
        crops = golden_crops(loaded)
        side = spec.size
        # A box whose cut is the whole crop, whatever the rule's scale.
        whole = Box(0, 0, side, side).moved(0, 0, 1 / spec.box_scale)
        work: dict[str, Faces] = {
            "a ready crop": [(crop, whole) for crop in crops],
            "a face in a frame of 1920x1080": [
                (f.photo, f.box) for f in camera_frames(loaded).items if f.box
            ],
        }
        print("| work | C interface, ms | edgehp, ms | ratio |\n|---|---|---|---|")
        for name, photos in work.items():
            in_c = _c_calls(options.build / "libedgehp.so", options.artifact, photos)

            def in_python(i: int, photos: Faces = photos) -> Angles:
                return np.asarray(infer(crop_face(*photos[i], spec)[None]).angles[0])

            for i in range(len(photos)):
                if np.abs(in_c(i) - in_python(i)).max() > 1e-3:
                    sys.exit(f"{name}: the two do not agree")
            for call in (in_c, in_python):
                _turn(call, len(photos))
            turns = [
                (_turn(in_c, len(photos)), _turn(in_python, len(photos)))
                for _ in range(options.turns)
            ]
            c, python = (median(each) for each in zip(*turns, strict=True))
            ratio = median(a / b for a, b in turns)
            print(f"| {name} | {c:.3f} | {python:.3f} | {ratio:.3f} |")
    with tempfile.TemporaryDirectory() as folder:
        photo = Path(folder) / "crop.png"
        cv2.imwrite(str(photo), crops[0][..., ::-1])
        program = (options.build / "edgehp-pose", options.artifact, "--threads", "1", photo)
        code = (
            "import sys; from edgehp.artifact.open import open_artifact as o; "
            "from edgehp.artifact import golden_crops as g; n = o(sys.argv[1], threads=1); "
            "n.engine.infer(g(n.artifact)[:1])"
        )
        ours = _peak_mib(sys.executable, "-c", code, options.artifact)
        print(f"| memory of a process, MiB | {_peak_mib(*program):.0f} | {ours:.0f} | |")


if __name__ == "__main__":
    main()
