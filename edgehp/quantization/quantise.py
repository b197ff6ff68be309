"""The one entry that a build calls: float graph and crops in, checked Q/DQ graph out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgehp._memory import keep_little
from edgehp.errors import CompatibilityError, DataError, UsageError
from edgehp.quantization.calibrate import calibrate, preprocessing_digest
from edgehp.quantization.emit_cpu import emit_cpu
from edgehp.quantization.emit_tensorrt import emit_tensorrt
from edgehp.quantization.equalise import equalise
from edgehp.quantization.graphview import network_digest
from edgehp.quantization.lint import Finding, lint
from edgehp.quantization.placement import FLAVOURS
from edgehp.quantization.qdq import Recipe
from edgehp.quantization.reconstruct import reconstruct
from edgehp.quantization.runner import input_of
from edgehp.quantization.select import Difference, Judge, Subset, select, split_crops
from edgehp.quantization.table import CalibrationTable, crops_digest
from edgehp.quantization.thresholds import METHODS

if TYPE_CHECKING:
    import onnx

    from edgehp.networks.spec import NetworkSpec

__all__ = ["AUTO", "QuantisedModel", "emit", "quantise"]

_log = logging.getLogger(__name__)
AUTO = "auto"
_CORRECTED = "+bias"
# Each costs another pass over the crops. Measured: more helps symmetric activations, which have
# one bit less; the best differs from network to network.
_STRENGTHS = (0.5, 0.9)
# Crops that a strength is tried on: enough to rank strengths; the winner is calibrated on all.
_TRIAL = 128
_EXACT, _FULL, _ROUNDED = "+exact", "+full", "+rounded"
# Activations of a batch are larger: kept by the C library they made the peak 60 to 90 MiB higher,
# and another one in every run.
_LARGE = 512 * 1024
# Crops that weights are rounded on. At 112 pixels; larger pictures have more pixels to learn from.
_ROUNDING = 256

Crop = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class QuantisedModel:
    """A Q/DQ graph and how it came about.

    Attributes:
        model: the Q/DQ graph.
        table: the calibration table of the float graph; reuse this one.
        recipe: the choices made.
        scores: candidate -> difference to FP32 on the held-back crops; a name is the method,
            ``"+bias"`` with bias correction, ``"+equalS"`` with equalisation of strength S,
            ``"+exact"`` with the picture quantised exactly, ``"+full"`` with all 256 levels behind
            the stem, ``"+rounded"`` with weights rounded jointly.
        chosen: key of `scores` that `model` is.
        held_back: how many crops the scores were measured on.
        findings: of the lint; empty for a clean graph.
        flavour: ``"tensorrt"`` or ``"cpu"``.
        source: the float graph that was quantised: the one given, or its equalised equal.
        source_table: the calibration table of `source`.
        equalisation: strength, 0 for none.
    """

    model: onnx.ModelProto
    table: CalibrationTable
    recipe: Recipe
    scores: Mapping[str, Difference]
    chosen: str
    held_back: int
    findings: tuple[Finding, ...]
    flavour: str
    source: onnx.ModelProto
    source_table: CalibrationTable
    equalisation: float = 0.0

    @property
    def difference(self) -> Difference:
        """The chosen graph's difference to FP32 on the held-back crops."""
        return self.scores[self.chosen]


@dataclass(frozen=True)
class _Candidate:
    """A way to quantise, ready to be emitted."""

    source: onnx.ModelProto
    table: CalibrationTable
    recipe: Recipe
    equalisation: float
    emitter: Callable[..., onnx.ModelProto]

    def __call__(self) -> onnx.ModelProto:
        return self.with_recipe(self.recipe)

    def with_recipe(self, recipe: Recipe) -> onnx.ModelProto:
        return self.emitter(self.source, self.table, recipe)


def emit(
    model: onnx.ModelProto,
    table: CalibrationTable,
    recipe: Recipe,
    *,
    flavour: str,
    body: str = "fp32",
    head: bool = False,
    quantise_sum: bool = True,
) -> onnx.ModelProto:
    """Emit either flavour; see `emit_tensorrt` and `emit_cpu`.

    Raises:
        UsageError: unknown flavour, or an FP16 body in the ``cpu`` flavour.
    """
    if flavour == "tensorrt":
        return emit_tensorrt(model, table, recipe, body=body, head=head)
    if flavour != "cpu":
        raise UsageError(f"unknown Q/DQ flavour {flavour!r}; known: {', '.join(FLAVOURS)}")
    if body != "fp32":
        raise UsageError("the cpu flavour has an FP32 body: processors compute what is not INT8 so")
    return emit_cpu(model, table, recipe, quantise_sum=quantise_sum)


