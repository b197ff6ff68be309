"""What the harness of ``edgehp bench`` costs, and what preprocessing takes.

    python tools/bench_overhead.py dist/kd-resnet18-cpu-int8 --threads 2

In one run, in turns: the loop of the scenario ``single-stream`` and two bare loops that call
OpenVINO directly on the same file. The first does the same work, crop and inference, and is what
the harness is judged by (end to end, at most 3 % more); the second has ready crops and times the
inference alone, which finds the processor's caches and threads as warm as they ever are: the
stricter figure, of edgehp's whole call over it, is printed beside and not judged. Prints the
medians, their ratios turn by turn, and the time of crop + resize from a 1920x1080 frame, as JSON.
A quiet machine is needed: the median ratio over turns resists neighbours, but not all.

Exit code 0: within the limit; 1: not.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from edgehp.artifact import load_artifact
from edgehp.benchmark.lanes import Lane, camera_frames, warm_up
from edgehp.benchmark.run import single_stream
from edgehp.crop import crop_face
from edgehp.engines import open_engine

# The harness may take this much of what the same work takes without it.
LIMIT = 1.03


def bare_loop(graph: Path, threads: int, size: int) -> Callable[[Lane, float, bool], list[float]]:
    """A function that infers with OpenVINO alone for some seconds: ready crops, or frames.

    As OpenVINO's own benchmark does at batch 1: static shape, latency hint, one request. FP32 is
    kept FP32, as the engine of edgehp does, or a processor with bfloat16 would use that.
    """
    import openvino

    core = openvino.Core()
    model = core.read_model(graph)
    model.reshape({"crops": [1, size, size, 3]})
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = core.compile_model(model, "CPU", settings).create_infer_request()

    def run(lane: Lane, seconds: float, crop: bool) -> list[float]:
        tensors = [openvino.Tensor(c[None], shared_memory=True) for c in lane.crops]
        frames = lane.frames.items
        times: list[float] = []
        deadline = perf_counter() + seconds
        while perf_counter() < deadline:
            i = len(times) % len(tensors)
            began = perf_counter()
            if crop:
                cut = crop_face(frames[i].photo, frames[i].box, lane.spec)[None]
                request.set_input_tensor(openvino.Tensor(cut, shared_memory=True))
            else:
                request.set_input_tensor(tensors[i])
                began = perf_counter()
            request.infer()
            times.append(perf_counter() - began)
        return times

    return run


def preprocessing_ms(lane: Lane, seconds: float) -> dict[str, float]:
    """Milliseconds of crop + resize, one frame after the other."""
    times = []
    deadline = perf_counter() + seconds
    while perf_counter() < deadline:
        for frame in lane.frames.items:
            began = perf_counter()
            crop_face(frame.photo, frame.box, lane.spec)
            times.append(perf_counter() - began)
    p50, p90 = np.percentile(times, (50, 90)) * 1e3
    # The fastest is what the work itself takes; the rest of a percentile is the neighbours'.
    return {
        "min_ms": min(times) * 1e3,
        "p50_ms": float(p50),
        "p90_ms": float(p90),
        "count": len(times),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a turn")
    options = parser.parse_args()

    artifact = load_artifact(options.artifact)
    if artifact.engine.kind != "openvino":
        sys.exit(f"{options.artifact} is of {artifact.engine.kind}; an artifact of openvino needed")
    spec = artifact.manifest.preprocessing
    frames = camera_frames(artifact)
    with open_engine("openvino", artifact.engine_path, threads=options.threads, batch=1) as engine:
        lane = Lane.of("artifact", engine, spec, frames, 1)
        bare = bare_loop(artifact.engine_path, options.threads, spec.size)
        warm_up(lane, 20)
        bare(lane, 1.0, False)
        found_ms: dict[str, list[float]] = {k: [] for k in ("end_to_end", "call", "same", "ready")}

        def note(name: str, seconds: Any) -> None:
            found_ms[name].append(float(np.median(seconds)) * 1e3)

        def through_harness() -> None:
            stages = single_stream(lane, options.seconds).stages
            note("end_to_end", stages["end_to_end"])
            note("call", stages["call"])

        def same_by_hand() -> None:
            note("same", bare(lane, options.seconds, True))

        def ready_by_hand() -> None:
            note("ready", bare(lane, options.seconds, False))

        # A B C C B A, as the benchmark itself.
        for turn in range(options.turns):
            steps = (through_harness, same_by_hand, ready_by_hand)
            for step in steps if turn % 2 == 0 else reversed(steps):
                step()
        ms = {k: np.array(v) for k, v in found_ms.items()}
        ratios, strict = ms["end_to_end"] / ms["same"], ms["call"] / ms["ready"]
        found = {
            "artifact": artifact.manifest.name,
            "size": spec.size,
            "threads": options.threads,
            "turns": options.turns,
            "harness_p50_ms": float(np.median(ms["end_to_end"])),
            "bare_p50_ms": float(np.median(ms["same"])),
            "harness_call_p50_ms": float(np.median(ms["call"])),
            "bare_ready_crops_p50_ms": float(np.median(ms["ready"])),
            "ratio_ready_crops_median": float(np.median(strict)),
            "ratio_ready_crops_quartiles": [float(q) for q in np.quantile(strict, (0.25, 0.75))],
            "ready_crops_within_limit": float(np.median(strict)) <= LIMIT,
            "ratio_median": float(np.median(ratios)),
            "ratio_quartiles": [float(q) for q in np.quantile(ratios, (0.25, 0.75))],
            "within_limit": float(np.median(ratios)) <= LIMIT,
            "preprocessing": preprocessing_ms(lane, 2.0),
        }
    print(json.dumps(found, indent=1))
    sys.exit(0 if found["within_limit"] else 1)


if __name__ == "__main__":
    main()
