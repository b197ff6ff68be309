"""The one decoder of photos: JPEG, PNG, TIFF and WebP, from files, zips and folders alike.

OpenCV decodes half of a truncated photo without a word and fills the rest with grey, and takes 16
bits for 8 by dropping the lower ones. So the container is read first: how many pixels, how many
bits, which way up, and whether all of it is there. A JPEG that lacks its last rows alone is taken,
as by libjpeg, and said. Damage inside the entropy-coded data of an otherwise complete JPEG is
beyond any such check.
"""

from __future__ import annotations

import logging
import os
import struct
import zlib
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from edgehp.errors import DataError
from edgehp.files import is_utf8, require_utf8, stand_in

Image = npt.NDArray[np.uint8]
logger = logging.getLogger(__name__)

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp")
# A face photo is smaller; a larger one is a mistake or an attack on memory.
_LARGEST_PIXELS = 100_000_000
_MOST_PAGES = 64
_PNG = b"\x89PNG\r\n\x1a\n"
# Start-of-frame markers: C0..CF without DHT (C4), JPG (C8) and DAC (CC).
_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
# Of them, what libjpeg decodes: baseline, extended, progressive; Huffman or arithmetic.
_DECODED = frozenset({0xC0, 0xC1, 0xC2, 0xC9, 0xCA})
_PROGRESSIVE = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
# Markers without a length: TEM, RST0 to RST7 and a repeated SOI.
_BARE = frozenset({0x01, *range(0xD0, 0xD9)})
_TIFF = (b"II*\0", b"MM\0*")
_ORIENTATION = 0x0112
# PhotometricInterpretation of a sensor's own pixels, behind a mosaic of color filters (DNG).
_MOSAIC = 32803
# A JPEG that is cut off is used where so much of its height is there.
_LEAST_SHARE = 0.9
# What else photos come as: name, place and first bytes there.
_OTHERS = (
    ("GIF", 0, b"GIF8"),
    ("BMP", 0, b"BM"),
    ("HEIC", 4, b"ftyphei"),
    ("HEIC", 4, b"ftypmif1"),
    ("AVIF", 4, b"ftypavi"),
    ("a camera's raw data", 4, b"ftypcrx"),
    ("a camera's raw data", 0, b"FUJIFILM"),
    ("a video", 4, b"ftyp"),
    ("JPEG XL", 0, b"\xff\x0a"),
    ("JPEG XL", 4, b"JXL "),
    ("JPEG 2000", 4, b"jP  "),
    ("PGM or PPM", 0, b"P5"),
    ("PGM or PPM", 0, b"P6"),
    ("BigTIFF", 0, b"II+\0"),
    ("PDF", 0, b"%PDF"),
    ("a zip", 0, b"PK\x03\x04"),
)
LIST_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".xml")
# Names, without their suffixes, of files that are for people.
_NOTES = ("LICENSE", "LICENCE", "README")


@dataclass(frozen=True)
class _Header:
    """What the container says.

    Attributes:
        width: in pixels, as stored.
        height: in pixels, as stored.
        significant: bits of a sample of 16 that the file itself calls so; None if it does not.
        orientation: EXIF's, 1 to 8.
        turned_by_opencv: whether OpenCV's decoder obeys the orientation whatever it is told.
        unfinished: a JPEG without its end marker.
    """

    width: int
    height: int
    significant: int | None = None
    orientation: int = 1
    turned_by_opencv: bool = False
    unfinished: bool = False


def is_apple_double(name: str) -> bool:
    """Whether macOS put this file (path with ``/``) beside another, or into ``__MACOSX``."""
    return name.rpartition("/")[2].startswith("._") or "__MACOSX" in name.split("/")


