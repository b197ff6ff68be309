r"""The gain of paper 1 (arXiv 2108.09183), step by step, on the same photos and split.

Trains, for each seed: the base network (one regression and four RvC heads); the student that is
distilled from the base network's answers over a grid of box offsets; the student that is distilled
from the labels; and a plain ResNet18 with one regression head. Prints each one's error on the
held-back photos (against the labels) and on AFLW2000 (against the truth) as Markdown, with the
spread over seeds. Every network that is done stays in --out: run the same command again after an
interruption, or one command a seed at the same time and then all seeds together for the table.

    python tools/ablation.py faces/*.zip --labels labels --aflw2000 data/aflw2000 \\
        --boxes boxes/AFLW2000.json --start imagenet.safetensors --out runs/ablation --epochs 30
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor, nn

from edgehp import pose
from edgehp.cli.training import student_spec
from edgehp.datasets import open_dataset
from edgehp.datasets.base import join_datasets
from edgehp.datasets.faces import read_faces
from edgehp.networks.checkpoint import build_module
from edgehp.networks.modules import BASE_BINS, BaseNetwork
from edgehp.networks.spec import NetworkSpec
from edgehp.training.augment import Augmentation, cut, draw
from edgehp.training.data import Faces, split, with_labels
from edgehp.training.labelling import read_labels
from edgehp.training.loop import TrainConfig, Trainer, autocast, evaluate, normalize
from edgehp.training.objectives import BaseObjective, Objective, RvcObjective
from edgehp.training.runs import begin_with

HELD_BACK = 0.04
ROWS = {
    "plain": "plain ResNet18, one regression head",
    "base": "base network: 1 regression + 4 RvC heads",
    "ensemble": "base network, mean over {grid}x{grid} box offsets of {step:g}",
    "student": "RvC student distilled from that ensemble",
    "teachers": "RvC student distilled from the labels",
}


@click.command()
@click.argument("photos", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--labels", multiple=True, required=True, type=click.Path(path_type=Path))
@click.option("--aflw2000", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--boxes", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--start", type=click.Path(exists=True, path_type=Path), help="For all networks.")
@click.option("--out", required=True, type=click.Path(path_type=Path))
@click.option("--size", default=64, show_default=True)
@click.option("--epochs", default=30, show_default=True)
@click.option("--batch", default=256, show_default=True)
@click.option("--shift", default=0.06, show_default=True, help="Box jitter in training.")
@click.option("--grid", default=3, show_default=True)
@click.option("--step", default=0.05, show_default=True)
@click.option("--seed", "seeds", multiple=True, type=int, default=(0, 1, 2), show_default=True)
@click.option("--workers", default=2, show_default=True)
def main(
    photos: tuple[Path, ...],
    labels: tuple[Path, ...],
    aflw2000: Path,
    boxes: Path,
    start: Path | None,
    out: Path,
    size: int,
    seeds: tuple[int, ...],
    workers: int,
    **options: Any,
) -> None:
    """Run the ablation and print its table."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    spec = student_spec("kd-resnet18", size)
    data = join_datasets("faces", [read_faces(p) for p in photos])
    train, held = split(with_labels(data.samples, read_labels(labels)), HELD_BACK)
    truth = with_labels(open_dataset("aflw2000", aflw2000, boxes=boxes).samples)
    load = partial(Faces.load, preprocessing=spec.preprocessing, device=device, workers=workers)
    tested = {"held": held, "aflw2000": truth}
    study = _Study(
        spec,
        load(train),
        {name: load(items, margin=1) for name, items in tested.items()},
        {name: load(items) for name, items in tested.items()},
        start,
        out,
        options,
    )
    out.mkdir(parents=True, exist_ok=True)
    results = [study.seed(s) for s in seeds]
    names = {k: v.format(grid=options["grid"], step=options["step"]) for k, v in ROWS.items()}
    text = _table(results, names)
    (out / "ablation.md").write_text(text + "\n", encoding="utf-8")
    click.echo(
        f"{len(train)} photos, {len(held)} held back, {len(truth)} of AFLW2000; {size} px, "
        f"{options['epochs']} epochs, seeds {', '.join(map(str, seeds))}\n\n{text}"
    )


