"""Labels from an ensemble of teachers over a grid of box offsets, written as they come.

A label file is a folder with ``labels.csv`` (one line a photo, appended and flushed in chunks) and
``ensemble.json`` (who labelled, with the SHA-256 of every network file). A run that was killed
goes on where it stopped; a run with another ensemble is refused. Large sets split over processes
or machines with shards: shard i of n labels every n-th photo into a folder of its own.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgehp import pose
from edgehp.datasets.base import Sample, Skips
from edgehp.datasets.prefetch import prefetch
from edgehp.errors import DataError, UsageError
from edgehp.files import plain, sha256_file, write_whole
from edgehp.training.teachers import Teacher

__all__ = ["Label", "ensemble_label", "label_samples", "read_labels", "shard"]

Array = npt.NDArray[np.float64]
LABELS, ENSEMBLE = "labels.csv", "ensemble.json"
_MATRIX = [f"r{i}{j}" for i in range(3) for j in range(3)]
_COMMON = ["image", "pitch", "yaw", "roll", *_MATRIX, "spread"]
_PER_TEACHER = ("pitch", "yaw", "roll", "spread")
# Lines between two flushes to disk: a killed run loses at most this many photos.
_CHUNK = 64


@dataclass(frozen=True, eq=False)
class Label:
    """What the teachers say about one photo.

    Attributes:
        name: of the sample.
        matrix: mean rotation [3, 3], canonical.
        spread: root mean square geodesic distance, degrees, of all views to the mean.
        teachers: per teacher (pitch, yaw, roll, spread) [T, 4], degrees: its own mean over its
            grid and its own spread.
    """

    name: str
    matrix: Array
    spread: float
    teachers: Array

    @property
    def angles(self) -> Array:
        """(pitch, yaw, roll) [3] in degrees, convention ``"aflw2000"``."""
        return pose.euler_from_matrix(self.matrix)


def shard(samples: Sequence[Sample], index: int, count: int) -> Sequence[Sample]:
    """Every `count`-th sample beginning with `index` (from 0).

    Raises:
        UsageError: not 0 <= index < count.
    """
    if count < 1 or not 0 <= index < count:
        raise UsageError(f"shard {index} of {count}: the first number must be 0 to {count - 1}")
    return samples[index::count]


def ensemble_label(sample: Sample, teachers: Sequence[Teacher]) -> Label:
    """Ask every teacher over its grid and average.

    Each teacher's mean over its own views enters the ensemble's mean with the teacher's weight,
    so a teacher with a larger grid does not count for more.

    Raises:
        DataError: the photo is damaged or the box is outside of it.
    """
    photo = sample.load()
    views = [t.rotations(photo, sample.box) for t in teachers]
    means = [pose.mean_rotation(v) for v in views]
    mean = pose.mean_rotation(np.stack(means), [t.spec.weight for t in teachers])
    weights = [
        np.full(len(v), t.spec.weight / len(v)) for v, t in zip(views, teachers, strict=True)
    ]
    spread = pose.rotation_spread(np.concatenate(views), mean, np.concatenate(weights))
    rows = [
        [*pose.euler_from_matrix(m), float(pose.rotation_spread(v, m))]
        for v, m in zip(views, means, strict=True)
    ]
    return Label(sample.name, mean, float(spread), np.array(rows))


def label_samples(
    samples: Sequence[Sample],
    teachers: Sequence[Teacher],
    out: Path,
    *,
    threads: int = 2,
    skips: Skips | None = None,
) -> Iterator[int]:
    """Label what is not labelled yet in the folder `out`, yielding the number done so far.

    Args:
        samples: photos with boxes.
        teachers: the ensemble; names must differ.
        out: folder of the labels, made if needed.
        threads: photos worked on at a time (the networks release Python's lock).
        skips: what to do with damaged photos; raise when omitted.

    Yields:
        The count of labelled samples, first the number found from an earlier run.

    Raises:
        DataError: `out` holds labels of another ensemble, or a photo is damaged.
    """
    skips = skips or Skips()
    names = [t.spec.name for t in teachers]
    if not names or len(set(names)) != len(names):
        raise UsageError(f"teachers need different names, found {names}")
    out.mkdir(parents=True, exist_ok=True)
    _claim(out / ENSEMBLE, _describe(teachers))
    done = _resume(out / LABELS, names)
    todo = [s for s in samples if s.name not in done]
    count = len(done)
    yield count

    def work(sample: Sample) -> Label | DataError:
        try:
            return ensemble_label(sample, teachers)
        except DataError as e:
            return e

    with (out / LABELS).open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        # One tuple at a time: prefetch keeps the order, so a resumed file reads like a whole one.
        for sample, result in zip(todo, prefetch(todo, work, workers=threads), strict=True):
            if isinstance(result, DataError):
                skips.add(sample.name, result)
                continue
            writer.writerow(_row(result))
            count += 1
            if count % _CHUNK == 0:
                _flush(file)
                yield count
        _flush(file)
    yield count


def read_labels(folders: Iterable[Path]) -> dict[str, Label]:
    """Labels by sample name of one or several label folders (shards).

    Raises:
        DataError: a folder holds no labels, or a line is damaged.
    """
    labels: dict[str, Label] = {}
    for folder in folders:
        path = folder / LABELS
        if not path.is_file():
            raise DataError(f"{folder}: no {LABELS}; expected a folder written by 'edgehp label'")
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.reader(file)
            header = next(reader, [])
            if header[: len(_COMMON)] != _COMMON:
                raise DataError(f"{path}: unknown columns {header[:5]}; not a label file")
            for number, row in enumerate(reader, 2):
                label = _parse(row, len(header))
                if label is None:
                    raise DataError(f"{path}: line {number} is damaged; run 'edgehp label' again")
                labels[label.name] = label
    return labels


def _header(names: Sequence[str]) -> list[str]:
    return [*_COMMON, *(f"{n}_{part}" for n in names for part in _PER_TEACHER)]


def _row(label: Label) -> list[str]:
    numbers = [*label.angles, *label.matrix.ravel(), label.spread, *label.teachers.ravel()]
    return [label.name, *(f"{v:.6f}" for v in numbers)]


def _parse(row: Sequence[str], columns: int) -> Label | None:
    if len(row) != columns:
        return None
    try:
        values = np.array([float(v) for v in row[1:]])
    except ValueError:
        return None
    if not np.all(np.isfinite(values)):
        return None
    matrix = pose.project_to_rotation(values[3:12].reshape(3, 3))
    return Label(row[0], matrix, float(values[12]), values[13:].reshape(-1, len(_PER_TEACHER)))


def _resume(path: Path, names: Sequence[str]) -> set[str]:
    """Names already labelled; a last line cut off by a kill is removed from the file."""
    header = _header(names)
    if not path.is_file() or path.stat().st_size == 0:
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(header)
            _flush(file)
        return set()
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    rows = list(csv.reader(io.StringIO(whole.decode("utf-8"), newline="")))
    if not rows or rows[0] != header:
        raise DataError(f"{path}: other columns than this ensemble writes; use a new folder")
    for number, row in enumerate(rows[1:], 2):
        if _parse(row, len(header)) is None:
            raise DataError(f"{path}: line {number} is damaged; remove it or use a new folder")
    if len(whole) < len(data):
        with path.open("r+b") as raw:
            raw.truncate(len(whole))
    return {row[0] for row in rows[1:]}


def _describe(teachers: Sequence[Teacher]) -> list[dict[str, Any]]:
    out = []
    for t in teachers:
        s = t.spec
        out.append(
            {
                "name": s.name,
                "files": {f.name: sha256_file(f) for f in s.files},
                "weight": s.weight,
                "preprocessing": s.preprocessing.to_dict(),
                "dark": None if s.dark is None else plain(s.dark),
                "grid": plain(s.grid),
            }
        )
    return out


def _claim(path: Path, ensemble: list[dict[str, Any]]) -> None:
    text = json.dumps(ensemble, indent=1, sort_keys=True)
    if path.is_file():
        if path.read_text(encoding="utf-8") != text:
            raise DataError(
                f"{path.parent} holds labels of another ensemble (see {path.name}); use a new "
                "folder, or remove this one"
            )
        return
    write_whole(path, text)


def _flush(file: io.TextIOWrapper) -> None:
    file.flush()
    os.fsync(file.fileno())
