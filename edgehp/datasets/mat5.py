"""Numeric arrays out of MATLAB 5 files, with nothing but numpy.

Validation runs on the device, where scipy is not installed, and the `.mat` files of AFLW2000-3D and
300W-LP need little of the format ("MAT-File Format", The MathWorks, chapter 1, "Level 5"): real
numeric matrices, zlib-compressed or not. Everything else in a file is passed over.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgehp.errors import DataError
from edgehp.files import read_bytes

Array = npt.NDArray[np.float64]

_MATRIX, _COMPRESSED = 14, 15
# Data types of the format (table 1-1) that hold numbers.
_NUMBERS = {
    1: "i1",
    2: "u1",
    3: "i2",
    4: "u2",
    5: "i4",
    6: "u4",
    7: "f4",
    9: "f8",
    12: "i8",
    13: "u8",
}
_NUMERIC_CLASSES = range(6, 16)  # mxDOUBLE_CLASS .. mxUINT64_CLASS
# 300W-LP's largest variable has some thousand bytes; more is an attack on memory.
_LARGEST_VARIABLE = 16 * 2**20


def read_mat(path: Path, names: Collection[str]) -> dict[str, Array]:
    """Read the real numeric arrays called `names`.

    Args:
        path: a MATLAB 5 file.
        names: the variables wanted; those the file does not have are missing from the result.

    Returns:
        float64 arrays in MATLAB's shape, by name.

    Raises:
        DataError: missing, truncated, damaged, or no MATLAB 5 file.
    """
    data = read_bytes(path, "a MATLAB 5 file")
    order = {b"IM": "<", b"MI": ">"}.get(data[126:128], "")
    if not order or not data.startswith(b"MATLAB 5.0"):
        raise DataError(f"{path}: expected a MATLAB 5 file, found bytes {data[:10]!r}")
    found: dict[str, Array] = {}
    try:
        for kind, body in _elements(data[128:], order):
            if kind == _COMPRESSED:
                kind, body = next(_elements(_inflate(body), order))
            if kind == _MATRIX and (variable := _variable(body, order, names)) is not None:
                found[variable[0]] = variable[1]
                if len(found) == len(names):
                    break
    except (ValueError, struct.error, zlib.error, StopIteration) as e:
        raise DataError(f"{path}: truncated or damaged MATLAB file ({e}); fetch it again") from e
    return found


def _inflate(body: bytes) -> bytes:
    inflater = zlib.decompressobj()
    data = inflater.decompress(body, _LARGEST_VARIABLE)
    if inflater.unconsumed_tail:
        raise ValueError(f"a variable of more than {_LARGEST_VARIABLE} bytes")
    if not inflater.eof:
        raise ValueError("compressed data end early")
    return data


def _elements(data: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """The (type, bytes) of one data element after the other."""
    at = 0
    while at < len(data):
        kind, size = struct.unpack_from(order + "II", data, at)
        if kind >> 16:  # small element: type and size share a word, the data are in the other
            kind, size, start, end = kind & 0xFFFF, kind >> 16, at + 4, at + 8
            if size > 4:
                raise ValueError("a small element of more than 4 bytes")
        else:
            start = at + 8
            # Compressed elements are not padded, all others are, to 8 bytes.
            end = start + (size if kind == _COMPRESSED else -(-size // 8) * 8)
        if start + size > len(data):
            raise ValueError(f"an element of {size} bytes goes beyond the end")
        yield kind, data[start : start + size]
        at = end


def _variable(body: bytes, order: str, names: Collection[str]) -> tuple[str, Array] | None:
    """Name and values of a matrix, None if it is not wanted or not real and numeric."""
    parts = _elements(body, order)
    flags = struct.unpack_from(order + "I", next(parts)[1])[0]
    shape = np.frombuffer(next(parts)[1], order + "i4").tolist()
    name = next(parts)[1].decode("latin-1")
    if name not in names:
        return None
    complex_values = flags & 0x0800
    if flags & 0xFF not in _NUMERIC_CLASSES or complex_values:
        return None
    kind, raw = next(parts)
    if kind not in _NUMBERS:
        raise ValueError(f"{name} has data of unknown type {kind}")
    values = np.frombuffer(raw, order + _NUMBERS[kind])
    if min(shape, default=0) < 0 or math.prod(shape) != values.size:
        raise ValueError(f"{name} has {values.size} values, its shape is {shape}")
    return name, values.astype(np.float64).reshape(shape, order="F")
