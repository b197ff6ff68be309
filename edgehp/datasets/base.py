"""What every data set gives: samples, what was skipped, and the protocol they were chosen by."""

from __future__ import annotations

import hashlib
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from edgehp.crop import Box
from edgehp.datasets.stores import Photo
from edgehp.errors import DataError
from edgehp.images import Image, decode_photo
from edgehp.pose import matrix_from_euler

Array = npt.NDArray[np.float64]
S = TypeVar("S")
R = TypeVar("R")
logger = logging.getLogger(__name__)

# Sheka & Samun (arXiv 2108.09183) and Hopenet leave out a photo with any |angle| above 99 degrees.
MAX_ANGLE = 99.0
# Half a turn: the median of labels in radians cannot be beyond it, that of labels in degrees is.
_MOST_IN_RADIANS_DEGREES = 180.0


@dataclass(frozen=True, eq=False)
class Sample:
    """One face in one photo.

    Attributes:
        name: stable identifier within the data set, e.g. ``"01/frame_00004_rgb.png"``.
        source: where the encoded photo is.
        box: the face in pixels of the photo, None where the whole photo is the face.
        matrix: rotation [3, 3], float64, canonical form of `edgehp.pose`; None without label.
        angles: (pitch, yaw, roll) [3], float64, degrees, convention ``"aflw2000"``, as published:
            |yaw| may exceed 90, where angles computed from `matrix` would be another triple; None
            without label.
        size: (width, height) of the photo in pixels as the data set's list says, None if it does
            not; `load` checks it.
        upright: turn the photo as its EXIF orientation says: only where nothing refers to the
            pixels as stored.
        bits: significant bits of 16-bit samples; None: see `edgehp.images.to_8_bits`.
    """

    name: str
    source: Photo = field(repr=False)
    box: Box | None = None
    matrix: Array | None = field(default=None, repr=False)
    angles: Array | None = None
    size: tuple[int, int] | None = None
    upright: bool = False
    bits: int | None = None

    def load(self) -> Image:
        """Read and decode the photo.

        Returns:
            uint8 [H, W, 3], RGB.

        Raises:
            DataError: missing, truncated, damaged, or not of the size the list says.
        """
        data, where = self.source.read(), self.source.where
        photo = decode_photo(data, where, upright=self.upright, bits=self.bits)
        found = photo.shape[1], photo.shape[0]
        if self.size is not None and self.size != found:
            raise DataError(
                f"{self.source.where}: the photo has {found[0]}x{found[1]} pixels, its list says "
                f"{self.size[0]}x{self.size[1]}: the box would be wrong"
            )
        return photo


@dataclass(frozen=True)
class Skip:
    """A sample that was left out because something is wrong with it."""

    name: str
    reason: str


class Skips:
    """What to do with bad samples: raise (the default), or count, list and log them."""

    def __init__(self, skip_bad: bool = False) -> None:
        """Raise on the first bad sample, or collect them where `skip_bad`."""
        self.skip_bad = skip_bad
        self.found: list[Skip] = []

    def add(self, name: str, error: DataError) -> None:
        """Record that `name` is skipped because of `error`, or raise it."""
        if not self.skip_bad:
            raise error
        logger.warning("skipped %s: %s", name, error)
        self.found.append(Skip(name, str(error)))

    @contextmanager
    def guard(self, name: str) -> Iterator[None]:
        """Treat a `DataError` inside the block as a bad sample called `name`."""
        try:
            yield
        except DataError as e:
            self.add(name, e)


@dataclass(frozen=True)
class Dataset:
    """Samples in a fixed order.

    Attributes:
        name: which data set, e.g. ``"aflw2000"``.
        samples: the samples.
        skipped: what was left out because it was missing or damaged (only where asked for).
        protocol: how the samples were chosen, for reports and manifests: ``dataset``, ``boxes``
            (their source), ``filter``, ``convention``, ``frames``, ``skipped``, ``sha256`` (of
            names, boxes and angles in order), and what the data set adds. JSON values only.
    """

    name: str
    samples: Sequence[Sample] = field(repr=False)
    skipped: Sequence[Skip] = ()
    protocol: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.samples)

    @property
    def labelled(self) -> bool:
        """Whether every sample has a label."""
        return all(s.matrix is not None for s in self.samples)

    def with_depth(self, bits: int | None) -> Dataset:
        """The same data set with what the user says of the depth of its 16-bit photos.

        Args:
            bits: significant bits, 8 to 16; None changes nothing.
        """
        if bits is None:
            return self
        samples = tuple(replace(s, bits=bits) for s in self.samples)
        return replace(self, samples=samples, protocol={**self.protocol, "photo_depth": bits})


