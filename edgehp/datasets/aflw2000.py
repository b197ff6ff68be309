"""AFLW2000-3D: ``imageNNNNN.jpg`` with ``imageNNNNN.mat`` in one folder."""

from __future__ import annotations

import logging
from pathlib import Path

from edgehp.datasets.base import DEFAULT_MAX_ANGLE, Dataset, Skips, build_dataset
from edgehp.datasets.boxes import LANDMARK_RULE, find_boxes
from edgehp.datasets.pose_mat import paired_samples
from edgehp.errors import DataError

__all__ = ["LAYOUT", "read_aflw2000"]

logger = logging.getLogger(__name__)

LAYOUT = "imageNNNNN.jpg and imageNNNNN.mat"
LIST = "AFLW2000.json"


def read_aflw2000(
    root: Path | str,
    *,
    boxes: Path | str | None = None,
    skip_bad: bool = False,
    max_angle: float | None = DEFAULT_MAX_ANGLE,
) -> Dataset:
    """Read AFLW2000-3D, whole or a part of it: what is in the folder is the data set.

    Args:
        root: the folder.
        boxes: a published box list; ``"landmarks"`` takes the boxes from the landmarks; None looks
            for a list (see `edgehp.datasets.boxes.find_boxes`), then takes landmarks.
        skip_bad: list missing and damaged files under ``skipped`` instead of raising.
        max_angle: leave out photos with an |angle| above it, degrees; None keeps all.

    Raises:
        DataError: no photos, or one is without its pair or its box.
    """
    folder = Path(root)
    stems = {p.stem for kind in ("jpg", "mat") for p in folder.glob(f"image*.{kind}")}
    if not stems:
        raise DataError(f"{folder}: no AFLW2000-3D photos; expected {LAYOUT}")
    listed = None if boxes == "landmarks" else find_boxes(folder, LIST, boxes)
    skips = Skips(skip_bad)
    photos = [folder / f"{s}.jpg" for s in sorted(stems)]
    samples, filtered = paired_samples(folder, photos, listed, max_angle, skips)
    absent = [] if listed is None else sorted(set(listed.faces) - {p.name for p in photos})
    if absent:
        logger.warning(
            "aflw2000: %d photos of the box list are not in the folder: figures are of a part",
            len(absent),
        )
    return build_dataset(
        "aflw2000",
        samples,
        skips,
        boxes=LANDMARK_RULE if listed is None else listed.source,
        angle_filter=None if max_angle is None else f"all |angles| <= {max_angle:g} degrees",
        convention="aflw2000",
        filtered=filtered,
        listed_without_photo=len(absent),
    )
