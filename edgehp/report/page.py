"""One report as a self-contained HTML page, and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgehp.benchmark.report import number, summary_rows
from edgehp.report import plots
from edgehp.report.gather import Material, worst_photos

__all__ = ["accuracy_rows", "html_page", "markdown"]

_TEMPLATE = "page.html.jinja"
_ANGLES = ("pitch", "yaw", "roll")
PARTS = ("artifact against FP32", "frames", "drop, degrees", "|angles|", "|spread|")
Rows = list[tuple[str, ...]]


def html_page(material: Material, faces: Path | None = None) -> str:
    """The page: no script, no link, no network; pictures are inside.

    Args:
        material: what to show.
        faces: where the photos of the worst cases are, or None.

    Raises:
        DataError: `faces` cannot be read.
        ModuleNotFoundError: matplotlib or jinja2 is not installed (extra ``report``).
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    def svg(text: str | None) -> Markup | None:
        # Drawn here, not by a user: the only text that is not escaped.
        return None if text is None else Markup(text)

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = Path(__file__).with_name(_TEMPLATE).read_text(encoding="utf-8")
    benchmarks = [
        {
            "report": r,
            "table": summary_rows(r),
            "histogram": svg(plots.latency_histogram(r)),
            "timeline": svg(plots.timeline(r)),
            "roofline": svg(plots.roofline_plot(r)),
            "roofline_text": roofline_text(r),
            "settings": settings_rows(r),
        }
        for r in material.benchmarks
    ]
    validations = [
        {
            "report": r,
            "rows": accuracy_rows(r),
            "parts": breakdown_rows(r),
            "unlike": (r.get("appearance") or {}).get("warning"),
            "by_yaw": svg(plots.error_by_yaw(r)),
            "worst": worst_photos(r, faces),
        }
        for r in material.validations
    ]
    kept = float_layers(material.manifest)
    sensitivity = (
        svg(plots.sensitivity_plot(material.sensitivity, kept)) if material.sensitivity else None
    )
    return environment.from_string(template).render(
        title=_title(material),
        benchmarks=benchmarks,
        validations=validations,
        sensitivity=sensitivity,
        gate=gate_rows(material.manifest),
        mixed=mixed_text(material.manifest),
        manifest=None if material.manifest is None else manifest_rows(material.manifest),
    )


def markdown(material: Material) -> str:
    """The figures as Markdown."""
    parts = [f"# {_title(material)}"]
    for report in material.benchmarks:
        table = summary_rows(report)
        parts += [
            f"## {report['scenario']['scenario']}",
            table.title,
            _markdown_table(table.headers, table.rows),
            "\n".join(f"- {note}" for note in table.notes),
            roofline_text(report),
        ]
    for report in material.validations:
        parts += [
            f"## Accuracy on {report['protocol'].get('dataset')}",
            _markdown_table(("degrees", "reference", "artifact", "drop"), accuracy_rows(report)),
        ]
        if broken := breakdown_rows(report):
            parts.append(_markdown_table(PARTS, broken))
        if unlike := (report.get("appearance") or {}).get("warning"):
            parts.append(f"Warning: {unlike}.")
        worst = worst_photos(report, None)
        if worst:
            parts.append("Worst: " + ", ".join(f"{w.name} ({w.error:.1f}°)" for w in worst))
    if material.sensitivity:
        rows = [
            (x.name, f"{x.degrees:.4f}", "-" if x.gain is None else f"{x.gain:+.4f}")
            for x in sorted(material.sensitivity, key=lambda x: -x.degrees)
        ]
        headers = ("layer", "alone in INT8, degrees", "gain without it, degrees")
        parts += ["## Sensitivity of the layers", _markdown_table(headers, rows)]
    if gate := gate_rows(material.manifest):
        parts += ["## Accuracy at the build", _markdown_table(PARTS, gate)]
    if mixed := mixed_text(material.manifest):
        parts.append(mixed)
    if material.manifest is not None:
        parts += [
            "## Manifest",
            _markdown_table(("key", "value"), manifest_rows(material.manifest)),
        ]
    return "\n\n".join(parts) + "\n"


