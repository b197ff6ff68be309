"""Any ONNX pose network, described by a small TOML file: a teacher, or one to deploy.

A description says how a photo with a face box becomes the network's input, and how its output
becomes a pose::

    name = "opentrack-head-pose"
    files = ["head-pose.onnx"]        # beside this file; the outputs of several are averaged
    licence = "ISC"                   # of the weights
    weight = 2.0                      # in an ensemble of teachers

    [input]
    name = "x"                        # default: the network's only input
    size = 129
    layout = "NCHW"                   # or NHWC; default: what the input's shape says
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
    kind = "quaternion"               # quaternion, euler, sixd, matrix or bins
    name = "quat"                     # or names = [..] with one entry per angle
    order = ["x", "y", "z", "w"]      # of a quaternion; of euler and bins: pitch, yaw, roll
    convention = "aflw2000"           # of euler and bins: see edgehp.pose
    signs = [1, 1, 1]                 # of euler and bins: factors on pitch, yaw, roll in place of a
                                      # convention; else of the axes x, y, z (see `OutputSpec`)
    transposed = false                # of quaternion, sixd and matrix
    first = -99.0                     # of bins: the value of the first and of the last
    last = 99.0

    [grid]                            # of a teacher: box offsets whose answers are averaged
    size = 3                          # 3 x 3 positions
    step = 0.05                       # times the larger side of the box
    flip = false                      # average with the mirrored photo too
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta
from msgspec.structs import force_setattr

from edgehp import pose
from edgehp.crop import Preprocessing
from edgehp.errors import DataError, UsageError
from edgehp.files import Record, read_toml
from edgehp.networks import FILL_IN

_log = logging.getLogger(__name__)

Array = npt.NDArray[np.float64]
ANGLES = ("pitch", "yaw", "roll")
QUATERNION = ("x", "y", "z", "w")
Sign = Literal[-1, 1]


class DarkRule(Record, frozen=True):
    """Brighten a crop whose `percentile` level lies under `below`.

    Such a crop is multiplied by ``gain / max(floor, level)`` in place of ``1 / std``.
    """

    percentile: Annotated[float, Meta(ge=0, le=100)]
    below: float
    gain: Annotated[float, Meta(gt=0)]
    floor: Annotated[float, Meta(gt=0)]


class InputSpec(Preprocessing, frozen=True):
    """The table ``[input]``: the preprocessing, and how the network takes it."""

    name: str = ""
    layout: Literal["", "NCHW", "NHWC"] = ""
    deployed: bool = False
    dark: DarkRule | None = None

    def __post_init__(self) -> None:
        """Refuse what does not go together."""
        super().__post_init__()
        if self.dark is not None and self.colour != "GREY":
            raise UsageError("a rule for dark crops is for GREY networks")

    @property
    def preprocessing(self) -> Preprocessing:
        """What every part of edgehp needs of it."""
        return Preprocessing(**{n: getattr(self, n) for n in Preprocessing.__struct_fields__})


class OutputSpec(Record, frozen=True):
    """How a network's outputs become a pose; see the module's docstring.

    Of the kinds quaternion, sixd and matrix the canonical rotation is ``S M S`` with M what the
    network says (transposed where `transposed` is true) and S the diagonal of `signs`. Their
    defaults are 6DRepNet's for sixd and matrix, ``[1, -1, -1]`` and transposed, and the canonical
    frame of `edgehp.pose` for quaternions.
    """

    kind: Literal["quaternion", "euler", "sixd", "matrix", "bins"]
    name: str = ""
    names: tuple[str, ...] = ()
    order: tuple[str, ...] = ()
    convention: str = "aflw2000"
    signs: tuple[Sign, Sign, Sign] | None = None
    transposed: bool | None = None
    first: float = -99.0
    last: float = 99.0

    def __post_init__(self) -> None:
        """Refuse an output nothing can decode, and fill in the defaults of its kind."""
        if self.name and not self.names:
            force_setattr(self, "names", (self.name,))
        known = QUATERNION if self.kind == "quaternion" else ANGLES
        if not self.order:
            force_setattr(self, "order", known)
        if sorted(self.order) != sorted(known):
            raise UsageError(f"output order {list(self.order)} is no order of {list(known)}")
        found = pose.convention(self.convention)
        if self.kind == "bins" and found.radians:
            raise UsageError(f"bins have values in degrees, not in radians ({self.convention})")
        if self.kind in ("euler", "bins"):
            if self.transposed is not None:
                raise UsageError(f"an output of kind {self.kind} cannot be transposed")
            if self.signs is None:
                force_setattr(self, "signs", found.signs)
        else:
            usual = self.kind in ("sixd", "matrix")
            if self.signs is None:
                force_setattr(self, "signs", (1, -1, -1) if usual else (1, 1, 1))
            if self.transposed is None:
                force_setattr(self, "transposed", usual)
        most = (1, 3) if self.kind in ("euler", "bins") else (1,)
        if self.names and len(self.names) not in most:
            wanted = "one name, or one per angle" if 3 in most else "one name"
            raise UsageError(f"an output of kind {self.kind} needs {wanted}")
        if self.kind == "bins" and not self.first < self.last:
            raise UsageError(f"bins from {self.first:g} to {self.last:g} make no sense")

    def decode(self, raw: Sequence[npt.ArrayLike]) -> Array:
        """(pitch, yaw, roll) [N, 3], degrees, as the deployed graph computes it.

        Args:
            raw: what the outputs gave, each [N, ...].

        Raises:
            DataError: a quaternion has no length.
        """
        x = np.concatenate([np.reshape(r, (len(np.asarray(r)), -1)) for r in raw], axis=1)
        x, signs = np.asarray(x, np.float64), np.array(self.signs, np.float64)
        if self.kind in ("euler", "bins"):
            if self.kind == "bins":
                x = x.reshape(len(x), 3, -1)
                p = np.exp(x - x.max(axis=2, keepdims=True))
                values = np.linspace(self.first, self.last, x.shape[2])
                x = (p * values).sum(axis=2) / p.sum(axis=2)
            x = x[:, [self.order.index(a) for a in ANGLES]] * signs
            return np.degrees(x) if pose.convention(self.convention).radians else x
        if self.kind == "quaternion":
            m = pose.matrix_from_quaternion(x[:, [self.order.index(a) for a in QUATERNION]])
        else:
            m = _matrix_of_sixd(x) if self.kind == "sixd" else x.reshape(-1, 3, 3)
        m = np.swapaxes(m, 1, 2) if self.transposed else m
        return pose.euler_from_matrix(m * signs[:, None] * signs)


def _matrix_of_sixd(x: Array) -> Array:
    """Matrices [N, 3, 3] of 6D outputs (Zhou et al., arXiv 1812.07035, eq. 15)."""

    def unit(v: Array) -> Array:
        return np.asarray(v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-12))

    one = unit(x[:, :3])
    three = unit(np.cross(one, x[:, 3:]))
    return np.stack([one, np.cross(three, one), three], axis=2)


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


class Description(Record, frozen=True):
    """A network's description; see the module's docstring.

    `load_description` makes `files` paths that can be opened.
    """

    name: Annotated[str, Meta(min_length=1, max_length=100)]
    input: InputSpec
    output: OutputSpec
    files: Annotated[tuple[str, ...], Meta(min_length=1, max_length=16)] = ("",)
    licence: str = ""
    weight: Annotated[float, Meta(gt=0)] = 1.0
    grid: Grid = Grid()

    @property
    def paths(self) -> tuple[Path, ...]:
        """The network files."""
        return tuple(map(Path, self.files))

    def with_grid(self, grid: Grid) -> Description:
        """The same network over another grid of box offsets."""
        return msgspec.structs.replace(self, grid=grid)

    def with_files(self, files: Sequence[str | Path]) -> Description:
        """The same for other network files."""
        return msgspec.structs.replace(self, files=tuple(map(str, files)))


def load_description(path: Path, network: Path | None = None) -> Description:
    """Read a description.

    Args:
        path: the TOML file.
        network: the network file in place of the only one in `files`, or the folder that `files`
            are in; None for the folder of `path`.

    What still has the mark `FILL_IN` is named in a warning: it may be wrong, and the gate, which
    compares with this very network in floating point, would not see it.

    Raises:
        DataError: a key is missing, unknown or of the wrong kind, or a network file is missing.
    """
    try:
        found = read_toml(path, Description)
    except UsageError as e:
        raise DataError(f"{path}: {e}") from e
    lines = path.read_text(encoding="utf-8").splitlines()
    if guessed := [line.partition("=")[0].strip() for line in lines if FILL_IN in line]:
        _log.warning(
            "%s: 'edgehp describe' guessed %s and nobody has confirmed it; correct what is wrong, "
            "and take '%s' away",
            *(path, ", ".join(guessed), FILL_IN),
        )
    if network is not None and not network.is_dir():
        if len(found.files) > 1:
            raise DataError(
                f"{path} describes {len(found.files)} files, and one is given: {network.name}\n"
                "hint: give the folder that they are in"
            )
        files = [network]
    elif "" in found.files:
        raise DataError(f"{path}: key 'files' is missing; expected the network's file")
    else:
        files = [(network or path.parent) / file for file in found.files]
    for file in files:
        if not file.is_file():
            raise DataError(
                f"{path}: the network {file.name} is not in {file.parent}\n"
                "hint: say where it is with --model-dir (label) or --network (build)"
            )
    return found.with_files(files)
