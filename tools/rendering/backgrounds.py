"""Procedural backgrounds and noise tiles, linear RGB, from a random generator alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

Tiles = Callable[[np.random.Generator], npt.NDArray[np.uint8]]
Floats = npt.NDArray[np.float32]


def tile(rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Tileable fractal noise, uint8 [256, 256], stretched to the whole range."""
    total = np.zeros((256, 256))
    for k, weight in ((4, 1.0), (8, 0.8), (16, 0.7), (32, 0.6), (64, 0.5), (128, 0.4)):
        grid = np.pad(rng.random((k, k)), ((0, 1), (0, 1)), mode="wrap")
        at = np.arange(256) * k / 256
        i, f = at.astype(int), at - at.astype(int)
        f = f * f * (3 - 2 * f)
        rows = grid[i] * (1 - f)[:, None] + grid[i + 1] * f[:, None]
        total += weight * (rows[:, i] * (1 - f) + rows[:, i + 1] * f)
    low, high = np.percentile(total, [0.5, 99.5])
    return np.asarray(np.clip((total - low) / (high - low) * 255, 0, 255), np.uint8)


def background(rng: np.random.Generator, side: int, nir: bool, noise: Tiles) -> Floats:
    """A blurred something, linear RGB [side, side, 3]."""
    kind = rng.choice(["gradient", "shapes", "noise", "room"])
    picture: npt.NDArray[Any] = np.empty((side, side, 3), np.float32)
    a, b = rng.uniform(0.0, 0.8, (2, 3)) * rng.uniform(0.1, 1.0)
    angle = rng.uniform(0, 6.28)
    y, x = np.mgrid[0:side, 0:side] / side - 0.5
    t = (x * np.cos(angle) + y * np.sin(angle) + 0.7)[..., None] / 1.4
    picture[:] = a * (1 - t) + b * t
    if kind == "noise":
        big = cv2.resize(noise(rng), (side, side)).astype(np.float32)[..., None] / 255
        picture[:] = picture * (0.4 + 1.2 * big)
    elif kind in ("shapes", "room"):
        for _ in range(int(rng.integers(3, 14))):
            colour = (rng.uniform(0.0, 0.9, 3) * rng.uniform(0.1, 1)).tolist()
            p = rng.integers(-side // 4, side * 5 // 4, 2)
            q = rng.integers(side // 12, side // 2 + 1, 2)
            if kind == "room":
                cv2.rectangle(picture, p.tolist(), (p + q).tolist(), colour, -1)
            elif rng.random() < 0.6:
                tilt = float(rng.uniform(0, 180))
                cv2.ellipse(picture, p.tolist(), q.tolist(), tilt, 0, 360, colour, -1)
            else:
                cv2.fillPoly(picture, [rng.integers(-20, side + 20, (4, 2))], colour)
    picture = cv2.GaussianBlur(picture, (0, 0), float(rng.uniform(0.6, 6.0)) * side / 224)
    if nir:
        # The lamp at the camera hardly reaches what is behind the head.
        picture = np.repeat(picture.mean(2, keepdims=True), 3, 2) * rng.uniform(0.02, 0.25)
    return np.asarray(np.clip(picture, 0, 1), np.float32)
