"""A build's request, and its plan: which engine, which graph, and where it can be built."""

from __future__ import annotations

import logging
import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from edgehp.artifact.write import ArtifactWriter
from edgehp.device import DeviceProbe, module_part
from edgehp.driver import Gpu
from edgehp.engines import engine_available
from edgehp.engines.build import PRECISIONS, BuildOptions, check_batch
from edgehp.engines.tensorrt_rtx import import_tensorrt_rtx
from edgehp.errors import CompatibilityError, EnvironmentalError, UsageError
from edgehp.networks.bundled import BUNDLED
from edgehp.quantization.ranges import METHODS
from edgehp.targets import Target, check_precision, resolve_target, target_of_part

logger = logging.getLogger(__name__)

# What of a request says how this machine makes it, not what is made.
_HOW = ("defer", "output", "threads")
# Options of a command line that are written in a way of their own.
_NOT_REPEATED = ("target", "precision", "defer", "batch", "mixed")


@dataclass(frozen=True)
class BuildRequest:
    """One build.

    Attributes:
        target: name or alias of a target.
        precision: ``"int8"``, ``"fp16"`` or ``"fp32"``.
        network: bundled name or file: checkpoint, deployed ONNX graph, description; or the ONNX
            file or folder that `describe` describes.
        calibration: folder or zip of faces, None for the shipped crops.
        calibration_method: how activation ranges are chosen: ``"auto"`` or one of `METHODS`.
        validate_on: folder or zip of held-out faces, None for the shipped ones.
        photo_depth: significant bits of photos with 16 bits a sample; None where none are.
        skip_bad: leave photos out that cannot be used, counted, instead of raising.
        max_drop: largest accuracy drop in degrees that makes an artifact.
        describe: description of `network`, where that is a network of others.
        mixed: where INT8 throughout drops more, keep layers in floating point until it does not.
        defer: make an artifact without engine where the engine cannot be built here.
        output: directory that artifacts are made in.
        input_size: other side of the network input in pixels, None for the network's own.
        batch: smallest, best and largest batch size.
        threads: processor threads, None leaves it to the runtime.
        dla: core of the deep-learning accelerator to run on, None for the GPU.
        workspace: memory TensorRT may plan with, in MiB; None is a default for the device.
        optimization_level: of TensorRT's builder, 0 to 5; None is its own.
        version_compatible: make an engine that later TensorRT of the same major version reads.
        hardware_compatible: make one for every GPU from Ampere on.
    """

    target: str
    precision: str = "int8"
    network: str = "kd-resnet18-112"
    calibration: Path | None = None
    calibration_method: str = "auto"
    validate_on: Path | None = None
    photo_depth: int | None = None
    skip_bad: bool = False
    max_drop: float = 0.1
    defer: bool = False
    output: Path = Path("dist")
    input_size: int | None = None
    batch: tuple[int, int, int] = (1, 1, 8)
    threads: int | None = None
    dla: int | None = None
    workspace: int | None = None
    optimization_level: int | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    mixed: bool = False
    describe: Path | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be right, before any work is done."""
        if self.precision not in PRECISIONS:
            raise UsageError(f"precision {self.precision!r} is none of {', '.join(PRECISIONS)}")
        if self.calibration_method not in (methods := ("auto", *METHODS)):
            raise UsageError(
                f"calibration method {self.calibration_method!r} is none of {', '.join(methods)}"
            )
        if not math.isfinite(self.max_drop) or self.max_drop < 0:
            raise UsageError(f"--max-drop {self.max_drop}: expected degrees, 0 or more")
        if self.mixed and self.precision != "int8":
            raise UsageError(
                f"--mixed keeps layers of an int8 build in floating point; in {self.precision} all "
                "of them are: leave it out or ask for --precision int8"
            )
        if self.calibration is not None and self.precision != "int8":
            raise UsageError(
                f"--calibration is for int8; {self.precision} has no scales to calibrate: leave it "
                "out or ask for --precision int8"
            )
        check_batch(self.batch)

    @classmethod
    def from_options(cls, given: Mapping[str, Any], *, max_drop_typed: bool) -> BuildRequest:
        """The request that the options of ``edgehp build`` make.

        Args:
            given: values of the options, by the names of the command's parameters.
            max_drop_typed: whether the user gave ``--max-drop``: a limit that somebody typed is
                one to be kept by mixed precision, not only to be checked.

        Raises:
            UsageError: the target is missing, or options contradict each other.
        """
        if given["target"] is None:
            raise UsageError("--target is missing\nhint: 'edgehp targets' lists all targets")
        values = {f.name: given[f.name] for f in fields(cls)}
        values["batch"] = parse_batch(given["batch"])
        if values["mixed"] is None:
            values["mixed"] = max_drop_typed and given["precision"] == "int8"
        return cls(**values)

    def to_recipe(self) -> dict[str, Any]:
        """JSON values that repeat the build. Paths by their last part: a manifest travels."""
        values = {k: v for k, v in asdict(self).items() if k not in _HOW}
        for name in ("network", "describe", "calibration", "validate_on"):
            values[name] = None if values[name] is None else Path(values[name]).name
        return {**values, "batch": list(self.batch)}


def parse_batch(text: str) -> tuple[int, int, int]:
    """Smallest, best and largest batch size from ``"1,4,8"``, or ``"4"`` for just that one.

    Raises:
        UsageError: neither one number nor three.
    """
    parts = text.split(",")
    if len(parts) not in (1, 3) or not all(p.strip().isdecimal() for p in parts):
        raise UsageError(
            f"--batch-sizes is {text!r}, expected one number or MIN,BEST,MAX\n"
            "hint: --batch-sizes 1,1,8"
        )
    numbers = [int(p) for p in parts] * (3 if len(parts) == 1 else 1)
    return numbers[0], numbers[1], numbers[2]


def unfinished_artifact(
    artifact: Path | None, finish: Path | None, target: str | None
) -> Path | None:
    """The deferred artifact that ``edgehp build`` is to finish, however it was named.

    Raises:
        UsageError: it was named twice, or together with a target.
    """
    if artifact is not None and finish is not None:
        raise UsageError("the artifact is given twice\nhint: edgehp build --finish DIR")
    found = artifact if artifact is not None else finish
    if found is not None and target is not None:
        raise UsageError(
            f"{found} is for a target already, and --target is given\n"
            "hint: --finish DIR alone finishes it, --target alone builds a new artifact"
        )
    return found


@dataclass(frozen=True)
class Plan:
    """What will be built.

    Attributes:
        target: from the target's data.
        kind: of the engine.
        options: of the engine's build; the capability of the GPU is that of the place.
        flavor: of the Q/DQ graph, one of `edgehp.quantization.recipe.FLAVORS`.
        half: whether the graph's body is FP16.
        compare: whether INT8 is compared with FP16, because the hardware may be slower in it.
        warnings: what the user must be told.
    """

    target: Target
    kind: str
    options: BuildOptions
    flavor: str
    half: bool
    compare: bool
    warnings: tuple[str, ...]

    @property
    def precision(self) -> str:
        """What the convolutions must run in."""
        return self.options.precision

    @property
    def float_precision(self) -> str:
        """What the layers of an INT8 build that stay in floating point run in."""
        return "fp16" if self.half else "fp32"

    def in_half(self) -> Plan:
        """The same in FP16, to compare with."""
        return replace(self, options=replace(self.options, precision="fp16"), compare=False)


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


@dataclass
class BuildContext:
    """The state of one build: what its steps share, and what they add to the artifact.

    Attributes:
        request: what the user asks for.
        plan: what the target's data make of it.
        place: where the engine is built; None where that is deferred.
        writer: of the artifact.
        device: facts about this machine.
        warnings: for the manifest.
        roles: file of the artifact -> its role.
    """

    request: BuildRequest
    plan: Plan
    place: Place | None
    writer: ArtifactWriter
    device: DeviceProbe
    warnings: list[str] = field(default_factory=list)
    roles: dict[str, str] = field(default_factory=dict)

    @property
    def half(self) -> bool:
        """Whether the graph's body is FP16; TensorRT 8.6 sets precisions by flags instead."""
        return self.plan.half and (self.place is None or self.place.knows_half_scales)

    def add(self, name: str, data: bytes, role: str) -> str:
        """Write a file of the artifact."""
        path = self.writer.path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        self.roles[name] = role
        return name

    def warn(self, *sentences: str | None) -> None:
        """Tell the user now and in the manifest."""
        for sentence in sentences:
            if sentence:
                logger.warning("%s", sentence)
                self.warnings.append(sentence)


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
    verdicts = {f"in {request.precision}": verdict}
    if request.dla is not None:
        verdicts["on a DLA"] = target.dla
    for what, said in verdicts.items():
        if said.supported == "no":
            raise UsageError(f"{target.name} {what}: {said.reason}")
        if said.supported == "warn":
            warnings.append(f"{target.name} {what}: {said.reason}")
    on_gpu = target.engine != "openvino"
    if request.workspace is not None and not on_gpu:
        raise UsageError(f"--workspace is for TensorRT; {target.name} runs on the processor")
    usual = BuildRequest(request.target)
    for name in ("optimization_level", "version_compatible", "hardware_compatible"):
        if getattr(request, name) != getattr(usual, name) and target.engine != "tensorrt":
            option = name.replace("_", "-")
            raise UsageError(f"--{option} is for TensorRT; {target.name} has {target.engine}")
    plan = Plan(
        target=target,
        kind=target.engine,
        options=BuildOptions(
            precision=request.precision,
            compute_capabilities=target.compute_capabilities,
            batch=request.batch,
            workspace_mib=request.workspace,
            optimization_level=request.optimization_level,
            dla=request.dla,
            dla_cores=target.dla_cores,
            version_compatible=request.version_compatible,
            hardware_compatible=request.hardware_compatible,
            threads=request.threads,
        ),
        flavor=target.flavor,
        # A strongly typed engine computes what lies outside Q/DQ in the graph's own type.
        half=on_gpu and request.precision in ("int8", "fp16"),
        compare=on_gpu and request.precision == "int8" and verdict.supported == "warn",
        warnings=tuple(warnings),
    )
    return plan if on_gpu else _processor(plan)


