"""``edgehp rollback``: back to the other slot."""

from __future__ import annotations

from pathlib import Path

import click

from edgehp.cli._trust import root_option

__all__ = ["command"]


@click.command("rollback", short_help="Test the other slot and switch to it.")
@root_option
def command(root: Path | None) -> None:
    """Run the golden vectors through the other slot and switch to it; if it fails, nothing changes.

    Called twice, it leads back.
    """
    from edgehp.cli.status import describe
    from edgehp.shipping import slots

    slot = slots.rollback(slots.default_root() if root is None else root)
    click.echo(describe(slot, "current"))
