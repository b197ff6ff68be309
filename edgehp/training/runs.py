"""Whole training runs: photos and labels in, a run folder with weights and figures out.

A run folder holds ``checkpoint.pt`` (to resume), ``history.json`` (error on held-back photos after
every epoch), TensorBoard logs where tensorboard is installed, and the averaged weights: ``NAME.
safetensors`` of a final network, or for a base network ``base.onnx`` with ``base.toml``, the
description by which ``edgehp label`` takes it as a teacher over a grid of box offsets.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgehp.errors import DataError
from edgehp.files import write_whole
from edgehp.networks.checkpoint import build_module, load_module, load_start, save_weights
from edgehp.networks.kd_resnet import BASE_BINS, BaseNetwork
from edgehp.networks.spec import NetworkSpec
from edgehp.training.data import TrainingItem, split
from edgehp.training.distributed import distributed
from edgehp.training.loop import Progress, TrainConfig, Trainer
from edgehp.training.objectives import (
    BaseObjective,
    Objective,
    OnlineDistillation,
    RvcObjective,
    base_angles,
)

__all__ = ["RunResult", "export_base_teacher", "run", "train_base", "train_final"]

logger = logging.getLogger(__name__)
Reporter = Callable[[Progress], None]
Figures = Callable[[Trainer, Sequence[TrainingItem]], Mapping[str, Any]]


@dataclass(frozen=True)
class RunResult:
    """What a run left behind.

    Attributes:
        weights: the file to go on with: ``.safetensors``, or the ``.toml`` of a base teacher.
        history: per epoch: epoch, mae (pitch, yaw, roll), mean, geodesic, in degrees.
        trained, held_back: number of photos.
    """

    weights: Path
    history: tuple[Mapping[str, Any], ...]
    trained: int
    held_back: int


def train_final(
    items: Sequence[TrainingItem],
    spec: NetworkSpec,
    config: TrainConfig,
    folder: Path,
    *,
    extra: Sequence[TrainingItem] = (),
    start: Path | None = None,
    teachers: Sequence[Path] = (),
    device: str = "cpu",
    held_back: float = 0.04,
    report: Reporter | None = None,
) -> RunResult:
    """Train a final network (one RvC head) on labels, or from torch teachers online.

    Args:
        items: photos with labels; a share `held_back` of them, by name, is for validation only.
        spec: the student.
        config: how to train.
        folder: the run folder; a run found there is resumed.
        extra: photos that are all trained on, e.g. rendered heads with exact labels.
        start: weights to begin with, of the same network at any input size, or of a ResNet by
            torchvision's names for its backbone.
        teachers: checkpoints whose mean soft label is learnt instead of the items' labels
            (arXiv 2210.13705); they must want the same crop of the photo.
        device: ``"cpu"`` or ``"cuda"``.
        held_back: share of `items`.
        report: called after every step.

    Raises:
        DataError, CheckpointError: damaged input, or weights that do not fit.
    """
    torch.manual_seed(config.seed)
    network = build_module(spec)
    if start is not None:
        weights, _ = load_start(start, spec)
        state = {k: torch.from_numpy(v) for k, v in weights.items()}
        network.load_state_dict(state, strict=False)
    objective: Objective = RvcObjective(spec.bins)
    if teachers:
        loaded = [load_module(path) for path in teachers]
        objective = OnlineDistillation([(m.to(device), s) for m, s in loaded], spec)

    def write(trainer: Trainer) -> Path:
        path = folder / f"{spec.name}.safetensors"
        save_weights(path, trainer.averaged_state(), spec)
        return path

    return run(
        network, spec, objective, items, extra, config, folder, device, held_back, report, write
    )


def train_base(
    items: Sequence[TrainingItem],
    spec: NetworkSpec,
    config: TrainConfig,
    folder: Path,
    *,
    extra: Sequence[TrainingItem] = (),
    device: str = "cpu",
    held_back: float = 0.04,
    report: Reporter | None = None,
) -> RunResult:
    """Stage 1 of arXiv 2108.09183: one regression and four RvC heads, with box jitter.

    Arguments as in `train_final`. The result is a teacher for ``edgehp label --grid``.
    """
    torch.manual_seed(config.seed)
    network = BaseNetwork(spec)

    def write(trainer: Trainer) -> Path:
        averaged = {k: torch.from_numpy(v) for k, v in trainer.averaged_state().items()}
        teacher = BaseNetwork(spec)
        teacher.load_state_dict(averaged, strict=False)
        return export_base_teacher(teacher.eval(), folder)

    objective = BaseObjective(BASE_BINS)
    return run(
        network, spec, objective, items, extra, config, folder, device, held_back, report, write
    )


def export_base_teacher(network: BaseNetwork, folder: Path) -> Path:
    """Write a base network as ``base.onnx`` and ``base.toml``; returns the TOML's path.

    The graph takes normalised images [N, 3, S, S] and gives the mean of all heads [N, 3].
    """
    spec = network.spec

    class Answer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network.requires_grad_(False)

        def forward(self, images: Tensor) -> Tensor:
            return base_angles(self.network, images, network.head_bins)

    size = spec.preprocessing.size
    with warnings.catch_warnings():
        # The exporter that writes one self-contained file is the one torch calls legacy.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", UserWarning)
        # The bin values become constants of the graph: that is what is wanted.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        torch.onnx.export(
            Answer().eval(),
            (torch.zeros(1, 3, size, size),),
            str(folder / "base.onnx"),
            input_names=["images"],
            output_names=["angles"],
            dynamic_axes={"images": {0: "batch"}, "angles": {0: "batch"}},
            opset_version=17,
            dynamo=False,
        )
    p = spec.preprocessing
    text = f"""# A base network of arXiv 2108.09183 as a teacher: the mean of its five heads.
