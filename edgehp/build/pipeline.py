"""From a network to a checked artifact, step by step."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import edgehp
from edgehp._hashing import sha256_bytes, sha256_file
from edgehp.artifact.device import DeviceProbe, HostProbe
from edgehp.artifact.manifest import (
    BuildRecord,
    Calibration,
    Manifest,
    NetworkRecord,
    TargetRecord,
)
from edgehp.artifact.write import ArtifactWriter
from edgehp.build.accuracy import golden_picture, golden_vectors, measure
from edgehp.build.crops import (
    CropSet,
    appearance_warning,
    calibration_list,
    held_out_crops,
    load_calibration,
    require_disjoint,
)
from edgehp.build.engine import BuiltEngine, build_here, compare_with_half, planned_precision
from edgehp.build.graphs import half_graph, open_network, quantised_graph, write_graph
from edgehp.build.plan import Place, Plan, find_place, how_to_finish, make_plan
from edgehp.build.progress import StepClock, Watcher
from edgehp.build.request import BuildRequest
from edgehp.build.run import reference_bytes, run_graph, runs_here
from edgehp.engines import PROCESSOR_ENGINES, processor_engine
from edgehp.engines.base import Prediction
from edgehp.errors import EnvironmentalError
from edgehp.networks.bundled import Network

if TYPE_CHECKING:
    import onnx

__all__ = ["BuildResult", "artifact_name", "build", "now"]

logger = logging.getLogger(__name__)

GRAPH = "graph.onnx"
GOLDEN = "golden.png"
# `edgehp validate` takes the FP32 reference from here where a name alone does not find it.
REFERENCE_GRAPH = "reference.onnx"
REFERENCE_ANGLES = "reference.npz"
CALIBRATION_LIST = "calibration.csv"
CALIBRATION_TABLE = "calibration-table.json"


@dataclass(frozen=True)
class BuildResult:
    """A finished build: where the artifact is and what its manifest says."""

    path: Path
    manifest: Manifest


class _Work:
    """The state of one build: what the steps share and what they add to the artifact."""

    def __init__(
        self, request: BuildRequest, plan: Plan, place: Place | None, writer: ArtifactWriter
    ) -> None:
        self.request = request
        self.plan = plan
        self.place = place
        self.writer = writer
        self.warnings: list[str] = list(plan.warnings)
        self.roles: dict[str, str] = {}

    @property
    def half(self) -> bool:
        """Whether the graph's body is FP16; TensorRT 8.6 sets precisions by flags instead."""
        return self.plan.half and (self.place is None or self.place.knows_half_scales)

    def add(self, name: str, data: bytes, role: str) -> str:
        """Write a file of the artifact."""
        (self.writer.path / name).write_bytes(data)
        self.roles[name] = role
        return name

    def warn(self, *sentences: str | None) -> None:
        """Tell the user now and in the manifest."""
        for sentence in sentences:
            if sentence:
                logger.warning("%s", sentence)
                self.warnings.append(sentence)


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
    with steps("target"):
        plan = make_plan(request)
        place = _find_place(plan, request, device)
    with steps("network"):
        network, named = open_network(request.network, request.input_size)
        logger.warning("weights of %s: %s", network.spec.name, _licence(network))
    name = artifact_name(network.spec.name, plan.target.name, plan.precision)
    for warning in plan.warnings:
        logger.warning("%s", warning)
    with ArtifactWriter(request.output / name) as writer:
        work = _Work(request, plan, place, writer)
        manifest = _make(work, network, named, name, steps, device)
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
    work: _Work,
    network: Network,
    named: bool,
    name: str,
    steps: StepClock,
    device: DeviceProbe,
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
        calibration = _engine_graph(work, network, model, crops, graph)
    built = None
    if work.place is not None:
        with steps("engine"):
            built = build_here(plan, work.place, graph, writer.path, request.batch, request.threads)
            work.roles |= dict.fromkeys(built.engine.files, "engine")
            work.warn(*built.warnings)
    with steps("accuracy"):
        before, after, runner = _predictions(work, reference, graph, built, held_out, device)
        accuracy, doubt = measure(before, after, held_out, request.max_drop, runner)
        work.warn(doubt)
    comparison = None
    if built is not None and plan.compare:
        with steps("compare"):
            comparison = _compare(work, model, built, held_out)
    with steps("artifact"):
        golden, picture = golden_vectors(before, after, held_out, GOLDEN)
        work.add(GOLDEN, golden_picture(picture), "golden")
        if built is None:
            work.add(REFERENCE_ANGLES, reference_bytes(before, held_out), "reference")
        if not named:
            work.add(REFERENCE_GRAPH, reference.read_bytes(), "reference")
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
            precision=built.precision if built else planned_precision(plan),
            engine=built.engine if built else None,
            graph=_keep_graph(work, graph, built),
            calibration=calibration,
            accuracy=accuracy,
            golden=golden,
            build=BuildRecord(request.to_recipe(), steps.times, tuple(work.warnings), comparison),
            files=(),
        )
        return writer.commit(manifest, work.roles)


