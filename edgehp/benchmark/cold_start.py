"""Cold starts: how long a new process takes from its beginning to the first answer.

What a driver waits for when the car is switched on. Each start is a process of its own that opens
the artifact as every command does, and it is measured in these stages: ``python`` until the
interpreter runs, ``imports`` of what opens artifacts, ``artifact``: manifest, device and bytes
checked, ``engine`` deserialised, ``answer`` of the first inference. After the clock has stopped,
the golden vectors are run: a start that answers wrongly is an error.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgehp import __version__, errors
from edgehp.errors import EdgehpError, EnvironmentalError
from edgehp.files import now, plain

REPORT = "bench-cold-start"
STAGES = ("python", "imports", "artifact", "engine", "answer")
SCHEMA_VERSION = 2
_DROP_CACHES = Path("/proc/sys/vm/drop_caches")
# The clock first: all that is imported counts. `-I` and the folders that this process imports from,
# as the current folder must not lend modules.
_CODE = (
    "import time; began = time.monotonic(); import json, sys; "
    "sys.path[:] = json.loads(sys.argv[1]); "
    "from edgehp.benchmark.cold_start import answer_first; answer_first(began, sys.argv[2])"
)
# A machine that was just switched on has other work to do, and would have it in the car.
_BOOTING_S = 600.0
_LONGEST_S = 600.0


def answer_first(began: float, request: str) -> None:
    """Be one start: open the artifact, answer once, and write as JSON when what was done.

    Args:
        began: monotonic seconds at which this process began to run Python.
        request: JSON of ``path``, ``threads`` and ``wait``.
    """
    times = [began]
    asked = json.loads(request)
    try:
        import numpy as np

        from edgehp.artifact import load_artifact, verify_golden
        from edgehp.artifact.open import open_loaded

        times.append(time.monotonic())
        artifact = load_artifact(asked["path"])
        times.append(time.monotonic())
        with open_loaded(artifact, threads=asked["threads"], wait=asked["wait"]) as opened:
            times.append(time.monotonic())
            size, engine = artifact.manifest.preprocessing.size, opened.engine
            engine.infer(np.zeros((artifact.engine.min_batch, size, size, 3), np.uint8))
            times.append(time.monotonic())
            verify_golden(artifact, engine)
            from edgehp.benchmark.lanes import describe

            subject = plain(describe(opened, artifact.engine.min_batch, {}))
            said = {"times": times, "subject": subject}
    except EdgehpError as e:
        said = {"error": [type(e).__name__, str(e)]}
    sys.stdout.write(json.dumps(said) + "\n")


def measure_starts(
    path: Path,
    starts: int,
    *,
    threads: int | None = None,
    wait: str = "auto",
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Start `starts` times and return the report, in values that JSON takes.

    Before each start the kernel's cache of files is dropped where that is permitted; each start
    says whether it was. An interruption ends the run: the starts until then are kept and the
    report's state is ``"partial"``.

    Args:
        path: the artifact's directory.
        starts: how many.
        threads: processor threads for inference.
        wait: how the processor waits for a GPU, see `edgehp.engines.open_engine`.
        progress: told how many are done.

    Raises:
        EdgehpError: as opening the artifact raises it.
    """
    from edgehp.benchmark.host import changed_settings, describe_host, read_host

    request = json.dumps({"path": str(path.resolve()), "threads": threads, "wait": wait})
    uptime = time.clock_gettime(time.CLOCK_BOOTTIME)
    states, found = [read_host()], []
    subject: dict[str, Any] = {}
    before: dict[str, Any] = {}
    interrupted = False
    try:
        for done in range(starts):
            row, subject = _start(request)
            found.append(row)
            # Only now: it imports what a first start must not find in memory.
            before = before or describe_host()
            states.append(read_host())
            if progress is not None:
                progress(done + 1)
    except KeyboardInterrupt:
        interrupted = True
    before = before or describe_host()
    return {
        "kind": "cold-start",
        "schema": SCHEMA_VERSION,
        "edgehp_version": __version__,
        "created": now(),
        "state": "partial" if interrupted else "complete",
        "scenario": {"scenario": "cold-start", "starts": starts, "threads": threads, "wait": wait},
        "subject": subject,
        "host": before,
        "uptime_s": uptime,
        "starts": found,
        **_summary(found),
        "validity": _validity(states, changed_settings(before, describe_host()), before, uptime),
    }


