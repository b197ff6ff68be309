"""Files that are whole or not there."""

from __future__ import annotations

import codecs
import os
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import pytest

from edgehp.errors import CompatibilityError, DataError
from edgehp.files import (
    Record,
    json_digest,
    parse_json,
    read_json,
    read_toml,
    replacing,
    write_whole,
)


def test_content_takes_the_place_of_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    for content, found in ((b"\0old", b"\0old"), ("grün", "grün".encode())):
        write_whole(path, content)
        assert path.read_bytes() == found
    assert list(tmp_path.iterdir()) == [path]


def test_failure_half_way_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "engine.plan"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_refused_rename_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    with pytest.raises(OSError):
        write_whole(tmp_path / "folder", b"x")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_an_error_is_about_the_file_that_was_asked_for() -> None:
    with pytest.raises(OSError) as caught:
        write_whole(Path("/proc/x.json"), b"x")
    assert caught.value.filename == "/proc/x.json"


def test_readable_by_those_whom_the_umask_lets(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "report.json", "{}")
    finally:
        os.umask(before)
    assert (tmp_path / "report.json").stat().st_mode & 0o777 == 0o640


class Range(Record):
    count: int
    width: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    kind: Literal["wide", "narrow"] = "wide"

    def __post_init__(self) -> None:
        if self.count > 100:
            raise ValueError(f"count is {self.count}; expected at most 100")


class Document(Record):
    ranges: dict[str, Range]
    more: tuple[Range, ...] = ()
    one: Range | None = None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"ranges": {"a": {"count": 1.0}}}', "key 'ranges.a.count' is 1.0; expected int"),
        (
            '{"ranges": {"a": {"count": 1}, "b": {"count": true}}}',
            "key 'ranges.b.count' is true; expected int",
        ),
        ('{"ranges": {}, "one": {"count": 1, "width": 0}}', "key 'one.width' is 0; .* > 0"),
        ('{"ranges": {}, "more": [{"count": 1}, {}]}', "key 'more\\[1\\].count' is missing"),
        (
            '{"ranges": {}, "one": {"count": 1, "widht": 3}}',
            "key 'one.widht' is not known; known: count, width, kind",
        ),
        (
            '{"ranges": {}, "one": {"count": 1, "kind": "odd"}}',
            "key 'one.kind' is 'odd'; expected one of 'narrow', 'wide'",
        ),
        ('{"ranges": {}, "one": {"count": 101}}', "key 'one': count is 101; expected at most 100"),
        ('{"ranges": {"a": {"count": 1, "count": 2}}}', "key 'count' appears twice"),
        ('{"ranges": {"a": {"count": 1, "width": NaN}}}', "NaN is no JSON number"),
        ("[]", r"found \[\]; expected object"),
        ("{", "not valid JSON"),
    ],
)
def test_a_fault_names_file_key_found_and_expected(text: str, message: str) -> None:
    with pytest.raises(CompatibilityError, match=f"x.json: .*{message}"):
        parse_json(text.encode(), Document, "x.json", CompatibilityError)


def test_toml_is_read_as_strictly(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_bytes(b"[ranges.a]\r\ncount = 1\r\n")
    assert read_toml(path, Document).ranges["a"] == Range(count=1)
    for text, message in (
        ("[ranges.a]\ncount = 1\nwidth = inf", "'ranges.a.width' is inf; expected a finite"),
        ("[ranges.a]\ncount = 1\ncount = 2", "not valid TOML"),
        ("[ranges.a]\ncount = 'x'", "key 'ranges.a.count' is 'x'; expected int"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            read_toml(path, Document)
    with pytest.raises(DataError, match="cannot be read"):
        read_toml(tmp_path / "none.toml", Document)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{}".encode("utf-16"), "UTF-16"),
        ("{}".encode("utf-16-le"), "UTF-16"),
        ('{\n"ü": 1}'.encode("latin-1"), "line 2 is not UTF-8 text .*Latin-1"),
        (b" " * 2000, "larger than 1000 bytes"),
    ],
)
def test_text_that_is_not_plain_utf8_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, message: str
) -> None:
    path = tmp_path / "x"
    path.write_bytes(data)
    for read, largest in ((read_json, "_LARGEST_JSON"), (read_toml, "_LARGEST_TOML")):
        monkeypatch.setattr(f"edgehp.files.{largest}", 1000)
        with pytest.raises(DataError, match=message):
            read(path, Document)


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    """Windows' editors put one before UTF-8."""
    path = tmp_path / "x"
    path.write_bytes(codecs.BOM_UTF8 + b"[ranges.a]\r\ncount = 1\r\n")
    assert read_toml(path, Document).ranges["a"].count == 1
    path.write_bytes(codecs.BOM_UTF8 + b'{"ranges": {"a": {"count": 1}}}')
    assert read_json(path, Document).ranges["a"].count == 1


def test_records_that_are_equal_have_equal_digests() -> None:
    assert json_digest(parse_json(b'{"count": 1, "width": 2}', Range, "a")) == json_digest(
        parse_json(b'{"kind": "wide", "width": 2.0, "count": 1}', Range, "b")
    )
    with pytest.raises(ValueError):
        json_digest({"a": float("nan")})
