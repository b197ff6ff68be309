"""``edgehp repo``: a repository of bundles for a fleet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgehp.cli._command import PATH, Group, json_option, key_password, read_keys, trust_option
from edgehp.cli._output import answer
from edgehp.shipping import PASSWORD_VARIABLE

_FOLDER = click.argument("repository", type=PATH)
_KEYS = click.option(
    "--keys",
    type=PATH,
    required=True,
    help="Folder with root.pem, targets.pem, snapshot.pem and timestamp.pem, or those needed. "
    f"The password of encrypted ones is taken from ${PASSWORD_VARIABLE}.",
)

_BUNDLE = click.argument("bundle")
_PUBLISH = click.option(
    "--keys",
    type=PATH,
    help="Publish at once, with the keys in this folder.",
)


@click.group(
    "repo",
    cls=Group,
    examples=(
        "edgehp repo init repository --keys keys",
        "edgehp repo add repository network.edgehp --public-key release.pub",
        "edgehp repo publish repository --keys keys",
    ),
)
def command() -> None:
    """Keep a repository of bundles that devices update themselves from (edgehp update).

    It is a folder of static files, signed with The Update Framework (TUF): serve it with any web
    server, or carry it on a USB stick. See docs/field-updates.md.
    """


@command.command(
    "init",
    short_help="Make an empty repository and its keys.",
    examples=("edgehp repo init repository --keys keys",),
)
@_FOLDER
@_KEYS
@json_option
def init(repository: Path, keys: Path, as_json: bool) -> None:
    """Make an empty REPOSITORY, and its keys where there are none.

    Move root.pem to a medium that stays offline: it is needed for rotate-key alone.
    """
    from edgehp.shipping import repository as work

    root = work.init(repository, keys, password=key_password())
    answer(as_json, {"root": root}, f"{root}  give it to every device, with its image")


@command.command(
    "add",
    short_help="Put a bundle into it, as its newest.",
    examples=("edgehp repo add repository network.edgehp --public-key release.pub --share 10",),
)
@_FOLDER
@click.argument("bundle", type=PATH)
@trust_option
@click.option(
    "--share",
    type=click.IntRange(1, 100),
    default=100,
    help="Percent of the devices that it is offered to at first.",
)
@json_option
def add(
    repository: Path, bundle: Path, public_keys: tuple[Path, ...], share: int, as_json: bool
) -> None:
    """Put BUNDLE into REPOSITORY as its newest; devices see it after 'edgehp repo publish'."""
    from edgehp.shipping import repository as work

    offer = work.add(repository, bundle, read_keys(public_keys), share=share)
    answer(
        as_json,
        offer,
        f"{offer.path}  serial {offer.serial}, for {offer.target.name}, {offer.precision}, "
        f"content {offer.content[:16]}",
    )


@command.command(
    "share",
    short_help="Offer a bundle to so many percent of the devices.",
    examples=("edgehp repo share repository network.edgehp 50 --keys keys",),
)
@_FOLDER
@_BUNDLE
@click.argument("percent", type=click.IntRange(1, 100))
@_PUBLISH
@json_option
def share(repository: Path, bundle: str, percent: int, keys: Path | None, as_json: bool) -> None:
    """Offer BUNDLE (its name or serial) to PERCENT of the devices, and go on if it was paused.

    A device decides by a hash of its id; those of a smaller share are among those of a larger.
    """
    _rollout(repository, keys, bundle, as_json, share=percent)


@command.command(
    "pause",
    short_help="Offer a bundle to no further device for now.",
    examples=("edgehp repo pause repository network.edgehp --keys keys",),
)
@_FOLDER
@_BUNDLE
@_PUBLISH
@json_option
def pause(repository: Path, bundle: str, keys: Path | None, as_json: bool) -> None:
    """Offer BUNDLE (its name or serial) to no further device; 'edgehp repo share' goes on."""
    _rollout(repository, keys, bundle, as_json, state="paused")


@command.command(
    "withdraw",
    short_help="Offer a bundle to no device any more.",
    examples=("edgehp repo withdraw repository network.edgehp --keys keys",),
)
@_FOLDER
@_BUNDLE
@_PUBLISH
@json_option
def withdraw(repository: Path, bundle: str, keys: Path | None, as_json: bool) -> None:
    """Offer BUNDLE (its name or serial) to no device any more; those that have it keep it.

    To bring them back, add the bundle of before again: it becomes the newest.
    """
    _rollout(repository, keys, bundle, as_json, state="withdrawn")


def _rollout(
    repository: Path, keys: Path | None, bundle: str, as_json: bool, **change: Any
) -> None:
    from edgehp.shipping import repository as work

    offer = work.set_rollout(repository, bundle, **change)
    if keys is not None:
        work.publish(repository, keys, password=key_password())
    seen = "" if keys is not None else "; devices see it after 'edgehp repo publish'"
    shown = f"{offer.share} % of the devices" if offer.state == "offered" else offer.state
    answer(as_json, offer, f"{offer.path}  serial {offer.serial}: {shown}{seen}")


@command.command(
    "publish",
    short_help="Sign what is new, or renew the timestamp.",
    examples=("edgehp repo publish repository --keys keys",),
)
@_FOLDER
@_KEYS
@click.option(
    "--days",
    type=click.IntRange(1, 3650),
    help="How long devices believe that nothing newer exists. Default: 30.",
)
@json_option
def publish(repository: Path, keys: Path, days: int | None, as_json: bool) -> None:
    """Sign what was added or rotated and make it public; without news, renew the timestamp.

    To renew, the timestamp's key alone is enough: do so before it expires, say every day.
    """
    from edgehp.shipping import repository as work

    versions = work.publish(repository, keys, days=days, password=key_password())
    lines = (f"{role}  version {version}" for role, version in versions.items())
    answer(as_json, {"versions": versions}, "\n".join(lines))


@command.command(
    "rotate-key",
    short_help="Replace the key of a role by a new one.",
    examples=("edgehp repo rotate-key repository timestamp --keys keys",),
)
@_FOLDER
@click.argument("role", type=click.Choice(("root", "targets", "snapshot", "timestamp")))
@_KEYS
@json_option
def rotate_key(repository: Path, role: str, keys: Path, as_json: bool) -> None:
    """Replace the key of ROLE by a new one; needs root.pem. Then run 'edgehp repo publish'.

    Devices refuse what the old key signs from the moment they see the new root.
    """
    from edgehp.shipping import repository as work

    key = work.rotate_key(repository, role, keys, password=key_password())
    answer(as_json, {"key": key}, f"{key}  is the new key")
