"""Teachers described by TOML, ensembles over box offsets, and label files that survive a kill."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from edgehp import pose
from edgehp.cli.label import command as label_command
from edgehp.datasets import open_dataset
from edgehp.datasets.base import Dataset
from edgehp.errors import CheckpointError, DataError
from edgehp.networks.description import Description, Grid, load_description
from edgehp.training.labelling import Teacher, ensemble_label, label_samples, read_labels
from tests.faces import teacher_toml, write_faces


@pytest.fixture
def faces(tmp_path: Path, rng: np.random.Generator) -> Dataset:
    return write_faces(tmp_path / "faces", 12, rng)


def labels_of(data: Dataset, *teachers: Teacher) -> np.ndarray:
    return np.stack([ensemble_label(s, teachers).angles for s in data.samples])


def truth_of(data: Dataset) -> np.ndarray:
    return np.stack([s.angles for s in data.samples])


@pytest.mark.parametrize(
    ("colour", "order", "convention"),
    [
        ("BGR", '["pitch", "yaw", "roll"]', "aflw2000"),
        ("RGB", '["yaw", "pitch", "roll"]', "aflw2000"),
        ("RGB", '["pitch", "yaw", "roll"]', "kd-resnet"),
    ],
)
def test_a_teacher_reads_the_pose_and_a_swapped_channel_order_or_sign_shows(
    tmp_path: Path, faces: Dataset, colour: str, order: str, convention: str
) -> None:
    teacher = Teacher(load_description(teacher_toml(tmp_path / "right")))
    np.testing.assert_allclose(labels_of(faces, teacher), truth_of(faces), atol=1.0)
    path = teacher_toml(tmp_path / "t", colour=colour, order=order, convention=convention)
    error = np.abs(labels_of(faces, Teacher(load_description(path))) - truth_of(faces))
    assert error.max() > 10


def test_a_grid_averages_over_the_offsets_of_the_box(tmp_path: Path, faces: Dataset) -> None:
    spec = load_description(teacher_toml(tmp_path / "t"))
    sample = faces.samples[0]
    alone = Teacher(spec)
    label = ensemble_label(sample, [Teacher(spec.with_grid(Grid(3, 0.1)))])
    views = [
        pose.euler_from_matrix(alone.rotations(sample.load(), sample.box.moved(dx, dy)))[0]
        for dx in (-0.1, 0, 0.1)
        for dy in (-0.1, 0, 0.1)
    ]
    np.testing.assert_allclose(label.angles, np.mean(views, axis=0), atol=0.05)
    assert label.spread > ensemble_label(sample, [alone]).spread + 0.5


def test_a_mirrored_view_is_mirrored_back(tmp_path: Path, faces: Dataset) -> None:
    spec = load_description(teacher_toml(tmp_path / "t")).with_grid(Grid(1, 0.05, True))
    views = Teacher(spec).rotations(faces.samples[0].load(), faces.samples[0].box)
    # The colours say the same in the mirror, so yaw and roll come back with the other sign.
    straight, mirrored = pose.euler_from_matrix(views)
    np.testing.assert_allclose(mirrored, straight * [1, -1, -1], atol=0.5)


def test_weights_are_per_teacher_not_per_view(tmp_path: Path, faces: Dataset) -> None:
    one = load_description(teacher_toml(tmp_path / "a", "one"))
    two = load_description(teacher_toml(tmp_path / "b", "two", offset=(0, 9, 0)))
    sample = faces.samples[0]
    teachers = [Teacher(one.with_grid(Grid(5, 0.0))), Teacher(two)]
    label = ensemble_label(sample, teachers)
    alone = ensemble_label(sample, teachers[:1]).angles
    assert label.angles[1] - alone[1] == pytest.approx(4.5, abs=0.1)
    assert label.teachers.shape == (2, 4)


def run(data: Dataset, out: Path, *teachers: Description) -> int:
    return list(label_samples(data.samples, teachers, out))[-1]


def test_labels_are_written_and_read_back(tmp_path: Path, faces: Dataset) -> None:
    teacher = load_description(teacher_toml(tmp_path / "t"))
    assert run(faces, tmp_path / "labels", teacher) == 12
    labels = read_labels([tmp_path / "labels"])
    sample = faces.samples[3]
    expected = ensemble_label(sample, [Teacher(teacher)])
    np.testing.assert_allclose(labels[sample.name].matrix, expected.matrix, atol=1e-5)
    np.testing.assert_allclose(labels[sample.name].teachers, expected.teachers, atol=1e-5)
    with pytest.raises(DataError, match=r"line 2: .* is labelled twice"):
        read_labels([tmp_path / "labels", tmp_path / "labels"])


def test_a_killed_run_goes_on_where_it_stopped(tmp_path: Path, faces: Dataset) -> None:
    teacher = load_description(teacher_toml(tmp_path / "t"))
    run(faces, tmp_path / "labels", teacher)
    path = tmp_path / "labels" / "labels.csv"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])  # the last line is cut in the middle
    assert run(faces, tmp_path / "labels", teacher) == 12
    assert path.read_bytes() == whole


def test_another_ensemble_or_depth_does_not_mix_into_a_folder(
    tmp_path: Path, faces: Dataset
) -> None:
    spec, out = load_description(teacher_toml(tmp_path / "t")), tmp_path / "labels"
    run(faces.with_depth(10), out, spec)
    assert json.loads((out / "ensemble.json").read_text())[0]["photo_depth"] == [10]
    with pytest.raises(DataError, match=r"another ensemble or --photo-depth .*\nhint: use a new"):
        run(faces.with_depth(12), out, spec)
    with pytest.raises(DataError, match="another ensemble"):
        run(faces.with_depth(10), out, spec.with_grid(Grid(3)))


def test_a_damaged_line_in_the_middle_is_not_passed_over(tmp_path: Path, faces: Dataset) -> None:
    teacher = load_description(teacher_toml(tmp_path / "t"))
    run(faces, tmp_path / "labels", teacher)
    path = tmp_path / "labels" / "labels.csv"
    lines = path.read_text().splitlines()
    lines[4] = lines[4].replace(",", ",x", 1)
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match="line 5"):
        run(faces, tmp_path / "labels", teacher)
    with pytest.raises(DataError, match="line 5"):
        read_labels([tmp_path / "labels"])


def test_the_command_labels_counts_and_lists_skips(
    tmp_path: Path, faces: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "faces"
    damaged = folder / "00004.png"
    damaged.write_bytes(damaged.read_bytes()[:40])
    toml = teacher_toml(tmp_path / "t")
    arguments = [str(folder), "--teacher", str(toml), "--output", str(tmp_path / "labels")]
    refused = CliRunner().invoke(label_command, arguments)
    assert isinstance(refused.exception, DataError)
    assert "00004.png" in str(refused.exception)
    result = CliRunner().invoke(label_command, [*arguments, "--skip-bad"])
    assert result.exit_code == 0, result.output
    assert "11 photos labelled" in result.stdout
    assert caplog.text.count("skipped 00004.png") == 1
    assert "1 photos skipped" in result.stderr
    ensemble = json.loads((tmp_path / "labels" / "ensemble.json").read_text())
    assert [t["name"] for t in ensemble] == ["colour"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('kind = "euler"', 'kind = "eulers"'), "eulers"),
        (('["pitch", "yaw", "roll"]', '["pitch", "yaw", "yaw"]'), "no order"),
        (('convention = "aflw2000"', 'convention = "AFLW"'), "unknown pose convention"),
        (("[input]", "weight = -1\n[input]"), "'weight' is -1; .* > 0"),
        (("[output]", "[grid]\nsize = 2\n[output]"), "odd"),
        (("[output]", "[grid]\nsize = 15\nstep = 0.5\n[output]"), "off the face"),
    ],
)
def test_descriptions_that_are_wrong_say_where(
    tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    path = teacher_toml(tmp_path)
    path.write_text(path.read_text().replace(*change))
    with pytest.raises(DataError, match=message) as caught:
        load_description(path)
    assert "colour.toml" in str(caught.value)


def test_networks_that_are_not_as_described_are_refused(tmp_path: Path) -> None:
    path = teacher_toml(tmp_path)
    text = path.read_text()
    path.write_text(text.replace("[input]", '[input]\nname = "images"'))
    with pytest.raises(CheckpointError, match="no input 'images', found x"):
        Teacher(load_description(path))
    (tmp_path / "colour.onnx").write_bytes(b"not a network")
    path.write_text(text)
    with pytest.raises(CheckpointError, match=r"colour\.onnx"):
        Teacher(load_description(path))


@pytest.mark.parametrize(
    ("description", "grid", "every", "mae", "geodesic"),
    [
        ("opentrack.toml", Grid(1), 1, 3.24, 5.40),
        ("opentrack.toml", Grid(3, 0.05), 4, 3.12, 4.99),
        ("fsanet.toml", Grid(1), 4, 4.74, None),  # of all 593: 4.57
    ],
)
def test_the_given_teachers_reproduce_their_figures(
    repo: Path,
    shared_data: Path,
    shared_teachers: Path,
    description: str,
    grid: Grid,
    every: int,
    mae: float,
    geodesic: float | None,
) -> None:
    data = open_dataset(
        "aflw2000", shared_data / "AFLW2000", boxes=shared_data / "boxes" / "AFLW2000.json"
    )
    assert len(data) == 593
    spec = load_description(repo / "docs" / "teachers" / description, shared_teachers)
    teacher = Teacher(spec.with_grid(grid), threads=2)
    samples = data.samples[::every]
    matrices = np.stack([ensemble_label(s, [teacher]).matrix for s in samples])
    errors = pose.angle_errors(pose.euler_from_matrix(matrices), truth_of(data)[::every])
    assert errors.mean() == pytest.approx(mae, abs=0.02)
    if geodesic is not None:
        distance = pose.geodesic_degrees(matrices, np.stack([s.matrix for s in samples]))
        assert distance.mean() == pytest.approx(geodesic, abs=0.02)
