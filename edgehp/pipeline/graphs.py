"""The graphs of a build: FP32 reference, and the one the engine is made from."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgehp.errors import UsageError
from edgehp.networks.bundled import BUNDLED, Network, resolve_network
from edgehp.networks.graph import graph_bytes
from edgehp.quantization.half import to_half_body
from edgehp.quantization.qdq import remove_qdq
from edgehp.quantization.quantize import QuantizationConfig, quantize
from edgehp.quantization.recipe import Recipe

if TYPE_CHECKING:
    import onnx

__all__ = [
    "REFERENCE_GRAPH",
    "QuantizedGraph",
    "half_graph",
    "onnx_model",
    "open_network",
    "quantized_graph",
    "write_graph",
]

# `edgehp validate` takes the FP32 reference from here where a name alone does not find it.
REFERENCE_GRAPH = "reference.onnx"


@dataclass(frozen=True)
class QuantizedGraph:
    """A Q/DQ graph and how it came about.

    Attributes:
        model: the graph.
        source: the float graph it was made from.
        flavor: where its Q/DQ pairs are, and the type of its activations.
        method: how its ranges were found and its weights rounded, for people.
        table: calibration table as JSON.
        recipe: the choices it was made with; None where it comes from an artifact.
    """

    model: onnx.ModelProto
    source: onnx.ModelProto
    flavor: str
    method: str
    table: str
    recipe: Recipe | None

    def keeping(self, layers: Collection[str]) -> onnx.ModelProto:
        """The graph with these layers in floating point.

        Raises:
            UsageError: no such layer.
        """
        return remove_qdq(self.model, layers, self.source)


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


def quantized_graph(
    model: onnx.ModelProto,
    crops: npt.NDArray[np.uint8],
    config: QuantizationConfig,
) -> QuantizedGraph:
    """The Q/DQ graph of a float graph, linted.

    Args:
        model: the deployed float graph.
        crops: calibration crops uint8 [N, S, S, 3].
        config: how to quantize.

    Raises:
        DataError: the lint finds what the engine would refuse or compute slowly or wrongly.
    """
    found = quantize(model, list(crops), config)
    recipe = found.recipe
    return QuantizedGraph(
        found.model, model, recipe.flavor, str(recipe), found.table.to_json(), recipe
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
