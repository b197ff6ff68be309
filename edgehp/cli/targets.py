"""``edgehp targets``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from edgehp.cli._command import Group, json_option, note
from edgehp.cli._output import print_columns, print_json, print_table, say

if TYPE_CHECKING:
    from edgehp.targets import Target, Verdict


def _verdicts(target: Target) -> Iterator[tuple[str, Verdict]]:
    from edgehp.targets import PRECISIONS, check_precision

    return ((name, check_precision(target, name)) for name in PRECISIONS)


def _precisions(target: Target) -> str:
    marks = {"yes": "", "warn": "(!)"}
    return " ".join(
        precision + marks[verdict.supported]
        for precision, verdict in _verdicts(target)
        if verdict.supported in marks
    )


def _facts(target: Target) -> Iterator[tuple[str, str]]:
    yield "engine", target.engine
    yield "Q/DQ flavor", target.flavor
    if target.compute_capabilities:
        yield "compute capability", ", ".join(target.compute_capabilities)
    if target.tensorrt:
        more = f"; {target.tensorrt.note}" if target.tensorrt.note else ""
        yield "TensorRT", target.tensorrt.words + more
    for precision, verdict in _verdicts(target):
        yield precision, verdict.supported + (f": {verdict.reason}" if verdict.reason else "")
    if target.engine == "tensorrt":
        yield "DLA cores", str(target.dla_cores)
        yield "DLA", f"{target.dla.supported}: {target.dla.reason}"
    yield "run for real", f"{target.verified}: {target.verified_note}"
    for text in target.notes:
        yield "note", text


@click.group(
    "targets",
    cls=Group,
    invoke_without_command=True,
    examples=("edgehp targets", "edgehp targets show orin-nano-8gb"),
)
@json_option
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """List the targets an artifact can be built for, or explain one."""
    if ctx.invoked_subcommand is not None:
        return
    from edgehp.targets import list_targets, load_target, resolve_target

    targets = [load_target(name) for name in list_targets()]
    if as_json:
        print_json([target.to_dict() for target in targets])
        return
    print_columns(
        targets,
        {
            "target": lambda t: t.name,
            "what it is": lambda t: t.title,
            "engine": lambda t: t.engine,
            "compute": lambda t: " ".join(t.compute_capabilities) or None,
            "precisions": _precisions,
            "run for real": lambda t: t.verified,
        },
    )
    orin = resolve_target("orin").note
    click.echo()
    say(f"(!) with a warning. {orin}. 'edgehp targets show NAME' explains one.")


@command.command("show", examples=("edgehp targets show orin-nano-8gb",))
@click.argument("name")
@json_option
@click.pass_context
def show(ctx: click.Context, name: str, as_json: bool) -> None:
    """Explain the target NAME."""
    from edgehp.targets import resolve_target

    resolution = resolve_target(name)
    target = resolution.target
    if resolution.note:
        note(resolution.note)
    if as_json or (ctx.parent is not None and ctx.parent.params["as_json"]):
        print_json(target.to_dict())
        return
    click.echo(f"{target.name}: {target.title}\n")
    print_table(["", ""], list(_facts(target)))
    for title, rows in (("power mode", target.power_modes), ("board", target.boards)):
        if rows:
            click.echo()
            print_columns(
                rows,
                {
                    title: lambda row: row.name,
                    "INT8 TOPS": lambda row: row.int8_tops,
                    "FP16 TFLOPS": lambda row: row.fp16_tflops,
                    "GB/s": lambda row: row.bandwidth_gb_s,
                    "MHz": lambda row: row.gpu_mhz,
                    "SMs": lambda row: row.sms,
                    "W": lambda row: row.power_w,
                    "default": lambda row: "default" if row.default else None,
                },
                right=range(1, 7),
            )
            for source in dict.fromkeys(row.source for row in rows):
                names = ", ".join(row.name for row in rows if row.source == source)
                say(f"{names}: {source}")
    if target.jetpack:
        click.echo()
        print_columns(
            target.jetpack,
            {
                "JetPack": lambda j: j.jetpack,
                "L4T": lambda j: (
                    f"{j.l4t_first} to {j.l4t_last}" if j.l4t_last else f">= {j.l4t_first}"
                ),
                "TensorRT": lambda j: j.tensorrt + ("" if j.verified else " (not verified)"),
                "CUDA": lambda j: j.cuda,
                "Ubuntu": lambda j: j.ubuntu,
                "Python": lambda j: j.python,
                "usable": lambda j: "yes" if j.usable else "no: Python too old",
            },
        )
