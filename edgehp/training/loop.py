"""The training loop: schedule, mixed precision, averaged weights, checkpoints, processes."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from edgehp import pose
from edgehp.errors import DataError, UsageError
from edgehp.files import replacing
from edgehp.networks.spec import NetworkSpec
from edgehp.training.augment import Augmentation
from edgehp.training.data import Batch, BatchPlan, Faces, batches
from edgehp.training.distributed import Place, gathered, parallel
from edgehp.training.objectives import Objective

logger = logging.getLogger(__name__)
CHECKPOINT = "checkpoint.pt"
# Steps between two readings of the loss off a GPU.
_READ_EVERY = 20


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Attributes:
        epochs: passes over the training items.
        batch: crops a step, over all processes together.
        learning_rate: peak of AdamW's, after the warm-up and before the cosine.
        weight_decay: of the weights with two or more axes.
        warm_up: share of all steps over which the rate rises.
        start_size: input size of the first epoch; it grows to the network's own in steps of 16
            pixels over the first `grow` of the epochs. 0 uses the network's own throughout.
        grow: see start_size.
        average: decay of the exponential moving average of the weights.
        clip: largest gradient norm.
        flatten: how much |yaw| is flattened, see `edgehp.training.data.epoch_order`.
        precision: ``"bf16"``, ``"fp16"`` (GPU only) or ``"fp32"``.
        seed: of weights, order and augmentation.
        checkpoint_seconds: time between checkpoints.
        workers: threads that decode photos before the first step.
        augmentation: what is done to each crop (`edgehp.training.augment.Augmentation`).
    """

    epochs: int = 10
    batch: int = 128
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    warm_up: float = 0.1
    start_size: int = 0
    grow: float = 0.6
    average: float = 0.999
    clip: float = 5.0
    flatten: float = 0.5
    precision: str = "bf16"
    seed: int = 0
    checkpoint_seconds: float = 120.0
    workers: int = 2
    augmentation: Augmentation = field(default_factory=Augmentation)

    def __post_init__(self) -> None:
        """Refuse what cannot be trained."""
        if self.epochs < 1 or self.batch < 2:
            raise UsageError("at least one epoch and a batch of two are needed")
        if self.precision not in ("bf16", "fp16", "fp32"):
            raise UsageError(f"precision {self.precision!r} is none of bf16, fp16, fp32")

    def size_at(self, epoch: int, final: int) -> int:
        """Input size in pixels of `epoch` (from 0)."""
        grow = max(1, round(self.grow * self.epochs))
        if not self.start_size or epoch >= grow:
            return final
        size = self.start_size + (final - self.start_size) * epoch / grow
        return min(final, 16 * round(size / 16))


@dataclass(frozen=True)
class Progress:
    """Where a run is, after a step."""

    epoch: int
    step: int
    steps: int
    loss: float
    learning_rate: float
    images_per_second: float


@dataclass(frozen=True)
class Validation:
    """Error against the labels of held-back photos, degrees.

    Attributes:
        mae: per angle, (pitch, yaw, roll).
        geodesic: mean geodesic distance.
    """

    mae: tuple[float, float, float]
    geodesic: float

    @property
    def mean(self) -> float:
        """Mean of the three angles' errors."""
        return sum(self.mae) / 3


