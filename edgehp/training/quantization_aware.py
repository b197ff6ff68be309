"""Quantisation-aware distillation: a float network teaches its own INT8 version.

The float network of a checkpoint is quantised after training in the best way found, and then
trained further as the integers it will be deployed as, to answer as the float network does on the
same augmented crops. The result is the checkpoint with the trained integers beside the float
weights (`edgehp.quantization.trained`), which `edgehp build` takes as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from edgehp import pose
from edgehp._hashing import sha256_file
from edgehp.datasets.base import Sample
from edgehp.errors import UsageError
from edgehp.networks.checkpoint import build_module, load_weights, save_weights
from edgehp.networks.graph import build_graph
from edgehp.networks.kd_resnet import expectation
from edgehp.networks.layout import Weights
from edgehp.networks.spec import NetworkSpec
from edgehp.quantization.graphview import GraphView
from edgehp.quantization.placement import FLAVOURS, place
from edgehp.quantization.qdq import scale_of
from edgehp.quantization.quantise import AUTO, QuantisedModel, quantise
from edgehp.quantization.table import CalibrationTable, TensorRanges
from edgehp.quantization.trained import (
    TRAINED_METHOD,
    TrainedQuantisation,
    layers_digest,
    read_trained,
    stored_tensors,
)
from edgehp.training.data import TrainingItem, plain_batches, split
from edgehp.training.fake_quantised import FakeQuantised
from edgehp.training.loop import TrainConfig, Trainer, to_tensors
from edgehp.training.runs import Reporter, RunResult, run
from edgehp.training.soft_labels import distillation_kl, rvc_loss

__all__ = [
    "FloatTeacher",
    "fake_quantised",
    "train_quantised",
    "trained_quantisation",
    "unlabelled_items",
]

logger = logging.getLogger(__name__)

# Post-training quantisation, where the run begins, sees this many photos.
_CALIBRATION = 256
# Enough to tell 0.01 degrees: the errors are compared photo by photo.
_MOST_HELD_BACK = 1024
_GRIDS = {"cpu": "uint8", "tensorrt": "int8"}
# Longer averages would remember the start: a run has a few hundred steps.
_LONGEST_AVERAGE = 0.95
# |difference| in degrees up to which the loss is a square; most are below half of it at the start.
_KNEE = 0.2


@dataclass(frozen=True)
class FloatTeacher:
    """The student's angles and bins become those of a float network on the same crops.

    Attributes:
        teacher: the float network, in evaluation mode.
        spec: of both.
        divergence: factor on the KL divergence of the bins.
        labels: factor on the loss against the items' labels; 0 leaves them out.
    """

    teacher: nn.Module
    spec: NetworkSpec
    divergence: float = 1.0
    labels: float = 0.0

    def loss(self, network: nn.Module, images: Tensor, angles: Tensor) -> Tensor:
        """Loss per sample [N]."""
        logits = network(images).float()
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            # In float32: bfloat16 errs by as much as 8 bits do.
            target = self.teacher(images)
        ours, theirs = (expectation(z, self.spec.bins)[0] for z in (logits, target))
        near = functional.smooth_l1_loss(ours, theirs, reduction="none", beta=_KNEE).mean(-1)
        kl = distillation_kl(logits, target.float().softmax(-1))
        loss = near + self.divergence * kl
        if self.labels:
            loss = loss + self.labels * rvc_loss(logits, angles, self.spec.bins, 2.0, 0.3)
        return loss

    def angles(self, network: nn.Module, images: Tensor) -> Tensor:
        """Softmax expectation [N, 3]."""
        return expectation(network(images), self.spec.bins)[0]


def unlabelled_items(samples: Sequence[Sample]) -> list[TrainingItem]:
    """Items of photos without labels: their rotations are stand-ins that nothing learns from."""
    return [TrainingItem(s, np.eye(3)) for s in samples]


def train_quantised(
    items: Sequence[TrainingItem],
    config: TrainConfig,
    folder: Path,
    *,
    start: Path,
    flavour: str,
    labelled: bool = True,
    label_weight: float = 0.0,
    extra: Sequence[TrainingItem] = (),
    limit: int = 0,
    method: str = AUTO,
    device: str = "cpu",
    held_back: float = 0.04,
    report: Reporter | None = None,
) -> RunResult:
    """Train the INT8 version of a float checkpoint.

    Args:
        items: photos; a share `held_back` of them, by name, is for validation only.
        config: how to train; rates are in rounding steps of the weights. Weight decay is not used.
        folder: the run folder; a run found there is resumed.
        start: the float checkpoint, which teaches and is where the student begins.
        flavour: ``"cpu"`` or ``"tensorrt"``.
        labelled: whether the items' rotations are labels; False shows no errors against them.
        label_weight: factor on the loss against the labels, beside that against the float network.
        extra: photos that are all trained on.
        limit: largest number of photos to train on, evenly spread; 0 takes all.
        method: how the start is calibrated, see `edgehp.quantization.quantise.quantise`.
        device: ``"cpu"`` or ``"cuda"``.
        held_back: share of `items`.
        report: called after every step.

    Returns:
        Its history has, besides the errors, ``difference``: mean |angle difference| to the float
        network on held-back photos in degrees; the first row is that of the start. The weights are
        those of the epoch with the smallest difference or, with `label_weight`, the smallest error.

    Raises:
        UsageError: unknown flavour, a precision that cannot hold the sums, or a checkpoint that
            holds trained integers of this flavour.
        DataError, CheckpointError: damaged input.
    """
    weights, spec, others = _start(start, flavour)
    if config.precision == "fp16":
        raise UsageError("FP16 cannot hold the sums of 8-bit products: use bf16 or fp32")
    if label_weight and not labelled:
        raise UsageError("a weight for the labels needs photos with labels")
    every, held = split(items, held_back)
    train = _spread(every, limit or len(every))
    items = [*train, *_spread(held, _MOST_HELD_BACK)]
    config = replace(
        config,
        average=min(config.average, _LONGEST_AVERAGE),
        weight_decay=0.0,
        start_size=0,
        flatten=config.flatten if labelled else 0.0,
        task=f"quantisation-aware, {flavour}, labels {label_weight:g}, {sha256_file(start)[:16]}",
    )
    torch.manual_seed(config.seed)
    crops = _crops(train, spec, config)
    logger.info("quantising after training on %d crops: where the run begins", len(crops))
    began = quantise(
        build_graph(weights, spec),
        crops,
        spec,
        flavour=flavour,
        method=method,
        # Weights and biases of the graph as it is: what training is to move.
        rounding=False,
        threads=torch.get_num_threads(),
    )
    logger.info("begins with %s, %.4f degrees from FP32", began.chosen, began.difference.angles)
    teacher = _float_network(weights, spec).to(device)
    objective = FloatTeacher(teacher, spec, labels=label_weight)

    figures = _Figures(objective, config, labelled)
    wanted = "mean" if label_weight else "difference"

    def write(trainer: Trainer) -> Path:
        path = folder / f"{spec.name}.safetensors"
        scores = [row[wanted] for row in trainer.history]
        if path.is_file() and scores[-1] > min(scores):
            return path  # an earlier epoch was better on the held-back photos
        with averaged(trainer) as network:
            done = trained_quantisation(network, began.source_table, spec)
        tensors: dict[str, npt.NDArray[np.generic]] = {}
        for one in (*others.values(), done):
            tensors |= stored_tensors(one)
        save_weights(path, weights, spec, _smallest(weights), extra=tensors)
        return path

    return run(
        fake_quantised(began, spec),
        spec,
        objective,
        items,
        extra,
        config,
        folder,
        device,
        held_back,
        report,
        write,
        figures=figures,
        figures_first=True,
    )


def fake_quantised(began: QuantisedModel, spec: NetworkSpec) -> FakeQuantised:
    """The trainable module that computes what `began.model` computes.

    Raises:
        UsageError: its weights were rounded jointly, or its stem rewritten
            (`edgehp.quantization.exact_input`, `edgehp.quantization.stem`): the module has neither.
    """
    recipe = began.recipe
    if recipe.exact_input or recipe.full_stem or recipe.weights:
        raise UsageError(
            f"training cannot begin from {began.chosen}: its layers are not those of the float "
            "graph; quantise with rounding=False"
        )
    grid = _GRIDS[began.flavour]
    emitted = GraphView(began.model)
    source = GraphView(began.source)
    # Bias correction changes biases in the emitted graph alone.
    biases = {
        n.name: emitted.array(emitted.nodes[n.name].input[2])
        for n in began.source.graph.node
        if source.has_weight(n)
    }
    scales = {
        t: scale_of(began.recipe.range_of(began.source_table, t, grid), grid)
        for t in place(source, began.flavour).tensors
    }
    return FakeQuantised(spec, began.source, began.flavour, scales, biases)


def trained_quantisation(
    network: FakeQuantised, table: CalibrationTable, spec: NetworkSpec
) -> TrainedQuantisation:
    """What a file keeps of a trained module.

    Args:
        network: as trained.
        table: calibration table of its start, for the crops and the channel statistics.
        spec: of the network.
    """
    layers = network.trained_layers()
    tensors = {}
    for tensor, (scale, zero) in network.scales().items():
        if network.flavour == "cpu":
            low, high = -zero * scale, (255 - zero) * scale
        else:
            low, high = -127 * scale, 127 * scale
        largest = max(-low, high)
        seen = table.tensors[tensor]
        ranges = {TRAINED_METHOD: {"int8": (-largest, largest), "uint8": (low, high)}}
        tensors[tensor] = TensorRanges(
            seen.minimum, seen.maximum, ranges, seen.channel_mean, seen.channel_peak
        )
    digest = layers_digest(layers)
    kept = replace(table, network=digest, preprocessing=spec.preprocessing.digest, tensors=tensors)
    return TrainedQuantisation(network.flavour, layers, kept)


@contextmanager
def averaged(trainer: Trainer) -> Iterator[FakeQuantised]:
    """The trainer's network with the averaged weights, in evaluation mode."""
    network = trainer.network
    if not isinstance(network, FakeQuantised):
        raise UsageError("the trainer's network is not a fake-quantised one")
    own = {k: v.detach().clone() for k, v in network.state_dict().items()}
    network.load_state_dict(trainer.average)
    try:
        yield network.eval()
    finally:
        network.load_state_dict(own)