def _processor(plan: Plan) -> Plan:
    missing = engine_available("openvino")
    if missing is None:
        return plan
    if (other := engine_available("onnxruntime")) is not None:
        raise EnvironmentalError(f"no engine for the processor: {missing}; {other}")
    note = f"built for onnxruntime, which is slower here than OpenVINO: {missing}"
    return replace(plan, kind="onnxruntime", flavor="onnxruntime", warnings=(*plan.warnings, note))


class IncompleteDeviceError(EnvironmentalError):
    """This is the device that was asked for, and what it lacks can be installed."""


def find_place(plan: Plan, device: DeviceProbe) -> Place:
    """Where the engine can be built: here, or an error that says what is missing.

    Raises:
        EnvironmentalError: the runtime, the driver or the right device is not here.
        IncompleteDeviceError: the right device is, without the packages.
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
        raise IncompleteDeviceError(missing)
    version, known = device.version("tensorrt"), plan.target.tensorrt
    if version is not None and known is not None and not known.contains(version):
        raise CompatibilityError(
            f"TensorRT {version} found; {plan.target.name} needs {known.words}"
            f"{f' ({known.note})' if known.note else ''}: install such a version"
        )
    module = device.module()
    if plan.target.module_ids and module is None:
        raise EnvironmentalError(f"{plan.target.name} is a Jetson module; this machine is none")
    part = module_part(module or "")
    if part is not None and plan.target.module_ids and part not in plan.target.module_ids:
        here = target_of_part(part)
        raise EnvironmentalError(
            f"{plan.target.name} was asked for, but this module is "
            f"{here.name if here else module}: its engines are tuned to other clocks and SMs\n"
            + (f"hint: ask for --target {here.name}" if here else "hint: see 'edgehp targets'")
        )
    return Place(gpus[0], module, version)


def missing_words(reason: Exception) -> str:
    """What this machine lacks, without what to install: another one is to build the engine."""
    return re.split("; install|\n", str(reason))[0]


def how_to_finish(plan: Plan, request: BuildRequest, reason: Exception) -> EnvironmentalError:
    """The error of a build that needs another machine: what is missing, and the two commands."""
    version, name = plan.target.tensorrt, plan.target.name
    needs = f", with TensorRT {version.words}" if version is not None else ""
    artifact = "ARTIFACT"
    if request.network in BUNDLED and request.input_size is None:
        artifact = str(request.output / f"{request.network}-{name}-{plan.precision}")
    finish = finish_command(artifact, request.validate_on, request.threads)
    why = missing_words(reason)
    # 'orin' may be another module there.
    note = resolve_target(request.target).note
    return EnvironmentalError(
        f"the engine for {name} is built on its own device{needs}; here: {why}\n"
        "hint: make everything else here, then the engine there over SSH:\n"
        f"  {shlex.join([*_same_build(plan, request), '--defer'])}\n"
        f"  {finish} --host me@board" + (f"\n{note}" if note else "")
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
    words = ["edgehp", "build", "--target", plan.target.name]
    words += [] if plan.precision == usual.precision else ["--precision", plan.precision]
    for name in (f.name for f in fields(usual)):
        value = getattr(request, name)
        if name not in _NOT_REPEATED and value != getattr(usual, name):
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    if request.batch != usual.batch:
        sizes = request.batch if len(set(request.batch)) > 1 else request.batch[:1]
        words += ["--batch-sizes", ",".join(map(str, sizes))]
    if request.mixed:
        words.append("--mixed")
    elif request.precision == "int8" and request.max_drop != usual.max_drop:
        # A limit that is typed asks for the search.
        words.append("--no-mixed")
    return words
