"""The graphs of a build: FP32 reference, and the one the engine is made from."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgehp.errors import DataError, UsageError
from edgehp.networks.bundled import BUNDLED, Network, resolve_network
from edgehp.networks.graph import graph_bytes
from edgehp.quantization.halves import to_half_body
from edgehp.quantization.lint import lint
from edgehp.quantization.quantise import QuantisedModel, emit, quantise

if TYPE_CHECKING:
    import onnx

    from edgehp.quantization.lint import Finding

__all__ = [
    "REFERENCE_GRAPH",
    "QuantisedGraph",
    "half_graph",
    "onnx_model",
    "open_network",
    "quantised_graph",
    "write_graph",
]

# `edgehp validate` takes the FP32 reference from here where a name alone does not find it.
REFERENCE_GRAPH = "reference.onnx"


@dataclass(frozen=True)
class QuantisedGraph:
    """A Q/DQ graph and how it came about.

    Attributes:
        model: the graph.
        table: calibration table as JSON.
        method: calibration method chosen.
        found: everything known of it, to emit it again with other layers in floating point.
        half: whether its body is FP16.
    """

    model: onnx.ModelProto
    table: str
    method: str
    found: QuantisedModel
    half: bool

    def keeping(self, layers: Collection[str], *, half: bool | None = None) -> onnx.ModelProto:
        """The graph with these layers in floating point, linted.

        Args:
            layers: names of nodes.
            half: another type of the body than the graph's own.

        Raises:
            UsageError: no such layer.
            DataError: the lint finds something.
        """
        kept = self.found.recipe.keep_float | frozenset(layers)
        model = emit(
            self.found.source,
            self.found.source_table,
            replace(self.found.recipe, keep_float=kept),
            flavour=self.found.flavour,
            body="fp16" if (self.half if half is None else half) else "fp32",
        )
        cpu = self.found.flavour == "cpu"
        _require_clean(lint(model, self.found.flavour, keep_float=kept, head=cpu))
        return model


def open_network(text: str, input_size: int | None) -> tuple[Network, bool, Network | None]:
    """The network a user named, whether the name alone finds it again, and the unresized one.

    Args:
        text: bundled name or file.
        input_size: another input side in pixels, or None.

    Returns:
        The network; whether its name is enough to open it again; and, where `input_size` is not
        the side that its weights were trained for, the network at that side.

    Raises:
        UsageError: no such network, or a size that cannot be changed.
        CheckpointError, EnvironmentalError: as `resolve_network`.
    """
    network = resolve_network(text)
    own = network.spec.preprocessing.size
    if input_size is None or input_size == own:
        return network, text in BUNDLED, None
    if network.weights is None:
        raise UsageError(
            f"{text} is a graph for crops of {own} pixels; its size is fixed: give the checkpoint "
            f"to build for {input_size}"
        )
    return replace(network, spec=network.spec.with_size(input_size)), False, network


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
    _require_clean(found.findings)
    return QuantisedGraph(found.model, found.table.to_json(), found.chosen, found, half)


def _require_clean(findings: Sequence[Finding]) -> None:
    if findings:
        first = findings[0]
        more = f" ({len(findings) - 1} more)" if len(findings) > 1 else ""
        raise DataError(
            f"the quantised graph breaks the rule {first.rule} at {first.node}: {first.message}; "
            f"{first.remedy}{more}"
        )


def half_graph(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with an FP16 body between FP32 normalisation and decode."""
    return to_half_body(model)[0]


def write_graph(model: onnx.ModelProto, path: Path) -> Path:
    """Write a graph as one file, the same bytes for the same graph."""
    path.write_bytes(graph_bytes(model))
    return path


def onnx_model(path: Path) -> onnx.ModelProto:
    """The graph in a file that edgehp wrote."""
    import onnx

    return onnx.load(str(path))
