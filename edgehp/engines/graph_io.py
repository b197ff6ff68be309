"""Checks on the inputs and outputs that a runtime reports, before anything is run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from edgehp.engines.base import INPUT_NAME, OUTPUT_NAMES
from edgehp.errors import DataError

__all__ = ["check_file", "holds_half", "input_size_of"]

# A ResNet152 in FP32 has 240 MB; whatever is far larger is a mistaken path.
_LARGEST = 2 << 30


def check_file(path: str | Path, what: str) -> Path:
    """`path` if it is a file of a believable size.

    Args:
        path: of an engine or graph.
        what: for the message, such as ``"an ONNX graph"``.

    Raises:
        DataError: it is missing, no file, empty or huge.
    """
    path = Path(path)
    if not path.is_file():
        kind = "is not a file" if path.exists() else "does not exist"
        raise DataError(f"{path} {kind}; expected {what}")
    size = path.stat().st_size
    if not 0 < size <= _LARGEST:
        raise DataError(f"{path} has {size} bytes; expected {what} of at most {_LARGEST} bytes")
    return path


def input_size_of(
    inputs: Mapping[str, tuple[str, Sequence[int | None]]], outputs: Sequence[str], path: Path
) -> int:
    """The side S of the input, if the graph is a deployed head-pose graph.

    Args:
        inputs: name -> (element type as the runtime spells it, shape; None or negative for a
            free dimension).
        outputs: names.
        path: for the message.

    Raises:
        DataError: names, type or shape differ from `edgehp.networks.graph`.
    """
    shown = ", ".join(f"{n}: {t} {list(s)}" for n, (t, s) in inputs.items())
    wrong = DataError(
        f"{path}: expected one input {INPUT_NAME!r} uint8 [N, S, S, 3] and the outputs "
        f"{', '.join(OUTPUT_NAMES)}; found {shown or 'no input'} and {', '.join(outputs)}; "
        "build the graph with edgehp"
    )
    if list(inputs) != [INPUT_NAME] or not set(OUTPUT_NAMES) <= set(outputs):
        raise wrong
    kind, shape = inputs[INPUT_NAME]
    if kind.lower() not in ("uint8", "u8", "tensor(uint8)") or len(shape) != 4:
        raise wrong
    _, height, width, channels = shape
    if height is None or height <= 0 or height != width or channels != 3:
        raise wrong
    return height


# Field numbers of onnx.proto: ModelProto.graph, GraphProto.initializer, TensorProto.data_type.
_GRAPH, _INITIALIZER, _DATA_TYPE = 7, 5, 2
_FLOAT16 = 10
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def holds_half(path: Path) -> bool:
    """Whether an ONNX file has FP16 constants, read without the onnx package.

    A file that is no ONNX graph gives False: the runtime that reads it next says what is wrong.
    """
    model = memoryview(path.read_bytes())
    try:
        for graph in _messages(model, _GRAPH):
            for tensor in _messages(graph, _INITIALIZER):
                if any(n == _DATA_TYPE and v == _FLOAT16 for n, v in _fields(tensor)):
                    return True
    except (IndexError, ValueError):
        return False
    return False


def _messages(data: memoryview, number: int) -> Iterator[memoryview]:
    for found, value in _fields(data):
        if found == number and isinstance(value, memoryview):
            yield value


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Number and value of each field of a protocol buffer message, in its wire format."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield key >> 3, value
        elif kind == _BYTES:
            size, at = _varint(data, at)
            yield key >> 3, data[at : at + size]
            at += size
        elif kind in (_FIXED32, _FIXED64):
            at += 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {kind}")


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number longer than 64 bits")
