"""Accuracy-controlled precision in a build: which layers stay in floating point, and at what cost.

Called only where the all-INT8 graph misses the gate: then the sensitivity of every layer is
measured on the calibration's held-back crops, its price is taken from the best latency model there
is for the target, and assignments are tried on the held-out crops until the drop fits.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import numpy.typing as npt

from edgehp.artifact.manifest import MixedRecord
from edgehp.engines import PROCESSOR_ENGINES, open_engine
from edgehp.engines.base import Prediction
from edgehp.errors import EnvironmentalError
from edgehp.pipeline.accuracy import mean_drop, predict
from edgehp.pipeline.crops import CropSet
from edgehp.pipeline.engine import (
    BuiltEngine,
    build_here,
    compare_engines,
    convolutions_of,
    outside_int8,
)
from edgehp.pipeline.graphs import QuantizedGraph, half_graph, onnx_model, write_graph
from edgehp.pipeline.prices import latency_model
from edgehp.pipeline.run import BATCH, emulator, run_graph, runs_here
from edgehp.pipeline.sensitivity import layers_of, sensitivity_of, sensitivity_report
from edgehp.pipeline.work import Work
from edgehp.quantization.compare import split_crops
from edgehp.quantization.graph import GraphView
from edgehp.quantization.latency import LatencyModel
from edgehp.quantization.search import NotReachedError, search

if TYPE_CHECKING:
    import onnx

__all__ = ["Mixed", "MixedBuild", "against_half", "find_mixed"]

# Graphs that are tried on the held-out crops.
MOST_EVALUATIONS = 40


@dataclass(frozen=True)
class Mixed:
    """A mixed assignment that keeps the drop.

    Attributes:
        graph: the Q/DQ graph.
        record: for the manifest.
        report: the sensitivity of every layer, as a JSON file.
    """

    graph: onnx.ModelProto
    record: MixedRecord
    report: str

    @property
    def sentence(self) -> str:
        """Which layers stay in floating point and what that costs."""
        r = self.record
        text = (
            f"{len(r.float_layers)} layers stay in {r.float_precision.upper()} to keep the drop: "
            f"{', '.join(r.float_layers)}; predicted to cost {r.predicted_cost_ms:+.3f} ms on top "
            f"of {r.predicted_all_int8_ms:.3f} ({r.latency_model})"
        )
        if r.measured_ms is not None and r.measured_all_int8_ms is not None:
            text += f"; measured {r.measured_ms:.3f} ms against {r.measured_all_int8_ms:.3f}"
        if r.predicted_ms >= r.predicted_float_ms:
            text += (
                f"; that is predicted to be no faster than {r.float_precision.upper()} throughout "
                f"({r.predicted_float_ms:.3f} ms): build --precision {r.float_precision} instead"
            )
        return text


def find_mixed(
    made: QuantizedGraph,
    crops: npt.NDArray[np.uint8],
    evaluate: Callable[[frozenset[str]], tuple[float, frozenset[str]]],
    latency: LatencyModel,
    *,
    max_drop: float,
    all_int8_drop: float,
    float_precision: str,
    threads: int | None = None,
) -> Mixed:
    """Search the fastest assignment whose drop fits.

    One convolution, the least sensitive, always stays in INT8: without any the artifact would be
    another precision under INT8's name.

    Args:
        made: the all-INT8 graph.
        crops: calibration crops.
        evaluate: layers in floating point -> drop on the held-out crops in degrees, and the layers
            that really are: a runtime may compute others in floating point beside them.
        latency: of the layers.
        max_drop: what `evaluate` may give at most, degrees.
        all_int8_drop: of the all-INT8 engine.
        float_precision: ``"fp16"`` or ``"fp32"``: what layers outside INT8 run in.
        threads: processor threads.

    Raises:
        NotReachedError: no assignment fits; the message names the best found.
    """
    sensitivity = sensitivity_of(made, _held_back(crops), threads=threads)
    nodes = GraphView(made.source).nodes
    ranked = sensitivity.ranked()
    last = [s.layer for s in reversed(ranked) if nodes[s.layer].op_type == "Conv"][:1]
    real: dict[frozenset[str], frozenset[str]] = {}

    def drop(kept: frozenset[str]) -> float:
        if not kept:
            return all_int8_drop
        value, real[kept] = evaluate(kept)
        return value

    result = search(
        drop,
        sensitivity,
        latency.integer_ms,
        latency.float_ms,
        max_drop=max_drop,
        never_float=last,
        max_evaluations=MOST_EVALUATIONS,
    )
    kept = real[frozenset(result.keep_float)]
    gains = (latency.float_ms[n] - latency.integer_ms[n] for n in kept)
    record = MixedRecord(
        float_layers=tuple(n for n in latency.float_ms if n in kept),
        float_precision=float_precision,
        all_int8_drop=all_int8_drop,
        predicted_ms=max(0.0, result.fastest + sum(gains)),
        predicted_all_int8_ms=result.fastest,
        predicted_float_ms=sum(latency.float_ms.values()),
        latency_model=latency.source,
        evaluations=result.evaluations,
    )
    return Mixed(made.keeping(kept), record, sensitivity_report(sensitivity, made, latency))


def _held_back(crops: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The crops that the calibration held back."""
    return crops[split_crops(list(crops))[1]]


