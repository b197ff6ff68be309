"""What TensorRT 8.6, 10.x, 11.x and TensorRT for RTX have in common, and the table of what differs.

Names of enumerations are used, never numbers: the integers behind them shift between versions.
"""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from edgehp._installed import parse_version
from edgehp.device import find_jetson
from edgehp.engines.audit import LayerPrecision, PrecisionAudit
from edgehp.engines.base import INPUT_NAME, input_size_of
from edgehp.engines.build import BuildOptions
from edgehp.errors import CompatibilityError, DataError, EnvironmentalError

if TYPE_CHECKING:
    import onnx

    # TensorRT for RTX has the same classes. Checked where the package tensorrt-stubs is installed.
    from tensorrt import (
        Builder,
        Dims,
        IBuilderConfig,
        ICudaEngine,
        IExecutionContext,
        ILayer,
        INetworkDefinition,
        ITensor,
        OnnxParser,
    )


@dataclass(frozen=True)
class Dialect:
    """How one line of TensorRT is spoken to.

    Attributes:
        network_flags: names in `NetworkDefinitionCreationFlag`.
        builder_flags: precision asked -> names in `BuilderFlag`. Where the network is strongly
            typed there are none: the graph's own types decide.
        strongly_typed: whether the graph's own types decide.
    """

    network_flags: tuple[str, ...]
    strongly_typed: bool
    builder_flags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


_HALF = ("FP16", "OBEY_PRECISION_CONSTRAINTS")
# 8.6: the flags allow what the graph asks for, the constraints keep the decoding in FP32, and Q/DQ
# nodes decide which layers are INT8.
_WEAK = Dialect(
    network_flags=("EXPLICIT_BATCH",),
    strongly_typed=False,
    builder_flags={"fp32": (), "fp16": _HALF, "int8": ("INT8", *_HALF)},
)
# 11 and RTX accept the flag and ignore it: there every network is strongly typed.
RTX = Dialect(network_flags=("STRONGLY_TYPED",), strongly_typed=True)
_BY_MAJOR = {8: _WEAK, 10: RTX, 11: RTX}
# INT8 by ranges instead of Q/DQ, which versions before 11 have. From 10 on every network has an
# explicit batch, and a flag for it only deprecated values.
IMPLICIT = {8: _WEAK, 10: replace(_WEAK, network_flags=())}


def version_of(text: str) -> tuple[int, ...]:
    """TensorRT's version, read by `parse_version`.

    Raises:
        EnvironmentalError: it is no version.
    """
    try:
        return parse_version(text)
    except DataError as e:
        raise EnvironmentalError(f"TensorRT calls its version {text!r}; install it again") from e


def dialect_of(version: str) -> Dialect:
    """The dialect of a TensorRT (not RTX) version.

    Raises:
        CompatibilityError: no adapter for it exists here.
    """
    numbers = version_of(version)
    dialect = _BY_MAJOR.get(numbers[0] if numbers else 0)
    if dialect is None or numbers[:2] < (8, 6):
        raise CompatibilityError(
            f"TensorRT {version} found; edgehp knows 8.6, 10.x and 11.x: install one of those "
            "(JetPack 6 or later on a Jetson)"
        )
    return dialect


_log = logging.getLogger(__name__)
_KEPT = 8


@cache
def logger_of(trt: Any) -> Any:
    """The `ILogger` of the module `trt`, with the methods `reasons()` and `forget()`.

    One for the life of the process, because TensorRT registers one for all its builders and
    runtimes, ignores every later one, and must not outlive it.
    """
    levels = {
        "INTERNAL_ERROR": logging.ERROR,
        "ERROR": logging.ERROR,
        "WARNING": logging.WARNING,
        "INFO": logging.DEBUG,
        "VERBOSE": logging.DEBUG,
    }
    base: Any = trt.ILogger

    class Logger(base):  # type: ignore[misc]
        """The bridge; defined here because its base comes from the module given."""

        def __init__(self) -> None:
            base.__init__(self)
            self._errors: deque[str] = deque(maxlen=_KEPT)

        def log(self, severity: Any, message: str) -> None:
            name = getattr(severity, "name", str(severity))
            level = levels.get(name, logging.WARNING)
            if level >= logging.ERROR:
                self._errors.append(" ".join(message.split())[:400])
            # The failure is raised as an error with this reason: logging it too would say it twice.
            _log.log(logging.DEBUG if level >= logging.ERROR else level, "%s", message)

        def reasons(self) -> str:
            """The errors since `forget`, the first first; or that there were none."""
            return "; ".join(dict.fromkeys(self._errors)) or "TensorRT gave no reason"

        def forget(self) -> None:
            """Drop the errors kept."""
            self._errors.clear()

    return Logger()


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


