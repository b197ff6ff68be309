"""Report files, and what belongs into one report: benchmarks, validations, manifest, photos."""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import msgspec

from edgehp.artifact.check import read_manifest
from edgehp.artifact.manifest import MANIFEST_NAME, Manifest
from edgehp.benchmark.report import SCHEMA_VERSION as BENCHMARK_SCHEMA
from edgehp.benchmark.report import BenchmarkReport
from edgehp.benchmark.run import SCENARIOS
from edgehp.crop import Image, Preprocessing, crop_face
from edgehp.datasets.base import Sample
from edgehp.datasets.faces import read_faces, read_rendered
from edgehp.errors import DataError, UsageError
from edgehp.files import read_json, resource_dir, to_record, write_output
from edgehp.validation.run import SCHEMA_VERSION as VALIDATION_SCHEMA
from edgehp.validation.run import ValidationReport

logger = logging.getLogger(__name__)

Report = BenchmarkReport | ValidationReport
_SHOWN_PX = 160
_MOST_PHOTOS = 12


@dataclass(frozen=True)
class Photo:
    """A worst case: its name, error and angles in degrees, and the crop as a data URL or None."""

    name: str
    error: float
    truth: tuple[float, ...]
    predicted: tuple[float, ...]
    data: str | None


class Layer(msgspec.Struct, frozen=True):
    """A layer's sensitivity, degrees: alone in INT8, and what the rest gains without its INT8.

    `gain` is None in reports that do not have it.
    """

    name: str
    degrees: float
    gain: float | None = None


class _Sensitivity(msgspec.Struct):
    """What is read of a report of 'edgehp sensitivity'."""

    layers: tuple[Layer, ...]


@dataclass(frozen=True)
class Material:
    """What a report is made of.

    Attributes:
        benchmarks: reports of kind ``benchmark``, by scenario.
        validations: reports of kind ``validation``.
        manifest: of the artifact; None where no directory was given.
        sensitivity: of each layer; empty if not measured.
    """

    benchmarks: tuple[BenchmarkReport, ...]
    validations: tuple[ValidationReport, ...]
    manifest: Manifest | None
    sensitivity: tuple[Layer, ...] = ()


def write_report(report: Mapping[str, Any], directory: Path, name: str) -> Path:
    """Write ``name.json`` into `directory`, which is made where it is missing.

    Raises:
        EnvironmentalError: it cannot be written.
    """
    path = directory / f"{name}.json"
    write_output(path, json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return path


def read_report(path: Path) -> Report:
    """Read a report of 'edgehp bench' or 'edgehp validate'.

    Raises:
        DataError: it is missing, no JSON, no report, or of a schema that this edgehp does not read.
    """
    values = read_json(path, dict)
    if (found := _report(values, path)) is None:
        raise DataError(
            f"{path} holds the kind {values.get('kind')!r}; expected a report of 'edgehp bench' or "
            "'edgehp validate'"
        )
    return found


def _report(values: dict[str, Any], path: Path) -> Report | None:
    kind, schema = values.get("kind"), values.get("schema")
    if kind == "validation" and schema == VALIDATION_SCHEMA:
        return ValidationReport.from_dict(values, str(path))
    if kind == "benchmark" and schema == BENCHMARK_SCHEMA:
        try:
            return to_record(values, BenchmarkReport, str(path))
        except UsageError as e:
            raise DataError(f"{path}: {e}") from e
    if kind in ("benchmark", "validation"):
        raise DataError(
            f"{path}: found schema {schema!r} of a {kind} report, expected "
            f"{BENCHMARK_SCHEMA if kind == 'benchmark' else VALIDATION_SCHEMA}\n"
            "hint: measure again, or read it with the edgehp that wrote it"
        )
    return None


def gather(sources: Sequence[Path]) -> Material:
    """Read reports from files and from artifact directories.

    Args:
        sources: report files, and directories that hold them (an artifact with ``reports/``).

    Raises:
        DataError: nothing to report on, or a file that was named is no report.
        CompatibilityError: a manifest that cannot be accepted.
    """
    reports: list[Report] = []
    manifest = None
    sensitivity: tuple[Layer, ...] = ()
    for source in sources:
        if not source.exists():
            raise DataError(
                f"{source} does not exist\n"
                "hint: name an artifact's folder, as 'edgehp build' prints it, or a report file"
            )
        if not source.is_dir():
            reports.append(read_report(source))
            continue
        if (source / MANIFEST_NAME).is_file():
            manifest = read_manifest(source)
        for path in sorted([*source.glob("*.json"), *source.glob("reports/*.json")]):
            if path.name == MANIFEST_NAME:
                continue
            # A report that nobody named, such as one of an earlier release, stops no page.
            try:
                values = read_json(path, dict)
                found = _report(values, path)
            except DataError as e:
                logger.warning("passed over: %s", e)
                continue
            if found is not None:
                reports.append(found)
            elif values.get("kind") == "sensitivity":
                sensitivity = to_record(values, _Sensitivity, str(path)).layers
            else:
                logger.info("passed over %s: not a report", path)
    benchmarks = [r for r in reports if isinstance(r, BenchmarkReport)]
    benchmarks.sort(key=lambda r: SCENARIOS.index(r.scenario.scenario))
    validations = tuple(r for r in reports if isinstance(r, ValidationReport))
    if not benchmarks and not validations and manifest is None:
        raise DataError(
            f"no report in {', '.join(map(str, sources))}\n"
            "hint: make some with 'edgehp bench' or 'edgehp validate'"
        )
    return Material(tuple(benchmarks), validations, manifest, sensitivity)


def worst_photos(validation: ValidationReport, faces: Path | None) -> list[Photo]:
    """The worst cases of a validation, with their crops where `faces` has them.

    Args:
        validation: the report.
        faces: folder or zip the names come from (`edgehp.datasets.faces`), or None: the shipped
            rendered heads where those were validated on, else no photos.

    Raises:
        DataError: `faces` cannot be read.
    """
    accuracy = validation.artifact_accuracy or validation.reference_accuracy
    samples = {s.name: s for s in _samples(validation, faces)}
    spec = Preprocessing.from_dict(dict(validation.preprocessing))
    found = []
    for worst in accuracy.worst[:_MOST_PHOTOS]:
        sample = samples.get(worst.name)
        data = None
        if sample is not None:
            try:
                data = _data_url(crop_face(sample.load(), sample.box, spec))
            except DataError as e:
                logger.warning("%s is not shown: %s", worst.name, e)
        found.append(Photo(worst.name, worst.error, worst.truth, worst.predicted, data))
    return found


def _samples(validation: ValidationReport, faces: Path | None) -> Sequence[Sample]:
    protocol = validation.protocol
    if faces is not None:
        return read_faces(faces).with_depth(protocol.get("photo_depth")).samples
    shipped = resource_dir("calibration") / "rendered-validation.zip"
    if protocol.get("dataset") != "rendered" or not shipped.is_file():
        return ()
    data = read_rendered(shipped)
    # Other rendered heads may have the same names: without the same list they are not these.
    return data.samples if protocol.get("sha256") == data.protocol["sha256"] else ()


def _data_url(crop: Image) -> str:
    small = cv2.resize(crop, (_SHOWN_PX, _SHOWN_PX), interpolation=cv2.INTER_AREA)
    done, data = cv2.imencode(".jpg", small[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])
    if not done:
        raise DataError("the crop cannot be written as JPEG")
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()