class Trainer:
    """Trains a network on labelled photos and can be killed at any time.

    Args:
        network: takes normalised images.
        spec: its specification.
        objective: what it learns.
        faces: training photos with their labels, cut with a margin, on the device that trains.
        config: how.
        folder: where the checkpoint is; a checkpoint there is resumed.
        place: of this process; torch.distributed must be initialised where there are others.

    Raises:
        DataError: the checkpoint in `folder` is of another configuration or damaged.
    """

    def __init__(
        self,
        network: nn.Module,
        spec: NetworkSpec,
        objective: Objective,
        faces: Faces,
        config: TrainConfig,
        folder: Path,
        place: Place | None = None,
    ) -> None:
        self.spec, self.objective = spec, objective
        self.config, self.folder = config, folder
        self.faces, self.device, self.place = faces, faces.crops.device, place or Place()
        network = network.to(self.device)
        self.network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._parallel: nn.Module = self.network
        if self.place.world > 1:
            self._parallel = parallel(self.network, self.device)
        self.average = {k: v.detach().clone() for k, v in self.network.state_dict().items()}
        self.optimiser = torch.optim.AdamW(
            _groups(self.network, config.weight_decay), lr=0.0, fused=self.device.type == "cuda"
        )
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self.epoch = self.batch_number = self.step = 0
        self.steps_per_epoch = len(faces) // config.batch
        self.history: list[dict[str, Any]] = []
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / CHECKPOINT).is_file():
            self._resume()

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.steps_per_epoch * self.config.epochs

    def run(self, after_epoch: Callable[[Trainer], None] | None = None) -> Iterator[Progress]:
        """Train to the end, yielding after every step; `after_epoch` runs in every process."""
        saved = time.monotonic()
        while self.epoch < self.config.epochs:
            loss, began = math.nan, time.monotonic()
            source = batches(self.faces, self._plan(), start=self.batch_number)
            for counted, batch in enumerate(source, 1):
                outcome = self._step(batch)
                self.batch_number += 1
                self.step += 1
                # Reading a number off a GPU waits for it: not after every step.
                if self.device.type == "cpu" or self.batch_number % _READ_EVERY == 1:
                    loss = self._checked(outcome)
                speed = counted * self.config.batch / max(time.monotonic() - began, 1e-9)
                rate = self._rate(self.step - 1)
                yield Progress(self.epoch, self.step, self.total_steps, loss, rate, speed)
                if time.monotonic() - saved > self.config.checkpoint_seconds:
                    self.save()
                    saved = time.monotonic()
            self.epoch, self.batch_number = self.epoch + 1, 0
            if after_epoch is not None:
                after_epoch(self)
            self.save()
            saved = time.monotonic()

    def averaged_state(self) -> dict[str, np.ndarray[Any, Any]]:
        """The averaged weights as float32 arrays, for `edgehp.networks.checkpoint`."""
        return {
            k: v.detach().float().cpu().contiguous().numpy()
            for k, v in self.average.items()
            if not k.endswith("num_batches_tracked")
        }

    def validate(self, faces: Faces) -> Validation:
        """Error of the averaged weights on `faces`, which are the network's own crops."""
        own = {k: v.detach().clone() for k, v in self.network.state_dict().items()}
        self.network.load_state_dict(self.average)
        try:
            return evaluate(self.network, self.spec, self.objective, faces, self.config)
        finally:
            self.network.load_state_dict(own)

    def save(self) -> None:
        """Write the checkpoint; a kill at any moment leaves the old or the new one whole."""
        if self.place.rank != 0:
            return
        state = {
            "config": _config_text(self.config, self.spec, len(self.faces)),
            "network": self.network.state_dict(),
            "average": self.average,
            "optimiser": self.optimiser.state_dict(),
            "scaler": self._scaler.state_dict(),
            "place": [self.epoch, self.batch_number, self.step],
            "history": json.dumps(self.history),
        }
        with replacing(self.folder / CHECKPOINT) as file:
            torch.save(state, file)

    def _resume(self) -> None:
        path = self.folder / CHECKPOINT
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            found = state["config"]
        except (RuntimeError, KeyError, EOFError, ValueError, OSError) as e:
            raise DataError(f"{path}: damaged checkpoint ({e}); remove it to start again") from e
        wanted = _config_text(self.config, self.spec, len(self.faces))
        if found != wanted:
            raise DataError(
                f"{path}: a run with other settings\nfound    {found}\nexpected {wanted}\n"
                "hint: use another folder, or remove it"
            )
        self.network.load_state_dict(state["network"])
        self.average = state["average"]
        self.optimiser.load_state_dict(state["optimiser"])
        self._scaler.load_state_dict(state["scaler"])
        self.epoch, self.batch_number, self.step = state["place"]
        self.history = json.loads(state["history"])
        logger.info("resumed %s at epoch %d, batch %d", path, self.epoch, self.batch_number)

    def _plan(self) -> BatchPlan:
        return BatchPlan(
            size=self.config.size_at(self.epoch, self.spec.preprocessing.size),
            augmentation=self.config.augmentation,
            seed=self.config.seed,
            epoch=self.epoch,
            batch=self.config.batch,
            flatten=self.config.flatten,
            rank=self.place.rank,
            world=self.place.world,
        )

    def _rate(self, step: int) -> float:
        warm = max(1, round(self.config.warm_up * self.total_steps))
        if step < warm:
            return self.config.learning_rate * (step + 1) / warm
        done = (step - warm) / max(1, self.total_steps - warm)
        return self.config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    def _step(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """One step; (loss, gradient norm), not yet read off the device."""
        self.network.train()
        for group in self.optimiser.param_groups:
            group["lr"] = self._rate(self.step)
        images = normalize(batch.images, self.spec)
        # The signs of a convention are their own inverse, on tensors too.
        signs = torch.tensor(pose.convention(self.spec.convention).signs)
        angles = batch.angles * signs.to(batch.angles.device, non_blocking=True)
        with autocast(self.device, self.config.precision):
            losses = self.objective.loss(self._parallel, images, angles)
        # The gradient average over processes divides by their number: multiplied back here, the
        # step is the one a single process would take on the union of the batches.
        loss = (losses * batch.weights).sum() * (self.place.world / batch.total_weight)
        self.optimiser.zero_grad(set_to_none=True)
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self._scaler.unscale_(self.optimiser)
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.config.clip)
        self._scaler.step(self.optimiser)
        self._scaler.update()
        self._update_average()
        return loss.detach(), norm

    def _checked(self, outcome: tuple[Tensor, Tensor]) -> float:
        """The loss of a step, in the objective's units.

        The norm is that of gradients averaged over all processes: where one process's loss is not
        finite, every process sees it at the same step and ends. The first says why; the others
        end without a word.

        Raises:
            DataError: the training has diverged.
            SystemExit: the same, in a process that is not the first.
        """
        loss, norm = (float(v) for v in outcome)
        if not math.isfinite(norm) and self.config.precision != "fp16":
            losses = [loss]
            if self.place.world > 1:
                losses = gathered(outcome[0], self.place.world)
            if self.place.rank:
                raise SystemExit(DataError.exit_code)
            text = ", ".join(f"{v:g}" for v in losses)
            raise DataError(
                f"the training diverged at step {self.step}: the loss here is {text}\n"
                "hint: lower --learning-rate"
            )
        return loss

    @torch.no_grad()
    def _update_average(self) -> None:
        # Early averages would remember the random start: the decay grows with the steps.
        decay = min(self.config.average, (1 + self.step) / (10 + self.step))
        current = self.network.state_dict()
        floating = [k for k, v in current.items() if v.is_floating_point()]
        update = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        update([self.average[k] for k in floating], [current[k] for k in floating], self.step)


