"""What crop + resize of a face from a 1920x1080 frame takes, against OpenCV's own resizing.

    python tools/bench_crop.py

Both take turns in one run, one frame each. Prints, as JSON, medians over all turns in milliseconds
for the faces that ``edgehp bench`` looks at (320 to 480 pixels wide), and whether the median at 224
pixels is at most 0.5 ms. A quiet machine is needed; ``min_ms`` resists neighbours best.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from time import perf_counter
from typing import Any

import cv2
import numpy as np

from edgehp.benchmark.lanes import FACE_SIDES, HEIGHT, WIDTH
from edgehp.crop import Box, Preprocessing, crop_face

LIMIT_MS = 0.5


def frames(count: int, seed: int) -> list[Any]:
    """Frames of blurred noise: more than the processor's caches hold, as a camera's are."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    return [cv2.GaussianBlur(np.roll(noise, 31 * i, 1), (0, 0), 1.5) for i in range(count)]


def by_opencv(photo: Any, box: Box, size: int) -> Any:
    """The same crop by one call of OpenCV."""
    x, y, right, bottom = (int(v) for v in (box.x_min, box.y_min, box.x_max, box.y_max))
    return cv2.resize(photo[y:bottom, x:right], (size, size), interpolation=cv2.INTER_AREA)


def measure(size: int, turns: int, photos: list[Any]) -> dict[str, Any]:
    """Times of both at one input size."""
    spec = Preprocessing(size)
    ways: dict[str, Callable[[Any, Box], Any]] = {
        "edgehp": lambda photo, box: crop_face(photo, box, spec),
        "opencv": lambda photo, box: by_opencv(photo, box, size),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    different = pixels = 0
    for turn in range(turns):
        for i, photo in enumerate(photos):
            side = FACE_SIDES[i % len(FACE_SIDES)]
            x, y = (turn * 37 + i * 211) % (WIDTH - side), (turn * 53 + i * 97) % (HEIGHT - side)
            box = Box(x, y, x + side, y + side)
            answers = {}
            order = list(ways.items())
            for name, way in order if (turn + i) % 2 == 0 else reversed(order):
                began = perf_counter()
                answers[name] = way(photo, box)
                times[name].append((perf_counter() - began) * 1e3)
            apart = answers["edgehp"] != answers["opencv"]
            different, pixels = different + int(apart.sum()), pixels + apart.size
    found: dict[str, Any] = {
        name: {
            "min_ms": min(values),
            "p50_ms": float(np.median(values)),
            "p90_ms": float(np.percentile(values, 90)),
        }
        for name, values in times.items()
    }
    ratios = np.array(times["opencv"]) / np.array(times["edgehp"])
    return {
        "size": size,
        "count": turns * len(photos),
        **found,
        "times_as_fast": float(np.median(ratios)),
        "values_one_level_apart": different / pixels,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    photos = frames(10, options.seed)
    measure(224, 3, photos)
    found = [measure(size, options.turns, photos) for size in (224, 112)]
    print(
        json.dumps(
            {
                "frame": [WIDTH, HEIGHT],
                "faces": list(FACE_SIDES),
                "sizes": found,
                "limit_ms": LIMIT_MS,
                "within_limit": found[0]["edgehp"]["p50_ms"] <= LIMIT_MS,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
