"""Reports as a self-contained HTML page, and as Markdown: the verdict, then what it rests on.

Both are made of the same sections. A page of several artifacts has a row for each of them.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from edgehp.benchmark.report import BenchmarkReport, number, summary_rows
from edgehp.benchmark.roofline import BETWEEN, Roofline
from edgehp.report import plots
from edgehp.report.figures import (
    ACCURACY,
    PARTS,
    Claim,
    Figures,
    Rows,
    accuracy_rows,
    breakdown_rows,
    figures,
    gate_rows,
    mixed_text,
    verdict,
)
from edgehp.report.gather import Material, Photo, worst_photos

_TEMPLATE = "page.html.jinja"
# The only script of any page: a click on a header sorts by its column, numbers by their value.
_SORT = """
for (const table of document.querySelectorAll("table.sort")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, i) => head.firstElementChild.addEventListener("click", () => {
    const down = head.ariaSort === "ascending";
    heads.forEach(h => h.removeAttribute("aria-sort"));
    head.ariaSort = down ? "descending" : "ascending";
    const value = row => row.cells[i].textContent.trim();
    const order = (a, b) => {
      const x = parseFloat(value(a)), y = parseFloat(value(b));
      if (isNaN(x) !== isNaN(y)) return isNaN(x) ? 1 : -1;
      return (isNaN(x) ? value(a).localeCompare(value(b)) : x - y) * (down ? -1 : 1);
    };
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort(order));
  }));
}
"""


@dataclass(frozen=True)
class Part:
    """A piece of a section: a table, a list, a plot or photos.

    Attributes:
        heading: above it.
        note: a sentence under the heading.
        headers: of the table; none for keys and values.
        rows: of the table.
        items: of a list.
        plot: draws an SVG, or gives None; HTML only.
        photos: of worst cases.
        details: left out of the Markdown, folded in HTML.
    """

    heading: str = ""
    note: str = ""
    headers: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    items: Sequence[str] = ()
    plot: Callable[[], str | None] | None = None
    photos: Sequence[Photo] = ()
    details: bool = False


@dataclass(frozen=True)
class Section:
    """A heading with badges (text, and whether it is good news), a sentence, and parts."""

    title: str
    note: str = ""
    badges: Sequence[tuple[str, bool]] = ()
    parts: Sequence[Part] = ()


def html_page(material: Material, faces: Path | None = None) -> str:
    """The page: no script, no link, no network; pictures are inside.

    Args:
        material: what to show.
        faces: where the photos of the worst cases are, or None.

    Raises:
        DataError: `faces` cannot be read.
        ModuleNotFoundError: matplotlib or jinja2 is not installed (extra ``report``).
    """
    found = figures(material)
    return _render(found.name, verdict(found), list(_sections(material, faces)))


def fleet_page(materials: Sequence[Material]) -> str:
    """One page of several artifacts, a row each, to sort and to compare; else as `html_page`."""
    found = [figures(m) for m in materials]
    parts = [
        Part(headers=_FLEET, rows=_fleet_rows(found)),
        Part("Error against milliseconds", plot=partial(plots.error_by_latency, found)),
    ]
    section = Section("Compared", _FLEET_NOTE, parts=parts)
    return _render(f"{len(found)} artifacts", [], [section], _SORT)


def markdown(*materials: Material) -> str:
    """The figures as Markdown: of one artifact all of them, of several a row each."""
    found = [figures(m) for m in materials]
    if len(found) > 1:
        table = _markdown_table(_FLEET, _fleet_rows(found))
        return f"# {len(found)} artifacts\n\n{_FLEET_NOTE}\n\n{table}\n"
    out = [f"# {found[0].name}"]
    out.append("\n".join(f"- **{c.name}**: {c.text}" for c in verdict(found[0])))
    for section in _sections(materials[0], None):
        out += [f"## {section.title}", section.note]
        out += [f"**{text}**" for text, _ in section.badges]
        for part in section.parts:
            if part.details or not (part.rows or part.items or part.photos or part.note):
                continue
            out += [f"### {part.heading}" if part.heading else "", part.note]
            if part.rows:
                headers = part.headers or ("key", "value")
                out.append(_markdown_table(headers, part.rows))
            out.append("\n".join(f"- {item}" for item in part.items))
            out.append(", ".join(f"{w.name} ({w.error:.1f}°)" for w in part.photos))
    return "\n\n".join(text for text in out if text) + "\n"


def _render(
    title: str, claims: Sequence[Claim], sections: Sequence[Section], script: str = ""
) -> str:
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    def svg(part: Part) -> Markup | None:
        # Drawn here, not by a user: with the script the only text that is not escaped.
        text = part.plot() if part.plot else None
        return None if text is None else Markup(text)

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = Path(__file__).with_name(_TEMPLATE).read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.from_string(template).render(
        title=title,
        claims=claims,
        sections=sections,
        svg=svg,
        script=Markup(script),
        script_policy=f"script-src 'sha256-{digest}'; " if script else "",
    )


def _sections(material: Material, faces: Path | None) -> Iterator[Section]:
    for report in material.validations:
        accuracy = Part(headers=ACCURACY, rows=accuracy_rows(report))
        apart = (
            "degrees; |angles| and |spread| are mean absolute differences, whatever the truth is"
        )
        unlike = (report.appearance or {}).get("warning")
        yield Section(
            f"Accuracy on {report.protocol.get('dataset', 'unnamed crops')}",
            f"{report.protocol.get('frames')} frames, degrees; drop with its 95 % interval",
            [(f"warning: {unlike}", False)] if unlike else (),
            [
                accuracy,
                Part("Artifact against FP32", apart, PARTS, breakdown_rows(report)),
                Part("Error by yaw", plot=partial(plots.error_by_yaw, report)),
                Part("Worst cases", photos=worst_photos(report, faces)),
            ],
        )
    yield from map(_benchmark, material.benchmarks)
    degrees = "degrees, on the held-out crops; |angles| and |spread| are mean absolute differences"
    manifest = material.manifest
    if manifest is not None and (gate := gate_rows(manifest)):
        yield Section("Accuracy at the build", degrees, parts=[Part(headers=PARTS, rows=gate)])
    if manifest is not None and (text := mixed_text(manifest)):
        yield Section("Layers in floating point", text)
    if material.sensitivity:
        mixed = None if manifest is None else manifest.precision.mixed
        kept = () if mixed is None else mixed.float_layers
        layers = sorted(material.sensitivity, key=lambda x: -x.degrees)
        rows = [
            (x.name, f"{x.degrees:.4f}", "-" if x.gain is None else f"{x.gain:+.4f}")
            for x in layers
        ]
        headers = ("layer", "alone in INT8, degrees", "gain without it, degrees")
        yield Section(
            "Sensitivity of the layers",
            parts=[
                Part(plot=partial(plots.sensitivity_plot, layers, kept)),
                Part(headers=headers, rows=rows),
            ],
        )
    if manifest is not None:
        yield Section("Manifest", parts=[Part(rows=manifest_rows(manifest.to_dict()))])


def _benchmark(report: BenchmarkReport) -> Section:
    table, valid = summary_rows(report), report.validity.valid
    badges = [("valid" if valid else "invalid", valid)]
    if report.state == "partial":
        badges.append(("partial", False))
    notes = (*table.notes, *report.validity.reasons)
    return Section(
        report.scenario.scenario,
        f"{table.title}; {report.created}",
        badges,
        [
            Part(headers=table.headers, rows=table.rows, items=notes),
            Part("Latency", plot=partial(plots.latency_histogram, report)),
            Part("Over time", plot=partial(plots.timeline, report)),
            Part("Roofline", roofline_text(report), plot=partial(plots.roofline_plot, report)),
            Part("Settings", rows=settings_rows(report), details=True),
        ],
    )


_FLEET = (
    "artifact", "target", "precision", "gate", "drop", "MAE", "on", "p50 ms", "p99 ms", "images/s",
    "times FP32", "mJ an image", "measurement",
)  # fmt: skip
_FLEET_NOTE = (
    "Degrees; drop and MAE of a validation, else of the build. Milliseconds end to end, one frame "
    "after the other; a dash where it was not measured."
)


def _fleet_rows(found: Sequence[Figures]) -> Rows:
    def words(value: bool | None, good: str, bad: str) -> str:
        return "-" if value is None else good if value else bad

    return [
        (
            f.name,
            f.target,
            f.precision,
            words(f.passed, "passed", "FAILED"),
            "-" if f.drop is None else f"{f.drop:+.4f}",
            "-" if f.mae is None else f"{f.mae:.3f}",
            f.dataset or "-",
            number(f.p50),
            number(f.p99),
            number(f.rate, 4),
            "-" if f.speedup is None else f"{f.speedup[0]:.2f}",
            number(f.millijoules),
            words(f.valid, "valid", "INVALID"),
        )
        for f in found
    ]


def roofline_text(report: BenchmarkReport) -> str:
    """The roofline of the artifact in a sentence, or why there is none."""
    found = report.roofline.get("artifact", Roofline("not counted"))
    counted = ""
    if (work := found.work) is not None:
        counted = (
            f"One image takes {work.operations / 1e9:.2f} G operations and "
            f"{work.weight_bytes / 1e6:.1f} MB of weights. "
        )
    if (roof := found.roofline) is None:
        return f"{counted}No roofline: {found.reason}."
    bound = "" if roof.bound is None else f"; bound by {roof.bound}"
    if roof.bound == BETWEEN:
        bound = f"; the bound lies {BETWEEN}"
    return (
        f"{counted}Reached {number(roof.reached_ops_per_s / 1e12)} of "
        f"{number(roof.peaks.ops_per_s / 1e12)} T operations a second "
        f"({roof.fraction_of_compute:.1%}){bound} "
        f"(peaks of {roof.peaks.name}: {roof.peaks.source})."
    )


def settings_rows(report: BenchmarkReport) -> Rows:
    """The settings of a benchmark, a row each."""
    rows: Rows = []
    for role, subject in report.subjects.items():
        engine = subject.engine
        rows.append((f"{role}: engine", f"{engine.kind} {engine.version}"))
        rows.append((f"{role}: device", engine.device))
        rows.append((f"{role}: threads, batch", f"{engine.threads}, {subject.batch}"))
        rows += [(f"{role}: {k}", _short(v)) for k, v in engine.details.items()]
    unused = () if report.scenario.scenario == "multi-camera" else ("cameras", "fps")
    asked = vars(report.scenario).items()
    rows += [(f"scenario: {k}", _short(v)) for k, v in asked if k not in unused]
    rows += [(k, _short(v)) for k, v in report.host.items()]
    rows += [(f"validity: {k}", _short(v)) for k, v in report.validity.figures.items()]
    rows += [("condition", text) for text in report.validity.conditions]
    rows += [("could not be checked", text) for text in report.validity.unknown]
    return rows


def manifest_rows(manifest: Mapping[str, Any]) -> Rows:
    """The manifest without its long lists, a row a figure."""
    rows: Rows = []
    for key, value in manifest.items():
        if not isinstance(value, Mapping):
            if key != "files":
                rows.append((key, _short(value)))
            continue
        rows += [
            (f"{key}.{name}", _short(inner))
            for name, inner in value.items()
            if name not in ("audit", "angles", "spread", "protocol", "subsets", "mixed")
        ]
    rows += [(f["path"], f"{f['size']} bytes, SHA-256 {f['sha256']}") for f in manifest["files"]]
    return rows


def _short(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, float):
        return number(value, 4)
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_short(v)}" for k, v in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_short, value)) or "none"
    return str(value)


def _markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"

    rule = "|" + "|".join([" --- "] + [" ---: "] * (len(headers) - 1)) + "|"
    return "\n".join([line(headers), rule, *map(line, rows)])
