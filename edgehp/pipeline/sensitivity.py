"""The sensitivity of a build's layers: measured on held-back crops, and as a report."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import numpy.typing as npt

from edgehp.artifact.check import Artifact
from edgehp.errors import CompatibilityError, UsageError
from edgehp.files import sha256_file
from edgehp.networks.bundled import Network, resolve_network
from edgehp.pipeline.graphs import REFERENCE_GRAPH, QuantizedGraph, onnx_model
from edgehp.quantization.compare import Comparison, Difference
from edgehp.quantization.latency import LatencyModel
from edgehp.quantization.qdq import quantized_layers
from edgehp.quantization.sensitivity import Sensitivity, measure_sensitivity
from edgehp.targets import load_target

__all__ = [
    "layers_of",
    "quantized_graph_of",
    "sensitivity_of",
    "sensitivity_report",
    "sensitivity_values",
]


# Crops that the sensitivity is measured on: enough to rank layers, and two graphs a layer are run.
MOST_COMPARED = 64
SCHEMA_VERSION = 1


def layers_of(made: QuantizedGraph) -> tuple[str, ...]:
    """The layers that the graph quantizes, in graph order."""
    return quantized_layers(made.model)


def sensitivity_of(
    made: QuantizedGraph,
    crops: npt.NDArray[np.uint8],
    *,
    most: int = MOST_COMPARED,
    threads: int | None = None,
) -> Sensitivity:
    """What each layer's INT8 costs on crops that the ranges were not measured on.

    Args:
        made: the quantized graph.
        crops: uint8 [N, S, S, 3].
        most: how many of them to use, evenly spread.
        threads: processor threads.
    """
    chosen = crops[:: max(1, -(-len(crops) // most))]
    return measure_sensitivity(
        made.model, made.source, Comparison(made.source, chosen, threads=threads)
    )


def quantized_graph_of(artifact: Artifact) -> QuantizedGraph:
    """The Q/DQ graph of an artifact, and the float graph that it was made from.

    Args:
        artifact: of INT8.

    Raises:
        UsageError: the artifact is not quantized.
        CompatibilityError: the network that it was made from is another one now.
    """
    manifest = artifact.manifest
    record = manifest.calibration
    if record is None or record.table is None:
        raise UsageError(
            f"{artifact.path} is {manifest.precision.asked}: without scales nothing is sensitive\n"
            "hint: give an INT8 artifact"
        )
    return QuantizedGraph(
        model=onnx_model(artifact.graph_path),
        source=_network(artifact).graph(),
        flavor=load_target(manifest.target.name).flavour,
        method=record.method,
        table=(artifact.path / record.table).read_text(encoding="utf-8"),
        recipe=None,
    )


def _network(artifact: Artifact) -> Network:
    record, own = artifact.manifest.network, artifact.path / REFERENCE_GRAPH
    network = resolve_network(str(own) if own.is_file() else record.source)
    if not own.is_file() and sha256_file(network.path) != record.weights_sha256:
        raise CompatibilityError(
            f"{record.source} is not the network that {artifact.path} was made from: its SHA-256 "
            f"is not {record.weights_sha256[:16]}...\nhint: build the artifact again"
        )
    return network


def sensitivity_values(
    found: Sensitivity, made: QuantizedGraph, latency: LatencyModel | None = None
) -> dict[str, Any]:
    """The table as a dictionary for JSON, in graph order.

    ``degrees`` of a layer is its ``alone.angles``: what `edgehp report` draws.

    Args:
        found: the sensitivity.
        made: the graph it is of.
        latency: prices of the layers, where they are known.
    """
    kinds = {n.name: n.op_type for n in made.source.graph.node}
    return {
        "kind": "sensitivity",
        "schema": SCHEMA_VERSION,
        "flavour": made.flavor,
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
    found: Sensitivity, made: QuantizedGraph, latency: LatencyModel | None = None
) -> str:
    """`sensitivity_values` as the text of a file."""
    values = sensitivity_values(found, made, latency)
    return json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _difference(d: Difference) -> dict[str, float]:
    return {"angles": d.angles, "spread": d.spread, "worst": d.worst}
