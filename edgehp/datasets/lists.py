"""Lists of faces: CSV tables with a row a face, and the JSON box lists published for data sets.

Columns of a table: ``image`` (required); ``width,height`` of the photo; ``x_min,y_min,x_max,y_max``
or ``x,y,w,h`` in pixels; ``pitch,yaw,roll`` in degrees, convention ``"aflw2000"``;
``r00,r01,...,r22``, the canonical rotation matrix. Each group is there whole or not at all; some
have other usual names too (`_OTHER_NAMES`). A warning names the columns that are not used.

A box list, as published with Sheka & Samun, is ``{"file": [{"bbox": [x_min, y_min, x_max, y_max],
"type": "train" | "test", "faceid": 46712}]}``, in pixels; ``type`` and ``faceid`` may be missing.

Wherever boxes alone are asked for, either form is taken.
"""

from __future__ import annotations

import codecs
import csv
import io
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from edgehp.crop import Box
from edgehp.datasets.base import labels_from_angles
from edgehp.datasets.stores import NameIndex, inside, plain_name
from edgehp.errors import DataError, UsageError
from edgehp.files import decode_text, parse_json, read_bytes, sha256_bytes
from edgehp.images import LIST_SUFFIXES, report_left_out
from edgehp.pose import euler_from_matrix, geodesic_degrees, require_rotation

Array = npt.NDArray[np.float64]
logger = logging.getLogger(__name__)

SIZE = ("width", "height")
BOX = ("x_min", "y_min", "x_max", "y_max")
CORNER = ("x", "y", "w", "h")
ANGLES = ("pitch", "yaw", "roll")
MATRIX = tuple(f"r{i}{j}" for i in range(3) for j in range(3))
# What other tools call these columns -> the name here.
_OTHER_NAMES = {
    **dict.fromkeys(("file", "filename", "file_name"), "image"),
    **dict.fromkeys(("xmin", "x1"), "x_min"),
    **dict.fromkeys(("ymin", "y1"), "y_min"),
    **dict.fromkeys(("xmax", "x2"), "x_max"),
    **dict.fromkeys(("ymax", "y2"), "y_max"),
}
# Of the renderer: pseudo near-infrared or colour, and the picture's seed.
_ORIGIN = ("nir", "seed")
SPLITS = ("train", "test")
# Fewer rows may all be near-frontal by chance: a warning then.
_ROWS_TO_TELL_RADIANS = 50
# Angles printed with one decimal differ from their matrix by less than this.
_AGREEMENT_DEGREES = 0.2
# A box between 0 and 1 is a fraction of the photo, as YOLO and MediaPipe write it, not one pixel.
_LARGEST_FRACTION = 1.5


# --- tables ---------------------------------------------------------------------------------------


class Table(NamedTuple):
    """A CSV file: the names of its columns, and its rows' line numbers and cells by column."""

    columns: list[str]
    rows: list[tuple[int, dict[str, str]]]


@dataclass(frozen=True, eq=False)
class Row:
    """One row: a photo, and what the list says of it (see `edgehp.datasets.base.Sample`).

    The line is 0 where the list has none.
    """

    line: int
    image: str
    size: tuple[int, int] | None = None
    box: Box | None = None
    matrix: Array | None = field(default=None, repr=False)
    angles: Array | None = None


def read_table(data: bytes, where: str) -> Table:
    """Read a CSV file with a header line; columns get the names of this module, in lower case.

    Args:
        data: the file, UTF-8, with or without a byte order mark.
        where: its place, for messages.

    Raises:
        DataError: it is no CSV in UTF-8, is separated by something else than commas, a name occurs
            twice, or a row has more or fewer cells than the header.
    """
    reader = csv.reader(io.StringIO(decode_text(data, where), newline=""), strict=True)
    try:
        header = [c.strip().lower() for c in next(reader, [])]
        lines = [(reader.line_num, cells) for cells in reader if cells]
    except csv.Error as e:
        raise DataError(f"{where}: line {reader.line_num}: not valid CSV: {e}") from e
    if not header:
        raise DataError(f"{where}: an empty file, expected a CSV file with a header line")
    if len(header) == 1 and (other := next((c for c in ";\t|" if c in header[0]), None)):
        raise DataError(
            f"{where}: the columns are separated by {other!r}, expected commas\n"
            "hint: save it as CSV with commas, and with a point in decimals"
        )
    header = [c if _OTHER_NAMES.get(c, c) in header else _OTHER_NAMES.get(c, c) for c in header]
    if len(set(header)) != len(header):
        raise DataError(f"{where}: a column name occurs twice in {','.join(header)}")
    for number, cells in lines:
        if len(cells) != len(header):
            raise DataError(
                f"{where}: line {number}: {len(cells)} values, expected {len(header)} as in the "
                "header"
            )
    return Table(header, [(n, dict(zip(header, cells, strict=True))) for n, cells in lines])


