"""Files: written whole, hashed, and read into typed records.

Every table and setting of edgehp, JSON or TOML, is described once, by a `msgspec.Struct`, and read
by `read_json`, `read_toml` or `parse_json`. They refuse what is ambiguous or out of bounds: unknown
and repeated keys, numbers that are not finite, true for 1, text that is not UTF-8. A message names
the file, the key, the value found and what was expected.

The module also knows where the data directories are that travel with the package.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import math
import os
import re
import secrets
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any, BinaryIO, NoReturn, TypeVar, Union, get_args, get_origin

import msgspec

from edgehp.errors import DataError, EdgehpError, EnvironmentalError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")

PACKAGE = Path(__file__).resolve().parent
_CHUNK = 2**20
# Every TOML file edgehp reads is written by hand; a larger one is a mistaken path.
_LARGEST_TOML = 1 << 20
_LARGEST_JSON = 1 << 26
_LARGEST_FILE = 1 << 28
# No document of this package nests deeper than ten; the limit keeps every later walk over the
# value far from the interpreter's own.
_DEEPEST = 64
_LARGEST_INTEGER = 2**63
# Characters of a value shown in a message.
_SHOWN = 60


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of what edgehp reads from files: immutable, and unknown keys are refused.

    Derive with ``frozen=True``, which type checkers ask for.

    Constrain fields by their types (`typing.Literal`, `msgspec.Meta`); what concerns several
    fields is checked in ``__post_init__``, which raises `ValueError` saying what is wrong.
    """


def read_toml(path: str | Path, kind: type[T], *, error: type[EdgehpError] = DataError) -> T:
    """Read a TOML file of at most 1 MiB.

    Args:
        path: a UTF-8 file.
        kind: what it holds, a `Record` or any other type that msgspec converts to.
        error: the class of error to raise.

    Raises:
        EdgehpError: of class `error`: the file cannot be read, is no TOML, or does not fit `kind`.
    """
    path = Path(path)
    data = read_bytes(path, "a TOML file", limit=_LARGEST_TOML, error=error, empty=True)
    text = decode_text(data, str(path), error)
    try:
        values = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as e:
        raise error(f"{path}: not valid TOML: {e}\nhint: correct the file") from e
    return to_record(values, kind, str(path), error)


def read_json(path: str | Path, kind: type[T], *, error: type[EdgehpError] = DataError) -> T:
    """Read a JSON file of at most 64 MiB; as `read_toml`."""
    path = Path(path)
    data = read_bytes(path, "a JSON file", limit=_LARGEST_JSON, error=error)
    return parse_json(data, kind, str(path), error)


def parse_json(data: bytes, kind: type[T], where: str, error: type[EdgehpError] = DataError) -> T:
    """Parse a JSON text. Bound the length of `data` before calling.

    Args:
        data: the text in UTF-8.
        kind: what it holds, a `Record` or any other type that msgspec converts to.
        where: the file's name, for messages.
        error: the class of error to raise.

    Raises:
        EdgehpError: of class `error`: it is no JSON or does not fit `kind`.
    """
    text = decode_text(data, where, error)
    try:
        values = strict_json(text.encode())
    except ValueError as e:
        raise error(f"{where}: not valid JSON: {e}\nhint: correct or replace the file") from e
    return to_record(values, kind, where, error)


def to_record(
    values: Any,
    kind: type[T],
    where: str,
    error: type[EdgehpError] = DataError,
    *,
    infinite: bool = False,
) -> T:
    """Parsed JSON or TOML as a `kind`.

    Args:
        values: dictionaries, lists, strings, numbers.
        kind: a `Record` or any other type that msgspec converts to.
        where: the file's name, for messages.
        error: the class of error to raise.
        infinite: numbers may be infinite.

    Raises:
        EdgehpError: of class `error`: they do not fit.
    """
    if not infinite and (path := _not_finite(values, "$")) is not None:
        raise error(f"{where}: {_about(values, path)}; expected a finite number")
    try:
        return msgspec.convert(values, kind, str_keys=True)
    except msgspec.ValidationError as e:
        raise error(f"{where}: {_fault(str(e), values, kind)}") from e


