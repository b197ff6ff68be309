"""Any ONNX pose network as a teacher, described by a small TOML file.

A description says how a photo with a face box becomes the network's input, and how its output
becomes a rotation::

    name = "opentrack-head-pose"
    files = ["head-pose.onnx"]        # relative to --model-dir, else to this file; averaged
    weight = 2.0                      # in an ensemble of teachers

    [input]
    name = "x"                        # default: the network's only input
    size = 129
    colour = "GREY"                   # RGB, BGR or GREY
    mean = [127.5]                    # units of 0..255
    std = [255.0]
    resize = "area"
    box_rule = "square"
    box_scale = 1.05
    deployed = false                  # true: a graph of edgehp's own, which takes uint8 crops

    [input.dark]                      # optional: brighten dark crops
    percentile = 90
    below = 127
    gain = 0.45
    floor = 5

    [output]
    kind = "quaternion"               # quaternion (x, y, z, w), euler, sixd or bins
    name = "quat"                     # or names = [..] with one entry per angle
    order = ["yaw", "pitch", "roll"]  # of euler and bins
    convention = "aflw2000"           # of euler and bins: see edgehp.pose

    [grid]                            # box offsets whose answers are averaged
    size = 3                          # 3 x 3 positions
    step = 0.05                       # times the larger side of the box
    flip = false                      # average with the mirrored photo too
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import cv2
import numpy as np
import numpy.typing as npt
from msgspec import Meta
from msgspec.structs import force_setattr

from edgehp import pose
from edgehp._installed import install_extra
from edgehp.crop import Box, Preprocessing, crop_face
from edgehp.errors import DataError, EnvironmentalError, UsageError
from edgehp.files import Record, read_toml

__all__ = ["DarkRule", "Grid", "OutputSpec", "Teacher", "TeacherSpec", "load_teacher_spec"]

Array = npt.NDArray[np.float64]
ANGLES = ("pitch", "yaw", "roll")


class DarkRule(Record, frozen=True):
    """Brighten a crop whose `percentile` level lies under `below`.

    Such a crop is multiplied by ``gain / max(floor, level)`` in place of ``1 / std``.
    """

    percentile: float
    below: float
    gain: float
    floor: float


class OutputSpec(Record, frozen=True):
    """How a network's outputs become rotations; see the module's docstring."""

    kind: Literal["quaternion", "euler", "sixd", "bins"]
    name: str = ""
    names: tuple[str, ...] = ()
    order: tuple[str, ...] = ANGLES
    convention: str = "aflw2000"
    first: float = -99.0
    last: float = 99.0

    def __post_init__(self) -> None:
        """Refuse an output nothing can decode."""
        if self.name and not self.names:
            force_setattr(self, "names", (self.name,))
        if sorted(self.order) != sorted(ANGLES):
            raise UsageError(f"output order {list(self.order)} is no order of {list(ANGLES)}")
        if pose.convention(self.convention).radians:
            raise UsageError(f"network outputs in radians ({self.convention}) are not supported")
        if self.kind == "bins" and len(self.names) not in (1, 3):
            raise UsageError("an output of kind bins needs one name, or one per angle")


class Grid(Record, frozen=True):
    """A regular grid of box offsets: the ensemble of offsets of arXiv 2108.09183.

    Attributes:
        size: positions per axis, odd, 1 for the box alone.
        step: distance of neighbours, times the larger side of the box.
        flip: also take the mirrored photo.
    """

    size: int = 1
    step: float = 0.05
    flip: bool = False

    def __post_init__(self) -> None:
        """Refuse grids that are not centred or leave the face."""
        if self.size < 1 or self.size > 15 or self.size % 2 == 0:
            raise UsageError(f"grid size {self.size}: an odd number from 1 to 15 is needed")
        if not 0 <= self.step * (self.size // 2) <= 0.5:
            raise UsageError(f"a grid of {self.size} x {self.step} moves the box off the face")

    @property
    def offsets(self) -> tuple[tuple[float, float], ...]:
        """(dx, dy) in units of the larger side of the box, row by row."""
        half = self.size // 2
        steps = [i * self.step for i in range(-half, half + 1)]
        return tuple((dx, dy) for dy in steps for dx in steps)


@dataclass(frozen=True)
class TeacherSpec:
    """A teacher in plain data; see the module's docstring."""

    name: str
    files: tuple[Path, ...]
    preprocessing: Preprocessing
    output: OutputSpec
    input_name: str = ""
    weight: float = 1.0
    grid: Grid = field(default_factory=Grid)
    dark: DarkRule | None = None
    deployed: bool = False

    def with_grid(self, grid: Grid) -> TeacherSpec:
        """The same teacher over another grid of box offsets."""
        return replace(self, grid=grid)


