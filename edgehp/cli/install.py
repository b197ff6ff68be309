"""``edgehp install``: a bundle into the slot that is not in use."""

from __future__ import annotations

from pathlib import Path

import click

from edgehp.cli._remote import over_ssh
from edgehp.cli._trust import read_keys, root_option, trust_option

__all__ = ["command"]


@click.command("install", short_help="Install a bundle beside what runs, test it, switch to it.")
@click.argument("file", type=click.Path(path_type=Path))
@trust_option
@root_option
@click.option(
    "--validate-on",
    type=click.Path(path_type=Path),
    help="For a deferred artifact that was validated on other faces than the shipped ones.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
@over_ssh("file", "public_keys", "validate_on")
def command(
    file: Path,
    public_keys: tuple[Path, ...],
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
    from edgehp.shipping.bundle import verify_bundle

    def finisher(path: Path) -> None:
        from edgehp.pipeline.finish import finish

        finish(path, validate_on=validate_on)

    def say(step: str) -> None:
        click.echo(f"{step} ...", err=True)

    say("verify")
    bundle = verify_bundle(file, read_keys(public_keys))
    place = slots.default_root() if root is None else root
    slot = slots.install(bundle, place, finisher=finisher, progress=say)
    if as_json:
        print_json(slot.to_dict())
    else:
        click.echo(describe(slot, "current"))