def now() -> str:
    """The time in UTC as manifests and reports write it."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def plain(value: Any) -> Any:
    """A record as dictionaries, lists, strings and numbers, for JSON and for digests."""
    return _with_lists(msgspec.to_builtins(value))


def _with_lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_lists(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_lists(v) for v in value]
    return value


def finite(value: Any) -> Any:
    """The value with NaN and infinities, which JSON does not have, as null, and keys as text."""
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def strict_json(data: bytes) -> Any:
    """The value of a JSON text in UTF-8. Bound the length of `data` before calling.

    Raises:
        ValueError: it is no JSON, a key appears twice, a number is not finite or beyond 64 bits,
            or it is nested deeper than 64 levels.
    """
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_constant,
            parse_float=_finite,
            parse_int=_integer,
        )
    except RecursionError as e:
        raise ValueError("it is nested too deeply") from e
    level = [value]
    for _ in range(_DEEPEST):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return value
    raise ValueError("it is nested too deeply")


def stand_in(head: bytes) -> str | None:
    """What a file is that only stands where another should be, by its first bytes; None if not.

    Args:
        head: at least the first 64 bytes.

    Returns:
        A description with a hint, to follow "FILE is ".
    """
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the data\nhint: run 'git lfs pull'"
    start = head.removeprefix(codecs.BOM_UTF8).lstrip()[:32].lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head")):
        return (
            "a web page, not the data: the link led to a login, preview or error page\n"
            "hint: download it with the site's own button or tool"
        )
    if head.startswith((b"\0\5\x16\7", b"\0\5\x16\0")):
        return "macOS's AppleDouble data, not the file itself\nhint: use the file without '._'"
    return None


def is_utf8(name: str) -> bool:
    """Whether a file's name is UTF-8: Python stands surrogates for bytes that are not."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def require_utf8(path: Path | str) -> None:
    """Refuse a path that is not UTF-8: OpenCV, JSON and zips cannot hold it.

    Raises:
        DataError: it is not.
    """
    if not is_utf8(os.fspath(path)):
        raise DataError(
            f"{os.fspath(path)!a}: the file name is not UTF-8\n"
            "hint: rename it, e.g. with 'convmv -f latin1 -t utf8 --notest FILE'"
        )


def read_bytes(
    path: Path,
    what: str,
    *,
    limit: int = _LARGEST_FILE,
    error: type[EdgehpError] = DataError,
    empty: bool = False,
) -> bytes:
    """The whole file at `path`, which should be `what`.

    Args:
        path: of the file.
        what: in words, with its article, for messages.
        limit: largest size in bytes.
        error: the class of error to raise.
        empty: whether it may be empty.

    Raises:
        EdgehpError: of class `error`: missing, unreadable, empty, too large, a pointer or a page.
    """
    try:
        with path.open("rb") as file:
            # Piece by piece: asked for `limit` bytes, Python takes memory for all of them first.
            data = bytearray()
            while len(data) <= limit and (piece := file.read(_CHUNK)):
                data += piece
    except OSError as e:
        where = "a link to nowhere" if path.is_symlink() and not path.exists() else ""
        reason = where or e.strerror or e
        raise error(f"{path} cannot be read ({reason}); expected {what}") from e
    if not data and not empty:
        raise error(f"{path}: an empty file, expected {what}")
    if len(data) > limit:
        raise error(
            f"{path}: larger than {limit} bytes, expected {what}\nhint: is it the right file?"
        )
    if (other := stand_in(bytes(data[:512]))) is not None:
        raise error(f"{path} is {other}")
    return bytes(data)


def decode_text(data: bytes, where: str, error: type[EdgehpError] = DataError) -> str:
    """`data` as text, without the byte order mark that Windows' editors put before UTF-8.

    Raises:
        EdgehpError: of class `error`: another encoding than UTF-8, which is named.
    """
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or data[:2].count(0) == 1:
        raise error(f"{where}: found UTF-16 text, expected UTF-8\nhint: save the file as UTF-8")
    if b"\0" in data:
        raise error(f"{where}: found zero bytes, expected text in UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        raise error(
            f"{where}: line {line} is not UTF-8 text (byte {e.start} is 0x{data[e.start]:02x}), "
            "perhaps Latin-1\nhint: save the file as UTF-8"
        ) from e