@dataclass
class _Study:
    """All networks of a seed, each trained once and kept."""

    spec: NetworkSpec
    faces: Faces
    tests: dict[str, Faces]
    wide: dict[str, Faces]
    start: Path | None
    out: Path
    options: dict[str, Any]

    def seed(self, seed: int) -> dict[str, dict[str, Any]]:
        rvc = RvcObjective(self.spec.bins)
        found = {
            "plain": self._row(seed, "plain", BaseObjective(()), self.faces),
            "base": self._row(seed, "base", BaseObjective(BASE_BINS), self.faces),
            "teachers": self._row(seed, "teachers", rvc, self.faces),
        }
        path = self.out / f"{seed}-ensemble.json"
        if not path.is_file() or not (self.out / f"{seed}-student.json").is_file():
            base = self._network("base")
            base.load_state_dict(torch.load(self.out / f"{seed}-base.pt", weights_only=True))
            row: dict[str, Any] = {"seconds": 0.0}
            for name, faces in self.wide.items():
                views = self._views(base, faces)
                row[name] = _errors(pose.mean_rotation(views), faces.matrices)
            path.write_text(json.dumps(row))
            views = self._views(base, self.faces)
            mean = pose.mean_rotation(views)
            spread = np.stack([pose.geodesic_degrees(v, mean) for v in views]).mean(0)
            weights = (1 / (1 + (spread / 6.0) ** 2)).astype(np.float32)
            learnt = replace(self.faces, matrices=mean, weights=weights)
            self._row(seed, "student", rvc, learnt)
        for name in ("ensemble", "student"):
            found[name] = json.loads((self.out / f"{seed}-{name}.json").read_text())
        return found

    def _network(self, name: str) -> nn.Module:
        if name in ("base", "plain"):
            network: nn.Module = BaseNetwork(self.spec, BASE_BINS if name == "base" else ())
        else:
            network = build_module(self.spec)
        return network.to(self.faces.crops.device)

    def _row(self, seed: int, name: str, objective: Objective, faces: Faces) -> dict[str, Any]:
        path = self.out / f"{seed}-{name}.json"
        if path.is_file():
            return dict(json.loads(path.read_text()))
        o = self.options
        config = TrainConfig(
            epochs=o["epochs"],
            batch=o["batch"],
            seed=seed,
            checkpoint_seconds=600,
            augmentation=Augmentation(shift=o["shift"]),
        )
        torch.manual_seed(seed)
        network = self._network(name)
        if self.start is not None:
            begin_with(network, self.spec, self.start)
        began = time.monotonic()
        folder = self.out / f"{seed}-{name}"
        trainer = Trainer(network, self.spec, objective, faces, config, folder)
        for p in trainer.run():
            if p.step % 500 == 0:
                click.echo(
                    f"{seed} {name}: {p.step}/{p.steps} {p.images_per_second:.0f}/s", err=True
                )
        network.load_state_dict(trainer.average)
        row: dict[str, Any] = {"seconds": time.monotonic() - began}
        for test, own in self.tests.items():
            v = evaluate(network, self.spec, objective, own, config)
            row[test] = [v.mean, *v.mae, v.geodesic]
        torch.save(network.state_dict(), self.out / f"{seed}-{name}.pt")
        path.write_text(json.dumps(row))
        return row

    @torch.no_grad()
    def _views(self, network: nn.Module, faces: Faces) -> list[np.ndarray]:
        """Rotations [N, 3, 3] of a base network at each position of the grid."""
        network.eval()
        still = Augmentation(
            scale=(1, 1), shift=0, rotate=0, flip=0, light=0, grey=0, dark=0, blur=0, sharpen=0,
            coarse=0, noise=0, occlude=0,
        )  # fmt: skip
        half = self.options["grid"] // 2
        steps = [i * self.options["step"] for i in range(-half, half + 1)]
        draws = draw(len(faces), still, np.random.default_rng(0))
        objective = BaseObjective(BASE_BINS)
        views = []
        for shift in ((dx, dy) for dy in steps for dx in steps):
            moved = replace(draws, shift=np.tile(shift, (len(faces), 1)))
            found: list[Tensor] = []
            for first in range(0, len(faces), 512):
                rows = slice(first, first + 512)
                size = self.spec.preprocessing.size
                crops = cut(faces.crops[rows], moved[rows], size, faces.margin)
                with autocast(crops.device, "bf16"):
                    images = normalize(crops.round(), self.spec)
                    found.append(objective.angles(network, images).float().cpu())
            angles = pose.to_aflw2000(torch.cat(found).numpy(), self.spec.convention)
            views.append(pose.matrix_from_euler(angles))
        return views


def _errors(found: np.ndarray, truth: np.ndarray) -> list[float]:
    mae = pose.angle_errors(pose.euler_from_matrix(found), pose.euler_from_matrix(truth)).mean(0)
    geodesic = pose.geodesic_degrees(found, truth).mean()
    return [float(mae.mean()), *map(float, mae), float(geodesic)]


def _table(results: list[dict[str, dict[str, Any]]], names: dict[str, str]) -> str:
    lines = [
        "| network | held-back photos, MAE to the labels | AFLW2000, MAE | pitch | yaw | roll | "
        "geodesic | against base | seconds a seed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for key, name in names.items():
        held = np.array([r[key]["held"] for r in results])
        test = np.array([r[key]["aflw2000"] for r in results])
        base = np.array([r["base"]["aflw2000"][0] for r in results])
        change = 100 * (test[:, 0] / base - 1)
        seconds = np.mean([r[key]["seconds"] for r in results])
        cells = [_spread(held[:, 0]), *(_spread(test[:, i]) for i in range(5)), _spread(change, 1)]
        lines.append(f"| {name} | {' | '.join(cells)} % | {seconds:.0f} |")
    return "\n".join(lines)


def _spread(values: np.ndarray, digits: int = 2) -> str:
    """Mean and standard deviation over seeds."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{values.mean():.{digits}f} ± {values.std(ddof=1):.{digits}f}"


if __name__ == "__main__":
    main()
