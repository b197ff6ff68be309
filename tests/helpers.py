"""Small deterministic parts that several tests share."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgehp.networks.layout import Weights, expected_shapes
from edgehp.networks.spec import EHPNET, KD_RESNET, NetworkSpec

_SPECS = {"kd-resnet18": KD_RESNET, "ehpnet": EHPNET}


def random_network(
    name: str = "kd-resnet18", size: int | None = None, seed: int = 0
) -> tuple[Weights, NetworkSpec]:
    """Weights and specification of an untrained network whose answer varies over crops.

    Convolutions are He-initialised; the batch normalisation's statistics and scales are random
    about those values that keep activations near unit size through the depth, so that folding
    them wrongly shows; the heads' logits spread over several units.

    Args:
        name: ``kd-resnet18``, any other ``kd-resnetNN``, or ``ehpnet``.
        size: input size in pixels; None keeps the network's own.
        seed: of everything random.
    """
    if name in _SPECS:
        spec = _SPECS[name]
    else:
        from dataclasses import replace

        spec = replace(KD_RESNET, name=name, depth=int(name.removeprefix("kd-resnet")))
    if size is not None:
        spec = spec.with_size(size)
    rng = np.random.default_rng(seed)
    weights = {k: _values(rng, k, s) for k, s in expected_shapes(spec).items()}
    return weights, spec


def _values(
    rng: np.random.Generator, name: str, shape: tuple[int, ...]
) -> npt.NDArray[np.float32]:
    if len(shape) == 4:
        fan_in = int(np.prod(shape[1:]))
        out = rng.normal(0, np.sqrt(2 / fan_in), shape)
    elif len(shape) == 2:
        out = rng.normal(0, 3 / np.sqrt(shape[1]), shape)
    elif name.endswith("running_var"):
        out = rng.uniform(0.5, 2.0, shape)
    elif name.endswith(".weight"):
        # The last normalisation of a block is kept small, or the residual sums would grow.
        last = ".bn2." in name or ".bn3." in name
        out = rng.uniform(0.2, 0.6, shape) if last else rng.uniform(0.6, 1.4, shape)
    else:
        out = rng.normal(0, 0.2, shape)
    return out.astype(np.float32)


def random_crops(count: int, size: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Smooth coloured pictures uint8 [count, size, size, 3] that differ much from each other."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 255, (count, 8, 8, 3))
    index = np.minimum(np.arange(size) * 8 // size, 7)
    smooth = coarse[:, index][:, :, index]
    noisy = smooth + rng.normal(0, 15, smooth.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8)
