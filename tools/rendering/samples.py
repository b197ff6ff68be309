"""One rendered sample as the list ``labels.csv`` has it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

_MATRIX = [f"r{i}{j}" for i in range(3) for j in range(3)]
HEADER = ",".join(
    ["image", "width", "height", "x_min", "y_min", "x_max", "y_max", "pitch", "yaw", "roll",
     *_MATRIX, "nir", "seed"]
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class RenderedSample:
    """A row: pixels, degrees (convention ``"aflw2000"``) and the canonical matrix."""

    image: str
    size: tuple[int, int]
    box: tuple[float, float, float, float]
    angles: Array
    matrix: Array
    nir: bool
    seed: int


def csv_line(s: RenderedSample) -> str:
    """The row's text; enough digits that the matrix stays a rotation."""
    values = [f"{v:.2f}" for v in s.box] + [f"{v:.6f}" for v in s.angles]
    values += [f"{v:.9f}" for v in s.matrix.ravel()]
    return ",".join(
        [s.image, str(s.size[0]), str(s.size[1]), *values, str(int(s.nir)), str(s.seed)]
    )