def files_below(root: Path) -> tuple[tuple[str, ...], Counter[str]]:
    """The files in a folder and its subfolders, and what was left out.

    Links to folders are followed; no folder is entered twice.

    Args:
        root: the folder.

    Returns:
        Names relative to `root`, with ``/``, sorted; and how many files cannot be used, by kind
        (`report_left_out`): macOS's ``._`` files, links to nowhere, sockets and the like.

    Raises:
        DataError: a folder cannot be read, or the name of a photo or list is not UTF-8.
    """
    names: list[str] = []
    left_out = Counter[str]()
    entered: set[tuple[int, int]] = set()
    for folder, inner, files in os.walk(root, onerror=_refuse_folder, followlinks=True):
        place = Path(folder)
        status = place.stat()
        if (status.st_dev, status.st_ino) in entered:
            inner.clear()
            left_out["in folders that are linked twice"] += len(files)
            continue
        entered.add((status.st_dev, status.st_ino))
        # A folder goes by its own name rather than by that of a link to it.
        links = {name for name in inner if (place / name).is_symlink()}
        inner[:] = [*sorted(set(inner) - links), *sorted(links)]
        for file in files:
            path = place / file
            name = path.relative_to(root).as_posix()
            suffix = path.suffix.lower()
            if is_apple_double(name):
                left_out["of macOS ('._', __MACOSX)"] += 1
            elif not path.is_file():
                kind = "that are links to nowhere" if path.is_symlink() else "of no usual kind"
                left_out[kind] += 1
            elif is_utf8(name):
                names.append(name)
            elif suffix in PHOTO_SUFFIXES or suffix in LIST_SUFFIXES:
                require_utf8(path)
            else:
                left_out["whose names are not UTF-8"] += 1
    return tuple(sorted(names)), left_out


def _refuse_folder(error: OSError) -> None:
    name = os.fspath(error.filename)
    raise DataError(f"{name!a}: the folder cannot be read: {error.strerror}") from error


def find_photos(root: Path, *, listed: bool = False) -> tuple[Path, ...]:
    """The photos below a folder, sorted; what is left out is counted in one warning.

    Args:
        root: the folder.
        listed: a list that was given goes with the photos, and may lie among them.

    Raises:
        DataError: no photos, or as of `files_below`.
    """
    names, left_out = files_below(root)
    photos = tuple(root / n for n in names if PurePosixPath(n).suffix.lower() in PHOTO_SUFFIXES)
    report_left_out(str(root), left_out, names, but=(".mat",), lists=not listed)
    if not photos:
        raise DataError(f"{root}: no photos ({', '.join(PHOTO_SUFFIXES)}) in this folder")
    return photos


def report_left_out(
    where: str,
    left_out: Counter[str],
    names: Iterable[str] = (),
    *,
    but: Collection[str] = (),
    lists: bool = True,
    remedy: str = "",
) -> None:
    """Say how many files of a folder or zip are not used, by kind, and which lists.

    Args:
        where: the folder or zip.
        left_out: how many are known not to be used, by kind.
        names: of further files, with ``/``; photos and those called README and the like are used.
        but: further suffixes of files that are used.
        lists: whether to name the lists.
        remedy: what to do about the lists.
    """
    unused: list[str] = []
    kinds = Counter(left_out)
    for name in names:
        path = PurePosixPath(name)
        suffix = path.suffix.lower()
        if suffix in LIST_SUFFIXES:
            unused.append(name)
        elif suffix not in (*PHOTO_SUFFIXES, *but) and path.stem.upper() not in _NOTES:
            kinds[f"called {suffix}" if suffix else "without a suffix"] += 1
    if kinds := +kinds:
        said = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(6))
        more = "" if len(kinds) <= 6 else ", and others"
        logger.warning("%s: files left out: %s%s", where, said, more)
    if lists and unused:
        said = ", ".join(sorted(unused)[:3])
        more = "" if len(unused) <= 3 else f" and {len(unused) - 3} more"
        logger.warning("%s: lists that are not used: %s%s%s", where, said, more, remedy)


