"""What ``edgehp bench`` costs, and an artifact's engine against OpenVINO's own loop and benchmark.

    python tools/bench_peers.py dist/kd-resnet18-cpu-int8 --threads 2

On the same file, with the same threads, shape and precision, in turns of one run (A B C .. C B A):

- the scenario ``single-stream`` against a bare loop that does the same by calling OpenVINO;
- calls of the engine on ready crops against a bare loop that has ready crops too;
- the inference in these calls against OpenVINO's ``benchmark_app`` in latency mode, each turn of
  which is a process of its own.

Prints the table of docs/benchmarking.md: medians and, for each pair, the ratio of turns that follow
each other with its 95 % interval: ``no slower``, ``slower`` (the interval lies above 1) or ``cannot
tell`` (it holds 1, and more than 3 % above it: noise proves nothing). Exit code 0, 1 and 2: the
worst of the three.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from edgehp.artifact import load_artifact
from edgehp.benchmark.lanes import Lane, camera_frames, warm_up
from edgehp.benchmark.run import single_stream
from edgehp.crop import crop_face
from edgehp.engines import open_engine
from edgehp.engines.base import TimedEngine
from edgehp.validation.statistics import mean_interval

# The upper end of an interval that may be taken for "no slower".
ENOUGH = 1.03
VERDICTS = ("no slower", "slower", "cannot tell")
APP = "from openvino.tools.benchmark.main import main; main()"
# What is judged: edgehp's figure, and the one it is held against.
PAIRS = {
    "single-stream": ("stream", "stream_by_hand"),
    "calls": ("calls", "calls_by_hand"),
    "inference": ("inference", "benchmark_app"),
}
TITLES = {
    "single-stream": "`single-stream` against a bare loop that does the same",
    "calls": "calls on ready crops against a bare loop with ready crops",
    "inference": "inference in these calls against `benchmark_app`, same file",
}
Turn = Callable[[float], dict[str, float]]


def openvino_settings(threads: int) -> dict[str, Any]:
    """As OpenVINO's own benchmark at batch 1. FP32 stays FP32, as in edgehp's engine."""
    return {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
    }


def bare_turns(graph: Path, lane: Lane, threads: int) -> tuple[Turn, Turn]:
    """Two loops that call OpenVINO alone: one cuts its crops itself, one has them ready."""
    import openvino

    core = openvino.Core()
    model = core.read_model(graph)
    size = lane.spec.size
    model.reshape({"crops": [1, size, size, 3]})
    request = core.compile_model(model, "CPU", openvino_settings(threads)).create_infer_request()
    tensors = [openvino.Tensor(c[None], shared_memory=True) for c in lane.crops]

    def cut(seconds: float) -> dict[str, float]:
        times = []
        frames = cycle(lane.frames.items)
        deadline = perf_counter() + seconds
        while (began := perf_counter()) < deadline:
            frame = next(frames)
            crop = crop_face(frame.photo, frame.box, lane.spec)[None]
            request.set_input_tensor(openvino.Tensor(crop, shared_memory=True))
            request.infer()
            times.append(perf_counter() - began)
        return {"stream_by_hand": float(np.median(times))}

    def ready(seconds: float) -> dict[str, float]:
        times = []
        crops = cycle(tensors)
        deadline = perf_counter() + seconds
        while perf_counter() < deadline:
            request.set_input_tensor(next(crops))
            began = perf_counter()
            request.infer()
            times.append(perf_counter() - began)
        return {"calls_by_hand": float(np.median(times))}

    return cut, ready


def calls_turn(lane: Lane, seconds: float) -> dict[str, float]:
    """Calls of the engine on ready crops: the whole call, and the inference in it."""
    engine = lane.engine
    if not isinstance(engine, TimedEngine):
        sys.exit("the engine does not time its inference")
    calls, inference = [], []
    crops = cycle([c[None] for c in lane.crops])
    deadline = perf_counter() + seconds
    while (began := perf_counter()) < deadline:
        _, parts = engine.infer_timed(next(crops))
        calls.append(perf_counter() - began)
        inference.append(parts.inference)
    return {"calls": float(np.median(calls)), "inference": float(np.median(inference))}


def app_turn(graph: Path, size: int, threads: int, seconds: float) -> dict[str, float]:
    """One run of benchmark_app."""
    with tempfile.TemporaryDirectory(prefix="edgehp-") as folder:
        config = Path(folder) / "config.json"
        settings = {k: str(v) for k, v in openvino_settings(threads).items()}
        config.write_text(json.dumps({"CPU": settings}))
        done = subprocess.run(
            [sys.executable, "-c", APP, "-m", str(graph), "-d", "CPU", "-hint", "latency",
             "-api", "sync", "-load_config", str(config), "-shape", f"crops[1,{size},{size},3]",
             "-t", str(max(1, round(seconds))), "-report_type", "no_counters",
             "-report_folder", folder, "-json_stats"],
            capture_output=True, text=True, timeout=60 + 10 * seconds, check=False,
        )  # fmt: skip
        report = Path(folder) / "benchmark_report.json"
        if done.returncode != 0 or not report.is_file():
            sys.exit(f"benchmark_app failed:\n{done.stdout[-600:]}\n{done.stderr[-600:]}")
        found = json.loads(report.read_text())["execution_results"]
    return {"benchmark_app": float(found["latency (ms)"]) / 1e3}


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Geometric mean over pairs of turns, and its 95 % interval."""
    mean = mean_interval([float(np.log(a / b)) for a, b in zip(ours, theirs, strict=True)])
    return {k: float(np.exp(getattr(mean, k))) for k in ("value", "low", "high")}


