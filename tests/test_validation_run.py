"""Whole validations: networks whose error is known, on data sets in their exact layouts."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from edgehp.artifact.manifest import EngineRecord, Golden, PrecisionRecord, TargetRecord
from edgehp.artifact.open import OpenedNetwork
from edgehp.artifact.write import ArtifactWriter
from edgehp.cli.main import main
from edgehp.crop import Box
from edgehp.datasets import open_dataset
from edgehp.datasets.base import spaced
from edgehp.datasets.pose_mat import read_aflw2000
from edgehp.engines import open_engine
from edgehp.errors import DataError, UsageError
from edgehp.pose import matrix_from_euler
from edgehp.validation.run import Detector, Settings, validate
from tests.dataset_trees import biwi_frame, encoded, write
from tests.helpers import a_manifest
from tests.pose_graphs import SPEC, colour_photo, pose_graph

# Whole degrees that a pixel can hold.
ANGLES = [(0, 0, 0), (10, 25, -5), (-20, -45, 12), (5, 70, 3), (-8, -88, 20), (30, 15, -40)]


def biwi_tree(root: Path, angles=ANGLES, frames: int = 4) -> Path:
    """BIWI's layout: one sequence for each pose; the photo's colour tells the pose."""
    boxes = {}
    for i, pose in enumerate(angles):
        for k in range(frames):
            name = f"{i + 1:02d}/frame_{k + 3:05d}"
            biwi_frame(root, name, matrix_from_euler(pose), colour_photo(pose))
            entry = {"bbox": [20, 15, 70, 75], "type": "test" if i % 2 else "train"}
            boxes[f"{name}_rgb.png"] = [entry]
    (root / "BIWI.json").write_text(json.dumps(boxes))
    return root


@pytest.fixture(scope="module")
def biwi(tmp_path_factory) -> Path:
    return biwi_tree(tmp_path_factory.mktemp("data") / "biwi")


def contender(path: Path, name: str = "net", **graph) -> OpenedNetwork:
    engine = open_engine("onnxruntime", pose_graph(path, **graph), threads=1)
    return OpenedNetwork(engine, name, "d1", SPEC.preprocessing)


def run(
    root: Path,
    tmp_path: Path,
    artifact: dict | None = None,
    reference: dict | None = None,
    detector: Detector | None = None,
    **settings,
):
    other = None
    if artifact is not None:
        other = contender(tmp_path / "artifact.onnx", "int8", **artifact)
    return validate(
        contender(tmp_path / "reference.onnx", "reference", **(reference or {})),
        other,
        open_dataset("biwi", root),
        Settings(**{"robustness": False, "resamples": 500, **settings}),
        detector=detector,
    )


def test_the_drop_is_paired_exact_and_split_by_angle_and_band(biwi, tmp_path):
    found = run(
        biwi, tmp_path, reference={"offset": (1, 1, 1)}, artifact={"offset": (1.5, 1, 1.25)}
    )
    drop = found.drop
    assert drop.overall.value == pytest.approx(0.25, abs=1e-4)
    assert [a.value for a in drop.angles] == pytest.approx([0.5, 0, 0.25], abs=1e-4)
    # The same on every frame, so chance has no part in it.
    assert drop.overall.high - drop.overall.low < 1e-3
    assert sum(b.frames for b in drop.bands) == 24
    assert all(b.drop.value == pytest.approx(0.25, abs=1e-4) for b in drop.bands)
    assert drop.mean_difference_overall == pytest.approx(0.25, abs=1e-4)
    assert drop.largest_difference == pytest.approx(0.5, abs=1e-3)
    # A difference is seen even where the drop is zero.
    one, other = ({"offset": (o,) * 3, "spread": s} for o, s in ((1, 3.0), (-1, 3.5)))
    found = run(biwi, tmp_path, reference=one, artifact=other).drop
    assert found.overall.value == pytest.approx(0, abs=1e-3)
    assert found.mean_difference_overall == pytest.approx(2, abs=1e-3)
    assert found.spread_difference_overall == pytest.approx(0.5, abs=1e-5)


def test_both_engines_see_the_same_crops_batch_by_batch(biwi, tmp_path):
    seen: dict[str, list[np.ndarray]] = {"a": [], "b": []}

    class Watch:
        def __init__(self, inner, name):
            self.inner, self.name = inner, name
            self.info, self.input_size = inner.info, inner.input_size

        def infer(self, crops):
            seen[self.name].append(crops.copy())
            return self.inner.infer(crops)

    engine = contender(tmp_path / "n.onnx").engine
    data = open_dataset("biwi", biwi)
    a, b = (OpenedNetwork(Watch(engine, n), n, None, SPEC.preprocessing) for n in "ab")
    validate(a, b, data, Settings(batch=7, resamples=200))
    assert [len(c) for c in seen["a"]] == [7] * 12 + [3] * 4
    assert all(np.array_equal(x, y) for x, y in zip(seen["a"], seen["b"], strict=True))


def test_the_result_does_not_depend_on_batch_or_threads(biwi, tmp_path):
    a = run(biwi, tmp_path, {"offset": (1, 0, 0)}, batch=1, workers=1, robustness=True)
    b = run(biwi, tmp_path, {"offset": (1, 0, 0)}, batch=24, workers=3, robustness=True)
    assert a.drop == b.drop and a.robustness == b.robustness
    assert a.protocol == b.protocol
    assert [c.name for c in a.robustness] == ["dark", "blurred", "near-infrared"]
    # A network that reads colours fails in the dark, for which the paired drop does not care.
    assert a.robustness[0].reference_mae > 20
    assert a.robustness[0].mean_difference == pytest.approx(1 / 3, abs=1e-3)


def test_limit_takes_frames_from_everywhere_and_is_in_the_protocol(biwi, tmp_path):
    found = run(biwi, tmp_path, limit=6, worst=24)
    names = {w.name.split("/")[0] for w in found.reference_accuracy.worst}
    assert names == {f"{i:02d}" for i in range(1, 7)}
    assert found.protocol["frames"] == 6 and found.protocol["limit"] == 6


def test_misses_of_a_detector_are_counted_and_named(biwi, tmp_path):
    def find(photo, sample):
        return None if sample.name.startswith("02/") else Box(10, 10, 80, 80)

    found = run(biwi, tmp_path, detector=Detector(find, "a test"))
    assert found.protocol["detector_misses"] == 4 and found.protocol["frames"] == 20
    assert found.protocol["boxes"] == "a test" and len(found.missed) == 4
    listed = run(biwi, tmp_path)
    assert found.protocol["sha256"] != listed.protocol["sha256"]
    with pytest.raises(DataError, match="24 without a detected face"):
        run(biwi, tmp_path, detector=Detector(lambda *_: None))


def test_a_damaged_photo_stops_or_is_listed(biwi, tmp_path):
    root = biwi_tree(tmp_path / "biwi", frames=2)
    bad = root / "03" / "frame_00004_rgb.png"
    bad.write_bytes(bad.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"frame_00004_rgb\.png"):
        run(root, tmp_path)
    found = run(root, tmp_path, skip_bad=True)
    assert [s["name"] for s in found.skipped] == ["03/frame_00004_rgb.png"]
    assert found.protocol["frames"] == 11 and found.protocol["photos_skipped"] == 1


def test_an_engine_of_another_input_size_is_refused(biwi, tmp_path):
    small = contender(tmp_path / "small.onnx", size=32)
    with pytest.raises(UsageError, match=r"32 pixels.*48"):
        validate(small, None, open_dataset("biwi", biwi))


# --- reports -------------------------------------------------------------------------------------


def test_the_report_is_strict_json_also_with_unbounded_intervals(tmp_path):
    root = biwi_tree(tmp_path / "biwi", angles=[(1, 2, 3)])
    drop = run(root, tmp_path, {"offset": (1, 1, 1)}).to_dict()["drop"]["overall"]
    assert (drop["low"], drop["high"], drop["units"]) == (None, None, 1)


# --- command line ---------------------------------------------------------------------------------


def cli(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["validate", *map(str, arguments)])
    return int(caught.value.code or 0)


def test_a_float_network_on_biwi_by_the_command_line(biwi, tmp_path, capsys):
    graph = pose_graph(tmp_path / "net.onnx", offset=(1.5, -2.0, 0.5))
    report = tmp_path / "reports" / "report.json"  # made where it is missing
    code = cli(
        "--network", graph, "--dataset", "biwi", "--data-root", biwi, "--no-robustness",
        "--threads", 1, "--output", report,
    )  # fmt: skip
    out = capsys.readouterr()
    assert code == 0, out.err
    assert "24 frames" in out.out and "1.500" in out.out and "2.000" in out.out
    values = json.loads(report.read_text())
    assert values["reference_accuracy"]["overall"]["mae"] == pytest.approx([1.5, 2, 0.5], abs=2e-3)
    assert values["artifact"] is None and values["protocol"]["sha256"]
    assert values["protocol"]["convention"] == "biwi"
    assert (values["reference_mae"]["unit"], values["reference_mae"]["units"]) == ("sequence", 6)


def test_photos_of_ones_own_with_labels_are_a_data_set(tmp_path, capsys):
    rows = ["image,x,y,w,h,pitch,yaw,roll"]
    for i, pose in enumerate(ANGLES):
        write(tmp_path / "drive" / f"{i}.png", encoded(colour_photo(pose), ".png"))
        rows.append(",".join(map(str, (f"{i}.png", 20, 15, 50, 60, *pose))))
    write(tmp_path / "drive" / "boxes.csv", "\n".join(rows))
    graph = pose_graph(tmp_path / "net.onnx", offset=(1.5, -2.0, 0.5))
    words = ("--network", graph, "--data-root", tmp_path / "drive", "--no-robustness")
    assert cli(*words) == 2 and "hint: --dataset faces" in capsys.readouterr().err
    assert cli(*words, "--dataset", "faces") == 0
    out = capsys.readouterr().out
    assert "faces: 6 frames" in out and "1.500" in out and "2.000" in out
    write(tmp_path / "drive" / "boxes.csv", "image,x,y,w,h\n0.png,20,15,50,60\n")
    assert cli(*words, "--dataset", "faces") == 1
    assert "in a labels.csv" in capsys.readouterr().err


def test_a_data_set_or_an_artifact_that_is_not_there_is_one_sentence(tmp_path, capsys, monkeypatch):
    graph = pose_graph(tmp_path / "net.onnx")
    common = ("--network", graph, "--dataset", "biwi", "--data-root", tmp_path / "no")
    assert cli(*common) == 1
    assert "not found at" in capsys.readouterr().err
    assert cli(tmp_path, *common) == 2
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    assert cli(*common[2:]) == 1
    assert "edgehp build" in capsys.readouterr().err


@pytest.mark.shared
def test_aflw2000_in_its_layout_with_the_published_boxes(shared_data, tmp_path):
    data = read_aflw2000(shared_data / "AFLW2000")
    still = contender(tmp_path / "n.onnx", constant=(0.0, 0.0, 0.0))
    settings = Settings(limit=60, robustness=False, resamples=200)
    found = validate(still, None, data, settings)
    truth = np.stack([s.angles for s in data.samples])[spaced(593, 60)]
    assert found.reference_accuracy.overall.mae == pytest.approx(np.abs(truth).mean(axis=0))
    assert len(data) == 593


def artifact_of(folder: Path, engine: dict, reference: dict, device: dict | None = None) -> Path:
    """A complete artifact on onnxruntime whose engine and reference read colours."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    golden = Golden("golden.png", ((1.0, 2.0, 3.0),) * 2, ((1.0, 1.0, 1.0),) * 2, 0.5)
    manifest = a_manifest(
        SPEC,
        golden,
        **{
            "name": "colour-reader-cpu-int8",
            "precision": PrecisionRecord("int8", "int8", "engine", {"int8": 1}, ()),
            "engine": EngineRecord(
                "onnxruntime", ("engine.onnx",), {"onnxruntime": "1.0"}, 1, 1, 32, "x86_64"
            ),
            **(device or {}),
        },
    )
    with ArtifactWriter(folder) as writer:
        pose_graph(writer.path / "engine.onnx", **engine)
        pose_graph(writer.path / "reference.onnx", **reference)
        cv2.imwrite(str(writer.path / "golden.png"), np.zeros((96, 48, 3), np.uint8))
        writer.commit(
            manifest, {"engine.onnx": "engine", "reference.onnx": "graph", "golden.png": "golden"}
        )
    return folder