def _start(
    path: Path, flavour: str
) -> tuple[Weights, NetworkSpec, Mapping[str, TrainedQuantisation]]:
    if flavour not in FLAVOURS:
        raise UsageError(f"unknown Q/DQ flavour {flavour!r}; known: {', '.join(FLAVOURS)}")
    if path.suffix.lower() == ".onnx":
        raise UsageError(
            f"{path} is a graph, possibly quantised already; training starts from the float "
            "checkpoint it was built from"
        )
    weights, spec = load_weights(path)
    others = read_trained(path)
    if flavour in others:
        raise UsageError(
            f"{path} is quantised already: it holds trained integers for {flavour}; start from the "
            "checkpoint before that run, or train the other flavour into this file"
        )
    return weights, spec, others


def _float_network(weights: Weights, spec: NetworkSpec) -> nn.Module:
    module = build_module(spec)
    state = {k: torch.from_numpy(v) for k, v in weights.items()}
    # strict=False for num_batches_tracked alone: load_weights has compared all other names.
    module.load_state_dict(state, strict=False)
    return module.eval().requires_grad_(False)


def _smallest(weights: Weights) -> type[np.floating[Any]]:
    """float16 where it holds these weights unchanged, as in a file that edgehp wrote."""
    matrices = [w for w in weights.values() if w.ndim > 1]
    with np.errstate(over="ignore"):
        exact = all(np.array_equal(w, w.astype(np.float16).astype(np.float32)) for w in matrices)
    return np.float16 if exact else np.float32


