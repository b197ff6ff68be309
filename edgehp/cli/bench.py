"""``edgehp bench``: latency, throughput and energy of an artifact on this device."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgehp.cli._command import (
    PATH,
    json_option,
    loudness,
    output_option,
    photo_depth_option,
    subcommand,
    threads_option,
    typed,
)
from edgehp.cli._output import conclude, print_json, print_table, say, styled
from edgehp.cli._remote import over_ssh, sent_artifact
from edgehp.cli.project import artifacts_here
from edgehp.errors import EnvironmentalError, MeasurementError, UsageError
from edgehp.progress import Step, step

if TYPE_CHECKING:
    from edgehp.benchmark.host import HostWatch
    from edgehp.benchmark.lanes import Turn
    from edgehp.benchmark.power.base import PowerRecorder
    from edgehp.benchmark.report import BenchmarkReport
    from edgehp.benchmark.run import Progress
    from edgehp.cli._remote import Changes

SCENARIOS = ("single-stream", "offline", "multi-camera")
COLD = "cold-start"
# The options that a cold start takes; the others are of runs that take longer.
_COLD_OPTIONS = {"artifact", "scenarios", "starts", "threads", "wait", "output", "as_json",
                 "allow_invalid"}  # fmt: skip
INTERRUPTED = 130
_LONGEST_NOTE = 160


def _to_boards(given: Mapping[str, Any]) -> Callable[[str], Changes]:
    """To a board goes the artifact, and its reports come back."""
    from edgehp.remote.errand import Parcel, returned

    artifact = sent_artifact(given["artifact"])
    changes: dict[str, list[str | Parcel]] = {"artifact": [artifact]}
    if given["against"] is not None and Path(given["against"]).is_dir():
        changes["against"] = [sent_artifact(Path(given["against"]))]
    # One after each power cycle, into one report.
    one_by_one = given["power_cycle"] and COLD in given["scenarios"] and given["starts"] > 1
    if one_by_one:
        if given["as_json"]:
            raise UsageError("--json prints one start: with --power-cycle read the report's file")
        changes["starts"] = ["1"]

    def change(own: str) -> Changes:
        reports = (given["output"] or artifact.here / "reports") / own
        if not one_by_one:
            return changes | {"output": [returned(reports, folder=True)]}
        found: list[dict[str, Any]] = []

        def join(folder: Path) -> Sequence[Path]:
            from edgehp.benchmark.cold_start import REPORT, joined
            from edgehp.files import strict_json
            from edgehp.report.gather import write_report

            found.extend(strict_json(p.read_bytes()) for p in folder.glob(f"{REPORT}.json"))
            return [write_report(joined(found), reports, REPORT)] if found else []

        return changes | {"output": [Parcel(reports, keep=join)]}

    return change


@subcommand(
    "bench",
    "edgehp bench",
    "edgehp bench dist/kd-resnet18-112-cpu-int8 --scenario all --duration 20",
    "edgehp bench dist/kd-resnet18-112-orin-nano-8gb-int8 --host me@orin",
    renamed={"--workers": "--crop-threads"},
)
@click.argument("artifact", required=False, type=PATH)
@click.option(
    "--scenario",
    "scenarios",
    type=click.Choice((*SCENARIOS, "all", COLD)),
    multiple=True,
    default=("single-stream",),
    help="What is measured; may be given several times. cold-start: from the start of a process to "
    "its first answer.",
)
@click.option(
    "--starts",
    type=click.IntRange(1, 1000),
    default=5,
    help="Of cold-start; with --power-cycle the board is switched off and on before each.",
)
@click.option("--duration", type=float, help="Measured seconds of each network; 60 by default.")
@click.option("--official", is_flag=True, help="The long run: 600 s of each network.")
@click.option(
    "--batch",
    type=click.IntRange(1),
    help="Crops that go through the network at once; offline looks for the best.",
)
@threads_option
@click.option(
    "--wait",
    type=click.Choice(("auto", "spin", "block")),
    default="auto",
    help="For a GPU: spin answers soonest, block leaves the core to others.",
)
@click.option("--cameras", type=click.IntRange(1), default=4, help="Of multi-camera.")
@click.option("--fps", type=float, default=30.0, help="Of each camera.")
@click.option(
    "--crop-threads",
    "workers",
    type=click.IntRange(1),
    default=1,
    help="Threads that crop faces in offline.",
)
@click.option(
    "--against",
    help="Take turns with another artifact, fp32 or none. By default fp32 where it can be had.",
)
@click.option(
    "--frames",
    type=PATH,
    help="Folder or zip of faces; by default 1920x1080 frames around the golden crops.",
)
@photo_depth_option
@click.option(
    "--power",
    "meter",
    default="auto",
    help="auto, none, jtop, ina3221, nvml, rapl, csv:FILE or command:COMMAND.",
)
@click.option("--require-power", is_flag=True, help="Exit 6 where no energy can be stated.")
@click.option("--idle", "idle_s", type=float, default=10.0,
              help="Seconds of idle power measured first.")  # fmt: skip
@click.option("--warm-up", "warm_up_s", type=float, default=30.0,
              help="Seconds a network may take to become stable.")  # fmt: skip
@click.option("--allow-invalid", is_flag=True, help="Exit 0 although the run is invalid.")
@output_option("Directory of the reports; by default reports/ in the artifact.")
@json_option
@over_ssh("frames", plan=_to_boards)
def command(
    artifact: Path | None,
    scenarios: tuple[str, ...],
    starts: int,
    duration: float | None,
    official: bool,
    meter: str,
    require_power: bool,
    against: str | None,
    frames: Path | None,
    photo_depth: int | None,
    allow_invalid: bool,
    output: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure ARTIFACT, else the newest one under dist/, on this device.

    The artifact and its FP32 network (or the one given with --against) take turns in one run, so
    that heat and neighbours treat them alike. Every latency counts: percentiles are never clipped.
    A run that was throttled, disturbed or too short is called invalid and ends
    with exit code 6. Ctrl-C ends the run, writes what was measured and marks it partial.
    """
    if artifact is None:
        first, *others = artifacts_here()
        if others:
            for one in (first, *others):
                click.get_current_context().forward(command, artifact=one)
            return
        artifact = first
    _check_scenarios(scenarios)
    if COLD in scenarios:
        _cold_starts(artifact, starts, output, as_json, allow_invalid, **options)
        return
    from edgehp.artifact.manifest import MANIFEST_NAME
    from edgehp.benchmark.run import DEFAULT_DURATION_S, OFFICIAL_DURATION_S, Plan
    from edgehp.benchmark.session import Request, benchmark
    from edgehp.files import require_writable
    from edgehp.report.gather import write_report

    if duration is None:
        duration = OFFICIAL_DURATION_S if official else DEFAULT_DURATION_S
    names = SCENARIOS if "all" in scenarios else tuple(dict.fromkeys(scenarios))
    if as_json and len(names) > 1 and output is None:
        raise UsageError("--json prints one report: ask for one scenario")
    plans = [Plan(n, duration, official, **options) for n in names]
    place = output or artifact / "reports"
    if output is not None or artifact.is_dir():
        # Before minutes of measuring, not after; an artifact that is not there is said below.
        for plan in plans:
            require_writable(place / f"bench-{plan.scenario}.json")
    reports = []
    unwritten: EnvironmentalError | None = None
    invalid: list[str] = []
    interrupted = False
    for plan in plans:
        request = Request(plan, artifact, against, frames, meter, require_power, photo_depth)
        with step(plan.scenario, plan.duration_s, "s") as going:
            report = benchmark(request, partial(_show, going))
        path = None
        try:
            path = write_report(report.to_dict(), place, f"bench-{plan.scenario}")
        except EnvironmentalError as e:
            # The disk may have filled meanwhile: that costs the file, not the figures.
            unwritten = e
        reports.append(report)
        if not as_json:
            _print(report, path, allow_invalid)
        where = f"{plan.scenario}: " if len(plans) > 1 else ""
        invalid += [f"- {where}{r}" for r in report.validity.reasons]
        interrupted = report.state == "partial"
        if interrupted or unwritten is not None:
            break
    if as_json:
        print_json(reports[0] if len(names) == 1 else reports)
    if unwritten is not None:
        raise unwritten
    _end(interrupted, [] if allow_invalid else invalid)
    if not as_json and (artifact / MANIFEST_NAME).is_file():
        click.echo(f"next: {shlex.join(['edgehp', 'report', str(artifact)])}")


