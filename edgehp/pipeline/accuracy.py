"""The accuracy gate of a build: FP32 and the artifact on the held-out crops, and their drop."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from edgehp.artifact.manifest import Accuracy, Golden, SubsetRecord
from edgehp.datasets.base import spaced
from edgehp.device import DeviceProbe
from edgehp.engines import PROCESSOR_ENGINES, open_engine, processor_engine
from edgehp.engines.base import Engine, Prediction
from edgehp.errors import AccuracyError, CompatibilityError, DataError, EnvironmentalError
from edgehp.pipeline.crops import CropSet
from edgehp.pipeline.plan import Plan
from edgehp.pose import angle_errors
from edgehp.progress import step
from edgehp.validation.appearance import CONDITIONS
from edgehp.validation.metrics import frame_errors, mean_or_none, yaw_bands
from edgehp.validation.statistics import mean_interval, require_drop

# Larger batches are no faster on a processor and hold more activations.
BATCH = 8
GOLDEN_COUNT = 8
# Another device rounds differently: kernels of one graph agree within hundredths of a degree.
_TOLERANCE_FLOOR = 0.25
_TOLERANCE_FACTOR = 1.5
# Held-out crops of which dark, blurred and near-infrared versions are made: all of them would make
# the step four times as long.
DEGRADED_COUNT = 64
# Fewer crops say nothing about a subset.
_FEWEST = 8
# A network that sees the pose errs by less than this part of what one answer for all would.
_BLIND = 0.7


def predict(engine: Engine, crops: npt.NDArray[np.uint8], batch: int) -> Prediction:
    """Predictions of all crops [N, S, S, 3], at most `batch` at a time.

    Raises:
        DataError: the engine gives numbers that are not finite.
    """
    parts = []
    with step("", len(crops), "crops") as going:
        for i in range(0, len(crops), batch):
            some = crops[i : i + batch]
            # A last batch that is smaller is filled up: engines compile each size anew.
            full = np.resize(some, (batch, *crops.shape[1:])) if len(some) < batch else some
            parts.append(engine.infer(full))
            going.advance(len(some))
    found = Prediction.joined(parts).first(len(crops))
    if bad := int((~found.finite).sum()):
        raise DataError(
            f"{engine.info.kind}: {bad} of {len(crops)} crops give angles that are not finite; "
            "activations overflow in this precision: choose another"
        )
    return found


@dataclass(frozen=True)
class Answers:
    """Predictions on all held-out crops, and on degraded versions of some of them.

    Attributes:
        clean: on all of them, as they are.
        degraded: condition of `edgehp.validation.appearance.CONDITIONS` -> on `degraded_crops`.
    """

    clean: Prediction
    degraded: Mapping[str, Prediction] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """What a graph or engine answered.

    Attributes:
        answers: on the held-out crops.
        runtime: that ran it, with its version.
        emulated: whether a graph stood in for an engine that cannot run here.
    """

    answers: Answers
    runtime: str
    emulated: bool = False

    @property
    def measured_with(self) -> str:
        """For `edgehp.artifact.manifest.Accuracy.measured_with`."""
        kind = "an emulation of the engine's graph" if self.emulated else "the engine itself"
        return f"{self.runtime}, {kind}"


def degraded_indices(count: int) -> npt.NDArray[np.intp]:
    """Which of `count` held-out crops the degraded versions are made of: 64 at most, spread."""
    return spaced(count, DEGRADED_COUNT)


def degraded_crops(held_out: CropSet) -> dict[str, npt.NDArray[np.uint8]]:
    """Dark, blurred and near-infrared versions of some of the crops, uint8 [n, S, S, 3] each."""
    some = held_out.crops[degraded_indices(len(held_out))]
    return {name: change(some) for name, change in CONDITIONS.items()}


def differences(
    reference: Prediction, artifact: Prediction, truth: npt.NDArray[np.float64] | None
) -> npt.NDArray[np.float64]:
    """What the artifact is worse by, crop by crop: [n] degrees.

    With labels the difference of the absolute errors; without, the absolute difference from FP32,
    which bounds it from above.
    """
    if truth is None:
        return frame_errors(artifact.angles, reference.angles)
    return frame_errors(artifact.angles, truth) - frame_errors(reference.angles, truth)


def mean_drop(reference: Prediction, artifact: Prediction, held_out: CropSet) -> float:
    """What the gate looks at: the upper end of the interval of the mean drop, degrees."""
    return mean_interval(differences(reference, artifact, held_out.angles)).high


def measure(
    before: Answers,
    after: Answers,
    held_out: CropSet,
    max_drop: float,
    measured_with: str,
) -> tuple[Accuracy, tuple[str, ...]]:
    """Compare the artifact's predictions with those of FP32 and hold the drop against the gate.

    With labels the drop is the difference of the mean absolute errors; without, the mean absolute
    difference from FP32, which bounds it from above. The interval is a paired bootstrap.

    Returns:
        The record, and a warning for each subset whose interval lies beyond the gate, and for a
        network that sees next to nothing of the pose.

    Raises:
        AccuracyError: the upper end of the drop's interval is above the gate.
    """
    reference, artifact = before.clean, after.clean
    means: tuple[float | None, float | None] = (None, None)
    metric, words = "deviation", "without labels the deviation from FP32 counts as drop; "
    if held_out.angles is not None:
        metric, words = "mae-drop", ""
        means = (
            float(frame_errors(reference.angles, held_out.angles).mean()),
            float(frame_errors(artifact.angles, held_out.angles).mean()),
        )
    drop = mean_interval(differences(reference, artifact, held_out.angles))
    try:
        require_drop(drop, max_drop)
    except AccuracyError as e:
        raise AccuracyError(f"no artifact was made: on {held_out.source}, {words}{e}") from e
    subsets = _subsets(before, after, held_out)
    accuracy = Accuracy(
        dataset=held_out.source,
        count=len(held_out),
        metric=metric,
        reference=means[0],
        artifact=means[1],
        drop=drop.value,
        interval=(drop.low, drop.high),
        max_drop=max_drop,
        measured_with=measured_with,
        protocol=held_out.protocol,
        difference=float(frame_errors(artifact.angles, reference.angles).mean()),
        spread_difference=mean_or_none(artifact.spread_apart(reference)),
        subsets=subsets,
    )
    warnings = [
        f"the drop is larger on the subset {s.name!r}: {s.drop:+.4f} degrees (95 % interval "
        f"{s.interval[0]:+.4f} to {s.interval[1]:+.4f} over {s.count} crops), {max_drop:g} allowed"
        for s in subsets
        if s.interval[0] > max_drop
    ]
    if held_out.angles is not None and means[0] is not None:
        # The gate compares with FP32, whatever that is worth.
        blind = float(np.abs(held_out.angles - held_out.angles.mean(axis=0)).mean())
        if means[0] > _BLIND * blind:
            warnings.append(
                f"FP32 itself errs by {means[0]:.1f} degrees on {held_out.source}, one answer for "
                f"all of its faces would by {blind:.1f}: was the network trained at this "
                "--input-size, and on faces cut like these?"
            )
    return accuracy, tuple(warnings)


def _subsets(before: Answers, after: Answers, held_out: CropSet) -> tuple[SubsetRecord, ...]:
    """Figures by |yaw| (of FP32 where there are no labels), and of the degraded versions."""
    truth = held_out.angles
    turned = before.clean.angles if truth is None else truth
    found = [
        _subset(f"|yaw| {low:g} to {high:g}°", before.clean, after.clean, truth, mask)
        for low, high, mask in yaw_bands(turned)
        if mask.sum() >= _FEWEST
    ]
    chosen = degraded_indices(len(held_out))
    some = None if truth is None else truth[chosen]
    everything = np.ones(len(chosen), np.bool_)
    found += [
        _subset(name, before.degraded[name], answer, some, everything)
        for name, answer in after.degraded.items()
        if name in before.degraded and len(chosen) >= _FEWEST
    ]
    return tuple(found)


def _subset(
    name: str,
    reference: Prediction,
    artifact: Prediction,
    truth: npt.NDArray[np.float64] | None,
    mask: npt.NDArray[np.bool_],
) -> SubsetRecord:
    drop = mean_interval(differences(reference, artifact, truth)[mask])
    return SubsetRecord(
        name,
        int(mask.sum()),
        drop.value,
        (drop.low, drop.high),
        float(frame_errors(artifact.angles, reference.angles)[mask].mean()),
        mean_or_none(artifact.spread_apart(reference), mask),
    )


def golden_vectors(
    reference: Prediction, artifact: Prediction, held_out: CropSet, file: str
) -> tuple[Golden, npt.NDArray[np.uint8]]:
    """Golden vectors: crops that spread over the held-out set in yaw, with their FP32 answers.

    Returns:
        The record, and the picture [8 S, S, 3] RGB to store as `file`.
    """
    order = np.argsort(reference.angles[:, 1], kind="stable")
    chosen = order[spaced(len(order), GOLDEN_COUNT)]
    angles = reference.angles[chosen]
    golden = Golden(
        file,
        _triples(angles),
        None if reference.spread is None else _triples(reference.spread[chosen]),
        tolerance_degrees=tolerance(artifact.angles[chosen], angles),
    )
    size = held_out.crops.shape[1]
    return golden, held_out.crops[chosen].reshape(len(chosen) * size, size, 3)


def tolerance(found: npt.ArrayLike, golden: npt.ArrayLike) -> float:
    """How far golden angles may be off, degrees: half as much again as when it was built.

    Args:
        found: angles of the artifact [n, 3] on the golden crops.
        golden: FP32 angles [n, 3].
    """
    worst = float(angle_errors(found, golden).max())
    return round(min(360.0, _TOLERANCE_FLOOR + _TOLERANCE_FACTOR * worst), 3)


def golden_picture(picture: npt.NDArray[np.uint8]) -> bytes:
    """The golden crops as a PNG file.

    Args:
        picture: uint8 [n S, S, 3], RGB.

    Raises:
        DataError: OpenCV cannot encode it.
    """
    done, data = cv2.imencode(".png", picture[..., ::-1])
    if not done:
        raise DataError("the golden crops cannot be encoded as PNG; install opencv again")
    return data.tobytes()


def _triples(values: npt.NDArray[np.float32]) -> tuple[tuple[float, float, float], ...]:
    # Six decimals are beyond float32 for angles; whole float64 digits would only be noise.
    return tuple((round(float(a), 6), round(float(b), 6), round(float(c), 6)) for a, b, c in values)


def emulator(plan: Plan) -> str:
    """The processor engine that stands in for one that cannot run here.

    onnxruntime computes such graphs as they are written: FP16 rounds between layers, and INT8
    does not saturate, whatever the processor.

    Raises:
        EnvironmentalError: none is installed.
    """
    if plan.kind in PROCESSOR_ENGINES:
        return plan.kind
    return processor_engine("onnxruntime")


def runs_here(kind: str, capabilities: tuple[str, ...], device: DeviceProbe) -> bool:
    """Whether an engine of `kind` can be run on this machine, not only built."""
    if kind in PROCESSOR_ENGINES:
        return True
    try:
        gpus = device.gpus()
    except EnvironmentalError:
        return False
    return bool(gpus) and gpus[0].compute_capability in capabilities


def run_graph(
    kind: str,
    path: Path,
    crops: CropSet,
    *,
    most: int = BATCH,
    threads: int | None = None,
    degraded: bool = False,
) -> Run:
    """Predictions of an engine file or graph on all crops.

    Args:
        kind: of the engine.
        path: engine file, or an ONNX graph for the processor engines.
        crops: what to run on.
        most: largest batch the engine takes.
        threads: processor threads.
        degraded: also on degraded versions of some crops (`degraded_crops`).

    Raises:
        DataError: the answers are not finite.
        EnvironmentalError: the runtime failed.
    """
    batch = min(BATCH, most)
    with open_engine(kind, path, threads=threads, batch=batch) as engine:
        clean = predict(engine, crops.crops, batch)
        changed = degraded_crops(crops) if degraded else {}
        found = Answers(clean, {n: predict(engine, c, batch) for n, c in changed.items()})
        # OpenVINO adds a build number and a branch.
        return Run(found, f"{kind} {engine.info.version.split('-')[0]}")


def reference_bytes(reference: Answers, crops: CropSet) -> bytes:
    """FP32 answers on the held-out crops, for a device that has no FP32 engine."""
    out = io.BytesIO()
    arrays: dict[str, Any] = {
        "digests": np.array(crops.digests),
    }
    for prefix, answer in _named(reference).items():
        arrays[f"{prefix}angles"] = answer.angles
        if answer.spread is not None:
            arrays[f"{prefix}spread"] = answer.spread
    np.savez_compressed(out, **arrays)
    return out.getvalue()


def _named(answers: Answers) -> dict[str, Prediction]:
    """Answers by what the names of their arrays begin with."""
    return {"": answers.clean, **{f"{n}.": a for n, a in answers.degraded.items()}}


def load_reference(path: Path, crops: CropSet) -> Answers:
    """What `reference_bytes` stored, for the same crops in the same order.

    Raises:
        CompatibilityError: it was made on other crops.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            digests = stored["digests"]
            clean = Prediction(stored["angles"], stored.get("spread"))
            degraded = {
                name: Prediction(stored[f"{name}.angles"], stored.get(f"{name}.spread"))
                for name in CONDITIONS
                if f"{name}.angles" in stored
            }
    except (ValueError, KeyError, OSError) as e:
        raise CompatibilityError(f"{path}: no FP32 answers in it ({e}); build again") from e
    if digests.tolist() != list(crops.digests):
        raise CompatibilityError(
            f"{path}: made on {len(digests)} other held-out crops than the {len(crops)} of "
            f"{crops.source}\nhint: give the same ones with --validate-on"
        )
    return Answers(clean, degraded)
