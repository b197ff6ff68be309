"""Float graph and face crops in, checked Q/DQ graph out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import numpy.typing as npt

from edgehp._memory import keep_little
from edgehp.errors import DataError, UsageError
from edgehp.progress import step
from edgehp.quantization.compare import Comparison, Difference, split_crops
from edgehp.quantization.lint import lint
from edgehp.quantization.qdq import Emitter
from edgehp.quantization.ranges import METHODS
from edgehp.quantization.recipe import Recipe
from edgehp.quantization.rounding import round_layers
from edgehp.quantization.table import CalibrationTable, calibrate

if TYPE_CHECKING:
    import onnx

AUTO = "auto"
# Activations of a batch are larger: kept by the C library they made the peak 60 to 90 MiB higher,
# and another one in every run.
_LARGE = 512 * 1024

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class QuantizationConfig:
    """How to quantize.

    Attributes:
        flavor: one of `recipe.FLAVORS`.
        method: a calibration method of `edgehp.quantization.ranges.METHODS`, or ``"auto"``: the one
            nearest to FP32 on the held-back crops.
        rounding: True rounds the weights of a layer jointly, False each to the nearest integer;
            None does so jointly where that is nearer to FP32 on the held-back crops.
        body: ``"fp32"`` or, ``tensorrt`` only, ``"fp16"``: what is computed outside of Q/DQ.
        float_layers: nodes that stay in floating point.
        threads: of the processor; None takes all cores.
    """

    flavor: str
    method: str = AUTO
    rounding: bool | None = None
    body: str = "fp32"
    float_layers: tuple[str, ...] = ()
    threads: int | None = None

    def __post_init__(self) -> None:
        """Refuse a method that does not exist; the graph's emitter looks at the rest."""
        if self.method not in (AUTO, *METHODS):
            raise UsageError(
                f"unknown calibration method {self.method!r}; known: {AUTO}, {', '.join(METHODS)}"
            )

    @classmethod
    def of(cls, recipe: Recipe, threads: int | None = None) -> QuantizationConfig:
        """What repeats a quantization."""
        return cls(
            flavor=recipe.flavor,
            method=recipe.method,
            rounding=recipe.rounding == "joint",
            body=recipe.body,
            float_layers=recipe.float_layers,
            threads=threads,
        )


@dataclass(frozen=True)
class Candidate:
    """A recipe that was tried, and its graph's difference to FP32 on the held-back crops."""

    recipe: Recipe
    difference: Difference


@dataclass(frozen=True)
class QuantizedModel:
    """A Q/DQ graph and how it came about.

    Attributes:
        model: the Q/DQ graph.
        recipe: the choices that it was made with.
        difference: to FP32 on the held-back crops.
        table: the ranges of the activations.
        candidates: what was tried, `recipe` among it.
        held_back: number of crops that the candidates were compared on.
    """

    model: onnx.ModelProto
    recipe: Recipe
    difference: Difference
    table: CalibrationTable
    candidates: tuple[Candidate, ...]
    held_back: int


def quantize(
    model: onnx.ModelProto, crops: Sequence[npt.NDArray[np.uint8]], config: QuantizationConfig
) -> QuantizedModel:
    """Calibrate, choose ranges and rounding by the difference to FP32, emit and lint.

    Args:
        model: the deployed float graph.
        crops: uint8 [S, S, 3] RGB. Some of them are held back to compare on (`split_crops`); the
            others calibrate.
        config: how.

    Raises:
        UsageError: an unknown flavor, body or layer.
        DataError: crops of the wrong kind, or a graph that cannot be quantized.
        EnvironmentalError: onnx or onnxruntime is missing.
    """
    if len(crops) == 0:
        raise DataError("no calibration crops: expected at least one")
    keep_little(_LARGE)
    emitter = Emitter(model, config.flavor, config.body, config.float_layers)
    chosen, held = split_crops(crops)
    own = [crops[i] for i in chosen]
    methods = tuple(METHODS) if config.method == AUTO else (config.method,)
    with step("ranges"):
        table = calibrate(
            model, own, methods=methods, flavors=(config.flavor,), threads=config.threads
        )
    comparison = Comparison(model, [crops[i] for i in held], threads=config.threads)

    def tried(graph: onnx.ModelProto, method: str, rounding: str) -> Candidate:
        choices = {
            "flavor": config.flavor,
            "method": method,
            "rounding": rounding,
            "body": config.body,
            "float_layers": config.float_layers,
        }
        recipe = msgspec.convert(choices, Recipe)
        with step(str(recipe)):
            difference = comparison(graph)
        _log.info("%s: mean |angle difference| to FP32 %.4f degrees", recipe, difference.angles)
        return Candidate(recipe, difference)

    candidates = [tried(emitter(table, m), m, "nearest") for m in methods]
    best = min(candidates, key=_distance)
    rounded = None
    if config.rounding is not False:
        method = best.recipe.method
        rounded = round_layers(emitter, table, method, own, threads=config.threads)
        joint = tried(emitter(table, method, rounded), method, "joint")
        candidates.append(joint)
        if config.rounding or _distance(joint) < _distance(best):
            best = joint
        else:
            rounded = None
    if not np.isfinite(best.difference.angles):
        raise DataError("no quantized candidate computes finite angles; the crops may be damaged")
    graph = emitter(table, best.recipe.method, rounded)
    if findings := lint(graph, config.flavor, emitter.placement):
        more = f" and {len(findings) - 1} more" if len(findings) > 1 else ""
        raise DataError(f"the quantized graph breaks a rule{more}: {findings[0]}")
    return QuantizedModel(graph, best.recipe, best.difference, table, tuple(candidates), len(held))


def _distance(candidate: Candidate) -> float:
    angles = candidate.difference.angles
    return angles if np.isfinite(angles) else np.inf
