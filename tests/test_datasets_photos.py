"""Decoding: colours in the right order, and no damaged photo passes for a good one."""

from __future__ import annotations

import pickle
import struct
import zipfile
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest

from edgehp.datasets.photos import Archive, FilePhoto, ZipPhoto, decode_photo
from edgehp.errors import DataError
from tests.dataset_trees import encoded, photo, write, zip_of


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_decodes_to_rgb(suffix: str) -> None:
    pixels = decode_photo(encoded(suffix=suffix), "here")
    assert pixels.dtype == np.uint8 and pixels.shape == (48, 64, 3)
    assert np.abs(pixels[40, 8].astype(int) - (220, 20, 20)).max() < 12  # red, left
    assert np.abs(pixels[40, 56].astype(int) - (20, 20, 220)).max() < 12  # blue, right
    assert np.abs(pixels[4, 8].astype(int) - (20, 220, 20)).max() < 12  # green, on top


def test_grey_photo_has_three_channels() -> None:
    data = cv2.imencode(".jpg", np.full((20, 30), 77, np.uint8))[1].tobytes()
    pixels = decode_photo(data, "here")
    assert pixels.shape == (20, 30, 3)
    assert np.ptp(pixels.astype(int), axis=2).max() == 0


def test_exif_orientation_is_ignored() -> None:
    # Orientation 6 (turn by 90 degrees) in a minimal Exif segment.
    tiff = b"MM\0*\0\0\0\x08" + struct.pack(">HHHIHHI", 1, 0x0112, 3, 1, 6, 0, 0)
    body = b"Exif\0\0" + tiff
    plain = encoded()
    turned = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + plain[2:]
    obeyed = cv2.imdecode(np.frombuffer(turned, np.uint8), cv2.IMREAD_COLOR)
    assert obeyed.shape == (64, 48, 3), "the test's Exif segment is not understood"
    assert np.array_equal(decode_photo(turned, "here"), decode_photo(plain, "here"))


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_every_truncation_is_refused(suffix: str, rng: np.random.Generator) -> None:
    noise = rng.integers(0, 255, (40, 40, 3)).astype(np.uint8)
    data = encoded(noise, suffix)
    for length in range(len(data) - 1):
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


@pytest.mark.parametrize(
    "data", [b"", b"GIF89a" + bytes(50), b"<html>404</html>", b"\xff\xd8", b"\xff\xd8\xff\xd9"]
)
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(DataError, match="here"):
        decode_photo(data, "here")


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
        FilePhoto(tmp_path / "absent.jpg").read()
    with pytest.raises(DataError, match=r"void\.jpg.*empty"):
        FilePhoto(write(tmp_path / "void.jpg", b"")).read()


def test_zip_survives_pickling(tmp_path: Path) -> None:
    path = zip_of(tmp_path / "a.zip", {"a/0.jpg": encoded()})
    source = pickle.loads(pickle.dumps(ZipPhoto(Archive(path), "a/0.jpg")))
    assert source.read() == encoded()
    assert source.where.endswith("a.zip:a/0.jpg")


def test_zip_with_duplicate_members_is_refused(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        path = tmp_path / "a.zip"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/0.jpg", b"1")
            archive.writestr("a/0.jpg", b"2")
    with pytest.raises(DataError, match="occurs twice"):
        Archive(path)


def test_encrypted_zip_is_refused(tmp_path: Path) -> None:
    path = zip_of(tmp_path / "a.zip", {"a/0.jpg": encoded()})
    data = bytearray(path.read_bytes())
    data[data.rfind(b"PK\x01\x02") + 8] |= 1  # "encrypted" in the central directory
    path.write_bytes(data)
    with pytest.raises(DataError, match="encrypted"):
        Archive(path)


def test_bad_checksum_in_zip_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("a/0.jpg", encoded())
    data = bytearray(path.read_bytes())
    data[200] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a/0\.jpg.*damaged"):
        Archive(path).read("a/0.jpg")


def test_member_that_claims_to_be_huge_is_refused(tmp_path: Path) -> None:
    path = zip_of(tmp_path / "a.zip", {"a/0.jpg": encoded()})
    data = bytearray(path.read_bytes())
    at = data.rfind(b"PK\x01\x02") + 24  # uncompressed size
    data[at : at + 4] = struct.pack("<I", 2**31)
    path.write_bytes(data)
    with pytest.raises(DataError, match="2147483648 bytes"):
        Archive(path).read("a/0.jpg")


@pytest.mark.parametrize("cut", [0.1, 0.5, 0.95])
def test_truncated_zip_is_refused(tmp_path: Path, cut: float) -> None:
    path = zip_of(tmp_path / "a.zip", {"a/0.jpg": encoded(), "a/1.jpg": encoded()})
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * cut)])
    with pytest.raises(DataError, match="complete zip"):
        Archive(path)
