"""The crop kernel against OpenCV: the same C, compiled for the processor; and by NVRTC for GPUs."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from numpy.random import Generator

from edgehp.crop import PICTURE_FORMS, Box, Picture, Preprocessing, crop_face
from edgehp.engines.base import Face
from edgehp.engines.gpu_crop import CUT, KERNEL, Load
from edgehp.errors import DataError
from tests.driver.double import installed

Image = npt.NDArray[np.uint8]


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernel's C for this processor, with every warning and, where asked, a sanitizer."""
    built = tmp_path_factory.mktemp("kernel") / "crop.so"
    options = ("-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Werror")
    try:
        subprocess.run(["cc", *options, "-o", built, KERNEL, "-lm"], check=True)
    except FileNotFoundError:
        pytest.skip("no C compiler: the kernel cannot be built for the processor")
    return ctypes.CDLL(str(built))


def cut(kernel: ctypes.CDLL, faces: list[Face], spec: Preprocessing) -> Image:
    load = Load(faces, spec)
    # Exactly as large as said: what lies behind belongs to others.
    memory = np.zeros(load.size, np.uint8)
    load.write(memory)
    crops = np.zeros((load.count, spec.size, spec.size, 3), np.uint8)
    pointer = ctypes.c_void_p
    kernel.edgehp_crop(
        pointer(memory.ctypes.data), pointer(crops.ctypes.data), spec.size, load.count
    )
    return crops


