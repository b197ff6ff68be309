"""Graphs and crops that every row of a comparison uses, as files in its folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgehp.crop import Preprocessing, crop_face
from edgehp.datasets.base import Dataset, Sample
from edgehp.datasets.faces import read_faces
from edgehp.datasets.pose_mat import read_aflw2000
from edgehp.errors import UsageError
from edgehp.files import resource_dir, write_whole
from edgehp.networks.bundled import Network
from edgehp.networks.graph import graph_bytes
from quantizers.cores import split
from quantizers.rows import CORE

# The rendered heads that come with edgehp, in place of a file.
SHIPPED = "shipped"


@dataclass(frozen=True)
class Crops:
    """Which faces are used.

    Attributes:
        calibration: folder or zip of faces, or `SHIPPED`.
        count: calibration crops.
        control: further crops of the same source, for controlled precision.
        photos: folder of AFLW2000-3D, or a folder or zip of labelled faces.
        boxes: published box list of AFLW2000-3D.
        limit: use this many photos, evenly spread; 0 takes all.
        seed: chooses the crops.
    """

    calibration: str
    count: int
    control: int
    photos: Path
    boxes: Path | None = None
    limit: int = 0
    seed: int = 0


def prepare(folder: Path, network: Network, crops: Crops) -> str:
    """Write ``fp32.onnx``, ``core.onnx``, the crops and the truth; says what they are.

    Raises:
        UsageError: too few faces, or photos without labels.
        DataError: a file is missing or damaged.
    """
    source = (
        resource_dir("calibration") / "rendered-heads.zip"
        if crops.calibration == SHIPPED
        else Path(crops.calibration)
    )
    faces = read_faces(source).samples
    if len(faces) < crops.count + crops.control:
        raise UsageError(
            f"{source.name} has {len(faces)} faces, {crops.count} to calibrate and "
            f"{crops.control} to control with are asked for"
        )
    folder.mkdir(parents=True, exist_ok=True)
    model, spec = network.graph(), network.spec.preprocessing
    write_whole(folder / "fp32.onnx", graph_bytes(model))
    write_whole(folder / CORE, graph_bytes(split(model)))
    order = np.random.default_rng(crops.seed).permutation(len(faces))
    _cut(folder / "calibration.npy", [faces[i] for i in sorted(order[: crops.count])], spec)
    if crops.control:
        rest = sorted(order[crops.count :][: crops.control])
        _cut(folder / "control.npy", [faces[i] for i in rest], spec)
    samples = list(_labelled(crops).samples)
    if crops.limit and crops.limit < len(samples):
        samples = [samples[i * len(samples) // crops.limit] for i in range(crops.limit)]
    _cut(folder / "photos.npy", samples, spec)
    np.save(folder / "truth.npy", np.array([s.angles for s in samples], np.float64))
    return (
        f"{network.spec.name} from {Path(network.source).name}, {spec.size} px; {crops.count} "
        f"calibration crops of {source.name} (seed {crops.seed}); {len(samples)} photos of "
        f"{crops.photos.name}; angles in degrees."
    )


def _labelled(crops: Crops) -> Dataset:
    if crops.photos.is_dir() and any(crops.photos.glob("image*.mat")):
        return read_aflw2000(crops.photos, boxes=crops.boxes)
    data = read_faces(crops.photos)
    if not data.labelled:
        raise UsageError(f"{crops.photos.name}: no labels to measure the error with")
    return data


def _cut(path: Path, samples: Sequence[Sample], spec: Preprocessing) -> None:
    np.save(path, np.stack([crop_face(s.load(), s.box, spec) for s in samples]))
