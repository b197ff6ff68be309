"""``edgehp confirm``: the current slot runs well."""

from __future__ import annotations

from pathlib import Path

import click

from edgehp.cli._trust import root_option

__all__ = ["command"]


@click.command("confirm", short_help="Say that the slot in use runs well.")
@root_option
def command(root: Path | None) -> None:
    """Say that the slot in use runs well: its starts are no longer counted against it.

    'edgehp run --slots' does so by itself. It is for programs of your own, and for the updater of
    the car: until then, the slot that was confirmed before is not overwritten.
    """
    from edgehp.cli.status import describe
    from edgehp.shipping import slots

    place = slots.default_root() if root is None else root
    slots.confirm(place)
    click.echo(describe(slots.current(place), "current, confirmed"))
