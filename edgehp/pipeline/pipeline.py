"""From a network to a checked artifact, step by step."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

import edgehp
from edgehp._installed import parse_version
from edgehp.artifact.manifest import (
    Accuracy,
    BuildRecord,
    Calibration,
    Comparison,
    Golden,
    Manifest,
    NetworkRecord,
    StepTime,
    TargetRecord,
)
from edgehp.artifact.write import ArtifactWriter
from edgehp.device import DeviceProbe, HostProbe
from edgehp.engines import PROCESSOR_ENGINES, processor_engine
from edgehp.engines.trt import require_parsable
from edgehp.errors import EnvironmentalError, UsageError
from edgehp.files import now, sha256_bytes
from edgehp.networks.bundled import BUNDLED, Network, resolve_network
from edgehp.networks.graph import graph_bytes
from edgehp.networks.spec import NetworkSpec
from edgehp.pipeline.accuracy import (
    Run,
    emulator,
    golden_picture,
    golden_vectors,
    mean_drop,
    measure,
    reference_bytes,
    run_graph,
    runs_here,
)
from edgehp.pipeline.crops import (
    CropSet,
    appearance_check,
    calibration_list,
    held_out_crops,
    load_calibration,
    require_disjoint,
    require_photos,
)
from edgehp.pipeline.engine import BuiltEngine, against_half, build_here, planned_precision
from edgehp.pipeline.mixed import Mixed, MixedSearch, batch_of
from edgehp.pipeline.plan import (
    BuildContext,
    BuildRequest,
    IncompleteDeviceError,
    Place,
    Plan,
    find_place,
    how_to_finish,
    make_plan,
    missing_words,
)
from edgehp.pipeline.sensitivity import REFERENCE_GRAPH
from edgehp.progress import step
from edgehp.quantization.compare import split_crops
from edgehp.quantization.equalize import equalize
from edgehp.quantization.graph import GraphView
from edgehp.quantization.half import to_half_body
from edgehp.quantization.placement import float_operators
from edgehp.quantization.quantize import AUTO, QuantizationConfig, QuantizedModel, quantize
from edgehp.validation.appearance import ADVICE

if TYPE_CHECKING:
    import onnx

logger = logging.getLogger(__name__)

GRAPH = "graph.onnx"
GOLDEN = "golden.png"
REFERENCE_ANGLES = "reference.npz"
CALIBRATION_LIST = "calibration.csv"
CALIBRATION_TABLE = "calibration-table.json"
# Beside the engine, not under reports/: it is part of the build, and later ones do not replace it.
SENSITIVITY = "sensitivity.json"


@dataclass(frozen=True)
class BuildResult:
    """A finished build: where the artifact is and what its manifest says."""

    path: Path
    manifest: Manifest


class StepClock:
    """Times the steps of a build.

    Attributes:
        times: of the steps that are done, in order.
    """

    def __init__(self) -> None:
        self.times: list[StepTime] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Run the body as the step called `name`."""
        started = time.monotonic()
        with step(name):
            yield
        self.times.append(StepTime(name, round(time.monotonic() - started, 3)))


def artifact_name(network: str, target: str, precision: str) -> str:
    """The artifact's directory name, ``<network>-<target>-<precision>``."""
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in network)
    return f"{plain.strip('.-')[:100] or 'network'}-{target}-{precision}"


@dataclass(frozen=True)
class OpenedNetwork:
    """The network of a build.

    Attributes:
        network: at the input size asked for.
        by_name: whether the name alone opens it again.
        own_size: that its weights were trained for in pixels, where that is another one.
    """

    network: Network
    by_name: bool
    own_size: int | None


