"""The calibration table: activation ranges by tensor and method, tied to what they came from.

One pass over the crops gives the ranges of every method. An artifact keeps the table as a small
JSON file.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import numpy.typing as npt

from edgehp.errors import DataError, UsageError
from edgehp.files import Record, plain
from edgehp.quantization.graph import network_digest, with_outputs
from edgehp.quantization.placement import observed_tensors
from edgehp.quantization.ranges import GRIDS, METHODS, Range, Statistics, TensorObserver, find_range
from edgehp.quantization.recipe import ALGORITHM, FLAVORS
from edgehp.quantization.runner import Runner, input_of

if TYPE_CHECKING:
    import onnx

SCHEMA = 2
# Crops of 112 pixels at a time: all activations of a batch are held. Larger crops are fewer.
_BATCH = 8
_PROGRESS = 256
_DIGITS = 9  # enough for every float32

_log = logging.getLogger(__name__)

Crop = npt.NDArray[np.uint8]


class TensorRanges(Record, frozen=True):
    """What is known of one activation tensor.

    Attributes:
        minimum: smallest value seen.
        maximum: largest value seen.
        ranges: method -> grid (``"int8"``, ``"uint8"``) -> (low, high), low <= 0 <= high.
    """

    minimum: float
    maximum: float
    ranges: dict[str, dict[str, Range]]


class CalibrationTable(Record, frozen=True, kw_only=True):
    """Activation ranges of a network and what they were measured on.

    Attributes:
        network: `edgehp.quantization.graph.network_digest` of the float graph.
        crops: `CropsDigest` of the calibration crops.
        crop_count: their number.
        preprocessing: digest of the preprocessing specification, or "" for a foreign graph.
        tensors: by tensor name.
        algorithm: version of the search for ranges.
        schema: of the file.
    """

    network: str
    crops: str
    crop_count: int
    preprocessing: str
    tensors: dict[str, TensorRanges]
    algorithm: int = ALGORITHM
    schema: int = SCHEMA

    def range_of(self, tensor: str, method: str, grid: str) -> Range:
        """The range of a tensor on ``"int8"`` or ``"uint8"``.

        Raises:
            UsageError: the table has no such tensor or method.
        """
        try:
            return self.tensors[tensor].ranges[method][grid]
        except KeyError:
            raise UsageError(
                f"the calibration table has no {method} range of {tensor} on {grid}"
            ) from None

    def to_json(self) -> str:
        """Canonical JSON; floats have the nine digits that tell float32 values apart."""
        text = msgspec.json.encode(_rounded(plain(self)), order="sorted")
        return text.decode() + "\n"


def _rounded(value: object) -> object:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list | tuple) else value


class CropsDigest:
    """SHA-256 over a list of crops, one after another: their number, shapes, order and bytes."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self.count = 0

    def update(self, crop: Crop) -> None:
        """Add the next crop."""
        head = f"{crop.dtype.str}{list(crop.shape)}".encode()
        # A digest of digests, so that it can be recomputed from a manifest's list of hashes.
        self._digest.update(hashlib.sha256(head + np.ascontiguousarray(crop).tobytes()).digest())
        self.count += 1

    def hexdigest(self) -> str:
        """The digest so far (hex)."""
        return self._digest.hexdigest()


def calibrate(
    model: onnx.ModelProto,
    crops: Iterable[Crop],
    *,
    methods: Sequence[str] = tuple(METHODS),
    flavors: Sequence[str] = FLAVORS,
    threads: int | None = None,
) -> CalibrationTable:
    """Measure the activation ranges of a float graph.

    Memory does not grow with the number of crops, and `crops` is read once.

    Args:
        model: the deployed float graph (uint8 [batch, S, S, 3] in).
        crops: uint8 [S, S, 3] RGB each.
        methods: which ranges to put into the table, of `edgehp.quantization.ranges.METHODS`.
        flavors: whose tensors to observe, of `edgehp.quantization.recipe.FLAVORS`.
        threads: of the processor; None takes all cores.

    Raises:
        DataError: no crops, crops of the wrong size or type, activations that are not finite.
        UsageError: unknown method or flavor.
        EnvironmentalError: onnxruntime is missing.
    """
    from edgehp.networks.graph import spec_of_graph

    tensors = observed_tensors(model, flavors)
    batch = max(1, min(_BATCH, _BATCH * 112 * 112 // math.prod(input_of(model)[1:])))
    runner = Runner(with_outputs(model, tensors), tensors, threads=threads, batch=batch)
    observers = [TensorObserver(t) for t in tensors]
    digest = CropsDigest()

    def counted() -> Iterator[Crop]:
        for crop in crops:
            digest.update(crop)
            if digest.count % _PROGRESS == 0:
                _log.info("calibrating: %d crops", digest.count)
            yield crop

    for outputs in runner.stream(counted()):
        for observer, values in zip(observers, outputs, strict=True):
            observer.update(values)
    if digest.count == 0:
        raise DataError("no calibration crops: expected at least one")
    spec = spec_of_graph(model)
    return CalibrationTable(
        network=network_digest(model),
        crops=digest.hexdigest(),
        crop_count=digest.count,
        preprocessing="" if spec is None else spec.preprocessing.digest,
        tensors={
            t: _ranges(o.statistics(), methods) for t, o in zip(tensors, observers, strict=True)
        },
    )


def _ranges(seen: Statistics, methods: Sequence[str]) -> TensorRanges:
    ranges = {}
    for method in methods:
        ends = {g: find_range(seen, method, g) for g in GRIDS}
        # Plain numbers: JSON knows none of numpy's.
        ranges[method] = {g: (float(low), float(high)) for g, (low, high) in ends.items()}
    return TensorRanges(seen.minimum, seen.maximum, ranges)