class PlanBuilder:
    """A graph on its way to an engine: parsed, checked, and configured as all engines here are.

    Args:
        trt: the module `tensorrt` or `tensorrt_rtx`.
        path: the deployed graph.
        options: what to build.
        dialect: of the module.
        quantised: how many convolutions are to run in INT8.

    Attributes:
        builder: its builder.
        network: the parsed network, its batch sizes set.
        config: the builder's configuration.
        audit: of the parsed network.
        logger: has the reasons of failures.

    Raises:
        CompatibilityError: a strongly typed network is not in the precision asked for.
        DataError: TensorRT's parser refuses the graph, or it is no deployed one.
        EnvironmentalError: TensorRT fails.
    """

    def __init__(
        self, trt: Any, path: Path, options: BuildOptions, dialect: Dialect, quantised: int
    ) -> None:
        self._trt, self.logger = trt, logger_of(trt)
        self.builder: Builder = need(trt.Builder(self.logger), "create a builder", self.logger)
        kinds, flags = trt.NetworkDefinitionCreationFlag, 0
        for name in dialect.network_flags:
            if not hasattr(kinds, name):
                raise EnvironmentalError(
                    f"this TensorRT has no network flag {name}, which its version should have; "
                    "install it again"
                )
            flags |= 1 << int(getattr(kinds, name))
        network = self.builder.create_network(flags)
        self.network: INetworkDefinition = need(network, "create a network", self.logger)
        # It owns memory that the network refers to until the build is done.
        self._parser: OnnxParser | None = self._parse(path)
        size = self._input_size(path)
        self.audit = audit_network(self.network)
        if dialect.strongly_typed:
            # The types are final already: fail before minutes of tactic timing, not after.
            self.audit.require(options.precision, quantised, path.name)
        config = self.builder.create_builder_config()
        self.config: IBuilderConfig = need(config, "create a configuration", self.logger)
        configure(trt, self.config, options)
        self._set_batch(options.batch, size)

    def build(self) -> bytes:
        """The engine's bytes, once.

        Raises:
            EnvironmentalError: the build fails.
        """
        self.logger.forget()
        plan = self.builder.build_serialized_network(self.network, self.config)
        content = bytes(need(plan, "build the engine", self.logger))
        self._parser = None
        return content

    def _parse(self, path: Path) -> OnnxParser:
        """Read the graph; all reasons of a refusal are in the one sentence."""
        made = self._trt.OnnxParser(self.network, self.logger)
        parser: OnnxParser = need(made, "create an ONNX parser", self.logger)
        # The path lets the parser find weights stored beside the file.
        if not parser.parse(path.read_bytes(), str(path)):
            reasons = []
            for i in range(parser.num_errors):
                error = parser.get_error(i)
                node = error.node_name() if hasattr(error, "node_name") else ""
                where = f" (node {node or error.node()})" if node or error.node() >= 0 else ""
                reasons.append(" ".join(error.desc().split()) + where)
            text = "; ".join(reasons) or self.logger.reasons()
            raise DataError(
                f"{path}: TensorRT's parser refuses the graph: {text}\nhint: build it again with "
                "this release of edgehp and run its lint"
            )
        return parser

    def _input_size(self, path: Path) -> int:
        network = self.network
        tensors = [network.get_input(i) for i in range(network.num_inputs)]
        inputs = {t.name: (t.dtype.name, dimensions(t.shape)) for t in tensors}
        outputs = [network.get_output(i).name for i in range(network.num_outputs)]
        return input_size_of(inputs, outputs, path)

    def _set_batch(self, batch: tuple[int, int, int], size: int) -> None:
        """Tell the builder the smallest, best and largest batch size.

        One size makes the shapes static, for which TensorRT has more kernels than for a range.
        """
        shapes = [self._trt.Dims((n, size, size, 3)) for n in batch]
        if batch[0] == batch[2]:
            self.network.get_input(0).shape = shapes[0]
            return
        profile = self.builder.create_optimization_profile()
        profile = need(profile, "create a profile", self.logger)
        # Returns None in every version; a wrong shape is only found when the profile is added.
        profile.set_shape(INPUT_NAME, *shapes)
        if self.config.add_optimization_profile(profile) < 0:
            raise EnvironmentalError(
                f"TensorRT refused the batch sizes {batch} for {size}x{size} crops: "
                f"{self.logger.reasons()}"
            )


def configure(trt: Any, config: IBuilderConfig, options: BuildOptions) -> None:
    """Set what every build sets: no TF32, layers that can be inspected, and the memory."""
    # On by default: FP32 layers would silently run with ten bits of mantissa.
    config.clear_flag(trt.BuilderFlag.TF32)
    # Otherwise the inspector cannot tell what the layers run in.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    workspace = options.workspace_mib
    if workspace is None and (jetson := find_jetson()) is not None and jetson.memory_gib:
        # A quarter of a Jetson's memory: TensorRT would plan with all of it.
        workspace = max(256, int(jetson.memory_gib * 1024 / 4))
    if workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace << 20)


