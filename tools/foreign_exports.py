r"""A network as others make it, exported by both of torch's exporters, with its description.

``resnet18-6d``: the backbone of the bundled kd-resnet18-112 with a linear head of six values (Zhou
et al., arXiv 1812.07035) in 6DRepNet's frame, fitted to labels by least squares. It is no good
network; it has the operators, output and graph of real ones. The exporter by torch.export needs
``pip install onnxscript``.

    python tools/foreign_exports.py faces.zip --labels labels --out foreign
    edgehp build --network foreign/resnet18-6d-dynamo.onnx --describe foreign/resnet18-6d.toml \\
        --target cpu --calibration faces.zip
"""

from __future__ import annotations

import warnings
from pathlib import Path

import click
import numpy as np
import torch
from torch import nn

from edgehp.crop import Preprocessing
from edgehp.datasets.base import join_datasets
from edgehp.datasets.faces import read_faces
from edgehp.networks.bundled import bundled_path
from edgehp.networks.checkpoint import load_module
from edgehp.networks.kd_resnet import KDResNet
from edgehp.training.data import Faces, with_labels
from edgehp.training.labelling import read_labels
from edgehp.training.loop import normalize

FITTED = 2000  # photos
NAME = "resnet18-6d"
DESCRIPTION = """name = "{name}"
files = ["{name}-torchscript.onnx"]
licence = "Apache-2.0, from tools/foreign_exports.py"

[input]
size = {p.size}
colour = "RGB"
mean = {mean}
std = {std}
resize = "{p.resize}"
box_rule = "{p.box_rule}"
box_scale = {p.box_scale}

[output]
kind = "sixd"
"""


@click.command()
@click.argument("photos", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--labels", multiple=True, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path))
@torch.no_grad()
def main(photos: tuple[Path, ...], labels: tuple[Path, ...], out: Path) -> None:
    """Fit a 6D head to the bundled network's features, and export."""
    out.mkdir(parents=True, exist_ok=True)
    data = join_datasets("faces", [read_faces(p) for p in photos])
    items = with_labels(data.samples, read_labels(labels))
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
    head = nn.Linear(len(w) - 1, 6)
    head.weight.copy_(torch.from_numpy(w[:-1].T))
    head.bias.copy_(torch.from_numpy(w[-1]))
    export(nn.Sequential(bundled.encoder_net, head).eval(), spec.preprocessing, out)


def export(network: nn.Module, p: Preprocessing, out: Path) -> None:
    """Write ``NAME-torchscript.onnx``, ``NAME-dynamo.onnx`` and ``NAME.toml``."""
    for kind in ("torchscript", "dynamo"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the older exporter announces its end
            torch.onnx.export(
                network,
                (torch.zeros(1, 3, p.size, p.size),),
                str(out / f"{NAME}-{kind}.onnx"),
                input_names=["image"],
                output_names=["pose"],
                dynamo=kind == "dynamo",
            )
    text = DESCRIPTION.format(name=NAME, p=p, mean=list(p.mean), std=list(p.std))
    (out / f"{NAME}.toml").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
