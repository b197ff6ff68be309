"""Run the FP32 reference and the artifact on the held-out crops."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import numpy as np

from edgehp.artifact.device import DeviceProbe
from edgehp.build.accuracy import predict
from edgehp.build.crops import CropSet
from edgehp.engines import PROCESSOR_ENGINES, open_engine
from edgehp.engines.base import Prediction
from edgehp.errors import CompatibilityError, EnvironmentalError

__all__ = [
    "load_reference",
    "reference_bytes",
    "run_graph",
    "runs_here",
]

logger = logging.getLogger(__name__)

# Larger batches are no faster on a processor and hold more activations.
_BATCH = 8


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
    kind: str, path: Path, crops: CropSet, *, most: int = _BATCH, threads: int | None = None
) -> tuple[Prediction, str]:
    """Predictions of an engine file or graph on all crops, and what ran it, for people.

    Args:
        kind: of the engine.
        path: engine file, or an ONNX graph for the processor engines.
        crops: what to run on.
        most: largest batch the engine takes.
        threads: processor threads.

    Raises:
        DataError: the answers are not finite.
        EnvironmentalError: the runtime failed.
    """
    batch = min(_BATCH, most)
    with open_engine(kind, path, threads=threads, batch=batch) as engine:
        found = predict(engine, crops.crops, batch)
        # OpenVINO adds a build number and a branch.
        return found, f"{kind} {engine.info.version.split('-')[0]}"


def reference_bytes(reference: Prediction, crops: CropSet) -> bytes:
    """FP32 answers on the held-out crops, for a device that has no FP32 engine."""
    out = io.BytesIO()
    np.savez_compressed(
        out,
        digests=np.array(crops.digests),
        angles=reference.angles,
        spread=reference.spread,
    )
    return out.getvalue()


def load_reference(path: Path, crops: CropSet) -> Prediction:
    """What `reference_bytes` stored, for the same crops in the same order.

    Raises:
        CompatibilityError: it was made on other crops.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            digests, angles, spread = (stored[k] for k in ("digests", "angles", "spread"))
    except (ValueError, KeyError, OSError) as e:
        raise CompatibilityError(f"{path}: no FP32 answers in it ({e}); build again") from e
    if digests.tolist() != list(crops.digests):
        raise CompatibilityError(
            f"{path}: made on {len(digests)} other held-out crops than the {len(crops)} of "
            f"{crops.source}; give the same ones with --validate-on"
        )
    return Prediction(angles, spread)