def _start(request: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """One start, and what was started."""
    here = str(Path(__file__).resolve().parents[2])
    folders = [here, *(str(Path(p).resolve()) for p in sys.path if p)]
    kept = _drop_page_cache()
    begin = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _CODE, json.dumps(folders), request],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_LONGEST_S,
            check=False,
        )
        said = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired as e:
        raise EnvironmentalError(f"no answer within {_LONGEST_S:g} s of the start") from e
    except (IndexError, ValueError) as e:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise EnvironmentalError(f"the start ended without an answer: {last}") from e
    if "error" in said:
        kind, text = said["error"]
        raise getattr(errors, kind, EnvironmentalError)(text)
    times = [begin, *said["times"]]
    stages = {s: b - a for s, a, b in zip(STAGES, times[:-1], times[1:], strict=True)}
    row = {"seconds": times[-1] - begin, "stages": stages, "cache_kept": kept}
    return row, said["subject"]


def _drop_page_cache() -> str | None:
    """Make the kernel forget what it has read of files; why it did not, or None."""
    try:
        with _DROP_CACHES.open("w") as file:
            # Only what is on disk already can be dropped.
            os.sync()
            file.write("1")
    except OSError as e:
        return f"{_DROP_CACHES}: {e.strerror}; it takes root"
    return None


def _summary(starts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Median, least and most of each stage and of the whole."""
    columns = {s: [row["stages"][s] for row in starts] for s in STAGES}
    columns["seconds"] = [row["seconds"] for row in starts]
    spread = {
        name: {"median": statistics.median(v), "min": min(v), "max": max(v)}
        for name, v in columns.items()
        if v
    }
    return {"seconds": spread.pop("seconds", None), "stages": spread}


def _validity(
    states: Sequence[Any], changes: Sequence[str], host: Mapping[str, Any], uptime: float
) -> dict[str, Any]:
    from edgehp.benchmark.validity import Evidence, assess

    evidence = Evidence(
        states=states,
        window=(states[0].time, states[-1].time),
        processors=os.cpu_count() or 1,
        changes=changes,
        jetson=host["jetson"] is not None,
        quota=host["cpu_quota"],
    )
    found: dict[str, Any] = plain(assess(evidence))
    if uptime < _BOOTING_S:
        booting = [r for r in found["reasons"] if r.startswith("foreign load")]
        found["conditions"] += [f"{r}; switched on {uptime:.0f} s before" for r in booting]
        found["reasons"] = [r for r in found["reasons"] if r not in booting]
    if len(states) < 2:
        found["reasons"].append("samples: no start was finished")
    return found | {"valid": not found["reasons"]}


def joined(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One report of the starts of several, such as one after each power cycle.

    It is valid if all are; reasons, conditions and what is unknown are those of any.
    """
    starts = [row for report in reports for row in report["starts"]]
    validity = dict(reports[-1]["validity"])
    for key in ("reasons", "conditions", "unknown"):
        validity[key] = list(dict.fromkeys(v for r in reports for v in r["validity"][key]))
    last = reports[-1]
    return {
        **last,
        "scenario": {**last["scenario"], "starts": len(starts)},
        "uptime_s": min(r["uptime_s"] for r in reports),
        "starts": starts,
        **_summary(starts),
        "validity": {**validity, "valid": not validity["reasons"]},
    }


def start_rows(report: Mapping[str, Any]) -> tuple[list[tuple[str, ...]], list[str]]:
    """A row a stage, in seconds, and sentences below them."""
    spreads = {**report["stages"], "first answer": report["seconds"] or {}}
    rows = [
        (name, *(f"{spread[key]:.3f}" for key in ("median", "min", "max")))
        for name, spread in spreads.items()
        if spread
    ]
    kept = {row["cache_kept"] for row in report["starts"]} - {None}
    notes = [f"files of an earlier start were in memory: {reason}" for reason in sorted(kept)]
    if report["state"] == "partial":
        notes.append("PARTIAL: the run was interrupted")
    notes += [f"condition: {text}" for text in report["validity"]["conditions"]]
    return rows, notes
