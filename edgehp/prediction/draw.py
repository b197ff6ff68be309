"""Draw a head pose into a photo: three axes fixed to the head, and the box.

The axes start at the centre of the box and are projected straight onto the picture:

* red: to the image's right for a frontal face (x), which is the subject's own left,
* green: down through the chin (y),
* blue: out of the face, where the nose points (-z: z runs away from the camera).

For a frontal face blue is a dot, since it points at the viewer. With +yaw blue goes to the
image's left, with +pitch up, with +roll red and green turn clockwise.
"""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

from edgehp.crop import Box
from edgehp.pose import matrix_from_euler

__all__ = ["axis_ends", "draw_pose"]

Image = npt.NDArray[np.uint8]

# RGB
_RED, _GREEN, _BLUE = (230, 40, 40), (40, 200, 40), (60, 90, 255)
_BOX = {"ok": (255, 255, 255), "out_of_range": (255, 170, 0), "low_confidence": (150, 150, 150)}
# Head axes that are drawn, as columns: right, down, out of the face.
_AXES = np.diag([1.0, 1.0, -1.0])


def axis_ends(angles: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Where the drawn axes end: [3, 2], one row (x, y) each for red, green, blue.

    Args:
        angles: pitch, yaw, roll, degrees, convention ``"aflw2000"``.

    Returns:
        Offsets from the start of the axes, x to the right and y down, in units of their length.
    """
    return np.asarray((matrix_from_euler(angles) @ _AXES)[:2].T)


def draw_pose(
    photo: Image, box: Box, angles: npt.ArrayLike, state: str = "ok", label: str | None = None
) -> None:
    """Draw box, axes and text into `photo` (uint8 [H, W, 3], RGB), which is changed.

    Args:
        photo: the photo.
        box: the face in pixels.
        angles: pitch, yaw, roll, degrees.
        state: the face's state; it sets the colour of the box.
        label: text above the box; None writes the angles.
    """
    height, width = photo.shape[:2]
    a = np.asarray(angles, np.float64)
    thick = max(1, round(max(height, width) / 400))
    centre = np.array([(box.x_min + box.x_max) / 2, (box.y_min + box.y_max) / 2])
    # OpenCV 5 crashes on letters far larger than the picture.
    length = min(max(box.width, box.height) / 2, 2.0 * max(height, width))
    colour = _BOX.get(state, _BOX["ok"])
    corner = _point((box.x_min, box.y_min))
    cv2.rectangle(photo, corner, _point((box.x_max, box.y_max)), colour, thick, cv2.LINE_AA)
    ends = centre + length * axis_ends(a)
    # Blue last: it is the one that tells where the head points.
    for end, axis in zip(ends, (_RED, _GREEN, _BLUE), strict=True):
        cv2.line(photo, _point(centre), _point(end), axis, 2 * thick, cv2.LINE_AA)
    cv2.circle(photo, _point(ends[2]), 3 * thick, _BLUE, -1, cv2.LINE_AA)
    text = label or f"p {a[0]:+.0f} y {a[1]:+.0f} r {a[2]:+.0f}"
    scale = float(np.clip(length / 200, 0.35, 5))
    (text_width, text_height), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, thick)
    at = (
        int(np.clip(corner[0], 0, max(0, width - text_width))),
        int(np.clip(corner[1] - 2 * thick, text_height, max(text_height, height - 2))),
    )
    # A shadow, not an outline: a thicker letter is also a wider one in OpenCV 5.
    for ink, shift in (((0, 0, 0), thick), (colour, 0)):
        place = at[0] + shift, at[1] + shift
        cv2.putText(photo, text, place, cv2.FONT_HERSHEY_SIMPLEX, scale, ink, thick, cv2.LINE_AA)


def _point(values: npt.ArrayLike) -> tuple[int, int]:
    """Whole pixels, within what OpenCV draws."""
    x, y = np.clip(np.rint(np.asarray(values, np.float64)), -30_000, 30_000)
    return int(x), int(y)
