"""The calibration table: activation ranges by tensor and method, tied to what they came from.

A small JSON file. It is keyed by the network's digest, the crops' digest, the preprocessing's
digest and the version of the algorithm: a table that belongs to anything else is refused.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from edgehp.errors import CompatibilityError, DataError, UsageError
from edgehp.files import write_whole
from edgehp.quantization.thresholds import ALGORITHM, GRIDS, METHODS, Range

__all__ = ["SCHEMA", "CalibrationTable", "CropsDigest", "TensorRanges", "crops_digest"]

SCHEMA = 1
# A table of a ResNet152 has 1 MiB; anything much larger is not a table.
_LARGEST_FILE = 64 << 20
_DIGITS = 9  # enough for every float32

Crop = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class TensorRanges:
    """What is known of one activation tensor.

    Attributes:
        minimum: smallest value seen.
        maximum: largest value seen.
        ranges: method -> grid (``"int8"``, ``"uint8"``) -> (low, high), low <= 0 <= high.
        channel_mean: mean per channel; used for bias correction.
        channel_peak: largest magnitude per channel, mean over crops; used for equalisation.
    """

    minimum: float
    maximum: float
    ranges: Mapping[str, Mapping[str, Range]]
    channel_mean: tuple[float, ...]
    channel_peak: tuple[float, ...]


class CropsDigest:
    """SHA-256 over a list of crops, one after another: their number, shapes, order and bytes."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self.count = 0

    def update(self, crop: Crop) -> None:
        """Add the next crop."""
        head = f"{crop.dtype.str}{list(crop.shape)}".encode()
        # A digest of digests, so that it can be recomputed from a manifest's list of hashes.
        one = hashlib.sha256(head + np.ascontiguousarray(crop).tobytes()).digest()
        self._digest.update(one)
        self.count += 1

    def hexdigest(self) -> str:
        """The digest so far (hex)."""
        return self._digest.hexdigest()


def crops_digest(crops: Iterable[Crop]) -> str:
    """SHA-256 (hex) of a list of uint8 crops; the key of the crops in a table."""
    digest = CropsDigest()
    for crop in crops:
        digest.update(crop)
    return digest.hexdigest()


