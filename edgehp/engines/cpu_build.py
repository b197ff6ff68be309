"""Building for the processor: the engine is the graph itself, tried out and audited here."""

from __future__ import annotations

import tempfile
from pathlib import Path

from edgehp.engines.audit import LayerPrecision, PrecisionAudit
from edgehp.engines.build import BuildOptions, BuildReport, check_asked, write_atomically
from edgehp.errors import UsageError

__all__ = ["build"]

_QUANTISED_KINDS = frozenset({"QLinearConv", "ConvInteger"})
_FLOAT_KINDS = frozenset({"Conv", "FusedConv", "NhwcFusedConv"})
# onnxruntime's operators outside convolutions that compute in 8 bits.
_QUANTISED_PREFIXES = ("QLinear", "QGemm", "MatMulInteger", "DynamicQuantize")


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
    write_atomically(out_path, onnx_path.read_bytes())
    return BuildReport(
        files=(out_path,),
        versions={kind: version},
        audit=audit,
        details={"precision": options.precision, "quantised_convolutions": len(quantised)},
    )


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
        name = node.name or node.output[0]
        if node.op_type in _QUANTISED_KINDS | _FLOAT_KINDS:
            precision = "int8" if node.op_type in _QUANTISED_KINDS else "fp32"
            rows.append(LayerPrecision(name, "Convolution", precision, node.op_type))
        else:
            precision = "int8" if node.op_type.startswith(_QUANTISED_PREFIXES) else "fp32"
            rows.append(LayerPrecision(name, node.op_type, precision))
    return PrecisionAudit("optimised graph", tuple(rows)), version
