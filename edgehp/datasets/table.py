"""CSV lists of faces: boxes and labels, one row a photo.

Columns: ``image`` (required); ``width,height`` of the photo; ``x_min,y_min,x_max,y_max`` or
``x,y,w,h`` in pixels;
``pitch,yaw,roll`` in degrees, convention ``"aflw2000"``; ``r00,r01,...,r22``, the canonical
rotation matrix. Each group is there whole or not at all; unknown columns are ignored.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from edgehp.crop import Box
from edgehp.datasets.base import labels_from_angles
from edgehp.errors import DataError
from edgehp.pose import euler_from_matrix, geodesic_degrees, require_rotation

__all__ = ["ANGLES", "BOX", "MATRIX", "Row", "parse_table"]

Array = npt.NDArray[np.float64]

SIZE = ("width", "height")
BOX = ("x_min", "y_min", "x_max", "y_max")
CORNER = ("x", "y", "w", "h")
ANGLES = ("pitch", "yaw", "roll")
MATRIX = tuple(f"r{i}{j}" for i in range(3) for j in range(3))
# Fewer rows may all be near-frontal by chance; then nothing can be said about the unit.
_ROWS_TO_TELL_RADIANS = 50
# Angles printed with one decimal differ from their matrix by less than this.
_AGREEMENT_DEGREES = 0.2
# A box between 0 and 1 is a fraction of the photo, as YOLO and MediaPipe write it, not one pixel.
LARGEST_FRACTION = 1.5


@dataclass(frozen=True, eq=False)
class Row:
    """One row: a photo, and what the list says of it (see `edgehp.datasets.base.Sample`)."""

    line: int
    image: str
    size: tuple[int, int] | None = None
    box: Box | None = None
    matrix: Array | None = field(default=None, repr=False)
    angles: Array | None = None


def parse_table(data: bytes, where: str, required: Sequence[str] = ()) -> list[Row]:
    """Read a CSV list.

    Args:
        data: the file, UTF-8, with a header line.
        where: its place, for messages.
        required: columns that must be there besides ``image``.

    Raises:
        DataError: not CSV, a column is missing, a row is short or holds no number where one
            belongs, matrix and angles disagree, or the angles look like radians.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise DataError(f"{where}: expected a CSV file in UTF-8: {e.reason}") from e
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [c.strip() for c in next(reader, [])]
        lines = [(reader.line_num, cells) for cells in reader if cells]
    except csv.Error as e:
        raise DataError(f"{where}: line {reader.line_num}: not valid CSV: {e}") from e
    columns = _columns(header, required, where)
    rows = []
    for number, cells in lines:
        at = f"{where}: line {number}"
        if len(cells) != len(header):
            raise DataError(f"{at}: {len(cells)} values, expected {len(header)} as in the header")
        rows.append(_row(number, dict(zip(header, cells, strict=True)), columns, at))
    if not rows:
        raise DataError(f"{where}: the list has no rows")
    _refuse_radians(rows, where)
    return rows


def _columns(header: list[str], required: Sequence[str], where: str) -> set[str]:
    """The columns to use; a group is used when all of it is there."""
    have = set(header)
    if len(have) != len(header):
        raise DataError(f"{where}: a column name occurs twice in {','.join(header)}")
    missing = [c for c in ("image", *required) if c not in have]
    for group in (SIZE, BOX, CORNER, ANGLES, MATRIX):
        if have & set(group):
            missing += [c for c in group if c not in have and c not in missing]
    if missing:
        raise DataError(
            f"{where}: missing columns {','.join(missing)}; found {','.join(header) or 'nothing'}"
        )
    if not have & {*BOX, *CORNER, *ANGLES, *MATRIX}:
        raise DataError(
            f"{where}: no columns of boxes or labels are known in {','.join(header)}\n"
            f"hint: call a box {','.join(BOX)} or {','.join(CORNER)}, angles {','.join(ANGLES)}"
        )
    return have


def _row(line: int, cells: dict[str, str], columns: set[str], at: str) -> Row:
    def numbers(group: Sequence[str]) -> list[float] | None:
        if group[0] not in columns:
            return None
        try:
            values = [float(cells[c]) for c in group]
        except ValueError:
            values = [math.nan]
        if not all(map(math.isfinite, values)):
            found = ",".join(cells[c] for c in group)
            raise DataError(f"{at}: expected finite numbers for {','.join(group)}, found {found!r}")
        return values

    image = cells["image"].strip()
    if not image:
        raise DataError(f"{at}: the image column is empty")
    size, box = numbers(SIZE), numbers(BOX)
    if box is None and (corner := numbers(CORNER)) is not None:
        x, y, w, h = corner
        box = [x, y, x + w, y + h]
    if size is not None and (min(size) < 1 or any(v != int(v) for v in size)):
        raise DataError(f"{at}: expected width and height in whole pixels, found {size}")
    if box is not None and (box[0] >= box[2] or box[1] >= box[3]):
        raise DataError(f"{at}: the box {box} is empty: x_min < x_max and y_min < y_max expected")
    if box is not None and max(map(abs, box)) <= LARGEST_FRACTION:
        raise DataError(
            f"{at}: the box {box} looks like fractions of the photo; expected pixels\n"
            "hint: multiply x by the photo's width and y by its height"
        )
    matrix, angles = _labels(numbers(MATRIX), numbers(ANGLES), at)
    return Row(
        line,
        image,
        None if size is None else (int(size[0]), int(size[1])),
        None if box is None else Box(*box),
        matrix,
        angles,
    )


def _labels(
    entries: list[float] | None, angles: list[float] | None, at: str
) -> tuple[Array | None, Array | None]:
    if angles is not None and max(map(abs, angles)) > 360:
        raise DataError(f"{at}: expected angles within +-360 degrees, found {angles}")
    given = None if angles is None else labels_from_angles(angles, at)
    if entries is None:
        return given or (None, None)
    matrix = require_rotation(np.reshape(entries, (3, 3)), at)
    matrix.flags.writeable = False
    if given is None:
        computed = euler_from_matrix(matrix)
        computed.flags.writeable = False
        return matrix, computed
    if (off := float(geodesic_degrees(matrix, given[0]))) > _AGREEMENT_DEGREES:
        raise DataError(
            f"{at}: r00..r22 and pitch,yaw,roll differ by {off:.2f} degrees; expected the "
            "canonical matrix and AFLW2000-3D's signs (see edgehp.pose)"
        )
    return matrix, given[1]


def _refuse_radians(rows: list[Row], where: str) -> None:
    angles = [r.angles for r in rows if r.angles is not None]
    if len(angles) > _ROWS_TO_TELL_RADIANS and np.abs(angles).max() <= math.pi:
        raise DataError(
            f"{where}: all {len(angles)} rows have |angles| <= pi, which looks like radians; "
            "expected pitch,yaw,roll in degrees: multiply by 180/pi"
        )
