"""``edgehp report``: results as Markdown and one HTML page."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from edgehp.cli._command import PATH, json_option, note, output_option, subcommand
from edgehp.cli._output import answer
from edgehp.cli.project import artifacts_here


@subcommand(
    "report",
    "edgehp report",
    "edgehp report dist/kd-resnet18-112-cpu-int8 --output public",
    "edgehp report dist/*",
)
@click.argument("sources", nargs=-1, type=PATH)
@output_option("Directory of the results. Default: reports/ in the artifact.")
@click.option(
    "--faces",
    type=PATH,
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
    from edgehp.artifact.manifest import MANIFEST_NAME
    from edgehp.files import write_output
    from edgehp.report.gather import gather
    from edgehp.report.page import fleet_page, html_page, markdown

    given = sources or artifacts_here()
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
        for found, what, made_by in (
            (materials[0].validations, "validation", "validate"),
            (materials[0].benchmarks, "benchmark", "bench"),
        ):
            if artifacts and not found:
                note(
                    f"no {what} report was found, so the page has no {what}; make one with: "
                    + shlex.join(["edgehp", made_by, str(artifacts[0])])
                )
    written = (directory / "report.md", directory / "report.html")
    for path, text in zip(written, (markdown(*materials), page), strict=True):
        write_output(path, text)
    answer(as_json, {"files": written}, "\n".join(map(str, written)))
