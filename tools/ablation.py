r"""The gain of paper 1 (arXiv 2108.09183), step by step, on the same photos and split.

Trains the base network, averages it over a grid of box offsets, distils that ensemble into the
final network, and distils the teachers' ensemble into another; prints each one's error on the
held-back photos (against the teachers' labels) and on AFLW2000 (against the truth) as Markdown.
Everything is resumable: run the same command again after an interruption.

    python tools/ablation.py faces/*.zip --labels labels/* --aflw2000 data/aflw2000 \\
        --boxes boxes/AFLW2000.json --out runs/ablation --size 64 --epochs 5 --limit 10000
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import click
import numpy as np

from edgehp import pose
from edgehp.cli._training import student_spec
from edgehp.datasets import open_dataset
from edgehp.datasets.base import Sample, join_datasets
from edgehp.datasets.faces import read_faces
from edgehp.errors import DataError
from edgehp.training.data import split, with_labels
from edgehp.training.labelling import label_samples, read_labels
from edgehp.training.loop import TrainConfig
from edgehp.training.runs import train_base, train_final
from edgehp.training.teachers import Grid, OutputSpec, Teacher, TeacherSpec, load_teacher_spec

HELD_BACK = 0.1


@click.command()
@click.argument("photos", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--labels", multiple=True, required=True, type=click.Path(path_type=Path))
@click.option("--aflw2000", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--boxes", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path))
@click.option("--size", default=64, show_default=True)
@click.option("--epochs", default=5, show_default=True)
@click.option("--limit", default=0, help="Use the first N photos only (0: all).")
@click.option("--grid", default=3, show_default=True)
@click.option("--step", default=0.05, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(
    photos: tuple[Path, ...],
    labels: tuple[Path, ...],
    aflw2000: Path,
    boxes: Path,
    out: Path,
    size: int,
    epochs: int,
    limit: int,
    grid: int,
    step: float,
    seed: int,
) -> None:
    """Run the ablation and print its table."""
    data = join_datasets("faces", [read_faces(p) for p in photos])
    chosen = data.samples
    if limit:
        order = np.random.default_rng(seed).permutation(len(chosen))[:limit]
        chosen = [chosen[i] for i in sorted(order)]
    items = with_labels(chosen, read_labels(labels))
    truth = open_dataset("aflw2000", aflw2000, boxes=boxes).samples
    spec = student_spec("kd-resnet18", size)
    config = TrainConfig(epochs=epochs, seed=seed, workers=1)
    report = _reporter()

    click.echo("base network", err=True)
    base = train_base(items, spec, config, out / "base", held_back=HELD_BACK, report=report)
    alone = load_teacher_spec(base.weights)
    ensemble = alone.with_grid(Grid(grid, step))
    click.echo("labels of the base network over the grid", err=True)
    for _ in label_samples([i.sample for i in items], [Teacher(ensemble)], out / "base-labels"):
        pass
    own = with_labels([i.sample for i in items], read_labels([out / "base-labels"]))
    students = {}
    for name, learnt in (("ensemble", own), ("teachers", items)):
        click.echo(f"student of the {name}", err=True)
        folder = out / f"student-{name}"
        result = train_final(learnt, spec, config, folder, held_back=HELD_BACK, report=report)
        students[name] = _deployed(result.weights, folder)

    held = split(items, HELD_BACK)[1]
    rows = [
        ("base (1 regression + 4 RvC heads)", alone),
        (f"base, mean over {grid}x{grid} offsets of {step:g}", ensemble),
        ("student distilled from that ensemble", students["ensemble"]),
        ("student distilled from the teachers' ensemble", students["teachers"]),
    ]
    table = [
        f"{len(items)} photos ({len(held)} held back), {size} px, {epochs} epochs, seed {seed}",
        "",
        "| network | held-back photos, MAE to the teachers' labels | AFLW2000 "
        f"({len(truth)} photos), MAE | pitch | yaw | roll | geodesic | against base |",
        "|---|---|---|---|---|---|---|---|",
    ]
    reference = None
    for name, teacher in rows:
        on_held, _, _ = _errors(teacher, [(i.sample, i.matrix) for i in held])
        mae, axes, geodesic = _errors(teacher, [(s, None) for s in truth])
        reference = mae if reference is None else reference
        table.append(
            f"| {name} | {on_held:.2f} | {mae:.2f} | {axes[0]:.2f} | {axes[1]:.2f} | "
            f"{axes[2]:.2f} | {geodesic:.2f} | {100 * (mae / reference - 1):+.1f} % |"
        )
    text = "\n".join(table)
    (out / "ablation.md").write_text(text + "\n", encoding="utf-8")
    click.echo(text)


def _deployed(weights: Path, folder: Path) -> TeacherSpec:
    """The student's deployed graph as a teacher: the same code measures all four."""
    from edgehp.networks.checkpoint import load_weights
    from edgehp.networks.graph import build_graph, graph_bytes

    values, spec = load_weights(weights)
    (folder / "student.onnx").write_bytes(graph_bytes(build_graph(values, spec)))
    return TeacherSpec(
        name="student",
        files=(folder / "student.onnx",),
        preprocessing=spec.preprocessing,
        output=OutputSpec("euler", ("angles",)),
        input_name="crops",
        deployed=True,
    )


def _errors(
    spec: TeacherSpec, samples: Sequence[tuple[Sample, np.ndarray | None]]
) -> tuple[float, np.ndarray, float]:
    teacher = Teacher(spec, threads=2)
    matrices: list[np.ndarray] = []
    angles: list[np.ndarray] = []
    references: list[np.ndarray] = []
    for sample, matrix in samples:
        views = teacher.rotations(sample.load(), sample.box)
        matrices.append(pose.mean_rotation(views))
        reference = sample.matrix if matrix is None else matrix
        label = sample.angles if matrix is None else pose.euler_from_matrix(matrix)
        if reference is None or label is None:
            raise DataError(f"{sample.name}: expected a photo with a label, found none")
        references.append(reference)
        angles.append(label)
    found = np.stack(matrices)
    axes = pose.angle_errors(pose.euler_from_matrix(found), np.stack(angles)).mean(0)
    geodesic = pose.geodesic_degrees(found, np.stack(references)).mean()
    return float(axes.mean()), axes, float(geodesic)


def _reporter() -> Callable[..., None]:
    def report(p: object) -> None:
        step, steps = getattr(p, "step", 0), getattr(p, "steps", 0)
        if step % 50 == 0:
            click.echo(json.dumps({"step": step, "of": steps}), err=True)

    return report


if __name__ == "__main__":
    main()
