"""The graphs of a build: FP32 reference, and the one the engine is made from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgehp.errors import DataError, UsageError
from edgehp.networks.bundled import BUNDLED, Network, resolve_network
from edgehp.networks.graph import graph_bytes
from edgehp.quantization.halves import to_half_body
from edgehp.quantization.quantise import quantise

if TYPE_CHECKING:
    import onnx

__all__ = ["QuantisedGraph", "half_graph", "open_network", "quantised_graph", "write_graph"]


@dataclass(frozen=True)
class QuantisedGraph:
    """A Q/DQ graph and how it came about.

    Attributes:
        model: the graph.
        table: calibration table as JSON.
        method: calibration method chosen.
    """

    model: onnx.ModelProto
    table: str
    method: str


def open_network(text: str, input_size: int | None) -> tuple[Network, bool]:
    """The network a user named, and whether the name alone finds it again.

    Args:
        text: bundled name or file.
        input_size: another input side in pixels, or None.

    Raises:
        UsageError: no such network, or a size that cannot be changed.
        CheckpointError, EnvironmentalError: as `resolve_network`.
    """
    network = resolve_network(text)
    own = network.spec.preprocessing.size
    if input_size is None or input_size == own:
        return network, text in BUNDLED
    if network.weights is None:
        raise UsageError(
            f"{text} is a graph for crops of {own} pixels; its size is fixed: give the checkpoint "
            f"to build for {input_size}"
        )
    return replace(network, spec=network.spec.with_size(input_size)), False


def quantised_graph(
    model: onnx.ModelProto,
    crops: npt.NDArray[np.uint8],
    network: Network,
    flavour: str,
    method: str,
    *,
    half: bool,
    threads: int | None = None,
) -> QuantisedGraph:
    """The Q/DQ graph of a float graph, linted.

    Args:
        model: the deployed float graph.
        crops: calibration crops uint8 [N, S, S, 3].
        network: whose graph it is.
        flavour: ``"cpu"`` or ``"tensorrt"``.
        method: calibration method or ``"auto"``.
        half: whether the body is FP16.
        threads: processor threads.

    Raises:
        DataError: the lint finds what the engine would refuse or compute slowly or wrongly.
    """
    found = quantise(
        model,
        list(crops),
        network.spec,
        flavour=flavour,
        method=method,
        body="fp16" if half else "fp32",
        threads=threads,
    )
    if found.findings:
        first = found.findings[0]
        more = f" ({len(found.findings) - 1} more)" if len(found.findings) > 1 else ""
        raise DataError(
            f"the quantised graph breaks the rule {first.rule} at {first.node}: {first.message}; "
            f"{first.remedy}{more}"
        )
    return QuantisedGraph(found.model, found.table.to_json(), found.chosen)


def half_graph(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with an FP16 body between FP32 normalisation and decode."""
    return to_half_body(model)[0]


def write_graph(model: onnx.ModelProto, path: Path) -> Path:
    """Write a graph as one file, the same bytes for the same graph."""
    path.write_bytes(graph_bytes(model))
    return path
