"""Decoding: colours in the right order, and no damaged photo passes for a good one."""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest

from edgehp.datasets.stores import Archive, Photo, open_archive, open_store
from edgehp.errors import DataError
from edgehp.files import read_bytes
from edgehp.images import decode_photo, find_photos
from tests.dataset_trees import encoded, photo, write, zip_of


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_decodes_to_rgb(suffix: str) -> None:
    pixels = decode_photo(encoded(suffix=suffix), "here")
    assert pixels.dtype == np.uint8 and pixels.shape == (48, 64, 3)
    assert np.abs(pixels[40, 8].astype(int) - (220, 20, 20)).max() < 12  # red, left
    assert np.abs(pixels[40, 56].astype(int) - (20, 20, 220)).max() < 12  # blue, right
    assert np.abs(pixels[4, 8].astype(int) - (20, 220, 20)).max() < 12  # green, on top
    grey = cv2.imencode(suffix, np.full((20, 30), 77, np.uint8))[1].tobytes()
    assert np.array_equal(decode_photo(grey, "here"), np.full((20, 30, 3), 77))


def tiff_exif(orientation: int) -> bytes:
    return b"MM\0*\0\0\0\x08" + struct.pack(">HHHIHHI", 1, 0x0112, 3, 1, orientation, 0, 0)


def with_orientation(suffix: str, orientation: int) -> bytes:
    """The photo of `encoded` in a lossless or JPEG form, with an EXIF orientation."""
    exif = tiff_exif(orientation)
    if suffix == ".jpg":
        plain, body = encoded(), b"Exif\0\0" + exif
        return plain[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + plain[2:]
    if suffix == ".png":
        plain = encoded(suffix=".png")
        chunk = b"eXIf" + exif
        return (
            plain[:33]
            + struct.pack(">I", len(exif))
            + chunk
            + struct.pack(">I", zlib.crc32(chunk))
            + plain[33:]
        )
    if suffix == ".webp":
        pixels = np.ascontiguousarray(photo()[..., ::-1])
        plain = cv2.imencode(".webp", pixels, [cv2.IMWRITE_WEBP_QUALITY, 101])[1].tobytes()
        extended = struct.pack("<4sIB3x", b"VP8X", 10, 8) + b"\x3f\0\0\x2f\0\0"
        body = b"WEBP" + extended + plain[12:] + struct.pack("<4sI", b"EXIF", len(exif)) + exif
        return b"RIFF" + struct.pack("<I", len(body)) + body
    pixels = np.ascontiguousarray(photo()[..., ::-1])
    data = bytearray(cv2.imencode(".tiff", pixels)[1].tobytes())
    start = struct.unpack_from("<I", data, 4)[0]
    count = struct.unpack_from("<H", data, start)[0]
    entries = [bytes(data[start + 2 + 12 * i : start + 14 + 12 * i]) for i in range(count)]
    entries = [e for e in entries if struct.unpack_from("<H", e)[0] != 0x0112]
    entries.append(struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0))
    entries.sort(key=lambda e: struct.unpack_from("<H", e)[0])
    struct.pack_into("<I", data, 4, len(data))
    return bytes(data) + struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)


# What EXIF's orientations 1 to 8 do to a picture as stored.
TURNS = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: np.rot90(p, 2),
    4: lambda p: p[::-1],
    5: lambda p: p.swapaxes(0, 1),
    6: lambda p: np.rot90(p, -1),
    7: lambda p: np.rot90(p, 2).swapaxes(0, 1),
    8: lambda p: np.rot90(p, 1),
}


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tiff", ".webp"])
def test_orientation_is_obeyed_when_asked_and_ignored_otherwise(suffix: str) -> None:
    stored = decode_photo(with_orientation(suffix, 1), "here")
    assert np.abs(stored.astype(int) - photo()).mean() < 4
    for orientation, turn in TURNS.items():
        data = with_orientation(suffix, orientation)
        assert np.array_equal(decode_photo(data, "here"), stored), orientation
        assert np.array_equal(decode_photo(data, "here", upright=True), turn(stored)), orientation


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_depth_of_16_bit_samples_is_told_or_asked_for(
    suffix: str, rng: np.random.Generator
) -> None:
    grey = rng.integers(0, 256, (20, 30), np.uint8)
    grey[0, 0] = 255
    for bits in (10, 12, 16):
        data = cv2.imencode(suffix, grey.astype(np.uint16) << (bits - 8))[1].tobytes()
        assert np.array_equal(decode_photo(data, "here", bits=bits)[..., 1], grey)
        if bits == 16:  # the highest bit is used
            assert np.array_equal(decode_photo(data, "here")[..., 0], grey)
            with pytest.raises(DataError, match="12 bits at most"):
                decode_photo(data, "here", bits=12)
            continue
        with pytest.raises(DataError, match=f"which {bits} are used.*\nhint.*--photo-depth {bits}"):
            decode_photo(data, "here")


