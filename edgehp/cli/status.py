"""``edgehp status``: what is installed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgehp.cli._remote import over_ssh
from edgehp.cli._trust import root_option

if TYPE_CHECKING:
    from edgehp.shipping.slots import Slot

__all__ = ["command", "describe"]


def describe(slot: Slot, role: str) -> str:
    """One line about a slot."""
    test = slot.selftest
    limit = "" if test.max_latency_ms is None else f" of {test.max_latency_ms:g}"
    return (
        f"slot {slot.name} ({role}): {slot.artifact_name}, content {slot.digest[:16]}, "
        f"signed by {slot.signer[:16]}, self-test {test.worst_degrees:.3f} of "
        f"{test.tolerance_degrees:.3f} degrees, {test.latency_ms:.1f}{limit} ms"
        + (", engine built here" if slot.built_here else "")
    )


def _values(slot: Slot | None) -> dict[str, Any] | None:
    """A slot for programs, with what identifies its software; None where that is damaged."""
    from edgehp.errors import EdgehpError
    from edgehp.shipping import slots

    if slot is None:
        return None
    try:
        identity: dict[str, Any] | None = vars(slots.identity(slot))
    except EdgehpError as e:
        click.echo(f"edgehp: slot {slot.name}: {e}", err=True)
        identity = None
    return {**slot.to_dict(), "identity": identity}


@click.command("status", short_help="Say what is installed on this device.")
@root_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
@over_ssh()
def command(root: Path | None, as_json: bool) -> None:
    """Say which slots are installed, which one is in use, and what failed. Nothing is run."""
    from edgehp.cli._output import print_json
    from edgehp.shipping import slots
    from edgehp.shipping.offers import read_memory
    from edgehp.shipping.update import FOLDER

    found = slots.status(slots.default_root() if root is None else root)
    decisions = read_memory(found.root / FOLDER).decisions
    if as_json:
        print_json(
            {
                "root": found.root,
                "current": _values(found.current),
                "other": _values(found.other),
                "unconfirmed_starts": found.unconfirmed_starts,
                "confirmed": found.confirmed,
                "failed": found.failed,
                "offers": [
                    {"name": one.name, "serial": one.serial, "reason": one.reason}
                    for one in decisions
                ],
                "installing": found.installing,
            }
        )
        return
    if found.current is None:
        click.echo(f"{found.root}: nothing is installed")
    else:
        click.echo(describe(found.current, "current"))
    if found.other is not None:
        click.echo(describe(found.other, "to return to"))
    if found.unconfirmed_starts:
        click.echo(f"{found.unconfirmed_starts} starts that were not confirmed to run well")
    for digest, reason in found.failed.items():
        click.echo(f"content {digest[:16]} was left: {reason}")
    for one in decisions:
        if one.reason is not None:
            click.echo(f"{one.name} is not for this device: {one.reason}")
    if found.installing:
        click.echo("an installer is at work")
