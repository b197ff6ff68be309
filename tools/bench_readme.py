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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgehp.benchmark.report import number
from edgehp.benchmark.run import SCENARIOS
from edgehp.report.gather import read_report

ARTIFACTS = ("dist/kd-resnet18-cpu-int8", "dist/kd-resnet18-112-cpu-int8")
INVALID = 6


def measure(artifact: Path, output: Path, words: list[str]) -> list[dict[str, Any]]:
    """Run every scenario on one artifact and read the reports."""
    command = [sys.executable, "-m", "edgehp", "bench", str(artifact), "--scenario", "all"]
    done = subprocess.run([*command, *words, "--output", str(output)], stdout=sys.stderr)
    if done.returncode not in (0, INVALID):
        sys.exit(f"edgehp bench ended with {done.returncode}")
    return [read_report(output / f"bench-{name}.json") for name in SCENARIOS]


def rows(report: Mapping[str, Any]) -> list[str]:
    """The table's rows for one report."""
    subject = report["subjects"]["artifact"]
    network = f"{subject['input_size']}"
    valid = "" if report["validity"]["valid"] else " **invalid**"
    name = report["scenario"]["scenario"]
    results = [report["results"][role] for role in ("artifact", "reference")]
    speedups = {(c["mode"], c["stage"]): c for c in report["comparison"]}
    if name == "offline":
        cells = [
            f"{number(r['offline']['end_to_end_images_per_s'], 4)} (batch {r['offline']['batch']}, "
            f"{r['offline']['overlap']:.0%} of inference alone)"
            for r in results
        ]
        ratio = _ratio(speedups[("end-to-end", "images_per_s")])
        return [f"| {network} | offline{valid}, images/s | {cells[0]} | {cells[1]} | {ratio} |"]
    title = name
    if name == "multi-camera":
        plan = report["scenario"]
        title = f"{plan['cameras']} cameras of {plan['fps']:g} frames/s"
    found = [
        f"| {network} | {title}{valid}, ms: p50 / p90 / p99 / max "
        f"| {' | '.join(_latency(r['stages']['end_to_end']) for r in results)} "
        f"| {_ratio(speedups[('end-to-end', 'end_to_end')])} |"
    ]
    if name == "multi-camera":
        lost = [f"{r['late']} / {r['dropped']} of {r['arrived']}" for r in results]
        found.append(
            f"| {network} | {title}{valid}, frames late / dropped | {' | '.join(lost)} | |"
        )
        return found
    for stage, words in (("inference", "inference"), ("preprocessing", "crop + resize")):
        cells = [_latency(r["stages"][stage]) for r in results]
        ratio = _ratio(speedups[("end-to-end", stage)]) if stage == "inference" else ""
        found.append(f"| {network} | of it {words} | {' | '.join(cells)} | {ratio} |")
    return found


def short(reports: Sequence[Mapping[str, Any]]) -> str:
    """The README's row for the reports of one artifact."""
    found = {r["scenario"]["scenario"]: r for r in reports}
    single, offline = found["single-stream"], found["offline"]
    results = [single["results"][role] for role in ("artifact", "reference")]
    cells = [" / ".join(_latency(r["stages"]["end_to_end"]).split(" / ")[::2]) for r in results]
    speedups = {c["stage"]: c for c in single["comparison"]}
    rate = number(offline["results"]["artifact"]["offline"]["end_to_end_images_per_s"], 4)
    size = single["subjects"]["artifact"]["input_size"]
    if not offline["validity"]["valid"]:
        rate += " **invalid**"
    return f"| {size} | {cells[0]} | {cells[1]} | {_ratio(speedups['inference'])} | {rate} |"


def _latency(latency: Mapping[str, Any]) -> str:
    at = {q["p"]: q for q in latency["percentiles"]}
    cells = [number(at[p]["ms"]) + ("" if at[p]["enough"] else "?") for p in (50, 90, 99)]
    return " / ".join([*cells, number(latency["max_ms"])])


def _ratio(found: Mapping[str, Any]) -> str:
    if found["low"] is None:
        return f"{found['ratio']:.2f}"
    return f"{found['ratio']:.2f} ({found['low']:.2f} to {found['high']:.2f})"


def conditions(report: Mapping[str, Any], words: list[str]) -> str:
    """What the figures were measured on, in a sentence."""
    host, engine = report["host"], report["subjects"]["artifact"]["engine"]
    roof = (report["roofline"].get("artifact") or {}).get("roofline")
    share = "" if roof is None else (
        f" At {report['subjects']['artifact']['input_size']} pixels INT8 reaches "
        f"{roof['fraction_of_compute']:.0%} of what this processor's own INT8 convolutions do "
        f"(bound by {roof['bound']})."
    )  # fmt: skip
    machine = "a virtual machine" if host["virtual_machine"] else "the bare machine"
    return (
        f"{host['processor']}, {host['processors_usable']} processors, {machine}; "
        f"{engine['kind']} {engine['version'].partition('-')[0]}, {engine['threads']} threads; "
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
        if options.read:
            reports = [read_report(output / f"bench-{name}.json") for name in SCENARIOS]
        else:
            reports = measure(artifact, output, words)
        readme.append(short(reports))
        for report in reports:
            table += rows(report)
            if not report["validity"]["valid"]:
                why = "; ".join(report["validity"]["reasons"])
                notes.append(f"INVALID, {artifact.name}, {report['scenario']['scenario']}: {why}")
        notes.append(conditions(reports[0], words))
    print("\n".join([*readme, "", *table, "", *notes]))


if __name__ == "__main__":
    main()
