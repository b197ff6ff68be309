"""Run the steps of a row as children, each with a time limit; keep what was done before."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from edgehp.files import json_digest, sha256_file
from quantizers.job import Job, Made

__all__ = ["Outcome", "measure_latency", "run_row"]

_CHILD = Path(__file__).with_name("child.py")
_LONGEST = 240


@dataclass(frozen=True)
class Outcome:
    """A row that was tried.

    Attributes:
        made: the result, None where there is none.
        reason: why there is none, or no answers.
        answers: file with the answers on the photos.
        accepted: whether TensorRT for RTX takes it; None where that could not be tried.
        accept_reason: its words, or why it could not be tried.
    """

    made: Made | None
    reason: str = ""
    answers: Path | None = None
    accepted: bool | None = None
    accept_reason: str = ""


def run_row(job: Job, limit: float, inputs: tuple[str, ...], *, accept: bool = True) -> Outcome:
    """Quantise, evaluate and try to build one row; a finished step is not repeated.

    Args:
        job: the row.
        limit: seconds a step.
        inputs: files of the comparison that the result depends on.
        accept: whether to try TensorRT for RTX.
    """
    out = Path(job.out)
    out.mkdir(parents=True, exist_ok=True)
    key = json_digest(
        {
            "row": job.row,
            "budget": job.budget,
            "inputs": [sha256_file(job.path(n)) for n in inputs],
            "given": sha256_file(Path(job.given)) if Path(job.given).is_file() else "",
        }
    )
    mark, file = out / "key", out / "job.json"
    if not mark.is_file() or mark.read_text(encoding="utf-8") != key:
        for old in ("made.json", "answers.npz", "accept.json", "worker.json"):
            (out / old).unlink(missing_ok=True)
        mark.write_text(key, encoding="utf-8")
    file.write_text(job.to_json(), encoding="utf-8")
    if reason := _step("quantise", file, out / "made.json", limit):
        return Outcome(None, reason)
    made = Made.load(out / "made.json")
    if reason := _step("evaluate", file, out / "answers.npz", limit):
        return Outcome(made, reason)
    if not accept:
        return Outcome(made, "", out / "answers.npz")
    if reason := _step("accept", file, out / "accept.json", limit):
        # Where the file lies says nothing.
        return Outcome(made, "", out / "answers.npz", False, reason.replace(f"{made.file}: ", ""))
    verdict = json.loads((out / "accept.json").read_text(encoding="utf-8"))
    accepted, why = verdict["accepted"], verdict["reason"]
    return Outcome(made, "", out / "answers.npz", accepted, why)


def measure_latency(
    work: Path, models: list[str], threads: int, rounds: int, limit: float
) -> dict[str, float]:
    """Median milliseconds by model file, all in turns in one process; empty where it failed."""
    answer = work / "latency.json"
    answer.unlink(missing_ok=True)
    reason = _run(["latency", str(work), str(threads), str(rounds), *models], work, limit)
    if reason or not answer.is_file():
        print(f"no latencies: {reason}", file=sys.stderr)
        return {}
    found: dict[str, float] = json.loads(answer.read_text(encoding="utf-8"))
    return found


def _step(step: str, job: Path, answer: Path, limit: float) -> str:
    """Why the step has no answer, or ""."""
    if answer.is_file():
        return ""
    reason = _run([step, str(job)], job.parent, limit)
    if not reason and not answer.is_file():
        reason = "it ended without an answer"
    return reason


def _run(arguments: list[str], folder: Path, limit: float) -> str:
    log = folder / f"{arguments[0]}.log"
    with log.open("w", encoding="utf-8") as stream:
        child = subprocess.Popen(
            [sys.executable, str(_CHILD), *arguments],
            stdout=stream,
            stderr=subprocess.STDOUT,
            # Its own group: a tool's children end with it when the time is up.
            start_new_session=True,
        )
        try:
            code = child.wait(limit)
        except subprocess.TimeoutExpired:
            _end(child)
            return f"{arguments[0]} took longer than {limit:.0f} s"
        except KeyboardInterrupt:
            _end(child)
            raise
    if code == 0:
        return ""
    lines = [s.strip() for s in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    last = next((s for s in reversed(lines) if s), "no message")
    return f"ended by signal {-code}" if code < 0 else last[:_LONGEST]


def _end(child: subprocess.Popen[bytes]) -> None:
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
