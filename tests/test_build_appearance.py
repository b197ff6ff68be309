"""Builds and validations say aloud when the calibration crops look unlike the others."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from edgehp.artifact import load_artifact
from edgehp.artifact.open import open_artifact, open_reference
from edgehp.cli.validate import command
from edgehp.datasets.faces import read_faces
from edgehp.pipeline.pipeline import BuildResult, build
from edgehp.pipeline.plan import BuildRequest
from edgehp.report.gather import gather
from edgehp.report.page import breakdown_rows, html_page
from edgehp.validation.appearance import measure_crops
from edgehp.validation.run import Settings, ValidationReport, validate
from edgehp.validation.session import calibration_check


@pytest.fixture(scope="module")
def unlike(small_request: BuildRequest, small: Path) -> BuildResult:
    return build(replace(small_request, calibration=small / "black.zip", output=small / "unlike"))


def warned(result: BuildResult) -> list[str]:
    return [w for w in result.manifest.build.warnings if "look unlike" in w]


def test_a_build_warns_of_near_black_calibration_crops(unlike: BuildResult) -> None:
    (text,) = warned(unlike)
    assert "100% are brighter than nearly all of the former" in text
    assert "of their activations lie beyond the calibrated ranges" in text
    # What a later validation needs is in the manifest.
    record = load_artifact(unlike.path).manifest.calibration
    assert record is not None
    assert record.appearance is not None
    assert record.appearance.brightness[1] < 10
    assert record.clipped is not None
    assert record.clipped < 0.002


def test_the_advice_fits_what_the_user_gave(
    small_request: BuildRequest, small_int8: BuildResult, unlike: BuildResult, small: Path
) -> None:
    # Both sets are the user's: the calibration crops are to be like the others.
    assert warned(unlike)[0].endswith("calibrate on crops from the camera that will be used")
    # His crops are held against the shipped heads: not they are wrong, but the gate.
    shipped = build(
        replace(
            small_request,
            calibration=small / "black.zip",
            validate_on=None,
            output=small / "gate-on-shipped",
        )
    )
    (text,) = warned(shipped)
    assert "rendered heads that edgehp ships" in text and "--validate-on" in text
    assert "calibrate on" not in text
    with open_artifact(small_int8.path, threads=1) as tested:
        for heads, words in ((True, "--dataset and --data-root"), (False, "calibrate on")):
            check = calibration_check(tested, shipped_heads=heads)
            assert check is not None
            assert words in check(measure_crops(np.zeros((1, 16, 16, 3), np.uint8))).advice


def test_a_build_is_silent_where_they_look_alike(small_int8: BuildResult) -> None:
    assert warned(small_int8) == []


def test_the_gate_is_broken_down(small_int8: BuildResult) -> None:
    accuracy = small_int8.manifest.accuracy
    assert accuracy is not None
    assert accuracy.difference is not None
    assert accuracy.difference > 0
    assert accuracy.spread_difference is not None
    assert accuracy.spread_difference > 0
    subsets = {s.name: s for s in accuracy.subsets}
    assert {"|yaw| 0 to 30°", "|yaw| 30 to 60°", "dark", "blurred", "near-infrared"} <= set(subsets)
    bands = [s for name, s in subsets.items() if name.startswith("|yaw|")]
    assert sum(s.count for s in bands) == accuracy.count == 64
    # The parts make up the whole.
    whole = sum(s.count * s.drop for s in bands) / accuracy.count
    assert whole == pytest.approx(accuracy.drop, abs=1e-9)
    apart = sum(s.count * s.spread_difference for s in bands) / accuracy.count
    assert apart == pytest.approx(accuracy.spread_difference, abs=1e-6)
    for s in subsets.values():
        assert s.interval[0] <= s.drop <= s.interval[1]
        assert s.difference >= abs(s.drop) - 1e-9
    assert subsets["dark"].drop != subsets["blurred"].drop


def validated(result: BuildResult, faces: Path) -> ValidationReport:
    with open_artifact(result.path, threads=1) as tested, open_reference(tested) as reference:
        return validate(
            reference,
            tested,
            read_faces(faces),
            Settings(resamples=200),
            calibration=calibration_check(tested, shipped_heads=False),
        )


def test_a_validation_warns_and_breaks_down_too(
    small_int8: BuildResult, unlike: BuildResult, small: Path
) -> None:
    quiet, loud = (validated(r, small / "val.zip") for r in (small_int8, unlike))
    assert quiet.appearance and loud.appearance and quiet.drop
    assert quiet.appearance["warning"] is None
    assert "100% are brighter" in loud.appearance["warning"]
    rows = {row[0]: row for row in breakdown_rows(quiet)}
    assert {"all", "|yaw| 0 to 30°", "dark", "blurred", "near-infrared"} <= set(rows)
    assert all(float(row[3]) > 0 and float(row[4]) > 0 for row in rows.values())
    for band in quiet.drop.bands:
        assert (band.spread_difference is None) == (band.frames == 0)


def test_the_command_shows_all_of_it(unlike: BuildResult, caplog: pytest.LogCaptureFixture) -> None:
    arguments = [str(unlike.path), "--limit", "24", "--threads", "1", "--max-drop", "90"]
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    report = unlike.path / "reports" / "validation-rendered.json"
    assert "|spread|" in result.output
    table = [line for line in result.output.splitlines() if line.startswith("near-infrared")]
    assert len(table[0].split()) == 8  # its interval are three words
    assert "look unlike those validated on" in caplog.text
    assert "look unlike" in json.loads(report.read_text("utf-8"))["appearance"]["warning"]
    page = html_page(gather([unlike.path]))
    for words in ("Artifact against FP32", "Accuracy at the build", "look unlike", "|spread|"):
        assert words in page
