"""What an artifact says of the crops it was calibrated on, for those that it is validated on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgehp.artifact.open import OpenedNetwork
    from edgehp.engines.base import Crops
    from edgehp.validation.appearance import Clipped
    from edgehp.validation.run import CalibrationCheck

__all__ = ["calibration_check"]

logger = logging.getLogger(__name__)


def calibration_check(
    tested: OpenedNetwork | None, threads: int | None, shipped_heads: bool
) -> CalibrationCheck | None:
    """What frames are held against; None where the artifact does not say how its crops look.

    Args:
        tested: what is validated.
        threads: processor threads for counting clipped activations.
        shipped_heads: whether it is validated on the rendered heads that edgehp ships.
    """
    from edgehp.validation.run import CalibrationCheck

    record = tested.artifact.manifest.calibration if tested and tested.artifact else None
    if record is None or record.appearance is None:
        return None
    return CalibrationCheck(
        record.appearance,
        _clipping_of(tested, threads),
        _advice(tested, shipped_heads),
    )


def _advice(tested: OpenedNetwork | None, shipped_heads: bool) -> str:
    """What to do where the frames look unlike the calibration crops."""
    from edgehp.pipeline.crops import SHIPPED_CALIBRATION
    from edgehp.validation.appearance import ADVICE

    record = tested.artifact.manifest.calibration if tested and tested.artifact else None
    if not shipped_heads or record is None or record.source == SHIPPED_CALIBRATION:
        return ADVICE
    # Calibrated on the user's crops, which are right already: it is the frames that are others.
    return (
        "these are the rendered heads that edgehp ships; validate on photos of the camera that "
        "will be used, with --dataset and --data-root"
    )


def _clipping_of(
    tested: OpenedNetwork | None, threads: int | None
) -> Callable[[Sequence[Crops]], Clipped] | None:
    """Counts what the artifact's graph clips; None where the packages for it are not here."""
    artifact = None if tested is None else tested.artifact
    record = None if artifact is None else artifact.manifest.calibration
    if artifact is None or record is None:
        return None
    if find_spec("onnx") is None or find_spec("onnxruntime") is None:
        logger.info("clipped activations are not counted: that takes onnx and a processor engine")
        return None
    usual, path = record.clipped, artifact.graph_path

    def count(crops: Sequence[Crops]) -> Clipped:
        import onnx

        from edgehp.quantization.clipping import measure_clipping
        from edgehp.validation.appearance import Clipped

        found = measure_clipping(onnx.load(str(path)), crops, threads=threads)
        return Clipped(found.share, usual, found.worst)

    return count
