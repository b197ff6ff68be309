"""The deployed ONNX graph: built from numpy weights and a specification without torch, and read.

``crops`` uint8 [batch, S, S, 3] RGB -> ``angles`` float32 [batch, 3] (pitch, yaw, roll in degrees,
convention ``"aflw2000"``) and ``spread`` float32 [batch, 3] (standard deviation of the bin
distribution in degrees; networks of others that have no bins have no such output).

Every node has one output and both share a name that is stable over versions and depths, because
calibration tables are keyed by tensor name::

    crops -> to_float -> to_nchw -> centred
    -> conv1 -> relu -> maxpool
    -> layerL.B.conv1 -> layerL.B.relu1 -> ... -> layerL.B.add -> layerL.B.relu
       (the skip is layerL.B.downsample where the shape changes)
    -> avgpool -> features [-> neck -> neck_relu] -> heads -> logits
    -> probabilities -> weighted -> expectation -> angles
    -> deviation -> deviation.weighted -> deviation.squared -> variance -> spread

Weights are called ``<node>.weight`` and ``<node>.bias``. Folded away are the batch normalisation
(into the convolutions), the division by std and a colour order other than RGB (into the first
convolution), and the signs of the network's pose convention (into the bin values).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

import edgehp
from edgehp._installed import import_package
from edgehp.errors import CheckpointError, DataError, UsageError
from edgehp.networks.foreign import read_model
from edgehp.networks.layout import (
    ANGLES,
    STEM,
    BatchNorm,
    Weights,
    backbone_prefix,
    check_weights,
    heads_prefix,
    neck_prefix,
    resnet_blocks,
)
from edgehp.networks.spec import SPEC_KEY, Bins, DeployedSpec, NetworkSpec
from edgehp.pose import convention

if TYPE_CHECKING:
    import onnx

INPUT = "crops"
OUTPUTS = ("angles", "spread")
DIGEST_KEY = "edgehp.spec_digest"
DEFAULT_OPSET = 17
_OPSETS = range(17, 24)
_EPSILON = 1e-5  # torch.nn.BatchNorm2d's default, which both papers' networks use

Array = npt.NDArray[np.float64]


def build_graph(weights: Weights, spec: NetworkSpec, opset: int = DEFAULT_OPSET) -> onnx.ModelProto:
    """Build the deployed graph. The same input gives the same bytes (`graph_bytes`).

    Args:
        weights: float arrays by canonical name, as `edgehp.networks.checkpoint.load_weights` gives.
        spec: the network; its `preprocessing.size` is the input size S.
        opset: ONNX operator set, 17 to 23; FP16 quantisation scales need 19 or later.

    Raises:
        CheckpointError: the weights do not fit, or are not finite after folding.
        UsageError: the opset or the colour order cannot be used.
        EnvironmentalError: the onnx package is not installed.
    """
    if opset not in _OPSETS:
        raise UsageError(f"opset {opset} is outside {_OPSETS.start}..{_OPSETS.stop - 1}")
    if spec.preprocessing.colour == "GREY":
        raise UsageError(
            f"{spec.name}: {spec.architecture} takes three channels\nhint: train it on RGB or BGR "
            "(grey crops with three equal channels are fine)"
        )
    check_weights({k: v.shape for k, v in weights.items()}, spec, f"the weights of {spec.name}")
    builder = GraphBuilder()
    x = _centring(builder, spec)
    x = _backbone(builder, weights, spec, x)
    x = _heads(builder, weights, spec, x)
    x = builder.node("Softmax", "probabilities", [x], axis=2)
    signs = np.array(convention(spec.convention).signs, np.float64)
    decode_bins(builder, spec.bins, signs, x)
    return builder.model(spec, opset)


def outputs_of(spec: DeployedSpec) -> tuple[str, ...]:
    """The outputs of a network's deployed graph: the spread is that of bins."""
    return OUTPUTS if spec.bins is not None else OUTPUTS[:1]


def graph_bytes(model: onnx.ModelProto) -> bytes:
    """Serialise a graph deterministically."""
    return bytes(model.SerializeToString(deterministic=True))


def spec_of_graph(model: onnx.ModelProto) -> DeployedSpec | None:
    """The specification that a graph carries in its metadata, or None if it carries none.

    Raises:
        DataError: it carries one that cannot be read.
    """
    text = {p.key: p.value for p in model.metadata_props}.get(SPEC_KEY)
    return None if text is None else DeployedSpec.from_json(text)


