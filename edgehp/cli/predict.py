"""``edgehp predict``: head poses of photos, folders, videos and cameras as JSON lines."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgehp.errors import DataError, UsageError

if TYPE_CHECKING:
    from collections import Counter

    from edgehp.runtime.predict import FaceFinder

__all__ = ["command"]

logger = logging.getLogger(__name__)


@click.command("predict", short_help="Head pose of the faces in a photo, folder, video or camera.")
@click.argument("source")
@click.argument("artifact", required=False, type=click.Path(path_type=Path))
@click.option("--network", help="A float network (bundled name or file) in place of an artifact.")
@click.option(
    "--boxes",
    type=click.Path(path_type=Path),
    help='Face boxes {"file": [{"bbox": [x_min, y_min, x_max, y_max]}]}, used as they are.',
)
@click.option(
    "--save",
    type=click.Path(path_type=Path),
    help="Draw the poses: a folder; or a photo for a photo, a video for a video or camera.",
)
@click.option(
    "--min-face-score",
    type=click.FloatRange(0, 1),
    default=0.5,
    show_default=True,
    help="Least score of a detected face.",
)
@click.option(
    "--min-confidence",
    type=click.FloatRange(0, 1),
    default=0.5,
    show_default=True,
    help="Less confidence than this is the state low_confidence.",
)
@click.option("--threads", type=click.IntRange(1), help="Processor threads for inference.")
@click.option("--limit", type=click.IntRange(1), help="Stop after this many frames.")
def command(
    source: str,
    artifact: Path | None,
    network: str | None,
    boxes: Path | None,
    save: Path | None,
    min_face_score: float,
    min_confidence: float,
    threads: int | None,
    limit: int | None,
) -> None:
    r"""Predict the head poses in SOURCE: a photo, a folder, a video file or camera:0.

    With ARTIFACT, else the newest one under dist/. One JSON object a face goes to stdout, with its
    box, angles (pitch, yaw, roll in degrees: +pitch nose up, +yaw nose to the image's left, +roll
    clockwise), spread, confidence and state: ok, out_of_range, low_confidence. A frame without a
    face gives one object with the state no_face, a photo that cannot be read one with the state
    unreadable.

    \b
    The drawn axes: red to the image's right for a frontal face, green down, blue where the nose
    points. Box white: ok; orange: out of range; grey: low confidence.
    """
    # Imported here: `edgehp --help` must not pay for OpenCV.
    from collections import Counter
    from contextlib import ExitStack

    from edgehp.artifact.open import open_artifact, open_network
    from edgehp.runtime.drawing import open_saver
    from edgehp.runtime.predict import predict
    from edgehp.runtime.records import DEFAULT_BINS, StateRules, json_line
    from edgehp.runtime.sources import parse_source

    if artifact is not None and network is not None:
        raise UsageError("give an artifact or --network, not both")
    # Box lists refer to the pixels as they are stored.
    frames_of = parse_source(source, upright=boxes is None)
    if boxes is not None and frames_of.kind not in ("photo", "folder"):
        raise UsageError("--boxes names photos; a video or camera needs the face detector")
    with ExitStack() as stack:
        saver = stack.enter_context(open_saver(save, frames_of)) if save is not None else None
        faces = _faces(boxes, min_face_score)
        opened = stack.enter_context(
            open_artifact(artifact, threads=threads)
            if network is None
            else open_network(network, threads=threads)
        )
        logger.info("predicting with %s", opened.name)
        rules = StateRules(opened.bins or DEFAULT_BINS, min_confidence)
        frames = itertools.islice(frames_of.frames(), limit)
        counts: Counter[str] = Counter()
        for result in predict(frames, opened.engine, opened.preprocessing, faces, rules):
            for record in result.records():
                # A line at a time, also into a pipe: a camera's reader waits for it.
                click.echo(json_line(record), nl=False)
            counts.update(result.states)
            if saver is not None:
                saver.add(result)
    _summarise(counts)
    if counts["unreadable"]:
        raise DataError(
            f"{counts['unreadable']} photo(s) could not be used; the lines with the state "
            "unreadable say why"
        )


def _faces(boxes: Path | None, score: float) -> FaceFinder:
    from edgehp.runtime.predict import DetectorFaces, ListedFaces

    if boxes is not None:
        from edgehp.datasets.boxes import load_boxes

        return ListedFaces(load_boxes(boxes))
    from edgehp.runtime.detection import open_detector

    return DetectorFaces(open_detector(score))


def _summarise(counts: Counter[str]) -> None:
    faces = sum(n for state, n in counts.items() if state not in ("no_face", "unreadable"))
    parts = ", ".join(f"{n} {state}" for state, n in sorted(counts.items())) or "no frames"
    click.echo(f"edgehp: {faces} face{'' if faces == 1 else 's'} ({parts})", err=True)
