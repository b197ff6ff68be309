"""Finish a deferred artifact on the device it is for."""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path

import msgspec
import numpy as np

import edgehp
from edgehp.artifact.check import Artifact, golden_crops, load_artifact
from edgehp.artifact.manifest import Comparison, Manifest
from edgehp.artifact.write import ArtifactWriter
from edgehp.device import DeviceProbe, HostProbe
from edgehp.engines import open_engine
from edgehp.errors import CompatibilityError, UsageError
from edgehp.files import now
from edgehp.pipeline.accuracy import load_reference, measure, predict, run_graph, tolerance
from edgehp.pipeline.crops import CropSet, held_out_crops, require_photos
from edgehp.pipeline.engine import BuiltEngine, against_half, build_here
from edgehp.pipeline.mixed import batch_of
from edgehp.pipeline.pipeline import REFERENCE_ANGLES, BuildResult, StepClock
from edgehp.pipeline.plan import BuildRequest, Place, Plan, find_place, make_plan
from edgehp.quantization.qdq import without_qdq

logger = logging.getLogger(__name__)

# What a deferred build's recipe says about its engine.
_KEPT = (
    "target",
    "precision",
    "max_drop",
    "batch",
    "dla",
    "workspace",
    "optimization_level",
    "version_compatible",
    "hardware_compatible",
)


def finish(
    path: Path,
    device: DeviceProbe | None = None,
    *,
    validate_on: Path | None = None,
    photo_depth: int | None = None,
    skip_bad: bool = False,
    threads: int | None = None,
) -> BuildResult:
    """Build the engine of a deferred artifact here and complete the artifact in place.

    Args:
        path: the deferred artifact.
        device: facts about this machine; probed when omitted.
        validate_on: the held-out faces the artifact was made with, where those were not the
            shipped ones.
        photo_depth: significant bits of their 16-bit photos; None: as the artifact was made.
        skip_bad: leave those out that cannot be used; else as the artifact was made.
        threads: processor threads.

    Raises:
        UsageError: the artifact is complete already, or its held-out faces are needed.
        CompatibilityError: it was altered, this is another device, or less precision was reached.
        AccuracyError: the engine drops more than the gate allows; the artifact stays deferred.
        EnvironmentalError: TensorRT or the driver is missing.
    """
    steps, device = StepClock(), device or HostProbe()
    with steps("check"):
        artifact = load_artifact(path, allow_deferred=True, device=device)
        manifest = artifact.manifest
        if manifest.state != "deferred":
            raise UsageError(f"{path} is complete already; nothing is left to do")
        request = _request(manifest, path, validate_on, photo_depth, skip_bad, threads)
        require_photos(validate_on, "--validate-on", request.skip_bad)
        plan = make_plan(request)
        place = find_place(plan, device)
        if not place.knows_half_scales:
            raise CompatibilityError(
                f"{path} holds a graph with FP16 scales, which TensorRT {place.tensorrt} does not "
                f"know: build here from the network with 'edgehp build --target {plan.target.name}'"
            )
    with ArtifactWriter(path) as writer:
        roles = _copy(artifact, writer)
        with steps("engine"):
            graph = writer.path / manifest.graph
            mixed = manifest.precision.mixed
            built = build_here(plan, place, graph, writer.path, mixed=mixed)
            roles |= dict.fromkeys(built.engine.files, "engine")
        with steps("accuracy"):
            held_out = held_out_crops(
                validate_on, manifest.preprocessing, request.photo_depth, request.skip_bad
            )
            completed, found = _measured(artifact, built, held_out, request.max_drop, plan, place)
        comparison = manifest.build.int8_against_fp16
        if plan.compare:
            with steps("compare"):
                comparison, verdict = _against_half(plan, place, graph, built, held_out)
                found = (*found, verdict)
        # Those of the building machine are of its emulation, and of another engine.
        warnings = (*plan.warnings, *built.warnings, *found)
        for warning in warnings:
            logger.warning("%s", warning)
        here = [msgspec.structs.replace(t, name=f"{t.name}, on the device") for t in steps.times]
        completed = msgspec.structs.replace(
            completed,
            build=msgspec.structs.replace(
                manifest.build,
                steps=(*manifest.build.steps, *here),
                warnings=warnings,
                int8_against_fp16=comparison,
            ),
        )
        return BuildResult(writer.destination, writer.commit(completed, roles))


def _request(
    manifest: Manifest,
    path: Path,
    validate_on: Path | None,
    photo_depth: int | None,
    skip_bad: bool,
    threads: int | None,
) -> BuildRequest:
    recipe = manifest.build.recipe
    depth = photo_depth or recipe.get("photo_depth")
    here = {
        "validate_on": validate_on,
        "photo_depth": depth,
        "skip_bad": skip_bad or recipe.get("skip_bad", False),
        "threads": threads,
    }
    try:
        named = recipe["validate_on"]
        kept = {name: recipe[name] for name in _KEPT}
        request = msgspec.convert({**kept, **here, "output": path.parent}, BuildRequest)
    except (KeyError, ValueError) as e:
        raise CompatibilityError(f"{path}: its recipe cannot be read ({e}); build it again") from e
    if named is not None and validate_on is None:
        raise UsageError(f"{path} was validated on {named}: give it with --validate-on")
    return request


def _copy(artifact: Artifact, writer: ArtifactWriter) -> dict[str, str]:
    """Copy what stays; the stored FP32 answers are of no use afterwards."""
    roles = {f.path: f.role for f in artifact.manifest.files if f.path != REFERENCE_ANGLES}
    for name in roles:
        target = writer.path / name
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(artifact.path / name, target)
    return roles


def _measured(
    artifact: Artifact,
    built: BuiltEngine,
    held_out: CropSet,
    max_drop: float,
    plan: Plan,
    place: Place,
) -> tuple[Manifest, tuple[str, ...]]:
    """The manifest with the engine's own accuracy and golden tolerance, and the gate's warnings."""
    manifest = artifact.manifest
    before = load_reference(artifact.path / REFERENCE_ANGLES, held_out)
    most = built.engine.max_batch
    run = run_graph(plan.kind, built.path, held_out, most=most, degraded=True)
    accuracy, warnings = measure(before, run.answers, held_out, max_drop, run.measured_with)
    with open_engine(plan.kind, built.path) as engine:
        golden = predict(engine, golden_crops(artifact), min(8, most))
    logger.info("built on %s", place.gpu.name if place.gpu else "this processor")
    completed = msgspec.structs.replace(
        manifest,
        state="complete",
        created=now(),
        edgehp_version=edgehp.__version__,
        target=built.target,
        precision=built.precision,
        engine=built.engine,
        accuracy=accuracy,
        golden=msgspec.structs.replace(
            manifest.golden,
            tolerance_degrees=tolerance(golden.angles, np.asarray(manifest.golden.angles)),
        ),
    )
    return completed, warnings


def _against_half(
    plan: Plan, place: Place, graph: Path, built: BuiltEngine, held_out: CropSet
) -> tuple[Comparison, str]:
    """Time INT8 against FP16 with the float graph that the artifact's own graph was made from."""
    import onnx

    model, _ = without_qdq(onnx.load(str(graph)))
    crops = batch_of(held_out, built.engine.best_batch)
    with tempfile.TemporaryDirectory() as folder:
        return against_half(plan, place, model, built, crops, Path(folder))
