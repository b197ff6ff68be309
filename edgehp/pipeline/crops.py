"""The crops a build needs: for calibration, and held out for the accuracy gate."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from edgehp.crop import Preprocessing, crop_face
from edgehp.datasets.base import Sample, Skips, prefetch, spaced
from edgehp.datasets.faces import read_faces
from edgehp.errors import DataError, UsageError
from edgehp.files import resource_dir, sha256_bytes
from edgehp.progress import track
from edgehp.quantization.compare import ClippingMeter, fewer_of_large
from edgehp.validation.appearance import (
    ADVICE,
    AppearanceCheck,
    Clipped,
    appearance_of,
    measure_crops,
)

if TYPE_CHECKING:
    import onnx

# Below this the percentile and entropy thresholds are those of single crops.
FEWEST_CALIBRATION = 64
# Crops whose statistics are taken, and whose clipped activations are counted.
_LOOKED_AT, _CLIPPED = 128, 16
SHIPPED_CALIBRATION = "rendered-heads.zip"


class _Use(NamedTuple):
    """What crops are for: the shipped ones, how many are used at most, and words for messages."""

    shipped: str
    most: int
    what: str
    why: str


# Of 112 pixels: scales hardly move with more, and time does.
_CALIBRATION = _Use(
    SHIPPED_CALIBRATION,
    512,
    "calibration crops",
    "scales that mean something\nhint: add crops from the camera that will be used",
)
_HELD_OUT = _Use(
    "rendered-validation.zip",
    20_000,
    "crops to validate on",
    "an interval that means something",
)


@dataclass(frozen=True, eq=False)
class CropSet:
    """Crops in a fixed order.

    Attributes:
        source: where they come from, for people: a file name, no directories.
        names: of the crops.
        digests: SHA-256 (hex) of each crop's pixels.
        crops: uint8 [N, S, S, 3], RGB.
        angles: true (pitch, yaw, roll) [N, 3] in degrees, None without labels.
        protocol: how they were chosen.
        duplicates: crops left out because their pixels were there already.
        left_out: crops left out because there were more than are used.
    """

    source: str
    names: tuple[str, ...]
    digests: tuple[str, ...]
    crops: npt.NDArray[np.uint8]
    angles: npt.NDArray[np.float64] | None
    protocol: dict[str, Any]
    duplicates: int = 0
    left_out: int = 0

    def __len__(self) -> int:
        """The number of crops."""
        return len(self.names)


def require_photos(path: Path | None, option: str, skip_bad: bool = False) -> None:
    """Refuse a folder or zip that cannot be calibrated or validated on, before any work is done.

    Lists alone are read; photos that are damaged or alike are found when they are decoded.

    Args:
        path: as the user gave it, None for the shipped crops.
        option: that it was given with, for the message.
        skip_bad: pass over photos that a list names and that are not there.

    Raises:
        DataError: nothing there, unreadable, or fewer than 64 photos.
    """
    if path is None:
        return
    try:
        count = len(read_faces(path, skip_bad=skip_bad))
    except DataError as e:
        raise DataError(f"{option} {e}") from e
    if count < FEWEST_CALIBRATION:
        raise DataError(
            f"{option} {path}: {count} photos, at least {FEWEST_CALIBRATION} are needed"
        )


def load_calibration(
    path: Path | None,
    preprocessing: Preprocessing,
    depth: int | None = None,
    skip_bad: bool = False,
) -> CropSet:
    """Calibration crops: the shipped rendered heads, or the user's folder or zip.

    Args:
        path: folder or zip of faces (`edgehp.datasets.faces`), None for the shipped ones.
        preprocessing: of the network.
        depth: significant bits of photos with 16 bits a sample.
        skip_bad: leave photos out that cannot be used, counted and each in a warning.

    Raises:
        DataError: unreadable, or fewer than 64 different crops.
    """
    return _load(_CALIBRATION, path, preprocessing, depth, skip_bad)


def held_out_crops(
    path: Path | None,
    preprocessing: Preprocessing,
    depth: int | None = None,
    skip_bad: bool = False,
) -> CropSet:
    """Crops for the accuracy gate; arguments as of `load_calibration`.

    Raises:
        DataError: unreadable, or fewer than 64 different crops.
    """
    return _load(_HELD_OUT, path, preprocessing, depth, skip_bad)


def require_disjoint(calibration: CropSet, held_out: CropSet) -> None:
    """Refuse to measure accuracy on crops that the scales were chosen with.

    Raises:
        UsageError: the same pixels are in both sets.
    """
    common = set(calibration.digests) & set(held_out.digests)
    if common:
        name = held_out.names[held_out.digests.index(next(iter(sorted(common))))]
        raise UsageError(
            f"{len(common)} of the {len(held_out)} crops to validate on are calibration crops too "
            f"(such as {name}); the accuracy would look better than it is: choose others with "
            "--validate-on or --calibration"
        )


def calibration_list(crops: CropSet) -> bytes:
    """The calibration list as CSV: SHA-256 of the pixels and name, in the order of use."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("sha256", "image"))
    writer.writerows(zip(crops.digests, crops.names, strict=True))
    return text.getvalue().encode("utf-8", "backslashreplace")


