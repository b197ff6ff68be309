"""The steps of a row, each in a process of its own with a time limit: what it costs is its own."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from quantizers.rows import FP32, ROWS, Job, Made

_BATCH = 8
# A turn begins with calls that bring the network back into the caches, and are not counted.
_WARM, _COUNTED = 3, 7
# RTX 30 and 40: a graph that is accepted for these is accepted.
_CAPABILITIES = ("8.6", "8.9")
_LONGEST = 240

Answers = Mapping[str, npt.NDArray[np.float64]]


@dataclass(frozen=True, eq=False)
class Outcome:
    """A row that was tried.

    Attributes:
        made: the result, None where there is none.
        reason: why there is none, or no answers.
        answers: ``CONDITION.angles`` and ``CONDITION.spread`` -> [N, 3] degrees, on the photos.
        refusal: why TensorRT for RTX does not take it; None where it does.
    """

    made: Made | None
    reason: str = ""
    answers: Answers | None = None
    refusal: str | None = None


def run_row(job: Job, limit: float) -> Outcome:
    """Quantize, evaluate and try to build one row, each step within `limit` seconds."""
    Path(job.out).mkdir(parents=True, exist_ok=True)
    made, reason = _in_child(_quantize, limit, job)
    if made is None:
        return Outcome(None, reason)
    answers, reason = _in_child(_evaluate, limit, job, made)
    if answers is None:
        return Outcome(made, reason)
    _, refusal = _in_child(_accept, limit, job, made)
    # Where the file lies says nothing.
    return Outcome(made, "", answers, refusal.replace(f"{made.file}: ", "") or None)


def measure_latency(models: list[str], threads: int, rounds: int, limit: float) -> dict[str, float]:
    """Median milliseconds by model file, all in turns in one process; empty where it failed."""
    found, reason = _in_child(_latency, limit, models, threads, rounds)
    if found is None:
        print(f"no latencies: {reason}", file=sys.stderr)
    return found or {}


def _quantize(job: Job) -> Made:
    from edgehp.benchmark.host import peak_memory_mib

    row = ROWS[job.row]
    for package in row.packages:
        import_module(package)
    begin = time.perf_counter()
    made = row.make(job)
    made = replace(made, seconds=time.perf_counter() - begin, peak_mib=peak_memory_mib())
    worker = job.result("worker.json")
    return replace(made, **json.loads(worker.read_text("utf-8"))) if worker.is_file() else made


def _evaluate(job: Job, made: Made) -> Answers:
    """Angles and spread of the photos as they are and in harder versions."""
    from edgehp.engines.openvino import OpenVinoEngine
    from edgehp.pipeline.accuracy import predict
    from edgehp.validation.appearance import CONDITIONS

    crops = np.load(job.path("photos.npy"))
    answers = {}
    with OpenVinoEngine(made.file, threads=job.threads, batch=_BATCH) as engine:
        for name, change in {"clean": None, **CONDITIONS}.items():
            found = predict(engine, crops if change is None else change(crops), _BATCH)
            answers[f"{name}.angles"] = found.angles.astype(np.float64)
            if found.spread is not None:
                answers[f"{name}.spread"] = found.spread.astype(np.float64)
    return answers


def _accept(job: Job, made: Made) -> bool:
    """Let TensorRT for RTX parse and build it."""
    from edgehp.engines.build import BuildOptions, build_engine
    from edgehp.errors import DataError

    if Path(made.file).suffix != ".onnx":
        raise DataError("OpenVINO's own format")
    precision = "fp32" if job.row == FP32 else "int8"
    options = BuildOptions(precision=precision, compute_capabilities=_CAPABILITIES)
    build_engine("tensorrt-rtx", made.file, job.result("model.plan"), options)
    job.result("model.plan").unlink()
    return True


def _latency(models: list[str], threads: int, rounds: int) -> dict[str, float]:
    from edgehp.engines.openvino import OpenVinoEngine

    rng = np.random.default_rng(0)
    engines = {m: OpenVinoEngine(m, threads=threads, batch=1) for m in models}
    times: dict[str, list[float]] = {m: [] for m in engines}
    # No kernel here takes longer for other pixels.
    crops = {
        m: rng.integers(0, 256, (1, e.input_size, e.input_size, 3), np.uint8)
        for m, e in engines.items()
    }
    names = list(engines)
    for turn in range(rounds):
        # Each begins a round in its turn, so that none always follows the same neighbor.
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            for i in range(_WARM + _COUNTED):
                begin = time.perf_counter()
                engines[name].infer(crops[name])
                if i >= _WARM and turn:
                    times[name].append((time.perf_counter() - begin) * 1e3)
    return {m: statistics.median(t) for m, t in times.items()}


def _in_child(step: Callable[..., Any], limit: float, *arguments: object) -> tuple[Any, str]:
    """What `step` returns in a process of its own, or None and why there is nothing."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(sender, step, arguments))
    child.start()
    sender.close()
    answer: tuple[Any, str] = (None, f"{step.__name__[1:]} took longer than {limit:.0f} s")
    try:
        if receiver.poll(limit):
            answer = receiver.recv()
    except EOFError:
        child.join()
        answer = (None, f"ended by signal {-(child.exitcode or 0)}")
    finally:
        # A tool's own children end with it.
        with suppress(ProcessLookupError):
            os.killpg(child.pid or 0, signal.SIGKILL)
        child.join()
    return answer


def _child(sender: Any, step: Callable[..., Any], arguments: tuple[object, ...]) -> None:
    os.setsid()
    try:
        sender.send((step(*arguments), ""))
    # Whatever it is: another's tool raises what it likes, and it is this row's reason.
    except Exception as e:
        lines = str(e).strip().splitlines() or [type(e).__name__]
        sender.send((None, lines[0][:_LONGEST]))