def accuracy_rows(report: Mapping[str, Any]) -> Rows:
    """Errors of the reference and the artifact and the drop, in degrees, a row a figure."""
    reference, artifact = report["reference_accuracy"], report.get("artifact_accuracy")
    drop = report.get("drop")
    rows: Rows = []

    def add(name: str, before: float, after: float | None, change: Any) -> None:
        rows.append((name, f"{before:.3f}", "-" if after is None else f"{after:.3f}", change))

    one = reference["overall"]
    two = artifact["overall"] if artifact else None
    add(
        "MAE",
        one["mae_mean"],
        two and two["mae_mean"],
        _interval(drop["overall"]) if drop else "-",
    )
    for i, angle in enumerate(_ANGLES):
        change = _interval(drop["angles"][i]) if drop else "-"
        add(f"MAE {angle}", one["mae"][i], two and two["mae"][i], change)
    add(
        "geodesic",
        one["geodesic"],
        two and two["geodesic"],
        _interval(drop["geodesic"]) if drop else "-",
    )
    add("MAEV", one["maev"], two and two["maev"], "-")
    for i, band in enumerate(reference["bands"]):
        if band["summary"] is None:
            continue
        after = artifact["bands"][i]["summary"]["mae_mean"] if artifact else None
        banded = drop["bands"][i]["drop"] if drop else None
        add(
            f"MAE, |yaw| {band['low']:g} to {band['high']:g}° ({band['summary']['frames']} frames)",
            band["summary"]["mae_mean"],
            after,
            _interval(banded) if banded else "-",
        )
    return rows


def breakdown_rows(report: Mapping[str, Any]) -> Rows:
    """The artifact against its reference by |yaw| and on degraded versions of the crops.

    Rows of `PARTS`; empty where a network alone was validated.
    """
    drop = report.get("drop")
    if not drop:
        return []
    frames = report["reference_accuracy"]["overall"]["frames"]
    rows = [
        _part(
            "all",
            frames,
            drop["overall"],
            drop["mean_difference_overall"],
            drop["spread_difference_overall"],
        )
    ]
    for band in drop["bands"]:
        if band["drop"] is not None:
            name = f"|yaw| {band['low']:g} to {band['high']:g}°"
            # Reports of earlier releases have no differences by band.
            apart = band.get("mean_difference"), band.get("spread_difference")
            rows.append(_part(name, band["frames"], band["drop"], *apart))
    for c in report.get("robustness") or ():
        if c["drop"] is not None:
            apart = c["mean_difference"], c["spread_difference"]
            rows.append(_part(c["name"], frames, c["drop"], *apart))
    return rows


def gate_rows(manifest: Mapping[str, Any] | None) -> Rows:
    """What the build's gate measured, as `breakdown_rows`."""
    accuracy = (manifest or {}).get("accuracy")
    if not accuracy or not accuracy.get("subsets"):
        return []

    def row(name: str, values: Mapping[str, Any]) -> tuple[str, ...]:
        low, high = values["interval"]
        interval = {"value": values["drop"], "low": low, "high": high}
        apart = values["difference"], values["spread_difference"]
        return _part(name, values["count"], interval, *apart)

    return [row("all", accuracy), *(row(s["name"], s) for s in accuracy["subsets"])]


