"""``edgehp completion``: what a shell needs to complete commands, options and files."""

from __future__ import annotations

import click

from edgehp.cli._command import subcommand

_VARIABLE = "_EDGEHP_COMPLETE"


@subcommand(
    "completion",
    "edgehp completion bash >> ~/.bashrc",
    "edgehp completion zsh >> ~/.zshrc",
    "edgehp completion fish > ~/.config/fish/completions/edgehp.fish",
)
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")))
def command(shell: str) -> None:
    """Print the completion of commands, options and files for SHELL, to be read at its start."""
    from click.shell_completion import BashComplete, get_completion_class

    from edgehp.cli.main import cli

    kind = get_completion_class(shell)
    if kind is None:
        raise click.UsageError(f"no completion for {shell}")
    if issubclass(kind, BashComplete):
        # click starts a bash to ask for its version; any that completes files is new enough.
        kind = type("Complete", (kind,), {"_check_version": staticmethod(lambda: None)})
    click.echo(kind(cli, {}, "edgehp", _VARIABLE).source())