def parse_table(data: bytes, where: str) -> list[Row]:
    """Read a CSV list of photos.

    Args:
        data: the file, as of `read_table`.
        where: its place, for messages.

    Raises:
        DataError: not CSV, a column is missing, a row is short or holds no number where one
            belongs, matrix and angles disagree, or the angles look like radians.
    """
    table = read_table(data, where)
    columns = _columns(table.columns, where)
    rows = [_row(line, cells, columns, f"{where}: line {line}") for line, cells in table.rows]
    if not rows:
        raise DataError(f"{where}: the list has no rows")
    _refuse_radians(rows, where)
    return rows


def _columns(header: list[str], where: str) -> set[str]:
    """The columns to use; a group is used when all of it is there."""
    have = set(header)
    missing = [] if "image" in have else ["image"]
    for group in (SIZE, BOX, CORNER, ANGLES, MATRIX):
        if have & set(group):
            missing += [c for c in group if c not in have and c not in missing]
    if missing:
        raise DataError(
            f"{where}: missing columns {','.join(missing)}; found {','.join(header)}\n"
            "hint: the first line names the columns"
        )
    if not have & {*BOX, *CORNER, *ANGLES, *MATRIX}:
        raise DataError(
            f"{where}: no columns of boxes or labels are known in {','.join(header)}\n"
            f"hint: call a box {','.join(BOX)} or {','.join(CORNER)}, angles {','.join(ANGLES)}"
        )
    known = {"image", *SIZE, *BOX, *CORNER, *ANGLES, *MATRIX, *_ORIGIN}
    if unknown := [c for c in header if c not in known]:
        logger.warning("%s: columns that are not used: %s", where, ", ".join(unknown[:8]))
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
    matrix, angles = _labels(numbers(MATRIX), numbers(ANGLES), at)
    return Row(
        line,
        image,
        None if size is None else (int(size[0]), int(size[1])),
        None if box is None else _box(box, at),
        matrix,
        angles,
    )


def _box(corners: Sequence[float], at: str) -> Box:
    """A box of a list.

    Raises:
        DataError: it is empty, or in fractions of the photo.
    """
    box = Box(*map(float, corners))
    shown = ", ".join(f"{v:g}" for v in corners)
    if box.x_min >= box.x_max or box.y_min >= box.y_max:
        raise DataError(
            f"{at}: the box {shown} is empty: x_min < x_max and y_min < y_max expected\n"
            "hint: x_min,y_min,x_max,y_max are corners, not x, y, width and height"
        )
    if max(map(abs, corners)) <= _LARGEST_FRACTION:
        raise DataError(
            f"{at}: the box {shown} looks like fractions of the photo; expected pixels\n"
            "hint: multiply x by the photo's width and y by its height"
        )
    return box


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


def parse_list(data: bytes, where: str) -> list[Row]:
    """Read a list of boxes or labels that lies beside photos, a CSV table or a JSON box list.

    Raises:
        DataError: as of `parse_table` and `load_boxes`.
    """
    if not _is_json(data):
        return parse_table(data, where)
    listed = _published(data, where)
    return [Row(0, file, box=entry.box) for file, entries in listed.items() for entry in entries]


def _is_json(data: bytes) -> bool:
    return data.removeprefix(codecs.BOM_UTF8).lstrip().startswith((b"{", b"["))


def _refuse_radians(rows: list[Row], where: str) -> None:
    """Refuse angles in radians in a long list, and ask about them in a short one."""
    angles = [r.angles for r in rows if r.angles is not None]
    if not angles or not 0 < np.abs(angles).max() <= math.pi:
        return
    found = f"{where}: all {len(angles)} rows have |angles| <= pi, which looks like radians"
    if len(angles) > _ROWS_TO_TELL_RADIANS:
        raise DataError(f"{found}; expected pitch,yaw,roll in degrees: multiply by 180/pi")
    logger.warning("%s; they are taken as degrees: multiply by 180/pi if they are not", found)


def parse_box(text: str) -> Box:
    """A box from ``"x_min,y_min,x_max,y_max"`` in pixels.

    Raises:
        UsageError: it is something else, no box, or in fractions of the photo.
    """
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) != 4 or not all(abs(v) < 1e5 for v in values):
        raise UsageError(f"--boxes {text!r}: expected x_min,y_min,x_max,y_max in pixels")
    try:
        return _box(values, f"--boxes {text}")
    except DataError as e:
        raise UsageError(str(e)) from e


# --- published box lists --------------------------------------------------------------------------


@dataclass(frozen=True)
class BoxEntry:
    """One face of a list: its box, its split if given, its face number if given."""

    box: Box
    split: str | None = None
    face_id: int | None = None


class _Face(msgspec.Struct, frozen=True):
    """One face as published; further keys are passed over."""

    bbox: tuple[float, float, float, float]
    type: Literal["train", "test"] | None = None
    faceid: int | None = None