GOOD = ({"offset": (1.05, 1, 1)}, {"offset": (1,) * 3})


def test_an_artifact_passes_the_gate_and_its_report_lies_in_it_or_elsewhere(biwi, tmp_path, capsys):
    folder = artifact_of(tmp_path / "dist" / "a", *GOOD)
    common = (folder, "--dataset", "biwi", "--data-root", biwi)
    assert cli(*common, "--output", tmp_path / "r.json") == 0
    assert not (folder / "reports").exists()
    assert cli(*common) == 0
    out = capsys.readouterr().out
    assert "PASS" in out and "+0.0167" in out and "near-infrared" in out and "6 sequences" in out
    report = folder / "reports" / "validation-biwi.json"
    assert report.read_text() == (tmp_path / "r.json").read_text()
    assert out.splitlines()[-2:] == [f"measured {report}", f"next: edgehp bench {folder}"]
    # Where nothing can be written, the figures are said all the same.
    report.unlink()
    report.parent.rmdir()
    report.parent.touch()
    assert cli(*common) == 0
    found = capsys.readouterr()
    assert "PASS" in found.out and "measured" not in found.out
    assert f"{report} cannot be written: --output takes the report elsewhere" in found.err


def test_a_drop_over_the_gate_ends_with_exit_code_3_after_the_report(
    biwi, tmp_path, capsys, monkeypatch
):
    artifact_of(tmp_path / "dist" / "a", {"offset": (1.6, 1, 1)}, {"offset": (1,) * 3})
    monkeypatch.chdir(tmp_path)  # the newest under dist/
    common = ("--dataset", "biwi", "--data-root", biwi, "--no-robustness")
    assert cli(*common, "--output", "r.json") == 3
    out = capsys.readouterr()
    assert "FAIL" in out.out and "+0.2000" in out.out and "limit of 0.1" in out.out
    values = json.loads(Path("r.json").read_text())
    assert values["gate"]["passed"] is False
    assert cli(*common, "--max-drop", 0.3) == 0


