"""Run the FP32 reference and the artifact on the held-out crops."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

import numpy as np

from edgehp.artifact.device import DeviceProbe
from edgehp.engines import PROCESSOR_ENGINES, open_engine, processor_engine
from edgehp.engines.base import Prediction
from edgehp.errors import CompatibilityError, EnvironmentalError
from edgehp.pipeline.accuracy import Answers, harder_crops, predict
from edgehp.pipeline.crops import CropSet
from edgehp.pipeline.plan import Plan
from edgehp.validation.robustness import CONDITIONS

__all__ = [
    "BATCH",
    "ITSELF",
    "emulator",
    "load_reference",
    "reference_bytes",
    "run_graph",
    "runs_here",
]

logger = logging.getLogger(__name__)

# Ends what `edgehp.artifact.manifest.Accuracy.measured_with` says where no emulation stood in.
ITSELF = ", the engine itself"
# Larger batches are no faster on a processor and hold more activations.
BATCH = 8


def emulator(plan: Plan) -> str:
    """The processor engine that stands in for one that cannot run here.

    onnxruntime rounds to FP16 between layers; OpenVINO computes such graphs in FP32.

    Raises:
        EnvironmentalError: none is installed.
    """
    if plan.kind in PROCESSOR_ENGINES:
        return plan.kind
    return processor_engine("onnxruntime" if plan.precision == "fp16" else "openvino")


def runs_here(kind: str, capabilities: tuple[str, ...], device: DeviceProbe) -> bool:
    """Whether an engine of `kind` can be run on this machine, not only built."""
    if kind in PROCESSOR_ENGINES:
        return True
    try:
        gpus = device.gpus()
    except EnvironmentalError:
        return False
    return bool(gpus) and gpus[0].compute_capability in capabilities


def run_graph(
    kind: str,
    path: Path,
    crops: CropSet,
    *,
    most: int = BATCH,
    threads: int | None = None,
    harder: bool = False,
) -> tuple[Answers, str]:
    """Predictions of an engine file or graph on all crops, and what ran it, for people.

    Args:
        kind: of the engine.
        path: engine file, or an ONNX graph for the processor engines.
        crops: what to run on.
        most: largest batch the engine takes.
        threads: processor threads.
        harder: also on harder versions of some crops (`edgehp.pipeline.accuracy.harder_crops`).

    Raises:
        DataError: the answers are not finite.
        EnvironmentalError: the runtime failed.
    """
    batch = min(BATCH, most)
    with open_engine(kind, path, threads=threads, batch=batch) as engine:
        clean = predict(engine, crops.crops, batch)
        changed = harder_crops(crops) if harder else {}
        found = Answers(clean, {n: predict(engine, c, batch) for n, c in changed.items()})
        # OpenVINO adds a build number and a branch.
        return found, f"{kind} {engine.info.version.split('-')[0]}"


def reference_bytes(reference: Answers, crops: CropSet) -> bytes:
    """FP32 answers on the held-out crops, for a device that has no FP32 engine."""
    out = io.BytesIO()
    arrays: dict[str, Any] = {
        "digests": np.array(crops.digests),
        "angles": reference.clean.angles,
        "spread": reference.clean.spread,
    }
    for name, answer in reference.harder.items():
        arrays[f"{name}.angles"], arrays[f"{name}.spread"] = answer.angles, answer.spread
    np.savez_compressed(out, **arrays)
    return out.getvalue()


def load_reference(path: Path, crops: CropSet) -> Answers:
    """What `reference_bytes` stored, for the same crops in the same order.

    Raises:
        CompatibilityError: it was made on other crops.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            digests, angles, spread = (stored[k] for k in ("digests", "angles", "spread"))
            harder = {
                name: Prediction(stored[f"{name}.angles"], stored[f"{name}.spread"])
                for name in CONDITIONS
                if f"{name}.angles" in stored
            }
    except (ValueError, KeyError, OSError) as e:
        raise CompatibilityError(f"{path}: no FP32 answers in it ({e}); build again") from e
    if digests.tolist() != list(crops.digests):
        raise CompatibilityError(
            f"{path}: made on {len(digests)} other held-out crops than the {len(crops)} of "
            f"{crops.source}; give the same ones with --validate-on"
        )
    return Answers(Prediction(angles, spread), harder)
