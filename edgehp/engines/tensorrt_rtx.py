"""TensorRT for RTX: engines for RTX 20 to 50, built ahead of time on a machine without a GPU."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgehp.device import cache_folder, keep
from edgehp.driver import probe_driver
from edgehp.engines.audit import PrecisionAudit
from edgehp.engines.base import Crops, Prediction, check_file, import_runtime
from edgehp.engines.build import BuildOptions, BuildReport, check_asked
from edgehp.engines.cuda import check_cuda_package
from edgehp.engines.tensorrt import TensorRtEngine
from edgehp.engines.trt import RTX, PlanBuilder, logger_of, need
from edgehp.errors import CompatibilityError, DataError, EnvironmentalError, UsageError
from edgehp.files import sha256_file, write_output

if TYPE_CHECKING:
    from tensorrt import IExecutionContext, INetworkDefinition

_log = logging.getLogger(__name__)
# A matrix product in FP32 is what its compiler refuses for Turing.
_TURING = "7.5"


class TensorRtRtxEngine(TensorRtEngine):
    """A plan of TensorRT for RTX on one GPU; the arguments are those of `TensorRtEngine`.

    The first opening on a machine compiles kernels for its GPU, which takes seconds.
    """

    kind = "tensorrt-rtx"
    # A graph captured here would freeze the fallback kernels that it begins with.
    captures = False

    def _new_context(self) -> IExecutionContext:
        """A context that compiles its kernels before the first run and captures graphs itself.

        TensorRT for RTX documentation, "Working with runtime configurations": eager
        specialization, whole-graph capture, and a cache of compiled kernels kept on disk.
        """
        trt = self._trt
        engine = self._loaded
        config: Any = need(engine.create_runtime_config(), "create a configuration", self._logger)
        eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        config.dynamic_shapes_kernel_specialization_strategy = eager
        config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        self._cache = need(config.create_runtime_cache(), "create a runtime cache", self._logger)
        kept = self._cache_path
        if kept.is_file() and not self._cache.deserialize(kept.read_bytes()):
            _log.warning("%s does not fit this release: compiling kernels anew", kept)
        need(config.set_runtime_cache(self._cache), "use a runtime cache", self._logger)
        context: IExecutionContext = need(
            engine.create_execution_context(config), "create a context", self._logger
        )
        return context

    @property
    def _cache_path(self) -> Path:
        digest = sha256_file(self._path)[:16]
        name = f"{digest}-{self._cuda.compute_capability}-{self._trt.__version__}.cache"
        return cache_folder() / "tensorrt-rtx" / name

    def infer(self, crops: Crops) -> Prediction:
        """As `TensorRtEngine.infer`; the kernels that the first run compiled are kept."""
        answer = super().infer(crops)
        cache, self._cache = self._cache, None
        if cache is not None:
            keep(self._cache_path, bytes(cache.serialize()), "the compiled kernels are")
        return answer

    _cache: Any = None

    def _import(self) -> Any:
        return import_tensorrt_rtx()

    def _load(self) -> None:
        check_plan(self._path)
        super()._load()


def build(kind: str, onnx_path: Path, out_path: Path, options: BuildOptions) -> BuildReport:
    """Build one engine for all compute capabilities asked for.

    See `edgehp.engines.build.build_engine`; no GPU is used, even where there is one.

    Raises:
        UsageError: no compute capability was given, or a DLA.
        DataError: the graph cannot be parsed, or is not in the precision asked for.
        CompatibilityError: TensorRT for RTX does not build for one of the capabilities.
        EnvironmentalError: the package is missing or failed.
    """
    del kind
    if not options.compute_capabilities:
        raise UsageError("TensorRT for RTX builds ahead of time: say for which GPUs, such as 8.6")
    if options.dla is not None:
        raise UsageError("TensorRT for RTX knows no DLA: that is the Jetsons' TensorRT")
    quantised = check_asked(onnx_path, options.precision)
    trt = import_tensorrt_rtx()
    content, audit = build_plan(trt, onnx_path, options, len(quantised))
    _check_bytes(trt, content, str(out_path))
    write_output(out_path, content, "directory")
    versions = {"tensorrt-rtx": str(trt.__version__)}
    return BuildReport(files=(out_path,), versions=versions, audit=audit)


def build_plan(
    trt: Any, onnx_path: Path, options: BuildOptions, quantised: int
) -> tuple[bytes, PrecisionAudit]:
    """The engine's bytes and the audit of the parsed network; arguments as of `PlanBuilder`.

    Raises:
        DataError, CompatibilityError, EnvironmentalError: as of `build`.
    """
    made = PlanBuilder(trt, onnx_path, options, RTX, quantised)
    _refuse_turing(made.network, options, onnx_path)
    _set_capabilities(trt, made.config, options.compute_capabilities)
    return made.build(), made.audit


def _set_capabilities(trt: Any, config: Any, capabilities: tuple[str, ...]) -> None:
    known = trt.ComputeCapability
    config.num_compute_capabilities = len(capabilities)
    for index, capability in enumerate(capabilities):
        value = getattr(known, f"SM{capability.replace('.', '')}", None)
        # False is all it says, and the build would go on for the capability set before.
        if value is None or not config.set_compute_capability(value, index):
            names = [n for n in dir(known) if n.startswith("SM")]
            raise CompatibilityError(
                f"TensorRT for RTX {trt.__version__} does not build for compute capability "
                f"{capability}; it builds for {', '.join(sorted(names))}: use TensorRT instead"
            )
        if config.get_compute_capability(index) != value:
            raise EnvironmentalError(
                f"TensorRT for RTX took compute capability {capability} and kept another; "
                "install another release"
            )


def _refuse_turing(network: INetworkDefinition, options: BuildOptions, path: Path) -> None:
    """Its compiler says this too, but late and not what to do about it."""
    if _TURING not in options.compute_capabilities:
        return
    wide = [
        layer.name
        for layer in (network.get_layer(i) for i in range(network.num_layers))
        if layer.type.name == "MATRIX_MULTIPLY" and layer.get_output(0).dtype.name == "FLOAT"
    ]
    if wide:
        raise CompatibilityError(
            f"{path.name}: TensorRT for RTX has no FP32 matrix product for compute capability 7.5 "
            f"(RTX 20, T4), and {', '.join(wide)} is one: build with fp16, give the fully "
            "connected layers in FP16, or leave 7.5 out"
        )


def check_plan(path: str | Path) -> None:
    """Hold an engine file against TensorRT for RTX, without running it.

    Without a GPU nothing is told but whether header and length are right.

    Raises:
        DataError: missing, truncated, or no engine of TensorRT for RTX.
        CompatibilityError: it does not run on the GPU here.
        EnvironmentalError: the package is missing.
    """
    path = check_file(path, "an engine of TensorRT for RTX")
    _check_bytes(import_tensorrt_rtx(), path.read_bytes(), str(path))


def _check_bytes(trt: Any, content: bytes, name: str) -> None:
    logger = logger_of(trt)
    runtime = need(trt.Runtime(logger), "create a runtime", logger)
    header = int(runtime.engine_header_size)
    if len(content) <= header:
        raise DataError(
            f"{name} has {len(content)} bytes, an engine has more than {header}; copy it again"
        )
    validity, diagnostics = runtime.get_engine_validity(content)
    diagnostics = int(diagnostics)
    reasons = [
        n
        for n in dir(trt.EngineInvalidityDiagnostics)
        if n.isupper() and diagnostics & int(getattr(trt.EngineInvalidityDiagnostics, n))
    ]
    if "MALFORMED_ENGINE" in reasons:
        raise DataError(
            f"{name} does not begin as an engine of TensorRT for RTX {trt.__version__} does; copy "
            "or build it again"
        )
    if validity.name != "INVALID":
        return
    if reasons and reasons != ["CUDA_ERROR"]:
        raise CompatibilityError(
            f"{name} does not run here: {', '.join(r.lower() for r in reasons)}; build it for "
            "this GPU and release"
        )
    # Without a GPU loading fails for want of a driver, but the length is compared before that.
    logger.forget()
    loaded = runtime.deserialize_cuda_engine(content)
    if loaded is None and "header.size" in logger.reasons():
        raise DataError(
            f"{name}: its {len(content)} bytes are not the number its header gives: it is "
            "truncated or was added to\nhint: copy it again"
        )


def check_available() -> None:
    """Return if TensorRT for RTX, a driver and a GPU are here; building needs the package only.

    Raises:
        EnvironmentalError: one of them is not.
    """
    check_cuda_package(probe_driver())
    import_tensorrt_rtx()


def import_tensorrt_rtx() -> Any:
    """The module `tensorrt_rtx`.

    Raises:
        EnvironmentalError: it is missing or broken.
    """
    return import_runtime(
        "tensorrt_rtx",
        "TensorRT for RTX",
        "install it with: pip install tensorrt-rtx-cu13 (64-bit x86 only)",
    )
