"""Building TensorRT engines for the GPU here: one adapter for 8.6, 10.x and 11.x."""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgehp.device import cache_folder, keep
from edgehp.driver import probe_driver
from edgehp.engines.audit import PrecisionAudit
from edgehp.engines.build import BuildOptions, BuildReport, check_asked
from edgehp.engines.trt import (
    IMPLICIT,
    Dialect,
    PlanBuilder,
    dialect_of,
    inspect,
    keep_decoding_in_float,
    need,
    set_ranges,
    version_of,
)
from edgehp.errors import CompatibilityError, EnvironmentalError
from edgehp.files import write_output

if TYPE_CHECKING:
    # Checked where the package tensorrt-stubs is installed.
    from tensorrt import IBuilderConfig, ICudaEngine, ITimingCache, Runtime

_log = logging.getLogger(__name__)
# The first TensorRT without Volta (compute capability 7.0 and 7.2).
_WITHOUT_VOLTA = (10, 5)
# The first TensorRT whose deep learning accelerator takes explicit Q/DQ networks.
_DLA_WITH_QDQ = (11, 4)
# What a hardware-compatible engine runs on.
AMPERE_AND_LATER = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
NO_KERNEL = "Could not find any implementation"


def build(kind: str, onnx_path: Path, out_path: Path, options: BuildOptions) -> BuildReport:
    """Build an engine for the first GPU here; see `edgehp.engines.build.build_engine`."""
    del kind
    quantised = check_asked(onnx_path, options.precision)
    gpu = probe_driver().gpus[0]
    from edgehp.engines.tensorrt import import_tensorrt

    trt = import_tensorrt()
    check_support(str(trt.__version__), gpu.compute_capability, options)
    if options.timing_cache is None:
        cache = timing_cache_path(gpu.name, str(trt.__version__), options)
        options = replace(options, timing_cache=cache)
    by_ranges: tuple[str, ...] = ()
    try:
        plan, audit, warnings = build_plan(trt, onnx_path, options, len(quantised))
    except EnvironmentalError as e:
        if gpu.compute_capability != "7.0" or not quantised or NO_KERNEL not in str(e):
            raise
        _log.warning("no explicit INT8 for %s (%s): trying INT8 by ranges", gpu.name, e)
        try:
            plan, audit, warnings = _build_by_ranges(trt, onnx_path, options, len(quantised))
        except (CompatibilityError, EnvironmentalError) as second:
            raise EnvironmentalError(
                f"TensorRT {trt.__version__} builds INT8 for {gpu.name} neither from Q/DQ nor from "
                f"ranges ({second.sentence}): Volta has no INT8 tensor cores\n"
                "hint: --precision fp16"
            ) from e
        by_ranges = (
            f"TensorRT has no explicit INT8 for {gpu.name}: the engine was built from the float "
            "graph and the ranges of its Q/DQ nodes, and TensorRT rounds the weights itself",
        )
    write_output(out_path, plan, "directory")
    versions = {"tensorrt": str(trt.__version__)}
    if options.version_compatible:
        versions["tensorrt_major"] = versions["tensorrt"].partition(".")[0]
    return BuildReport((out_path,), versions, audit, (*by_ranges, *warnings))