def decode_photo(
    data: bytes,
    where: str,
    *,
    upright: bool = False,
    bits: int | None = None,
) -> Image:
    """Decode an encoded photo.

    The orientation is ignored by default: the boxes, landmarks and angles of every data set here
    refer to the pixels as they are stored, so turning the photo would falsify the labels.

    Args:
        data: a complete JPEG, PNG, TIFF or WebP file.
        where: its place, for messages.
        upright: turn the photo as its orientation says (EXIF in all four formats).
        bits: significant bits of 16-bit samples (`to_8_bits`).

    Returns:
        uint8 [H, W, 3], RGB.

    Raises:
        DataError: of another kind, truncated (a JPEG: by more than a tenth of its height), damaged,
            of more than 100 megapixels, or of 16 bits a sample of which nobody says how many are
            used.
    """
    header = _header(data, where)
    if not 0 < header.width * header.height <= _LARGEST_PIXELS:
        raise DataError(
            f"{where}: a photo of {header.width}x{header.height} pixels, expected "
            f"1..{_LARGEST_PIXELS} in all"
        )
    pixels = (_without_end if header.unfinished else _decode)(data, where)
    size = (header.height, header.width)
    if header.turned_by_opencv and header.orientation >= 5:
        size = size[::-1]
    if pixels is None or pixels.shape[:2] != size or pixels.dtype not in (np.uint8, np.uint16):
        raise DataError(f"{where}: the photo is damaged and cannot be decoded; replace the file")
    if header.turned_by_opencv != upright:
        pixels = _turned(pixels, header.orientation, back=not upright)
    if pixels.dtype == np.uint16:
        pixels = to_8_bits(pixels, where, bits or header.significant)
    code = cv2.COLOR_GRAY2RGB if pixels.ndim == 2 else cv2.COLOR_BGR2RGB
    return np.asarray(cv2.cvtColor(pixels, code), np.uint8)


def to_8_bits(pixels: npt.NDArray[Any], where: str, bits: int | None = None) -> Image:
    """The upper 8 of the significant bits of uint16 samples; uint8 ones as they are.

    Args:
        pixels: uint8 or uint16, any shape.
        where: the photo's place, for messages.
        bits: significant bits, 8 to 16; None takes 16 where a sample uses the highest bit.

    Raises:
        DataError: nobody says how many bits are used, or a sample has more.
    """
    if pixels.dtype == np.uint8:
        return np.asarray(pixels, np.uint8)
    largest = int(pixels.max(initial=0))
    if bits is None and largest >= 1 << 15:
        bits = 16
    if bits is None:
        least = max(8, largest.bit_length())
        raise DataError(
            f"{where}: 16 bits a sample, of which {least} are used (largest value {largest}): "
            "does the camera have 10, 12 or 16 bits?\nhint: say so, e.g. with --photo-depth "
            f"{next(b for b in (10, 12, 14, 16) if b >= least)}"
        )
    if largest >= 1 << bits:
        raise DataError(
            f"{where}: a sample of {largest}, expected {bits} bits at most\n"
            f"hint: give the camera's depth with --photo-depth, {largest.bit_length()} at least"
        )
    return np.asarray(pixels >> (bits - 8), np.uint8)


def _decode(data: bytes, where: str) -> npt.NDArray[Any] | None:
    flags = cv2.IMREAD_ANYDEPTH | cv2.IMREAD_ANYCOLOR | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as e:
        raise DataError(f"{where}: the photo cannot be decoded: {e.err}") from e


def _without_end(data: bytes, where: str) -> npt.NDArray[Any]:
    """The pixels of a JPEG without its end marker, as some cameras write it, or cut off.

    What is missing is decoded from whatever follows, so the rows that are there are those for
    which it makes no difference what follows. As in libjpeg the others are grey.

    Raises:
        DataError: more than a tenth of the rows is missing.
    """
    found: list[npt.NDArray[Any]] = []
    for fill in (b"", b"\xa5\x3c\x96" * 50, b"\x5a\xc3\x69" * 50):
        pixels = _decode(data.removesuffix(b"\xff") + fill + b"\xff\xd9", where)
        if pixels is None or (found and pixels.shape != found[0].shape):
            raise _truncated(data, "JPEG", where)
        found.append(pixels)
    height = len(found[0])
    same = [np.equal(pixels, found[0]).reshape(height, -1).all(axis=1) for pixels in found]
    changed = np.flatnonzero(~np.all(same, axis=0))
    missing = height - int(changed[0]) if len(changed) else 0
    if missing > (1 - _LEAST_SHARE) * height:
        raise _truncated(data, "JPEG", where, f", without the last {missing} of {height} rows")
    if missing:
        logger.warning(
            "%s: a JPEG that is cut off: the last %d of %d rows are missing, and grey",
            where,
            missing,
            height,
        )
    return found[0]


