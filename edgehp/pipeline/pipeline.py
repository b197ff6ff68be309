"""From a network to a checked artifact, step by step."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

import edgehp
from edgehp.artifact.device import DeviceProbe, HostProbe
from edgehp.artifact.manifest import (
    BuildRecord,
    Calibration,
    Comparison,
    Manifest,
    NetworkRecord,
    TargetRecord,
)
from edgehp.artifact.write import ArtifactWriter
from edgehp.engines import PROCESSOR_ENGINES, processor_engine
from edgehp.errors import EnvironmentalError
from edgehp.files import sha256_bytes, sha256_file
from edgehp.networks.bundled import Network
from edgehp.pipeline.accuracy import (
    Answers,
    golden_picture,
    golden_vectors,
    mean_drop,
    measure,
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
from edgehp.pipeline.engine import BuiltEngine, build_here, planned_precision
from edgehp.pipeline.graphs import (
    REFERENCE_GRAPH,
    QuantizedGraph,
    half_graph,
    open_network,
    quantized_graph,
    write_graph,
)
from edgehp.pipeline.mixed import MixedBuild, against_half
from edgehp.pipeline.plan import Place, Plan, find_place, how_to_finish, make_plan
from edgehp.pipeline.progress import StepClock, Watcher
from edgehp.pipeline.request import BuildRequest
from edgehp.pipeline.run import ITSELF, emulator, reference_bytes, run_graph, runs_here
from edgehp.pipeline.work import Work
from edgehp.quantization.quantize import AUTO, QuantizationConfig
from edgehp.validation.appearance import ADVICE
from edgehp.validation.metrics import frame_errors

if TYPE_CHECKING:
    import onnx

__all__ = ["BuildResult", "artifact_name", "build", "now"]

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


def artifact_name(network: str, target: str, precision: str) -> str:
    """The artifact's directory name, ``<network>-<target>-<precision>``."""
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in network)
    return f"{plain.strip('.-')[:100] or 'network'}-{target}-{precision}"


