"""``edgehp report``: results as Markdown and one HTML page; two benchmarks compared."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from edgehp.errors import UsageError

__all__ = ["command"]

_MAKE = "make"


class _DefaultGroup(click.Group):
    """A group whose first argument may be a path, which means the command ``make``."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.commands:
            args = [_MAKE, *args]
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # Options before the paths belong to the default command too.
        if args and args[0].startswith("-") and args[0] not in ("-h", "--help"):
            args = [_MAKE, *args]
        return super().parse_args(ctx, args)


@click.group("report", cls=_DefaultGroup, short_help="Results as Markdown, HTML and plots.")
def command() -> None:
    """Turn results into a page: edgehp report DIR|REPORT.json ...

    DIR is an artifact with its reports/. 'edgehp report compare A.json B.json' compares two
    benchmarks, or says why they must not be compared.
    """


@command.command(_MAKE)
@click.argument("sources", nargs=-1, type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), help="Directory of the results.")
@click.option(
    "--faces",
    type=click.Path(path_type=Path),
    help="Folder or zip that the worst cases of a validation are taken from, to show them.",
)
def make(sources: tuple[Path, ...], output: Path | None, faces: Path | None) -> None:
    """Make report.html and report.md of artifacts and report files (default: newest artifact)."""
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


@command.command("compare")
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option("--allow-invalid", is_flag=True, help="Compare although a run is invalid.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def compare(a: Path, b: Path, allow_invalid: bool, as_json: bool) -> None:
    """Compare two reports of 'edgehp bench'; exit 6 where that would be meaningless."""
    from dataclasses import asdict

    from edgehp.cli._output import print_json, print_table
    from edgehp.report.compare import compare_benchmarks
    from edgehp.report.files import read_report

    reports = [read_report(path) for path in (a, b)]
    if any(r["kind"] != "benchmark" for r in reports):
        raise UsageError("compare takes two reports of 'edgehp bench'; for accuracy use "
                         "'edgehp validate --compare'")  # fmt: skip
    result = compare_benchmarks(reports[0], reports[1], allow_invalid=allow_invalid)
    if as_json:
        print_json(asdict(result))
        return
    for text in result.differs or ("nothing but the run differs",):
        click.echo(text)
    rows: list[tuple[Any, ...]] = []
    for f in result.figures:
        interval = "" if f.low is None or f.high is None else f"{f.low:.3f} to {f.high:.3f}"
        rows.append((f.name, f.a, f.b, f"{f.ratio:.3f}", interval))
    print_table(("figure", "A", "B", "A / B", "95 % interval"), rows, right=(1, 2, 3, 4))
