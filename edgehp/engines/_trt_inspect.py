"""The precision audit of a built engine, from TensorRT's own inspector."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from edgehp.engines._trt_network import need
from edgehp.engines.audit import LayerPrecision, PrecisionAudit
from edgehp.errors import EnvironmentalError

if TYPE_CHECKING:
    from tensorrt import ICudaEngine, IExecutionContext

__all__ = ["inspect", "read_inspection"]

_TYPES = ("int8", "fp8", "bf16", "half", "fp16", "float", "fp32")


def inspect(
    trt: Any, engine: ICudaEngine, context: IExecutionContext | None, logger: Any
) -> PrecisionAudit:
    """What each layer of an engine runs in.

    Args:
        trt: the module.
        engine: an `ICudaEngine` built with detailed verbosity, or the audit is empty.
        context: an execution context with its input shape set, or None; without one the formats
            of tensors with a free batch dimension are unknown, those of weights are not.
        logger: for the reason of a failure.

    Raises:
        EnvironmentalError: it cannot be inspected.
    """
    inspector = need(engine.create_engine_inspector(), "create an inspector", logger)
    if context is not None:
        inspector.execution_context = context
    return read_inspection(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def read_inspection(text: str) -> PrecisionAudit:
    """The audit from the inspector's JSON.

    Raises:
        EnvironmentalError: it is not the JSON this adapter knows.
    """
    try:
        layers = json.loads(text)["Layers"]
    except (ValueError, KeyError, TypeError) as e:
        raise EnvironmentalError(f"TensorRT's inspector gave no list of layers ({e})") from e
    source = "engine inspector"
    if any(not isinstance(layer, dict) for layer in layers):
        return PrecisionAudit(source, (), "the engine was built without detailed verbosity")
    return PrecisionAudit(source, tuple(_row(layer) for layer in layers))


def _row(layer: dict[str, Any]) -> LayerPrecision:
    kind = str(layer.get("LayerType", ""))
    # 8.6 says it in LayerType ("CaskConvolution"), later versions in ParameterType.
    convolution = "Convolution" in kind + str(layer.get("ParameterType", ""))
    inputs = layer.get("Inputs") or [{}]
    words = str(inputs[0].get("Format/Datatype", "")) if isinstance(inputs[0], dict) else ""
    weights = layer.get("Weights")
    if convolution and isinstance(weights, dict) and "Type" in weights:
        # Known even where the batch dimension is free and the formats are "N/A".
        words = str(weights["Type"])
    return LayerPrecision.of(
        str(layer.get("Name", "")),
        "Convolution" if convolution else kind,
        next((t for t in _TYPES if t in words.lower()), words or "unknown"),
        str(layer.get("TacticName", "")),
    )
