"""``edgehp bundle``: an artifact in one signed file."""

from __future__ import annotations

import os
from pathlib import Path

import click

from edgehp.shipping.keys import PASSWORD_VARIABLE

__all__ = ["command"]


@click.command("bundle", short_help="Put an artifact into one signed file.")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--key",
    type=click.Path(path_type=Path),
    required=True,
    help="Private key (PEM; P-256, P-384 or P-521). The password of an encrypted one is taken "
    f"from ${PASSWORD_VARIABLE}.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="The file to write. Default: ARTIFACT.edgehp.",
)
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
def command(
    artifact: Path,
    key: Path,
    output: Path | None,
    max_latency_ms: float | None,
    rxswin: str | None,
) -> None:
    """Put ARTIFACT, a directory made by 'edgehp build', into one signed file.

    Signed with OpenSSF Model Signing. A key pair is made with:

    \b
      openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out release.pem
      openssl ec -in release.pem -pubout -out release.pub
    """  # noqa: D301 - click's mark for text that is not filled
    # Imported here: `edgehp --help` must not pay for OpenCV.
    from edgehp.cli._output import Steps
    from edgehp.shipping.bundle import make_bundle

    with Steps()("sign"):
        made = make_bundle(
            artifact,
            output,
            key=key,
            password=os.environ.get(PASSWORD_VARIABLE),
            max_latency_ms=max_latency_ms,
            rxswin=rxswin,
        )
    click.echo(f"{made.path}  {made.size / 1e6:.1f} MB in {len(made.files)} files")
    click.echo(f"content {made.digest}")
    click.echo(f"signed by {made.signer}")