def _calibration_crops(work: _Work, network: Network, held_out: CropSet) -> CropSet | None:
    if work.plan.precision != "int8":
        return None
    crops = load_calibration(work.request.calibration, network.spec.preprocessing)
    require_disjoint(crops, held_out)
    work.warn(appearance_warning(crops, held_out))
    if crops.left_out:
        total = len(crops) + crops.left_out + crops.duplicates
        work.warn(
            f"{len(crops)} of {total} calibration crops are used, evenly spaced: more do not move "
            "the scales"
        )
    return crops


def _engine_graph(
    work: _Work, network: Network, model: onnx.ModelProto, crops: CropSet | None, path: Path
) -> Calibration | None:
    """Write the graph the engine is made from; the record of its calibration."""
    if crops is None:
        write_graph(half_graph(model) if work.half else model, path)
        return None
    request = work.request
    made = quantised_graph(
        model,
        crops.crops,
        network,
        work.plan.flavour,
        request.method,
        half=work.half,
        threads=request.threads,
    )
    write_graph(made.model, path)
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
    )


def _predictions(
    work: _Work,
    reference: Path,
    graph: Path,
    built: BuiltEngine | None,
    held_out: CropSet,
    device: DeviceProbe,
) -> tuple[Prediction, Prediction, str]:
    """FP32's answers, the artifact's, and what ran the latter.

    An engine that cannot run here is emulated: the very graph it is made from, on the processor.
    """
    threads = work.request.threads
    kind = work.plan.kind
    # FP32 in the artifact's own engine where it can: the drop is then of the precision alone.
    processor = kind if kind in PROCESSOR_ENGINES else processor_engine()
    before, _ = run_graph(processor, reference, held_out, threads=threads)
    capabilities = built.target.compute_capabilities if built else ()
    if built is not None and runs_here(kind, capabilities, device):
        most = built.engine.max_batch
        after, runner = run_graph(kind, built.path, held_out, most=most, threads=threads)
        return before, after, f"{runner}, the engine itself"
    # onnxruntime rounds to FP16 between layers; OpenVINO computes such graphs in FP32.
    emulator = processor_engine("onnxruntime" if work.plan.precision == "fp16" else "openvino")
    after, runner = run_graph(emulator, graph, held_out, threads=threads)
    work.warn(
        f"the accuracy is that of the engine's graph run by {runner}: the engine itself cannot run "
        "on this machine"
    )
    return before, after, f"{runner}, an emulation of the engine's graph"


def _compare(
    work: _Work, model: onnx.ModelProto, built: BuiltEngine, held_out: CropSet
) -> dict[str, float | int]:
    """INT8 against FP16 where the hardware may be slower in INT8."""
    if work.place is None:
        raise EnvironmentalError("INT8 and FP16 can only be compared on the device")
    folder, request = work.writer.scratch, work.request
    half = half_graph(model) if work.place.knows_half_scales else model
    path = write_graph(half, folder / "fp16.onnx")
    other = build_here(work.plan.in_half(), work.place, path, folder, request.batch)
    batch = request.batch[1]
    crops = np.ascontiguousarray(np.resize(held_out.crops, (batch, *held_out.crops.shape[1:])))
    int8_ms, fp16_ms = compare_with_half(work.plan.kind, built.path, other.path, crops)
    verdict = "INT8 is faster" if int8_ms < fp16_ms else "INT8 is NOT faster: use --precision fp16"
    work.warn(f"at batch {batch}: INT8 {int8_ms:.2f} ms, FP16 {fp16_ms:.2f} ms; {verdict}")
    return {"int8_ms": round(int8_ms, 4), "fp16_ms": round(fp16_ms, 4), "batch": batch}


def _keep_graph(work: _Work, graph: Path, built: BuiltEngine | None) -> str:
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