@torch.no_grad()
def evaluate(
    network: nn.Module, spec: NetworkSpec, objective: Objective, faces: Faces, config: TrainConfig
) -> Validation:
    """Mean errors of `network` on `faces`, the network's own crops, against their labels."""
    network.eval()
    found = []
    for first in range(0, len(faces), config.batch):
        crops = faces.crops[first : first + config.batch]
        images = normalize(crops.permute(0, 3, 1, 2).float(), spec)
        with autocast(crops.device, config.precision):
            found.append(objective.angles(network, images).float().cpu())
    p = pose.to_aflw2000(torch.cat(found).numpy(), spec.convention)
    mae = pose.angle_errors(p, pose.euler_from_matrix(faces.matrices)).mean(0)
    distance = pose.geodesic_degrees(pose.matrix_from_euler(p), faces.matrices)
    return Validation((float(mae[0]), float(mae[1]), float(mae[2])), float(distance.mean()))


def normalize(images: Tensor, spec: NetworkSpec) -> Tensor:
    """float32 [N, 3, S, S] (channels last) in the network's colour order, from RGB 0 to 255."""
    p = spec.preprocessing
    if p.colour == "BGR":
        images = images.flip(1)
    # Without waiting: an ordinary copy to a GPU would hold up the loop until all work is done.
    mean = torch.tensor(p.mean).view(1, -1, 1, 1).to(images.device, non_blocking=True)
    std = torch.tensor(p.std).view(1, -1, 1, 1).to(images.device, non_blocking=True)
    return ((images - mean) / std).contiguous(memory_format=torch.channels_last)


def autocast(device: torch.device, precision: str) -> Any:
    """The context in which the network runs at `precision`."""
    if precision == "fp32":
        return nullcontext()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    return torch.autocast(device.type, dtype)


def _groups(network: nn.Module, decay: float) -> list[dict[str, Any]]:
    # Biases and normalisation are not decayed: pulling them to zero only costs accuracy.
    matrices = [p for p in network.parameters() if p.requires_grad and p.ndim > 1]
    vectors = [p for p in network.parameters() if p.requires_grad and p.ndim <= 1]
    return [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]


def _config_text(config: TrainConfig, spec: NetworkSpec, items: int) -> str:
    # What only concerns the machine may change between a run and its resumption.
    free = ("checkpoint_seconds", "workers")
    settings = {k: v for k, v in asdict(config).items() if k not in free}
    return json.dumps({"spec": spec.digest, "items": items, **settings}, sort_keys=True)
