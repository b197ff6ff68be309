"""How crops look: like those that the scales come from, or worse, as a car's camera sees at night.

Scales chosen on pictures of another kind clip what they have not seen. The comparison is one-sided
on purpose: calibration crops may be more varied than what is validated on, not less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from edgehp.artifact.manifest import Appearance
from edgehp.errors import DataError
from edgehp.files import plain

Crops = npt.NDArray[np.uint8]
Values = npt.NDArray[np.float64]

# Columns of what `measure_crops` gives, and how a person says that a crop has more or less of it.
STATISTICS = ("brightness", "contrast", "saturation", "sharpness")
_WORDS = {
    "brightness": ("darker", "brighter"),
    "contrast": ("flatter", "of more contrast"),
    "saturation": ("paler", "more colorful"),
    "sharpness": ("softer", "sharper"),
}
# What a warning asks for, unless the caller knows better.
ADVICE = "calibrate on crops from the camera that will be used"
# 95 % of the calibration crops lie between.
_LOW, _HIGH = 2.5, 97.5
# Of crops of the same kind one in twenty lies outside, of a hundred crops seldom one in eight. From
# rendered heads to photos: 42 % by brightness, 35 % by contrast.
_MOST_OUTSIDE = 0.3
# A side with less than this share of what lies outside is not worth a word.
_BOTH_SIDES = 0.25
# Activations beyond their range: this many times as often as on the calibration crops, and more
# than one in a thousand; below, the clipping is what the method chose on purpose. kd-resnet18-112
# calibrated on rendered heads clips 0.003 % of them, 0.02 % of others like them, 0.12 % of photos.
_MORE_CLIPPED = 5.0
_LEAST_CLIPPED = 0.001


def measure_crops(crops: Iterable[npt.NDArray[np.uint8]]) -> Values:
    """Statistics of each crop: [n, 4] in the order of `STATISTICS`.

    Brightness is the mean and contrast the standard deviation of the gray levels 0..255;
    saturation is the mean of (largest - smallest channel), 0..255; sharpness the mean absolute
    Laplacian over the contrast, so that it does not depend on the light.

    Args:
        crops: uint8 [S, S, 3], RGB.
    """
    rows = []
    for crop in crops:
        gray = cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY).astype(np.float32)
        contrast = float(gray.std())
        edges = float(np.abs(cv2.Laplacian(gray, cv2.CV_32F)).mean())
        color = (crop.max(-1).astype(np.int16) - crop.min(-1)).mean()
        rows.append((float(gray.mean()), contrast, float(color), edges / (contrast + 1.0)))
    return np.asarray(rows, np.float64).reshape(-1, len(STATISTICS))


def appearance_of(values: Values) -> Appearance:
    """The summary of what `measure_crops` gave.

    Raises:
        DataError: no crops.
    """
    if len(values) == 0:
        raise DataError("no crops to look at: expected at least one")
    ends = np.percentile(values, (_LOW, 50, _HIGH), axis=0).round(4).T.tolist()
    return Appearance(len(values), *map(tuple, ends))


@dataclass(frozen=True)
class Clipped:
    """Activations beyond the calibrated ranges.

    Attributes:
        share: of the activations of the crops to validate on, 0..1.
        usual: of the calibration crops', 0..1.
        worst: tensor with the largest share, and that share.
    """

    share: float
    usual: float
    worst: tuple[str, float]


@dataclass(frozen=True)
class AppearanceCheck:
    """Crops to validate on, held against the calibration crops.

    Attributes:
        calibration: of the calibration crops.
        validation: of those validated on.
        outside: statistic -> shares of the latter, 0..1, below and above the middle 95 % of the
            former.
        clipped: None if not measured.
        advice: what the warning asks for.
    """

    calibration: Appearance
    validation: Appearance
    outside: Mapping[str, tuple[float, float]]
    clipped: Clipped | None = None
    advice: str = ADVICE

    @classmethod
    def of(
        cls,
        calibration: Appearance,
        values: Values,
        clipped: Clipped | None = None,
        advice: str = ADVICE,
    ) -> AppearanceCheck:
        """Compare the calibration crops with what `measure_crops` gave for the others.

        Raises:
            DataError: no crops.
        """
        outside = {}
        for i, name in enumerate(STATISTICS):
            low, _, high = getattr(calibration, name)
            below, above = (values[:, i] < low).mean(), (values[:, i] > high).mean()
            outside[name] = (round(float(below), 4), round(float(above), 4))
        return cls(calibration, appearance_of(values), outside, clipped, advice)

    @property
    def warning(self) -> str | None:
        """One sentence with the figures where the calibration crops look unlike these, or None."""
        parts = []
        for name in STATISTICS:
            share = sum(self.outside[name])
            if share > _MOST_OUTSIDE:
                was, found = (getattr(a, name)[1] for a in (self.calibration, self.validation))
                words = [
                    word
                    for word, side in zip(_WORDS[name], self.outside[name], strict=True)
                    if side > _BOTH_SIDES * share
                ]
                parts.append(
                    f"{share:.0%} are {' or '.join(words)} than nearly all of the former (median "
                    f"{name} {found:.3g} against {was:.3g})"
                )
        c = self.clipped
        if c is not None and c.share > max(_LEAST_CLIPPED, _MORE_CLIPPED * c.usual):
            parts.append(
                f"{c.share:.2%} of their activations lie beyond the calibrated ranges "
                f"({c.usual:.2%} of the calibration crops', most at {c.worst[0]} with "
                f"{c.worst[1]:.1%})"
            )
        if not parts:
            return None
        return (
            "the calibration crops look unlike those validated on: of the latter "
            f"{'; '.join(parts)}: {self.advice}"
        )

    def to_dict(self) -> dict[str, Any]:
        """A dictionary for JSON, with the warning."""
        return {
            "calibration": plain(self.calibration),
            "validation": plain(self.validation),
            "outside": {n: list(sides) for n, sides in self.outside.items()},
            "warning": self.warning,
        }


# --- degraded versions: what a car's camera sees at night, in motion, in infrared -----------------
#
# Every transform is deterministic and works on the uint8 crops, so that reference and artifact get
# the same bytes. They are stand-ins: none replaces recordings from the car.

# A tenth of the light: with a display gamma of 2.2 every code value shrinks to 0.1^(1/2.2) = 0.351.
_DARK_GAIN = 0.1 ** (1 / 2.2)
# Read noise of a small sensor at high gain, in code values.
_DARK_NOISE = 3.0
_NOISE_SEED = 940
# Standard deviation of the blur as a share of the crop's side: 3.4 pixels at 224.
_BLUR = 0.015
# Skin reflects most in the red and beyond, so the red channel is the nearest to 940 nm.
_NIR_WEIGHTS = (0.80, 0.15, 0.05)
# Light scatters below the skin: 0.4 % of the side.
_NIR_SCATTER = 0.004
# A light beside the camera falls off towards the edge: gain at the corners.
_NIR_CORNER = 0.45


def dark(crops: Crops) -> Crops:
    """A tenth of the light, and sensor noise of 3 code values (the same field on every crop).

    Args:
        crops: uint8 [N, S, S, 3], RGB; returned likewise by each of these functions.
    """
    noise = np.random.default_rng(_NOISE_SEED).normal(0, _DARK_NOISE, crops.shape[1:])
    values = crops.astype(np.float32) * np.float32(_DARK_GAIN) + noise.astype(np.float32)
    return _to_uint8(values)


def blurred(crops: Crops) -> Crops:
    """Out of focus: a Gaussian blur of 1.5 % of the side."""
    sigma = _BLUR * crops.shape[1]
    out = [cv2.GaussianBlur(c, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE) for c in crops]
    return np.stack(out).astype(np.uint8, copy=False)


def near_infrared(crops: Crops) -> Crops:
    """Pseudo near-infrared: mostly red as gray, slight scatter, brighter in the middle."""
    size = crops.shape[1]
    gray = crops.astype(np.float32) @ np.asarray(_NIR_WEIGHTS, np.float32)
    sigma = _NIR_SCATTER * size
    soft = np.stack(
        [cv2.GaussianBlur(g, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE) for g in gray]
    )
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    radius2 = (axis[:, None] ** 2 + axis[None, :] ** 2) / 2
    lit = soft * (1 - (1 - _NIR_CORNER) * radius2)
    return _to_uint8(np.repeat(lit[..., None], 3, axis=-1))


def _to_uint8(values: npt.NDArray[np.float32]) -> Crops:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


CONDITIONS: Mapping[str, Callable[[Crops], Crops]] = MappingProxyType(
    {"dark": dark, "blurred": blurred, "near-infrared": near_infrared}
)