def quantise(
    model: onnx.ModelProto,
    crops: Sequence[Crop],
    spec: NetworkSpec | None = None,
    *,
    flavour: str,
    method: str = AUTO,
    keep_float: Collection[str] = (),
    body: str = "fp32",
    head: bool = False,
    quantise_sum: bool = True,
    bias_correction: bool | None = None,
    equalisation: float | None = None,
    rounding: bool | None = None,
    table: CalibrationTable | None = None,
    judge: Judge | None = None,
    threads: int | None = None,
) -> QuantisedModel:
    """Calibrate, choose, emit and lint.

    Args:
        model: the deployed float graph (after simplification).
        crops: uint8 [S, S, 3] RGB. One in five is held back and judges the candidates; the rest
            calibrates.
        spec: of the network; its preprocessing must be the one that the graph carries.
        flavour: ``"tensorrt"`` or ``"cpu"``.
        method: a calibration method, or ``"auto"``: the nearest to FP32 on the held-back crops.
        keep_float: names of nodes that stay in floating point.
        body: ``"fp32"`` or, ``tensorrt`` only, ``"fp16"``.
        head: ``tensorrt`` only: Gemm nodes in integers too.
        quantise_sum: ``cpu`` only, see `emit_cpu`.
        bias_correction: True or False; None tries both and keeps the better.
        equalisation: strength 0..1 of the cross-layer equalisation, 0 for none; None tries some
            (with ``"auto"`` only) on some of the crops and keeps the best.
        rounding: True rounds weights jointly on the crops (`edgehp.quantization.reconstruct`) and
            quantises the picture exactly, False does neither; None tries it (with ``"auto"``
            only) and keeps what is nearer.
        table: a table to reuse; it must belong to this graph and to these crops.
        judge: reuse an earlier one (of the same held-back crops).
        threads: of the engine; None takes all cores.

    Raises:
        UsageError: an option that cannot be right.
        DataError: crops of the wrong kind, or a graph that cannot be quantised.
        CompatibilityError: `table` is stale, or `spec` is not the graph's.
        EnvironmentalError: onnx or onnxruntime is missing.
    """
    if method != AUTO and method not in METHODS:
        raise UsageError(
            f"unknown calibration method {method!r}; known: {AUTO}, {', '.join(METHODS)}"
        )
    if len(crops) == 0:
        raise DataError("no calibration crops: expected at least one")
    _same_preprocessing(model, spec)
    keep_little(_LARGE)
    chosen, held = split_crops(crops)
    methods = tuple(METHODS) if method == AUTO else (method,)
    own = Subset(crops, chosen)
    table = _table(model, own, methods, table, threads)
    judge = judge or Judge(model, Subset(crops, held), threads=threads)
    emitter = partial(emit, flavour=flavour, body=body, head=head, quantise_sum=quantise_sum)

    def candidates(
        strength: float, methods: Sequence[str], calibration: Sequence[Crop]
    ) -> dict[str, _Candidate]:
        source, ranges = model, table
        if strength > 0:
            source = equalise(model, table, strength)
            ranges = calibrate(source, calibration, methods=methods, threads=threads)
        options = (False, True) if bias_correction is None else (bias_correction,)
        suffix = f"+equal{strength:g}" if strength > 0 else ""
        return {
            m + (_CORRECTED if b else "") + suffix: _Candidate(
                source, ranges, Recipe(m, {}, frozenset(keep_float), b), strength, emitter
            )
            for m in methods
            for b in options
        }

    tried = candidates(equalisation or 0.0, methods, own)
    selection = select(tried, judge)
    scores = dict(selection.scores)
    best, winner = selection.best, tried[selection.best]
    if equalisation is None and method == AUTO:
        some = own[:: -(-len(own) // _TRIAL)]
        for strength in _STRENGTHS:
            more = candidates(strength, tuple({winner.recipe.method, "mse"}), some)
            found = select(more, judge)
            scores.update(found.scores)
            if scores[found.best].angles < scores[best].angles:
                best, winner = found.best, more[found.best]
            del more  # its equalised graph, unless that is the winner's
        if winner.equalisation > 0 and len(some) < len(own):
            ranges = calibrate(winner.source, own, methods=(winner.recipe.method,), threads=threads)
            winner = replace(winner, table=ranges)
            scores.update(select({best: winner}, judge).scores)
    if rounding or (rounding is None and method == AUTO):
        picture = replace(winner, recipe=replace(winner.recipe, exact_input=True))
        finer = {best + _EXACT: picture}
        if flavour == "tensorrt":
            recipe = replace(picture.recipe, full_stem=True)
            finer[best + _EXACT + _FULL] = replace(picture, recipe=recipe)
        found = select(finer, judge)
        scores.update(found.scores)
        start, few = finer[found.best], own[:: -(-len(own) // _rounding_crops(model))]
        recipe = reconstruct(start.source, start.with_recipe, start.recipe, few, threads=threads)
        name = found.best.replace(_CORRECTED, "") + _ROUNDED
        finer[name] = replace(start, recipe=recipe)
        scores.update(select({name: finer[name]}, judge).scores)
        nearest = min((best, found.best, name), key=lambda n: scores[n].angles)
        best = name if rounding else nearest
        winner = finer.get(best, winner)
    for name, d in scores.items():
        _log.info("%s: mean |angle difference| to FP32 %.4f degrees", name, d.angles)
    quantised = winner()
    return QuantisedModel(
        model=quantised,
        table=table,
        recipe=winner.recipe,
        scores=MappingProxyType(scores),
        chosen=best,
        held_back=len(held),
        findings=lint(quantised, flavour, keep_float=keep_float, head=head or flavour == "cpu"),
        flavour=flavour,
        source=winner.source,
        source_table=winner.table,
        equalisation=winner.equalisation,
    )


def _rounding_crops(model: onnx.ModelProto) -> int:
    _, height, width = input_of(model)
    return max(_ROUNDING // 4, min(_ROUNDING, _ROUNDING * 112 * 112 // (height * width)))


def _same_preprocessing(model: onnx.ModelProto, spec: NetworkSpec | None) -> None:
    if spec is None:
        return
    carried = preprocessing_digest(model)
    if carried and carried != spec.preprocessing.digest:
        raise CompatibilityError(
            f"the graph was built with preprocessing {carried[:12]}, the specification says "
            f"{spec.preprocessing.digest[:12]}; build the graph again from this specification"
        )


def _table(
    model: onnx.ModelProto,
    crops: Sequence[Crop],
    methods: Sequence[str],
    given: CalibrationTable | None,
    threads: int | None,
) -> CalibrationTable:
    if given is None:
        return calibrate(model, crops, threads=threads)
    given.require(
        network=network_digest(model),
        crops=crops_digest(crops),
        preprocessing=preprocessing_digest(model),
        methods=methods,
    )
    return given