def _check_scenarios(scenarios: tuple[str, ...]) -> None:
    """Refuse options of another scenario.

    Raises:
        UsageError: some were typed.
    """
    context = click.get_current_context()
    cold = COLD in scenarios
    if cold and len(scenarios) > 1:
        raise UsageError(f"--scenario {COLD} stands alone: others would warm up the machine")
    for parameter in context.command.params:
        name = str(parameter.name)
        wrong = name not in _COLD_OPTIONS and name in context.params if cold else name == "starts"
        if wrong and typed(name):
            flag = max(parameter.opts, key=len)
            raise UsageError(f"{flag} {'is not for' if cold else 'is for'} --scenario {COLD}")


def _cold_starts(
    artifact: Path,
    starts: int,
    output: Path | None,
    as_json: bool,
    allow_invalid: bool,
    *,
    threads: int | None,
    wait: str,
    **_: Any,
) -> None:
    """Measure cold starts; this process imports nothing that they must not find in memory."""
    from edgehp.benchmark.cold_start import REPORT, measure_starts, start_rows

    with step(COLD, starts, "starts") as going:
        report = measure_starts(artifact, starts, threads=threads, wait=wait, progress=going.update)
    from edgehp.report.gather import write_report

    path = write_report(report, output or artifact / "reports", REPORT)
    reasons = report["validity"]["reasons"]
    if as_json:
        print_json(report)
    else:
        rows, notes = start_rows(report)
        say(f"{COLD}: {report['subject'].get('name', artifact.name)}")
        print_table(("seconds", "median", "min", "max"), rows, right=range(1, 4))
        for line in notes:
            say(line)
        seconds = report["seconds"] or {"median": float("nan")}
        verdict = f"first answer after {seconds['median']:.2f} s, median of {len(report['starts'])}"
        conclude("INVALID" if reasons else "VALID", "red" if reasons else "green", verdict)
        if allow_invalid and reasons:
            say(f"accepted although {'; '.join(reasons)}")
        click.echo(f"{styled('measured', 'green', bold=True)} {path}")
    _end(report["state"] == "partial", [] if allow_invalid else [f"- {r}" for r in reasons])


