"""What a target's data and this machine make of a request: which engine, which graph, where."""

from __future__ import annotations

import logging
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from edgehp.artifact.device import DeviceProbe
from edgehp.driver import Gpu
from edgehp.engines import engine_available
from edgehp.engines.tensorrt_rtx import import_tensorrt_rtx
from edgehp.errors import CompatibilityError, EnvironmentalError, UsageError
from edgehp.pipeline.request import BuildRequest
from edgehp.targets import Target, check_dla, check_precision, resolve_target

__all__ = ["Place", "Plan", "find_place", "finish_command", "how_to_finish", "make_plan"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What will be built.

    Attributes:
        target: from the target's data.
        kind: of the engine.
        precision: ``"int8"``, ``"fp16"`` or ``"fp32"``.
        flavour: of the Q/DQ graph, ``"cpu"`` or ``"tensorrt"``.
        half: whether the graph's body is FP16.
        compare: whether INT8 is compared with FP16, because the hardware may be slower in it.
        warnings: what the user must be told.
        dla: core of the deep-learning accelerator, None for the GPU.
    """

    target: Target
    kind: str
    precision: str
    flavour: str
    half: bool
    compare: bool
    warnings: tuple[str, ...]
    dla: int | None = None

    def in_half(self) -> Plan:
        """The same in FP16, to compare with."""
        return replace(self, precision="fp16", compare=False)


@dataclass(frozen=True)
class Place:
    """Where an engine is built; None for what does not matter there."""

    gpu: Gpu | None = None
    module: str | None = None
    tensorrt: str | None = None

    @property
    def knows_half_scales(self) -> bool:
        """Whether Q/DQ with FP16 scales (opset 19) can be parsed: from TensorRT 10 on."""
        return self.tensorrt is None or not self.tensorrt.startswith("8.")


def make_plan(request: BuildRequest) -> Plan:
    """Read the target's data and refuse what it says no to.

    Raises:
        UsageError: no such target, or a precision it does not have.
        DataError: a malformed target file.
    """
    resolution = resolve_target(request.target)
    target = resolution.target
    warnings = [resolution.note] if resolution.note else []
    verdict = check_precision(target, request.precision)
    if verdict.supported == "no":
        raise UsageError(f"{target.name} in {request.precision}: {verdict.reason}")
    if verdict.supported == "warn":
        warnings.append(f"{target.name} in {request.precision}: {verdict.reason}")
    if request.dla is not None:
        warnings += _on_dla(target, request.dla)
    on_gpu = target.engine != "openvino"
    plan = Plan(
        target=target,
        kind=target.engine,
        precision=request.precision,
        flavour=target.flavour,
        # A strongly typed engine computes what lies outside Q/DQ in the graph's own type.
        half=on_gpu and request.precision in ("int8", "fp16"),
        compare=on_gpu and request.precision == "int8" and verdict.supported == "warn",
        warnings=tuple(warnings),
        dla=request.dla,
    )
    return plan if on_gpu else _processor(plan)


def _on_dla(target: Target, core: int) -> list[str]:
    """What the user must be told of running on this core; refuses what the target says no to."""
    verdict = check_dla(target)
    if verdict.supported == "no":
        raise UsageError(f"{target.name} on a DLA: {verdict.reason}")
    if not 0 <= core < target.dla_cores:
        raise UsageError(f"{target.name} has DLA cores 0 to {target.dla_cores - 1}, not {core}")
    return [f"{target.name} on a DLA: {verdict.reason}"] if verdict.supported == "warn" else []


def _processor(plan: Plan) -> Plan:
    missing = engine_available("openvino")
    if missing is None:
        return plan
    if (other := engine_available("onnxruntime")) is not None:
        raise EnvironmentalError(f"no engine for the processor: {missing}; {other}")
    note = f"built for onnxruntime, which is slower here than OpenVINO: {missing}"
    return replace(plan, kind="onnxruntime", warnings=(*plan.warnings, note))


def find_place(plan: Plan, device: DeviceProbe) -> Place:
    """Where the engine can be built: here, or an error that says what is missing.

    Raises:
        EnvironmentalError: the runtime, the driver or the right device is not here.
        CompatibilityError: TensorRT is here in a version the target does not work with.
    """
    if plan.kind == "tensorrt-rtx":
        # Its package is all it takes: engines are built ahead of time, without a driver.
        import_tensorrt_rtx()
        return Place()
    missing = engine_available(plan.kind)
    if plan.kind != "tensorrt":
        if missing is not None:
            raise EnvironmentalError(missing)
        return Place()
    capabilities = " or ".join(plan.target.compute_capabilities)
    # The device first: TensorRT may be installable here, but it would build for another GPU.
    gpus = device.gpus()
    if not gpus or gpus[0].compute_capability not in plan.target.compute_capabilities:
        found = f"{gpus[0].name} with {gpus[0].compute_capability}" if gpus else "no NVIDIA GPU"
        raise EnvironmentalError(
            f"{plan.target.name} needs a GPU of compute capability {capabilities}; this machine "
            f"has {found}"
        )
    if missing is not None:
        raise EnvironmentalError(missing)
    version, known = device.version("tensorrt"), plan.target.tensorrt
    if version is not None and known is not None and not known.contains(version):
        upper = f" to {known.maximum}" if known.maximum else " or newer"
        raise CompatibilityError(
            f"TensorRT {version} found; {plan.target.name} needs {known.minimum}{upper}"
            f"{f' ({known.note})' if known.note else ''}: install such a version"
        )
    module = device.module()
    if plan.target.module_ids and module is None:
        raise EnvironmentalError(f"{plan.target.name} is a Jetson module; this machine is none")
    if module is not None and plan.target.module_ids:
        here = resolve_target("orin").target.name
        if here != plan.target.name:
            raise EnvironmentalError(
                f"{plan.target.name} was asked for, but this module is {here}: its engines are "
                f"tuned to other clocks and SMs; ask for --target {here}"
            )
    return Place(gpus[0], module, version)


def how_to_finish(plan: Plan, request: BuildRequest, reason: Exception) -> EnvironmentalError:
    """The error of a build that needs another machine: what is missing, and what to run there."""
    same = shlex.join(_same_build(plan, request))
    version = plan.target.tensorrt
    needs = ""
    if version is not None:
        upper = f" to {version.maximum}" if version.maximum else " or newer"
        needs = f" (with TensorRT {version.minimum}{upper})"
    # 'orin' may be another module there.
    note = resolve_target(request.target).note
    return EnvironmentalError(
        f"{reason}. Run on the device{needs}: {same}  - or make everything but the "
        f"engine here with: {same} --defer  , copy the artifact to the device and run "
        f"there: {finish_command('ARTIFACT', request.validate_on, request.threads)}"
        f"{f'. {note}' if note else ''}"
    )


def finish_command(artifact: str, validate_on: Path | None, threads: int | None) -> str:
    """The command line that finishes a deferred artifact, quoted for a shell.

    Args:
        artifact: its directory.
        validate_on: the held-out faces it was made with, None for the shipped ones.
        threads: processor threads, None for the runtime's choice.
    """
    words = ["edgehp", "build", "--finish", artifact]
    if validate_on is not None:
        words += ["--validate-on", str(validate_on)]
    if threads is not None:
        words += ["--threads", str(threads)]
    return shlex.join(words)


def _same_build(plan: Plan, request: BuildRequest) -> list[str]:
    """The command line of this very build: every option whose value is not the usual one."""
    usual = BuildRequest(request.target)
    words = ["edgehp", "build", "--target", plan.target.name, "--precision", plan.precision]
    for option, value, default in (
        ("--network", request.network, usual.network),
        ("--calibration", request.calibration, usual.calibration),
        ("--calibration-method", request.method, usual.method),
        ("--validate-on", request.validate_on, usual.validate_on),
        ("--max-drop", request.max_drop, usual.max_drop),
        ("--input-size", request.input_size, usual.input_size),
        ("--threads", request.threads, usual.threads),
        ("--dla", request.dla, usual.dla),
        ("--output", request.output, usual.output),
    ):
        if value != default:
            words += [option, str(value)]
    if request.batch != usual.batch:
        sizes = request.batch if len(set(request.batch)) > 1 else request.batch[:1]
        words += ["--batch", ",".join(map(str, sizes))]
    if request.mixed:
        words.append("--mixed")
    elif request.precision == "int8" and request.max_drop != usual.max_drop:
        # A limit that is typed asks for the search.
        words.append("--no-mixed")
    return words