def open_network(text: str, input_size: int | None, describe: Path | None = None) -> OpenedNetwork:
    """Open the network a user named.

    Args:
        text: bundled name or file.
        input_size: another input side in pixels, or None.
        describe: description of a network of others, or None.

    Raises:
        UsageError: no such network, or a size that cannot be changed.
        CheckpointError, EnvironmentalError: as `resolve_network`.
    """
    network = resolve_network(text, describe)
    size = network.spec.preprocessing.size
    if input_size is None or input_size == size:
        return OpenedNetwork(network, text in BUNDLED, None)
    if not isinstance(network.spec, NetworkSpec) or network.weights is None:
        raise UsageError(
            f"{text} is a graph for crops of {size} pixels; its size is fixed\n"
            f"hint: give the checkpoint to build for {input_size}"
        )
    resized = replace(network, spec=network.spec.with_size(input_size))
    return OpenedNetwork(resized, False, size)


def build(request: BuildRequest, device: DeviceProbe | None = None) -> BuildResult:
    """Build an artifact.

    Args:
        request: what the user asks for.
        device: facts about this machine; probed when omitted.

    Raises:
        UsageError: the request makes no sense for the target.
        DataError, CheckpointError: network, crops or graph cannot be used.
        AccuracyError: the drop is above the gate; nothing is written.
        CompatibilityError: less precision was reached than asked for.
        EnvironmentalError: a package or the device is missing.
    """
    steps, device = StepClock(), device or HostProbe()
    require_photos(request.calibration, "--calibration", request.skip_bad)
    require_photos(request.validate_on, "--validate-on", request.skip_bad)
    with steps("target"):
        plan = make_plan(request)
        place = _find_place(plan, request, device)
    with steps("network"):
        opened = open_network(request.network, request.input_size, request.describe)
        network = opened.network
        logger.warning("weights of %s: %s", network.spec.name, _licence(network))
    # Artifacts of several sizes of one network lie side by side.
    size = "" if opened.own_size is None else f"-{network.spec.preprocessing.size}px"
    name = artifact_name(f"{network.spec.name}{size}", plan.target.name, plan.precision)
    for warning in plan.warnings:
        logger.warning("%s", warning)
    with ArtifactWriter(request.output / name) as writer:
        context = BuildContext(request, plan, place, writer, device, list(plan.warnings))
        manifest = _Build(context, opened, steps).run(name)
        return BuildResult(writer.destination, manifest)


def _licence(network: Network) -> str:
    return network.spec.licence or "no licence stated: ask whoever trained them"


def _tensorrt_of(plan: Plan, place: Place | None) -> str | None:
    """The TensorRT here; of a deferred build the newest that the target's devices come with."""
    if plan.kind != "tensorrt":
        return None
    if place is not None and place.tensorrt is not None:
        return place.tensorrt
    if plan.target.jetpack:
        return max((row.tensorrt for row in plan.target.jetpack), key=parse_version)
    return plan.target.tensorrt.maximum if plan.target.tensorrt is not None else None


def _find_place(plan: Plan, request: BuildRequest, device: DeviceProbe) -> Place | None:
    """Where the engine is built; None where the build is deferred."""
    try:
        return find_place(plan, device)
    except EnvironmentalError as e:
        if plan.kind != "tensorrt":
            raise
        if not request.defer:
            if isinstance(e, IncompleteDeviceError):
                raise
            raise how_to_finish(plan, request, e) from e
        logger.warning("the engine is deferred: %s", missing_words(e))
        return None


@dataclass(frozen=True)
class _Inputs:
    """The float graph and the crops."""

    model: onnx.ModelProto
    reference: Path
    held_out: CropSet
    crops: CropSet | None


@dataclass(frozen=True)
class _EngineGraph:
    """The graph that the engine is made from, and how it was quantized, if it was."""

    path: Path
    quantized: QuantizedModel | None
    calibration: Calibration | None


@dataclass(frozen=True)
class _Product:
    """The engine, where it was built, what its graph or it answers, and what was mixed."""

    built: BuiltEngine | None
    run: Run
    mixed: Mixed | None


@dataclass(frozen=True)
class _Measured:
    """FP32's answers, what the gate found, and INT8 against FP16 where that was timed."""

    before: Run
    accuracy: Accuracy
    comparison: Comparison | None


