"""Augmentation for head-pose training: geometry that keeps the label exact, and car cameras.

Everything is a pure function of the photo and a numpy generator, so an epoch can be repeated or
resumed from its seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import cv2
import numpy as np
import numpy.typing as npt

from edgehp import pose
from edgehp.crop import Box, Preprocessing, crop_face

__all__ = ["AUGMENTATIONS", "Augmentation", "augmented_crop", "photometric"]

Image = npt.NDArray[np.uint8]
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Augmentation:
    """How much of what; probabilities are per photo.

    Attributes:
        scale: factors (lowest, highest) on the box.
        shift: largest shift of the box, times its larger side, each axis.
        rotate: largest rotation in the image plane, degrees; the label turns with it.
        rotate_probability: of a rotation.
        flip: probability of a mirror image.
        light: probability of brightness, contrast and gamma changes.
        grey: probability of a grey picture; half of these imitate near-infrared light.
        dark: probability of low light with sensor noise.
        blur: probability of defocus or motion blur.
        sharpen: probability of over-sharpening.
        coarse: probability of a loss of resolution.
        noise: probability of noise alone.
        occlude: probability of a patch over the face.
    """

    scale: tuple[float, float] = (0.92, 1.12)
    shift: float = 0.06
    rotate: float = 20.0
    rotate_probability: float = 0.4
    flip: float = 0.5
    light: float = 0.8
    grey: float = 0.2
    dark: float = 0.08
    blur: float = 0.12
    sharpen: float = 0.12
    coarse: float = 0.12
    noise: float = 0.1
    occlude: float = 0.3


# A run from random weights takes the full effects; the last epochs of a run, or a fine-tune, gain
# accuracy on clean photos from milder ones and keep what was learnt about bad light.
_GENTLE = Augmentation(
    scale=(0.95, 1.08),
    shift=0.04,
    rotate=15.0,
    rotate_probability=0.3,
    light=0.6,
    grey=0.15,
    dark=0.04,
    blur=0.06,
    sharpen=0.08,
    coarse=0.06,
    noise=0.05,
    occlude=0.15,
)
AUGMENTATIONS: Mapping[str, Augmentation] = MappingProxyType(
    {
        "strong": Augmentation(),
        "gentle": _GENTLE,
        # For an input larger than the training photos: enlarged ones are soft, a camera's are not.
        "sharp": replace(_GENTLE, blur=0.05, sharpen=0.4, coarse=0.04),
    }
)


def augmented_crop(
    photo: Image,
    box: Box | None,
    matrix: Array,
    spec: Preprocessing,
    augmentation: Augmentation,
    rng: np.random.Generator,
) -> tuple[Image, Array]:
    """One training crop and its label.

    Args:
        photo: uint8 [H, W, 3], RGB.
        box: the face; None for the whole photo.
        matrix: label rotation [3, 3], canonical.
        spec: the network's preprocessing; its own crop function is what cuts the face out.
        augmentation: how much of what.
        rng: source of all randomness.

    Returns:
        uint8 [S, S, 3] RGB and the rotation [3, 3] that belongs to it.
    """
    a = augmentation
    if box is None:
        box = Box(0, 0, photo.shape[1], photo.shape[0])
    if rng.random() < a.rotate_probability and a.rotate > 0:
        angle = rng.uniform(-a.rotate, a.rotate)
        photo = _turned(photo, box, angle)
        # Turning the picture clockwise by t turns the head about the viewing axis, after whatever
        # rotation it had: R' = Rz(t) R in the y-down camera frame.
        matrix = pose.matrix_from_euler([0.0, 0.0, angle]) @ matrix
    dx, dy = rng.uniform(-a.shift, a.shift, 2)
    crop = crop_face(photo, box.moved(dx, dy, rng.uniform(*a.scale)), spec)
    if rng.random() < a.flip:
        crop, matrix = np.ascontiguousarray(crop[:, ::-1]), pose.flip_matrix(matrix)
    return photometric(crop, a, rng), matrix


def photometric(crop: Image, a: Augmentation, rng: np.random.Generator) -> Image:
    """Change light, colour, sharpness and visibility of a crop uint8 [S, S, 3], not its pose."""
    if rng.random() < a.coarse:
        crop = _coarse(crop, rng.uniform(0.2, 0.7))
    if rng.random() < a.blur:
        crop = _blurred(crop, rng)
    elif rng.random() < a.sharpen:
        soft = cv2.GaussianBlur(crop, (0, 0), crop.shape[0] / 112)
        gain = float(rng.uniform(0.5, 2.0))
        crop = np.asarray(cv2.addWeighted(crop, 1 + gain, soft, -gain, 0), np.uint8)
    if rng.random() < a.light:
        crop = _relit(crop, rng)
    if rng.random() < a.grey:
        crop = _grey(crop, rng)
    if rng.random() < a.dark:
        crop = _noisy(crop, rng, gain=rng.uniform(0.08, 0.5), sigma=rng.uniform(2, 9))
    elif rng.random() < a.noise:
        crop = _noisy(crop, rng, gain=1.0, sigma=rng.uniform(2, 14))
    if rng.random() < a.occlude:
        crop = _occluded(crop, rng)
    return crop


def _turned(photo: Image, box: Box, clockwise: float) -> Image:
    centre = ((box.x_min + box.x_max) / 2, (box.y_min + box.y_max) / 2)
    # OpenCV's positive angle is counter-clockwise as seen.
    turn = cv2.getRotationMatrix2D(centre, -clockwise, 1.0)
    size = (photo.shape[1], photo.shape[0])
    return np.asarray(cv2.warpAffine(photo, turn, size, borderMode=cv2.BORDER_REPLICATE), np.uint8)


def _coarse(crop: Image, factor: float) -> Image:
    size = crop.shape[0]
    small = max(8, int(size * factor))
    down = cv2.resize(crop, (small, small), interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.resize(down, (size, size), interpolation=cv2.INTER_LINEAR), np.uint8)


def _blurred(crop: Image, rng: np.random.Generator) -> Image:
    size = crop.shape[0]
    if rng.random() < 0.5:
        sigma = float(rng.uniform(0.5, 2.5)) * size / 112
        return np.asarray(cv2.GaussianBlur(crop, (0, 0), sigma), np.uint8)
    length = max(3, int(rng.uniform(3, 10) * size / 112)) | 1
    kernel = np.zeros((length, length), np.float32)
    kernel[length // 2] = 1.0 / length
    centre = (length / 2 - 0.5, length / 2 - 0.5)
    turn = cv2.getRotationMatrix2D(centre, float(rng.uniform(0, 180)), 1.0)
    kernel = np.asarray(cv2.warpAffine(kernel, turn, (length, length)), np.float32)
    kernel /= max(float(kernel.sum()), 1e-6)
    return np.asarray(cv2.filter2D(crop, -1, kernel, borderType=cv2.BORDER_REPLICATE), np.uint8)


def _relit(crop: Image, rng: np.random.Generator) -> Image:
    levels = np.linspace(0, 1, 256)
    levels = levels ** np.exp(rng.normal(0, 0.25))
    levels = (levels - 0.5) * rng.uniform(0.6, 1.4) + 0.5 + rng.uniform(-0.2, 0.2)
    # A colour cast: one curve per channel.
    cast = rng.normal(1.0, 0.06, 3)
    table = np.clip(levels[:, None] * cast * 255, 0, 255).astype(np.uint8)
    return np.asarray(cv2.LUT(crop, np.ascontiguousarray(table[None])), np.uint8)


def _grey(crop: Image, rng: np.random.Generator) -> Image:
    if rng.random() < 0.5:
        grey = cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY).astype(np.float32)
    else:
        # Near-infrared at 940 nm: skin reflects more evenly (mostly the red channel), the lamp
        # sits beside the camera and its light falls off towards the edges.
        size = crop.shape[0]
        grey = (0.8 * crop[..., 0] + 0.2 * crop[..., 1]).astype(np.float32)
        x, y = np.meshgrid(np.arange(size, dtype=np.float32), np.arange(size, dtype=np.float32))
        cx, cy = rng.uniform(0.25, 0.75, 2) * size
        radius = rng.uniform(0.5, 1.2) * size
        lamp = np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * radius**2))
        grey = grey * (0.35 + 0.9 * lamp)
    grey8 = np.clip(grey, 0, 255).astype(np.uint8)
    return np.ascontiguousarray(np.repeat(grey8[..., None], 3, axis=2))


def _noisy(crop: Image, rng: np.random.Generator, gain: float, sigma: float) -> Image:
    noise = rng.standard_normal(crop.shape, np.float32)
    return np.clip(crop * np.float32(gain) + noise * np.float32(sigma), 0, 255).astype(np.uint8)


def _occluded(crop: Image, rng: np.random.Generator) -> Image:
    size = crop.shape[0]
    w, h = (rng.uniform(0.1, 0.4, 2) * size).astype(int)
    x, y = int(rng.uniform(0, size - w)), int(rng.uniform(0, size - h))
    out = crop.copy()
    if rng.random() < 0.5:
        out[y : y + h, x : x + w] = rng.integers(0, 256, 3, dtype=np.uint8)
    else:
        out[y : y + h, x : x + w] = rng.integers(0, 256, (h, w, 3), dtype=np.uint8)
    return out
