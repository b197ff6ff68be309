"""Face box -> network input: the one preprocessing that every part of edgehp uses.

A `Preprocessing` says everything that happens between a photo with a face box and the tensor of
the network. Cropping and resizing (`crop_face`) run on the CPU and give uint8 RGB; normalisation
is inside the deployed graph, so no other code can do it differently. `Preprocessing.digest` goes
into every calibration table and manifest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import msgspec
import numpy as np
import numpy.typing as npt

from edgehp.errors import DataError, UsageError
from edgehp.files import Record, json_digest, plain, to_record

Image = npt.NDArray[np.uint8]

BOX_RULES = ("stretch", "square")
# torchvision's ImageNet statistics times 255 (torchvision.models, "transforms" of the weights).
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


# Less of a box inside its photo is a mistake, and filling the border takes memory without bound.
_LEAST_INSIDE = 0.1
# Pixels. A smaller one shows no head: it is in another unit, or of another photo.
_SMALLEST_BOX = 6.0


@dataclass(frozen=True)
class Box:
    """A face box in pixels of its photo; corners may lie outside the photo."""

    x_min: float
    y_min: float
    x_max: float
    y_max: float

    @property
    def width(self) -> float:
        """Width in pixels."""
        return self.x_max - self.x_min

    @property
    def height(self) -> float:
        """Height in pixels."""
        return self.y_max - self.y_min

    def moved(self, dx: float, dy: float, scale: float = 1.0) -> Box:
        """The box shifted by `dx`, `dy` times its larger side and scaled about its centre."""
        side = max(self.width, self.height)
        cx = (self.x_min + self.x_max) / 2 + dx * side
        cy = (self.y_min + self.y_max) / 2 + dy * side
        w, h = self.width * scale / 2, self.height * scale / 2
        return Box(cx - w, cy - h, cx + w, cy + h)


# Colors of a pixel in memory, and the channels of their arrays; NV12 is 4:2:0 in two planes.
PICTURE_FORMS = ("RGB", "BGR", "GREY", "NV12")


@dataclass(frozen=True, eq=False)
class Picture:
    """A frame as its source gives it.

    Attributes:
        pixels: uint8; [H, W, 3] for RGB and BGR, [H, W] for GREY, and for NV12 [H * 3 / 2, W], the
            luma and below it the chroma (ITU-R BT.601, limited range), H and W even.
        form: one of `PICTURE_FORMS`.
    """

    pixels: Image
    form: str = "RGB"

    def __post_init__(self) -> None:
        """Refuse pixels that are not of the form."""
        shape, rows = self.pixels.shape, len(self.pixels)
        fits = shape[2:] == ((3,) if self.form in ("RGB", "BGR") else ())
        if self.form == "NV12":
            fits = fits and rows % 3 == 0 and shape[1] % 2 == 0
        if self.form not in PICTURE_FORMS or not fits or self.pixels.dtype != np.uint8:
            raise DataError(
                f"a {self.form} picture cannot be {self.pixels.dtype} {list(shape)}; known are "
                f"uint8 {', '.join(PICTURE_FORMS)}"
            )

    @property
    def width(self) -> int:
        """In pixels."""
        return int(self.pixels.shape[1])

    @property
    def height(self) -> int:
        """In pixels."""
        return len(self.pixels) * 2 // 3 if self.form == "NV12" else len(self.pixels)

    def rgb(self) -> Image:
        """The picture as uint8 RGB [H, W, 3]."""
        if self.form == "RGB":
            return self.pixels
        codes = {
            "BGR": cv2.COLOR_BGR2RGB,
            "GREY": cv2.COLOR_GRAY2RGB,
            "NV12": cv2.COLOR_YUV2RGB_NV12,
        }
        return np.asarray(cv2.cvtColor(self.pixels, codes[self.form]), np.uint8)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


class Preprocessing(Record, frozen=True):
    """From a photo with a face box to the network's tensor.

    Attributes:
        size: side of the square network input in pixels.
        colour: channel order the network was trained with, ``"RGB"``, ``"BGR"`` or ``"GREY"``. The
            deployed graph always takes RGB and reorders inside.
        mean: subtracted per channel, in units of 0..255, in the order of `colour`.
        std: divisor per channel, in units of 0..255, in the order of `colour`.
        resize: ``"area"``: ``cv2.INTER_AREA`` where the crop is larger than the input, bilinear
            where it is smaller; ``"linear"``: bilinear always.
        box_rule: ``"stretch"``: the box as it is, cut at the photo's edge, resized without keeping
            the aspect ratio (Sheka & Samun); ``"square"``: a square of `box_scale` times the
            larger side about the box centre, the photo's border replicated outside.
        box_scale: factor on the box sides.
    """

    size: int
    colour: str = "RGB"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    resize: str = "area"
    box_rule: str = "square"
    box_scale: float = 1.0

    def __post_init__(self) -> None:
        """Refuse a specification that no photo can satisfy."""
        if isinstance(self.size, bool) or not isinstance(self.size, int):
            raise UsageError(f"input size {self.size!r} is not a whole number of pixels")
        if not 16 <= self.size <= 1024:
            raise UsageError(f"input size {self.size} is outside 16..1024 pixels")
        if self.colour not in ("RGB", "BGR", "GREY"):
            raise UsageError(f"colour order {self.colour!r} is none of RGB, BGR, GREY")
        # As floats: specifications that are equal must have equal digests.
        for name in ("mean", "std"):
            values = getattr(self, name)
            if not isinstance(values, tuple) or not all(map(_is_number, values)):
                raise UsageError(f"{name} is {values!r}, expected finite numbers")
            msgspec.structs.force_setattr(self, name, tuple(map(float, values)))
        if not _is_number(self.box_scale):
            raise UsageError(f"box scale {self.box_scale!r} is no finite number")
        msgspec.structs.force_setattr(self, "box_scale", float(self.box_scale))
        channels = 1 if self.colour == "GREY" else 3
        if len(self.mean) != channels or len(self.std) != channels:
            raise UsageError(f"{self.colour} needs {channels} values of mean and std")
        if any(s <= 0 for s in self.std):
            raise UsageError("every std must be positive")
        if all(s < 1 for s in self.std):
            raise UsageError(
                f"std is {self.std}, which looks like fractions; expected units of 0..255\n"
                "hint: multiply mean and std by 255"
            )
        if self.resize not in ("area", "linear"):
            raise UsageError(f"resize {self.resize!r} is neither 'area' nor 'linear'")
        if self.box_rule not in BOX_RULES:
            raise UsageError(f"box rule {self.box_rule!r} is none of {', '.join(BOX_RULES)}")
        if not 0.1 <= self.box_scale <= 10:
            raise UsageError(f"box scale {self.box_scale} is outside 0.1..10")

    def to_dict(self) -> dict[str, Any]:
        """A dictionary for JSON."""
        values: dict[str, Any] = plain(self)
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preprocessing:
        """The inverse of `to_dict`.

        Raises:
            DataError: a key is unknown or missing, or a value does not fit.
        """
        try:
            return to_record(values, cls, "preprocessing")
        except UsageError as e:
            raise DataError(f"preprocessing: {e}") from e

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the canonical JSON of this specification."""
        return json_digest(self.to_dict())