def _turned(pixels: npt.NDArray[Any], orientation: int, back: bool) -> npt.NDArray[Any]:
    """Pixels turned as EXIF's `orientation` says, or back again."""
    if orientation >= 5 and not back:
        pixels = pixels.swapaxes(0, 1)
    # Where row 0 and column 0 of the stored picture are: 2, 3, 6, 7 right; 3, 4, 7, 8 bottom.
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation >= 5 and back:
        pixels = pixels.swapaxes(0, 1)
    return np.ascontiguousarray(pixels)


def _truncated(data: bytes, kind: str, where: str, detail: str = "") -> DataError:
    return DataError(
        f"{where}: truncated {kind} of {len(data)} bytes{detail}\nhint: fetch the file again"
    )


def _header(data: bytes, where: str) -> _Header:
    if data.startswith(b"\xff\xd8"):
        return _jpeg(data, where)
    if data.startswith(_PNG):
        return _png(data, where)
    try:
        if data.startswith(_TIFF):
            return _tiff(data, where)
        if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
            return _webp(data, where)
    except (struct.error, IndexError) as e:
        kind = "WebP" if data.startswith(b"RIFF") else "TIFF"
        raise _truncated(data, kind, where) from e
    if (other := stand_in(data[:512])) is not None:
        raise DataError(f"{where} is {other}")
    unknown = f"bytes {data[:8].hex(' ')!r}" if data else "an empty file"
    found = next((n for n, at, start in _OTHERS if data.startswith(start, at)), "")
    raise DataError(
        f"{where}: expected a JPEG, PNG, TIFF or WebP photo, found {found or unknown}"
        + "\nhint: convert it to PNG" * bool(found)
    )


def _jpeg(data: bytes, where: str) -> _Header:
    """Of a JPEG (ITU-T T.81, annex B); stray bytes between segments are skipped, as by libjpeg."""
    size: tuple[int, int] | None = None
    orientation, progressive = 1, False
    at = 2
    while True:
        at = data.find(b"\xff", at)
        if at < 0 or at + 4 > len(data):
            raise _truncated(data, "JPEG", where)
        marker = data[at + 1]
        if marker in (0x00, 0xFF):  # a stray stuffed byte; a fill byte
            at += 1
            continue
        if marker in _BARE:
            at += 2
            continue
        length = struct.unpack_from(">H", data, at + 2)[0]
        if marker == 0xD9 or length < 2:
            raise DataError(f"{where}: damaged JPEG at byte {at}; fetch the file again")
        if marker in _SOF:
            if at + 9 > len(data):
                raise _truncated(data, "JPEG", where)
            if marker not in _DECODED or data[at + 4] != 8:
                kind = "" if marker in _DECODED else "lossless "
                raise DataError(
                    f"{where}: a {kind}JPEG of {data[at + 4]} bits a sample, expected an ordinary "
                    "one of 8\nhint: save the photo as PNG, of 16 bits where it has more than 8"
                )
            height, width = struct.unpack_from(">HH", data, at + 5)
            size, progressive = (width, height), marker in _PROGRESSIVE
        if marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            orientation = _exif(data[at + 10 : at + 2 + length])
        at += 2 + length
        if marker == 0xDA:
            break
    # Within scans FF is always followed by 00 or a restart marker, so FF D9 is the real end and
    # not that of a thumbnail, which would lie in a segment before the scan.
    unfinished = data.find(b"\xff\xd9", at) < 0
    if at > len(data) or (unfinished and progressive):
        raise _truncated(data, "JPEG", where)
    if size is None:
        raise DataError(f"{where}: damaged JPEG without a frame header; fetch the file again")
    return _Header(*size, orientation=orientation, unfinished=unfinished)


def _png(data: bytes, where: str) -> _Header:
    """Of a PNG whose chunks are complete and have their checksums (PNG, third edition)."""
    at = len(_PNG)
    size: tuple[int, int] | None = None
    bits, significant, orientation = 8, None, 1
    view = memoryview(data)
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 8 + length
        if end + 4 > len(data):
            break
        if zlib.crc32(view[at + 4 : end]) != struct.unpack_from(">I", data, end)[0]:
            raise DataError(f"{where}: damaged PNG, bad checksum at byte {at}; fetch it again")
        if kind == b"IHDR" and length >= 9:
            size = struct.unpack_from(">II", data, at + 8)
            bits = max(8, data[at + 16])
        # sBIT counts the upper bits of samples that were scaled up to 16, so all 16 are used.
        if kind == b"sBIT" and bits == 16:
            significant = 16
        if kind == b"acTL":
            raise DataError(f"{where}: an animated PNG, expected one picture")
        if kind == b"eXIf":
            orientation = _exif(data[at + 8 : end])
        if kind == b"IEND":
            if size is None:
                raise DataError(f"{where}: damaged PNG without a header; fetch the file again")
            return _Header(*size, significant, orientation)
        at = end + 4
    raise _truncated(data, "PNG", where)