def verdict(interval: Mapping[str, float]) -> str:
    """One of `VERDICTS` from the interval of a ratio of times."""
    if interval["low"] > 1:
        return "slower"
    return "no slower" if interval["high"] <= ENOUGH else "cannot tell"


def main() -> None:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=12, help="of each")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a turn")
    options = parser.parse_args()
    if options.turns < 3:
        parser.error("--turns: an interval needs at least 3")
    artifact = load_artifact(options.artifact)
    if artifact.engine.kind != "openvino":
        sys.exit(f"{options.artifact} is of {artifact.engine.kind}; an artifact of openvino needed")
    spec, graph, threads = artifact.manifest.preprocessing, artifact.engine_path, options.threads
    seconds: dict[str, list[float]] = {}
    with open_engine("openvino", graph, threads=threads, batch=1) as engine:
        lane = Lane.of("artifact", engine, spec, camera_frames(artifact), 1)
        warm_up(lane, 20)
        turns: list[Turn] = [
            lambda s: {"stream": float(np.median(single_stream(lane, s).stages["end_to_end"]))},
            *bare_turns(graph, lane, threads),
            lambda s: calls_turn(lane, s),
            lambda s: app_turn(graph, spec.size, threads, s),
        ]
        for number in range(options.turns):
            for turn in turns if number % 2 == 0 else reversed(turns):
                for name, median in turn(options.seconds).items():
                    seconds.setdefault(name, []).append(median)
        version = engine.info.version
    ratios = {k: ratio(seconds[ours], seconds[theirs]) for k, (ours, theirs) in PAIRS.items()}
    verdicts = {k: verdict(r) for k, r in ratios.items()}
    names = f"{artifact.manifest.name}, {threads} threads, OpenVINO {version.partition('-')[0]}"
    print(f"{names}, {options.turns} turns each\n")
    print("| figure | edgehp, ms | the other, ms | ratio (95 % interval) | verdict |")
    print("|---|---|---|---|---|")
    for name, (ours, theirs) in PAIRS.items():
        one, other = (f"{np.median(seconds[k]) * 1e3:.2f}" for k in (ours, theirs))
        r = ratios[name]
        span = f"{r['value']:.3f} ({r['low']:.3f} to {r['high']:.3f})"
        print(f"| {TITLES[name]} | {one} | {other} | {span} | {verdicts[name]} |")
    worst = next((v for v in ("slower", "cannot tell") if v in verdicts.values()), "no slower")
    sys.exit(VERDICTS.index(worst))


if __name__ == "__main__":
    main()