class MixedBuild:
    """The search as a step of a build: what it measures with, and what it changes.

    Args:
        work: of the build.
        made: the all-INT8 graph.
        crops: calibration crops.
        held_out: what the gate measures on.
        reference: FP32's answers on them.
        drop: of the all-INT8 engine, degrees.
    """

    def __init__(
        self,
        work: Work,
        made: QuantizedGraph,
        crops: CropSet,
        held_out: CropSet,
        reference: Prediction,
        drop: float,
    ) -> None:
        self._work = work
        self._made = made
        self._crops = crops
        self._held_out = held_out
        self._reference = reference
        self._drop = drop
        self._all_int8: Path | None = None

    def run(self, graph: Path, reference: Path, built: BuiltEngine | None) -> Mixed:
        """Search, and replace the file `graph` by what was found.

        Args:
            graph: file of the all-INT8 graph.
            reference: file of the float graph.
            built: the all-INT8 engine; None where the build is deferred.

        Raises:
            NotReachedError: no assignment keeps the drop.
        """
        work, request = self._work, self._work.request
        here = built is not None and runs_here(
            work.plan.kind, built.target.compute_capabilities, work.device
        )
        totals = None
        if built is not None and here:
            path = built.path

            def totals() -> tuple[float, float]:
                return self._totals(path, reference)

        latency = latency_model(
            work.plan, self._made, request.batch[1], threads=request.threads, totals=totals
        )
        budget = self._budget(graph, here)
        try:
            found = find_mixed(
                self._made,
                self._crops.crops,
                self._evaluate,
                latency,
                max_drop=budget,
                all_int8_drop=self._drop,
                float_precision="fp16" if work.plan.half else "fp32",
                threads=request.threads,
            )
        except NotReachedError as e:
            less = ""
            if budget < request.max_drop:
                less = (
                    f" ({request.max_drop:g} are allowed, less what the engine itself loses "
                    "against its emulation)"
                )
            raise NotReachedError(
                f"no artifact was made: on {self._held_out.source}, {e}{less}", e.best
            ) from e
        if built is not None and here:
            self._all_int8 = work.writer.scratch / f"all-int8{built.path.suffix}"
            shutil.copyfile(built.path, self._all_int8)
        write_graph(found.graph, graph)
        return found

    def rebuild(self, mixed: Mixed, graph: Path, built: BuiltEngine) -> BuiltEngine:
        """The engine of the mixed graph in the place of the all-INT8 one.

        Raises:
            CompatibilityError: other layers than those named are outside INT8.
        """
        work = self._work
        if work.place is None:
            raise EnvironmentalError("an engine can only be built again where it was built")
        for name in built.engine.files:
            (work.writer.path / name).unlink()
        return build_here(
            work.plan,
            work.place,
            graph,
            work.writer.path,
            work.request.batch,
            work.request.threads,
            mixed=mixed.record,
        )

    def timed(self, mixed: Mixed, built: BuiltEngine) -> Mixed:
        """The same with measured times of both engines, where they run here."""
        if self._all_int8 is None:
            return mixed
        ms = compare_engines(
            self._work.plan.kind,
            built.path,
            self._all_int8,
            batch_of(self._held_out, self._work.request.batch[1]),
            self._work.request.threads,
        )
        record = msgspec.structs.replace(
            mixed.record, measured_ms=round(ms[0], 4), measured_all_int8_ms=round(ms[1], 4)
        )
        return replace(mixed, record=record)

    def _evaluate(self, kept: frozenset[str]) -> tuple[float, frozenset[str]]:
        """The drop with these layers in floating point, and those that really are.

        OpenVINO computes some convolutions in FP32 although they are quantised, where their
        neighbours are not. Such a layer loses accuracy and wins no time: it is given back too.
        """
        work = self._work
        path = work.writer.scratch / "candidate.onnx"
        kind, threads = emulator(work.plan), work.request.threads
        while True:
            write_graph(self._made.keeping(kept), path)
            with open_engine(kind, path, threads=threads, batch=BATCH) as engine:
                audit = getattr(engine, "audit", None) if kind == work.plan.kind else None
                beside = outside_int8(audit, convolutions_of(path)) - kept if audit else frozenset()
                if not beside or not beside <= set(layers_of(self._made)):
                    answers = predict(engine, self._held_out.crops, BATCH)
                    return mean_drop(self._reference, answers, self._held_out), kept
            kept |= beside
            if kept >= set(convolutions_of(path)):
                # The float network, which is no INT8 artifact however well it does.
                return math.inf, kept

    def _budget(self, graph: Path, here: bool) -> float:
        """The gate, less what the engine loses more than the emulation that the search runs."""
        limit = self._work.request.max_drop
        if not here or self._work.plan.kind in PROCESSOR_ENGINES:
            return limit
        answers, _ = run_graph(emulator(self._work.plan), graph, self._held_out)
        emulated = mean_drop(self._reference, answers.clean, self._held_out)
        return max(0.0, limit - max(0.0, self._drop - emulated))

    def _totals(self, integer: Path, reference: Path) -> tuple[float, float]:
        work = self._work
        if work.plan.kind not in PROCESSOR_ENGINES:
            return against_half(work, onnx_model(reference), integer, self._held_out)
        crops = batch_of(self._held_out, work.request.batch[1])
        return compare_engines(work.plan.kind, integer, reference, crops, work.request.threads)


def against_half(
    work: Work, model: onnx.ModelProto, integer: Path, held_out: CropSet
) -> tuple[float, float]:
    """Median milliseconds of an INT8 engine and of the FP16 engine of the same float graph.

    Raises:
        EnvironmentalError: not on the device.
    """
    if work.place is None:
        raise EnvironmentalError("INT8 and FP16 can only be compared on the device")
    folder, request = work.writer.scratch, work.request
    half = half_graph(model) if work.place.knows_half_scales else model
    path = write_graph(half, folder / "fp16.onnx")
    other = build_here(work.plan.in_half(), work.place, path, folder, request.batch)
    crops = batch_of(held_out, request.batch[1])
    return compare_engines(work.plan.kind, integer, other.path, crops)


def batch_of(held_out: CropSet, batch: int) -> npt.NDArray[np.uint8]:
    """The first `batch` held-out crops, repeated where there are fewer."""
    return np.ascontiguousarray(np.resize(held_out.crops, (batch, *held_out.crops.shape[1:])))
