"""Cutting faces out of frames on the GPU: what `edgehp.crop.crop_face` does, by one CUDA kernel.

Only the part of a frame that its faces cover travels to the GPU, once for all of them. The kernel
is ``crop_kernel.c``; NVRTC compiles it for the GPU at hand, and the result is kept in the user's
cache by GPU and source.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgehp.crop import PICTURE_FORMS, Picture, Preprocessing, cut_of
from edgehp.device import cache_folder, keep
from edgehp.engines.base import Face
from edgehp.engines.cuda import Cuda
from edgehp.errors import DataError, EnvironmentalError

KERNEL = Path(__file__).with_name("crop_kernel.c")
FUNCTION = b"edgehp_crop"

# `Cut` of the kernel.
CUT = np.dtype(
    [
        (name, np.int32)
        for name in (
            *("form", "pixels", "pitch", "chroma", "x", "y", "width", "height", "right"),
            *("bottom", "area", "reserved"),
        )
    ]
)
# The kernel's positions are products of a crop's and the input's side in 32 bits.
_LARGEST_SIDE = 1 << 19
_LARGEST_LOAD = 1 << 30
# Threads a block, across and down: a warp reads neighboring pixels.
_BLOCK = (32, 8)


class Load:
    """What the kernel reads: its table of crops, and behind it the parts of the frames.

    Attributes:
        faces: how many.
        count: of the table's rows, at least that.
        size: bytes.
    """

    def __init__(self, faces: Sequence[Face], spec: Preprocessing, rows: int = 0) -> None:
        """Look where the faces are; nothing is copied yet.

        Args:
            faces: at least one; those of one frame in a row or not, it is copied once.
            spec: the network's preprocessing.
            rows: of the table, if more than faces: the last one is repeated.

        Raises:
            DataError: a box has no area inside its frame, or the frames are beyond reason.
        """
        self.faces, self.count = len(faces), max(len(faces), rows)
        self._table = np.zeros(self.count, CUT)
        # id of the picture -> the picture, its faces' numbers and their cuts.
        found: dict[int, tuple[Picture, list[int]]] = {}
        cuts = []
        for i, (picture, box) in enumerate(faces):
            cuts.append(cut_of(picture.width, picture.height, box, spec))
            if max(cuts[i].width, cuts[i].height) > _LARGEST_SIDE:
                raise DataError(f"a crop of {cuts[i].width}x{cuts[i].height} pixels is no face's")
            found.setdefault(id(picture), (picture, []))[1].append(i)
        at = self._table.nbytes
        self._parts: list[tuple[int, npt.NDArray[np.uint8]]] = []
        for picture, members in found.values():
            left, top = (min(cuts[i].inside[side] for i in members) for side in (0, 1))
            right, bottom = (max(cuts[i].inside[side] for i in members) for side in (2, 3))
            if picture.form == "NV12":
                # Two by two pixels share their chroma.
                left, top, right, bottom = left & ~1, top & ~1, right + 1 & ~1, bottom + 1 & ~1
            part = picture.pixels[top:bottom, left:right]
            self._parts.append((at, part))
            pitch, chroma = part[0].nbytes, at + part.nbytes
            for i in members:
                cut = cuts[i]
                self._table[i] = (
                    *(PICTURE_FORMS.index(picture.form), at, pitch, chroma),
                    *(cut.x - left, cut.y - top, cut.width, cut.height),
                    # A crop of the input's size is the same by both ways of resizing.
                    *(right - left - 1, bottom - top - 1, int(cut.area), 0),
                )
            at = chroma
            if picture.form == "NV12":
                below = picture.height
                part = picture.pixels[below + top // 2 : below + bottom // 2, left:right]
                self._parts.append((at, part))
                at += part.nbytes
        self._table[len(faces) :] = self._table[len(faces) - 1]
        self.size = at
        if at > _LARGEST_LOAD:
            raise DataError(f"the frames of one call have {at} bytes, expected at most 1 GiB")

    def write(self, memory: npt.NDArray[np.uint8]) -> None:
        """Copy everything into `memory`, uint8 [at least `size`]."""
        memory[: self._table.nbytes] = self._table.view(np.uint8)
        for at, part in self._parts:
            memory[at : at + part.nbytes].reshape(part.shape)[...] = part


def kernel_path(capability: str) -> Path:
    """Where the user's cache keeps the kernel for a compute capability such as ``"8.7"``."""
    digest = hashlib.sha256(KERNEL.read_bytes()).hexdigest()[:16]
    return cache_folder() / "kernels" / f"crop-sm{capability.replace('.', '')}-{digest}.cubin"


