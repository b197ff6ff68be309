"""``edgehp report``: results as Markdown and one HTML page."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from edgehp.cli._command import Command, json_option, note, output_option

__all__ = ["command"]


@click.command(
    "report",
    cls=Command,
    short_help="Results as Markdown, HTML and plots.",
    examples=(
        "edgehp report",
        "edgehp report dist/kd-resnet18-112-cpu-int8 --output public",
        "edgehp report dist/*",
    ),
)
@click.argument("sources", nargs=-1, type=click.Path(path_type=Path))
@output_option("Directory of the results. Default: reports/ in the artifact.")
@click.option(
    "--faces",
    type=click.Path(path_type=Path),
    help="Folder or zip that the worst cases of a validation are taken from, to show them.",
)
@json_option
def command(
    sources: tuple[Path, ...], output: Path | None, faces: Path | None, as_json: bool
) -> None:
    """Make report.html and report.md of artifacts and report files (default: newest artifact).

    An artifact is given by its directory, with its reports/. Of several, the page has a row each,
    and lies beside them. To compare two exactly, measure them in one run: 'edgehp bench A
    --against B'.
    """
    from edgehp.artifact import newest_artifact
    from edgehp.artifact.manifest import MANIFEST_NAME
    from edgehp.cli._output import print_json
    from edgehp.report.files import write_text
    from edgehp.report.gather import gather
    from edgehp.report.page import fleet_page, html_page, markdown

    given = sources or (newest_artifact(),)
    artifacts = [path for path in given if (path / MANIFEST_NAME).is_file()]
    first = given[0]
    if len(artifacts) > 1:
        for other in sorted(set(given) - set(artifacts)):
            note(f"passed over {other}: not an artifact")
        materials = [gather([path]) for path in artifacts]
        directory = output or first.parent
        page = fleet_page(materials)
    else:
        materials = [gather(given)]
        directory = output or (first / "reports" if first.is_dir() else first.parent)
        page = html_page(materials[0], faces)
        if artifacts and not materials[0].validations:
            report = artifacts[0] / "reports" / "validation.json"
            words = ["edgehp", "validate", str(artifacts[0]), "--output", str(report)]
            note(
                "no validation report was found, so the page has no validation; make one with: "
                + shlex.join(words)
            )
    written = (
        write_text(directory / "report.md", markdown(*materials)),
        write_text(directory / "report.html", page),
    )
    if as_json:
        print_json({"files": written})
    else:
        for path in written:
            click.echo(path)
