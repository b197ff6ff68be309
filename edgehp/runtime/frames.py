"""Whether what a camera delivers is a picture: its form, and whether it is stuck.

A camera that fails seldom says so. It repeats its last frame (OpenCV issues 5221, 14044), sends
black, or sends whatever is left in a buffer, and reading reports success each time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from edgehp.crop import Picture
from edgehp.errors import DataError
from edgehp.images import to_8_bits

Image = npt.NDArray[np.uint8]

_SMALLEST, _LARGEST = 32, 8192
# A sensor never sends the same pixels twice: its noise alone changes them. Every 8th row and column
# is enough to see that, and cheap.
_STEP = 8
# Fewer grey levels of standard deviation are no picture: a covered lens, a black frame.
_FLAT = 2.0
# Neighbouring pixels of pictures correlate by 0.8 and more, those of noise by about zero.
_NOISE = 0.3
# Noise of so few grey levels is that of a sensor in the dark, not a damaged transfer.
_DARK_NOISE = 12.0


# Degrees clockwise -> OpenCV's name for it.
ROTATIONS = {
    0: None,
    90: cv2.ROTATE_90_CLOCKWISE,
    180: cv2.ROTATE_180,
    270: cv2.ROTATE_90_COUNTERCLOCKWISE,
}


def as_rgb(
    pixels: object,
    *,
    grey: bool = False,
    bit_depth: int | None = None,
    rotate: int = 0,
    nv12: bool = False,
) -> Image:
    """A captured frame as uint8 RGB [H, W, 3]; a grey one gets three equal channels.

    Near-infrared cameras send grey: one channel, or three that are equal. The networks take RGB,
    and saw grey pictures in training as three equal channels.

    Args:
        pixels: uint8 or uint16, [H, W], [H, W, 1], [H, W, 3] (BGR) or [H, W, 4] (BGRA); or the
            error that came in its place.
        grey: turn colour into grey too, for a near-infrared sensor behind a colour driver.
        bit_depth: significant bits of uint16 frames; None: 16 where a pixel uses the highest bit,
            else it must be told.
        rotate: degrees clockwise by which to turn the frame, one of `ROTATIONS`.
        nv12: the frame is uint8 [H * 3 / 2, W] with NV12's planes, see `edgehp.crop.Picture`.

    Raises:
        DataError: it is no frame.
    """
    if isinstance(pixels, DataError):
        raise pixels
    if not isinstance(pixels, np.ndarray):
        raise DataError(f"the camera gave {type(pixels).__name__}, expected a frame")
    found = f"{pixels.dtype} {list(pixels.shape)}"
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if (
        pixels.ndim != 3
        or pixels.shape[2] not in (1, 3, 4)
        or pixels.dtype not in (np.uint8, np.uint16)
    ):
        raise DataError(f"the camera gave {found}, expected uint8 or uint16 [H, W] or [H, W, 3]")
    if not all(_SMALLEST <= side <= _LARGEST for side in pixels.shape[:2]):
        raise DataError(
            f"the camera gave {found}, expected sides of {_SMALLEST} to {_LARGEST} pixels"
        )
    rgb = to_rgb(pixels, grey=grey, bit_depth=bit_depth, nv12=nv12)
    turn = ROTATIONS[rotate]
    return rgb if turn is None else np.asarray(cv2.rotate(rgb, turn), np.uint8)


def to_rgb(
    pixels: npt.NDArray[Any],
    *,
    grey: bool = False,
    bit_depth: int | None = None,
    nv12: bool = False,
) -> Image:
    """Pixels of the forms that `as_rgb` takes, of any size, as uint8 RGB [H, W, 3]."""
    if nv12:
        rgb = nv12_picture(pixels).rgb()
        return to_rgb(rgb[..., ::-1], grey=True) if grey else rgb
    frame = to_8_bits(pixels, "the frame", bit_depth)
    channels = 1 if frame.ndim == 2 else frame.shape[2]
    if channels == 1:
        return np.asarray(cv2.cvtColor(frame, cv2.COLOR_GRAY2RGB), np.uint8)
    if grey:
        code = cv2.COLOR_BGR2GRAY if channels == 3 else cv2.COLOR_BGRA2GRAY
        return np.asarray(cv2.cvtColor(cv2.cvtColor(frame, code), cv2.COLOR_GRAY2RGB), np.uint8)
    code = cv2.COLOR_BGR2RGB if channels == 3 else cv2.COLOR_BGRA2RGB
    return np.asarray(cv2.cvtColor(frame, code), np.uint8)


def nv12_picture(pixels: npt.NDArray[Any]) -> Picture:
    """NV12's planes as a source gives them, uint8 [H * 3 / 2, W] or [H * 3 / 2, W, 1].

    Raises:
        DataError: they are something else.
    """
    return Picture(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels, "NV12")


@dataclass(frozen=True)
class Fault:
    """What is wrong with a frame.

    Attributes:
        kind: ``"frozen"``, ``"black"``, ``"featureless"`` or ``"garbage"``.
        text: one sentence.
    """

    kind: str
    text: str


class FrameHealth:
    """Looks at every frame of one camera in turn."""

    def __init__(self, frozen_after: float = 0.4) -> None:
        """Nothing seen yet.

        Args:
            frozen_after: seconds of identical frames that make a camera stuck.
        """
        self._after = frozen_after
        self._last: npt.NDArray[np.uint8] | None = None
        self._since = 0.0
        self._same = 0

    def check(self, rgb: Image, seconds: float) -> Fault | None:
        """What is wrong with the frame, or None.

        Args:
            rgb: uint8 [H, W, 3].
            seconds: when it was captured.
        """
        sample = np.ascontiguousarray(rgb[::_STEP, ::_STEP])
        if self._last is not None and np.array_equal(sample, self._last):
            self._same += 1
        else:
            self._last, self._since, self._same = sample, seconds, 0
        level, deviation, neighbours = _look(rgb)
        # First: a black frame repeated is black.
        if deviation < _FLAT:
            kind = "black" if level < 16 else "featureless"
            return Fault(kind, f"a frame of one grey level ({level:.0f} of 255): covered or dark?")
        for_s = seconds - self._since
        # Two equal frames may be one frame sent twice; time alone must not accuse a slow camera.
        if self._same >= 2 and for_s >= self._after:
            return Fault("frozen", f"{self._same + 1} identical frames over {for_s:.2f} s")
        if neighbours < _NOISE:
            if deviation < _DARK_NOISE:
                return Fault("featureless", "sensor noise and nothing else: dark?")
            return Fault(
                "garbage", f"neighbouring pixels correlate by {neighbours:.2f} only: noise"
            )
        return None


def _look(rgb: Image) -> tuple[float, float, float]:
    """Mean and standard deviation of green, and the correlation of horizontally adjacent pixels.

    Over every 16th row, all of it: a grid in both directions could fall in step with a pattern.
    """
    rows = rgb[::16, :, 1].astype(np.float32)
    variance = float(rows.var())
    if variance <= 0:
        return float(rows.mean()), 0.0, 1.0
    steps = float(np.square(np.diff(rows, axis=1)).mean())
    return float(rows.mean()), float(np.sqrt(variance)), 1.0 - steps / (2.0 * variance)
