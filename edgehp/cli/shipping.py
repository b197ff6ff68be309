"""Bundles, and the slots of a device: made, verified, installed, updated, confirmed, taken back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgehp.cli._command import (
    PATH,
    json_option,
    key_password,
    note,
    output_option,
    read_keys,
    root_option,
    subcommand,
    trust_option,
)
from edgehp.cli._output import answer, print_json, print_table
from edgehp.cli._remote import over_ssh
from edgehp.progress import step
from edgehp.shipping import PASSWORD_VARIABLE

if TYPE_CHECKING:
    from edgehp.shipping.slots import Slot


@subcommand(
    "bundle",
    "openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out release.pem",
    "openssl ec -in release.pem -pubout -out release.pub",
    "edgehp bundle dist/kd-resnet18-112-cpu-int8 --key release.pem",
)
@click.argument("artifact", type=PATH)
@click.option(
    "--key",
    type=PATH,
    required=True,
    help="Private key (PEM; P-256, P-384 or P-521). The password of an encrypted one is taken "
    f"from ${PASSWORD_VARIABLE}.",
)
@output_option("The file to write. Default: ARTIFACT.edgehp.")
@click.option(
    "--max-latency-ms",
    type=click.FloatRange(0, 3_600_000, min_open=True),
    help="Longest median time of one crop in the device's self-test. Default: what the manifest "
    "says, else 50.",
)
@click.option(
    "--rxswin",
    metavar="TEXT",
    help="Software identification number of the type approval (UNECE R156), to be read on the "
    "device with 'edgehp status --json'.",
)
@json_option
def bundle(
    artifact: Path,
    key: Path,
    output: Path | None,
    max_latency_ms: float | None,
    rxswin: str | None,
    as_json: bool,
) -> None:
    """Put ARTIFACT, a directory made by 'edgehp build', into one signed file.

    Signed with OpenSSF Model Signing. The examples begin with making a key pair.
    """
    from edgehp.shipping.bundle import make_bundle

    with step("sign"):
        made = make_bundle(
            artifact,
            output,
            key=key,
            password=key_password(),
            max_latency_ms=max_latency_ms,
            rxswin=rxswin,
        )
    if as_json:
        print_json(
            {"path": made.path, "size": made.size, "digest": made.digest, "signer": made.signer}
        )
        return
    click.echo(f"{made.path}  {made.size / 1e6:.1f} MB in {len(made.files)} files")
    click.echo(f"content {made.digest}")
    click.echo(f"signed by {made.signer}")


@subcommand("verify", "edgehp verify network.edgehp --public-key release.pub")
@click.argument("file", type=PATH)
@trust_option
@json_option
def verify(file: Path, public_keys: tuple[Path, ...], as_json: bool) -> None:
    """Check who signed the bundle FILE and every hash in it. Nothing is unpacked.

    Ends with 4 if it was signed by somebody else or altered.
    """
    from edgehp.shipping.bundle import verify_bundle

    found = verify_bundle(file, read_keys(public_keys))
    manifest = found.manifest
    if as_json:
        print_json(
            {
                "name": manifest.name,
                "digest": found.digest,
                "signer": found.signer,
                "target": manifest.target.name,
                "state": manifest.state,
                "files": [
                    {"path": f.path, "sha256": f.sha256, "size": f.size} for f in found.files
                ],
            }
        )
        return
    rows = [
        ("artifact", manifest.name),
        ("content", found.digest),
        ("signed by", found.signer),
        ("target", manifest.target.name),
        ("engine", "built on the device" if manifest.engine is None else manifest.engine.kind),
        ("precision", manifest.precision.asked),
        *((f.path, f"{f.size} bytes  {f.sha256}") for f in found.files),
    ]
    print_table(["verified", ""], rows)


def _describe(slot: Slot, role: str) -> str:
    """What a slot holds, in lines that fit a terminal."""
    test = slot.selftest
    limit = "" if test.max_latency_ms is None else f" of {test.max_latency_ms:g}"
    return (
        f"slot {slot.name} ({role}): {slot.artifact_name}"
        + (", engine built here" if slot.built_here else "")
        + f"\n  content {slot.digest[:16]}, signed by {slot.signer[:16]}\n"
        f"  self-test {test.worst_degrees:.3f} of {test.tolerance_degrees:.3f} degrees, "
        f"{test.latency_ms:.1f}{limit} ms"
    )


def _show(slot: Slot, role: str, as_json: bool) -> None:
    answer(as_json, slot, _describe(slot, role))


@subcommand(
    "install",
    "edgehp install network.edgehp --public-key release.pub",
    "edgehp install network.edgehp --public-key release.pub --host me@orin",
)
@click.argument("file", type=PATH)
@trust_option
@root_option
@click.option(
    "--validate-on",
    type=PATH,
    help="For a deferred artifact that was validated on other faces than the shipped ones.",
)
@json_option
@over_ssh("file", "public_keys", "validate_on")
def install(
    file: Path,
    public_keys: tuple[Path, ...],
    root: Path,
    validate_on: Path | None,
    as_json: bool,
) -> None:
    """Verify the bundle FILE, unpack it into the slot that is not in use, test it, switch to it.

    The golden vectors run through the engine on this device before the switch. Whatever fails, and
    whenever the power goes, the slot in use stays as it was. A deferred artifact's engine is built
    here first.
    """
    from edgehp.shipping import slots
    from edgehp.shipping.bundle import verify_bundle

    def finisher(path: Path) -> None:
        from edgehp.pipeline.finish import finish

        finish(path, validate_on=validate_on)

    keys = read_keys(public_keys)
    with step("install"):
        with step("verify"):
            bundle = verify_bundle(file, keys)
        slot = slots.install(bundle, root, finisher=finisher)
    _show(slot, "current", as_json)


@subcommand(
    "update",
    "edgehp update --repository https://updates.example.com/heads \\\n"
    "      --root-metadata root.json --public-key release.pub",
)
@click.option(
    "--repository",
    required=True,
    metavar="URL|DIR",
    help="Made by 'edgehp repo': http(s)://..., or a folder such as a USB stick.",
)
@click.option(
    "--root-metadata",
    type=PATH,
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
@json_option
@over_ssh("repository", "root_metadata", "public_keys")
def update(
    repository: str,
    root_metadata: Path,
    public_keys: tuple[Path, ...],
    root: Path,
    device_id: str | None,
    as_json: bool,
) -> None:
    """Install the newest bundle of a repository that fits this board, if it is newer than its own.

    A download that was cut goes on where it ended. The bundle is then installed as by 'edgehp
    install'. Without an update nothing happens, and the exit code is 0.
    """
    from edgehp.shipping.fetch import open_source
    from edgehp.shipping.update import update as update_slots

    source, keys = open_source(repository), read_keys(public_keys)
    with step("update"):
        done = update_slots(source, root_metadata, keys, root, device_id=device_id)
    if as_json:
        print_json(done.to_dict())
        return
    for one in done.passed_over:
        note(f"{one.name} is not for this device: {one.reason}")
    if done.slot is None:
        click.echo(f"no update: nothing newer than serial {done.serial} fits this board")
    else:
        click.echo(f"{done.name}  serial {done.serial}")
        click.echo(_describe(done.slot, "current"))


def _values(slot: Slot | None) -> dict[str, Any] | None:
    """A slot for programs, with what identifies its software; None where that is damaged."""
    from edgehp.errors import EdgehpError
    from edgehp.shipping import slots

    if slot is None:
        return None
    try:
        identity: dict[str, Any] | None = slots.identity(slot)
    except EdgehpError as e:
        note(f"slot {slot.name}: {e}", always=True)
        identity = None
    return {**slot.to_dict(), "identity": identity}


@subcommand("status", "edgehp status", "edgehp status --json --host me@orin")
@root_option
@json_option
@over_ssh()
def status(root: Path, as_json: bool) -> None:
    """Say which slots are installed, which one is in use, and what failed. Nothing is run."""
    from edgehp.shipping import slots
    from edgehp.shipping.offers import read_memory
    from edgehp.shipping.update import FOLDER

    found = slots.status(root)
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
            }
        )
        return
    if found.current is None:
        click.echo(f"{found.root}: nothing is installed")
    else:
        click.echo(_describe(found.current, "current"))
    if found.other is not None:
        click.echo(_describe(found.other, "to return to"))
    if found.unconfirmed_starts:
        click.echo(f"{found.unconfirmed_starts} starts that were not confirmed to run well")
    for digest, reason in found.failed.items():
        click.echo(f"content {digest[:16]} was left: {reason}")
    for one in decisions:
        if one.reason is not None:
            click.echo(f"{one.name} is not for this device: {one.reason}")


@subcommand("confirm", "edgehp confirm")
@root_option
@json_option
def confirm(root: Path, as_json: bool) -> None:
    """Say that the slot in use runs well: its starts are no longer counted against it.

    'edgehp run --root' does so by itself. It is for programs of your own, and for the updater of
    the car: until then, the slot that was confirmed before is not overwritten.
    """
    from edgehp.shipping import slots

    slots.confirm(root)
    _show(slots.current(root), "current, confirmed", as_json)


@subcommand("rollback", "edgehp rollback", "edgehp rollback --host me@orin")
@root_option
@json_option
@over_ssh()
def rollback(root: Path, as_json: bool) -> None:
    """Run the golden vectors through the other slot and switch to it; if it fails, nothing changes.

    Called twice, it leads back.
    """
    from edgehp.shipping import slots

    _show(slots.rollback(root), "current", as_json)
