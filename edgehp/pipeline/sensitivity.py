"""The sensitivity of a build's layers: measured on held-back crops, and as a report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgehp.artifact.check import Artifact
from edgehp.artifact.manifest import Calibration
from edgehp.errors import CompatibilityError, UsageError
from edgehp.files import sha256_bytes, sha256_file
from edgehp.networks.bundled import Network, resolve_network
from edgehp.pipeline.crops import CropSet, calibration_list, load_calibration
from edgehp.pipeline.graphs import REFERENCE_GRAPH, QuantisedGraph, onnx_model
from edgehp.quantization.graphview import GraphView
from edgehp.quantization.latency import LatencyModel
from edgehp.quantization.placement import quantisable_layers
from edgehp.quantization.quantise import AUTO, quantise
from edgehp.quantization.select import Difference, Judge, Subset, split_crops
from edgehp.quantization.sensitivity import Sensitivity, measure_sensitivity
from edgehp.quantization.table import CalibrationTable
from edgehp.quantization.thresholds import METHODS
from edgehp.targets import load_target

if TYPE_CHECKING:
    import onnx

__all__ = [
    "layers_of",
    "quantised_again",
    "sensitivity_of",
    "sensitivity_report",
    "sensitivity_values",
]


# Crops that the sensitivity is measured on: enough to rank layers, and two graphs a layer are run.
MOST_JUDGED = 64
SCHEMA_VERSION = 1


def layers_of(made: QuantisedGraph) -> tuple[str, ...]:
    """The layers that the graph quantises, in graph order."""
    view = GraphView(made.found.source)
    kept = made.found.recipe.keep_float
    return tuple(n for n in quantisable_layers(view, made.found.flavour) if n not in kept)


def sensitivity_of(
    made: QuantisedGraph,
    crops: npt.NDArray[np.uint8],
    *,
    most: int = MOST_JUDGED,
    threads: int | None = None,
) -> Sensitivity:
    """What each layer's INT8 costs, on crops that the calibration held back.

    Args:
        made: the quantised graph.
        crops: all calibration crops [N, S, S, 3]; those that `quantise` held back are used.
        most: how many of them.
        threads: processor threads.
    """
    held = split_crops(list(crops))[1]
    chosen = held[:: max(1, -(-len(held) // most))]
    judge = Judge(made.found.source, Subset(list(crops), chosen), threads=threads)
    # The FP32 body: what counts here is INT8's share, and a graph is emitted several times faster.
    return measure_sensitivity(
        lambda recipe: made.keeping(recipe.keep_float, half=False),
        made.found.recipe,
        layers_of(made),
        judge,
    )


def quantised_again(
    artifact: Artifact, calibration: Path | None = None, *, threads: int | None = None
) -> tuple[QuantisedGraph, CropSet]:
    """Repeat the quantisation of an artifact: same network, same crops, same choices.

    The Q/DQ graph that comes out is compared with the artifact's, so that what is measured on it
    is about this artifact.

    Args:
        artifact: of INT8.
        calibration: the crops it was calibrated on, where those were not the shipped ones.
        threads: processor threads.

    Raises:
        UsageError: the artifact is not quantised, or its crops must be given.
        CompatibilityError: other crops or another network than it was made from, or a graph that
            is not the artifact's.
    """
    manifest = artifact.manifest
    record = manifest.calibration
    if record is None or record.table is None:
        raise UsageError(
            f"{artifact.path} is {manifest.precision.asked}: without scales nothing is sensitive; "
            "give an INT8 artifact"
        )
    network = _network(artifact)
    crops = _crops(artifact, record, calibration)
    method, options = _choices(record.method, artifact.path)
    stored = onnx_model(artifact.graph_path)
    half = any(t.data_type == t.FLOAT16 for t in stored.graph.initializer)
    flavour = load_target(manifest.target.name).flavour
    found = quantise(
        network.graph(),
        list(crops.crops),
        network.spec,
        flavour=flavour,
        method=method,
        body="fp16" if half else "fp32",
        table=CalibrationTable.load(artifact.path / record.table),
        threads=threads,
        **options,
    )
    made = QuantisedGraph(found.model, found.table.to_json(), record.method, found, half)
    mixed = manifest.precision.mixed
    same = made.model if mixed is None else made.keeping(mixed.float_layers)
    if (fault := _other_than(stored, same)) is not None:
        raise CompatibilityError(
            f"quantising again gave another graph than {artifact.path} holds ({fault}): it was "
            "made by another version of edgehp; build it again"
        )
    return made, crops


def _other_than(one: onnx.ModelProto, other: onnx.ModelProto) -> str | None:
    """What two graphs differ in beyond the digits that a table's file drops; None for nothing."""
    from onnx import numpy_helper

    kinds = ([(n.op_type, n.name) for n in m.graph.node] for m in (one, other))
    if next(kinds) != next(kinds):
        return "its nodes"
    a, b = (
        {str(t.name): np.asarray(numpy_helper.to_array(t)) for t in m.graph.initializer}
        for m in (one, other)
    )
    for name in a.keys() | b.keys():
        x, y = a.get(name), b.get(name)
        if x is None or y is None or x.shape != y.shape or x.dtype != y.dtype:
            return name
        # A scale on the verge moves a weight by one level.
        relative, least = (0.0, 1.0) if np.issubdtype(x.dtype, np.integer) else (0.01, 1e-3)
        if not np.allclose(x.astype(np.float64), y.astype(np.float64), relative, least):
            return name
    return None


