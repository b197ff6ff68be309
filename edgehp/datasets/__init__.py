"""Data sets of head poses: AFLW2000-3D, BIWI, AFLW, 300W-LP, folders and zips of faces.

Each reader gives a `Dataset`: `Sample`s with box, rotation and a photo that is decoded when it is
asked for, what was skipped, and the protocol by which the samples were chosen.
"""

from __future__ import annotations

from edgehp.datasets.base import Dataset, Sample, Skip, Skips, prefetch
from edgehp.datasets.faces import read_faces
from edgehp.datasets.registry import DATASETS, open_dataset

__all__ = [
    "DATASETS",
    "Dataset",
    "Sample",
    "Skip",
    "Skips",
    "open_dataset",
    "prefetch",
    "read_faces",
]