def dimensions(shape: Dims) -> list[int]:
    """The sizes in a TensorRT shape; -1 is a free one."""
    return [int(shape[i]) for i in range(len(shape))]


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
        kind, precision = layer.type.name, layer.get_output(0).dtype.name
        if kind in _IDLE:
            continue
        if kind == "CONVOLUTION":
            kind = "Convolution"
            sources = [made_by.get(t.name) for t in _inputs(layer)]
            quantised = [s for s in sources if s is not None and s.type.name == "DEQUANTIZE"]
            if len(quantised) >= 2:
                # What is dequantised, INT8 or FP8: the type of the DEQUANTIZE layer's input.
                precision = quantised[0].get_input(0).dtype.name
        rows.append(LayerPrecision.of(layer.name, kind, precision))
    return PrecisionAudit("parsed network", tuple(rows))


def _inputs(layer: ILayer) -> list[ITensor]:
    tensors = [layer.get_input(j) for j in range(layer.num_inputs)]
    return [t for t in tensors if t is not None]


def keep_decoding_in_float(trt: Any, network: INetworkDefinition) -> None:
    """On a weakly typed network, fix the layers after the last matrix product to FP32.

    The expectation over the bins loses tenths of a degree in FP16.
    """
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    last = max((i for i, layer in enumerate(layers) if layer.type.name in _MATRIX), default=-1)
    for layer in layers[last + 1 :]:
        if layer.type.name not in _IDLE and layer.get_output(0).dtype.name == "FLOAT":
            layer.precision = trt.DataType.FLOAT
            layer.set_output_type(0, trt.DataType.FLOAT)


def set_ranges(
    trt: Any, network: INetworkDefinition, ranges: Mapping[str, float], logger: Any
) -> None:
    """On a weakly typed network, let the convolutions that read tensors with ranges run in INT8.

    What a convolution computes needs a range as well. Where only an activation or a sum reads it,
    TensorRT joins the two, and the range of their result is taken.

    Args:
        trt: the module.
        network: parsed from a float graph.
        ranges: the largest magnitude of tensors by name.
        logger: for the reason of a failure.
    """
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    known = dict(ranges)
    for layer in reversed(layers):
        if layer.type.name in ("ACTIVATION", "ELEMENTWISE") and layer.get_output(0).name in known:
            for tensor in _inputs(layer):
                known.setdefault(tensor.name, known[layer.get_output(0).name])
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    for tensor in (*inputs, *(layer.get_output(0) for layer in layers)):
        if (most := known.get(tensor.name)) is not None:
            need(tensor.set_dynamic_range(-most, most), f"set the range of {tensor.name}", logger)
    for layer in layers:
        if layer.type.name == "CONVOLUTION" and layer.get_input(0).name in ranges:
            layer.precision = trt.DataType.INT8


_TYPES = ("int8", "fp8", "bf16", "bfloat16", "half", "fp16", "float", "fp32")


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


# Which operator sets and element types the ONNX parser of a TensorRT takes, from the list of
# operators of each release of onnx-tensorrt; releases between two rows count as the older one. None
# was tried on hardware.
# TensorRT from this release on -> the newest operator set.
_OPSETS = (("8.5", 17), ("9.0", 19), ("10.0", 20), ("10.15", 24), ("11.5", 25))
# Element type -> the first release with it.
_SINCE = {
    **dict.fromkeys(("FLOAT", "DOUBLE", "FLOAT16", "INT8", "INT32", "INT64", "BOOL"), "8.5"),
    "UINT8": "8.5",  # of inputs and outputs; edgehp's own input is
    **dict.fromkeys(("BFLOAT16", "FLOAT8E4M3FN"), "9.0"),
    "INT4": "10.0",
}


def newest_opset(version: str) -> int:
    """The newest operator set that TensorRT `version` (``"10.3.0.30"``) documents."""
    found = parse_version(version)
    known = [opset for first, opset in _OPSETS if parse_version(first) <= found]
    return known[-1] if known else _OPSETS[0][1]


def require_parsable(model: onnx.ModelProto, version: str, target: str) -> None:
    """Refuse a graph that the target's TensorRT cannot read.

    Args:
        model: the graph.
        version: of TensorRT.
        target: its name, for the message.

    Raises:
        CompatibilityError: its operator set is newer, or an element type is unknown there.
    """
    import onnx

    opset = max(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    newest = newest_opset(version)
    if opset > newest:
        raise CompatibilityError(
            f"the network is in ONNX operator set {opset}; TensorRT {version} of {target} reads at "
            f"most {newest}\nhint: export it with opset 17, which every TensorRT from 8.5 on reads"
        )
    types = {t.data_type for t in model.graph.initializer}
    types |= {v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)}
    for node in model.graph.node:
        for a in node.attribute:
            if node.op_type == "Cast" and a.name == "to":
                types.add(a.i)
            elif a.type == a.TENSOR:
                types.add(a.t.data_type)
    names = {n: k for k, n in onnx.TensorProto.DataType.items()}
    for kind in sorted(types):
        name = names.get(kind, str(kind))
        since = _SINCE.get(name)
        if since is None or parse_version(since) > parse_version(version):
            raise CompatibilityError(
                f"the network holds {name}, which TensorRT {version} of {target} does not take"
                + (f" (from {since} on)" if since else "")
                + "\nhint: export it in float32 or float16"
            )