def crop_face(photo: Image, box: Box | None, spec: Preprocessing) -> Image:
    """Cut the face out of `photo` and resize it to the network's input.

    Args:
        photo: uint8 [H, W, 3], RGB.
        box: the face, in pixels of `photo`; None takes the whole photo as the box.
        spec: the network's preprocessing.

    Returns:
        uint8 [size, size, 3], RGB whatever `spec.colour` is: the deployed graph reorders.

    Raises:
        DataError: the photo is not uint8 RGB, or the box is as in `cut_of`.
    """
    if photo.ndim != 3 or photo.shape[2] != 3 or photo.dtype != np.uint8:
        raise DataError(f"expected a uint8 RGB photo, found {photo.dtype} {list(photo.shape)}")
    cut = cut_of(photo.shape[1], photo.shape[0], box, spec)
    left, top, right, bottom = cut.inside
    face = photo[top:bottom, left:right]
    if (right - left, bottom - top) != (cut.width, cut.height):
        face = cv2.copyMakeBorder(  # type: ignore[assignment]
            face,
            top - cut.y,
            cut.y + cut.height - bottom,
            left - cut.x,
            cut.x + cut.width - right,
            cv2.BORDER_REPLICATE,
        )
    if (cut.height, cut.width) == (spec.size, spec.size):
        return np.ascontiguousarray(face)
    kernel = cv2.INTER_AREA if cut.area else cv2.INTER_LINEAR
    return cv2.resize(face, (spec.size, spec.size), interpolation=kernel)  # type: ignore[return-value]