def load_graph(path: str | Path) -> tuple[onnx.ModelProto, DeployedSpec]:
    """Read a deployed graph and its specification.

    Raises:
        CheckpointError: the file is missing, truncated or not ONNX, keeps weights in other files,
            or is not a deployed graph: other inputs or outputs, or no (or a changed) specification
            in the metadata.
        EnvironmentalError: the onnx package is not installed.
    """
    path = Path(path)
    model = read_model(path)
    import onnx  # read_model says it where onnx is missing

    size = _check_interface(model, path)
    try:
        onnx.checker.check_model(model, full_check=True)
    # UnicodeDecodeError: a name in its own message that is not UTF-8.
    except (
        onnx.checker.ValidationError,
        onnx.shape_inference.InferenceError,
        UnicodeDecodeError,
    ) as e:
        line = (str(e).strip().splitlines() or ["no reason given"])[0][:200]
        raise CheckpointError(f"{path} is not valid ONNX: {line}") from e
    try:
        spec = spec_of_graph(model)
    except DataError as e:
        raise CheckpointError(f"{path}: {e}") from e
    if spec is None:
        raise CheckpointError(
            f"{path} carries no network specification (metadata {SPEC_KEY}), without which nobody "
            "knows how to crop for it\nhint: build the graph with edgehp from its checkpoint"
        )
    digest = {p.key: p.value for p in model.metadata_props}.get(DIGEST_KEY)
    if digest != spec.digest or size != spec.preprocessing.size:
        raise CheckpointError(
            f"{path}: its specification was altered (input of {size} pixels, specified "
            f"{spec.preprocessing.size}; digest {str(digest)[:12]}, computed {spec.digest[:12]})\n"
            "hint: build the graph again from its checkpoint"
        )
    return model, spec


def _check_interface(model: onnx.ModelProto, path: Path) -> int:
    """The input's size, if the inputs and outputs are those of a deployed graph."""
    from onnx import TensorProto

    def shown(values: Iterable[onnx.ValueInfoProto]) -> list[str]:
        found = []
        for value in values:
            tensor = value.type.tensor_type
            dims = [d.dim_value if d.HasField("dim_value") else "N" for d in tensor.shape.dim]
            kind = TensorProto.DataType.Name(tensor.elem_type).lower()
            found.append(f"{value.name} {kind}[{', '.join(map(str, dims))}]")
        return found

    inputs, outputs = shown(model.graph.input), shown(model.graph.output)
    size = 0
    if inputs and len(shape := model.graph.input[0].type.tensor_type.shape.dim) == 4:
        size = shape[1].dim_value
    # Networks of others without bins have no spread.
    wanted = [f"{name} float[N, 3]" for name in OUTPUTS[: max(1, len(outputs))]]
    if inputs != [f"{INPUT} uint8[N, {size}, {size}, 3]"] or outputs != wanted:
        raise CheckpointError(
            f"{path} is not a deployed graph: it takes {', '.join(inputs) or 'nothing'} and gives "
            f"{', '.join(outputs) or 'nothing'}; expected {INPUT} uint8[N, S, S, 3] to angles "
            "float[N, 3] and spread float[N, 3] with a dynamic batch N\n"
            "hint: a network of others needs a description: "
            f"'edgehp describe {path} --output net.toml', then "
            f"'edgehp build --network {path} --describe net.toml'"
        )
    return size


