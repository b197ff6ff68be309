"""A bundled network at another input size, from the command line to the device's own checks."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner

from edgehp.artifact import golden_crops, load_artifact, verify_golden
from edgehp.cli.build import command
from edgehp.engines import open_engine
from edgehp.validation.subjects import open_artifact, open_reference
from tests import build_parts


def test_the_bundled_112_pixel_network_at_96(tmp_path: Path) -> None:
    build_parts.faces(tmp_path / "cal.zip", 66, 1, size=112)
    build_parts.faces(tmp_path / "val.zip", 64, 2, size=112, labels=True)
    arguments = ["--target", "cpu", "--network", "kd-resnet18-112", "--input-size", "96"]
    arguments += ["--calibration", str(tmp_path / "cal.zip"), "--calibration-method", "minmax"]
    arguments += ["--validate-on", str(tmp_path / "val.zip"), "--threads", "1"]
    # Coloured noise is no face: the drop says nothing here, and what is said about it is tested.
    arguments += ["--max-drop", "90", "--no-mixed", "--output", str(tmp_path / "dist")]
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert "96 pixels (trained at 112)" in result.output
    path = tmp_path / "dist" / "kd-resnet18-112-96px-cpu-int8"
    artifact = load_artifact(path)
    manifest = artifact.manifest
    assert manifest.preprocessing.size == 96
    assert manifest.build.recipe["own_size"] == 112
    said = [w for w in manifest.build.warnings if "trained for crops of 112 pixels" in w]
    assert len(said) == 1
    assert "MAE of FP32 on val.zip" in said[0]
    assert "degrees at 112" in said[0]
    assert "at 96" in said[0]
    # The device sees crops of the size that was built, and its own reference.
    assert golden_crops(artifact).shape[1:] == (96, 96, 3)
    with open_engine("openvino", artifact.engine_path, threads=1) as engine:
        assert engine.input_size == 96
        assert verify_golden(artifact, engine) < manifest.golden.tolerance_degrees
    with open_artifact(path, threads=1) as tested, open_reference(tested, threads=1) as reference:
        assert reference.engine.input_size == tested.preprocessing.size == 96
