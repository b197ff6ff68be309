"""Files that are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edgehp._files import replacing, write_whole


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
