"""Measure the bundled networks on this processor: the tables of README and docs/benchmarking.md.

    python tools/bench_readme.py

Runs ``edgehp bench ARTIFACT --scenario all`` for each artifact (INT8 and FP32 in turns in one run)
and prints the figures of its reports as Markdown, with what they were measured on. About six and a
half minutes by default, on a machine that does nothing else: an invalid run is said to be one.
"""

from __future__ import annotations

import argparse
import datetime
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from edgehp.benchmark.report import BenchmarkReport, Result, number, percentile_cells
from edgehp.benchmark.run import END_TO_END, SCENARIOS
from edgehp.benchmark.stats import Speedup
from edgehp.files import read_json

ARTIFACTS = ("dist/kd-resnet18-cpu-int8", "dist/kd-resnet18-112-cpu-int8")
INVALID = 6
ROLES = ("artifact", "reference")


def measure(artifact: Path, output: Path, words: list[str]) -> None:
    """Run every scenario on one artifact."""
    command = [sys.executable, "-m", "edgehp", "bench", str(artifact), "--scenario", "all"]
    done = subprocess.run([*command, *words, "--output", str(output)], stdout=sys.stderr)
    if done.returncode not in (0, INVALID):
        sys.exit(f"edgehp bench ended with {done.returncode}")


def rows(report: BenchmarkReport) -> list[str]:
    """The rows of docs/benchmarking.md for one report."""
    size, plan = report.subjects["artifact"].input_size, report.scenario
    valid = "" if report.validity.valid else " **invalid**"
    results = [report.results[role] for role in ROLES]
    speedups = {c.stage: c for c in report.comparison if c.mode == END_TO_END}
    if plan.scenario == "offline":
        cells = [
            f"{number(r.images_per_s, 4)} (batch {report.subjects[role].batch}, "
            f"{r.offline.overlap or 0:.0%} of inference alone)"
            for role, r in zip(ROLES, results, strict=True)
            if r.offline is not None
        ]
        ratio = _ratio(speedups["images_per_s"])
        return [f"| {size} | offline{valid}, images/s | {cells[0]} | {cells[1]} | {ratio} |"]
    cameras = plan.scenario == "multi-camera"
    title = f"{plan.cameras} cameras of {plan.fps:g} frames/s" if cameras else plan.scenario
    found = [
        f"| {size} | {title}{valid}, ms: p50 / p90 / p99 / max "
        f"| {' | '.join(_latency(r, 'end_to_end') for r in results)} "
        f"| {_ratio(speedups['end_to_end'])} |"
    ]
    if cameras:
        lost = [f"{r.late} / {r.dropped} of {r.arrived}" for r in results]
        words = f"{title}{valid}, frames late / dropped"
        return [*found, f"| {size} | {words} | {' | '.join(lost)} | |"]
    for stage, words in (("inference", "inference"), ("preprocessing", "crop + resize")):
        cells = [_latency(r, stage) for r in results]
        ratio = _ratio(speedups[stage]) if stage in speedups else ""
        found.append(f"| {size} | of it {words} | {' | '.join(cells)} | {ratio} |")
    return found


def short(reports: Sequence[BenchmarkReport]) -> str:
    """The README's row for the reports of one artifact."""
    found = {r.scenario.scenario: r for r in reports}
    single, offline = found["single-stream"], found["offline"]
    cells = [
        " / ".join(_latency(single.results[role], "end_to_end").split(" / ")[::2]) for role in ROLES
    ]
    ratio = _ratio(next(c for c in single.comparison if c.stage == "inference"))
    rate = number(offline.results["artifact"].images_per_s, 4)
    if not offline.validity.valid:
        rate += " **invalid**"
    size = single.subjects["artifact"].input_size
    return f"| {size} | {cells[0]} | {cells[1]} | {ratio} | {rate} |"


def _latency(result: Result, stage: str) -> str:
    latency = result.stages[stage]
    return "-" if latency is None else " / ".join(percentile_cells(latency, (50.0, 90.0, 99.0)))


def _ratio(found: Speedup) -> str:
    if found.low is None:
        return f"{found.ratio:.2f}"
    return f"{found.ratio:.2f} ({found.low:.2f} to {found.high:.2f})"


def conditions(report: BenchmarkReport, words: list[str]) -> str:
    """What the figures were measured on, in a sentence."""
    host, subject = report.host, report.subjects["artifact"]
    engine, roof = subject.engine, report.roofline["artifact"].roofline
    share = "" if roof is None else (
        f" At {subject.input_size} pixels INT8 reaches {roof.fraction_of_compute:.0%} of what this "
        f"processor's own INT8 convolutions do (bound by {roof.bound})."
    )  # fmt: skip
    machine = "a virtual machine" if host["virtual_machine"] else "the bare machine"
    return (
        f"{host['processor']}, {host['processors_usable']} processors, {machine}; "
        f"{engine.kind} {engine.version.partition('-')[0]}, {engine.threads} threads; "
        f"`edgehp bench ARTIFACT --scenario all {' '.join(words)}`, "
        f"{datetime.date.today().isoformat()}.{share}"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifacts", nargs="*", type=Path, default=[Path(a) for a in ARTIFACTS])
    parser.add_argument("--duration", type=float, default=25.0, help="seconds a network, scenario")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--warm-up", type=float, default=15.0, help="seconds at most")
    parser.add_argument("--output", type=Path, default=Path("dist/bench-readme"))
    parser.add_argument("--read", action="store_true", help="print reports that are there already")
    options = parser.parse_args()
    missing = [a for a in options.artifacts if not a.is_dir()]
    if missing:
        names = " and ".join(a.name.removesuffix("-cpu-int8") for a in missing)
        sys.exit(f"first: edgehp build --network NAME --target cpu --precision int8, for {names}")
    words = ["--duration", f"{options.duration:g}", "--threads", str(options.threads),
             "--warm-up", f"{options.warm_up:g}"]  # fmt: skip
    table = ["| input | scenario | INT8 | FP32 | times as fast (95 % interval) |",
             "|---|---|---|---|---|"]  # fmt: skip
    readme = [
        "| input | INT8, ms: p50 / p99 | FP32, ms: p50 / p99 | inference, times as fast "
        "| offline INT8, images/s |",
        "|---|---|---|---|---|",
    ]
    notes = []
    for artifact in options.artifacts:
        output = options.output / artifact.name
        if not options.read:
            measure(artifact, output, words)
        reports = [read_json(output / f"bench-{name}.json", BenchmarkReport) for name in SCENARIOS]
        readme.append(short(reports))
        for report in reports:
            table += rows(report)
            if not report.validity.valid:
                why = "; ".join(report.validity.reasons)
                notes.append(f"INVALID, {artifact.name}, {report.scenario.scenario}: {why}")
        notes.append(conditions(reports[0], words))
    print("\n".join([*readme, "", *table, "", *notes]))


if __name__ == "__main__":
    main()
