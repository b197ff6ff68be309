"""What a user asks a build for, in plain data that also goes into the manifest."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgehp.errors import UsageError

__all__ = ["METHODS", "BuildRequest"]

METHODS = ("auto", "minmax", "percentile", "entropy", "mse")


@dataclass(frozen=True)
class BuildRequest:
    """One build.

    Attributes:
        target: name or alias of a target.
        precision: ``"int8"``, ``"fp16"`` or ``"fp32"``.
        network: bundled name or file (checkpoint or deployed ONNX graph).
        calibration: folder or zip of faces, None for the shipped crops.
        method: how activation ranges are chosen, one of `METHODS`.
        validate_on: folder or zip of held-out faces, None for the shipped ones.
        max_drop: largest accuracy drop in degrees that makes an artifact.
        mixed: where INT8 throughout drops more, keep layers in floating point until it does not.
        defer: make an artifact without engine where the engine cannot be built here.
        output: directory that artifacts are made in.
        input_size: other side of the network input in pixels, None for the network's own.
        batch: smallest, best and largest batch size.
        threads: processor threads, None leaves it to the runtime.
        dla: core of the deep-learning accelerator to run on, None for the GPU.
    """

    target: str
    precision: str = "int8"
    network: str = "kd-resnet18"
    calibration: Path | None = None
    method: str = "auto"
    validate_on: Path | None = None
    max_drop: float = 0.1
    defer: bool = False
    output: Path = Path("dist")
    input_size: int | None = None
    batch: tuple[int, int, int] = (1, 1, 8)
    threads: int | None = None
    dla: int | None = None
    mixed: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be right, before any work is done."""
        if self.precision not in ("int8", "fp16", "fp32"):
            raise UsageError(f"precision {self.precision!r} is none of int8, fp16, fp32")
        if self.method not in METHODS:
            raise UsageError(f"calibration method {self.method!r} is none of {', '.join(METHODS)}")
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
        low, best, high = self.batch
        if not 1 <= low <= best <= high <= 4096:
            raise UsageError(
                f"batch sizes {self.batch}: expected 1 <= smallest <= best <= largest <= 4096"
            )

    def to_recipe(self) -> dict[str, Any]:
        """JSON values that repeat the build. Paths by their last part: a manifest travels."""
        return {
            "target": self.target,
            "precision": self.precision,
            "network": Path(self.network).name,
            "calibration": None if self.calibration is None else self.calibration.name,
            "method": self.method,
            "validate_on": None if self.validate_on is None else self.validate_on.name,
            "max_drop": self.max_drop,
            "mixed": self.mixed,
            "input_size": self.input_size,
            "batch": list(self.batch),
            "dla": self.dla,
        }
