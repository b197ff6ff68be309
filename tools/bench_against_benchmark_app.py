"""An artifact's engine against OpenVINO's own benchmark_app on the same file, in one run.

    python tools/bench_against_benchmark_app.py dist/kd-resnet18-cpu-int8 --threads 2

Both take turns (A B B A): the engine at batch 1 on ready crops, and benchmark_app in latency mode
with the same threads, shape and precision hint, each turn a process of its own. Judged are the
medians of the inference alone, which is what benchmark_app reports; the ratio of whole calls of
edgehp (handing over and answers included) to the same figure, and of both loops' throughput, is
printed beside it. Prints JSON. The ratio's 95 % interval says ``no slower``, ``slower`` (it lies
above 1) or ``cannot tell`` (it holds 1, and more than 3 % above it: noise proves nothing).
Exit code 0, 1 and 2.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from itertools import cycle
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from edgehp.artifact import load_artifact
from edgehp.benchmark.lanes import Lane, camera_frames, warm_up
from edgehp.engines import open_engine
from edgehp.engines.base import TimedEngine
from edgehp.validation.statistics import mean_interval

# The upper end of an interval that may be taken for "no slower".
ENOUGH = 1.03
VERDICTS = ("no slower", "slower", "cannot tell")
APP = "from openvino.tools.benchmark.main import main; main()"


def app_turn(graph: Path, size: int, threads: int, seconds: int) -> dict[str, float]:
    """One run of benchmark_app: its median latency and throughput."""
    with tempfile.TemporaryDirectory(prefix="edgehp-") as folder:
        config = Path(folder) / "config.json"
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": str(threads),
            "INFERENCE_PRECISION_HINT": "f32",
        }
        config.write_text(json.dumps({"CPU": settings}))
        done = subprocess.run(
            [sys.executable, "-c", APP, "-m", str(graph), "-d", "CPU", "-hint", "latency",
             "-api", "sync", "-load_config", str(config), "-shape", f"crops[1,{size},{size},3]",
             "-t", str(seconds), "-report_type", "no_counters", "-report_folder", folder,
             "-json_stats"],
            capture_output=True, text=True, timeout=60 + 10 * seconds, check=False,
        )  # fmt: skip
        report = Path(folder) / "benchmark_report.json"
        if done.returncode != 0 or not report.is_file():
            sys.exit(f"benchmark_app failed:\n{done.stdout[-600:]}\n{done.stderr[-600:]}")
        found = json.loads(report.read_text())["execution_results"]
    median = float(found["latency (ms)"])
    return {"p50_ms": median, "call_ms": median, "images_per_s": float(found["throughput"])}


def edgehp_turn(lane: Lane, seconds: float) -> dict[str, float]:
    """One turn of the engine: medians of the inference and of whole calls, and throughput."""
    engine = lane.engine
    if not isinstance(engine, TimedEngine):
        sys.exit("the engine does not time its inference")
    times: list[float] = []
    calls: list[float] = []
    crops = cycle([c[None] for c in lane.crops])
    begun = perf_counter()
    while perf_counter() - begun < seconds:
        crop = next(crops)
        began = perf_counter()
        _, parts = engine.infer_timed(crop)
        calls.append(perf_counter() - began)
        times.append(parts.inference)
    return {
        "p50_ms": float(np.median(times)) * 1e3,
        "call_ms": float(np.median(calls)) * 1e3,
        "images_per_s": len(times) / (perf_counter() - begun),
    }


def ratio(found: dict[str, list[dict[str, float]]], key: str) -> dict[str, float]:
    """Edgehp over benchmark_app, geometric mean over pairs of turns, and its 95 % interval."""
    pairs = zip(found["edgehp"], found["benchmark_app"], strict=True)
    mean = mean_interval([float(np.log(a[key] / b[key])) for a, b in pairs])
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
    parser.add_argument("--turns", type=int, default=8, help="of each")
    parser.add_argument("--seconds", type=int, default=4, help="of a turn")
    options = parser.parse_args()
    if options.turns < 3:
        parser.error("--turns: an interval needs at least 3")
    artifact = load_artifact(options.artifact)
    if artifact.engine.kind != "openvino":
        sys.exit(f"{options.artifact} is of {artifact.engine.kind}; an artifact of openvino needed")
    spec = artifact.manifest.preprocessing
    found: dict[str, list[dict[str, float]]] = {"edgehp": [], "benchmark_app": []}
    with open_engine("openvino", artifact.engine_path, threads=options.threads, batch=1) as engine:
        lane = Lane.of("artifact", engine, spec, camera_frames(artifact), 1)
        warm_up(lane, 20)
        ways: dict[str, Callable[[], dict[str, float]]] = {
            "edgehp": lambda: edgehp_turn(lane, options.seconds),
            "benchmark_app": lambda: app_turn(
                artifact.engine_path, spec.size, options.threads, options.seconds
            ),
        }
        for turn in range(options.turns):
            for name in ways if turn % 2 == 0 else reversed(ways):
                found[name].append(ways[name]())
                print(f"turn {turn + 1}: {name} {found[name][-1]}", file=sys.stderr)
        version = engine.info.version
    latency, whole = ratio(found, "p50_ms"), ratio(found, "call_ms")
    medians: dict[str, Any] = {
        name: {k: float(np.median([t[k] for t in turns])) for k in turns[0]}
        for name, turns in found.items()
    }
    result = {
        "artifact": artifact.manifest.name,
        "size": spec.size,
        "threads": options.threads,
        "openvino": version,
        "turns": options.turns,
        "medians": medians,
        "latency_ratio": latency,
        "whole_call_ratio": whole,
        "throughput_ratio": ratio(found, "images_per_s"),
        "verdict": verdict(latency),
        "whole_call_verdict": verdict(whole),
    }
    print(json.dumps(result, indent=1))
    sys.exit(VERDICTS.index(verdict(latency)))


if __name__ == "__main__":
    main()
