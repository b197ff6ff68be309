"""``edgehp update``: the newest bundle of a repository that fits this board."""

from __future__ import annotations

from pathlib import Path

import click

from edgehp.cli._trust import read_keys, root_option, trust_option

__all__ = ["command"]


@click.command("update", short_help="Install the newest bundle of a repository that fits here.")
@click.option(
    "--repository",
    required=True,
    metavar="URL|DIR",
    help="Made by 'edgehp repo': http(s)://..., or a folder such as a USB stick.",
)
@click.option(
    "--root-metadata",
    type=click.Path(path_type=Path),
    required=True,
    help="The repository's 1.root.json, as it came with this device's image.",
)
@trust_option
@root_option
@click.option(
    "--device-id",
    help="Tells this device from the others in a staged rollout, and never leaves it. Default: "
    "the system's machine-id.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
def command(
    repository: str,
    root_metadata: Path,
    public_keys: tuple[Path, ...],
    root: Path | None,
    device_id: str | None,
    as_json: bool,
) -> None:
    """Install the newest bundle of a repository that fits this board, if it is newer than its own.

    A download that was cut goes on where it ended. The bundle is then installed as by 'edgehp
    install'. Without an update nothing happens, and the exit code is 0.
    """
    from edgehp.cli._output import print_json
    from edgehp.cli.status import describe
    from edgehp.shipping import slots
    from edgehp.shipping.fetch import open_source
    from edgehp.shipping.update import update

    done = update(
        open_source(repository),
        root_metadata,
        read_keys(public_keys),
        slots.default_root() if root is None else root,
        device_id=device_id,
        progress=lambda step: click.echo(f"{step} ...", err=True),
    )
    if as_json:
        print_json(done.to_dict())
        return
    for one in done.passed_over:
        click.echo(f"{one.name} is not for this device: {one.reason}", err=True)
    if done.slot is None:
        click.echo(f"no update: nothing newer than serial {done.serial} fits this board")
    else:
        click.echo(f"{done.name}  serial {done.serial}")
        click.echo(describe(done.slot, "current"))
