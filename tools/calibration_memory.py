r"""Peak memory of a calibration with few and with many crops, each in a process of its own.

    python tools/calibration_memory.py faces/aflw-a.zip [--network NAME] [--counts 64,512,4096]

``graph`` makes the deployed graph of the checkpoint. ``calibrate`` is the pass that measures the
ranges of that graph; ``quantize`` is all of it: ranges, choice of method, corrections, Q/DQ graph.
``build`` is ``graph`` and ``quantize`` in one process. Crops are cut from the photos when they are
asked for. The memory is the peak of the process (VmHWM), Python and its packages included; onnxsim,
which runs in a process of its own while the graph is made, is not: 367 MiB for kd-resnet18-112
beside the 155 that wait for it, less together than the limit.

Exit code 0: within the limits (10 % of each other, below 700 MiB); 1: not.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import overload

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from edgehp.benchmark.host import peak_memory_mib
from edgehp.crop import Preprocessing, crop_face
from edgehp.datasets.base import Sample
from edgehp.datasets.faces import read_faces
from edgehp.networks.bundled import resolve_network
from edgehp.networks.export import save_graph
from edgehp.quantization.quantize import QuantizationConfig, quantize
from edgehp.quantization.table import calibrate

STEPS = ("graph", "calibrate", "quantize", "build")
MOST_MIB = 700.0
WITHIN = 1.10

Crop = npt.NDArray[np.uint8]


class Faces(Sequence[Crop]):
    """Crops of photos, cut when they are asked for; begins again where the photos end."""

    def __init__(self, samples: Sequence[Sample], spec: Preprocessing, count: int) -> None:
        self._samples = samples
        self._spec = spec
        self._count = count

    @overload
    def __getitem__(self, index: int) -> Crop: ...
    @overload
    def __getitem__(self, index: slice) -> list[Crop]: ...
    def __getitem__(self, index: int | slice) -> Crop | list[Crop]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._count))]
        if not 0 <= index < self._count:
            raise IndexError(index)
        sample = self._samples[index % len(self._samples)]
        return crop_face(sample.load(), sample.box, self._spec)

    def __len__(self) -> int:
        return self._count


def measure(args: argparse.Namespace, count: int) -> None:
    """In the child: one step; prints the peak in MiB."""
    if args.step == "graph":
        save_graph(resolve_network(args.network).graph(), args.graph)
        print(f"{peak_memory_mib():.1f}")
        return
    network = resolve_network(args.network if args.step == "build" else str(args.graph))
    crops = Faces(read_faces(args.photos).samples, network.spec.preprocessing, count)
    model = network.graph()
    if args.step == "calibrate":
        calibrate(model, crops, threads=args.threads)
    else:
        body = "fp32" if args.flavor == "cpu" else "fp16"
        config = QuantizationConfig(args.flavor, body=body, threads=args.threads)
        quantize(model, crops, config)
    print(f"{peak_memory_mib():.1f}")


def run(args: argparse.Namespace, step: str, count: int, graph: Path) -> float:
    """In the parent: the peak of a child in MiB; a RuntimeError if it fails."""
    command = [sys.executable, __file__, str(args.photos), "--network", args.network]
    command += ["--step", step, "--one", str(count), "--flavor", args.flavor]
    command += ["--threads", str(args.threads), "--graph", str(graph)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{step} with {count} crops ended with {done.returncode}")
    return float(done.stdout.split()[-1])


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("photos", type=Path, help="folder or zip of faces")
    p.add_argument("--network", default="kd-resnet18-112")
    p.add_argument("--counts", default="64,512,4096", help="crops, separated by commas")
    p.add_argument("--step", choices=STEPS, help="this one only")
    p.add_argument("--flavor", choices=["cpu", "tensorrt"], default="cpu", help="of quantize")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--one", type=int, help=argparse.SUPPRESS)
    p.add_argument("--graph", type=Path, help=argparse.SUPPRESS)
    return p.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.one is not None:
        measure(args, args.one)
        return 0
    counts = [int(c) for c in args.counts.split(",")]
    print("| step | " + " | ".join(f"{c} crops, MiB" for c in counts) + " | largest / smallest |")
    print("| --- " * (len(counts) + 2) + "|")
    good = True
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / "graph.onnx"
        first = run(args, "graph", 0, graph)
        print(f"| graph | {first:.0f}" + " |" * len(counts) + " |", flush=True)
        for step in [args.step] if args.step else STEPS[1:]:
            peaks = [run(args, step, c, graph) for c in counts]
            ratio = max(peaks) / min(peaks)
            good &= ratio <= WITHIN and max(peaks) < MOST_MIB
            cells = " | ".join(f"{p:.0f}" for p in peaks)
            print(f"| {step} | {cells} | {ratio:.3f} |", flush=True)
    if not good:
        print(f"not within {WITHIN:g} of each other and below {MOST_MIB:g} MiB", file=sys.stderr)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
