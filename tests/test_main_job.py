"""The main job on published layouts, without any conversion step in between."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from edgehp.cli.build import command as build_command
from edgehp.cli.validate import command as validate_command
from edgehp.datasets.faces import read_rendered
from edgehp.networks.bundled import resolve_network
from tests.dataset_trees import aflw2000_tree, biwi_tree

torch = pytest.importorskip("torch", reason="a published checkpoint is a torch file")

NETWORK = "kd-resnet18-112"
# Accuracy of the bundled network on AFLW2000's development photos, with room for rounding.
EXPECTED_MAE = 3.7


def invoke(command, *arguments: object) -> dict:
    result = CliRunner().invoke(command, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, (result.output, result.exception)
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled network as a checkpoint in the authors' layout: bare keys, no specification."""
    path = tmp_path_factory.mktemp("published") / "kd_resnet18.pth"
    weights = resolve_network("kd-resnet18").weights
    state = {k: torch.from_numpy(np.array(v)) for k, v in weights.items()}
    assert {k.split(".")[0] for k in state} == {"encoder_net", "head_net"}
    torch.save({"state_dict": state}, path)
    return path


def test_a_published_checkpoint_goes_through_build_and_validate(
    tmp_path: Path, published: Path, shared_data: Path
) -> None:
    built = invoke(
        build_command,
        *("--network", published, "--target", "cpu", "--precision", "fp32"),
        *("--output", tmp_path),
    )
    artifact = tmp_path / "kd-resnet18-cpu-fp32"
    # The authors' crop, not that of edgehp's own networks.
    assert built["manifest"]["preprocessing"]["spec"]["box_rule"] == "stretch"
    report = invoke(
        validate_command,
        *(artifact, "--dataset", "aflw2000", "--data-root", shared_data / "AFLW2000"),
        *("--boxes", shared_data / "boxes" / "AFLW2000.json", "--no-robustness"),
        *("--limit", 60),
    )
    assert report["protocol"]["frames"] == 60
    # The bundled weights learnt square crops; stretched ones cost them some accuracy.
    assert _mae(report) < 8


def test_the_bundled_network_keeps_its_accuracy_on_photos(shared_data: Path) -> None:
    report = invoke(
        validate_command,
        *("--network", NETWORK, "--dataset", "aflw2000", "--no-robustness"),
        *("--data-root", shared_data / "AFLW2000"),
        *("--boxes", shared_data / "boxes" / "AFLW2000.json"),
    )
    assert _mae(report) < EXPECTED_MAE


def test_biwi_layout_gives_the_error_known_from_the_same_heads(tmp_path: Path, repo: Path) -> None:
    pytest.importorskip("scipy", reason="scipy writes the .mat files")
    heads = read_rendered(repo / "calibration" / "rendered-validation.zip").samples[:48]
    biwi_tree(tmp_path / "hpdb", heads)
    aflw2000_tree(tmp_path / "aflw", heads)
    biwi = invoke(
        validate_command,
        *("--network", NETWORK, "--dataset", "biwi", "--data-root", tmp_path / "hpdb"),
        "--no-robustness",
    )
    aflw = invoke(
        validate_command,
        *("--network", NETWORK, "--dataset", "aflw2000", "--data-root", tmp_path / "aflw"),
        "--no-robustness",
    )
    # The same 48 heads, written with other signs, orders and units: the error must not move.
    assert _mae(biwi) == pytest.approx(_mae(aflw), abs=0.35)
    assert _mae(biwi) < 8


def _mae(report: dict) -> float:
    return float(report["reference_accuracy"]["overall"]["mae_mean"])
