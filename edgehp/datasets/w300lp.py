"""300W-LP: folders AFW, HELEN, IBUG, LFPW and their mirror images, `.jpg` with `.mat`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from edgehp.datasets.base import DEFAULT_MAX_ANGLE, Dataset, Skips, build_dataset
from edgehp.datasets.boxes import LANDMARK_RULE, find_boxes
from edgehp.datasets.pose_mat import paired_samples
from edgehp.errors import DataError
from edgehp.images import is_apple_double, report_left_out

__all__ = ["FOLDERS", "LAYOUT", "read_300w_lp"]

FOLDERS = tuple(f"{n}{flip}" for n in ("AFW", "HELEN", "IBUG", "LFPW") for flip in ("", "_Flip"))
LAYOUT = "folders AFW, AFW_Flip, HELEN, ... with NAME.jpg and NAME.mat"
LIST = "300W_LP.json"


def read_300w_lp(
    root: Path | str,
    *,
    boxes: Path | str | None = None,
    skip_bad: bool = False,
    max_angle: float | None = DEFAULT_MAX_ANGLE,
    flipped: bool = True,
) -> Dataset:
    """Read 300W-LP.

    Args:
        root: the folder that holds AFW, HELEN, ..., or the folder ``300W_LP`` around it.
        boxes: a box list (keys ``AFW/NAME.jpg``); ``"landmarks"`` or, without a list, None takes
            the boxes from the landmarks. Hopenet draws the margin at random while training; here
            it is fixed, since augmentation is the training's business.
        skip_bad: list missing and damaged files under ``skipped`` instead of raising.
        max_angle: leave out photos with an |angle| above it, degrees; None keeps all.
        flipped: whether to read the ``*_Flip`` folders too.

    Raises:
        DataError: no photos, or one is without its pair or its box.
    """
    folder = Path(root)
    if (folder / "300W_LP").is_dir():
        folder = folder / "300W_LP"
    wanted = [f for f in FOLDERS if flipped or not f.endswith("_Flip")]
    present = [f for f in wanted if (folder / f).is_dir()]
    photos, left_out = [], Counter[str]()
    for name in present:
        files = [p for p in (folder / name).iterdir() if p.suffix in (".jpg", ".mat")]
        left_out["of macOS ('._')"] += sum(is_apple_double(p.name) for p in files)
        files = [p for p in files if not is_apple_double(p.name)]
        photos += [folder / name / f"{s}.jpg" for s in sorted({p.stem for p in files})]
    report_left_out(str(folder), +left_out)
    if not photos:
        raise DataError(f"{folder}: no 300W-LP photos; expected {LAYOUT}")
    listed = None if boxes == "landmarks" else find_boxes(folder, LIST, boxes)
    skips = Skips(skip_bad)
    samples, filtered = paired_samples(folder, photos, listed, max_angle, skips)
    return build_dataset(
        "300w-lp",
        samples,
        skips,
        boxes=LANDMARK_RULE if listed is None else listed.source,
        angle_filter=None if max_angle is None else f"all |angles| <= {max_angle:g} degrees",
        convention="300w-lp",
        filtered=filtered,
        folders=present,
    )
