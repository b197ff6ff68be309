"""``edgehp verify``: who signed a bundle, and whether it is whole."""

from __future__ import annotations

from pathlib import Path

import click

from edgehp.cli._trust import read_keys, trust_option

__all__ = ["command"]


@click.command("verify", short_help="Check the signature and the hashes of a bundle.")
@click.argument("file", type=click.Path(path_type=Path))
@trust_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
def command(
    file: Path,
    public_keys: tuple[Path, ...],
    as_json: bool,
) -> None:
    """Check who signed the bundle FILE and every hash in it. Nothing is unpacked.

    Ends with 4 if it was signed by somebody else or altered.
    """
    from edgehp.cli._output import print_json, print_table
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