class BoxList:
    """A published list.

    Attributes:
        faces: the faces of every file, by the file's path within the data set.
        source: the list's file name and the start of its SHA-256, for protocols.
    """

    def __init__(self, faces: Mapping[str, Sequence[BoxEntry]], source: str) -> None:
        """A list of `faces` from `source`."""
        self.faces, self.source = faces, source
        self._index = NameIndex(faces)

    def of(self, file: str) -> Sequence[BoxEntry]:
        """The faces of `file`.

        Raises:
            DataError: the list does not name it; the message suggests a near name.
        """
        found = self._index.find(file)
        if found is None:
            raise DataError(f"{file}: not in the box list {self.source}{self._index.hint(file)}")
        return self.faces[found]

    def chosen(self, file: str, split: str | None) -> list[BoxEntry]:
        """The faces of `file`, as the list spells it, in `split`; all where `split` is None."""
        return [e for e in self.faces.get(file, ()) if split in (None, e.split)]

    def files(self, split: str | None) -> list[str]:
        """The files with a face in `split`.

        Raises:
            DataError: the list has no such split.
        """
        files = [f for f in self.faces if self.chosen(f, split)]
        if not files:
            raise DataError(f"{self.source}: the list has no faces of split {split!r}")
        return files


def load_boxes(path: Path) -> BoxList:
    """Read a list of boxes: as published in JSON, or a CSV table with a row a face.

    Raises:
        DataError: missing, not as described above, or with the same face twice; the message names
            the entry.
    """
    data, where = read_bytes(path, "a list of face boxes"), str(path)
    listed: dict[str, list[BoxEntry]] = {}
    if _is_json(data):
        listed = _published(data, where)
    else:
        for row in parse_table(data, where):
            at = f"{where}: line {row.line}"
            if row.box is None:
                raise DataError(f"{where}: no columns of a box; expected {','.join(BOX)}")
            faces = listed.setdefault(str(inside(row.image, at)), [])
            if (entry := BoxEntry(row.box)) in faces:
                raise DataError(f"{at}: this box of {row.image} is listed twice")
            faces.append(entry)
    return BoxList(listed, f"{path.name} (sha256 {sha256_bytes(data)[:16]})")


def _published(data: bytes, where: str) -> dict[str, list[BoxEntry]]:
    form = '{"file": [{"bbox": [x_min, y_min, x_max, y_max]}]}'
    try:
        listed = parse_json(data, dict[str, list[_Face]], where)
    except DataError as e:
        if "\nhint:" in str(e):
            raise
        raise DataError(f"{e}\nhint: a list of boxes is {form} or a CSV table") from e
    if not listed:
        raise DataError(f"{where}: expected {form}, found no files")
    faces: dict[str, list[BoxEntry]] = {}
    for file, entries in listed.items():
        if not entries:
            raise DataError(f"{where}: {file}: expected a list of faces")
        found = [BoxEntry(_box(e.bbox, f"{where}: {file}"), e.type, e.faceid) for e in entries]
        if (name := plain_name(file)) in faces or len(set(found)) < len(found):
            raise DataError(f"{where}: {file} is listed twice")
        faces[name] = found
    return faces


def find_boxes(root: Path, file: str, boxes: Path | str | None) -> BoxList | None:
    """The box list to use.

    Args:
        root: the data set's folder.
        file: the usual name of its list, e.g. ``"BIWI.json"``.
        boxes: the list that was asked for; None looks for ``boxes.json`` and `file` in `root`,
            then for `file` beside it and in a folder ``boxes`` beside it, in upper or lower case.

    Returns:
        The list, None if none was asked for and none is there; lists of other names in `root` are
        then said in a warning.

    Raises:
        DataError: the list cannot be read.
    """
    if boxes is not None:
        return load_boxes(Path(boxes))
    beside = root.resolve().parent
    here = _lists_in(root)
    for found, names in (
        (here, ("boxes.json", file)),
        (_lists_in(beside), (file,)),
        (_lists_in(beside / "boxes"), (file,)),
    ):
        for name in names:
            if (path := found.get(name.lower())) is not None:
                return load_boxes(path)
    remedy = "; give the one with face boxes with --boxes"
    report_left_out(str(root), Counter(), (p.name for p in here.values()), remedy=remedy)
    return None


def _lists_in(folder: Path) -> dict[str, Path]:
    """The lists in a folder, which may be missing, by their names in lower case."""
    if not folder.is_dir():
        return {}
    lists = (p for p in folder.iterdir() if p.suffix.lower() in LIST_SUFFIXES)
    return {p.name.lower(): p for p in lists if not p.name.startswith("._")}


def require_split(split: str | None, boxes: BoxList | None, name: str) -> None:
    """Check that `split` can be had.

    Raises:
        UsageError: `split` is not a split, or there is no list to say which face belongs to it.
    """
    if split is None:
        return
    if split not in SPLITS:
        raise UsageError(f"split {split!r} is none of {', '.join(SPLITS)}")
    if boxes is None:
        raise UsageError(f"{name}: the split {split!r} needs a box list that defines it (--boxes)")
