"""Inference engines behind one interface, each imported only when it is opened.

`open_engine` is the device side, `edgehp.engines.build` the build side; `engine_available` says why
an engine cannot be used here. See `edgehp.engines.base` for what an engine does.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import cast

from edgehp._installed import install_extra
from edgehp.engines.base import Engine, EngineInfo, Prediction, StreamingEngine
from edgehp.errors import CompatibilityError, EnvironmentalError, UsageError

__all__ = [
    "ENGINE_KINDS",
    "PROCESSOR_ENGINES",
    "Engine",
    "EngineInfo",
    "Prediction",
    "StreamingEngine",
    "engine_available",
    "open_engine",
    "processor_engine",
]

# kind -> (module, class); each module also has `check_available()`.
_ENGINES = {
    "openvino": ("edgehp.engines.openvino", "OpenVinoEngine"),
    "onnxruntime": ("edgehp.engines.onnxruntime", "OnnxRuntimeEngine"),
    "tensorrt": ("edgehp.engines.tensorrt", "TensorRtEngine"),
    "tensorrt-rtx": ("edgehp.engines.tensorrt_rtx", "TensorRtRtxEngine"),
}
ENGINE_KINDS = tuple(_ENGINES)
# Those that run a graph on any processor, the faster first.
PROCESSOR_ENGINES = ("openvino", "onnxruntime")


def open_engine(
    kind: str,
    path: str | Path,
    *,
    threads: int | None = None,
    device: str | None = None,
    batch: int | None = None,
    wait: str = "auto",
) -> Engine:
    """Open an engine for inference.

    Check the file against its manifest first (`edgehp.artifact`): an engine is executable code.

    Args:
        kind: one of `ENGINE_KINDS`.
        path: the engine file: an ONNX graph for the processor engines, a plan for TensorRT.
        threads: processor threads for inference; None leaves it to the runtime. TensorRT ignores
            it.
        device: ``"CPU"`` or, for TensorRT, the number of the GPU (``"0"``); None takes the first.
        batch: the batch size to prepare for (static shapes, CUDA graph); other sizes work too.
        wait: how the processor waits for a GPU: ``"spin"`` answers soonest, ``"block"`` leaves the
            core to others, ``"auto"`` is the driver's choice.

    Raises:
        UsageError: an argument makes no sense.
        DataError: the file is missing, damaged or not a head-pose engine.
        CompatibilityError: the engine was built for another device or version.
        EnvironmentalError: the runtime or driver is missing or failed.
    """
    module, name = _entry(kind)
    engine_class = getattr(import_module(module), name)
    own: dict[str, str] = {}
    if wait != "auto":
        if kind in PROCESSOR_ENGINES:
            raise UsageError(
                f"found --wait {wait} for {kind}, which runs on the processor and waits for no GPU"
            )
        own["wait"] = wait
    return cast(Engine, engine_class(path, threads=threads, device=device, batch=batch, **own))


def engine_available(kind: str) -> str | None:
    """Why engines of this kind cannot be opened here, or None if they can.

    Raises:
        UsageError: there is no such kind.
    """
    module = import_module(_entry(kind)[0])
    try:
        module.check_available()
    except (CompatibilityError, EnvironmentalError) as e:
        return str(e)
    return None


def processor_engine(prefer: str = "openvino") -> str:
    """An engine that runs a graph on the processor, `prefer` if it is installed.

    Raises:
        EnvironmentalError: none is installed.
    """
    reasons = []
    for kind in sorted(PROCESSOR_ENGINES, key=lambda k: k != prefer):
        if (reason := engine_available(kind)) is None:
            return kind
        reasons.append(reason)
    raise EnvironmentalError(
        f"no engine to run a graph on the processor: {'; '.join(reasons)}; install it with: "
        + install_extra("cpu")
    )


def _entry(kind: str) -> tuple[str, str]:
    if kind not in _ENGINES:
        raise UsageError(f"unknown engine {kind!r}; known: {', '.join(_ENGINES)}")
    return _ENGINES[kind]