def now() -> str:
    """The time in UTC as manifests write it."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def build(
    request: BuildRequest, watcher: Watcher | None = None, device: DeviceProbe | None = None
) -> BuildResult:
    """Build an artifact.

    Args:
        request: what the user asks for.
        watcher: told about every step.
        device: facts about this machine; probed when omitted.

    Raises:
        UsageError: the request makes no sense for the target.
        DataError, CheckpointError: network, crops or graph cannot be used.
        AccuracyError: the drop is above the gate; nothing is written.
        CompatibilityError: less precision was reached than asked for.
        EnvironmentalError: a package or the device is missing.
    """
    steps, device = StepClock(watcher), device or HostProbe()
    require_photos(request.calibration, "--calibration")
    require_photos(request.validate_on, "--validate-on")
    with steps("target"):
        plan = make_plan(request)
        place = _find_place(plan, request, device)
    with steps("network"):
        network, named, own = open_network(request.network, request.input_size)
        logger.warning("weights of %s: %s", network.spec.name, _licence(network))
    # Artifacts of several sizes of one network lie side by side.
    size = "" if own is None else f"-{network.spec.preprocessing.size}px"
    name = artifact_name(f"{network.spec.name}{size}", plan.target.name, plan.precision)
    for warning in plan.warnings:
        logger.warning("%s", warning)
    with ArtifactWriter(request.output / name) as writer:
        work = Work(request, plan, place, writer, device)
        manifest = _make(work, network, named, own, name, steps)
        return BuildResult(writer.destination, manifest)


def _licence(network: Network) -> str:
    return network.spec.licence or "no licence stated: ask whoever trained them"


def _find_place(plan: Plan, request: BuildRequest, device: DeviceProbe) -> Place | None:
    """Where the engine is built; None where the build is deferred."""
    try:
        return find_place(plan, device)
    except EnvironmentalError as e:
        if plan.kind != "tensorrt":
            raise
        if not request.defer:
            raise how_to_finish(plan, request, e) from e
        logger.warning("the engine is deferred: %s", e)
        return None


def _make(
    work: Work, network: Network, named: bool, own: Network | None, name: str, steps: StepClock
) -> Manifest:
    request, plan, writer = work.request, work.plan, work.writer
    with steps("graph"):
        model = network.graph()
        reference = write_graph(model, writer.scratch / REFERENCE_GRAPH)
    with steps("crops"):
        held_out = held_out_crops(request.validate_on, network.spec.preprocessing)
        crops = _calibration_crops(work, network, held_out)
    with steps("quantise" if crops else "precision"):
        graph = writer.scratch / GRAPH
        made = _engine_graph(work, network, model, crops, graph)
        calibration = _calibration(work, made, crops, held_out) if made and crops else None
    built = None
    if work.place is not None:
        with steps("engine"):
            built = build_here(plan, work.place, graph, writer.path, request.batch, request.threads)
    with steps("accuracy"):
        before = _reference_answers(work, reference, held_out)
        after, runner = _answers(work, graph, built, held_out)
        if own is not None:
            work.warn(_resized(work, own, network, before, held_out))
    mixed = None
    if request.mixed and made is not None and crops is not None:
        drop = mean_drop(before.clean, after.clean, held_out)
        if drop > request.max_drop:
            search = MixedBuild(work, made, crops, held_out, before.clean, drop)
            with steps("search"):
                mixed = search.run(graph, reference, built)
            work.add(SENSITIVITY, mixed.report.encode(), "report")
            if built is not None and work.place is not None:
                with steps("engine, mixed"):
                    built = search.rebuild(mixed, graph, built)
                    mixed = search.timed(mixed, built)
                    precision = msgspec.structs.replace(built.precision, mixed=mixed.record)
                    built = replace(built, precision=precision)
            with steps("accuracy, mixed"):
                after, runner = _answers(work, graph, built, held_out)
    if built is not None:
        work.roles |= dict.fromkeys(built.engine.files, "engine")
        work.warn(*built.warnings)
    with steps("gate"):
        emulated = None if runner.endswith(ITSELF) else runner
        if emulated:
            work.warn(
                f"the accuracy is that of the engine's graph run by {emulated}: the engine itself "
                "cannot run on this machine"
            )
        words = f"{runner}, an emulation of the engine's graph" if emulated else runner
        accuracy, doubts = measure(before, after, held_out, request.max_drop, words)
        work.warn(*doubts)
        if mixed is not None:
            work.warn(mixed.sentence)
    comparison = None
    if built is not None and plan.compare:
        with steps("compare"):
            comparison = _compare(work, model, built, held_out)
    with steps("artifact"):
        golden, picture = golden_vectors(before.clean, after.clean, held_out, GOLDEN)
        work.add(GOLDEN, golden_picture(picture), "golden")
        if built is None:
            work.add(REFERENCE_ANGLES, reference_bytes(before, held_out), "reference")
        if not named:
            work.add(REFERENCE_GRAPH, reference.read_bytes(), "reference")
        recipe = request.to_recipe()
        if own is not None:
            recipe["own_size"] = own.spec.preprocessing.size
        if made is not None and made.recipe is not None:
            recipe["quantization"] = msgspec.json.decode(msgspec.json.encode(made.recipe))
        planned = planned_precision(plan, None if mixed is None else mixed.record)
        manifest = Manifest(
            state="deferred" if built is None else "complete",
            name=name,
            created=now(),
            edgehp_version=edgehp.__version__,
            network=_network_record(network, request),
            preprocessing=network.spec.preprocessing,
            target=built.target
            if built
            else TargetRecord(plan.target.name, plan.target.compute_capabilities),
            precision=built.precision if built else planned,
            engine=built.engine if built else None,
            graph=_keep_graph(work, graph, built),
            calibration=calibration,
            accuracy=accuracy,
            golden=golden,
            build=BuildRecord(recipe, steps.times, tuple(work.warnings), comparison),
            files=(),
        )
        return writer.commit(manifest, work.roles)


def _calibration_crops(work: Work, network: Network, held_out: CropSet) -> CropSet | None:
    if work.plan.precision != "int8":
        return None
    crops = load_calibration(work.request.calibration, network.spec.preprocessing)
    require_disjoint(crops, held_out)
    if crops.left_out:
        total = len(crops) + crops.left_out + crops.duplicates
        work.warn(
            f"{len(crops)} of {total} calibration crops are used, evenly spaced: more do not move "
            "the scales"
        )
    return crops


def _engine_graph(
    work: Work, network: Network, model: onnx.ModelProto, crops: CropSet | None, path: Path
) -> QuantizedGraph | None:
    """Write the graph the engine is made from; how it was quantised, if it was."""
    if crops is None:
        write_graph(half_graph(model) if work.half else model, path)
        return None
    request = work.request
    config = QuantizationConfig(
        flavor=work.plan.flavour,
        method=request.method,
        # A method that is named is taken as it is.
        rounding=None if request.method == AUTO else False,
        body="fp16" if work.half else "fp32",
        threads=request.threads,
    )
    made = quantized_graph(model, crops.crops, config)
    write_graph(made.model, path)
    return made


def _calibration(
    work: Work, made: QuantizedGraph, crops: CropSet, held_out: CropSet
) -> Calibration:
    """The record of the calibration, its files, and a warning where its crops look unlike."""
    check = appearance_check(
        made.model, crops, held_out, threads=work.request.threads, advice=_advice(work.request)
    )
    work.warn(check.warning)
    listing = calibration_list(crops)
    work.add(CALIBRATION_LIST, listing, "calibration")
    work.add(CALIBRATION_TABLE, made.table.encode(), "calibration")
    return Calibration(
        source=crops.source,
        count=len(crops),
        duplicates=crops.duplicates,
        list=CALIBRATION_LIST,
        list_sha256=sha256_bytes(listing),
        method=made.method,
        table=CALIBRATION_TABLE,
        appearance=check.calibration.to_dict(),
        clipped=check.calibration_clipped,
    )


def _advice(request: BuildRequest) -> str:
    """What to do where the calibration crops look unlike those of the gate."""
    if request.calibration is None or request.validate_on is not None:
        return ADVICE
    # The user's crops are right already: it is the gate that looks at others.
    return (
        "the gate ran on the rendered heads that edgehp ships; name other faces of the camera that "
        "will be used, not those calibrated on, with --validate-on"
    )


def _reference_answers(work: Work, reference: Path, held_out: CropSet) -> Answers:
    """FP32's answers, by the artifact's engine where it can: the drop is then of INT8 alone."""
    kind = work.plan.kind
    processor = kind if kind in PROCESSOR_ENGINES else processor_engine()
    threads = work.request.threads
    return run_graph(processor, reference, held_out, threads=threads, harder=True)[0]


def _answers(
    work: Work, graph: Path, built: BuiltEngine | None, held_out: CropSet
) -> tuple[Answers, str]:
    """The artifact's answers and what gave them.

    An engine that cannot run here is emulated: the very graph it is made from, on the processor.
    """
    threads = work.request.threads
    kind = work.plan.kind
    capabilities = built.target.compute_capabilities if built else ()
    if built is not None and runs_here(kind, capabilities, work.device):
        most = built.engine.max_batch
        after, runner = run_graph(
            kind, built.path, held_out, most=most, threads=threads, harder=True
        )
        return after, f"{runner}{ITSELF}"
    return run_graph(emulator(work.plan), graph, held_out, threads=threads, harder=True)


def _resized(work: Work, own: Network, network: Network, before: Answers, held_out: CropSet) -> str:
    """What another input size than the one trained for costs in FP32, as a warning."""
    sizes = own.spec.preprocessing.size, network.spec.preprocessing.size
    crops = held_out_crops(work.request.validate_on, own.spec.preprocessing)
    graph = write_graph(own.graph(), work.writer.scratch / "own-size.onnx")
    kind = processor_engine()
    answers = run_graph(kind, graph, crops, threads=work.request.threads)[0].clean
    start = (
        f"the weights were trained for crops of {sizes[0]} pixels and run at {sizes[1]} without "
        "training"
    )
    end = (
        f"the drop of this artifact is against FP32 at {sizes[1]}; fine-tune at that size with "
        "'edgehp distill' to win accuracy back"
    )
    if held_out.angles is None or crops.angles is None:
        if crops.names != held_out.names:
            return f"{start}; {end}"
        apart = float(frame_errors(before.clean.angles, answers.angles).mean())
        return f"{start}: FP32 moves by {apart:.3f} degrees on {held_out.source}; {end}"
    was = float(frame_errors(answers.angles, crops.angles).mean())
    found = float(frame_errors(before.clean.angles, held_out.angles).mean())
    return (
        f"{start}: MAE of FP32 on {held_out.source} {was:.3f} degrees at {sizes[0]}, {found:.3f} "
        f"at {sizes[1]}; {end}"
    )


def _compare(
    work: Work, model: onnx.ModelProto, built: BuiltEngine, held_out: CropSet
) -> Comparison:
    """INT8 against FP16 where the hardware may be slower in INT8."""
    int8_ms, fp16_ms = against_half(work, model, built.path, held_out)
    verdict = "INT8 is faster" if int8_ms < fp16_ms else "INT8 is NOT faster: use --precision fp16"
    batch = work.request.batch[1]
    work.warn(f"at batch {batch}: INT8 {int8_ms:.2f} ms, FP16 {fp16_ms:.2f} ms; {verdict}")
    return Comparison(round(int8_ms, 4), round(fp16_ms, 4), batch)


def _keep_graph(work: Work, graph: Path, built: BuiltEngine | None) -> str:
    """Put the graph into the artifact; where the engine file is that graph, once is enough."""
    if built is not None and built.same_as_graph:
        return built.engine.files[0]
    return work.add(GRAPH, graph.read_bytes(), "graph")


def _network_record(network: Network, request: BuildRequest) -> NetworkRecord:
    return NetworkRecord(
        network.spec.to_dict(),
        network.spec.digest,
        sha256_file(network.path),
        # The last part only: where a file lies on the building machine says nothing elsewhere.
        Path(request.network).name,
        network.spec.licence,
    )