def _inside(value: Any) -> list[Any]:
    """The objects and arrays directly inside `value`."""
    if isinstance(value, dict):
        return [v for v in value.values() if isinstance(v, (dict, list))]
    if isinstance(value, list):
        return [v for v in value if isinstance(v, (dict, list))]
    return []


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice[:_SHOWN]!r} appears twice")
    return found


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is not finite")
    return number


def _integer(text: str) -> int:
    number = int(text) if len(text) <= 20 else _LARGEST_INTEGER
    if not -_LARGEST_INTEGER <= number < _LARGEST_INTEGER:
        raise ValueError(f"{text[:40]} does not fit into 64 bits")
    return number


def _not_finite(value: Any, path: str) -> str | None:
    """The path of the first number that is not finite, in msgspec's form (``$.a[0]``)."""
    if isinstance(value, float):
        return None if math.isfinite(value) else path
    inner: Any = ()
    if isinstance(value, dict):
        inner = ((f"{path}.{key}", v) for key, v in value.items())
    elif isinstance(value, (list, tuple)):
        inner = ((f"{path}[{i}]", v) for i, v in enumerate(value))
    return next((found for p, v in inner if (found := _not_finite(v, p)) is not None), None)


def _fault(message: str, values: Any, kind: Any) -> str:
    """A message of msgspec in this package's form: key, value found, value expected."""
    reason, _, path = message.partition(" - at `")
    path = path.removesuffix("`") or "$"
    if found := re.match(r"Object contains unknown field `(.*)`", reason):
        known = ", ".join(_fields(_type_at(kind, path)))
        return f"key {_key(f'{path}.{found[1]}')} is not known" + (
            f"; known: {known}" * bool(known)
        )
    if found := re.match(r"Object missing required field `(.*)`", reason):
        return f"key {_key(f'{path}.{found[1]}')} is missing"
    if reason.startswith("Expected "):
        expected, _, got = reason.removeprefix("Expected ").partition(", got ")
        # Of an array the length found is no type.
        got = "" if got.isdigit() else got
        expected = expected.replace("`", "").replace("str matching regex", "the form")
        expected = expected.replace(r"(?!\\n)", "")
        return f"{_about(values, path, got.strip('`'))}; expected {expected}"
    if reason.startswith("Invalid enum value"):
        choices = ", ".join(map(repr, sorted(get_args(_type_at(kind, path)))))
        return f"{_about(values, path)}; expected one of {choices}"
    if found := re.match(r"key '([^']+)'(.*)", reason):
        # Of a record's own check, which knows its keys alone.
        return f"key {_key(f'{path}.{found[1]}')}{found[2]}"
    return reason if path == "$" else f"key {_key(path)}: {reason}"


def _key(path: str) -> str:
    return "'" + path.removeprefix("$").removeprefix(".").replace("[...]", ".*") + "'"


def _steps(path: str) -> list[tuple[str, str]]:
    """The name of a field, or the index in an array or map, of every step of ``$.a[0].b[...]``."""
    return re.findall(r"\.([^.\[]+)|\[(\d+|\.\.\.)\]", path)


def _about(values: Any, path: str, got: str = "") -> str:
    """``key 'a.b' is 3``; of a path through a map, the first value of type `got`."""
    found = [("$", values)]
    for name, index in _steps(path):
        deeper: list[tuple[str, Any]] = []
        for at, value in found:
            if index == "..." and isinstance(value, dict):
                deeper += [(f"{at}.{key}", v) for key, v in value.items()]
            elif index and isinstance(value, (list, tuple)):
                deeper += [
                    (f"{at}[{i}]", v) for i, v in enumerate(value) if index in ("...", str(i))
                ]
            elif name and isinstance(value, dict) and name in value:
                deeper.append((f"{at}.{name}", value[name]))
        found = deeper
    kinds = {"int": int, "float": float, "str": str, "bool": bool, "object": dict, "array": list}
    matching = [each for each in found if not got or type(each[1]) is kinds.get(got)]
    if not matching:
        return f"key {_key(path)} is of the wrong type" + (f" ({got})" if got else "")
    at, value = matching[0] if got or len(found) == 1 else (path, "out of range")
    if at == "$":
        return f"found {_show(value)}"
    return f"key {_key(at)} is {_show(value)}"