def test_a_report_that_cannot_be_written_is_found_before_anything_is_opened(
    biwi, tmp_path, capsys, monkeypatch
):
    (tmp_path / "file").touch()
    common = ("--network", "nonsense", "--dataset", "biwi", "--data-root", biwi)
    for place in (tmp_path / "file" / "r.json", tmp_path):
        assert cli(*common, "--output", place) == 5
        err = capsys.readouterr().err
        assert "cannot be written" in err and "another --output" in err and "nonsense" not in err
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_disk_that_fills_meanwhile_costs_the_report_but_not_the_figures(
    biwi, tmp_path, capsys, monkeypatch
):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("edgehp.files.write_whole", full)
    folder = artifact_of(tmp_path / "a", *GOOD)
    common = ("--dataset", "biwi", "--data-root", biwi, "--no-robustness")
    assert cli(folder, *common, "--output", tmp_path / "r.json") == 5
    out = capsys.readouterr()
    assert "PASS" in out.out and "+0.0167" in out.out
    assert "No space left" in out.err and "another --output" in out.err


def test_another_reference_or_an_altered_artifact_is_refused(biwi, tmp_path, capsys):
    folder = artifact_of(tmp_path / "dist" / "a", {}, {})
    common = (folder, "--dataset", "biwi", "--data-root", biwi)
    assert cli(*common, "--reference", pose_graph(tmp_path / "other.onnx")) == 4
    assert "not the network" in capsys.readouterr().err
    pose_graph(folder / "engine.onnx", offset=(5, 5, 5))
    assert cli(*common) == 4