class Cut(NamedTuple):
    """What a crop is made of, in whole pixels of the photo.

    Attributes:
        x: its left edge; outside of the photo its border is repeated.
        y: its upper edge.
        width: in pixels.
        height: in pixels.
        inside: left, upper, right and lower edge of its part inside the photo.
        area: resized by averaging areas; else bilinear.
    """

    x: int
    y: int
    width: int
    height: int
    inside: tuple[int, int, int, int]
    area: bool


def cut_of(width: int, height: int, box: Box | None, spec: Preprocessing) -> Cut:
    """What `crop_face` cuts out of a photo of `width` x `height` pixels, and how it resizes it.

    Raises:
        DataError: the box is outside the photo or nearly so, of a few pixels, or beyond any photo.
    """
    if box is None:
        box = Box(0, 0, width, height)
    x0, y0, x1, y1 = _corners(box, spec)
    if min(box.width, box.height) < _SMALLEST_BOX:
        raise DataError(
            f"the face box {_text(box)} is {box.width:.3g} x {box.height:.3g} pixels, expected "
            f"{_SMALLEST_BOX:g} at least\nhint: are its corners in pixels of this photo?"
        )
    inside = (max(x0, 0), max(y0, 0), min(x1, width), min(y1, height))
    across, down = max(inside[2] - inside[0], 0), max(inside[3] - inside[1], 0)
    if across * down < _LEAST_INSIDE * (x1 - x0) * (y1 - y0):
        share = across * down / ((x1 - x0) * (y1 - y0))
        raise DataError(
            f"{share:.0%} of the face box {_text(box)} is inside the photo of {width}x{height} "
            f"pixels, expected {_LEAST_INSIDE:.0%} at least\n"
            "hint: are its corners in pixels of this photo?"
        )
    if spec.box_rule == "stretch":
        x0, y0, x1, y1 = inside
    wide, tall = x1 - x0, y1 - y0
    area = spec.resize == "area" and tall >= spec.size and wide >= spec.size
    return Cut(x0, y0, wide, tall, inside, area)


def _corners(box: Box, spec: Preprocessing) -> tuple[int, int, int, int]:
    values = (box.x_min, box.y_min, box.x_max, box.y_max)
    # Not by numpy: before four values it takes longer than everything else here.
    if not all(map(math.isfinite, values)) or max(map(abs, values)) > 1e6:
        raise DataError(f"the face box {_text(box)} is not finite or beyond any photo")
    if box.width <= 0 or box.height <= 0:
        raise DataError(f"the face box {_text(box)} is empty: x_min < x_max, y_min < y_max needed")
    if spec.box_rule == "stretch":
        b = box.moved(0, 0, spec.box_scale)
        return int(b.x_min), int(b.y_min), int(b.x_max), int(b.y_max)
    half = max(box.width, box.height) * spec.box_scale / 2
    cx, cy = (box.x_min + box.x_max) / 2, (box.y_min + box.y_max) / 2
    # Whole pixels rounded down, as the published evaluation code of both papers' families does:
    # rounding to nearest moves the crop by half a pixel and a teacher's figures by 0.06 degrees.
    x0, y0 = math.floor(cx - half), math.floor(cy - half)
    return x0, y0, max(math.floor(cx + half), x0 + 1), max(math.floor(cy + half), y0 + 1)


def _text(box: Box) -> str:
    return f"({box.x_min:g}, {box.y_min:g}, {box.x_max:g}, {box.y_max:g})"