def test_odd_jpegs_of_cameras_are_read_as_libjpeg_reads_them() -> None:
    plain = encoded()
    table = plain.index(b"\xff\xdb")
    for odd in (plain[:table] + b"\0" + plain[table:], plain[:-2], plain + b"\0" * 9):
        assert np.array_equal(decode_photo(odd, "here"), decode_photo(plain, "here"))


def test_a_jpeg_without_its_last_rows_is_taken_and_said(
    rng: np.random.Generator, caplog: pytest.LogCaptureFixture
) -> None:
    data = encoded(rng.integers(0, 255, (320, 48, 3)).astype(np.uint8))
    whole = decode_photo(data, "here")
    found = decode_photo(data[: int(len(data) * 0.96)], "here")
    (said,) = caplog.records
    missing = int(str(said.args[1]))  # type: ignore[index]
    assert "cut off" in said.message and 12 <= missing <= 32
    assert np.array_equal(found[:-missing], whole[:-missing])
    assert not np.array_equal(found, whole)
    with pytest.raises(DataError, match=r"without the last \d+ of 320 rows"):
        decode_photo(data[: int(len(data) * 0.8)], "here")


def test_photos_of_other_kinds_are_named() -> None:
    whole = encoded()
    frame = whole.index(b"\xff\xc0")
    deep = whole[: frame + 4] + b"\x0c" + whole[frame + 5 :]
    pages = bytearray(cv2.imencode(".tiff", photo())[1].tobytes())
    start = struct.unpack_from("<I", pages, 4)[0]
    end = start + 2 + 12 * struct.unpack_from("<H", pages, start)[0]
    pages[end : end + 4] = struct.pack("<I", start)
    thumbnail = bytearray(cv2.imencode(".tiff", photo())[1].tobytes())
    mosaic = bytearray(thumbnail)
    for i in range(struct.unpack_from("<H", thumbnail, start)[0]):
        at = start + 2 + 12 * i
        tag = struct.unpack_from("<H", thumbnail, at)[0]
        if tag == 256:  # the width is not reached any more: the kind of the picture comes first
            struct.pack_into("<HHII", thumbnail, at, 254, 4, 1, 1)
        if tag == 262:
            struct.pack_into("<HHIHH", mosaic, at, 262, 3, 1, 32803, 0)
    for data, named in (
        (deep, "JPEG of 12 bits a sample"),
        (whole[:frame] + b"\xff\xc3" + whole[frame + 2 :], "lossless JPEG"),
        (bytes(pages), "TIFF of several pictures"),
        (b"GIF89a" + bytes(50), "found GIF\nhint: convert it to PNG"),
        (bytes(4) + b"ftypheic" + bytes(50), "found HEIC"),
        (bytes(4) + b"ftypisom" + bytes(50), "found a video"),
        (bytes(thumbnail), "first picture is a thumbnail or a camera's raw data"),
        (bytes(mosaic), "first picture is a thumbnail or a camera's raw data"),
        (b"", "found an empty file"),
        (b"\xff\xd8", "here: truncated JPEG"),
        (b"\xff\xd8\xff\xd9", "here: truncated JPEG"),
    ):
        with pytest.raises(DataError, match=named):
            decode_photo(data, "here")


