r"""Images a second of labelling on 1 and 2 workers, and what bounds it on 8, 64 and 512.

Starts Dask workers on this machine, labels the photos on them, and sends the same photos to the
same workers without any work to do: what that takes is the share of the head, which does not grow
with the workers.

    python tools/scale_labelling.py faces.zip --teacher docs/teachers/fsanet.toml \
        --model-dir teachers --grid 3
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import click
from distributed import LocalCluster
from msgspec.structs import replace as changed

from edgehp.cli._photos import open_photos
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
@click.option("--limit", default=1024, show_default=True, help="Use this many photos.")
def main(
    photos: tuple[Path, ...], teacher: Path, model_dir: Path | None, grid: int, limit: int
) -> None:
    """Measure here, and say what would bound more workers."""
    spec = load_description(teacher, model_dir)
    spec = spec.with_grid(changed(spec.grid, size=grid))
    samples = open_photos(photos, None, False).samples[:limit]
    size = sum(len(s.source.read()) for s in samples) / len(samples)
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
    click.echo(
        f"{len(samples)} photos of {size / 1e3:.1f} kB, {spec.name}, grid {grid} x {grid}\n"
        f"1 worker {rates[1]:.1f} images/s, 2 workers {rates[2]:.1f} images/s\n"
        f"the head alone (photos read, sent, answers back): {head:.0f} images/s\n"
        f"a gigabit a second: {_GIGABIT / size:.0f} images/s\n\n"
        "| workers | images/s | bound by |\n|---|---|---|"
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