class _Input(Preprocessing, frozen=True):
    """The table ``[input]``."""

    name: str = ""
    deployed: bool = False
    dark: DarkRule | None = None

    @property
    def preprocessing(self) -> Preprocessing:
        fields = Preprocessing.__struct_fields__
        return Preprocessing(**{name: getattr(self, name) for name in fields})


class _Description(Record, frozen=True):
    """A teacher's file; see the module's docstring."""

    name: str
    files: Annotated[tuple[str, ...], Meta(min_length=1)]
    input: _Input
    output: OutputSpec
    weight: Annotated[float, Meta(gt=0)] = 1.0
    grid: Grid = Grid()


def load_teacher_spec(path: Path, model_dir: Path | None = None) -> TeacherSpec:
    """Read a teacher description.

    Args:
        path: the TOML file.
        model_dir: where its `files` are; the folder of `path` when omitted.

    Raises:
        DataError: a key is missing, unknown or of the wrong kind, or a network file is missing.
    """
    try:
        found = read_toml(path, _Description)
    except UsageError as e:
        raise DataError(f"{path}: {e}") from e
    root = model_dir or path.parent
    spec = TeacherSpec(
        name=found.name,
        files=tuple(root / file for file in found.files),
        preprocessing=found.input.preprocessing,
        output=found.output,
        input_name=found.input.name,
        weight=found.weight,
        grid=found.grid,
        dark=found.input.dark,
        deployed=found.input.deployed,
    )
    for file in spec.files:
        if not file.is_file():
            raise DataError(
                f"{path}: the network {file.name} is not in {file.parent}; "
                "say where it is with --model-dir"
            )
    return spec


