"""One pass over the crops gives the ranges of every method, for both flavours."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgehp.errors import DataError
from edgehp.quantization.graphview import network_digest
from edgehp.quantization.observers import Statistics, TensorObserver
from edgehp.quantization.placement import observed_tensors
from edgehp.quantization.runner import Runner
from edgehp.quantization.table import CalibrationTable, CropsDigest, TensorRanges
from edgehp.quantization.thresholds import GRIDS, METHODS, find_range

if TYPE_CHECKING:
    import onnx

__all__ = ["calibrate", "preprocessing_digest", "with_outputs"]

_log = logging.getLogger(__name__)
# Two crops at a time: larger batches are hardly faster and hold more activations.
_BATCH = 2
_PROGRESS = 256


def preprocessing_digest(model: onnx.ModelProto) -> str:
    """Digest of the preprocessing a graph carries in its metadata, or "" if it carries none."""
    from edgehp.networks.graph import spec_of_graph

    spec = spec_of_graph(model)
    return "" if spec is None else spec.preprocessing.digest


def with_outputs(model: onnx.ModelProto, tensors: Sequence[str]) -> onnx.ModelProto:
    """A copy of `model` whose only outputs are these intermediate tensors."""
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    known = {o.name: o for o in model.graph.output}
    del copy.graph.output[:]
    for name in tensors:
        info = known.get(name) or onnx.helper.make_empty_tensor_value_info(name)
        copy.graph.output.append(info)
    return copy


def calibrate(
    model: onnx.ModelProto,
    crops: Iterable[npt.NDArray[np.uint8]],
    *,
    methods: Sequence[str] = tuple(METHODS),
    threads: int | None = None,
) -> CalibrationTable:
    """Measure the activation ranges of a float graph.

    Memory does not grow with the number of crops, and `crops` is read once.

    Args:
        model: the deployed float graph (uint8 [batch, S, S, 3] in).
        crops: uint8 [S, S, 3] RGB each.
        methods: which ranges to put into the table, of `edgehp.quantization.thresholds.METHODS`.
        threads: of the engine; None takes all cores.

    Raises:
        DataError: no crops, crops of the wrong size or type, activations that are not finite.
        UsageError: unknown method.
        EnvironmentalError: onnxruntime is missing.
    """
    tensors = observed_tensors(model)
    runner = Runner(
        with_outputs(model, tensors), tensors, engine="onnxruntime", threads=threads, batch=_BATCH
    )
    observers = [TensorObserver(t) for t in tensors]
    digest = CropsDigest()

    def counted() -> Iterator[npt.NDArray[np.uint8]]:
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
    found = {t: _ranges(o.statistics(), methods) for t, o in zip(tensors, observers, strict=True)}
    return CalibrationTable(
        network=network_digest(model),
        crops=digest.hexdigest(),
        crop_count=digest.count,
        preprocessing=preprocessing_digest(model),
        tensors=MappingProxyType(found),
    )


def _ranges(seen: Statistics, methods: Sequence[str]) -> TensorRanges:
    ranges = {m: MappingProxyType({g: find_range(seen, m, g) for g in GRIDS}) for m in methods}
    return TensorRanges(
        seen.minimum,
        seen.maximum,
        MappingProxyType(ranges),
        tuple(seen.channel_mean.tolist()),
        tuple(seen.channel_peak.tolist()),
    )
