r"""Images a second of labelling on 1 and 2 workers, and what bounds it on 8, 64 and 512.

Starts Dask workers on this machine, labels the photos on them, and sends the same photos to the
same workers without any work to do: what that takes is the share of the head, which does not grow
with the workers.

    python tools/scale_labelling.py faces.zip --teacher docs/teachers/opentrack.toml \
        --model-dir teachers --limit 192

It prints the paragraph and the table of docs/scale.md.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import click
from distributed import LocalCluster
from msgspec.structs import replace as changed

from edgehp.cli._command import open_photos
from edgehp.cluster import Workers, run_shards
from edgehp.datasets.base import Sample
from edgehp.datasets.stores import photo_for
from edgehp.networks.description import load_description
from edgehp.training.labelling import label_samples

_GIGABIT = 125e6


@dataclass(frozen=True)
class Nothing:
    """Takes photos and gives back as much as a label is."""

    files: Mapping[str, Path] = field(default_factory=dict)

    def open(self, folder: Path | None) -> Callable[[Sample], tuple[float, ...]]:
        """Nothing to load."""
        return lambda sample: (0.0,) * 20


@click.command()
@click.argument("photos", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--teacher", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--model-dir", type=click.Path(exists=True, path_type=Path))
@click.option("--grid", default=3, show_default=True)
@click.option("--limit", default=192, show_default=True, help="Use this many photos.")
def main(
    photos: tuple[Path, ...], teacher: Path, model_dir: Path | None, grid: int, limit: int
) -> None:
    """Measure here, and say what would bound more workers."""
    spec = load_description(teacher, model_dir)
    spec = spec.with_grid(changed(spec.grid, size=grid))
    samples = open_photos(photos, None, False).samples[:limit]
    size = sum(len(s.source.read()) for s in samples) / len(samples)
    load = os.getloadavg()[0]
    rates: dict[int, float] = {}
    head = 0.0

    def send(sample: Sample) -> Sample:
        return replace(sample, source=photo_for(sample.source, None, None))

    for count in (1, 2):
        with (
            LocalCluster(n_workers=count, threads_per_worker=1, dashboard_address=None) as cluster,
            tempfile.TemporaryDirectory() as folder,
        ):
            workers = Workers(address=cluster.scheduler_address)
            # What every worker loads once is not part of the rate.
            list(label_samples(samples[:16], [spec], Path(folder, "warm"), workers=workers))
            begun = time.perf_counter()
            for _ in label_samples(
                samples, [spec], Path(folder, "all"), threads=1, workers=workers
            ):
                pass
            rates[count] = len(samples) / (time.perf_counter() - begun)
            begun = time.perf_counter()
            for _ in run_shards(Nothing(), samples, workers, size=64, send=send):
                pass
            head = len(samples) / (time.perf_counter() - begun)
    shard = max(1, min(64, len(samples) // 32))
    click.echo(
        f"Measured once on {os.cpu_count()} processors (load before: {load:.1f}), with "
        f"{len(samples)} face crops of {size / 1e3:.1f} kB, the teacher {spec.name} and "
        f"{grid * grid} views a photo: {rates[1]:.1f} images/s with one worker, "
        f"{rates[2]:.1f} with two, {head:.0f} for the head alone in shards of {shard}. "
        f"A gigabit a second carries {_GIGABIT / size:.0f}. From these:\n\n"
        "| workers | images/s at most | bound by |\n|---|---|---|"
    )
    for count in (8, 64, 512):
        bounds = {
            "the workers": count * rates[1],
            "the head": head,
            "a gigabit network": _GIGABIT / size,
        }
        what = min(bounds, key=bounds.__getitem__)
        click.echo(f"| {count} | {bounds[what]:.0f} | {what} |")


if __name__ == "__main__":
    main()