def test_what_stands_in_for_a_file_is_named(tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    page = b"\n<!DOCTYPE html><html><title>Virus scan warning</title></html>"
    for data, named in ((pointer, "Git LFS pointer"), (page, "web page")):
        with pytest.raises(DataError, match=named):
            read_bytes(write(tmp_path / "a.mat", data), "a MATLAB file")
        with pytest.raises(DataError, match=named):
            decode_photo(data, "here")
        with pytest.raises(DataError, match=named):
            Archive(write(tmp_path / "a.zip", data))


def test_a_folder_says_what_it_leaves_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = write(tmp_path / "a" / "0.jpg", encoded())
    write(tmp_path / "a" / "._0.jpg", b"\0\5\x16\7")
    write(tmp_path / "b.heic", b"x")
    write(tmp_path / "b.csv", b"x")
    write(tmp_path / "0.txt", b"0 0.5 0.5 0.2 0.2")  # a box, of YOLO
    write(tmp_path / "README.txt", b"for people")
    (tmp_path / "c.jpg").symlink_to("nowhere.jpg")
    assert find_photos(tmp_path) == (kept,)
    for part in (
        "1 of macOS",
        "1 called .heic",
        "1 called .txt",
        "not used: b.csv",
        "1 that are links to nowhere",
    ):
        assert part in caplog.text
    # A folder that is linked is read, once; a second link and one to itself are left out.
    linked = tmp_path / "linked"
    write(tmp_path.with_name(f"{tmp_path.name}-beside") / "d.jpg", encoded())
    linked.symlink_to(tmp_path.with_name(f"{tmp_path.name}-beside"))
    (tmp_path / "again").symlink_to(tmp_path)
    assert find_photos(tmp_path) == (kept, linked / "d.jpg")
    assert "in folders that are linked twice" in caplog.text
    (tmp_path / os.fsdecode(b"caf\xe9.jpg")).write_bytes(encoded())
    with pytest.raises(DataError, match="not UTF-8"):
        find_photos(tmp_path)


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_every_truncation_is_refused(suffix: str, rng: np.random.Generator) -> None:
    noise = rng.integers(0, 255, (40, 40, 3)).astype(np.uint8)
    data = encoded(noise, suffix)
    # A JPEG that lacks only its end marker (2 bytes) is whole: see below.
    for length in range(0, len(data) - (2 if suffix == ".jpg" else 0), 5):
        with pytest.raises(DataError, match="here"):
            decode_photo(data[:length], "here")


def test_a_thumbnails_end_does_not_hide_a_truncation() -> None:
    thumbnail = encoded(photo(16, 16))
    plain = encoded()
    segment = b"\xff\xe1" + struct.pack(">H", len(thumbnail) + 2) + thumbnail
    whole = plain[:2] + segment + plain[2:]
    assert decode_photo(whole, "here").shape == (48, 64, 3)
    with pytest.raises(DataError, match="truncated JPEG"):
        decode_photo(whole[:-40], "here")


def test_flipped_bit_in_png_is_refused() -> None:
    data = bytearray(encoded(suffix=".png"))
    data[len(data) // 2] ^= 1
    with pytest.raises(DataError, match="bad checksum"):
        decode_photo(bytes(data), "here")


def test_random_damage_is_refused_or_decoded_but_never_crashes(rng: np.random.Generator) -> None:
    for suffix in (".jpg", ".png"):
        good = encoded(suffix=suffix)
        for _ in range(200):
            data = bytearray(good)
            for at in rng.integers(0, 200, 3):
                data[at] = int(rng.integers(0, 256))
            try:
                assert decode_photo(bytes(data), "here").shape[2] == 3
            except DataError as e:
                assert "here" in str(e)


def test_huge_dimensions_are_refused_before_memory_is_taken() -> None:
    header = struct.pack(">II5B", 60000, 60000, 8, 2, 0, 0, 0)

    def chunk(kind: bytes, body: bytes) -> bytes:
        sum_ = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", sum_)

    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IEND", b"")
    with pytest.raises(DataError, match="60000x60000"):
        decode_photo(data, "here")


def test_file_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.jpg.*No such file"):
        Photo(tmp_path / "absent.jpg").read()
    with pytest.raises(DataError, match=r"void\.jpg.*empty"):
        Photo(write(tmp_path / "void.jpg", b"")).read()


def test_a_photo_in_a_zip_survives_pickling_and_another_zip(tmp_path: Path) -> None:
    path = zip_of(tmp_path / "a.zip", {"a/0.jpg": encoded()})
    source = pickle.loads(pickle.dumps(open_store(path).photo("a/0.jpg")))
    assert source.read() == encoded()
    assert source.where.endswith("a.zip:a/0.jpg")
    # Opened once, and anew where the file at its place is another one.
    assert open_archive(path) is open_archive(path)
    zip_of(path, {"a/0.jpg": encoded(suffix=".png")})
    assert source.read() == encoded(suffix=".png")


def test_zips_of_powershell_and_macos_are_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("a\\0.jpg", "__MACOSX/a/._0.jpg"):
            info = zipfile.ZipInfo("x")
            info.filename = name
            archive.writestr(info, encoded())
    store = Archive(path)
    assert store.names == ("a/0.jpg",) and store.read("a/0.jpg") == encoded()
    assert store.left_out == {"of macOS ('._', __MACOSX)": 1}


def test_zip_with_duplicate_members_is_refused(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        path = tmp_path / "a.zip"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/0.jpg", b"1")
            archive.writestr("a/0.jpg", b"2")
    with pytest.raises(DataError, match="occurs twice"):
        Archive(path)


def test_damaged_members_of_a_zip_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("a/0.jpg", encoded())
    good = path.read_bytes()
    entry = good.rfind(b"PK\x01\x02")  # in the central directory

    def damaged(at: int, value: bytes) -> Path:
        return write(path, good[:at] + value + good[at + len(value) :])

    with pytest.raises(DataError, match=r"a/0\.jpg.*damaged"):
        Archive(damaged(200, bytes([good[200] ^ 0xFF]))).read("a/0.jpg")
    with pytest.raises(DataError, match="encrypted"):
        Archive(damaged(entry + 8, b"\1"))
    with pytest.raises(DataError, match="2147483648 bytes"):
        Archive(damaged(entry + 24, struct.pack("<I", 2**31))).read("a/0.jpg")


@pytest.mark.parametrize("cut", [0.1, 0.5, 0.95])
def test_truncated_zip_is_refused(tmp_path: Path, cut: float) -> None:
    path = zip_of(tmp_path / "a.zip", {"a/0.jpg": encoded(), "a/1.jpg": encoded()})
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * cut)])
    with pytest.raises(DataError, match="complete zip"):
        Archive(path)