def _end(interrupted: bool, reasons: Sequence[str]) -> None:
    """Exit where the run was interrupted; an error where something speaks against it."""
    if interrupted:
        click.echo("edgehp: interrupted; the report is marked partial", err=True)
        click.get_current_context().exit(INTERRUPTED)
    if reasons:
        lines = "\n".join(reasons)
        raise MeasurementError(
            f"the measurement is invalid\n{lines}\n"
            "hint: repeat it on a quiet machine, or accept it with --allow-invalid"
        )


def _print(report: BenchmarkReport, path: Path | None, allow_invalid: bool) -> None:
    """The table, what there is to know about it, and the verdict."""
    from edgehp.benchmark.report import summary_rows
    from edgehp.report.figures import figures, verdict
    from edgehp.report.gather import Material

    table = summary_rows(report)
    say(f"{report.scenario.scenario}: {table.title}")
    print_table(table.headers, table.rows, right=range(1, len(table.headers)))
    for line in table.notes:
        # Why there is no power takes a sentence a meter.
        cut = len(line) > _LONGEST_NOTE and loudness() < 1
        say(f"{line[:_LONGEST_NOTE].rpartition(' ')[0]} ... (-v says all)" if cut else line)
    valid = report.validity.valid
    claims = {c.name: c.text for c in verdict(figures(Material((report,), (), None)))}
    conclude("VALID" if valid else "INVALID", "green" if valid else "red", claims["Speed"])
    if allow_invalid and not valid:
        # Else the error says so.
        say(f"accepted although {'; '.join(report.validity.reasons)}")
    if path is not None:
        click.echo(f"{styled('measured', 'green', bold=True)} {path}")


def _show(going: Step, power: PowerRecorder | None, watch: HostWatch) -> Progress:
    """Shows the current figures."""
    import numpy as np

    def tell(phase: str, role: str, fraction: float, turn: Turn | None) -> None:
        parts = [phase, role]
        if turn is not None:
            if "end_to_end" in turn.stages:
                p50, p99 = np.percentile(turn.stages["end_to_end"], (50, 99)) * 1e3
                parts.append(f"p50 {p50:.2f} ms  p99 {p99:.2f} ms")
            parts.append(f"{turn.images / turn.seconds:.0f} images/s")
        if (watts := None if power is None else power.watts()) is not None:
            parts.append(f"{watts:.1f} W")
        if watch.states and watch.states[-1].temperatures:
            parts.append(f"{max(watch.states[-1].temperatures.values()):.0f} °C")
        going.update(fraction * (going.total or 0), text="  ".join(part for part in parts if part))

    return tell
