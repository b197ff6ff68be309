"""What the build tests share: an untrained network on disk, and zips of pictures."""

from __future__ import annotations

import csv
import io
import zipfile
from pathlib import Path

import cv2
import numpy as np

from edgehp.networks.checkpoint import save_weights
from tests import helpers

SIZE = 64


def checkpoint(path: Path, size: int = SIZE, seed: int = 3) -> Path:
    """A random ResNet18 for crops of `size` pixels."""
    weights, spec = helpers.random_network(size=size, seed=seed)
    save_weights(path, weights, spec)
    return path


def faces(
    path: Path,
    count: int,
    seed: int,
    *,
    labels: bool = False,
    size: int = SIZE,
    gain: float = 1.0,
) -> Path:
    """A zip of `count` pictures, darker by `gain`, with random labels if asked for."""
    crops = (helpers.random_crops(count, size, seed) * gain).astype(np.uint8)
    rng = np.random.default_rng(seed)
    with zipfile.ZipFile(path, "w") as archive:
        rows = []
        for i, crop in enumerate(crops):
            name = f"{path.stem}/{i:05d}.png"
            archive.writestr(name, cv2.imencode(".png", crop[..., ::-1])[1].tobytes())
            pitch, yaw, roll = rng.uniform(-40, 40, 3).round(2)
            rows.append((name, size, size, 0, 0, size, size, pitch, yaw, roll))
        if labels:
            text = io.StringIO()
            writer = csv.writer(text)
            corners = ("x_min", "y_min", "x_max", "y_max")
            writer.writerow(("image", "width", "height", *corners, "pitch", "yaw", "roll"))
            writer.writerows(rows)
            archive.writestr(f"{path.stem}/boxes.csv", text.getvalue())
    return path
