"""Mixed precision: which layers go back to floating point so that the drop fits, and at what cost.

Called only where the all-INT8 engine misses the gate. Layers go back in order of degrees gained per
predicted millisecond, as few as the gate asks for.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import numpy.typing as npt

from edgehp.artifact.manifest import MixedRecord
from edgehp.engines import PROCESSOR_ENGINES, open_engine
from edgehp.engines.base import Prediction
from edgehp.errors import AccuracyError
from edgehp.networks.graph import graph_bytes
from edgehp.pipeline.accuracy import BATCH, emulator, mean_drop, predict, run_graph, runs_here
from edgehp.pipeline.crops import CropSet
from edgehp.pipeline.engine import (
    BuiltEngine,
    compare_engines,
    convolutions_of,
    outside_int8,
)
from edgehp.pipeline.plan import BuildContext
from edgehp.pipeline.sensitivity import (
    LatencyModel,
    Sensitivity,
    measure_sensitivity,
    predict_latency,
    sensitivity_report,
)
from edgehp.quantization.qdq import quantized_layers, remove_qdq

if TYPE_CHECKING:
    import onnx

logger = logging.getLogger(__name__)
# The ratio of a layer that INT8 does not speed up stays finite: it goes back first.
_SMALLEST_COST_MS = 1e-6

# Layers in floating point -> the drop in degrees, and the layers that really are.
Evaluation = Callable[[frozenset[str]], tuple[float, frozenset[str]]]


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


def rank_layers(sensitivity: Sensitivity, latency: LatencyModel) -> list[str]:
    """Layers in the order in which they go back: most degrees gained per millisecond first."""

    def worth(row: int) -> float:
        s = sensitivity.layers[row]
        # Errors cancel: a layer whose gain is noise still shows its own error.
        degrees = max(s.gain, 0.0) + 0.25 * s.alone.angles
        cost = latency.float_ms[s.layer] - latency.integer_ms[s.layer]
        return degrees / max(cost, _SMALLEST_COST_MS)

    order = sorted(range(len(sensitivity.layers)), key=lambda row: -worth(row))
    return [sensitivity.layers[row].layer for row in order]


@dataclass(frozen=True)
class Assignment:
    """Layers in floating point, the drop measured for them, and how many graphs were measured."""

    float_layers: frozenset[str]
    drop: float
    evaluations: int


def shortest_prefix(ranked: Sequence[str], evaluate: Evaluation, max_drop: float) -> Assignment:
    """The fewest of the ranked layers that keep the drop, by bisection.

    Args:
        ranked: layers in the order in which they go back to floating point.
        evaluate: measures the drop of an assignment.
        max_drop: the limit, degrees.

    Raises:
        AccuracyError: not even all of them keep it.
    """
    tried = 1
    drop, kept = evaluate(frozenset(ranked))
    if drop > max_drop:
        raise AccuracyError(
            f"no mixed precision keeps the drop within {max_drop:g} degrees: with all "
            f"{len(ranked)} layers in floating point that may be, it is {drop:.4f}\n"
            "hint: allow a larger drop, or calibrate on crops nearer to the task"
        )
    best = Assignment(kept, drop, tried)
    low, high = 0, len(ranked)  # `low` layers do not keep it, `high` do
    while high - low > 1:
        middle = (low + high) // 2
        drop, kept = evaluate(frozenset(ranked[:middle]))
        tried += 1
        logger.info("%d layers in floating point: drop %.4f", len(kept), drop)
        if drop <= max_drop:
            high, best = middle, Assignment(kept, drop, tried)
        else:
            low = middle
    return replace(best, evaluations=tried)


@dataclass(frozen=True)
class MixedSearch:
    """The search as a step of a build.

    Attributes:
        context: of the build.
        model: the all-INT8 Q/DQ graph.
        source: the float graph that it was made from.
        crops: uint8 [N, S, S, 3] to rank the layers on.
        held_out: what the gate measures on.
        reference: FP32's answers on them.
        drop: of the all-INT8 engine, degrees.
    """

    context: BuildContext
    model: onnx.ModelProto
    source: onnx.ModelProto
    crops: npt.NDArray[np.uint8]
    held_out: CropSet
    reference: Prediction
    drop: float

    def run(self, graph: Path, built: BuiltEngine | None) -> Mixed:
        """Search, and replace the file `graph` by what was found.

        One convolution, the last in the ranking, always stays in INT8: without any, the artifact
        would be another precision under INT8's name.

        Args:
            graph: file of the all-INT8 graph.
            built: the all-INT8 engine; None where the build is deferred.

        Raises:
            AccuracyError: no assignment keeps the drop.
        """
        context, request = self.context, self.context.request
        sensitivity = measure_sensitivity(
            self.model, self.source, self.crops, threads=request.threads
        )
        latency = predict_latency(self.model, self.source, context.plan.target, request.batch[1])
        ranked = rank_layers(sensitivity, latency)
        convolutions = set(convolutions_of(graph))
        for name in reversed(ranked):
            if name in convolutions:
                ranked.remove(name)
                break
        limit = self._limit(graph, built)
        try:
            found = shortest_prefix(ranked, self.evaluate, limit)
        except AccuracyError as e:
            less = ""
            if limit < request.max_drop:
                less = (
                    f" ({request.max_drop:g} are allowed, less what the engine itself loses "
                    "against its emulation)"
                )
            raise AccuracyError(
                f"no artifact was made: on {self.held_out.source}{less}, {e}"
            ) from e
        kept = found.float_layers
        all_int8 = sum(latency.integer_ms.values())
        extra = sum(latency.float_ms[n] - latency.integer_ms[n] for n in kept)
        record = MixedRecord(
            float_layers=tuple(n for n in latency.float_ms if n in kept),
            float_precision=context.plan.float_precision,
            all_int8_drop=self.drop,
            predicted_ms=all_int8 + extra,
            predicted_all_int8_ms=all_int8,
            predicted_float_ms=sum(latency.float_ms.values()),
            latency_model=latency.source,
            evaluations=found.evaluations,
        )
        mixed = remove_qdq(self.model, kept, self.source)
        graph.write_bytes(graph_bytes(mixed))
        return Mixed(mixed, record, sensitivity_report(sensitivity, self.source, latency))

    def evaluate(self, layers: frozenset[str]) -> tuple[float, frozenset[str]]:
        """The drop with these layers in floating point, and those that really are.

        OpenVINO computes some convolutions in FP32 although they are quantized, where their
        neighbors are not. Such a layer loses accuracy and saves no time: it goes back too.
        """
        context = self.context
        path = context.writer.scratch / "candidate.onnx"
        kind, threads = emulator(context.plan), context.request.threads
        quantized = frozenset(quantized_layers(self.model))
        while True:
            path.write_bytes(graph_bytes(remove_qdq(self.model, layers, self.source)))
            with open_engine(kind, path, threads=threads, batch=BATCH) as engine:
                audit = getattr(engine, "audit", None) if kind == context.plan.kind else None
                convolutions = convolutions_of(path)
                outside = outside_int8(audit, convolutions) if audit else frozenset()
                # Those that the quantization itself left out are no part of the search.
                beside = (outside & quantized) - layers
                if not beside:
                    answers = predict(engine, self.held_out.crops, BATCH)
                    return mean_drop(self.reference, answers, self.held_out), layers
            layers |= beside
            if layers >= quantized & set(convolutions):
                # The float network, which is no INT8 artifact however well it does.
                return math.inf, layers

    def keep_all_int8(self, built: BuiltEngine) -> Path | None:
        """A copy of the all-INT8 engine to time the mixed one against, where engines run here."""
        if not self._runs_here(built):
            return None
        copy = self.context.writer.scratch / f"all-int8{built.path.suffix}"
        return Path(shutil.copyfile(built.path, copy))

    def timed(self, mixed: Mixed, built: BuiltEngine, all_int8: Path) -> Mixed:
        """The same with measured times of both engines."""
        request = self.context.request
        crops = batch_of(self.held_out, request.batch[1])
        ms = compare_engines(self.context.plan.kind, built.path, all_int8, crops, request.threads)
        record = msgspec.structs.replace(
            mixed.record, measured_ms=round(ms[0], 4), measured_all_int8_ms=round(ms[1], 4)
        )
        return replace(mixed, record=record)

    def _runs_here(self, built: BuiltEngine) -> bool:
        context = self.context
        return runs_here(context.plan.kind, built.target.compute_capabilities, context.device)

    def _limit(self, graph: Path, built: BuiltEngine | None) -> float:
        """The gate, less what the engine loses more than the emulation that the search runs."""
        plan, limit = self.context.plan, self.context.request.max_drop
        if built is None or plan.kind in PROCESSOR_ENGINES or not self._runs_here(built):
            return limit
        answers = run_graph(emulator(plan), graph, self.held_out).answers
        emulated = mean_drop(self.reference, answers.clean, self.held_out)
        return max(0.0, limit - max(0.0, self.drop - emulated))


def batch_of(held_out: CropSet, batch: int) -> npt.NDArray[np.uint8]:
    """The first `batch` held-out crops, repeated where there are fewer."""
    return np.ascontiguousarray(np.resize(held_out.crops, (batch, *held_out.crops.shape[1:])))
