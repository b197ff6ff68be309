"""``edgehp report``: results as Markdown and one HTML page."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

__all__ = ["command"]


@click.command("report", short_help="Results as Markdown, HTML and plots.")
@click.argument("sources", nargs=-1, type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), help="Directory of the results.")
@click.option(
    "--faces",
    type=click.Path(path_type=Path),
    help="Folder or zip that the worst cases of a validation are taken from, to show them.",
)
def command(sources: tuple[Path, ...], output: Path | None, faces: Path | None) -> None:
    """Make report.html and report.md of artifacts and report files (default: newest artifact).

    An artifact is given by its directory, with its reports/. To compare two artifacts, measure
    them in one run: 'edgehp bench A --against B'.
    """
    from edgehp.artifact import newest_artifact
    from edgehp.report.files import write_text
    from edgehp.report.gather import gather
    from edgehp.report.page import html_page, markdown

    given = sources or (newest_artifact(),)
    material = gather(given)
    first = given[0]
    if material.manifest is not None and not material.validations:
        artifact = next(path for path in given if path.is_dir())
        click.echo(
            "edgehp: no validation report was found, so the page has no validation; make one with: "
            + shlex.join(["edgehp", "validate", str(artifact), "--report",
                          str(artifact / "reports" / "validation.json")]),
            err=True,
        )  # fmt: skip
    directory = output or (first / "reports" if first.is_dir() else first.parent)
    click.echo(write_text(directory / "report.md", markdown(material)))
    click.echo(write_text(directory / "report.html", html_page(material, faces)))