def scene(rng: Generator, width: int, height: int) -> Image:
    """Smooth patches, edges and noise: what a camera sends, and worse."""
    small = rng.integers(0, 256, (height // 9 + 1, width // 9 + 1, 3), np.uint8)
    photo = cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)
    photo[height // 3 : height // 2] = rng.integers(0, 256, (1, width, 3))
    noise = rng.integers(-12, 13, photo.shape)
    return np.clip(photo + noise, 0, 255).astype(np.uint8)


def as_form(photo: Image, form: str) -> Picture:
    """The photo as a camera of this form would send it."""
    if form == "NV12":
        planes = cv2.cvtColor(photo, cv2.COLOR_RGB2YUV_I420)
        height, width = photo.shape[:2]
        chroma = planes[height:].reshape(2, -1)
        return Picture(np.vstack([planes[:height], chroma.T.reshape(height // 2, width)]), form)
    codes = {"BGR": cv2.COLOR_RGB2BGR, "GREY": cv2.COLOR_RGB2GRAY}
    return Picture(cv2.cvtColor(photo, codes[form]) if form in codes else photo, form)


def random_box(rng: Generator, width: int, height: int) -> Box:
    """Small and large, inside, across the border, and one much larger than the photo."""
    side = float(np.exp(rng.uniform(np.log(4), np.log(1.5 * max(width, height)))))
    wide, tall = side * rng.uniform(0.6, 1), side * rng.uniform(0.6, 1)
    # At least a sixteenth of it inside, or there is nothing to cut.
    x = rng.uniform(-0.75 * wide, width - 0.25 * wide)
    y = rng.uniform(-0.75 * tall, height - 0.25 * tall)
    return Box(x, y, x + wide, y + tall)


def against_opencv(cut: Callable[[list[Face], Preprocessing], Image], rng: Generator) -> str:
    """10,000 random boxes in pictures of every form, sizes, both rules and both ways to resize."""
    worst, equal, total, done = 0, 0, 0, 0
    while done < 10_000:
        width, height = (2 * int(n) for n in rng.integers(16, 160, 2))
        picture = as_form(scene(rng, width, height), str(rng.choice(PICTURE_FORMS)))
        spec = Preprocessing(
            int(rng.integers(16, 65)),
            box_rule=str(rng.choice(("square", "stretch"))),
            box_scale=float(rng.uniform(0.8, 1.6)),
            resize=str(rng.choice(("area", "area", "linear"))),
        )
        faces: list[Face] = []
        expected = []
        for _ in range(50):
            box = random_box(rng, width, height)
            try:
                expected.append(crop_face(picture.rgb(), box, spec))
            except DataError:
                continue
            faces.append((picture, box))
        found = cut(faces, spec).astype(int)
        difference = np.abs(found - np.stack(expected))
        worst = max(worst, int(difference.max()))
        equal += int((difference == 0).sum())
        total += difference.size
        done += len(faces)
        assert worst <= 1, (picture.form, width, height, spec)
    assert equal / total > 0.99
    return f"{done} boxes: largest difference {worst}, {equal / total:.4%} of values equal"


def test_kernel_cuts_as_opencv_to_one_level(kernel: ctypes.CDLL, rng: Generator) -> None:
    against_opencv(lambda faces, spec: cut(kernel, faces, spec), rng)


@pytest.mark.parametrize("form", PICTURE_FORMS)
@pytest.mark.parametrize("factor", [1, 2, 3, 4, 8])
def test_whole_factors_and_the_size_itself(
    kernel: ctypes.CDLL, rng: Generator, form: str, factor: int
) -> None:
    """OpenCV has code of its own for these."""
    spec = Preprocessing(32)
    picture = as_form(scene(rng, 400, 300), form)
    box = Box(11, 7, 11 + 32 * factor, 7 + 32 * factor)
    expected = crop_face(picture.rgb(), box, spec)
    found = cut(kernel, [(picture, box)], spec)[0]
    if factor <= 2:
        np.testing.assert_array_equal(found, expected)
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_faces_of_one_frame_share_its_upload(rng: Generator) -> None:
    picture = Picture(scene(rng, 640, 480))
    spec = Preprocessing(64)
    boxes = [Box(100, 100, 200, 200), Box(150, 120, 260, 230)]
    both = Load([(picture, box) for box in boxes], spec)
    assert both.size == 2 * CUT.itemsize + (260 - 100) * (230 - 100) * 3
    padded = Load([(picture, boxes[0])], spec, rows=4)
    assert padded.count == 4
    assert padded.size == 4 * CUT.itemsize + 100 * 100 * 3


def test_picture_refuses_what_is_not_of_its_form() -> None:
    for shape, form in (((4, 4), "RGB"), ((4, 4, 3), "GREY"), ((4, 4), "NV12"), ((6, 5), "NV12")):
        with pytest.raises(DataError, match=f"a {form} picture cannot be"):
            Picture(np.zeros(shape, np.uint8), form)
    assert Picture(np.zeros((6, 4), np.uint8), "NV12").rgb().shape == (4, 4, 3)


def test_box_outside_the_frame_is_refused_as_on_the_processor() -> None:
    picture = Picture(np.zeros((40, 40, 3), np.uint8))
    for box in (Box(50, 50, 60, 60), Box(0, 0, 1e5, 1e5)):
        with pytest.raises(DataError) as on_processor:
            crop_face(picture.pixels, box, Preprocessing(32))
        with pytest.raises(DataError) as on_gpu:
            Load([(picture, box)], Preprocessing(32))
        assert str(on_gpu.value) == str(on_processor.value)


# CUDA 13 has no Volta any more, CUDA 12 no Thor under its final number.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("packages", "library", "capabilities"),
    [
        (
            ("cuda-bindings>=12.9,<13", "nvidia-cuda-nvrtc-cu12>=12.9,<13"),
            "nvidia/cuda_nvrtc/lib",
            ("7.0", "7.5", "8.0", "8.6", "8.7", "8.9", "9.0", "12.0"),
        ),
        (
            ("cuda-bindings>=13,<14", "nvidia-cuda-nvrtc>=13,<14"),
            "nvidia/cu13/lib",
            ("7.5", "8.0", "8.6", "8.7", "8.9", "9.0", "11.0", "12.0", "12.1"),
        ),
    ],
)
def test_nvrtc_compiles_for_every_target(
    packages: tuple[str, ...], library: str, capabilities: tuple[str, ...], tmp_path: Path
) -> None:
    folder = installed(*packages)
    nvrtc = next((folder / library).glob("libnvrtc.so.*"))
    code = (
        # Loaded first, it is taken before another NVRTC that may be installed here.
        "import ctypes, sys; ctypes.CDLL(sys.argv[1])\n"
        "from edgehp.engines.gpu_crop import kernel_for\n"
        "for c in sys.argv[2:]: assert kernel_for(c)[:4] == b'\\x7fELF'\n"
        "try: kernel_for('3.0')\n"
        "except Exception as e: print(e)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(nvrtc), *capabilities],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
        env=os.environ
        | {
            "PYTHONPATH": str(folder),
            "LD_LIBRARY_PATH": str(folder / library),
            "XDG_CACHE_HOME": str(tmp_path),
        },
    )
    assert done.returncode == 0, done.stderr
    assert "for compute capability 3.0: nvrtc: error: invalid value" in done.stdout
    kept = sorted(p.name for p in (tmp_path / "edgehp" / "kernels").iterdir())
    assert [name.split("-")[1] for name in kept] == sorted(
        f"sm{c.replace('.', '')}" for c in capabilities
    )
