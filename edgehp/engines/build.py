"""The build side: from a deployed graph to an engine file and an account of what was built."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from edgehp._installed import import_package
from edgehp.engines.audit import LayerPrecision, PrecisionAudit
from edgehp.engines.base import check_file
from edgehp.errors import DataError, UsageError
from edgehp.files import write_output

PRECISIONS = ("fp32", "fp16", "int8")
# kind -> module with `build(onnx_path, out_path, options) -> BuildReport`.
_BUILDERS = {
    "openvino": "edgehp.engines.build",
    "onnxruntime": "edgehp.engines.build",
    "tensorrt": "edgehp.engines.tensorrt_build",
    "tensorrt-rtx": "edgehp.engines.tensorrt_rtx",
}


def check_batch(batch: tuple[int, int, int]) -> None:
    """Refuse batch sizes out of order or out of bounds.

    Raises:
        UsageError: not 1 <= smallest <= best <= largest <= 4096.
    """
    low, best, high = batch
    if not 1 <= low <= best <= high <= 4096:
        raise UsageError(f"batch sizes {batch}: expected 1 <= smallest <= best <= largest <= 4096")


@dataclass(frozen=True)
class BuildOptions:
    """What to build.

    Attributes:
        precision: ``"fp32"``, ``"fp16"`` or ``"int8"``: what the convolutions must run in; less is
            an error. The graph decides it, so INT8 needs Q/DQ nodes in the graph.
        compute_capabilities: such as ``("8.6", "8.9")``: one TensorRT-RTX engine for all of them;
            for TensorRT the capability of the GPU here, checked, or empty.
        batch: smallest, best and largest batch size of the engine.
        workspace_mib: scratch memory the builder may plan with; None is a quarter of the memory
            on a Jetson, where it is the board's, and elsewhere what TensorRT takes.
        optimization_level: TensorRT's, 0 (fast build) to 5; None is TensorRT's own.
        timing_cache: file of kernel timings to read and update (TensorRT only), which makes a
            second build faster and choose the same kernels; None is one in the user's cache.
        dla: None, or the number of the deep learning accelerator core to build for (Jetson).
        dla_cores: how many such cores the target has, from the target's data.
        version_compatible: TensorRT: readable by later releases of the same major version too.
        hardware_compatible: TensorRT: for every GPU from Ampere on, instead of this one alone.
        threads: processor threads, for the audit of processor engines.
    """

    precision: str = "int8"
    compute_capabilities: tuple[str, ...] = ()
    batch: tuple[int, int, int] = (1, 1, 8)
    workspace_mib: int | None = None
    optimization_level: int | None = None
    timing_cache: Path | None = None
    dla: int | None = None
    dla_cores: int = 0
    version_compatible: bool = False
    hardware_compatible: bool = False
    threads: int | None = None

    def __post_init__(self) -> None:
        """Refuse what no engine can be built from."""
        if self.precision not in PRECISIONS:
            raise UsageError(f"precision {self.precision!r} is none of {', '.join(PRECISIONS)}")
        check_batch(self.batch)
        if self.workspace_mib is not None and self.workspace_mib < 1:
            raise UsageError(f"workspace of {self.workspace_mib} MiB: expected at least 1")
        if self.optimization_level is not None and not 0 <= self.optimization_level <= 5:
            raise UsageError(f"optimization level {self.optimization_level}: expected 0 to 5")
        low, best, high = self.batch
        if self.dla is not None and low != high:
            raise UsageError(
                f"batch sizes {low} to {high} for the DLA, which takes one: other sizes would move "
                f"every layer to the GPU\nhint: --batch-sizes {best}"
            )
        for capability in self.compute_capabilities:
            major, _, minor = capability.partition(".")
            if not (major.isdigit() and minor.isdigit()):
                raise UsageError(f"compute capability {capability!r}: expected the form '8.6'")
        if self.dla is not None and (self.version_compatible or self.hardware_compatible):
            raise UsageError(
                "an engine for the DLA is neither version- nor hardware-compatible: leave out "
                "--version-compatible and --hardware-compatible, or --dla"
            )
        if self.dla is not None and not 0 <= self.dla < self.dla_cores:
            raise UsageError(
                f"DLA core {self.dla} asked for, but the target has {self.dla_cores or 'no'} DLA "
                "core(s); build for the GPU instead"
            )


@dataclass(frozen=True)
class BuildReport:
    """What was built.

    Attributes:
        files: the engine and whatever else the build wrote.
        versions: library -> version.
        audit: the precision of each layer.
        warnings: sentences for the user.
    """

    files: tuple[Path, ...]
    versions: Mapping[str, str]
    audit: PrecisionAudit
    warnings: tuple[str, ...] = ()


def build_engine(
    kind: str, onnx_path: str | Path, out_path: str | Path, options: BuildOptions
) -> BuildReport:
    """Build an engine from a deployed graph.

    Args:
        kind: ``"openvino"``, ``"onnxruntime"``, ``"tensorrt"`` or ``"tensorrt-rtx"``.
        onnx_path: the graph of `edgehp.networks.graph`, with Q/DQ nodes for INT8.
        out_path: the engine file; replaced only when the new one is complete.
        options: what to build.

    Raises:
        UsageError: the options make no sense together.
        DataError: the graph cannot be read, or the runtime cannot parse it.
        CompatibilityError: the hardware cannot do it, or less precision was reached than asked.
        EnvironmentalError: the runtime or driver is missing or failed.
    """
    if kind not in _BUILDERS:
        raise UsageError(f"unknown engine {kind!r}; known: {', '.join(_BUILDERS)}")
    onnx_path, out_path = check_file(onnx_path, "an ONNX graph"), Path(out_path)
    if not out_path.parent.is_dir():
        raise UsageError(f"{out_path.parent} is not a directory; create it first")
    module = import_module(_BUILDERS[kind])
    report: BuildReport = module.build(kind, onnx_path, out_path, options)
    return report


def quantised_convolutions(onnx_path: Path) -> tuple[str, ...]:
    """Names of the convolutions whose input and weight both come from a DequantizeLinear.

    Raises:
        DataError: the file is not an ONNX graph.
        EnvironmentalError: the onnx package is not installed.
    """
    import_package("onnx", "building an engine needs")
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped, unused-ignore]

    try:
        # Weights beside the graph are not needed to see its nodes.
        graph = onnx.load(str(onnx_path), load_external_data=False).graph
    except (DecodeError, OSError, ValueError) as e:
        raise DataError(
            f"{onnx_path} cannot be read as an ONNX graph ({e}); it is truncated or damaged"
        ) from e
    dequantised = {o for n in graph.node if n.op_type == "DequantizeLinear" for o in n.output}
    return tuple(
        n.name or n.output[0]
        for n in graph.node
        if n.op_type == "Conv" and set(n.input[:2]) <= dequantised
    )


def check_asked(onnx_path: Path, precision: str) -> tuple[str, ...]:
    """The convolutions that must run in INT8; empty for the float precisions.

    Raises:
        DataError: INT8 of a graph without Q/DQ, or a float precision of one with them.
    """
    quantised = quantised_convolutions(onnx_path)
    if precision == "int8" and not quantised:
        raise DataError(
            f"{onnx_path}: int8 was asked for, but no convolution of the graph has Q/DQ nodes; "
            "quantise it first"
        )
    if precision != "int8" and quantised:
        raise DataError(
            f"{onnx_path}: {precision} was asked for, but {len(quantised)} convolutions of the "
            "graph have Q/DQ nodes\nhint: give the graph without them, or ask for int8"
        )
    return quantised


# onnxruntime's operators: convolutions, and all that compute in 8 bits.
_CONVOLUTIONS = frozenset({"QLinearConv", "ConvInteger", "Conv", "FusedConv", "NhwcFusedConv"})
_QUANTISED_PREFIXES = ("QLinear", "QGemm", "MatMulInteger", "ConvInteger", "DynamicQuantize")


def build(kind: str, onnx_path: Path, out_path: Path, options: BuildOptions) -> BuildReport:
    """Compile the graph, audit it, and write its bytes to `out_path`.

    Args:
        kind: ``"openvino"`` or ``"onnxruntime"``.
        onnx_path: the deployed graph.
        out_path: where the engine, byte for byte the graph, goes.
        options: precision ``"fp32"`` or ``"int8"``.

    Raises:
        UsageError: the precision is not one of the processor's, or options of GPUs were given.
        DataError: the graph cannot be used.
        CompatibilityError: convolutions that should run in INT8 do not.
    """
    if options.precision == "fp16":
        raise UsageError("the processor engines have no fp16: ask for fp32 or int8")
    if options.dla is not None or options.compute_capabilities:
        raise UsageError(f"{kind} runs on the processor: no DLA and no compute capability")
    quantised = check_asked(onnx_path, options.precision)
    report = _audit_openvino if kind == "openvino" else _audit_onnxruntime
    audit, version = report(onnx_path, options)
    audit.require(options.precision, len(quantised), f"{kind} {version}")
    write_output(out_path, onnx_path.read_bytes(), "directory")
    return BuildReport(files=(out_path,), versions={kind: version}, audit=audit)


def _audit_openvino(path: Path, options: BuildOptions) -> tuple[PrecisionAudit, str]:
    from edgehp.engines.openvino import OpenVinoEngine

    with OpenVinoEngine(path, threads=options.threads, batch=options.batch[1]) as engine:
        return engine.audit, engine.info.version


def _audit_onnxruntime(path: Path, options: BuildOptions) -> tuple[PrecisionAudit, str]:
    """Read the graph that onnxruntime would execute; it can write it, not describe it."""
    import onnx

    from edgehp.engines.onnxruntime import OnnxRuntimeEngine, new_session

    with OnnxRuntimeEngine(path, threads=options.threads) as engine:
        version = engine.info.version
    with tempfile.TemporaryDirectory() as directory:
        optimised = Path(directory) / "optimised.onnx"
        new_session(path, options.threads, optimised)
        nodes = onnx.load(str(optimised)).graph.node
    rows = []
    for node in nodes:
        kind, name = node.op_type, node.name or node.output[0]
        precision = "int8" if kind.startswith(_QUANTISED_PREFIXES) else "fp32"
        if kind in _CONVOLUTIONS:
            rows.append(LayerPrecision(name, "Convolution", precision, kind))
        else:
            rows.append(LayerPrecision(name, kind, precision))
    return PrecisionAudit("optimised graph", tuple(rows)), version