name = "base"
files = ["base.onnx"]

[input]
name = "images"
size = {p.size}
colour = "{p.colour}"
mean = {list(p.mean)}
std = {list(p.std)}
resize = "{p.resize}"
box_rule = "{p.box_rule}"
box_scale = {p.box_scale}

[output]
kind = "euler"
name = "angles"
convention = "{spec.convention}"
"""
    path = folder / "base.toml"
    write_whole(path, text)
    return path


def run(
    network: nn.Module,
    spec: NetworkSpec,
    objective: Objective,
    items: Sequence[TrainingItem],
    extra: Sequence[TrainingItem],
    config: TrainConfig,
    folder: Path,
    device: str,
    held_back: float,
    report: Reporter | None,
    write: Callable[[Trainer], Path],
    *,
    figures: Figures | None = None,
    figures_first: bool = False,
) -> RunResult:
    """Train any network on any objective.

    Args:
        network: takes normalised images.
        spec: its specification.
        objective: what it learns.
        items: see `train_final`.
        extra: see there.
        config: see there.
        folder: see there.
        device: see there.
        held_back: see there.
        report: see there.
        write: writes the weights and returns their path; called after every epoch.
        figures: what `history` says of the held-back items; None takes the errors against labels.
        figures_first: put the figures of the start into the history too, as epoch 0.

    Raises:
        DataError: no photo is held back, or the folder's checkpoint is of another run.
    """
    measured = figures or _label_errors
    train, validation = split(items, held_back)
    if not validation:
        raise DataError(f"no photo of {len(items)} is held back for validation; give more photos")
    train = [*train, *extra]
    with distributed(device) as place:
        trainer = Trainer(
            network,
            spec,
            objective,
            train,
            config,
            folder,
            device=device,
            rank=place.rank,
            world=place.world,
        )
        log = _Log(folder, trainer.step) if place.rank == 0 else None

        def after_epoch(t: Trainer) -> None:
            if place.rank != 0:
                return
            row = {"epoch": t.epoch, **measured(t, validation)}
            t.history.append(row)
            single = {k: v for k, v in row.items() if isinstance(v, float)}
            text = ", ".join(f"{k} {v:.4f}" for k, v in single.items())
            logger.info("epoch %d, held-back photos, degrees: %s", t.epoch, text)
            write(t)
            write_whole(folder / "history.json", json.dumps(t.history, indent=1))
            if log is not None:
                log.add(t.step, {f"validation/{k}": v for k, v in single.items()})

        if figures_first and not trainer.history:
            after_epoch(trainer)
        for progress in trainer.run(after_epoch):
            if log is not None and progress.step % 10 == 0:
                values = {"train/loss": progress.loss, "train/rate": progress.learning_rate}
                log.add(progress.step, values)
            if report is not None and place.rank == 0:
                report(progress)
        if log is not None:
            log.close()
        path = write(trainer) if place.rank == 0 else folder
    return RunResult(path, tuple(trainer.history), len(train), len(validation))


def _label_errors(trainer: Trainer, held: Sequence[TrainingItem]) -> dict[str, Any]:
    v = trainer.validate(held)
    return {"mae": v.mae, "mean": v.mean, "geodesic": v.geodesic}


class _Log:
    """TensorBoard's event files, where tensorboard is installed."""

    def __init__(self, folder: Path, step: int) -> None:
        self._writer: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            logger.info("no tensorboard: the curves are in history.json only")
            return
        # After a resumption, events past the checkpoint are superseded.
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