def _tiff(data: bytes, where: str) -> _Header:
    """Of a classic TIFF's first picture (TIFF 6.0); OpenCV's decoder turns it by itself."""
    tags, following = _tiff_tags(data)
    if tags.get(254, 0) & 1 or tags.get(262) == _MOSAIC:
        raise DataError(
            f"{where}: a TIFF whose first picture is a thumbnail or a camera's raw data\n"
            "hint: convert it to PNG with the camera's own tool"
        )
    # Further pictures may be reductions of the first one (bit 0 of NewSubfileType).
    for _ in range(_MOST_PAGES):
        if not following:
            break
        more, following = _tiff_tags(data, following)
        if not more.get(254, 0) & 1:
            raise DataError(f"{where}: a TIFF of several pictures, expected one")
    bits = tags.get(258, 1)
    if bits not in (8, 16) or tags.get(339, 1) != 1:
        raise DataError(
            f"{where}: a TIFF of {bits} bits a sample, expected whole numbers of 8 or 16"
        )
    width, height = tags.get(256, 0), tags.get(257, 0)
    return _Header(width, height, None, _valid(tags.get(_ORIENTATION, 1)), True)


def _webp(data: bytes, where: str) -> _Header:
    """Of a WebP whose chunks are complete (RFC 9649)."""
    if len(data) < 8 + struct.unpack_from("<I", data, 4)[0]:
        raise _truncated(data, "WebP", where)
    size: tuple[int, int] | None = None
    orientation, at = 1, 12
    while at + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, at)
        body = data[at + 8 : at + 8 + length]
        if kind == b"VP8 ":
            width, height = struct.unpack_from("<HH", body, 6)
            size = width & 0x3FFF, height & 0x3FFF
        elif kind == b"VP8L":
            packed = struct.unpack_from("<I", body, 1)[0]
            size = (packed & 0x3FFF) + 1, (packed >> 14 & 0x3FFF) + 1
        elif kind == b"EXIF":
            orientation = _exif(body.removeprefix(b"Exif\0\0"))
        elif kind == b"ANIM":
            raise DataError(f"{where}: an animated WebP, expected one picture")
        at += 8 + length + length % 2
    if size is None:
        raise DataError(f"{where}: damaged WebP without a picture; fetch the file again")
    return _Header(*size, orientation=orientation)


def _exif(tiff: bytes) -> int:
    """The orientation in EXIF data; 1 where there is none, or none that makes sense."""
    try:
        return _valid(_tiff_tags(tiff)[0].get(_ORIENTATION, 1))
    except (struct.error, IndexError):
        return 1


def _valid(orientation: int) -> int:
    return orientation if 1 <= orientation <= 8 else 1


def _tiff_tags(data: bytes, directory: int = 0) -> tuple[dict[int, int], int]:
    """The first value of every tag of a directory that holds whole numbers, and the next one.

    Args:
        data: the TIFF.
        directory: where it begins; 0 means the first one.

    Returns:
        The values by tag, and where the next directory begins, 0 if there is none.
    """
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(data[:4], "")
    if not order:
        return {}, 0
    directory = directory or struct.unpack_from(order + "I", data, 4)[0]
    tags = {}
    entries = struct.unpack_from(order + "H", data, directory)[0]
    for i in range(entries):
        at = directory + 2 + 12 * i
        tag, kind, count = struct.unpack_from(order + "HHI", data, at)
        if kind not in (3, 4) or count == 0:
            continue
        code, width = ("H", 2) if kind == 3 else ("I", 4)
        place = at + 8 if count * width <= 4 else struct.unpack_from(order + "I", data, at + 8)[0]
        tags[tag] = struct.unpack_from(order + code, data, place)[0]
    end = directory + 2 + 12 * entries
    return tags, struct.unpack_from(order + "I", data.ljust(end + 4, b"\0"), end)[0]