class GraphBuilder:
    """Collects nodes and constants; a node is named after its only output.

    Raises:
        EnvironmentalError: the onnx package is not installed.
    """

    def __init__(self) -> None:
        import_package("onnx", "building an ONNX graph needs")
        from onnx import helper, numpy_helper

        self._helper, self._numpy = helper, numpy_helper
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}

    def constant(self, name: str, values: npt.ArrayLike) -> str:
        """Store floats as float32, integers as int64."""
        values = np.asarray(values)
        kind = np.float32 if values.dtype.kind == "f" else np.int64
        if kind is np.float32 and not np.isfinite(values).all():
            raise CheckpointError(
                f"{name} is not finite after folding the batch normalisation: "
                "the checkpoint is corrupt or its training diverged"
            )
        array = np.ascontiguousarray(values.astype(kind))
        self._constants[name] = self._numpy.from_array(array, name)
        return name

    def node(self, kind: str, name: str, inputs: list[str], *more: str, **attributes: Any) -> str:
        """Add a node; `more` are outputs behind the one that it is named after."""
        made = self._helper.make_node(kind, inputs, [name, *more], name=name, **attributes)
        self._nodes.append(made)
        return name

    def include(
        self, model: onnx.ModelProto, given: Mapping[str, str], prefix: str
    ) -> dict[str, str]:
        """Add another graph's nodes and constants.

        Args:
            model: without subgraphs; its nodes have names.
            given: input of `model` -> the tensor to read there.
            prefix: put before the names of its nodes and tensors.

        Returns:
            Output of `model` -> its name here.
        """
        # Names that the deployed graph needs for itself.
        own = {INPUT, *OUTPUTS}

        def renamed(name: str) -> str:
            if name in given or not name:
                return given.get(name, "")
            return prefix + (f"net/{name}" if name in own else name)

        for source in model.graph.node:
            node = type(source)()
            node.CopyFrom(source)
            node.name = renamed(source.name)
            node.input[:] = [renamed(n) for n in source.input]
            node.output[:] = [renamed(n) for n in source.output]
            self._nodes.append(node)
        for tensor in model.graph.initializer:
            copy = type(tensor)()
            copy.CopyFrom(tensor)
            copy.name = renamed(tensor.name)
            self._constants[copy.name] = copy
        return {o.name: renamed(o.name) for o in model.graph.output}

    def convolution(self, name: str, x: str, weight: Array, bias: Array, stride: int) -> str:
        """Add a convolution whose padding is half its kernel."""
        kernel = weight.shape[2]
        return self.node(
            "Conv",
            name,
            [x, self.constant(f"{name}.weight", weight), self.constant(f"{name}.bias", bias)],
            kernel_shape=[kernel, kernel],
            strides=[stride, stride],
            pads=[kernel // 2] * 4,
            dilations=[1, 1],
            group=1,
        )

    def linear(self, name: str, x: str, weight: Array, bias: Array) -> str:
        """Add a linear layer with a weight [Cout, Cin]."""
        inputs = [x, self.constant(f"{name}.weight", weight), self.constant(f"{name}.bias", bias)]
        return self.node("Gemm", name, inputs, transB=1)

    def model(self, spec: DeployedSpec, opset: int) -> onnx.ModelProto:
        """The deployed graph of what was collected, which carries `spec`."""
        import onnx

        helper, kinds = self._helper, onnx.TensorProto
        size = spec.preprocessing.size
        graph = helper.make_graph(
            self._nodes,
            spec.name,
            [helper.make_tensor_value_info(INPUT, kinds.UINT8, ["batch", size, size, 3])],
            [helper.make_tensor_value_info(o, kinds.FLOAT, ["batch", 3]) for o in outputs_of(spec)],
            list(self._constants.values()),
        )
        opsets = [helper.make_opsetid("", opset)]
        model = helper.make_model(
            graph,
            opset_imports=opsets,
            # The oldest format that knows the opset: TensorRT's parsers lag behind onnx.
            ir_version=helper.find_min_ir_version_for(opsets),
            producer_name="edgehp",
            producer_version=edgehp.__version__,
            doc_string=(
                f"{spec.name}: uint8 RGB crops to (pitch, yaw, roll) and spread in degrees. "
                f"{spec.licence}"
            ).strip(),
        )
        helper.set_model_props(model, {SPEC_KEY: spec.to_json(), DIGEST_KEY: spec.digest})
        model = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
        onnx.checker.check_model(model)  # shapes and types were checked just now
        return model


def _centring(b: GraphBuilder, spec: NetworkSpec) -> str:
    # Only the mean is subtracted here. The division by std is folded into the first convolution,
    # as simplifiers do it anyway; the mean is not, because the zero padding stands for the mean.
    mean = np.array(spec.preprocessing.mean)[_rgb_order(spec)].reshape(1, 3, 1, 1)
    x = b.node("Cast", "to_float", [INPUT], to=1)  # 1 is TensorProto.FLOAT
    x = b.node("Transpose", "to_nchw", [x], perm=[0, 3, 1, 2])
    return b.node("Sub", "centred", [x, b.constant("centred.mean", mean)])


def _first_convolution(weights: Weights, spec: NetworkSpec) -> tuple[Array, Array]:
    """Weight and bias that take centred RGB, whatever colour order and std the network knows."""
    weight, bias = _folded(weights, backbone_prefix(spec), STEM)
    weight = weight / np.array(spec.preprocessing.std).reshape(1, 3, 1, 1)
    # BGR: permuting 3 x 64 kernels here saves the device a Gather over the whole image.
    return weight[:, _rgb_order(spec)], bias


def _rgb_order(spec: NetworkSpec) -> list[int]:
    return [2, 1, 0] if spec.preprocessing.colour == "BGR" else [0, 1, 2]


def _folded(weights: Weights, prefix: str, c: BatchNorm) -> tuple[Array, Array]:
    """Convolution weight and bias with the batch normalisation folded in, in float64."""
    w = weights[f"{prefix}{c.conv}.weight"].astype(np.float64)
    gamma, beta, mean, variance = (
        weights[f"{prefix}{c.norm}.{part}"].astype(np.float64)
        for part in ("weight", "bias", "running_mean", "running_var")
    )
    if not (variance >= 0).all():
        raise CheckpointError(
            f"{prefix}{c.norm}.running_var holds negative or undefined values: "
            "the checkpoint is corrupt or its training diverged"
        )
    scale = gamma / np.sqrt(variance + _EPSILON)
    return w * scale[:, None, None, None], beta - mean * scale


def _backbone(b: GraphBuilder, weights: Weights, spec: NetworkSpec, x: str) -> str:
    prefix = backbone_prefix(spec)
    x = b.convolution("conv1", x, *_first_convolution(weights, spec), STEM.stride)
    x = b.node("Relu", "relu", [x])
    x = b.node("MaxPool", "maxpool", [x], kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    for block in resnet_blocks(spec.depth):
        skip = x
        for number, c in enumerate(block.convolutions, 1):
            x = b.convolution(c.conv, x, *_folded(weights, prefix, c), c.stride)
            if number < len(block.convolutions):
                x = b.node("Relu", f"{block.name}.relu{number}", [x])
        if (c_down := block.downsample) is not None:
            folded = _folded(weights, prefix, c_down)
            skip = b.convolution(f"{block.name}.downsample", skip, *folded, c_down.stride)
        x = b.node("Add", f"{block.name}.add", [x, skip])
        x = b.node("Relu", f"{block.name}.relu", [x])
    x = b.node("GlobalAveragePool", "avgpool", [x])
    return b.node("Flatten", "features", [x], axis=1)


def _heads(b: GraphBuilder, weights: Weights, spec: NetworkSpec, x: str) -> str:
    def linear(name: str) -> tuple[Array, Array]:
        weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return weight.astype(np.float64), bias.astype(np.float64)

    if (neck := neck_prefix(spec)) is not None:
        x = b.linear("neck", x, *linear(neck))
        x = b.node("Relu", "neck_relu", [x])
    # One matrix product for the three heads: a single kernel instead of three small ones.
    parts = [linear(f"{heads_prefix(spec)}{angle}") for angle in ANGLES]
    weight = np.concatenate([w for w, _ in parts])
    bias = np.concatenate([v for _, v in parts])
    x = b.linear("heads", x, weight, bias)
    # 0 copies the batch dimension, which keeps it symbolic for shape inference.
    shape = b.constant("logits.shape", [0, len(ANGLES), spec.bins.count])
    return b.node("Reshape", "logits", [x, shape])


def decode_bins(b: GraphBuilder, bins: Bins, signs: Array, p: str) -> None:
    """Expectation and standard deviation of probabilities `p` [N, 3, bins]: the graph's outputs.

    The variance is taken about the mean and multiplied in the order (p d) d: every partial result
    stays below the largest half-precision number, and nothing cancels as in E[x^2] - E[x]^2.
    """
    values = b.constant("bins", signs[None, :, None] * bins.values[None, None, :])
    axis = b.constant("bins.axis", [2])
    weighted = b.node("Mul", "weighted", [p, values])
    mean = b.node("ReduceSum", "expectation", [weighted, axis], keepdims=1)
    deviation = b.node("Sub", "deviation", [values, mean])
    moment = b.node("Mul", "deviation.weighted", [p, deviation])
    square = b.node("Mul", "deviation.squared", [moment, deviation])
    variance = b.node("ReduceSum", "variance", [square, axis], keepdims=0)
    b.node("Squeeze", OUTPUTS[0], [mean, axis])
    b.node("Sqrt", OUTPUTS[1], [variance])