def _build_by_ranges(
    trt: Any, onnx_path: Path, options: BuildOptions, quantised: int
) -> tuple[bytes, PrecisionAudit, tuple[str, ...]]:
    """As `build_plan`, with implicit INT8: a float graph with the ranges that Q/DQ nodes have."""
    import onnx

    from edgehp.quantization.qdq import without_qdq

    model, ranges = without_qdq(onnx.load(str(onnx_path)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / onnx_path.name
        path.write_bytes(model.SerializeToString(deterministic=True))
        return build_plan(trt, path, options, quantised, ranges)


def check_support(version: str, capability: str, options: BuildOptions) -> Dialect:
    """The dialect of this TensorRT, if it can build what is asked for this GPU.

    Args:
        version: of TensorRT.
        capability: compute capability of the GPU here, such as ``"8.7"``.
        options: what to build.

    Raises:
        CompatibilityError: it cannot.
    """
    dialect, numbers = dialect_of(version), version_of(version)
    if options.compute_capabilities and options.compute_capabilities != (capability,):
        wanted = ", ".join(options.compute_capabilities)
        raise CompatibilityError(
            f"the target has compute capability {wanted}, the GPU here has {capability}: TensorRT "
            "builds for the GPU it runs on\nhint: build on the device itself"
        )
    if tuple(map(int, capability.split("."))) < (7, 5) and numbers[:2] >= _WITHOUT_VOLTA:
        raise CompatibilityError(
            f"TensorRT {version} no longer supports compute capability {capability} (V100): "
            "install TensorRT 10.4.0 or older"
        )
    if options.dla is not None and numbers[:2] < _DLA_WITH_QDQ:
        raise CompatibilityError(
            f"the DLA takes explicitly quantised networks from TensorRT 11.4.1 on, found "
            f"{version}: build for the GPU, or update to JetPack 7.2.2 or later"
        )
    # NVIDIA's developer guide, "Hardware Compatibility": not on JetPack, not before Ampere.
    if options.hardware_compatible and capability not in AMPERE_AND_LATER:
        raise CompatibilityError(
            f"hardware-compatible engines are for discrete GPUs from Ampere on, found compute "
            f"capability {capability}: leave out --hardware-compatible"
        )
    return dialect


def build_plan(
    trt: Any,
    onnx_path: Path,
    options: BuildOptions,
    quantised: int,
    ranges: Mapping[str, float] | None = None,
) -> tuple[bytes, PrecisionAudit, tuple[str, ...]]:
    """The engine's bytes, its audit, and sentences for its user.

    Args:
        trt: the module `tensorrt`.
        onnx_path: the deployed graph.
        options: what to build.
        quantised: how many convolutions are to run in INT8.
        ranges: of tensors, for INT8 of a float graph; None where the graph has Q/DQ nodes.

    Raises:
        CompatibilityError: the engine has less precision than asked for, or this TensorRT takes no
            ranges.
        DataError: the graph cannot be parsed.
        EnvironmentalError: the build fails.
    """
    dialect = dialect_of(str(trt.__version__))
    if ranges is not None:
        major = version_of(str(trt.__version__))[0]
        if major not in IMPLICIT:
            raise CompatibilityError(f"TensorRT {trt.__version__} takes no ranges")
        dialect = IMPLICIT[major]
    made = PlanBuilder(trt, onnx_path, options, dialect, quantised)
    network, config, logger = made.network, made.config, made.logger
    for name in dialect.builder_flags.get(options.precision, ()):
        config.set_flag(getattr(trt.BuilderFlag, name))
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if not dialect.strongly_typed and options.precision != "fp32":
        keep_decoding_in_float(trt, network)
    if ranges is not None:
        set_ranges(trt, network, ranges, logger)
    cache = _timing_cache(config, options.timing_cache, logger)
    on_gpu = [] if options.dla is None else _use_dla(trt, made, options.dla)
    content = made.build()
    if cache is not None and options.timing_cache is not None:
        keep(options.timing_cache, bytes(cache.serialize()), "the kernel timings are")
    audit = _audit_engine(trt, content, logger, options.dla).completed_by(made.audit)
    audit.require(options.precision, quantised, f"the engine TensorRT {trt.__version__} built")
    warnings = []
    if not dialect.strongly_typed and options.precision != "fp32":
        warnings.append(
            f"this network was weakly typed for TensorRT {trt.__version__}: where nothing asks for "
            "INT8, it chose FP16 or FP32 for each layer by its speed, the decoding apart, which "
            "was held in FP32; the audit has what it chose, and another build may choose otherwise"
        )
    if options.dla is not None:
        audit = audit.placed(options.dla, on_gpu)
        warnings.append(_placed(options.dla, on_gpu))
    return content, audit, tuple(warnings)


def _use_dla(trt: Any, made: PlanBuilder, core: int) -> list[str]:
    """Build for a DLA core; the names of the layers that it does not have."""
    network, config, cores = made.network, made.config, made.builder.num_DLA_cores
    if core >= cores:
        raise CompatibilityError(
            f"DLA core {core} asked for, this device has {cores}; build for the GPU"
        )
    config.default_device_type = trt.DeviceType.DLA
    config.DLA_core = core
    # The DLA has no integer cast or softmax: those layers go to the GPU, and the audit says so.
    config.set_flag(trt.BuilderFlag.GPU_FALLBACK)
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    return [layer.name for layer in layers if not config.can_run_on_DLA(layer)]


def timing_cache_path(gpu: str, version: str, options: BuildOptions) -> Path:
    """The file of kernel timings for builds like this one, in the user's cache folder.

    Args:
        gpu: its name; timings of another GPU would choose wrong kernels.
        version: of TensorRT, which refuses the cache of another.
        options: what is built.
    """
    device = "gpu" if options.dla is None else "dla"
    if options.hardware_compatible:
        device = "gpus"
    parts = (gpu, version, device, options.precision, str(options.optimization_level))
    name = "-".join(re.sub(r"[^A-Za-z0-9.]+", "-", part) for part in parts)
    return cache_folder() / "timing" / f"{name}.cache"


def _timing_cache(config: IBuilderConfig, path: Path | None, logger: Any) -> ITimingCache | None:
    """The timing cache the build uses, read from `path` if it fits this TensorRT and GPU."""
    if path is None:
        return None
    content = path.read_bytes() if path.is_file() else b""
    cache = config.create_timing_cache(content)
    if cache is None or not config.set_timing_cache(cache, False):
        if content:
            _log.warning("%s does not fit this TensorRT or GPU: starting a new one", path)
        cache = need(config.create_timing_cache(b""), "create a timing cache", logger)
        need(config.set_timing_cache(cache, False), "use a timing cache", logger)
    return cache


def _audit_engine(trt: Any, plan: bytes, logger: Any, dla: int | None) -> PrecisionAudit:
    """What each layer of a built engine runs in, by TensorRT's inspector."""
    runtime: Runtime = need(trt.Runtime(logger), "create a runtime", logger)
    if dla is not None:
        runtime.DLA_core = dla
    runtime.engine_host_code_allowed = True
    engine: ICudaEngine = need(
        runtime.deserialize_cuda_engine(plan), "load the engine it built", logger
    )
    return inspect(trt, engine, None, logger)


def _placed(core: int, names: list[str]) -> str:
    """A sentence about the layers of an engine for a DLA that run on the GPU."""
    if not names:
        return f"built for DLA core {core}: every layer runs on it"
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return (
        f"built for DLA core {core}: {len(names)} layers that it does not have run on the GPU "
        f"({shown}); figures are of both"
    )