class Teacher:
    """A teacher ready to label photos, on onnxruntime.

    Args:
        spec: what it is.
        threads: intra-op threads of each session.

    Raises:
        EnvironmentalError: onnxruntime is missing.
        DataError: a file is no ONNX network, or has other inputs or outputs than described.
    """

    def __init__(self, spec: TeacherSpec, threads: int = 1) -> None:
        try:
            import onnxruntime as ort
        except ImportError as e:
            raise EnvironmentalError(
                f"labelling needs onnxruntime: {install_extra('train')}"
            ) from e
        self.spec = spec
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # A quantized teacher is computed as written, so that labels are those of every machine:
        # integer kernels saturate on processors without VNNI (opentrack: 3.40 instead of 3.28).
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        self._sessions = []
        for file in spec.files:
            try:
                session = ort.InferenceSession(
                    str(file), options, providers=["CPUExecutionProvider"]
                )
            except Exception as e:  # onnxruntime's errors share no public base class
                raise DataError(f"{file}: not an ONNX network that onnxruntime loads: {e}") from e
            self._sessions.append(session)
            self._check(session, file)

    def _check(self, session: Any, file: Path) -> None:
        inputs = {i.name: i for i in session.get_inputs()}
        name = self.spec.input_name or next(iter(inputs))
        if name not in inputs:
            raise DataError(f"{file}: no input {name!r}, found {', '.join(inputs)}")
        outputs = [o.name for o in session.get_outputs()]
        for wanted in self.spec.output.names:
            if wanted not in outputs:
                raise DataError(f"{file}: no output {wanted!r}, found {', '.join(outputs)}")

    def views(self, photo: npt.NDArray[np.uint8], box: Box | None) -> list[npt.NDArray[np.uint8]]:
        """The crops of all grid positions, uint8 [S, S, 3] RGB; mirrored ones last."""
        if box is None:
            box = Box(0, 0, photo.shape[1], photo.shape[0])
        crops = [
            crop_face(photo, box.moved(dx, dy), self.spec.preprocessing)
            for dx, dy in self.spec.grid.offsets
        ]
        if self.spec.grid.flip:
            crops += [np.ascontiguousarray(c[:, ::-1]) for c in crops]
        return crops

    def rotations(self, photo: npt.NDArray[np.uint8], box: Box | None) -> Array:
        """Rotations [n, 3, 3], canonical, of all grid positions and network files.

        Mirrored views are mirrored back, so all of them estimate the same pose.
        """
        crops = self.views(photo, box)
        batch = np.stack([self._tensor(c) for c in crops])
        out = []
        for session in self._sessions:
            matrices = self._decode(self._run(session, batch))
            if self.spec.grid.flip:
                half = len(matrices) // 2
                matrices = np.concatenate([matrices[:half], pose.flip_matrix(matrices[half:])])
            out.append(matrices)
        return np.concatenate(out)

    def _tensor(self, crop: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
        if self.spec.deployed:
            return crop
        p = self.spec.preprocessing
        if p.colour == "GREY":
            x = cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY).astype(np.float32)[..., None]
        else:
            x = (crop if p.colour == "RGB" else crop[..., ::-1]).astype(np.float32)
        mean = np.asarray(p.mean, np.float32)
        gain = 1.0 / np.asarray(p.std, np.float32)
        offset = mean * gain
        if self.spec.dark is not None:
            level = float(np.percentile(x, self.spec.dark.percentile))
            if level < self.spec.dark.below:
                # The offset stays that of a normal crop: only the gain rises.
                gain = np.full_like(gain, self.spec.dark.gain / max(self.spec.dark.floor, level))
        return np.ascontiguousarray((x * gain - offset).transpose(2, 0, 1), np.float32)

    def _run(self, session: Any, batch: npt.NDArray[Any]) -> list[npt.NDArray[np.float32]]:
        name = self.spec.input_name or session.get_inputs()[0].name
        names = list(self.spec.output.names) or [session.get_outputs()[0].name]
        if isinstance(session.get_inputs()[0].shape[0], int):  # a network of fixed batch
            runs = [session.run(names, {name: x[None]}) for x in batch]
            return [np.concatenate(parts) for parts in zip(*runs, strict=True)]
        return list(session.run(names, {name: batch}))

    def _decode(self, outputs: Sequence[npt.NDArray[np.float32]]) -> Array:
        o = self.spec.output
        n = len(outputs[0])
        if o.kind == "quaternion":
            return pose.matrix_from_quaternion(outputs[0].reshape(n, 4))
        if o.kind == "sixd":
            return _sixd(outputs[0].reshape(n, 6).astype(np.float64))
        if o.kind == "bins":
            stacked = outputs[0] if len(outputs) == 1 else np.stack(outputs, axis=1)
            values = _expectation(stacked.reshape(n, 3, -1).astype(np.float64), o.first, o.last)
        else:
            values = np.concatenate([x.reshape(n, -1) for x in outputs], axis=1)
            if values.shape[1] != 3:
                raise DataError(f"expected 3 angles per face, found {values.shape[1]}")
        ordered = np.stack([values[:, o.order.index(a)] for a in ANGLES], axis=1)
        return pose.matrix_from_euler(pose.to_aflw2000(ordered, o.convention))


def _expectation(logits: Array, first: float, last: float) -> Array:
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return np.asarray(p @ np.linspace(first, last, logits.shape[-1]))


def _sixd(values: Array) -> Array:
    """Canonical rotations from 6D outputs (Zhou et al., arXiv 1812.07035, eq. 15)."""
    a, b = values[:, :3], values[:, 3:]
    x = a / np.linalg.norm(a, axis=1, keepdims=True)
    z = np.cross(x, b)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    return pose.matrix_from_sixdrepnet(np.stack([x, np.cross(z, x), z], axis=-1))