def build_dataset(
    name: str,
    samples: Sequence[Sample],
    skips: Skips | Sequence[Skip] = (),
    *,
    boxes: str,
    angle_filter: str | None = None,
    convention: str | None = None,
    **more: Any,
) -> Dataset:
    """A `Dataset` with its protocol.

    Args:
        name: the data set's name.
        samples: its samples, names unique.
        skips: what was skipped.
        boxes: where the boxes come from, in words.
        angle_filter: which samples were left out by their angles, in words.
        convention: name of the convention the labels were read in (`edgehp.pose.CONVENTIONS`).
        more: further JSON values for the protocol.

    Raises:
        DataError: no samples are left, or two have the same name.
    """
    skipped = tuple(skips.found if isinstance(skips, Skips) else skips)
    if not samples:
        why = f"; {len(skipped)} were skipped, the first: {skipped[0].reason}" if skipped else ""
        if filtered := more.get("filtered"):
            why += (
                f"; {len(filtered)} were left out by the filter ({angle_filter}): are the labels "
                "in the unit that is expected, such as radians in Pose_Para of a .mat file?"
            )
        raise DataError(f"{name}: no samples are left{why}")
    seen: set[str] = set()
    for sample in samples:
        if sample.name in seen:
            raise DataError(f"{name}: two samples are called {sample.name!r}, expected one")
        seen.add(sample.name)
    protocol = {
        "dataset": name,
        "boxes": boxes,
        "filter": angle_filter,
        "convention": convention,
        "frames": len(samples),
        "skipped": len(skipped),
        "sha256": digest_of(samples),
        **more,
    }
    return Dataset(name, tuple(samples), skipped, protocol)


def join_datasets(name: str, parts: Sequence[Dataset]) -> Dataset:
    """One data set after the other; the parts' protocols are kept under ``parts``.

    Raises:
        DataError: no samples, or two of the same name.
    """
    return build_dataset(
        name,
        [s for part in parts for s in part.samples],
        [s for part in parts for s in part.skipped],
        boxes=_common(parts, "boxes") or "none",
        angle_filter=_common(parts, "filter"),
        convention=_common(parts, "convention"),
        parts=[dict(p.protocol) for p in parts],
    )


def _common(parts: Sequence[Dataset], key: str) -> str | None:
    values = sorted({str(v) for p in parts if (v := p.protocol.get(key)) is not None})
    return "; ".join(values) or None


class PoseSamples:
    """The samples of a data set as its reader finds them; those beyond `MAX_ANGLE` are left out.

    Attributes:
        name: of the data set, and of the convention of its labels.
        samples: so far.
        skips: what to do with bad ones.
    """

    def __init__(self, name: str, skip_bad: bool) -> None:
        """Raise on the first bad sample, or list them where `skip_bad`."""
        self.name, self.skips = name, Skips(skip_bad)
        self.samples: list[Sample] = []
        self._filtered: list[str] = []
        self._largest: list[float] = []

    def keeps(self, name: str, angles: Array) -> bool:
        """Whether the filter lets these angles pass; else `name` is listed as left out."""
        self._largest.append(float(np.abs(angles).max()))
        if self._largest[-1] > MAX_ANGLE:
            self._filtered.append(name)
        return self._largest[-1] <= MAX_ANGLE

    def refuse_degrees(self, where: str, what: str) -> None:
        """Refuse labels of which half cannot be angles of a head in radians.

        Not any one: a few files of AFLW2000-3D itself are beyond two turns. Half, and not all:
        small angles in degrees would pass for radians and the filter, and be validated on.

        Args:
            where: the labels, for the message.
            what: the name of the angles there.

        Raises:
            DataError: the median is beyond half a turn.
        """
        largest = self._largest
        if not largest or (median := float(np.median(largest))) <= _MOST_IN_RADIANS_DEGREES:
            return
        raise DataError(
            f"{where}: half of the {len(largest)} hold an angle beyond {median:.0f} degrees "
            f"({len(self._filtered)} are left out by the angle filter): {what} must be pitch, yaw, "
            f"roll in radians, and {np.radians(median):.3g} looks like degrees; multiply them by "
            "pi/180"
        )

    def dataset(self, boxes: str, **more: Any) -> Dataset:
        """The data set; arguments and errors as of `build_dataset`."""
        return build_dataset(
            self.name,
            self.samples,
            self.skips,
            boxes=boxes,
            angle_filter=f"all |angles| <= {MAX_ANGLE:g} degrees",
            convention=self.name,
            filtered=self._filtered,
            **more,
        )


