"""Augmentation for head-pose training: geometry that keeps the label exact, and car cameras.

Everything works on whole batches of torch tensors, on the CPU and on a GPU alike. What happens to
each photo of an epoch is drawn at once by `draw`, from a numpy generator: an epoch can be repeated,
resumed, and shared out over processes from its seed. Only the grain of noise is drawn later, on the
device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from edgehp import pose

Array = npt.NDArray[np.float64]
# ITU-R BT.601 luma, as in cv2.COLOR_RGB2GRAY; and 940 nm, where skin reflects evenly (mostly red).
_LUMA = (0.299, 0.587, 0.114)
_INFRARED = (0.8, 0.2, 0.0)


@dataclass(frozen=True)
class Augmentation:
    """How much of what; probabilities are per photo.

    Attributes:
        scale: factors (lowest, highest) on the box.
        shift: largest shift of the box, times its larger side, each axis.
        rotate: largest rotation in the image plane, degrees; the label turns with it.
        rotate_probability: of a rotation.
        flip: probability of a mirror image.
        light: probability of brightness, contrast and gamma changes.
        grey: probability of a grey picture; half of these imitate near-infrared light.
        dark: probability of low light with sensor noise.
        blur: probability of defocus or motion blur.
        sharpen: probability of over-sharpening.
        coarse: probability of a loss of resolution.
        noise: probability of noise alone.
        occlude: probability of a patch over the face.
    """

    scale: tuple[float, float] = (0.92, 1.12)
    shift: float = 0.06
    rotate: float = 20.0
    rotate_probability: float = 0.4
    flip: float = 0.5
    light: float = 0.8
    grey: float = 0.2
    dark: float = 0.08
    blur: float = 0.12
    sharpen: float = 0.12
    coarse: float = 0.12
    noise: float = 0.1
    occlude: float = 0.3


# A run from random weights takes the full effects; the last epochs of a run, or a fine-tune, gain
# accuracy on clean photos from milder ones and keep what was learnt about bad light.
_GENTLE = Augmentation(
    scale=(0.95, 1.08),
    shift=0.04,
    rotate=15.0,
    rotate_probability=0.3,
    light=0.6,
    grey=0.15,
    dark=0.04,
    blur=0.06,
    sharpen=0.08,
    coarse=0.06,
    noise=0.05,
    occlude=0.15,
)
AUGMENTATIONS: Mapping[str, Augmentation] = MappingProxyType(
    {
        "strong": Augmentation(),
        "gentle": _GENTLE,
        # For an input larger than the training photos: enlarged ones are soft, a camera's are not.
        "sharp": replace(_GENTLE, blur=0.05, sharpen=0.4, coarse=0.04),
    }
)


@dataclass(frozen=True, eq=False)
class Draws:
    """What happens to N photos; every array has N rows, and lengths are shares of the crop's side.

    Attributes:
        angle: rotation in the image plane, degrees, clockwise as seen.
        shift: of the box [N, 2], in units of its larger side.
        scale: of the box.
        flip: mirrored or not, bool.
        coarse: factor on the resolution, 1 where it stays.
        defocus: standard deviation of a Gaussian in 1/112 of the side, 0 where there is none.
        motion: length of a motion blur in 1/112 of the side, 0 where there is none.
        motion_angle: its direction, degrees.
        sharpen: gain of an unsharp mask, 0 where there is none.
        light: gamma, contrast, brightness and a factor for each colour [N, 6].
        grey: 0 colour, 1 luma, 2 near-infrared.
        lamp: centre (x, y) and radius of the near-infrared lamp [N, 3].
        gain: factor on the signal before noise.
        noise: standard deviation of the sensor's noise in levels of 255, 0 where there is none.
        patch: left, top, right, bottom of an occlusion [N, 4]; empty where there is none.
        patch_colour: its colour [N, 3] in levels of 255; NaN for a patch of noise.
    """

    angle: Array
    shift: Array
    scale: Array
    flip: npt.NDArray[np.bool_]
    coarse: Array
    defocus: Array
    motion: Array
    motion_angle: Array
    sharpen: Array
    light: Array
    grey: npt.NDArray[np.intp]
    lamp: Array
    gain: Array
    noise: Array
    patch: Array
    patch_colour: Array

    def __getitem__(self, rows: npt.NDArray[np.intp] | slice) -> Draws:
        """The same for some of the photos."""
        return Draws(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def turned(self, matrices: Array) -> Array:
        """The labels [N, 3, 3] of the augmented photos, from those of the photos as they are.

        Turning the picture clockwise by t turns the head about the viewing axis, after whatever
        rotation it had: R' = Rz(t) R in the y-down camera frame.
        """
        zero = np.zeros_like(self.angle)
        out = pose.matrix_from_euler(np.stack([zero, zero, self.angle], 1)) @ matrices
        out[self.flip] = pose.flip_matrix(out[self.flip])
        return np.asarray(out)


def draw(count: int, a: Augmentation, rng: np.random.Generator) -> Draws:
    """Decide what happens to each of `count` photos."""

    def happens(probability: float) -> npt.NDArray[np.bool_]:
        return rng.random(count) < probability

    def between(low: float, high: float, *columns: int) -> Array:
        return rng.uniform(low, high, (count, *columns))

    turns = happens(a.rotate_probability)
    blurred, in_motion = happens(a.blur), happens(0.5)
    sharpened = happens(a.sharpen) & ~blurred
    lit, grey, infrared = happens(a.light), happens(a.grey), happens(0.5)
    dark = happens(a.dark)
    noisy = happens(a.noise) & ~dark
    sigma = np.where(dark, between(2, 9), np.where(noisy, between(2, 14), 0.0))
    light = np.concatenate(
        [
            np.exp(rng.normal(0, 0.25, (count, 1))),
            between(0.6, 1.4, 1),
            between(-0.2, 0.2, 1),
            rng.normal(1.0, 0.06, (count, 3)),
        ],
        axis=1,
    )
    covered, plain = happens(a.occlude), happens(0.5)
    side = between(0.1, 0.4, 2)
    corner = between(0, 1, 2) * (1 - side)
    patch = np.concatenate([corner, corner + side * covered[:, None]], axis=1)
    colour = np.floor(between(0, 256, 3))
    return Draws(
        angle=np.where(turns, between(-a.rotate, a.rotate), 0.0),
        shift=between(-a.shift, a.shift, 2),
        scale=between(*a.scale),
        flip=happens(a.flip),
        coarse=np.where(happens(a.coarse), between(0.2, 0.7), 1.0),
        defocus=np.where(blurred & ~in_motion, between(0.5, 2.5), 0.0),
        motion=np.where(blurred & in_motion, between(3, 10), 0.0),
        motion_angle=between(0, 180),
        sharpen=np.where(sharpened, between(0.5, 2.0), 0.0),
        light=np.where(lit[:, None], light, [1.0, 1.0, 0.0, 1.0, 1.0, 1.0]),
        grey=np.where(grey, np.where(infrared, 2, 1), 0),
        lamp=np.concatenate([between(0.25, 0.75, 2), between(0.5, 1.2, 1)], axis=1),
        gain=np.where(dark, between(0.08, 0.5), 1.0),
        noise=sigma,
        patch=patch,
        patch_colour=np.where(plain[:, None], colour, np.nan),
    )


def cut(photos: Tensor, draws: Draws, size: int, margin: float) -> Tensor:
    """Crops out of photos that were cut with a margin, by area averaging.

    Args:
        photos: uint8 [N, C, C, 3]: `margin` times the network's view of the face, about its centre.
        draws: rotation, shift, scale and mirroring of each.
        size: side of the crops in pixels.
        margin: see `photos`.

    Returns:
        float32 [N, 3, size, size], 0 to 255; beyond the margin the border is repeated.
    """
    # From the crop's coordinates (-1 to 1) back to the photo's: mirror, scale, shift, turn.
    t = np.radians(draws.angle)
    cos, sin = np.cos(t) / margin, np.sin(t) / margin
    x, y = draws.scale * np.where(draws.flip, -1, 1), draws.scale
    dx, dy = 2 * draws.shift[:, 0], 2 * draws.shift[:, 1]
    theta = np.stack(
        [
            np.stack([cos * x, sin * y, cos * dx + sin * dy], 1),
            np.stack([-sin * x, cos * y, -sin * dx + cos * dy], 1),
        ],
        axis=1,
    )
    images = photos.permute(0, 3, 1, 2).float()
    # Bilinear samples, several a pixel where the crop is smaller than the face: together they
    # average the area that the deployed crop's cv2.INTER_AREA averages.
    samples = max(1, round(photos.shape[1] / margin / size))
    grid = functional.affine_grid(
        torch.from_numpy(theta).to(images, non_blocking=True),
        [len(images), 3, *(samples * size,) * 2],
        align_corners=False,
    )
    crops = functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return crops if samples == 1 else functional.avg_pool2d(crops, samples)


def photometric(crops: Tensor, draws: Draws, generator: torch.Generator) -> Tensor:
    """Change light, colour, sharpness and visibility of crops, not their pose.

    Args:
        crops: float32 [N, 3, S, S], RGB, 0 to 255.
        draws: what happens to each.
        generator: of the crops' device, for the grain of noise.

    Returns:
        float32 [N, 3, S, S], whole levels 0 to 255, as a camera's.
    """
    out = crops.clone()
    size = out.shape[-1]
    if len(rows := np.flatnonzero(draws.coarse < 1)):
        out[_on(rows, out)] = _coarse(out[_on(rows, out)], float(draws.coarse[rows].mean()))
    if len(rows := np.flatnonzero(draws.defocus)):
        kernels = _gaussians(draws.defocus[rows] * size / 112)
        out[_on(rows, out)] = _filtered(out[_on(rows, out)], kernels)
    if len(rows := np.flatnonzero(draws.motion)):
        kernels = _lines(draws.motion[rows] * size / 112, draws.motion_angle[rows])
        out[_on(rows, out)] = _filtered(out[_on(rows, out)], kernels)
    if len(rows := np.flatnonzero(draws.sharpen)):
        sharp = out[_on(rows, out)]
        soft = _filtered(sharp, _gaussians(np.full(len(rows), size / 112)))
        gain = _column(draws.sharpen[rows], out)
        out[_on(rows, out)] = (sharp + gain * (sharp - soft)).clamp(0, 255)
    out = _relit(out, draws.light)
    if len(rows := np.flatnonzero(draws.grey)):
        out[_on(rows, out)] = _grey(out[_on(rows, out)], draws[rows])
    if len(rows := np.flatnonzero(draws.noise)):
        part = out[_on(rows, out)] * _column(draws.gain[rows], out)
        grain = torch.randn(part.shape, generator=generator, device=out.device)
        out[_on(rows, out)] = part + grain * _column(draws.noise[rows], out)
    if len(rows := np.flatnonzero(draws.patch[:, 2] > draws.patch[:, 0])):
        out[_on(rows, out)] = _occluded(out[_on(rows, out)], draws[rows], generator)
    return out.round_().clamp_(0, 255)


def _on(rows: npt.NDArray[np.intp], like: Tensor) -> Tensor:
    return torch.from_numpy(rows).to(like.device, non_blocking=True)


def _column(values: Array, like: Tensor) -> Tensor:
    """Values [N] or [N, 3] as [N, 1 or 3, 1, 1]."""
    out = torch.from_numpy(values).to(like.device, torch.float32, non_blocking=True)
    return out.view(len(out), -1, 1, 1)


def _coarse(crops: Tensor, factor: float) -> Tensor:
    # One factor for all of a batch: the batches of an epoch have many.
    size = crops.shape[-1]
    small = max(8, int(size * factor))
    down = functional.interpolate(crops, size=(small, small), mode="area")
    return functional.interpolate(down, size=(size, size), mode="bilinear", align_corners=False)


def _gaussians(sigma: Array) -> Array:
    """Kernels [N, K, K] of standard deviations [N] in pixels."""
    radius = max(1, math.ceil(3 * sigma.max()))
    x = np.arange(-radius, radius + 1)
    line = np.exp(-0.5 * (x / sigma[:, None]) ** 2)
    line /= line.sum(1, keepdims=True)
    return np.asarray(line[:, :, None] * line[:, None, :])


def _lines(length: Array, angle: Array) -> Array:
    """Kernels [N, K, K] of straight movements of lengths [N] in pixels."""
    radius = math.ceil(length.max() / 2)
    x, y = np.meshgrid(*(np.arange(-radius, radius + 1.0),) * 2)
    t = np.radians(angle)[:, None, None]
    along = np.abs(x * np.cos(t) + y * np.sin(t))
    across = np.abs(y * np.cos(t) - x * np.sin(t))
    half = np.maximum(length, 3)[:, None, None] / 2
    kernel = np.clip(half + 0.5 - along, 0, 1) * np.clip(1 - across, 0, 1)
    return np.asarray(kernel / kernel.sum((1, 2), keepdims=True))


def _filtered(crops: Tensor, kernels: Array) -> Tensor:
    n, channels, size, _ = crops.shape
    k = kernels.shape[-1]
    weights = (
        torch.from_numpy(kernels)
        .to(crops, non_blocking=True)
        .repeat_interleave(channels, 0)[:, None]
    )
    padded = functional.pad(crops, (k // 2,) * 4, mode="replicate")
    flat = padded.reshape(1, n * channels, *padded.shape[2:])
    out = functional.conv2d(flat, weights, groups=n * channels)
    return out.view(n, channels, size, size)


def _relit(crops: Tensor, light: Array) -> Tensor:
    gamma, contrast, brightness = (_column(light[:, i], crops) for i in range(3))
    levels = (crops / 255).clamp(0, 1) ** gamma
    levels = (levels - 0.5) * contrast + 0.5 + brightness
    return (levels * _column(light[:, 3:], crops) * 255).clamp(0, 255)


def _grey(crops: Tensor, draws: Draws) -> Tensor:
    size = crops.shape[-1]
    infrared = draws.grey == 2
    weights = _column(np.where(infrared[:, None], _INFRARED, _LUMA), crops)
    grey = (crops * weights).sum(1, keepdim=True)
    # The near-infrared lamp sits beside the camera; its light falls off towards the edges.
    at = (torch.arange(size, device=crops.device) + 0.5) / size
    cx, cy, radius = (_column(draws.lamp[:, i], crops) for i in range(3))
    square = (at.view(1, 1, 1, -1) - cx) ** 2 + (at.view(1, 1, -1, 1) - cy) ** 2
    lamp = 0.35 + 0.9 * torch.exp(-square / (2 * radius**2))
    lit = torch.where(_column(infrared.astype(float), crops) > 0, grey * lamp, grey)
    return lit.clamp(0, 255).expand_as(crops)


def _occluded(crops: Tensor, draws: Draws, generator: torch.Generator) -> Tensor:
    at = (torch.arange(crops.shape[-1], device=crops.device) + 0.5) / crops.shape[-1]
    x0, y0, x1, y1 = (_column(draws.patch[:, i], crops) for i in range(4))
    x, y = at.view(1, 1, 1, -1), at.view(1, 1, -1, 1)
    inside = (x >= x0) & (x < x1) & (y >= y0) & (y < y1)
    colour = _column(draws.patch_colour, crops)
    grain = torch.rand(crops.shape, generator=generator, device=crops.device) * 256
    return torch.where(inside, torch.where(colour.isnan(), grain, colour), crops)