def _spread(items: Sequence[TrainingItem], most: int) -> Sequence[TrainingItem]:
    """At most this many items, evenly spread over all."""
    return items[:: max(1, -(-len(items) // max(1, most)))]


def _crops(
    items: Sequence[TrainingItem], spec: NetworkSpec, config: TrainConfig
) -> list[npt.NDArray[np.uint8]]:
    some = _spread(items, _CALIBRATION)
    found = plain_batches(some, spec.preprocessing, config.batch, workers=config.workers)
    return [crop for batch in found for crop in batch.crops]


class _Figures:
    """Difference to the float network and, with labels, the errors of both, in float32."""

    def __init__(self, objective: FloatTeacher, config: TrainConfig, labelled: bool) -> None:
        self._objective, self._config, self._labelled = objective, config, labelled
        self._float: npt.NDArray[np.float64] | None = None

    def __call__(self, trainer: Trainer, held: Sequence[TrainingItem]) -> dict[str, Any]:
        """The figures of the trainer's averaged weights on `held`, always the same items."""
        with averaged(trainer) as network:
            ours = self._angles(network, held, trainer.device)
        if self._float is None:
            self._float = self._angles(self._objective.teacher, held, trainer.device)
        found: dict[str, Any] = {"difference": float(np.abs(ours - self._float).mean())}
        if not self._labelled:
            return found
        matrices = np.stack([i.matrix for i in held])
        truth = pose.euler_from_matrix(matrices)
        mae = pose.angle_errors(ours, truth).mean(0)
        distance = pose.geodesic_degrees(pose.matrix_from_euler(ours), matrices)
        return {
            **found,
            "mae": tuple(float(v) for v in mae),
            "mean": float(mae.mean()),
            "geodesic": float(distance.mean()),
            "float_mean": float(pose.angle_errors(self._float, truth).mean()),
        }

    @torch.no_grad()
    def _angles(
        self, network: nn.Module, items: Sequence[TrainingItem], device: torch.device
    ) -> npt.NDArray[np.float64]:
        spec, config = self._objective.spec, self._config
        found = []
        plain = plain_batches(items, spec.preprocessing, config.batch, workers=config.workers)
        for batch in plain:
            images, _ = to_tensors(batch, spec, device)
            angles = self._objective.angles(network, images).float().cpu().numpy()
            found.append(pose.to_aflw2000(angles, spec.convention))
        return np.concatenate(found)