def _show(value: Any) -> str:
    text = repr(value) if isinstance(value, (str, float)) else json.dumps(value, default=str)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def _type_at(kind: Any, path: str) -> Any:
    """The type at `path`, without what constrains it and without None; None if there is none."""
    for name, index in [*_steps(path), ("", "")]:
        while True:
            inner = [each for each in get_args(kind) if each is not type(None)]
            optional = get_origin(kind) in (Union, types.UnionType) and len(inner) == 1
            if not optional and get_origin(kind) is not Annotated:
                break
            kind = inner[0]
        if name:
            kind = _fields(kind).get(name)
        elif index:
            # Of a map its values, of an array its items, of which a fixed one has one type each.
            items = [each for each in inner if each is not ...] or [None]
            kind = items[int(index)] if index.isdigit() and len(items) > 1 else items[-1]
    return kind


def _fields(kind: Any) -> dict[str, Any]:
    """Types of the fields of a `msgspec.Struct`, by their names in files."""
    known = msgspec.structs.fields(kind) if hasattr(kind, "__struct_fields__") else ()
    return {field.encode_name: field.type for field in known}


def sha256_bytes(data: bytes) -> str:
    """SHA-256 (hex) of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 (hex) of the file's content, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while piece := f.read(_CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def json_digest(values: Any) -> str:
    """SHA-256 (hex) of the canonical JSON of a record or dictionary: keys sorted, ASCII only.

    Raises:
        ValueError: it holds a number that is not finite.
    """
    return sha256_bytes(
        json.dumps(plain(values), sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    )


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` when the block ends without an exception.

    It is a temporary file beside `path`, flushed to disk before it is renamed, and removed if the
    block or the disk fails; `path` is then what it was before.

    Raises:
        OSError: the directory is missing or not writable, or the disk is full; about `path`.
    """
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}"
    # Not tempfile: its files are for the owner alone, this one gets what open() would have given.
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except OSError as e:
        # The user has never heard of the temporary file.
        raise OSError(e.errno, e.strerror, str(path)) from e
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_whole(path: Path, content: bytes | str) -> None:
    """Replace `path` by `content` (text as UTF-8), whole or not at all.

    Raises:
        OSError: as of `replacing`.
    """
    with replacing(path) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


@contextmanager
def output_to(path: Path, option: str) -> Iterator[None]:
    """Around what writes to `path`, which the user gave with `option`.

    Raises:
        EnvironmentalError: the block raised an `OSError`.
    """
    try:
        yield
    except OSError as e:
        raise EnvironmentalError(
            f"{path} cannot be written ({e.strerror or e}); free space or choose another {option}"
        ) from e


def require_writable(path: Path) -> None:
    """Refuse an --output that cannot be written, before the work whose result it is to hold.

    Nothing is left behind, and missing folders are not made: what is tried is a file in the
    nearest folder that is there.

    Raises:
        EnvironmentalError: it is a folder, or no file can be made there.
    """
    place = path.parent
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    trial = place / f".{path.name[:100]}.{secrets.token_hex(4)}"
    try:
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder, a file is expected")
        os.close(os.open(trial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        trial.unlink()
    except OSError as e:
        raise EnvironmentalError(
            f"{path} cannot be written ({e.strerror or e}); nothing was measured: choose another "
            "--output"
        ) from e


def write_output(path: Path, content: bytes | str, option: str = "--output") -> None:
    """Replace `path` by `content`, whole or not at all; missing folders are made.

    Args:
        path: the file.
        content: what it is to hold; text as UTF-8.
        option: what the user chooses the place with, for the message.

    Raises:
        EnvironmentalError: it cannot be written.
    """
    with output_to(path, option):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)


def resource_dir(name: str) -> Path:
    """The directory of packaged data called `name`, ``"targets"`` or ``"calibration"``.

    A wheel carries it as ``edgehp/_data/<name>``; in a checkout, which an editable install points
    into, it is the top-level directory that people edit.

    Raises:
        EnvironmentalError: the installation lacks it.
    """
    candidates = (PACKAGE / "_data" / name, PACKAGE.parent / name)
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
    raise EnvironmentalError(
        f"the packaged directory {name!r} was not found in {candidates[0]} or {candidates[1]}; "
        "the installation is incomplete: install edgehp again"
    )
