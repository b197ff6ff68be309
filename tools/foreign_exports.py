r"""Two networks as others make them, each exported by both of torch's exporters, with descriptions.

``resnet18-6d``: the backbone of the bundled kd-resnet18-112 with a linear head of six values (Zhou
et al., arXiv 1812.07035) in 6DRepNet's frame, fitted to labels by least squares.
``mobilenetv3-bins``: MobileNetV3 small (Howard et al., arXiv 1905.02244) with three heads of 66
bins, trained from random weights for some minutes of one core. Neither is a good network; both have
the operators, outputs and graphs of real ones. The exporter by torch.export needs ``pip install
onnxscript``.

    python tools/foreign_exports.py faces.zip --labels labels --out foreign
    edgehp build --network foreign/resnet18-6d-dynamo.onnx --describe foreign/resnet18-6d.toml \\
        --target cpu --calibration faces.zip
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor, nn

from edgehp.datasets.base import join_datasets
from edgehp.datasets.faces import read_faces
from edgehp.networks.bundled import bundled_path
from edgehp.networks.checkpoint import load_module
from edgehp.networks.modules import KDResNet
from edgehp.networks.spec import Bins, NetworkSpec
from edgehp.training.augment import AUGMENTATIONS
from edgehp.training.data import Faces, TrainingItem, split, with_labels
from edgehp.training.labelling import read_labels
from edgehp.training.loop import TrainConfig, Trainer, normalize
from edgehp.training.objectives import RvcObjective

BINS = Bins(66, -97.5, 97.5)
SIZE = 64  # of MobileNet's input, pixels
FITTED = 2000  # photos
# Kernel, width inside, width out, gate, activation, stride: table 2 of the paper.
BLOCKS = (
    (3, 16, 16, True, nn.ReLU, 2),
    (3, 72, 24, False, nn.ReLU, 2),
    (3, 88, 24, False, nn.ReLU, 1),
    (5, 96, 40, True, nn.Hardswish, 2),
    (5, 240, 40, True, nn.Hardswish, 1),
    (5, 240, 40, True, nn.Hardswish, 1),
    (5, 120, 48, True, nn.Hardswish, 1),
    (5, 144, 48, True, nn.Hardswish, 1),
    (5, 288, 96, True, nn.Hardswish, 2),
    (5, 576, 96, True, nn.Hardswish, 1),
    (5, 576, 96, True, nn.Hardswish, 1),
)
ANGLES = ("pitch", "yaw", "roll")
DESCRIPTION = """name = "{name}"
files = ["{file}"]
licence = "Apache-2.0, from tools/foreign_exports.py"

[input]
size = {size}
colour = "RGB"
mean = {mean}
std = {std}
resize = "{resize}"
box_rule = "{box_rule}"
box_scale = {box_scale}

[output]
{output}
"""


def _layer(cin: int, cout: int, kernel: int, stride: int, groups: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(cout, eps=1e-3)]


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = max(8, (width // 4 + 4) // 8 * 8)
        self.layers = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(width, inner, 1),
            nn.ReLU(),
            nn.Conv2d(inner, width, 1),
            nn.Hardsigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Scale the channels of [N, C, H, W]."""
        out: Tensor = x * self.layers(x)
        return out


class Block(nn.Module):
    """An inverted residual block."""

    def __init__(self, cin: int, row: tuple[int, int, int, bool, type[nn.Module], int]) -> None:
        super().__init__()
        kernel, inner, cout, gate, activation, stride = row
        layers = [*_layer(cin, inner, 1, 1), activation()] if inner != cin else []
        layers += [*_layer(inner, inner, kernel, stride, inner), activation()]
        layers += [Gate(inner)] if gate else []
        self.layers = nn.Sequential(*layers, *_layer(inner, cout, 1, 1))
        self.skip = stride == 1 and cin == cout

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, cin, H, W] to [N, cout, H / stride, W / stride]."""
        out: Tensor = self.layers(x)
        return x + out if self.skip else out


class MobileNet(nn.Module):
    """MobileNetV3 small without its heads: images to features [N, 576]."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [*_layer(3, 16, 3, 2), nn.Hardswish()]
        cin = 16
        for row in BLOCKS:
            layers.append(Block(cin, row))
            cin = row[2]
        self.layers = nn.Sequential(*layers, *_layer(cin, 576, 1, 1), nn.Hardswish())

    def forward(self, x: Tensor) -> Tensor:
        """Features [N, 576] of normalised images [N, 3, S, S]."""
        out: Tensor = self.layers(x).mean((2, 3))
        return out