def labels_from_angles(angles: npt.ArrayLike, what: str) -> tuple[Array, Array]:
    """(matrix [3, 3], angles [3]) from (pitch, yaw, roll), degrees, convention ``"aflw2000"``.

    Any size is taken, since AFLW2000-3D itself has some beyond +-700 degrees. Both results are
    read-only: samples are shared between threads.

    Raises:
        DataError: an angle is not finite.
    """
    a = np.array(angles, np.float64)
    if a.shape != (3,) or not np.all(np.isfinite(a)):
        raise DataError(f"{what}: expected 3 finite angles in degrees, found {a.tolist()}")
    matrix = matrix_from_euler(a)
    matrix.flags.writeable = False
    a.flags.writeable = False
    return matrix, a


def spaced(count: int, most: int) -> npt.NDArray[np.intp]:
    """At most `most` of the numbers 0 to `count` - 1, evenly spaced, the ends among them."""
    return np.linspace(0, count - 1, min(count, most)).astype(np.intp)


def digest_of(samples: Iterable[Sample]) -> str:
    """SHA-256 of names, boxes and angles; four decimals, so that every machine agrees."""
    digest = hashlib.sha256()
    for s in samples:
        box = () if s.box is None else (s.box.x_min, s.box.y_min, s.box.x_max, s.box.y_max)
        angles = () if s.angles is None else s.angles.tolist()
        digest.update(f"{s.name}\t{_fixed(box)};{_fixed(angles)}\n".encode())
    return digest.hexdigest()


def _fixed(numbers: Iterable[float]) -> str:
    # Adding 0.0 turns -0.0, which would print its sign, into 0.0.
    return ",".join(f"{round(v, 4) + 0.0:.4f}" for v in numbers)


def prefetch(
    samples: Iterable[S],
    work: Callable[[S], R],
    *,
    workers: int = 2,
    ahead: int = 0,
    on_bad: Callable[[S, DataError], None] | None = None,
) -> Iterator[R]:
    """Yield ``work(sample)`` for every sample, in order, computed ahead in threads.

    Threads are enough: OpenCV's decoding and resizing release the interpreter lock. Abandoning the
    iterator (``break``, ``close``) stops the threads after the items they are working on.

    Args:
        samples: what to work on; taken one at a time, it may be endless.
        work: called in a worker thread, e.g. loads a `Sample` and crops its face.
        workers: number of threads.
        ahead: how many results may wait or be in work, a bound on memory; 4 a worker where 0.
        on_bad: called, in order, in the consumer's thread, with a sample whose work raised a
            `DataError`; the sample is then left out. Without it the error is raised. To count and
            list them: ``on_bad=lambda sample, error: skips.add(sample.name, error)``.

    Yields:
        The results, in the order of the samples.

    Raises:
        Exception: what `work` raised, when the consumer reaches that item and not before.
    """
    waiting: deque[tuple[S, Future[R]]] = deque()

    def results(sample: S, future: Future[R]) -> Iterator[R]:
        try:
            result = future.result()
        except DataError as e:
            if on_bad is None:
                raise
            on_bad(sample, e)
            return
        yield result

    pool = ThreadPoolExecutor(workers, thread_name_prefix="edgehp-prefetch")
    try:
        for sample in samples:
            waiting.append((sample, pool.submit(work, sample)))
            if len(waiting) >= (ahead or 4 * workers):
                yield from results(*waiting.popleft())
        while waiting:
            yield from results(*waiting.popleft())
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
