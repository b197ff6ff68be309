"""One step of one row in a process of its own: what it costs is its own, and so is what it breaks.

    python child.py quantise|evaluate|accept JOB.json
    python child.py latency WORK MODEL ...

Answers are files beside the job; the last line of stderr says why there is none.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from importlib import import_module
from pathlib import Path

TOOLS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TOOLS), str(TOOLS.parent)]

import numpy as np  # noqa: E402

from edgehp.errors import EdgehpError  # noqa: E402
from quantizers.job import Job, Made  # noqa: E402
from quantizers.rows import FP32, ROWS  # noqa: E402

_BATCH = 8
# A turn begins with calls that bring the network back into the caches, and are not counted.
_WARM, _COUNTED = 3, 7
# RTX 30 and 40: a graph that is accepted for these is accepted.
_CAPABILITIES = ("8.6", "8.9")


def quantise(job: Job) -> None:
    """Make the row; writes ``made.json``."""
    from edgehp.benchmark.host import peak_memory_mib

    row = ROWS[job.row]
    for package in row.packages:
        import_module(package)
    begin = time.perf_counter()
    made = row.make(job)
    made = made.measured(time.perf_counter() - begin, peak_memory_mib())
    worker = job.result("worker.json")
    if worker.is_file():
        cost = json.loads(worker.read_text(encoding="utf-8"))
        made = made.measured(cost["seconds"], cost["peak_mib"])
    job.result("made.json").write_text(json.dumps(made.to_dict(), indent=1), encoding="utf-8")


def evaluate(job: Job) -> None:
    """Angles and spread of the photos as they are and in harder versions; ``answers.npz``."""
    from edgehp.engines.openvino import OpenVinoEngine
    from edgehp.pipeline.accuracy import predict
    from edgehp.validation.robustness import CONDITIONS

    made = Made.load(job.result("made.json"))
    crops = np.load(job.path("photos.npy"))
    answers = {}
    with OpenVinoEngine(made.file, threads=job.threads, batch=_BATCH) as engine:
        for name, change in {"clean": None, **CONDITIONS}.items():
            seen = crops if change is None else change(crops)
            found = predict(engine, seen, _BATCH)
            answers[f"{name}.angles"], answers[f"{name}.spread"] = found.angles, found.spread
    # numpy's types have no arrays by keyword: they see its option there.
    np.savez(job.result("answers.npz"), **answers)  # type: ignore[arg-type]


def accept(job: Job) -> None:
    """Whether TensorRT for RTX parses and builds it; writes ``accept.json``."""
    from edgehp.engines.build import BuildOptions, build_engine

    made = Made.load(job.result("made.json"))
    if Path(made.file).suffix != ".onnx":
        answer = {"accepted": False, "reason": "OpenVINO's own format"}
    else:
        precision = "fp32" if job.row == FP32 else "int8"
        options = BuildOptions(precision=precision, compute_capabilities=_CAPABILITIES)
        plan = job.result("model.plan")
        build_engine("tensorrt-rtx", made.file, plan, options)
        answer = {"accepted": True, "reason": f"{plan.stat().st_size / 1e6:.1f} MB plan"}
        plan.unlink()
    job.result("accept.json").write_text(json.dumps(answer), encoding="utf-8")


def latency(work: Path, models: list[Path], threads: int, rounds: int) -> None:
    """Milliseconds of one crop, all networks in turns; writes ``latency.json``."""
    from edgehp.engines.openvino import OpenVinoEngine

    rng = np.random.default_rng(0)
    engines = {str(m): OpenVinoEngine(m, threads=threads, batch=1) for m in models}
    times: dict[str, list[float]] = {m: [] for m in engines}
    # No kernel here takes longer for other pixels.
    crops = {
        m: rng.integers(0, 256, (1, e.input_size, e.input_size, 3), np.uint8)
        for m, e in engines.items()
    }
    names = list(engines)
    for turn in range(rounds):
        # Each begins a round in its turn, so that none always follows the same neighbour.
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            for i in range(_WARM + _COUNTED):
                begin = time.perf_counter()
                engines[name].infer(crops[name])
                if i >= _WARM and turn:
                    times[name].append((time.perf_counter() - begin) * 1e3)
    found = {m: statistics.median(t) for m, t in times.items()}
    (work / "latency.json").write_text(json.dumps(found, indent=1), encoding="utf-8")


def main(argv: list[str]) -> int:
    step, *rest = argv
    try:
        if step == "latency":
            work, threads, rounds, *models = rest
            latency(Path(work), [Path(m) for m in models], int(threads), int(rounds))
        else:
            {"quantise": quantise, "evaluate": evaluate, "accept": accept}[step](
                Job.load(Path(rest[0]))
            )
    except EdgehpError as e:
        print(f"{e}", file=sys.stderr)
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