def float_layers(manifest: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Layers that the accuracy gate keeps in floating point."""
    mixed = ((manifest or {}).get("precision") or {}).get("mixed")
    return tuple(mixed["float_layers"]) if mixed else ()


def mixed_text(manifest: Mapping[str, Any] | None) -> str | None:
    """Which layers stay in floating point and what that costs, in a sentence; None for none."""
    mixed = ((manifest or {}).get("precision") or {}).get("mixed")
    if not mixed:
        return None
    cost = mixed["predicted_ms"] - mixed["predicted_all_int8_ms"]
    text = (
        f"To keep the drop, {', '.join(mixed['float_layers'])} stay in "
        f"{mixed['float_precision'].upper()}; INT8 throughout dropped by "
        f"{mixed['all_int8_drop']:+.4f} degrees. Predicted cost: {number(cost, 3)} ms on "
        f"{number(mixed['predicted_all_int8_ms'], 3)} ms ({mixed['latency_model']})."
    )
    if mixed["measured_ms"] is not None and mixed["measured_all_int8_ms"] is not None:
        text += (
            f" Measured: {number(mixed['measured_ms'], 3)} ms against "
            f"{number(mixed['measured_all_int8_ms'], 3)} ms."
        )
    return text


def _part(
    name: str,
    frames: int,
    drop: Mapping[str, Any],
    angles: float | None,
    spread: float | None,
) -> tuple[str, ...]:
    apart = ("-" if v is None else f"{v:.4f}" for v in (angles, spread))
    return (name, str(frames), _interval(drop, 4), *apart)


def roofline_text(report: Mapping[str, Any]) -> str:
    """The roofline of the artifact in a sentence, or why there is none."""
    found = report["roofline"].get("artifact") or {"reason": "not counted", "work": None}
    work, roof = found.get("work"), found.get("roofline")
    counted = ""
    if work is not None:
        counted = (
            f"One image takes {work['operations'] / 1e9:.2f} G operations and "
            f"{work['weight_bytes'] / 1e6:.1f} MB of weights. "
        )
    if roof is None:
        return f"{counted}Roofline: null, {found['reason']}."
    return (
        f"{counted}Reached {number(roof['reached_ops_per_s'] / 1e12)} of "
        f"{number(roof['peak_ops_per_s'] / 1e12)} T operations a second "
        f"({roof['fraction_of_compute']:.1%}); bound by {roof['bound']} "
        f"(peaks of {roof['peaks']['name']}: {roof['peaks']['source']})."
    )


def settings_rows(report: Mapping[str, Any]) -> Rows:
    """The settings of a benchmark, a row each."""
    rows: Rows = []
    for role, subject in report["subjects"].items():
        engine = subject["engine"]
        rows.append((f"{role}: engine", f"{engine['kind']} {engine['version']}"))
        rows.append((f"{role}: device", str(engine["device"])))
        rows.append((f"{role}: threads, batch", f"{engine['threads']}, {subject['batch']}"))
        rows += [(f"{role}: {k}", _short(v)) for k, v in engine["details"].items()]
    rows += [(f"scenario: {k}", _short(v)) for k, v in report["scenario"].items()]
    rows += [(k, _short(v)) for k, v in report["host"].items()]
    rows += [(f"validity: {k}", _short(v)) for k, v in report["validity"]["figures"].items()]
    rows += [("condition", text) for text in report["validity"]["conditions"]]
    rows += [("could not be checked", text) for text in report["validity"]["unknown"]]
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


def _interval(value: Mapping[str, Any], digits: int = 3) -> str:
    if value["low"] is None or value["high"] is None:
        return f"{value['value']:+.{digits}f}"
    low, high = (f"{value[k]:+.{digits}f}" for k in ("low", "high"))
    return f"{value['value']:+.{digits}f} ({low} to {high})"


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


def _title(material: Material) -> str:
    if material.manifest is not None:
        return str(material.manifest["name"])
    for report in material.benchmarks:
        return str(report["subjects"]["artifact"]["name"])
    for report in material.validations:
        return str((report.get("artifact") or report["reference"])["name"])
    return "edgehp"


def _markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"

    rule = "|" + "|".join([" --- "] + [" ---: "] * (len(headers) - 1)) + "|"
    return "\n".join([line(headers), rule, *map(line, rows)])
