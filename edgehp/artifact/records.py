"""The parts of a manifest, in plain data; `edgehp.artifact.manifest` reads and writes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgehp.engines.audit import LayerPrecision

__all__ = [
    "Accuracy",
    "BuildRecord",
    "Calibration",
    "EngineRecord",
    "FileRecord",
    "Golden",
    "MixedRecord",
    "NetworkRecord",
    "PrecisionRecord",
    "StepTime",
    "SubsetRecord",
    "TargetRecord",
]


@dataclass(frozen=True)
class NetworkRecord:
    """Which network: `spec` is `NetworkSpec.to_dict()`, or None for a foreign ONNX graph.

    `weights_sha256` is of the weights file (checkpoint or ONNX) the build read.
    """

    spec: Mapping[str, Any] | None
    digest: str | None
    weights_sha256: str
    source: str
    licence: str


@dataclass(frozen=True)
class TargetRecord:
    """Where the engine may run.

    Attributes:
        name: of the target (``edgehp targets``).
        compute_capabilities: of the GPUs the engine was built for, ``"8.7"``; empty on a CPU.
        module: Jetson module the engine was built on, None off-Jetson.
        gpu: name of the GPU the engine was built on, None where none was needed.
    """

    name: str
    compute_capabilities: tuple[str, ...] = ()
    module: str | None = None
    gpu: str | None = None


@dataclass(frozen=True)
class MixedRecord:
    """Which layers the accuracy gate keeps in floating point, and what that costs.

    Attributes:
        float_layers: names of the nodes, in graph order; all others are INT8.
        float_precision: what they run in, ``"fp16"`` or ``"fp32"``.
        all_int8_drop: what the gate measured with every layer in INT8, degrees.
        predicted_ms: milliseconds a call of the quantisable layers, by the latency model.
        predicted_all_int8_ms: the same with every layer in INT8.
        predicted_float_ms: the same with none.
        latency_model: where those come from, for people.
        evaluations: how many assignments were tried.
        measured_ms: median of the whole engine, measured at the build; None where it cannot run.
        measured_all_int8_ms: of the all-INT8 engine, alternately with the former.
    """

    float_layers: tuple[str, ...]
    float_precision: str
    all_int8_drop: float
    predicted_ms: float
    predicted_all_int8_ms: float
    predicted_float_ms: float
    latency_model: str
    evaluations: int
    measured_ms: float | None = None
    measured_all_int8_ms: float | None = None

    @property
    def predicted_cost_ms(self) -> float:
        """What the floating-point layers cost a call, predicted."""
        return self.predicted_ms - self.predicted_all_int8_ms


@dataclass(frozen=True)
class PrecisionRecord:
    """What was asked for and what the engine does.

    Attributes:
        asked: ``"int8"``, ``"fp16"``, ``"fp32"`` or ``"fp8"``.
        reached: the same, or None before a deferred build is finished.
        audited: what was inspected: the built engine or the parsed network.
        counts: layers by precision.
        audit: layer by layer.
        mixed: layers that the accuracy gate keeps in floating point; None where it keeps none.
    """

    asked: str
    reached: str | None
    audited: str
    counts: Mapping[str, int]
    audit: tuple[LayerPrecision, ...]
    mixed: MixedRecord | None = None


@dataclass(frozen=True)
class EngineRecord:
    """The engine's files and what made them.

    Attributes:
        kind: ``"openvino"``, ``"onnxruntime"``, ``"tensorrt"`` or ``"tensorrt-rtx"``.
        files: names inside the artifact, the one to open first.
        versions: of the runtime under its `kind`, and of CUDA, JetPack and others.
        min_batch: smallest batch.
        best_batch: the batch it was optimised for.
        max_batch: largest batch.
        machine: processor architecture of the build, ``"x86_64"`` or ``"aarch64"``.
    """

    kind: str
    files: tuple[str, ...]
    versions: Mapping[str, str]
    min_batch: int
    best_batch: int
    max_batch: int
    machine: str


@dataclass(frozen=True)
class Calibration:
    """Which crops the scales come from. `list_sha256` is of the file `list`, a name a line.

    `appearance` is `edgehp.validation.appearance.Appearance.to_dict()` of the crops, and `clipped`
    the share of their activations, 0..1, beyond the ranges chosen; None in older artifacts.
    """

    source: str
    count: int
    duplicates: int
    list: str
    list_sha256: str
    method: str
    table: str | None
    appearance: Mapping[str, Any] | None = None
    clipped: float | None = None


@dataclass(frozen=True)
class SubsetRecord:
    """The gate's figures among some of the held-out crops, or on a harder version of them, degrees.

    Attributes:
        name: ``"|yaw| 0-30"``, ``"dark"``, ...
        count: crops.
        drop: as `Accuracy.drop`.
        interval: 95 % interval of it.
        difference: mean absolute difference of the angles from FP32.
        spread_difference: mean absolute difference of the spread from FP32.
    """

    name: str
    count: int
    drop: float
    interval: tuple[float, float]
    difference: float
    spread_difference: float


@dataclass(frozen=True)
class Accuracy:
    """The gate's result, in degrees.

    Attributes:
        dataset: name of the held-out crops.
        count: how many.
        metric: ``"mae-drop"``: difference of mean absolute errors against labels;
            ``"deviation"``: mean absolute difference from FP32, where there are no labels.
        reference: FP32 mean absolute error, None without labels.
        artifact: the artifact's mean absolute error, None without labels.
        drop: artifact minus reference, or the deviation.
        interval: 95 % interval of `drop`, paired bootstrap over crops.
        max_drop: the gate.
        measured_with: runtime that ran the quantised graph (the engine itself, or an emulation).
        protocol: frames, boxes, conventions and their hashes.
        difference: mean absolute difference of the angles from FP32.
        spread_difference: mean absolute difference of the spread from FP32.
        subsets: bands of |yaw|, and dark, blurred and near-infrared versions.
    """

    dataset: str
    count: int
    metric: str
    reference: float | None
    artifact: float | None
    drop: float
    interval: tuple[float, float]
    max_drop: float
    measured_with: str
    protocol: Mapping[str, Any] = field(default_factory=dict)
    difference: float | None = None
    spread_difference: float | None = None
    subsets: tuple[SubsetRecord, ...] = ()


@dataclass(frozen=True)
class Golden:
    """Crops with known answers, to prove that a device computes what the build computed.

    Attributes:
        file: PNG of the crops, one below the other, [n * S, S, 3] RGB.
        angles: FP32 (pitch, yaw, roll) [n, 3] in degrees.
        spread: FP32 spread [n, 3] in degrees.
        tolerance_degrees: largest difference of an angle that the artifact may show.
        max_latency_ms: longest median time of one crop in the self-test of a device that installs
            the artifact; None where nobody set a budget.
    """

    file: str
    angles: tuple[tuple[float, float, float], ...]
    spread: tuple[tuple[float, float, float], ...]
    tolerance_degrees: float
    max_latency_ms: float | None = None


@dataclass(frozen=True)
class StepTime:
    """Wall-clock time of one build step."""

    name: str
    seconds: float


@dataclass(frozen=True)
class BuildRecord:
    """How the artifact was made: options (enough to repeat or finish it), times, warnings.

    `int8_against_fp16`: median milliseconds of both on hardware without INT8 tensor cores, where
    INT8 may be the slower one; None where it was not measured.
    """

    recipe: Mapping[str, Any]
    steps: tuple[StepTime, ...]
    warnings: tuple[str, ...]
    int8_against_fp16: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class FileRecord:
    """One file of the artifact; `path` is a plain name relative to it, `size` in bytes."""

    path: str
    sha256: str
    size: int
    role: str
