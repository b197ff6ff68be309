"""Degraded versions of the crops: what a car's camera sees at night, in motion, in infrared.

Every transform is deterministic and works on the uint8 crops, so that reference and artifact get
the same bytes. They are stand-ins: none replaces recordings from the car.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import cv2
import numpy as np
import numpy.typing as npt

__all__ = ["CONDITIONS", "blurred", "dark", "near_infrared"]

Crops = npt.NDArray[np.uint8]

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