def _network(artifact: Artifact) -> Network:
    record, own = artifact.manifest.network, artifact.path / REFERENCE_GRAPH
    network = resolve_network(str(own) if own.is_file() else record.source)
    if not own.is_file() and sha256_file(network.path) != record.weights_sha256:
        raise CompatibilityError(
            f"{record.source} is not the network that {artifact.path} was made from: its SHA-256 "
            f"is not {record.weights_sha256[:16]}...; build the artifact again"
        )
    return network


def _crops(artifact: Artifact, record: Calibration, given: Path | None) -> CropSet:
    manifest = artifact.manifest
    if given is None and manifest.build.recipe.get("calibration") is not None:
        raise UsageError(
            f"{artifact.path} was calibrated on {record.source}: give it with --calibration"
        )
    crops = load_calibration(given, manifest.preprocessing)
    if sha256_bytes(calibration_list(crops)) != record.list_sha256:
        raise CompatibilityError(
            f"{given or crops.source}: not the {record.count} crops that {artifact.path} was "
            "calibrated on; give those, or build the artifact again"
        )
    return crops


def _choices(text: str, where: Path) -> tuple[str, dict[str, Any]]:
    """Method and options of `quantise` that give what `QuantisedModel.chosen` says."""
    method, *more = text.split("+")
    known = method in METHODS
    if known and "exact" in more and "rounded" not in more:
        # No option asks for the exact picture alone: what chose it once chooses it again.
        return AUTO, {}
    options: dict[str, Any] = {"bias_correction": False, "equalisation": 0.0}
    for part in more:
        if part == "bias":
            options["bias_correction"] = True
        elif part == "rounded":
            # The name does not say which of both was rounded: it is chosen again, the same way.
            options |= {"rounding": True, "bias_correction": None}
        elif part in ("exact", "full"):
            continue  # a part of rounding, which chooses between the two in the same way
        elif part.startswith("equal"):
            try:
                options["equalisation"] = float(part.removeprefix("equal"))
            except ValueError:
                known = False
        else:
            known = False
    if not known:
        raise UsageError(
            f"{where} was quantised by {text!r}, which cannot be repeated from the calibration "
            "crops alone"
        )
    return method, options


def sensitivity_values(
    found: Sensitivity, made: QuantisedGraph, latency: LatencyModel | None = None
) -> dict[str, Any]:
    """The table as a dictionary for JSON, in graph order.

    ``degrees`` of a layer is its ``alone.angles``: what `edgehp report` draws.

    Args:
        found: the sensitivity.
        made: the graph it is of.
        latency: prices of the layers, where they are known.
    """
    kinds = {n.name: n.op_type for n in made.found.source.graph.node}
    return {
        "kind": "sensitivity",
        "schema": SCHEMA_VERSION,
        "flavour": made.found.flavour,
        "method": made.method,
        "latency_model": None if latency is None else latency.source,
        "all_int8": _difference(found.full),
        "layers": [
            {
                "name": s.layer,
                "operator": kinds.get(s.layer),
                "degrees": s.alone.angles,
                "gain": s.gain,
                "alone": _difference(s.alone),
                "left_out": _difference(s.left_out),
                "int8_ms": None if latency is None else latency.integer_ms[s.layer],
                "float_ms": None if latency is None else latency.float_ms[s.layer],
            }
            for s in found.layers
        ],
    }


def sensitivity_report(
    found: Sensitivity, made: QuantisedGraph, latency: LatencyModel | None = None
) -> str:
    """`sensitivity_values` as the text of a file."""
    values = sensitivity_values(found, made, latency)
    return json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _difference(d: Difference) -> dict[str, float]:
    return {"angles": d.angles, "spread": d.spread, "worst": d.worst}
