"""Labels from an ensemble of teachers over a grid of box offsets, written as they come.

A teacher is any ONNX pose network with a description (`edgehp.networks.description`).

A label file is a folder with ``labels.csv`` (one line a photo, in the order of the photos) and
``ensemble.json`` (who labelled, with the SHA-256 of every network file, and how many bits of 16-bit
photos were used). Lines are flushed to disk shard by shard, so a run that was killed goes on where
it stopped; one with another ensemble or depth is refused. The labels are the same wherever they
were computed: in one process, many, or a cluster.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgehp import pose
from edgehp._installed import install_extra
from edgehp.cluster import ShardsLostError, Workers, run_shards
from edgehp.crop import Box, crop_face
from edgehp.datasets.base import Sample, Skips
from edgehp.datasets.stores import photo_for
from edgehp.errors import DataError, EdgehpError, EnvironmentalError, UsageError
from edgehp.files import decode_text, plain, read_bytes, sha256_file, write_whole
from edgehp.networks.described import deployed_graph
from edgehp.networks.description import Description
from edgehp.networks.graph import INPUT, OUTPUTS, graph_bytes, load_graph

Array = npt.NDArray[np.float64]
LABELS, ENSEMBLE = "labels.csv", "ensemble.json"
_MATRIX = [f"r{i}{j}" for i in range(3) for j in range(3)]
_COMMON = ["image", "pitch", "yaw", "roll", *_MATRIX, "spread"]
_PER_TEACHER = ("pitch", "yaw", "roll", "spread")
# Photos a shard: what a killed run or worker loses at most.
_SHARD = 64
# A line has some 300 bytes: millions of photos.
_LARGEST = 1 << 32


class Teacher:
    """A teacher ready to label photos.

    Args:
        spec: what it is.
        threads: intra-op threads of each session.

    Raises:
        EnvironmentalError: onnxruntime is missing.
        CheckpointError: a file is no ONNX network, or has other inputs or outputs than described.
    """

    def __init__(self, spec: Description, threads: int = 1) -> None:
        try:
            import onnxruntime as ort
        except ImportError as e:
            raise EnvironmentalError(
                f"labelling needs onnxruntime: {install_extra('train')}"
            ) from e
        self.spec = spec
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # A quantized teacher is computed as written, so that labels are those of every machine:
        # integer kernels saturate on processors without VNNI (opentrack's lost 0.1 degrees).
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        self._sessions = []
        for file in spec.paths:
            model = (
                load_graph(file)[0]
                if spec.input.deployed
                else deployed_graph(spec.with_files([file]), simple=False)[0]
            )
            self._sessions.append(
                ort.InferenceSession(
                    graph_bytes(model), options, providers=["CPUExecutionProvider"]
                )
            )

    def views(self, photo: npt.NDArray[np.uint8], box: Box | None) -> list[npt.NDArray[np.uint8]]:
        """The crops of all grid positions, uint8 [S, S, 3] RGB; mirrored ones last."""
        if box is None:
            box = Box(0, 0, photo.shape[1], photo.shape[0])
        crops = [
            crop_face(photo, box.moved(dx, dy), self.spec.input.preprocessing)
            for dx, dy in self.spec.grid.offsets
        ]
        if self.spec.grid.flip:
            crops += [np.ascontiguousarray(c[:, ::-1]) for c in crops]
        return crops

    def rotations(self, photo: npt.NDArray[np.uint8], box: Box | None) -> Array:
        """Rotations [n, 3, 3], canonical, of all grid positions and network files.

        Mirrored views are mirrored back, so all of them estimate the same pose.
        """
        crops = self.views(photo, box)
        batch = np.stack(crops)
        out = []
        for session in self._sessions:
            (angles,) = session.run([OUTPUTS[0]], {INPUT: batch})
            if not np.isfinite(angles).all():
                raise DataError(f"{self.spec.name}: a crop gives angles that are not finite")
            matrices = pose.matrix_from_euler(angles)
            if self.spec.grid.flip:
                half = len(matrices) // 2
                matrices = np.concatenate([matrices[:half], pose.flip_matrix(matrices[half:])])
            out.append(matrices)
        return np.concatenate(out)


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


@dataclass(frozen=True)
class Ensemble:
    """The teachers as work for `edgehp.cluster`: a sample in, its `Label` out."""

    teachers: tuple[Description, ...]

    @property
    def files(self) -> Mapping[str, Path]:
        """The networks."""
        return {f"{i}/{f.name}": f for i, t in enumerate(self.teachers) for f in t.paths}

    def open(self, folder: Path | None) -> Callable[[Sample], Label]:
        """Load the networks, from `folder` where they were sent there.

        Raises:
            EnvironmentalError, DataError: as `Teacher`.
        """
        ready = []
        for i, spec in enumerate(self.teachers):
            if folder is not None:
                spec = spec.with_files([folder / str(i) / f.name for f in spec.paths])
            ready.append(Teacher(spec))
        return lambda sample: ensemble_label(sample, ready)


def label_samples(
    samples: Sequence[Sample],
    teachers: Sequence[Description],
    out: Path,
    *,
    threads: int = 2,
    skips: Skips | None = None,
    workers: Workers | None = None,
    places: tuple[Path, Path] | None = None,
) -> Iterator[int]:
    """Label what is not labelled yet in the folder `out`, yielding the number done so far.

    Args:
        samples: photos with boxes.
        teachers: the ensemble; names must differ.
        out: folder of the labels, made if needed.
        threads: photos worked on at a time by each worker (the networks release Python's lock).
        skips: what to do with damaged photos; raise when omitted.
        workers: where; this process when omitted.
        places: on a cluster, a folder or zip here and the same on the workers; the photos are sent
            when omitted.

    Yields:
        The count of labelled samples, first the number found from an earlier run.

    Raises:
        DataError: `out` holds labels of another ensemble or depth, or a photo is damaged.
        EnvironmentalError: the cluster cannot be used, or some photos kill whatever labels them;
            all others are labelled then.
    """
    skips, workers = skips or Skips(), workers or Workers()
    names = [t.name for t in teachers]
    if not names or len(set(names)) != len(names):
        raise UsageError(f"teachers need different names, found {names}")
    out.mkdir(parents=True, exist_ok=True)
    depths = sorted({s.bits for s in samples if s.bits is not None})
    _claim(out / ENSEMBLE, _describe(teachers, depths))
    done = _resume(out / LABELS, names)
    todo = [s for s in samples if s.name not in done]
    count = len(done)
    yield count
    here, there = places or (None, None)
    shards = run_shards(
        Ensemble(tuple(teachers)),
        todo,
        workers,
        size=_SHARD,
        threads=threads,
        send=(lambda s: replace(s, source=photo_for(s.source, here, there)))
        if workers.address is not None
        else None,
    )
    bad: dict[int, DataError] = {}
    with (out / LABELS).open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        try:
            for shard in shards:
                for i, result in shard:
                    if isinstance(result, DataError) and skips.skip_bad:
                        bad[i] = result
                    elif isinstance(result, EdgehpError):
                        raise result
                    else:
                        writer.writerow(_row(result))
                        count += 1
                _flush(file)
                yield count
        except ShardsLostError as e:
            photos = "; ".join(
                f"{todo[s[0]].name} to {todo[s[-1]].name}" if len(s) > 1 else todo[s[0]].name
                for s in e.shards
            )
            raise EnvironmentalError(
                f"{sum(map(len, e.shards))} photos are not labelled: whatever works on them is "
                f"killed ({photos})\nhint: the same command tries these alone, in smaller shards; "
                "look at the memory of the workers"
            ) from e
        finally:
            for i in sorted(bad):
                skips.add(todo[i].name, bad[i])
    _sort(out / LABELS, [s.name for s in samples])


def read_labels(folders: Iterable[Path]) -> dict[str, Label]:
    """Labels by sample name of one or several label folders (shards).

    Raises:
        DataError: a folder holds no labels, a line is damaged, or a photo is labelled twice.
    """
    labels: dict[str, Label] = {}
    for folder in folders:
        path = folder / LABELS
        if not path.is_file():
            raise DataError(f"{folder}: no {LABELS}; expected a folder written by 'edgehp label'")
        for number, label in _parsed(read_bytes(path, "labels", limit=_LARGEST), path):
            if label.name in labels:
                raise DataError(
                    f"{path}: line {number}: {label.name} is labelled twice\n"
                    "hint: give the folders of different photos, each once"
                )
            labels[label.name] = label
    return labels


def _header(names: Sequence[str]) -> list[str]:
    return [*_COMMON, *(f"{n}_{part}" for n in names for part in _PER_TEACHER)]


def _row(label: Label) -> list[str]:
    numbers = [*label.angles, *label.matrix.ravel(), label.spread, *label.teachers.ravel()]
    return [label.name, *(f"{v:.6f}" for v in numbers)]


def _parsed(
    data: bytes, path: Path, header: Sequence[str] | None = None
) -> Iterator[tuple[int, Label]]:
    """The labels of a file with their lines' numbers; its columns are `header`, where known."""
    try:
        table = csv.reader(io.StringIO(decode_text(data, str(path)), newline=""))
        found, *rows = list(table) or [[]]
    except (csv.Error, ValueError) as e:
        raise DataError(f"{path}: not valid CSV: {e}; run 'edgehp label' again") from e
    if header is not None and found != header:
        raise DataError(f"{path}: other columns than this ensemble writes; use a new folder")
    if found[: len(_COMMON)] != _COMMON:
        raise DataError(f"{path}: unknown columns {found[:5]}; not a label file")
    for number, row in enumerate(rows, 2):
        try:
            values = np.array([float(v) for v in row[1:]])
        except ValueError:
            values = np.array([np.nan])
        if len(row) != len(found) or not np.isfinite(values).all():
            raise DataError(f"{path}: line {number} is damaged; remove it or use a new folder")
        matrix = pose.project_to_rotation(values[3:12].reshape(3, 3))
        teachers = values[13:].reshape(-1, len(_PER_TEACHER))
        yield number, Label(row[0], matrix, float(values[12]), teachers)


def _resume(path: Path, names: Sequence[str]) -> set[str]:
    """Names already labelled; a last line cut off by a kill is removed from the file."""
    header = _header(names)
    if not path.is_file() or path.stat().st_size == 0:
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(header)
            _flush(file)
        return set()
    data = read_bytes(path, "labels", limit=_LARGEST)
    whole = data[: data.rfind(b"\n") + 1]
    done = {label.name for _, label in _parsed(whole, path, header)}
    if len(whole) < len(data):
        with path.open("r+b") as raw:
            raw.truncate(len(whole))
    return done


def _describe(teachers: Sequence[Description], depths: Sequence[int]) -> list[dict[str, Any]]:
    return [
        {
            "name": s.name,
            "files": {f.name: sha256_file(f) for f in s.paths},
            "weight": s.weight,
            "preprocessing": s.input.preprocessing.to_dict(),
            "dark": plain(s.input.dark),
            "grid": plain(s.grid),
            **({"photo_depth": depths} if depths else {}),
        }
        for s in teachers
    ]


def _claim(path: Path, ensemble: list[dict[str, Any]]) -> None:
    text = json.dumps(ensemble, indent=1, sort_keys=True)
    if path.is_file():
        if read_bytes(path, "a description of the ensemble") != text.encode():
            raise DataError(
                f"{path.parent} holds labels of another ensemble or --photo-depth (see "
                f"{path.name})\nhint: use a new folder, or remove this one"
            )
        return
    write_whole(path, text)


def _flush(file: io.TextIOWrapper) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sort(path: Path, names: Sequence[str]) -> None:
    """Put the lines into the order of the samples: shards end in any."""
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    order = {name: i for i, name in enumerate(names)}
    # Those of other photos, labelled into the same folder before, stay in front.
    wanted = sorted(rows, key=lambda row: order.get(row[0], -1))
    if wanted != rows:
        text = io.StringIO(newline="")
        csv.writer(text).writerows([header, *wanted])
        write_whole(path, text.getvalue())