@dataclass(frozen=True)
class CalibrationTable:
    """Activation ranges of a network and what they were measured on.

    Attributes:
        network: `edgehp.quantization.graphview.network_digest` of the float graph.
        crops: `crops_digest` of the calibration crops.
        crop_count: their number.
        preprocessing: digest of the preprocessing specification, or "" for a foreign graph.
        tensors: by tensor name.
        algorithm: version of the threshold search.
    """

    network: str
    crops: str
    crop_count: int
    preprocessing: str
    tensors: Mapping[str, TensorRanges]
    algorithm: int = ALGORITHM

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that every tensor has ranges for."""
        return tuple(m for m in METHODS if all(m in t.ranges for t in self.tensors.values()))

    def range_of(self, tensor: str, method: str, grid: str) -> Range:
        """The range of a tensor on ``"int8"`` or ``"uint8"``.

        Raises:
            UsageError: the table has no such tensor or method.
        """
        try:
            return self.tensors[tensor].ranges[method][grid]
        except KeyError:
            raise UsageError(
                f"the calibration table has no {method} range of {tensor} on {grid}; it has "
                f"{len(self.tensors)} tensors by {', '.join(self.methods) or 'no method'}"
            ) from None

    def require(
        self, *, network: str, crops: str, preprocessing: str, methods: Iterable[str] = ()
    ) -> None:
        """Refuse the table where it is stale.

        Raises:
            CompatibilityError: it was made for another network, other crops, another
                preprocessing, by another version of the algorithm, or lacks a method.
        """
        pairs = (
            ("network", self.network, network),
            ("crops", self.crops, crops),
            ("preprocessing", self.preprocessing, preprocessing),
            ("algorithm", str(self.algorithm), str(ALGORITHM)),
        )
        wrong = [
            f"{what} {found[:12] or 'none'} (expected {wanted[:12] or 'none'})"
            for what, found, wanted in pairs
            if found != wanted
        ]
        if missing := sorted(set(methods) - set(self.methods)):
            wrong.append(f"no ranges by {', '.join(missing)}")
        if wrong:
            raise CompatibilityError(
                f"the calibration table is stale: {'; '.join(wrong)}; calibrate again"
            )

    def to_json(self) -> str:
        """Canonical JSON."""
        tensors = {
            name: {
                "minimum": _short(t.minimum),
                "maximum": _short(t.maximum),
                "ranges": {
                    m: {g: [_short(v) for v in r] for g, r in grids.items()}
                    for m, grids in t.ranges.items()
                },
                "channel_mean": [float(f"{v:.5g}") for v in t.channel_mean],
                "channel_peak": [float(f"{v:.4g}") for v in t.channel_peak],
            }
            for name, t in self.tensors.items()
        }
        document = {
            "schema": SCHEMA,
            "algorithm": self.algorithm,
            "network": self.network,
            "crops": self.crops,
            "crop_count": self.crop_count,
            "preprocessing": self.preprocessing,
            "tensors": tensors,
        }
        return json.dumps(document, sort_keys=True, separators=(",", ":")) + "\n"

    def save(self, path: Path | str) -> None:
        """Write the table; the file is either complete or unchanged.

        Raises:
            DataError: it cannot be written.
        """
        target = Path(path)
        try:
            write_whole(target, self.to_json())
        except OSError as e:
            raise DataError(f"{target}: the calibration table cannot be written: {e}") from e

    @classmethod
    def load(cls, path: Path | str) -> CalibrationTable:
        """Read a table.

        Raises:
            DataError: missing, too large, not JSON, or not a calibration table of this schema.
        """
        source = Path(path)
        try:
            if source.stat().st_size > _LARGEST_FILE:
                raise DataError(f"{source}: larger than any calibration table; calibrate again")
            text = source.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise DataError(f"{source}: the calibration table cannot be read: {e}") from e
        return cls.from_json(text, str(source))

    @classmethod
    def from_json(cls, text: str, where: str = "calibration table") -> CalibrationTable:
        """The inverse of `to_json`.

        Raises:
            DataError: not JSON, or not a calibration table of this schema.
        """
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as e:
            raise DataError(f"{where}: not JSON ({e}); calibrate again") from e
        reader = _Reader(where)
        top = reader.mapping(document, "the document")
        if top.get("schema") != SCHEMA:
            raise DataError(
                f"{where}: schema {str(top.get('schema'))[:20]!r}, expected {SCHEMA}; calibrate "
                "again with this version"
            )
        tensors = reader.mapping(top.get("tensors"), "tensors")
        if not tensors:
            raise DataError(f"{where}: no tensors; calibrate again")
        return cls(
            network=reader.digest(top, "network"),
            crops=reader.digest(top, "crops"),
            crop_count=reader.count(top, "crop_count"),
            preprocessing=reader.digest(top, "preprocessing", empty=True),
            tensors=MappingProxyType({n: reader.tensor(v, n) for n, v in tensors.items()}),
            algorithm=reader.count(top, "algorithm"),
        )


def _short(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


@dataclass(frozen=True)
class _Reader:
    """Takes untrusted JSON apart; every mistake names the place."""

    where: str

    def fail(self, what: str, value: object, expected: str) -> DataError:
        return DataError(
            f"{self.where}: {what} is {str(value)[:40]!r}, expected {expected}; calibrate again"
        )

    def mapping(self, value: object, what: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.fail(what, value, "an object")
        return value

    def digest(self, top: dict[str, Any], key: str, *, empty: bool = False) -> str:
        value = top.get(key)
        if empty and value == "":
            return ""
        hexadecimal = isinstance(value, str) and set(value) <= set("0123456789abcdef")
        if not isinstance(value, str) or not hexadecimal or len(value) != 64:
            raise self.fail(key, value, "64 hexadecimal digits")
        return value

    def count(self, top: dict[str, Any], key: str) -> int:
        value = top.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**53:
            raise self.fail(key, value, "a positive whole number")
        return value

    def number(self, value: object, what: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.fail(what, value, "a number")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise self.fail(what, value, "a finite number")
        return number

    def tensor(self, value: object, name: str) -> TensorRanges:
        t = self.mapping(value, name)
        ranges: dict[str, Mapping[str, Range]] = {}
        for method, grids in self.mapping(t.get("ranges"), f"{name}.ranges").items():
            if method not in METHODS:
                raise self.fail(f"{name}.ranges", method, f"one of {', '.join(METHODS)}")
            found = self.mapping(grids, f"{name}.{method}")
            ranges[method] = {g: self.range(found.get(g), f"{name}.{method}.{g}") for g in GRIDS}
        return TensorRanges(
            self.number(t.get("minimum"), f"{name}.minimum"),
            self.number(t.get("maximum"), f"{name}.maximum"),
            MappingProxyType(ranges),
            self.numbers(t, "channel_mean", name),
            self.numbers(t, "channel_peak", name),
        )

    def numbers(self, tensor: dict[str, Any], key: str, name: str) -> tuple[float, ...]:
        values = tensor.get(key)
        if not isinstance(values, list) or not values:
            raise self.fail(f"{name}.{key}", values, "a list of numbers")
        return tuple(self.number(v, f"{name}.{key}") for v in values)

    def range(self, value: object, what: str) -> Range:
        if not isinstance(value, list) or len(value) != 2:
            raise self.fail(what, value, "two numbers")
        low, high = (self.number(v, what) for v in value)
        if not low <= 0 <= high or low == high:
            raise self.fail(what, value, "low <= 0 <= high and low < high")
        return low, high