class Hopenet(nn.Module):
    """A backbone with one output of bins an angle, as Hopenet has them."""

    def __init__(self, backbone: nn.Module, features: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleList(nn.Linear(features, BINS.count) for _ in ANGLES)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Logits [N, bins] of pitch, yaw and roll."""
        x = self.backbone(x)
        return tuple(head(x) for head in self.heads)


class Stacked(nn.Module):
    """The logits of a `Hopenet` as training takes them, [N, 3, bins]."""

    def __init__(self, network: Hopenet) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, 3, bins]."""
        return torch.stack(self.network(x), 1)


@click.command()
@click.argument("photos", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--labels", multiple=True, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path))
@click.option("--epochs", type=click.IntRange(min=1), default=8, show_default=True)
def main(photos: tuple[Path, ...], labels: tuple[Path, ...], out: Path, epochs: int) -> None:
    """Make both networks, their exports and their descriptions."""
    out.mkdir(parents=True, exist_ok=True)
    data = join_datasets("faces", [read_faces(p) for p in photos])
    items = with_labels(data.samples, read_labels(labels))
    make_resnet(items, out)
    make_mobilenet(items, out, epochs)


@torch.no_grad()
def make_resnet(items: list[TrainingItem], out: Path) -> None:
    """Fit a 6D head to the bundled network's features, and export."""
    bundled, spec = load_module(bundled_path("kd-resnet18-112"))
    if not isinstance(bundled, KDResNet):
        raise TypeError("the bundled network is no KD-ResNet")
    some = items[:: -(-len(items) // FITTED)]
    faces = Faces.load(some, spec.preprocessing, torch.device("cpu"), margin=1)
    # The inverse of Zhou's decode in 6DRepNet's frame: R = S M^T S.
    signs = np.diag([1.0, -1.0, -1.0])
    columns = (signs @ faces.matrices.transpose(0, 2, 1) @ signs)[:, :, :2]
    target = columns.transpose(0, 2, 1).reshape(-1, 6)
    parts = [
        bundled.encoder_net(normalize(crops.permute(0, 3, 1, 2).float(), spec))
        for crops in torch.split(faces.crops, 64)
    ]
    features = torch.cat(parts).double().numpy()
    x = np.concatenate([features, np.ones((len(features), 1))], 1)
    hold = 1e-1 * np.trace(x.T @ x) / x.shape[1] * np.eye(x.shape[1])
    w = np.linalg.solve(x.T @ x + hold, x.T @ target)
    click.echo(f"{len(x)} photos, {np.abs(x @ w - target).mean():.3g} apart from their labels")
    head = _linear(w[:-1].T, w[-1])
    export(
        nn.Sequential(bundled.encoder_net, head),
        spec,
        out,
        "resnet18-6d",
        'kind = "sixd"',
        ("pose",),
    )


def make_mobilenet(items: list[TrainingItem], out: Path, epochs: int) -> None:
    """Train MobileNetV3 with bins, and export; a run that was interrupted goes on."""
    _, bundled = load_module(bundled_path("kd-resnet18-112"))
    spec = replace(bundled.with_size(SIZE), bins=BINS, convention="aflw2000")
    train, held_back = split(items, 0.04)
    config = TrainConfig(
        epochs=epochs, batch=64, learning_rate=3e-3, start_size=48,
        grow=0.5, precision="fp32",
        augmentation=AUGMENTATIONS["gentle"],
    )  # fmt: skip
    torch.manual_seed(config.seed)
    network = Stacked(Hopenet(MobileNet(), 576))
    cpu = torch.device("cpu")
    trainer = Trainer(
        network, spec, RvcObjective(BINS), Faces.load(train, spec.preprocessing, cpu), config,
        out / "mobilenetv3",
    )  # fmt: skip
    held = Faces.load(held_back, spec.preprocessing, cpu, margin=1)
    for step in trainer.run(lambda t: click.echo(f"epoch {t.epoch}: {t.validate(held)}")):
        if step.step % 50 == 0:
            click.echo(f"{step.step} of {step.steps}: {step.images_per_second:.0f} images/s")
    network.load_state_dict(trainer.average)
    names = ", ".join(f'"{a}"' for a in ANGLES)
    text = f'kind = "bins"\nnames = [{names}]\nfirst = {BINS.first}\nlast = {BINS.last}'
    export(network.network, spec, out, "mobilenetv3-bins", text, ANGLES)


def _linear(weight: np.ndarray, bias: np.ndarray) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight.copy_(torch.from_numpy(weight))
    layer.bias.copy_(torch.from_numpy(bias))
    return layer


def export(
    network: nn.Module, spec: NetworkSpec, out: Path, name: str, output: str, names: tuple[str, ...]
) -> None:
    """Write ``NAME-torchscript.onnx``, ``NAME-dynamo.onnx`` and ``NAME.toml``."""
    p = spec.preprocessing
    image = torch.zeros(1, 3, p.size, p.size)
    for kind in ("torchscript", "dynamo"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the older exporter announces its end
            torch.onnx.export(
                network.eval(),
                (image,),
                str(out / f"{name}-{kind}.onnx"),
                input_names=["image"],
                output_names=list(names),
                dynamo=kind == "dynamo",
            )
    text = DESCRIPTION.format(
        name=name,
        file=f"{name}-torchscript.onnx",
        output=output,
        size=p.size,
        mean=list(p.mean),
        std=list(p.std),
        resize=p.resize,
        box_rule=p.box_rule,
        box_scale=p.box_scale,
    )
    (out / f"{name}.toml").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
