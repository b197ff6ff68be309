"""The manifest of an artifact: what is in it, where it may run and what was measured.

`manifest.json` is described by ``edgehp/artifact/manifest.schema.json``. `Manifest` is the same in
frozen dataclasses. Parsing is strict: a key too many or too few, a value out of range, a path that
leaves the directory or a digest that does not fit is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from edgehp.artifact.records import (
    Accuracy,
    BuildRecord,
    Calibration,
    EngineRecord,
    FileRecord,
    Golden,
    MixedRecord,
    NetworkRecord,
    PrecisionRecord,
    StepTime,
    SubsetRecord,
    TargetRecord,
)
from edgehp.artifact.schema import first_fault, manifest_schema
from edgehp.crop import Preprocessing
from edgehp.engines.audit import LayerPrecision
from edgehp.errors import CompatibilityError, DataError
from edgehp.files import json_digest, sha256_bytes, strict_json

__all__ = [
    "MANIFEST_NAME",
    "SCHEMA_VERSION",
    "Accuracy",
    "BuildRecord",
    "Calibration",
    "EngineRecord",
    "FileRecord",
    "Golden",
    "Manifest",
    "MixedRecord",
    "NetworkRecord",
    "PrecisionRecord",
    "StepTime",
    "SubsetRecord",
    "TargetRecord",
    "canonical_digest",
    "parse_manifest",
]

MANIFEST_NAME = "manifest.json"
SCHEMA_VERSION = 1
# A manifest of a ResNet with a full audit is about 30 kB; a larger file is a mistake or an attack.
LARGEST_MANIFEST = 4 * 2**20


@dataclass(frozen=True)
class Manifest:
    """Everything known about an artifact. `state` is ``"complete"`` or ``"deferred"``."""

    state: str
    name: str
    created: str
    edgehp_version: str
    network: NetworkRecord
    preprocessing: Preprocessing
    target: TargetRecord
    precision: PrecisionRecord
    engine: EngineRecord | None
    graph: str
    calibration: Calibration | None
    accuracy: Accuracy | None
    golden: Golden
    build: BuildRecord
    files: tuple[FileRecord, ...]

    def to_dict(self) -> dict[str, Any]:
        """A dictionary for JSON, with the schema version and the manifest's own digest."""
        values = _plain(asdict(self))
        values["preprocessing"] = {
            "spec": self.preprocessing.to_dict(),
            "digest": self.preprocessing.digest,
        }
        values["schema_version"] = SCHEMA_VERSION
        values["digest"] = canonical_digest(values)
        return {k: values[k] for k in manifest_schema()["properties"]}

    def to_json(self) -> str:
        """The text of ``manifest.json``.

        Raises:
            DataError: the manifest breaks its own schema (a name with a path, a NaN, ...).
        """
        values = self.to_dict()
        try:
            text = json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        except ValueError as e:
            raise DataError(f"the manifest holds a number that is not finite: {e}") from e
        if fault := first_fault(json.loads(text), manifest_schema()) or _path_fault(values):
            raise DataError(f"the manifest cannot be written: {fault}")
        return text

    def file(self, path: str) -> FileRecord:
        """The record of the file called `path` (KeyError if there is none)."""
        for record in self.files:
            if record.path == path:
                return record
        raise KeyError(path)

    def with_files(self, files: tuple[FileRecord, ...]) -> Manifest:
        """The same manifest with other file records."""
        return replace(self, files=files)


