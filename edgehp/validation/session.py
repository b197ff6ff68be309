"""A whole validation: networks opened, frames read, measured here, in processes or on a cluster."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from edgehp.artifact.check import read_manifest
from edgehp.artifact.manifest import MANIFEST_NAME
from edgehp.artifact.open import (
    OpenedNetwork,
    open_artifact,
    open_emulation,
    open_network,
    open_reference,
)
from edgehp.cluster import ShardsLostError, Workers, run_shards
from edgehp.crop import Box
from edgehp.datasets import open_dataset
from edgehp.datasets.base import Dataset, Sample
from edgehp.errors import EdgehpError, EnvironmentalError, UsageError
from edgehp.files import resource_dir
from edgehp.pipeline.crops import SHIPPED_CALIBRATION
from edgehp.progress import step
from edgehp.validation.appearance import ADVICE, AppearanceCheck, Values
from edgehp.validation.run import (
    BoxSource,
    Detector,
    Image,
    Settings,
    ValidationReport,
    validate,
)

DETECT = "detect"
SHIPPED = "rendered-validation.zip"
# An artifact (None: a float network alone) and the name of a data set (None: the shipped heads).
Item = tuple[Path | None, str | None]


@dataclass(frozen=True, kw_only=True)
class Request(Settings):
    """What the command line asks to be measured, checked for options that exclude each other.

    Attributes:
        artifact: its folder; None where a float network is measured alone.
        dataset: its name; None for the rendered heads that edgehp ships.
        data_root: where the data set is.
        several: whether `data_root` holds each of several data sets under its name.
        boxes: a list, ``"landmarks"``, ``"detect"``, or None for the published list.
        split: ``"train"`` or ``"test"`` of the box list.
        rgb_cal: BIWI: whether labels are in the color camera's axes.
        network: a float network, bundled or a file, in place of an artifact.
        reference: FP32 network; None for the one that the artifact names.
        threads: of the processor; None for the runtime's choice.
        photo_depth: bits of photos that have 16 a sample.
        emulate: whether the artifact's graph runs on this processor in place of its engine.
    """

    artifact: Path | None = None
    dataset: str | None = None
    data_root: Path | None = None
    several: bool = False
    boxes: str | None = None
    split: str | None = None
    rgb_cal: bool = False
    network: str | None = None
    reference: str | None = None
    threads: int | None = None
    photo_depth: int | None = None
    emulate: bool = False

    def __post_init__(self) -> None:
        if self.several and (self.split or self.rgb_cal or self.boxes not in (None, DETECT)):
            raise UsageError(
                "--split, --rgb-cal and lists of --boxes are for one --dataset at a time"
            )
        if self.network is None:
            return
        if self.emulate:
            raise UsageError("--emulate runs an artifact's graph: a float network needs none")
        if self.reference is not None:
            raise UsageError("--network is validated by itself: --reference belongs to an artifact")

    @property
    def shipped_heads(self) -> bool:
        """Whether the frames are the rendered heads that edgehp ships."""
        return self.dataset in (None, "rendered") and self.data_root is None


@dataclass(frozen=True)
class _Work:
    """Validations as work for `edgehp.cluster`."""

    request: Request
    files: Mapping[str, Path]

    def open(self, folder: Path | None) -> Callable[[Item], ValidationReport]:
        def place(path: Path) -> Path:
            return path if folder is None else folder / _name(path)

        def given(text: str | None) -> str | None:
            """A file travels; anything else is a name."""
            travels = text is not None and _name(Path(text)) in self.files
            return str(place(Path(str(text)))) if travels else text

        def do(item: Item) -> ValidationReport:
            (artifact, dataset), root = item, self.request.data_root
            if root is not None and dataset is not None and self.request.several:
                root = root / dataset
            return _validated(
                replace(
                    self.request,
                    artifact=None if artifact is None else place(artifact),
                    dataset=dataset,
                    data_root=root,
                    network=given(self.request.network),
                    reference=given(self.request.reference),
                    boxes=given(self.request.boxes),
                )
            )

        return do


def _name(path: Path) -> str:
    """The name of a file or an artifact among those that travel."""
    return path.resolve().as_posix().lstrip("/")


def _files(artifacts: Sequence[Path], request: Request) -> dict[str, Path]:
    """All files that the work needs, by `_name`; what cannot be read fails as its own row."""
    found = [Path(t) for t in (request.network, request.reference, request.boxes) if t]
    for artifact in artifacts:
        found.append(artifact / MANIFEST_NAME)
        try:
            found += [artifact / f.path for f in read_manifest(artifact).files]
        except EdgehpError:
            continue
    return {_name(path): path for path in found if path.is_file()}


def validations(
    request: Request, items: Sequence[Item], workers: Workers
) -> Iterator[tuple[int, ValidationReport | EdgehpError]]:
    """Validate every artifact on its data set.

    Args:
        request: what all have in common.
        items: what takes the place of its artifact and data set.
        workers: where it is done; to a cluster the artifacts travel.

    Yields:
        The index of an item, and its report or why there is none, in the order in which they are
        done.

    Raises:
        EnvironmentalError: there are no workers, or the cluster went away.
    """
    work = _Work(request, _files([a for a, _ in items if a is not None], request))
    try:
        for shard in run_shards(work, items, workers, size=1):
            yield from shard
    except ShardsLostError as e:
        for i in (i for lost in e.shards for i in lost):
            yield i, EnvironmentalError("it killed its worker twice")


def _validated(request: Request) -> ValidationReport:
    """Do what was asked for.

    Raises:
        EdgehpError: as of the parts.
    """
    name = request.network or ("newest" if request.artifact is None else request.artifact.name)
    with step(f"{name}, {request.dataset or 'shipped heads'}"), ExitStack() as stack:
        with step("open"):
            data = _open_data(request).with_depth(request.photo_depth)
            base, tested = _open_networks(request, stack)
        detector = None
        if request.boxes == DETECT:
            detector = Detector(_nearest_face(), "CenterFace, mapped to the network's boxes")
        return validate(
            base,
            tested,
            data,
            request,
            detector=detector,
            calibration=calibration_check(tested, request.shipped_heads),
        )


def _open_networks(
    request: Request, stack: ExitStack
) -> tuple[OpenedNetwork, OpenedNetwork | None]:
    """The FP32 network and the artifact, which `stack` closes; None where it is measured alone."""
    threads, batch = request.threads, request.batch
    if request.network is not None:
        return stack.enter_context(
            open_network(request.network, threads=threads, batch=batch)
        ), None
    opened = open_emulation if request.emulate else open_artifact
    tested = stack.enter_context(opened(request.artifact, threads=threads, batch=batch))
    reference = open_reference(tested, request.reference, threads=threads, batch=batch)
    return stack.enter_context(reference), tested


def _open_data(request: Request) -> Dataset:
    if request.dataset is None and request.data_root is not None:
        raise UsageError(
            f"--data-root {request.data_root}: say which data set it is with --dataset\n"
            "hint: --dataset faces takes photos of your own, with boxes.csv and labels in it"
        )
    options: dict[str, Any] = {
        "boxes": None if request.boxes == DETECT else request.boxes,
        "split": request.split,
        "rgb_cal": request.rgb_cal or None,
    }
    if not request.shipped_heads:
        return open_dataset(
            str(request.dataset), request.data_root, skip_bad=request.skip_bad, **options
        )
    if given := [k for k, v in options.items() if v is not None]:
        raise UsageError(f"the shipped rendered heads have no option {', '.join(given)}")
    shipped = resource_dir("calibration") / SHIPPED
    if not shipped.is_file():
        raise EnvironmentalError(
            f"the rendered heads that edgehp ships were not found ({shipped})\n"
            "hint: install edgehp again, or name a data set with --dataset and --data-root"
        )
    return open_dataset("rendered", shipped, skip_bad=request.skip_bad)


def _nearest_face() -> BoxSource:
    """Boxes from the face detector: of the face nearest to the published box."""
    from edgehp.runtime.detection import network_box, open_detector, overlap

    detector = open_detector()
    lock = threading.Lock()

    def find(photo: Image, sample: Sample) -> Box | None:
        # One network, and crops are prepared in several threads.
        with lock:
            faces = [network_box(f.box) for f in detector.detect(photo)]
        listed = sample.box
        if listed is None:
            return faces[0] if faces else None
        # A face elsewhere in the photo is not the one that the label is of.
        near = [(overlap(f, listed), f) for f in faces]
        best = max(near, key=lambda pair: pair[0], default=(0.0, None))
        return best[1] if best[0] >= 0.2 else None

    return find


def calibration_check(
    tested: OpenedNetwork | None, shipped_heads: bool
) -> Callable[[Values], AppearanceCheck] | None:
    """What frames are held against; None where the artifact does not say how its crops look.

    Args:
        tested: what is validated.
        shipped_heads: whether it is validated on the rendered heads that edgehp ships.
    """
    artifact = None if tested is None else tested.artifact
    record = None if artifact is None else artifact.manifest.calibration
    if record is None or record.appearance is None:
        return None
    advice = ADVICE
    if shipped_heads and record.source != SHIPPED_CALIBRATION:
        # Calibrated on the user's crops, which are right already: it is the frames that are others.
        advice = (
            "these are the rendered heads that edgehp ships; validate on photos of the camera that "
            "will be used, with --dataset and --data-root"
        )
    return partial(AppearanceCheck.of, record.appearance, advice=advice)