def appearance_check(
    quantized: onnx.ModelProto,
    calibration: CropSet,
    held_out: CropSet,
    *,
    threads: int | None = None,
    advice: str = ADVICE,
) -> AppearanceCheck:
    """Hold the crops to validate on against the calibration crops.

    By the pictures' statistics, and by how many activations the graph clips on either.

    Args:
        quantized: the Q/DQ graph.
        calibration: what its scales come from.
        held_out: what it is validated on.
        threads: processor threads.
        advice: what the warning asks for.
    """
    meter = ClippingMeter(quantized, threads=threads)
    usual, found = (
        meter(crops.crops[spaced(len(crops), _CLIPPED)]) for crops in (calibration, held_out)
    )
    own = measure_crops(calibration.crops[spaced(len(calibration), _LOOKED_AT)])
    looks = measure_crops(held_out.crops[spaced(len(held_out), _LOOKED_AT)])
    clipped = Clipped(found.share, usual.share, found.worst)
    return AppearanceCheck.of(appearance_of(own), looks, clipped, advice)


def _load(
    use: _Use, path: Path | None, preprocessing: Preprocessing, depth: int | None, skip_bad: bool
) -> CropSet:
    file = path if path is not None else resource_dir("calibration") / use.shipped
    # The shipped and the user's crops alike take the name they have, not where they lie.
    data = read_faces(file, skip_bad=skip_bad, name=file.resolve().stem)
    data = data.with_depth(None if path is None else depth)
    size = preprocessing.size
    most = fewer_of_large(use.most, size) if use is _CALIBRATION else use.most
    if path is None:
        # The shipped heads are as many as the gate needs of 112 pixels; a user's own are all used.
        most = min(most, fewer_of_large(len(data), size))
    samples = [data.samples[i] for i in spaced(len(data), most)]
    crops = np.empty((len(samples), size, size, 3), np.uint8)
    seen: dict[str, int] = {}
    kept: list[Sample] = []
    skips = Skips(skip_bad)

    def cut(sample: Sample) -> tuple[Sample, npt.NDArray[np.uint8], str]:
        crop = crop_face(sample.load(), sample.box, preprocessing)
        return sample, crop, sha256_bytes(crop.tobytes())

    for sample, crop, digest in prefetch(
        track(samples, "photos"), cut, on_bad=lambda s, e: skips.add(s.name, e)
    ):
        if digest not in seen:
            crops[len(seen)] = crop
            seen[digest] = len(seen)
            kept.append(sample)
    skipped = len(data.skipped) + len(skips.found)
    duplicates = len(samples) - len(skips.found) - len(kept)
    if len(kept) < FEWEST_CALIBRATION:
        doubled = f" ({duplicates} duplicates not counted)" if duplicates else ""
        raise DataError(
            f"{file}: {len(kept)} different {use.what}{doubled}, at least {FEWEST_CALIBRATION} are "
            f"needed for {use.why}"
        )
    angles = None
    if data.labelled:
        angles = np.array([s.angles for s in kept], np.float64).reshape(-1, 3)
    return CropSet(
        source=file.resolve().name,
        names=tuple(s.name for s in kept),
        digests=tuple(seen),
        crops=crops[: len(kept)],
        angles=angles,
        protocol={**data.protocol, "skipped": skipped, "preprocessing": preprocessing.digest},
        duplicates=duplicates,
        left_out=len(data) - len(samples),
    )