class _Build:
    """The steps of one build, in their order."""

    def __init__(self, context: BuildContext, opened: OpenedNetwork, steps: StepClock) -> None:
        self._context = context
        self._request = context.request
        self._plan = context.plan
        self._opened = opened
        self._network = opened.network
        self._steps = steps

    def run(self, name: str) -> Manifest:
        """Go through all steps and commit the artifact called `name`."""
        context, steps = self._context, self._steps
        inputs = self._inputs()
        with steps("quantize" if inputs.crops else "precision"):
            graph = self._engine_graph(inputs)
        built = None
        if context.place is not None:
            with steps("engine"):
                built = self._engine(context.place, graph.path)
        with steps("accuracy"):
            before = self._reference(inputs)
            product = _Product(built, self._answers(graph.path, built, inputs.held_out), None)
        drop = mean_drop(before.answers.clean, product.run.answers.clean, inputs.held_out)
        if self._request.mixed and graph.quantized is not None and drop > self._request.max_drop:
            product = self._mix(inputs, graph, product, before, drop)
        with steps("gate"):
            accuracy = self._gate(before, product, inputs.held_out)
        comparison = None
        if product.built is not None and self._plan.compare:
            with steps("compare"):
                comparison = self._against_half(inputs, product.built)
        with steps("artifact"):
            measured = _Measured(before, accuracy, comparison)
            manifest = self._manifest(name, inputs, graph, product, measured)
            return context.writer.commit(manifest, context.roles)

    def _inputs(self) -> _Inputs:
        context, request = self._context, self._request
        preprocessing = self._network.spec.preprocessing
        with self._steps("graph"):
            model = self._network.graph()
            if (version := _tensorrt_of(self._plan, context.place)) is not None:
                require_parsable(model, version, self._plan.target.name)
            if self._network.spec.bins is None:
                context.warn(
                    "the network has no bins, so the artifact gives no spread: confidence is null"
                )
        if (own := self._opened.own_size) is not None:
            context.warn(
                f"the weights were trained for crops of {own} pixels and run at "
                f"{preprocessing.size} without training, which the drop is measured against: "
                "fine-tune at that size with 'edgehp distill' to win accuracy back"
            )
        crops = None
        with self._steps("crops"):
            how = request.photo_depth, request.skip_bad
            held_out = held_out_crops(request.validate_on, preprocessing, *how)
            if self._plan.precision == "int8":
                crops = load_calibration(request.calibration, preprocessing, *how)
                require_disjoint(crops, held_out)
            if crops is not None and crops.left_out:
                total = len(crops) + crops.left_out + crops.duplicates
                context.warn(
                    f"{len(crops)} of {total} calibration crops are used, evenly spaced: more do "
                    "not move the scales"
                )
        if crops is not None and not self._opened.by_name:
            # The artifact keeps its float network, whose layers mixed precision takes back.
            with self._steps("equalize"):
                model = equalize(model, list(crops.crops), threads=request.threads)
        reference = _write_graph(model, context.writer.scratch / REFERENCE_GRAPH)
        return _Inputs(model, reference, held_out, crops)

    def _engine_graph(self, inputs: _Inputs) -> _EngineGraph:
        context, request = self._context, self._request
        path = context.writer.scratch / GRAPH
        if inputs.crops is None:
            model = to_half_body(inputs.model)[0] if context.half else inputs.model
            return _EngineGraph(_write_graph(model, path), None, None)
        config = QuantizationConfig(
            flavor=self._plan.flavor,
            method=request.calibration_method,
            # A method that is named is taken as it is.
            rounding=None if request.calibration_method == AUTO else False,
            body="fp16" if context.half else "fp32",
            threads=request.threads,
        )
        kept = float_operators(GraphView(inputs.model), self._plan.flavor)
        if kept:
            shown = ", ".join(
                f"{len(names)} {kind} ({names[0]}, ...)"
                if len(names) > 1
                else f"1 {kind} ({names[0]})"
                for kind, names in kept.items()
            )
            context.warn(f"these operators between the layers stay in floating point: {shown}")
        quantized = quantize(inputs.model, list(inputs.crops.crops), config)
        _write_graph(quantized.model, path)
        return _EngineGraph(
            path, quantized, self._calibration(quantized, inputs.crops, inputs.held_out)
        )

    def _calibration(
        self, quantized: QuantizedModel, crops: CropSet, held_out: CropSet
    ) -> Calibration:
        """The record of the calibration, its files, and a warning where its crops look unlike."""
        context = self._context
        check = appearance_check(
            quantized.model,
            crops,
            held_out,
            threads=self._request.threads,
            advice=_advice(self._request),
        )
        context.warn(check.warning)
        listing = calibration_list(crops)
        context.add(CALIBRATION_LIST, listing, "calibration")
        context.add(CALIBRATION_TABLE, quantized.table.to_json().encode(), "calibration")
        return Calibration(
            source=crops.source,
            count=len(crops),
            duplicates=crops.duplicates,
            list=CALIBRATION_LIST,
            list_sha256=sha256_bytes(listing),
            method=str(quantized.recipe),
            table=CALIBRATION_TABLE,
            appearance=check.calibration,
            clipped=None if check.clipped is None else check.clipped.usual,
        )

    def _engine(self, place: Place, graph: Path, mixed: Mixed | None = None) -> BuiltEngine:
        return build_here(
            self._plan,
            place,
            graph,
            self._context.writer.path,
            mixed=None if mixed is None else mixed.record,
        )

    def _reference(self, inputs: _Inputs) -> Run:
        """FP32's answers, by the artifact's engine where it can: the drop is of INT8 alone."""
        kind, threads = self._plan.kind, self._request.threads
        processor = kind if kind in PROCESSOR_ENGINES else processor_engine()
        return run_graph(
            processor, inputs.reference, inputs.held_out, threads=threads, degraded=True
        )

    def _answers(self, graph: Path, built: BuiltEngine | None, held_out: CropSet) -> Run:
        """The artifact's answers.

        An engine that cannot run here is emulated: the very graph it is made from, on the
        processor.
        """
        kind, threads = self._plan.kind, self._request.threads
        capabilities = built.target.compute_capabilities if built else ()
        if built is not None and runs_here(kind, capabilities, self._context.device):
            most = built.engine.max_batch
            return run_graph(kind, built.path, held_out, most=most, threads=threads, degraded=True)
        run = run_graph(emulator(self._plan), graph, held_out, threads=threads, degraded=True)
        return replace(run, emulated=True)

    def _mix(
        self, inputs: _Inputs, graph: _EngineGraph, product: _Product, before: Run, drop: float
    ) -> _Product:
        """Search a mixed precision that keeps the drop, and build its engine."""
        context, built = self._context, product.built
        if graph.quantized is None or inputs.crops is None:
            return product
        search = MixedSearch(
            context,
            graph.quantized.model,
            inputs.model,
            inputs.crops.crops[split_crops(list(inputs.crops.crops))[1]],
            inputs.held_out,
            before.answers.clean,
            drop,
        )
        with self._steps("search"):
            mixed = search.run(graph.path, built)
        context.add(SENSITIVITY, mixed.report.encode(), "report")
        if built is not None and context.place is not None:
            with self._steps("engine, mixed"):
                all_int8 = search.keep_all_int8(built)
                for file in built.engine.files:
                    (context.writer.path / file).unlink()
                built = self._engine(context.place, graph.path, mixed)
                if all_int8 is not None:
                    mixed = search.timed(mixed, built, all_int8)
                precision = msgspec.structs.replace(built.precision, mixed=mixed.record)
                built = replace(built, precision=precision)
        with self._steps("accuracy, mixed"):
            return _Product(built, self._answers(graph.path, built, inputs.held_out), mixed)

    def _gate(self, before: Run, product: _Product, held_out: CropSet) -> Accuracy:
        context, run = self._context, product.run
        if product.built is not None:
            context.roles |= dict.fromkeys(product.built.engine.files, "engine")
            context.warn(*product.built.warnings)
        if run.emulated:
            context.warn(
                f"the accuracy is that of the engine's graph run by {run.runtime}: the engine "
                "itself cannot run on this machine"
            )
        accuracy, warnings = measure(
            before.answers, run.answers, held_out, self._request.max_drop, run.measured_with
        )
        context.warn(*warnings)
        if product.mixed is not None:
            context.warn(product.mixed.sentence)
        return accuracy

    def _manifest(
        self,
        name: str,
        inputs: _Inputs,
        graph: _EngineGraph,
        product: _Product,
        measured: _Measured,
    ) -> Manifest:
        context, request, built = self._context, self._request, product.built
        before = measured.before
        golden = self._golden(inputs, product, before)
        if built is None:
            answers = reference_bytes(before.answers, inputs.held_out)
            context.add(REFERENCE_ANGLES, answers, "reference")
        if not self._opened.by_name:
            context.add(REFERENCE_GRAPH, inputs.reference.read_bytes(), "reference")
        recipe = request.to_recipe()
        if self._opened.own_size is not None:
            recipe["own_size"] = self._opened.own_size
        if graph.quantized is not None:
            recipe["quantization"] = msgspec.json.decode(
                msgspec.json.encode(graph.quantized.recipe)
            )
        target = self._plan.target
        planned = planned_precision(
            self._plan, None if product.mixed is None else product.mixed.record
        )
        return Manifest(
            state="deferred" if built is None else "complete",
            name=name,
            created=now(),
            edgehp_version=edgehp.__version__,
            network=_network_record(self._network, request),
            preprocessing=self._network.spec.preprocessing,
            target=built.target
            if built
            else TargetRecord(target.name, target.compute_capabilities),
            precision=built.precision if built else planned,
            engine=built.engine if built else None,
            graph=self._keep_graph(graph.path, built),
            calibration=graph.calibration,
            accuracy=measured.accuracy,
            golden=golden,
            build=BuildRecord(
                recipe, tuple(self._steps.times), tuple(context.warnings), measured.comparison
            ),
            files=(),
        )

    def _golden(self, inputs: _Inputs, product: _Product, before: Run) -> Golden:
        golden, picture = golden_vectors(
            before.answers.clean, product.run.answers.clean, inputs.held_out, GOLDEN
        )
        self._context.add(GOLDEN, golden_picture(picture), "golden")
        return golden

    def _keep_graph(self, graph: Path, built: BuiltEngine | None) -> str:
        """Put the graph into the artifact; where the engine file is that graph, once is enough."""
        if built is not None and built.same_as_graph:
            return built.engine.files[0]
        return self._context.add(GRAPH, graph.read_bytes(), "graph")

    def _against_half(self, inputs: _Inputs, built: BuiltEngine) -> Comparison:
        """Time INT8 against FP16, where the hardware may be slower in INT8."""
        context = self._context
        if context.place is None:
            raise EnvironmentalError("INT8 and FP16 can only be compared on the device")
        crops = batch_of(inputs.held_out, self._request.batch[1])
        found, verdict = against_half(
            self._plan, context.place, inputs.model, built, crops, context.writer.scratch
        )
        context.warn(verdict)
        return found


def _write_graph(model: onnx.ModelProto, path: Path) -> Path:
    """Write a graph as one file, the same bytes for the same graph."""
    path.write_bytes(graph_bytes(model))
    return path


def _advice(request: BuildRequest) -> str:
    """What to do where the calibration crops look unlike those of the gate."""
    if request.calibration is None or request.validate_on is not None:
        return ADVICE
    # The user's crops are right already: it is the gate that looks at others.
    return (
        "the gate ran on the rendered heads that edgehp ships; name other faces of the camera that "
        "will be used, not those calibrated on, with --validate-on"
    )


def _network_record(network: Network, request: BuildRequest) -> NetworkRecord:
    return NetworkRecord(
        network.spec.to_dict(),
        network.spec.digest,
        network.digest,
        # The last part only: where a file lies on the building machine says nothing elsewhere.
        Path(request.network).name,
        network.spec.licence,
    )
