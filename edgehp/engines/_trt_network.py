"""From an ONNX graph to a parsed TensorRT network, and what that network will compute in.

Shared by TensorRT and TensorRT for RTX, whose Python modules have the same classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from edgehp.engines._trt_compat import Dialect, bit
from edgehp.engines.audit import LayerPrecision, PrecisionAudit
from edgehp.engines.base import INPUT_NAME
from edgehp.engines.graph_io import input_size_of
from edgehp.errors import DataError, EnvironmentalError

if TYPE_CHECKING:
    # TensorRT for RTX has the same classes. Checked where the package tensorrt-stubs is installed.
    from tensorrt import (
        Builder,
        Dims,
        IBuilderConfig,
        ILayer,
        INetworkDefinition,
        ITensor,
        OnnxParser,
    )

__all__ = [
    "add_profile",
    "audit_network",
    "check_network",
    "dimensions",
    "keep_decoding_in_float",
    "need",
    "new_network",
    "parse",
]

# Layers that only move or hold data.
_IDLE = frozenset({"CONSTANT", "SHUFFLE", "SHAPE", "SQUEEZE", "UNSQUEEZE", "IDENTITY", "SLICE"})
_MATRIX = ("MATRIX_MULTIPLY", "FULLY_CONNECTED", "CONVOLUTION")


T = TypeVar("T")


def need(value: T | None, what: str, logger: Any) -> T:
    """`value`, unless it is None or False: so TensorRT reports failures.

    Raises:
        EnvironmentalError: it is.
    """
    if value is None or value is False:
        raise EnvironmentalError(f"TensorRT could not {what}: {logger.reasons()}")
    return value


def new_network(trt: Any, builder: Builder, dialect: Dialect, logger: Any) -> INetworkDefinition:
    """An empty network with the flags of the dialect."""
    flags = 0
    for name in dialect.network_flags:
        flags |= bit(trt.NetworkDefinitionCreationFlag, name)
    return need(builder.create_network(flags), "create a network", logger)


def parse(trt: Any, network: INetworkDefinition, path: Path, logger: Any) -> OnnxParser:
    """Read an ONNX file into `network`; the parser returned must outlive the build.

    Raises:
        DataError: TensorRT's parser refuses it; all its reasons are in the one sentence.
    """
    parser: OnnxParser = need(trt.OnnxParser(network, logger), "create an ONNX parser", logger)
    # The path lets the parser find weights stored beside the file.
    if not parser.parse(path.read_bytes(), str(path)):
        reasons = []
        for i in range(parser.num_errors):
            error = parser.get_error(i)
            node = error.node_name() if hasattr(error, "node_name") else ""
            where = f" (node {node or error.node()})" if node or error.node() >= 0 else ""
            reasons.append(" ".join(error.desc().split()) + where)
        text = "; ".join(reasons) or logger.reasons()
        raise DataError(
            f"{path}: TensorRT's parser refuses the graph: {text}; build it again with this "
            "release of edgehp and run its lint"
        )
    return parser


def check_network(network: INetworkDefinition, path: Path) -> int:
    """The input size S of a parsed network.

    Raises:
        DataError: its inputs and outputs are not those of a deployed graph.
    """
    tensors = [network.get_input(i) for i in range(network.num_inputs)]
    inputs = {t.name: (t.dtype.name, dimensions(t.shape)) for t in tensors}
    outputs = [network.get_output(i).name for i in range(network.num_outputs)]
    return input_size_of(inputs, outputs, path)


def dimensions(shape: Dims) -> list[int]:
    """The sizes in a TensorRT shape; -1 is a free one."""
    return [int(shape[i]) for i in range(len(shape))]


def add_profile(
    trt: Any,
    builder: Builder,
    config: IBuilderConfig,
    batch: tuple[int, int, int],
    size: int,
    logger: Any,
) -> None:
    """Tell the builder the smallest, best and largest batch size."""
    profile = need(builder.create_optimization_profile(), "create a profile", logger)
    # Returns None in every version; a wrong shape is only found when the profile is added.
    profile.set_shape(INPUT_NAME, *(trt.Dims((n, size, size, 3)) for n in batch))
    if config.add_optimization_profile(profile) < 0:
        raise EnvironmentalError(
            f"TensorRT refused the batch sizes {batch} for {size}x{size} crops: {logger.reasons()}"
        )


def audit_network(network: INetworkDefinition) -> PrecisionAudit:
    """What each layer of a parsed network will compute in, as its types and Q/DQ nodes say.

    A convolution whose input and weights come from DEQUANTIZE layers is INT8: the builder fuses
    the three. Layers between quantised tensors that compute on 8 bits (pooling) are listed with
    their own type, because the parsed network does not tell whether they will be fused.
    """
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    # From 8.5 on the parser gives the weights of a quantised convolution as its second input.
    made_by = {
        layer.get_output(j).name: layer for layer in layers for j in range(layer.num_outputs)
    }
    rows = []
    for layer in layers:
        kind = layer.type.name
        if kind in _IDLE:
            continue
        precision = layer.get_output(0).dtype.name
        if kind == "CONVOLUTION":
            sources = [made_by.get(t.name) for t in _inputs(layer)]
            quantised = [s for s in sources if s is not None and s.type.name == "DEQUANTIZE"]
            if len(quantised) >= 2:
                # What is dequantised, INT8 or FP8: the type of the DEQUANTIZE layer's input.
                precision = quantised[0].get_input(0).dtype.name
        rows.append(
            LayerPrecision.of(
                layer.name, "Convolution" if kind == "CONVOLUTION" else kind, precision
            )
        )
    return PrecisionAudit("parsed network", tuple(rows))


def _inputs(layer: ILayer) -> list[ITensor]:
    tensors = [layer.get_input(j) for j in range(layer.num_inputs)]
    return [t for t in tensors if t is not None]


def keep_decoding_in_float(trt: Any, network: INetworkDefinition) -> int:
    """On a weakly typed network, fix the layers after the last matrix product to FP32.

    The expectation over the bins loses tenths of a degree in FP16. Returns how many were fixed.
    """
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    last = max((i for i, layer in enumerate(layers) if layer.type.name in _MATRIX), default=-1)
    fixed = 0
    for layer in layers[last + 1 :]:
        if layer.type.name in _IDLE or layer.get_output(0).dtype.name != "FLOAT":
            continue
        layer.precision = trt.DataType.FLOAT
        layer.set_output_type(0, trt.DataType.FLOAT)
        fixed += 1
    return fixed