def kernel_for(capability: str) -> bytes:
    """The kernel for GPUs of a compute capability (``"8.7"``), compiled once for the machine.

    Raises:
        EnvironmentalError: as of `compile_kernel`.
    """
    kept = kernel_path(capability)
    if kept.is_file():
        return kept.read_bytes()
    image = compile_kernel(KERNEL.read_bytes(), capability)
    # Without it the kernel is compiled at each start.
    keep(kept, image, "the crop kernel is", logging.INFO)
    return image


def compile_kernel(source: bytes, capability: str) -> bytes:
    """The kernel as a cubin, by NVRTC; needs no GPU.

    Args:
        source: CUDA C.
        capability: compute capability of the GPU, such as ``"8.7"``.

    Raises:
        EnvironmentalError: NVRTC is missing, too old for the GPU, or refuses the source.
    """
    try:
        from cuda.bindings import nvrtc
    except ImportError as e:
        raise EnvironmentalError(f"NVRTC needs cuda-bindings ({e})") from e

    def call(name: str, *arguments: Any) -> Any:
        try:
            status, *values = getattr(nvrtc, name)(*arguments)
        except RuntimeError as e:  # the library is absent
            reason = " ".join(str(e).split())[:200]
            raise EnvironmentalError(
                f"NVRTC is not installed ({reason})\nhint: pip install nvidia-cuda-nvrtc-cu12, or "
                "nvidia-cuda-nvrtc for CUDA 13; JetPack's CUDA toolkit has it"
            ) from e
        if int(status):
            raise EnvironmentalError(f"NVRTC {name} failed with {getattr(status, 'name', status)}")
        return values[0] if values else None

    program = call("nvrtcCreateProgram", source, b"crop_kernel.cu", 0, [], [])
    option = f"--gpu-architecture=sm_{capability.replace('.', '')}".encode()
    try:
        call("nvrtcCompileProgram", program, 1, [option])
    except EnvironmentalError as e:
        text = bytes(call("nvrtcGetProgramLogSize", program))
        call("nvrtcGetProgramLog", program, text)
        said = " ".join(text.decode(errors="replace").strip("\0").split())
        raise EnvironmentalError(f"{e} for compute capability {capability}: {said[:300]}") from e
    image = bytes(call("nvrtcGetCUBINSize", program))
    call("nvrtcGetCUBIN", program, image)
    nvrtc.nvrtcDestroyProgram(program)
    return image


class CropKernel:
    """The kernel loaded on one GPU; everything but the opening needs `Cuda.current` too.

    Args:
        cuda: the GPU, its context current.

    Raises:
        EnvironmentalError: it cannot be compiled or loaded.
    """

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        if not cuda.has_kernels:
            raise EnvironmentalError(f"{cuda.package} runs no kernels, cuda-bindings does")
        self._module, self._function = cuda.load(kernel_for(cuda.compute_capability), FUNCTION)

    def launch(self, source: int, crops: int, size: int, count: int, stream: int) -> None:
        """Put the cutting of `count` crops into a stream.

        Args:
            source: address of what a `Load` wrote, on the GPU.
            crops: where uint8 [count, size, size, 3] goes, on the GPU.
            size: side of the network's input in pixels.
            count: rows of the load's table.
            stream: of the GPU.
        """
        across, down = -(-size // _BLOCK[0]), -(-size // _BLOCK[1])
        self._cuda.call_kernel(
            self._function,
            (across, down, count),
            (*_BLOCK, 1),
            (source, crops, size),
            (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int),
            stream,
        )

    def crop(self, faces: Sequence[Face], spec: Preprocessing) -> npt.NDArray[np.uint8]:
        """The faces as uint8 RGB [N, S, S, 3], for checks: engines crop where they infer.

        Raises:
            DataError: as of `edgehp.crop.crop_face`.
            EnvironmentalError: the GPU failed.
        """
        load, cuda = Load(faces, spec), self._cuda
        shape = (load.count, spec.size, spec.size, 3)
        stream = cuda.new_stream()
        source, crops = cuda.buffer(load.size), cuda.buffer(int(np.prod(shape)))
        try:
            load.write(source.host)
            cuda.upload(source, load.size, stream)
            self.launch(source.address, crops.address, spec.size, load.count, stream)
            cuda.download(crops, crops.host.nbytes, stream)
            cuda.synchronize(stream)
            return crops.host.reshape(shape).copy()
        finally:
            cuda.free(source)
            cuda.free(crops)
            cuda.free_stream(stream)

    def close(self) -> None:
        """Unload it."""
        self._cuda.unload(self._module)
