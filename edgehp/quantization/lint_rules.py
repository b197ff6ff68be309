"""The rules of the lint as data: an id, what is wrong, the remedy, and where the rule holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from edgehp.quantization import lint_checks as checks
from edgehp.quantization.halves import HALF_OPSET
from edgehp.quantization.lint_checks import Context, Hit
from edgehp.quantization.placement import FLAVOURS

__all__ = ["EXTERNAL", "RULES", "Rule"]

_TRT = ("tensorrt",)
_CPU = ("cpu",)


@dataclass(frozen=True)
class Rule:
    """One rule.

    Attributes:
        id: stable name, used in reports and tests.
        what: what is wrong, in a sentence.
        remedy: what to do.
        flavours: where it holds.
        check: yields (node, detail) for each place.
    """

    id: str
    what: str
    remedy: str
    flavours: tuple[str, ...]
    check: Callable[[Context], Iterator[Hit]]


EXTERNAL = Rule(
    "external-data",
    "its values lie in another file, and TensorRT's parser gets bytes only",
    "save the graph as one file (onnx.save with save_as_external_data=False)",
    FLAVOURS,
    checks.external,
)

RULES: tuple[Rule, ...] = (
    EXTERNAL,
    Rule(
        "activation-zero-point",
        "an int8 activation with a zero point that is not 0; TensorRT refuses it",
        "calibrate symmetrically: scale = largest magnitude / 127, zero point 0",
        _TRT,
        checks.activation_zero_point,
    ),
    Rule(
        "activation-uint8",
        "a uint8 activation; TensorRT's parser refuses it",
        "emit the graph in the tensorrt flavour",
        _TRT,
        checks.activation_uint8,
    ),
    Rule(
        "bad-scale",
        "a scale that is zero, negative or not finite",
        "calibrate again with crops that the network answers to; a dead tensor needs any positive "
        "scale",
        FLAVOURS,
        checks.bad_scale,
    ),
    Rule(
        "scale-not-constant",
        "a scale that the graph computes; engines need constants",
        "run onnxsim, or calibrate statically",
        FLAVOURS,
        checks.scale_not_constant,
    ),
    Rule(
        "activation-per-channel",
        "an activation with a scale per channel; only weights may have one",
        "use one scale for the tensor",
        FLAVOURS,
        checks.activation_per_channel,
    ),
    Rule(
        "weight-zero-point",
        "an asymmetric weight",
        "quantise weights symmetrically with zero point 0",
        FLAVOURS,
        checks.weight_zero_point,
    ),
    Rule(
        "weight-per-tensor",
        "a weight that is not quantised per output channel",
        "one scale per output channel, axis 0",
        FLAVOURS,
        checks.weight_per_tensor,
    ),
    Rule(
        "bias-quantised",
        "an integer bias; TensorRT refuses int32 DequantizeLinear",
        "leave the bias in floating point: the engine folds it in",
        _TRT,
        checks.bias_quantised,
    ),
    Rule(
        "between-conv-and-relu",
        "Q/DQ before a Relu keeps it from being fused and costs a bit of resolution",
        "put the pair behind the Relu",
        FLAVOURS,
        checks.between_conv_and_relu,
    ),
    Rule(
        "conv-input-float",
        "a convolution without Q/DQ on its input would run in floating point",
        "quantise its input, or name it in keep_float",
        FLAVOURS,
        checks.conv_float,
    ),
    Rule(
        "weight-float",
        "a layer asked for in INT8 with a weight in floating point",
        "quantise the weight, or name the layer in keep_float",
        FLAVOURS,
        checks.conv_weight_float,
    ),
    Rule(
        "gemm-float",
        "a fully connected layer in floating point where INT8 was asked for",
        "quantise its input, or name it in keep_float",
        FLAVOURS,
        checks.gemm_float,
    ),
    Rule(
        "pool-float",
        "pooling in floating point splits the chain of INT8 layers",
        "put Q/DQ on its input",
        FLAVOURS,
        checks.pool_float,
    ),
    Rule(
        "add-both-quantised",
        "both inputs of a residual Add are quantised, so it is not fused into the convolution",
        "quantise the skip only; leave the edge from the last convolution alone",
        _TRT,
        checks.add_both,
    ),
    Rule(
        "add-wrong-side",
        "the edge from the last convolution to a residual Add is quantised and the skip is not",
        "quantise the skip instead",
        _TRT,
        checks.add_wrong_side,
    ),
    Rule(
        "add-skip-float",
        "a residual Add whose skip is in floating point",
        "put Q/DQ on the skip",
        _TRT,
        checks.add_skip_float,
    ),
    Rule(
        "add-float",
        "a residual Add whose skip is in floating point leaves the integers",
        "put Q/DQ on the skip",
        _CPU,
        checks.cpu_skip_float,
    ),
    Rule(
        "half-scale-opset",
        f"FP16 scales need opset {HALF_OPSET}",
        f"raise the graph to opset {HALF_OPSET} before it is quantised",
        FLAVOURS,
        checks.half_scale_opset,
    ),
    Rule(
        "mixed-types",
        "scales, weight and bias of one layer have different types; strongly typed engines "
        "refuse the layer",
        "use one of FP32 and FP16 for all of them",
        FLAVOURS,
        checks.mixed_scale_types,
    ),
    Rule(
        "narrow-convolution",
        f"INT8 convolutions of fewer than {checks.NARROW} channels have no fast kernel",
        f"use at least {checks.NARROW} channels, or name the layer in keep_float",
        _TRT,
        checks.narrow,
    ),
    Rule(
        "weight-stored-float",
        "a weight stored in floating point with a Q behind it makes the file four times as large",
        "store int8 and a DequantizeLinear alone",
        FLAVOURS,
        checks.weight_stored_float,
    ),
    Rule(
        "dynamic-size",
        "an input whose height, width or channels are free",
        "export with a fixed input size",
        FLAVOURS,
        checks.dynamic_size,
    ),
    Rule(
        "decode-quantised",
        "the decode (softmax, expectation) must stay in floating point",
        "remove Q/DQ behind the head",
        FLAVOURS,
        checks.decode_quantised,
    ),
    Rule(
        "unpaired",
        "a QuantizeLinear that no DequantizeLinear follows",
        "put a DequantizeLinear with the same scale behind it",
        FLAVOURS,
        checks.unpaired,
    ),
)
