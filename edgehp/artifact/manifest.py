"""The manifest of an artifact: what is in it, where it may run and what was measured.

`Manifest` and its parts are the only description of ``manifest.json``: parsing, writing and the
published JSON Schema (`manifest_schema`) follow from them. Parsing is strict: a key too many or too
few, a value out of range, a path that leaves the directory or a digest that does not fit is
refused.

The file begins with its schema version and the SHA-256 of its own bytes (`sealed`). Both are
checked before anything is parsed, so that whoever reads manifests in another language needs neither
this schema nor a canonical form of JSON to find one altered.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from edgehp.crop import Preprocessing
from edgehp.engines.audit import LayerPrecision
from edgehp.errors import CompatibilityError, DataError, UsageError
from edgehp.files import Record, json_digest, plain, sha256_bytes, strict_json, to_record

MANIFEST_NAME = "manifest.json"
SCHEMA_VERSION = 3
# A manifest of a ResNet with a full audit is about 30 kB; a larger file is a mistake or an attack.
LARGEST_MANIFEST = 4 * 2**20
# How the file begins in every schema version.
_HEAD = re.compile(rb'\{\n "schema_version": ([0-9]{1,9}),\n "digest": "([0-9a-f]{64})",\n')
# Stands for the digest in what the digest is of.
_NO_DIGEST = "0" * 64

# "$" alone would let a final newline pass: Python matches before it, JSON Schema does not.
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}(?!\n)$")]
Line = Annotated[str, Meta(max_length=500)]
# Printable ASCII, no blank at either end.
SoftwareId = Annotated[str, Meta(pattern=r"^[!-~]([ -~]{0,98}[!-~])?(?!\n)$")]
Text = Annotated[str, Meta(max_length=4000)]
# A plain name, or one inside one plain folder.
FileName = Annotated[
    str,
    Meta(
        max_length=200,
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9._+-]*(/[A-Za-z0-9_][A-Za-z0-9._+-]*)?(?!\n)$",
    ),
]
Precision = Annotated[str, Meta(pattern=r"^(fp32|fp16|int8|fp8)(?!\n)$")]
EngineKind = Annotated[str, Meta(pattern=r"^(openvino|onnxruntime|tensorrt|tensorrt-rtx)(?!\n)$")]
Role = Annotated[str, Meta(pattern=r"^(engine|graph|golden|calibration|reference|report)(?!\n)$")]
Capability = Annotated[str, Meta(pattern=r"^[0-9]{1,2}\.[0-9](?!\n)$")]
Batch = Annotated[int, Meta(ge=1, le=4096)]
Count = Annotated[int, Meta(ge=0)]
NotNegative = Annotated[float, Meta(ge=0)]
Triples = Annotated[tuple[tuple[float, float, float], ...], Meta(min_length=1, max_length=64)]


class NetworkRecord(Record, frozen=True):
    """Which network: `spec` is `NetworkSpec.to_dict()`, or None for a foreign ONNX graph.

    `weights_sha256` is of the weights file (checkpoint or ONNX) the build read.
    """

    spec: dict[str, Any] | None
    digest: Sha256 | None
    weights_sha256: Sha256
    source: Line
    licence: Text


class TargetRecord(Record, frozen=True):
    """Where the engine may run.

    Attributes:
        name: of the target (``edgehp targets``).
        compute_capabilities: of the GPUs the engine was built for, ``"8.7"``; empty on a CPU.
        module: Jetson module the engine was built on, None off-Jetson.
        gpu: name of the GPU the engine was built on, None where none was needed.
    """

    name: Line
    compute_capabilities: Annotated[tuple[Capability, ...], Meta(max_length=32)] = ()
    module: Line | None = None
    gpu: Line | None = None


class MixedRecord(Record, frozen=True):
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

    float_layers: Annotated[tuple[Text, ...], Meta(min_length=1, max_length=20000)]
    float_precision: Precision
    all_int8_drop: float
    predicted_ms: NotNegative
    predicted_all_int8_ms: NotNegative
    predicted_float_ms: NotNegative
    latency_model: Line
    evaluations: Annotated[int, Meta(ge=1)]
    measured_ms: float | None = None
    measured_all_int8_ms: float | None = None

    @property
    def predicted_cost_ms(self) -> float:
        """What the floating-point layers cost a call, predicted."""
        return self.predicted_ms - self.predicted_all_int8_ms


class PrecisionRecord(Record, frozen=True):
    """What was asked for and what the engine does.

    Attributes:
        asked: ``"int8"``, ``"fp16"``, ``"fp32"`` or ``"fp8"``.
        reached: the same, or None before a deferred build is finished.
        audited: what was inspected: the built engine or the parsed network.
        counts: layers by precision.
        audit: layer by layer.
        mixed: layers that the accuracy gate keeps in floating point; None where it keeps none.
    """

    asked: Precision
    reached: Line | None
    audited: Line
    counts: dict[str, Count]
    audit: Annotated[tuple[LayerPrecision, ...], Meta(max_length=20000)]
    mixed: MixedRecord | None = None


class EngineRecord(Record, frozen=True):
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

    kind: EngineKind
    files: Annotated[tuple[FileName, ...], Meta(min_length=1, max_length=16)]
    versions: dict[str, Line]
    min_batch: Batch
    best_batch: Batch
    max_batch: Batch
    machine: Line

    def __post_init__(self) -> None:
        """Refuse batches out of order."""
        if not self.min_batch <= self.best_batch <= self.max_batch:
            raise ValueError("expected min_batch <= best_batch <= max_batch")


class Appearance(Record, frozen=True):
    """How a set of crops looks: of each statistic the ends of its middle 95 %, median between."""

    count: Count
    brightness: tuple[float, float, float]
    contrast: tuple[float, float, float]
    saturation: tuple[float, float, float]
    sharpness: tuple[float, float, float]


class Calibration(Record, frozen=True):
    """Which crops the scales come from. `list_sha256` is of the file `list`, a name a line.

    `appearance` is that of the crops, and `clipped` the share of their activations, 0..1, beyond
    the ranges chosen; None in older artifacts.
    """

    source: Line
    count: Annotated[int, Meta(ge=64, le=1000000)]
    duplicates: Count
    list: FileName
    list_sha256: Sha256
    method: Line
    table: FileName | None
    appearance: Appearance | None = None
    clipped: float | None = None


class SubsetRecord(Record, frozen=True):
    """The gate's figures among some of the held-out crops, or on a harder version of them, degrees.

    Attributes:
        name: ``"|yaw| 0 to 30°"``, ``"dark"``, ...
        count: crops.
        drop: as `Accuracy.drop`.
        interval: 95 % interval of it.
        difference: mean absolute difference of the angles from FP32.
        spread_difference: mean absolute difference of the spread from FP32; None without bins.
    """

    name: Line
    count: Annotated[int, Meta(ge=1)]
    drop: float
    interval: tuple[float, float]
    difference: NotNegative
    spread_difference: NotNegative | None


class Accuracy(Record, frozen=True):
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

    dataset: Line
    count: Annotated[int, Meta(ge=1)]
    metric: Annotated[str, Meta(pattern=r"^(mae-drop|deviation)(?!\n)$")]
    reference: float | None
    artifact: float | None
    drop: float
    interval: tuple[float, float]
    max_drop: NotNegative
    measured_with: Line
    protocol: dict[str, Any] = msgspec.field(default_factory=dict)
    difference: float | None = None
    spread_difference: float | None = None
    subsets: Annotated[tuple[SubsetRecord, ...], Meta(max_length=64)] = ()


class Golden(Record, frozen=True):
    """Crops with known answers, to prove that a device computes what the build computed.

    Attributes:
        file: PNG of the crops, one below the other, [n * S, S, 3] RGB.
        angles: FP32 (pitch, yaw, roll) [n, 3] in degrees.
        spread: FP32 spread [n, 3] in degrees; None of a network without bins.
        tolerance_degrees: largest difference of an angle that the artifact may show.
        max_latency_ms: longest median time of one crop in the self-test of a device that installs
            the artifact; None where nobody set a budget.
    """

    file: FileName
    angles: Triples
    spread: Triples | None
    tolerance_degrees: Annotated[float, Meta(ge=0, le=360)]
    max_latency_ms: Annotated[float, Meta(ge=0, le=3600000)] | None = None

    def __post_init__(self) -> None:
        """Refuse another number of spreads than of angles."""
        if self.spread is not None and len(self.angles) != len(self.spread):
            raise ValueError("as many spreads as angles expected")


class StepTime(Record, frozen=True):
    """Wall-clock time of one build step."""

    name: Line
    seconds: NotNegative


class Comparison(Record, frozen=True):
    """Median milliseconds a call of INT8 and of FP16 at a batch size."""

    int8_ms: NotNegative
    fp16_ms: NotNegative
    batch: Batch


class BuildRecord(Record, frozen=True):
    """How the artifact was made: options (enough to repeat or finish it), times, warnings.

    `int8_against_fp16`: median milliseconds of both on hardware without INT8 tensor cores, where
    INT8 may be the slower one; None where it was not measured.
    """

    recipe: dict[str, Any]
    steps: Annotated[tuple[StepTime, ...], Meta(max_length=64)]
    warnings: Annotated[tuple[Text, ...], Meta(max_length=256)]
    int8_against_fp16: Comparison | None = None


class FileRecord(Record, frozen=True):
    """One file of the artifact; `path` is a plain name relative to it, `size` in bytes."""

    path: FileName
    sha256: Sha256
    size: Annotated[int, Meta(ge=0, le=2**32)]
    role: Role


class PreprocessingRecord(Record, frozen=True):
    """The specification with its digest, which calibration tables and reports name."""

    spec: Preprocessing
    digest: Sha256


class Manifest(Record, frozen=True, kw_only=True):
    """Everything known about an artifact. `state` is ``"complete"`` or ``"deferred"``.

    `rxswin` is the software identification number of the type approval (UNECE R156) that whoever
    bundles it gave; None where nobody did.
    """

    state: Annotated[str, Meta(pattern=r"^(complete|deferred)(?!\n)$")]
    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._+-]{0,199}(?!\n)$")]
    created: Annotated[
        str,
        Meta(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z(?!\n)$"),
    ]
    edgehp_version: Line
    network: NetworkRecord
    preprocessing: Preprocessing
    target: TargetRecord
    precision: PrecisionRecord
    engine: EngineRecord | None
    graph: FileName
    calibration: Calibration | None
    accuracy: Accuracy | None
    golden: Golden
    build: BuildRecord
    files: Annotated[tuple[FileRecord, ...], Meta(min_length=1, max_length=64)]
    rxswin: SoftwareId | None = None

    def to_dict(self) -> dict[str, Any]:
        """What ``manifest.json`` holds, its schema version and digest included."""
        values = {"schema_version": SCHEMA_VERSION, **plain(self)}
        values["preprocessing"] = {
            "spec": values["preprocessing"],
            "digest": self.preprocessing.digest,
        }
        whole: dict[str, Any] = json.loads(sealed(values))
        return whole

    def to_json(self) -> str:
        """The text of ``manifest.json``.

        Raises:
            DataError: the manifest breaks its own schema (a name with a path, a NaN, ...).
        """
        values = self.to_dict()
        to_record(values, _Document, "the manifest cannot be written", DataError)
        return sealed(values).decode()

    @property
    def digest(self) -> str:
        """SHA-256 (hex) that names this manifest, as its file says it."""
        return str(self.to_dict()["digest"])

    def file(self, path: str) -> FileRecord:
        """The record of the file called `path` (KeyError if there is none)."""
        for record in self.files:
            if record.path == path:
                return record
        raise KeyError(path)

    def with_files(self, files: tuple[FileRecord, ...]) -> Manifest:
        """The same manifest with other file records."""
        return msgspec.structs.replace(self, files=files)


class _Document(Manifest, frozen=True, kw_only=True):
    """``manifest.json``: a `Manifest` with what is derived from it."""

    schema_version: Literal[3]
    digest: Sha256
    preprocessing: PreprocessingRecord  # type: ignore[assignment]

    def __post_init__(self) -> None:
        """Check what concerns several parts."""
        if self.preprocessing.spec.digest != self.preprocessing.digest:
            raise ValueError("preprocessing.digest does not fit preprocessing.spec")
        spec = self.network.spec
        if spec is not None and json_digest(spec) != self.network.digest:
            raise ValueError("network.digest does not fit network.spec")
        if (self.state == "complete") != (self.engine is not None):
            raise ValueError(f"state {self.state} with{'out' * (self.engine is None)} an engine")
        listed = [f.path for f in self.files]
        if len({p.lower() for p in listed}) != len(listed):
            raise ValueError("files: a path is listed twice")
        if MANIFEST_NAME in listed:
            raise ValueError(f"files: {MANIFEST_NAME} cannot list itself")
        used = {"graph": self.graph, "golden.file": self.golden.file}
        if self.engine is not None:
            used.update((f"engine.files[{i}]", f) for i, f in enumerate(self.engine.files))
        if self.calibration is not None:
            used["calibration.list"] = self.calibration.list
            if self.calibration.table is not None:
                used["calibration.table"] = self.calibration.table
        for key, path in used.items():
            if path not in listed:
                raise ValueError(f"{key}: {path} is not listed under files")

    def manifest(self) -> Manifest:
        """The manifest alone."""
        fields = {name: getattr(self, name) for name in Manifest.__struct_fields__}
        return Manifest(**{**fields, "preprocessing": self.preprocessing.spec})


def manifest_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of ``manifest.json``."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "edgehp artifact manifest",
        **msgspec.json.schema(_Document),
    }


def sealed(values: Mapping[str, Any]) -> bytes:
    """The bytes of a ``manifest.json`` with these values, its schema version and digest first.

    The digest is the SHA-256 of these bytes with zeros for its own 64 digits. It is found by
    accidents and careless hands; against an attacker a bundle is signed.
    """
    first = {"schema_version": values["schema_version"], "digest": _NO_DIGEST}
    rest = {k: v for k, v in values.items() if k not in first}
    text = json.dumps({**first, **rest}, indent=1, ensure_ascii=False) + "\n"
    return text.replace(_NO_DIGEST, sha256_bytes(text.encode()), 1).encode()


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Parse the bytes of a ``manifest.json``: version, digest and schema in this order.

    Args:
        data: the file's content.
        where: its path, for messages.

    Raises:
        CompatibilityError: another schema version, malformed, altered, or with paths that leave
            the artifact.
    """
    if len(data) > LARGEST_MANIFEST:
        raise CompatibilityError(
            f"{where}: {len(data)} bytes, expected at most {LARGEST_MANIFEST}; "
            "build the artifact again"
        )
    if (head := _HEAD.match(data)) is None:
        raise CompatibilityError(
            f"{where} is not a manifest of edgehp: it does not begin with a schema version and a "
            "digest\nhint: build or copy the artifact again"
        )
    _check_version(int(head[1]), data, where)
    said = head[2].decode()
    found = sha256_bytes(data.replace(head[2], _NO_DIGEST.encode(), 1))
    if said != found:
        raise CompatibilityError(
            f"{where}: the manifest was altered: its digest is {found[:16]}..., "
            f"it says {said[:16]}...\nhint: build the artifact again or copy it again"
        )
    try:
        return to_record(strict_json(data), _Document, where).manifest()
    except (ValueError, DataError, UsageError) as e:
        fault = str(e).removeprefix(f"{where}: ")
        raise CompatibilityError(
            f"{where} is not a manifest of this version of edgehp: {fault}; build or copy the "
            "artifact again"
        ) from e


def _check_version(version: int, data: bytes, where: str) -> None:
    if version == SCHEMA_VERSION:
        return
    if version < SCHEMA_VERSION:
        raise CompatibilityError(
            f"{where}: found manifest schema {version}, expected {SCHEMA_VERSION}: made by an "
            "older edgehp: build it again"
        )
    by = re.search(rb'^ "edgehp_version": "([!-~]{1,40})",$', data, re.M)
    raise CompatibilityError(
        f"{where}: found manifest schema {version}, this edgehp reads up to {SCHEMA_VERSION}; it "
        f"was written by edgehp {by[1].decode() if by else 'of an unknown version'}: install that "
        "version or build the artifact again"
    )
