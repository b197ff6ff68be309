"""What a validation says, in plain data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from edgehp.files import finite
from edgehp.validation.metrics import Accuracy
from edgehp.validation.statistics import Interval

__all__ = [
    "SCHEMA_VERSION",
    "BandDrop",
    "Condition",
    "Drop",
    "Subject",
    "ValidationReport",
]

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Subject:
    """A network in an engine: what was measured.

    Attributes:
        name: what the user calls it.
        network_digest: SHA-256 of the network: its file, or the one in the artifact's manifest.
        engine: `edgehp.engines.base.EngineInfo` as a dictionary.
    """

    name: str
    network_digest: str | None
    engine: Mapping[str, Any]


@dataclass(frozen=True)
class BandDrop:
    """The drop among frames whose |yaw| lies in (low, high] degrees; None without such frames.

    Attributes:
        low: of |yaw|, degrees.
        high: of |yaw|, degrees.
        frames: how many.
        drop: MAE of the artifact minus that of the reference.
        mean_difference: mean absolute difference of the angles between the two.
        spread_difference: mean absolute difference of the spreads between the two.
    """

    low: float
    high: float
    frames: int
    drop: Interval | None
    mean_difference: float | None = None
    spread_difference: float | None = None


@dataclass(frozen=True)
class Drop:
    """The artifact against the reference on the same frames, degrees; positive is worse.

    Attributes:
        overall: MAE of the artifact minus that of the reference, mean of the three angles.
        angles: the same for pitch, yaw, roll.
        geodesic: the same of the geodesic distance.
        bands: the same by |yaw| of the truth.
        mean_difference: mean absolute difference of the angles, per angle: how far the two are
            from each other, whatever the truth is.
        mean_difference_overall: mean of the three.
        largest_difference: the largest of any frame and angle.
        spread_difference: mean absolute difference of the spreads per angle.
        spread_difference_overall: mean of the three.
    """

    overall: Interval
    angles: tuple[Interval, Interval, Interval]
    geodesic: Interval
    bands: tuple[BandDrop, ...]
    mean_difference: tuple[float, float, float]
    mean_difference_overall: float
    largest_difference: float
    spread_difference: tuple[float, float, float]
    spread_difference_overall: float


@dataclass(frozen=True)
class Condition:
    """Accuracy on a degraded version of the crops (`edgehp.validation.robustness`), degrees."""

    name: str
    reference_mae: float
    artifact_mae: float | None
    drop: Interval | None
    mean_difference: float | None
    spread_difference: float | None
    reference_spread: float


@dataclass(frozen=True)
class ValidationReport:
    """A whole validation.

    Attributes:
        protocol: the data set's protocol, of the frames that were really used, with
            ``detector_misses``, ``photos_skipped`` and ``limit``.
        preprocessing: `edgehp.crop.Preprocessing` as a dictionary.
        preprocessing_digest: its SHA-256.
        batch: crops per call of the engines.
        reference: the FP32 network.
        reference_accuracy: its accuracy.
        reference_mae: its MAE with an interval.
        artifact: the artifact; None where a network alone was validated.
        artifact_accuracy: its accuracy.
        artifact_mae: its MAE with an interval.
        drop: the paired comparison.
        robustness: degraded versions of the crops; empty where not asked for.
        appearance: the frames held against the calibration crops
            (`edgehp.validation.appearance.AppearanceCheck.to_dict`); None where the artifact does
            not say how those look.
        missed: names of frames in which the detector found no face.
        skipped: frames that were left out because something is wrong with them, and what.
        schema: of this report.
    """

    protocol: Mapping[str, Any]
    preprocessing: Mapping[str, Any]
    preprocessing_digest: str
    batch: int
    reference: Subject
    reference_accuracy: Accuracy
    reference_mae: Interval
    artifact: Subject | None = None
    artifact_accuracy: Accuracy | None = None
    artifact_mae: Interval | None = None
    drop: Drop | None = None
    robustness: tuple[Condition, ...] = ()
    appearance: Mapping[str, Any] | None = None
    missed: tuple[str, ...] = ()
    skipped: tuple[Mapping[str, str], ...] = field(default=())
    schema: int = SCHEMA_VERSION

    def to_dict(self) -> dict[str, Any]:
        """A dictionary of JSON values; an unbounded interval's ends become null."""
        return {"kind": "validation", **finite(asdict(self))}

    def to_json(self) -> str:
        """Indented JSON with a newline at its end."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"
