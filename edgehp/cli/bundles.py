"""Bundles: an artifact in one signed file, made and verified."""

from __future__ import annotations

from pathlib import Path

import click

from edgehp.cli._command import (
    PATH,
    json_option,
    key_password,
    output_option,
    read_keys,
    subcommand,
    trust_option,
)
from edgehp.cli._output import print_json, print_table
from edgehp.progress import step
from edgehp.shipping import PASSWORD_VARIABLE


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
