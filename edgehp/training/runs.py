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

from edgehp.datasets.base import Skips
from edgehp.errors import DataError
from edgehp.files import write_whole
from edgehp.networks.checkpoint import build_module, load_module, load_start, save_weights
from edgehp.networks.modules import BASE_BINS, BaseNetwork
from edgehp.networks.spec import NetworkSpec
from edgehp.training.data import Faces, TrainingItem, split
from edgehp.training.distributed import distributed
from edgehp.training.loop import Progress, TrainConfig, Trainer
from edgehp.training.objectives import (
    BaseObjective,
    Objective,
    OnlineDistillation,
    RvcObjective,
    base_angles,
)

logger = logging.getLogger(__name__)


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


@dataclass(frozen=True, eq=False)
class Run:
    """A training run: what learns from what, how, and where.

    Attributes:
        items: photos with labels; a share `held_back` of them, by name, is for validation only.
        spec: the network.
        config: how to train.
        folder: the run folder; a run found there is resumed.
        extra: photos that are all trained on, e.g. rendered heads with exact labels.
        start: weights to begin with: of the same network at any input size, or of another whose
            backbone is the same ResNet; torchvision's own too.
        device: ``"cpu"`` or ``"cuda"``.
        held_back: share of `items`.
        report: called after every step.
        skip_bad: leave damaged photos out, each in a warning, instead of raising.
    """

    items: Sequence[TrainingItem]
    spec: NetworkSpec
    config: TrainConfig
    folder: Path
    extra: Sequence[TrainingItem] = ()
    start: Path | None = None
    device: str = "cpu"
    held_back: float = 0.04
    report: Callable[[Progress], None] | None = None
    skip_bad: bool = False


def train_final(run: Run, teachers: Sequence[Path] = ()) -> RunResult:
    """Train a final network (one RvC head) on labels, or from torch teachers online.

    Args:
        run: what, how and where.
        teachers: checkpoints whose mean soft label is learnt instead of the items' labels
            (arXiv 2210.13705); they must want the same crop of the photo.

    Raises:
        DataError, CheckpointError: damaged input, or weights that do not fit.
    """
    spec = run.spec
    torch.manual_seed(run.config.seed)
    network = build_module(spec)
    objective: Objective = RvcObjective(spec.bins)
    if teachers:
        loaded = [load_module(path) for path in teachers]
        objective = OnlineDistillation([(m.to(run.device), s) for m, s in loaded], spec)

    def write(trainer: Trainer) -> Path:
        path = run.folder / f"{spec.name}.safetensors"
        save_weights(path, trainer.averaged_state(), spec)
        return path

    return _train(run, network, objective, write)


def train_base(run: Run) -> RunResult:
    """Stage 1 of arXiv 2108.09183: one regression and four RvC heads, with box jitter.

    The result is a teacher for ``edgehp label --grid``.
    """
    torch.manual_seed(run.config.seed)
    network = BaseNetwork(run.spec)

    def write(trainer: Trainer) -> Path:
        averaged = {k: torch.from_numpy(v) for k, v in trainer.averaged_state().items()}
        teacher = BaseNetwork(run.spec)
        teacher.load_state_dict(averaged, strict=False)
        return export_base_teacher(teacher.eval(), run.folder)

    return _train(run, network, BaseObjective(BASE_BINS), write)


def begin_with(network: nn.Module, spec: NetworkSpec, start: Path) -> None:
    """Load the weights of `start` into `network`: all of them, or the backbone where heads differ.

    Raises:
        CheckpointError: not a checkpoint of a network that edgehp knows.
        DataError: its backbone is another one.
    """
    weights, backbone_alone = load_start(start, spec)
    state = {k: torch.from_numpy(v) for k, v in weights.items()}
    wanted = network.state_dict()
    if not {k for k in wanted if not k.endswith("num_batches_tracked")} <= state.keys():
        prefix = _backbone(wanted)
        theirs = _backbone(state)
        state = {prefix + k[len(theirs) :]: v for k, v in state.items() if k.startswith(theirs)}
        if not backbone_alone:  # else the reader has said so
            logger.warning("%s: the backbone is taken, the heads begin at random", start)
    if wrong := [k for k, v in state.items() if k in wanted and wanted[k].shape != v.shape]:
        raise DataError(f"{start}: {wrong[0]} is of another shape: a ResNet of another depth?")
    network.load_state_dict(state, strict=False)


def _backbone(state: Mapping[str, Any]) -> str:
    """What stands before ``conv1.weight`` of the ResNet in the names of a state dict."""
    first = "conv1.weight"
    return min((k[: -len(first)] for k in state if k.endswith(first)), key=len)


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


def _train(
    run: Run, network: nn.Module, objective: Objective, write: Callable[[Trainer], Path]
) -> RunResult:
    """Train `network`; `write` writes its weights after every epoch and returns their path."""
    if run.start is not None:
        begin_with(network, run.spec, run.start)
    train, held = split(run.items, run.held_back)
    if not held:
        raise DataError(
            f"no photo of {len(run.items)} is held back for validation; give more photos"
        )
    train = [*train, *run.extra]
    size, workers = run.spec.preprocessing, run.config.workers
    with distributed(run.device) as place:
        device = torch.device(run.device)
        skips = Skips(run.skip_bad)
        faces = Faces.load(train, size, device, workers=workers, skips=skips)
        validation = Faces.load(held, size, device, margin=1, workers=workers, skips=skips)
        trainer = Trainer(network, run.spec, objective, faces, run.config, run.folder, place)
        first = place.rank == 0
        log = _tensorboard(run.folder, trainer.step) if first else None
        path = run.folder
        if first and trainer.epoch == run.config.epochs:  # resumed at its end
            path = write(trainer)

        def curves(step: int, values: Mapping[str, float]) -> None:
            if log is not None:
                for name, value in values.items():
                    log.add_scalar(name, value, step)

        def after_epoch(t: Trainer) -> None:
            nonlocal path
            if not first:
                return
            v = t.validate(validation)
            t.history.append(
                {"epoch": t.epoch, "mae": v.mae, "mean": v.mean, "geodesic": v.geodesic}
            )
            logger.info("epoch %d, held-back photos: MAE %.3f degrees", t.epoch, v.mean)
            path = write(t)
            write_whole(run.folder / "history.json", json.dumps(t.history, indent=1))
            curves(t.step, {"validation/mae": v.mean, "validation/geodesic": v.geodesic})

        for progress in trainer.run(after_epoch):
            if progress.step % 10 == 0:
                values = {"train/loss": progress.loss, "train/rate": progress.learning_rate}
                curves(progress.step, values)
            if run.report is not None and first:
                run.report(progress)
        if log is not None:
            log.close()
    return RunResult(path, tuple(trainer.history), len(faces), len(validation))


def _tensorboard(folder: Path, step: int) -> Any:
    """A writer of TensorBoard's event files, None where tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger.info("no tensorboard: the curves are in history.json only")
        return None
    # After a resumption, events past the checkpoint are superseded.
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step)
