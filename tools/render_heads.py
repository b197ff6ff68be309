#!/usr/bin/env python3
"""Render heads with exactly known rotation, for training, calibration, validation and tests.

    python tools/render_heads.py out.zip --count 4000 --first-seed 1000000 --processes 2

Needs the packages `anny` and `moderngl`, and an EGL (Mesa's software renderer will do):
docs/rendered-heads.md.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import cv2

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from rendering.occlusions import KINDS  # noqa: E402

from edgehp.files import replacing  # noqa: E402

# The same samples always give the same bytes.
_EPOCH = (1980, 1, 1, 0, 0, 0)
_MATRIX = ",".join(f"r{i}{j}" for i in range(3) for j in range(3))
HEADER = f"image,width,height,x_min,y_min,x_max,y_max,pitch,yaw,roll,{_MATRIX},nir,seed"
_studio = None


def _start(side: int, box_share: float) -> None:
    """Load the model in a worker, once."""
    global _studio
    from rendering.heads import HeadModel
    from rendering.scene import Studio

    _studio = Studio(HeadModel(), side, box_share)


def _render(
    job: tuple[str, int, tuple[float, float, float, float], int, str],
) -> tuple[str, str, bytes]:
    """The name of a picture, its row of ``labels.csv`` and its JPEG file."""
    from rendering.scene import Ranges

    name, seed, ranges, quality, occlusion = job
    if _studio is None:
        raise RuntimeError("the worker was not started with _start")
    r = _studio.shoot(seed, Ranges(*ranges), occlusion=occlusion)
    # Enough digits that the matrix stays a rotation.
    values = [f"{v:.2f}" for v in r.box] + [f"{v:.6f}" for v in r.angles]
    values += [f"{v:.9f}" for v in r.matrix.ravel()]
    height, width = r.image.shape[:2]
    row = ",".join([name, f"{width}", f"{height}", *values, f"{int(r.nir)}", f"{seed}"])
    bgr = cv2.cvtColor(r.image, cv2.COLOR_RGB2BGR)
    good, data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not good:
        raise RuntimeError("OpenCV could not encode a JPEG")
    return name, row, data.tobytes()


def render(args: argparse.Namespace) -> Iterator[tuple[str, str, bytes]]:
    """Samples in the order of their seeds, whatever the number of processes."""
    ranges = (args.pitch, args.yaw, args.roll, args.nir)
    jobs = [
        (f"{i:05d}.jpg", args.first_seed + i, ranges, args.quality, args.occlusion)
        for i in range(args.count)
    ]
    context = multiprocessing.get_context("spawn")
    begin = time.monotonic()
    with context.Pool(args.processes, _start, (args.side, args.box_share)) as pool:
        for k, result in enumerate(pool.imap(_render, jobs, chunksize=4), 1):
            yield result
            if k % 100 == 0 or k == args.count:
                rate = k / (time.monotonic() - begin)
                print(f"{k}/{args.count} heads, {rate:.1f} a second", file=sys.stderr, flush=True)


def write_zip(path: Path, samples: Iterator[tuple[str, str, bytes]]) -> int:
    """Write ``NAME/NNNNN.jpg`` and ``NAME/labels.csv``; nothing is left of a failed attempt."""
    name, lines = path.stem, [HEADER]
    with replacing(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for image, row, data in samples:
            archive.writestr(zipfile.ZipInfo(f"{name}/{image}", _EPOCH), data)
            lines.append(row)
        info = zipfile.ZipInfo(f"{name}/labels.csv", _EPOCH)
        info.compress_type = zipfile.ZIP_DEFLATED
        archive.writestr(info, "\n".join(lines) + "\n")
    return len(lines) - 1


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("output", type=Path, help="a .zip")
    p.add_argument("--count", type=int, default=1000)
    p.add_argument("--first-seed", type=int, default=0, help="picture i has seed FIRST_SEED + i")
    p.add_argument("--side", type=int, default=160, help="pixels")
    p.add_argument("--box-share", type=float, default=0.62, help="face box over the side")
    p.add_argument("--pitch", type=float, default=50.0, help="largest |pitch|, degrees")
    p.add_argument("--yaw", type=float, default=90.0, help="largest |yaw|, degrees")
    p.add_argument("--roll", type=float, default=40.0, help="largest |roll|, degrees")
    p.add_argument("--nir", type=float, default=0.2, help="share of pseudo near-infrared pictures")
    p.add_argument("--occlusion", choices=KINDS, default="none", help="on every face")
    p.add_argument("--quality", type=int, default=92, help="of the JPEG files")
    p.add_argument("--processes", type=int, default=2)
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    # One thread each: Mesa and torch would otherwise fight over the cores.
    os.environ.setdefault("LP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    count = write_zip(args.output, render(args))
    print(f"{args.output}: {count} samples", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