def test_an_artifact_of_another_device_is_measured_by_its_graph(biwi, tmp_path, capsys):
    other = {
        "target": TargetRecord("rtx-30", ("8.6",)),
        "engine": EngineRecord(
            "tensorrt-rtx", ("engine.onnx",), {"tensorrt_rtx": "1.7.1"}, 1, 1, 32, "x86_64"
        ),
    }
    folder = artifact_of(tmp_path / "dist" / "a", *GOOD, other)
    common = ("--dataset", "biwi", "--data-root", biwi, "--no-robustness")
    assert cli(folder, *common) in (4, 5)
    capsys.readouterr()
    assert cli(folder, *common, "--emulate") == 0
    out = capsys.readouterr().out
    assert "emulated" in out and "+0.0167" in out
    # Its bytes are checked all the same.
    pose_graph(folder / "engine.onnx", offset=(5, 5, 5))
    assert cli(folder, *common, "--emulate") == 4
    assert cli("--network", tmp_path / "n.onnx", *common, "--emulate") == 2


def test_without_a_data_set_the_shipped_rendered_heads_are_used_and_named(
    tmp_path, capsys, monkeypatch
):
    graph = pose_graph(tmp_path / "net.onnx", constant=(0.0, 0.0, 0.0))
    assert cli("--network", graph, "--no-robustness", "--limit", 6) == 0
    out = capsys.readouterr()
    assert "rendered heads" in out.err and "not of people" in out.err
    assert "rendered: 6 frames" in out.out
    assert cli("--network", graph, "--split", "test") == 2
    monkeypatch.setattr("edgehp.validation.session.resource_dir", lambda name: tmp_path)
    assert cli("--network", graph) == 5