def canonical_digest(values: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of the canonical JSON of `values` without its key ``digest``."""
    rest = {k: v for k, v in values.items() if k != "digest"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return sha256_bytes(text.encode("utf-8", "surrogatepass"))


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Parse the bytes of a ``manifest.json``.

    Args:
        data: the file's content.
        where: its path, for messages.

    Raises:
        CompatibilityError: newer schema, malformed, altered, or with paths that leave the artifact.
    """
    if len(data) > LARGEST_MANIFEST:
        raise CompatibilityError(
            f"{where}: {len(data)} bytes, expected at most {LARGEST_MANIFEST}; "
            "build the artifact again"
        )
    values = _json(data, where)
    _check_version(values, where)
    if fault := first_fault(values, manifest_schema()) or _path_fault(values):
        raise _malformed(where, fault)
    if values["digest"] != canonical_digest(values):
        raise CompatibilityError(
            f"{where}: the manifest was altered: its digest is {canonical_digest(values)[:16]}..., "
            f"it says {values['digest'][:16]}...; build the artifact again or copy it again"
        )
    return _manifest(values, where)


def _json(data: bytes, where: str) -> dict[str, Any]:
    try:
        values = strict_json(data)
    except ValueError as e:
        raise _malformed(where, f"no JSON: {e}") from e
    if not isinstance(values, dict):
        raise _malformed(where, f"found a JSON {type(values).__name__}, expected an object")
    return values


def _malformed(where: str, fault: str) -> CompatibilityError:
    return CompatibilityError(
        f"{where} is not a manifest of this version of edgehp: {fault}; build or copy the "
        "artifact again"
    )


def _check_version(values: Mapping[str, Any], where: str) -> None:
    version = values.get("schema_version")
    if isinstance(version, int) and not isinstance(version, bool) and version > SCHEMA_VERSION:
        raise CompatibilityError(
            f"{where}: found manifest schema {version}, this edgehp reads up to {SCHEMA_VERSION}; "
            f"it was written by edgehp {str(values.get('edgehp_version'))[:40]}: install that "
            "version or build the artifact again"
        )


def _path_fault(values: Mapping[str, Any]) -> str | None:
    """What is wrong with the file names: listed twice, or used but not listed."""
    listed = [f["path"] for f in values["files"]]
    if len({p.lower() for p in listed}) != len(listed):
        return "files: a path is listed twice"
    if MANIFEST_NAME in listed:
        return f"files: {MANIFEST_NAME} cannot list itself"
    used = {"graph": [values["graph"]], "golden.file": [values["golden"]["file"]]}
    if (engine := values["engine"]) is not None:
        used["engine.files"] = list(engine["files"])
        if not engine["min_batch"] <= engine["best_batch"] <= engine["max_batch"]:
            return "engine: expected min_batch <= best_batch <= max_batch"
    if (calibration := values["calibration"]) is not None:
        used["calibration"] = [calibration["list"]]
        if calibration["table"] is not None:
            used["calibration"].append(calibration["table"])
    for key, paths in used.items():
        for path in paths:
            if path not in listed:
                return f"{key}: {path} is not listed under files"
    if (values["state"] == "complete") != (engine is not None):
        return f"state {values['state']} with{'out' if engine is None else ''} an engine"
    if len(values["golden"]["angles"]) != len(values["golden"]["spread"]):
        return "golden: as many spreads as angles expected"
    return None


def _manifest(values: dict[str, Any], where: str) -> Manifest:
    try:
        preprocessing = Preprocessing.from_dict(values["preprocessing"]["spec"])
    except DataError as e:
        raise _malformed(where, str(e)) from e
    if preprocessing.digest != values["preprocessing"]["digest"]:
        raise _malformed(where, "preprocessing.digest does not fit preprocessing.spec")
    network = values["network"]
    if network["spec"] is not None and json_digest(network["spec"]) != network["digest"]:
        raise _malformed(where, "network.digest does not fit network.spec")
    precision, accuracy = values["precision"], values["accuracy"]
    golden, build, engine = values["golden"], values["build"], values["engine"]
    target = values["target"]
    return Manifest(
        state=values["state"],
        name=values["name"],
        created=values["created"],
        edgehp_version=values["edgehp_version"],
        network=NetworkRecord(**network),
        preprocessing=preprocessing,
        target=TargetRecord(
            **{**target, "compute_capabilities": tuple(target["compute_capabilities"])}
        ),
        precision=PrecisionRecord(
            **{
                **precision,
                "audit": tuple(LayerPrecision(**a) for a in precision["audit"]),
                "mixed": _mixed(precision.get("mixed")),
            }
        ),
        engine=None
        if engine is None
        else EngineRecord(**{**engine, "files": tuple(engine["files"])}),
        graph=values["graph"],
        calibration=None if values["calibration"] is None else Calibration(**values["calibration"]),
        accuracy=None
        if accuracy is None
        else Accuracy(
            **{
                **accuracy,
                "interval": tuple(accuracy["interval"]),
                "subsets": tuple(
                    SubsetRecord(**{**s, "interval": tuple(s["interval"])})
                    for s in accuracy.get("subsets", ())
                ),
            }
        ),
        golden=Golden(
            golden["file"],
            tuple((a[0], a[1], a[2]) for a in golden["angles"]),
            tuple((s[0], s[1], s[2]) for s in golden["spread"]),
            golden["tolerance_degrees"],
            golden.get("max_latency_ms"),
        ),
        build=BuildRecord(
            build["recipe"],
            tuple(StepTime(**s) for s in build["steps"]),
            tuple(build["warnings"]),
            build["int8_against_fp16"],
        ),
        files=tuple(FileRecord(**f) for f in values["files"]),
    )


def _mixed(values: Mapping[str, Any] | None) -> MixedRecord | None:
    if values is None:
        return None
    return MixedRecord(**{**values, "float_layers": tuple(values["float_layers"])})


def _plain(value: Any) -> Any:
    """Tuples as lists, so that the digest is of what JSON gives back."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    return value
