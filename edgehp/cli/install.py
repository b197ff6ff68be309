"""``edgehp install``: a bundle into the slot that is not in use."""

from __future__ import annotations

from pathlib import Path

import click

from edgehp.cli._remote import Journey, over_ssh
from edgehp.cli._trust import read_trust, root_option, trust_options

__all__ = ["command"]


@click.command("install", short_help="Install a bundle beside what runs, test it, switch to it.")
@click.argument("file", type=click.Path(path_type=Path))
@trust_options
@root_option
@click.option(
    "--validate-on",
    type=click.Path(path_type=Path),
    help="For a deferred artifact that was validated on other faces than the shipped ones.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
@over_ssh(Journey(sends=("file", "public_keys", "validate_on")))
def command(
    file: Path,
    public_keys: tuple[Path, ...],
    identity: str | None,
    issuer: str | None,
    root: Path | None,
    validate_on: Path | None,
    as_json: bool,
) -> None:
    """Verify the bundle FILE, unpack it into the slot that is not in use, test it, switch to it.

    The golden vectors run through the engine on this device before the switch. Whatever fails, and
    whenever the power goes, the slot in use stays as it was. A deferred artifact's engine is built
    here first.
    """
    from edgehp.cli._output import print_json
    from edgehp.cli.status import describe
    from edgehp.shipping import slots

    def finisher(path: Path) -> None:
        from edgehp.pipeline.finish import finish

        finish(path, validate_on=validate_on)

    slot = slots.install(
        file,
        read_trust(public_keys, identity, issuer),
        slots.default_root() if root is None else root,
        finisher=finisher,
        progress=lambda step: click.echo(f"{step} ...", err=True),
    )
    if as_json:
        print_json(slot.to_dict())
    else:
        click.echo(describe(slot, "current"))
