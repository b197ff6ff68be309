"""``edgehp doctor``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from edgehp.cli._command import json_option, loudness, subcommand
from edgehp.cli._output import print_columns, print_json, print_table, styled
from edgehp.cli._remote import over_ssh
from edgehp.errors import EnvironmentalError, UsageError
from edgehp.progress import step

if TYPE_CHECKING:
    from edgehp.doctor.report import Diagnosis, PackageState


def _machine(found: Diagnosis) -> list[tuple[str, str]]:
    cpu, nvidia, jetson = found.cpu, found.nvidia, found.jetson
    memory = "unknown memory" if cpu.memory_gib is None else f"{cpu.memory_gib:.1f} GiB"
    rows = [
        ("edgehp", found.edgehp),
        ("Python", found.python),
        ("system", found.platform),
        ("CPU", f"{cpu.name}, {cpu.cores} cores, {memory}"),
        ("CPU INT8 features", " ".join(cpu.int8_features) or "none known"),
        ("disk", f"{found.disk.free_gb:g} GB free at {found.disk.directory}"),
    ]
    if found.disk.warning:
        rows.append(("", found.disk.warning))
    if nvidia.problem is None:
        rows.append(("NVIDIA driver", f"{nvidia.driver or 'unknown'}, CUDA {nvidia.cuda}"))
    else:
        rows.append(("NVIDIA driver", nvidia.problem))
    rows += [("GPU", f"{gpu.name} ({gpu.compute_capability})") for gpu in nvidia.gpus]
    if jetson is not None:
        rows += [
            ("Jetson", f"{jetson.model}, target {jetson.target or 'unknown'}"),
            ("JetPack", f"{jetson.jetpack or 'unknown'}, L4T {jetson.l4t or 'unknown'}"),
            ("power mode", jetson.power_mode or "unknown (nvpmodel gave none)"),
        ]
        if jetson.problem:
            rows.append(("", jetson.problem))
    return rows


def _print_packages(found: Diagnosis, verbose: bool) -> None:
    """Packages, engines, the commands that cannot run (all of them with -v), and the verdict."""
    ok = styled("ok", "green")

    def needed_by(state: PackageState) -> str:
        every = len(state.commands) == len(found.commands)
        return "every command" if every else " ".join(state.commands) or "optional"

    columns: dict[str, Callable[[PackageState], object]] = {
        "package": lambda s: s.name,
        "version": lambda s: s.version,
        "state": lambda s: ok if s.works else styled(s.problem or "not installed", "yellow"),
    }
    print_columns(found.packages, columns | ({"needed by": needed_by} if verbose else {}))
    click.echo()
    print_columns(
        found.engines,
        {
            "engine": lambda e: e.kind,
            "state": lambda e: ok if e.problem is None else styled("not here", "yellow"),
            # A reason and its hint in one line.
            "why": lambda e: (e.problem or "").replace("\nhint: ", "; "),
        },
    )
    cannot = [state for state in found.commands if not state.ok]
    if shown := found.commands if verbose else cannot:
        click.echo()
        print_columns(
            shown,
            {
                "command": lambda c: c.name,
                "state": lambda c: ok if c.ok else styled("cannot run", "red"),
                "what to do": lambda c: "; ".join(c.remedies) or None,
            },
        )
    all_, able = len(found.commands), len(found.commands) - len(cannot)
    verdict = styled(f"{able} of {all_} commands can run here", "yellow" if cannot else "green")
    click.echo(f"\n{verdict}; -v says what each needs")


def _self_test(camera: str | None, as_json: bool) -> None:
    from edgehp.doctor.report import FAILED, NOT_TESTED, OK, SCHEMA_VERSION
    from edgehp.doctor.selftest import run_checks

    colours = {OK: "green", FAILED: "red", NOT_TESTED: "yellow"}
    checks = []
    for check in run_checks(camera=camera):
        checks.append(check)
        if not as_json:
            click.echo(f"{styled(check.state, colours[check.state])}: {check.name}: {check.detail}")
            if check.hint:
                click.echo(f"  hint: {check.hint}")
    failed = [check.name for check in checks if check.state == FAILED]
    if as_json:
        print_json(
            {
                "schema_version": SCHEMA_VERSION,
                "ok": not failed,
                "checks": checks,
            }
        )
    if failed:
        raise EnvironmentalError(
            f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}"
        )


@subcommand(
    "doctor",
    "edgehp doctor",
    "edgehp doctor --test --camera camera:0",
    "edgehp doctor --host me@orin",
)
@json_option
@click.option(
    "--test", is_flag=True, help="Use every part of this machine once, for half a minute."
)
@click.option(
    "--camera", help="With --test: a source as 'edgehp run' takes it, opened for a frame."
)
@over_ssh(any_version=True)
def command(as_json: bool, test: bool, camera: str | None) -> None:
    """Say what this machine can run and what to install for the rest."""
    if camera and not test:
        raise UsageError("--camera is for --test: give both")
    if test:
        _self_test(camera, as_json)
        return
    from edgehp.doctor.report import diagnose

    with step("look at this machine"):
        found = diagnose()
    if as_json:
        print_json(found.to_dict())
    else:
        print_table(["machine", ""], _machine(found))
        click.echo()
        _print_packages(found, verbose=loudness() > 0)
    if not found.ok:
        raise EnvironmentalError(
            "a package that every command needs does not work; see the list above"
        )
