"""A network at another input size, from the command line to the device's own checks."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner

from edgehp.artifact import golden_crops, load_artifact, verify_golden
from edgehp.artifact.open import open_artifact, open_reference
from edgehp.cli.build import command
from edgehp.engines import open_engine
from tests import build_parts


def test_a_network_of_64_pixels_at_48(tmp_path: Path) -> None:
    network = build_parts.checkpoint(tmp_path / "net.safetensors")
    build_parts.faces(tmp_path / "cal.zip", 66, 1)
    build_parts.faces(tmp_path / "val.zip", 64, 2, labels=True)
    arguments = ["--target", "cpu", "--network", str(network), "--input-size", "48"]
    arguments += ["--calibration", str(tmp_path / "cal.zip"), "--calibration-method", "minmax"]
    arguments += ["--validate-on", str(tmp_path / "val.zip"), "--threads", "1"]
    arguments += ["--max-drop", "90", "--no-mixed", "--output", str(tmp_path / "dist")]
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert "48 pixels (trained at 64)" in result.output
    path = tmp_path / "dist" / "kd-resnet18-48px-cpu-int8"
    artifact = load_artifact(path)
    manifest = artifact.manifest
    assert manifest.preprocessing.size == 48
    assert manifest.build.recipe["own_size"] == 64
    words = "trained for crops of 64 pixels and run at 48 without training"
    assert any(words in w for w in manifest.build.warnings)
    # Coloured noise is no face, and a random network no network: said, whatever the drop is.
    assert any("FP32 itself errs by" in w for w in manifest.build.warnings)
    # The device sees crops of the size that was built, and its own reference.
    assert golden_crops(artifact).shape[1:] == (48, 48, 3)
    with open_engine("openvino", artifact.engine_path, threads=1) as engine:
        assert engine.input_size == 48
        assert verify_golden(artifact, engine) < manifest.golden.tolerance_degrees
    with open_artifact(path, threads=1) as tested, open_reference(tested, threads=1) as reference:
        assert reference.engine.input_size == tested.preprocessing.size == 48
