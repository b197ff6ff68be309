"""`edgehp describe`: networks of known convention must come out as what they are."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from click.testing import CliRunner

from edgehp import pose
from edgehp.cli.describe import command
from edgehp.crop import IMAGENET_MEAN, IMAGENET_STD
from edgehp.errors import CheckpointError, DataError, UsageError
from edgehp.networks.describe import read_off, try_all
from edgehp.networks.described import deployed_graph
from edgehp.networks.description import load_description
from edgehp.networks.simplify import run_graph
from tests.dataset_trees import aflw2000_tree
from tests.faces import write_faces
from tests.pose_graphs import graph_of, pose_graph
from tests.test_described import answer_net

SIZE = 16
MEAN, STD = np.array(IMAGENET_MEAN), np.array(IMAGENET_STD)


def levels_net(
    path: Path,
    body: str,
    outputs: dict[str, int],
    constants: dict[str, npt.ArrayLike],
    *,
    rows: int = 1,
    bgr: bool = False,
) -> Path:
    """A network for ImageNet's normalisation whose `body` reads the levels of a crop minus 128.

    They are ``v`` [N, 3 * rows]: of each band of rows from above its red, green and blue.
    """
    order, band = [2, 1, 0] if bgr else [0, 1, 2], SIZE // rows
    model = graph_of(
        f"""
        levels (float[n, 3, {SIZE}, {SIZE}] x)
        => ({", ".join(f"float[n, {width}] {name}" for name, width in outputs.items())}) {{
            p = AveragePool <kernel_shape = [{band}, {SIZE}], strides = [{band}, 1]> (x)
            s = Mul (p, std)
            c = Add (s, rest)
            o = Gather <axis = 1> (c, order)
            t = Transpose <perm = [0, 2, 1, 3]> (o)
            v = Reshape (t, flat)
            {body}
        }}""",
        {
            "std": STD[order].reshape(1, 3, 1, 1),
            "rest": (MEAN[order] - 128).reshape(1, 3, 1, 1),
            "order": order,
            "flat": [0, -1],
            **constants,
        },
    )
    onnx.save(model, str(path))
    return path


def euler_net(path: Path, order: list[int], factors: list[float], *, bgr: bool = True) -> Path:
    """Answers (pitch, yaw, roll) that are a photo's colour, in `order` and times `factors`."""
    weight = np.zeros((3, 3))
    for place, angle in enumerate(order):
        weight[angle, place] = factors[angle]
    return levels_net(path, "pose = MatMul (v, w)", {"pose": 3}, {"w": weight}, bgr=bgr)


def crops_of(values: np.ndarray, scale: float = 1.0) -> np.ndarray:
    """Crops whose bands have the levels 128 + scale * values [N, rows, 3]."""
    level = np.clip(np.round(128 + scale * values), 0, 255).astype(np.uint8)
    return np.repeat(np.repeat(level[:, :, None], SIZE, 2), SIZE // values.shape[1], 1)


def some_poses(count: int = 24) -> np.ndarray:
    return np.random.default_rng(3).uniform(-60, 60, (count, 3))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """AFLW2000-3D's layout, of faces whose colour is their pose."""
    folder = tmp_path_factory.mktemp("photos")
    data = write_faces(folder / "faces", 16, np.random.default_rng(5))
    return aflw2000_tree(folder / "AFLW2000", data.samples)


def described(*arguments: object) -> str:
    result = CliRunner().invoke(command, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize(
    ("order", "factors", "convention", "signs"),
    [
        ([0, 1, 2], [1, 1, 1], "aflw2000", (1, 1, 1)),
        ([1, 0, 2], [-1, 1, 1], "biwi", (-1, 1, 1)),
        ([2, 0, 1], [1, -1, -1], "aflw2000", (1, -1, -1)),
        ([1, 2, 0], [np.pi / 180, np.pi / 180, -np.pi / 180], "aflw", (1, 1, -1)),
    ],
)
def test_photos_tell_order_signs_and_unit(
    photos: Path,
    tmp_path: Path,
    order: list[int],
    factors: list[float],
    convention: str,
    signs: tuple[int, int, int],
) -> None:
    net = euler_net(tmp_path / "net.onnx", order, factors)
    toml = tmp_path / "net.toml"
    said = described(net, "--photos", photos, "-o", toml)
    found = load_description(toml)
    assert found.output.order == tuple(np.array(["pitch", "yaw", "roll"])[order])
    assert (found.output.convention, found.output.signs) == (convention, signs)
    assert found.input.colour == "BGR"
    assert found.input.mean == IMAGENET_MEAN[::-1]
    # The five best, one that reads it otherwise, and what all are held against.
    rows = [line.split() for line in said.splitlines() if "pose euler" in line]
    errors = [float(r[0]) for r in rows]
    assert len(rows) == 6
    assert errors[:5] == sorted(errors[:5])
    assert errors[0] < 2 < errors[5]
    assert "One constant answer" in toml.read_text()
    # And what was written is what gets built.
    model, _ = deployed_graph(found, simple=False)
    angles = some_poses()
    (built,) = run_graph(model, crops_of(angles[:, None]), ["angles"])
    assert np.abs(built - angles).max() < 0.51


def test_the_spelling_of_validate_is_taken(photos: Path, tmp_path: Path) -> None:
    net = euler_net(tmp_path / "net.onnx", [0, 1, 2], [1, 1, 1])
    one = described(net, "--photos", photos)
    boxes = photos / "AFLW2000.json"
    assert one == described(net, "--dataset", "aflw2000", "--data-root", photos, "--boxes", boxes)


def _quaternion(path: Path) -> tuple[Path, np.ndarray, np.ndarray, dict[str, object]]:
    """One of w, -x, -y, z."""
    angles = some_poses()
    matrices = pose.matrix_from_euler(angles)
    w = np.sqrt(1 + np.trace(matrices, axis1=1, axis2=2)) / 2
    m = matrices
    v = np.stack([m[:, 2, 1] - m[:, 1, 2], m[:, 0, 2] - m[:, 2, 0], m[:, 1, 0] - m[:, 0, 1]], 1)
    v = v / (4 * w[:, None])
    body = """
        q = Mul (v, scale)
        l = ReduceSumSquare <axes = [1], keepdims = 1> (q)
        ww = Sub (one, l)
        wq = Sqrt (ww)
        sq = Mul (q, signs)
        pose = Concat <axis = 1> (wq, sq)"""
    constants = {"scale": [[0.01]], "one": [[1.0]], "signs": [[-1.0, -1.0, 1.0]]}
    net = levels_net(path, body, {"pose": 4}, constants)
    expected = {"kind": "quaternion", "order": ("w", "x", "y", "z"), "signs": (-1, -1, 1)}
    return net, crops_of(v[:, None], 100), angles, expected | {"transposed": False}


def _sixd(path: Path) -> tuple[Path, np.ndarray, np.ndarray, dict[str, object]]:
    """The first two columns, in the axes of 6DRepNet but not transposed."""
    angles = some_poses()
    s = np.diag([1, -1, -1])
    matrices = s @ pose.matrix_from_euler(angles) @ s
    net = levels_net(path, "pose = Identity (v)", {"pose": 6}, {}, rows=2)
    columns = np.stack([matrices[:, :, 0], matrices[:, :, 1]], 1)
    expected = {"kind": "sixd", "signs": (1, -1, -1), "transposed": False}
    return net, crops_of(columns, 100), angles, expected


def _bins(path: Path) -> tuple[Path, np.ndarray, np.ndarray, dict[str, object]]:
    """Hopenet's: 66 of 3 degrees from -99 on, as yaw, pitch and roll; its yaw turned."""
    constants = {"centres": [np.arange(66) * 3.0 - 99], "width": [[-0.05]]}
    body = ""
    for name, angle, sign in (("yaw", 1, -1), ("pitch", 0, 1), ("roll", 2, 1)):
        constants |= {f"{name}_i": [angle], f"{name}_s": [[float(sign)]]}
        body += f"""
            {name}_a = Gather <axis = 1> (v, {name}_i)
            {name}_b = Mul ({name}_a, {name}_s)
            {name}_d = Sub ({name}_b, centres)
            {name}_q = Mul ({name}_d, {name}_d)
            {name} = Mul ({name}_q, width)"""
    net = levels_net(path, body, dict.fromkeys(("yaw", "pitch", "roll"), 66), constants)
    expected = {"kind": "bins", "order": ("yaw", "pitch", "roll"), "signs": (1, -1, 1)}
    angles = some_poses()
    return net, crops_of(angles[:, None]), angles, expected | {"first": -99.0, "last": 96.0}


@pytest.mark.parametrize("make", [_quaternion, _sixd, _bins])
def test_every_kind_comes_out_as_it_is(make, tmp_path: Path) -> None:
    net, crops, angles, expected = make(tmp_path / "net.onnx")
    found = read_off(net)
    trials = try_all(found, net, crops, angles)
    best = trials.found[0]
    assert {k: getattr(best.output, k) for k in expected} == expected
    assert (best.input.colour, best.input.mean) == ("RGB", IMAGENET_MEAN)
    assert best.error < 0.6
    assert trials.clear
    assert trials.other_decoding.error > 1


def test_without_photos_it_says_what_is_missing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = {"box": np.zeros(5), "euler": np.zeros(3), "quat": np.array([0.0, 0, 0, 1])}
    net = answer_net(tmp_path / "net.onnx", values, nhwc=True)
    text = described(net)
    (tmp_path / "net.toml").write_text(text)
    found = load_description(tmp_path / "net.toml")
    assert (found.input.name, found.input.size, found.input.layout) == ("x", SIZE, "NHWC")
    assert (found.output.kind, found.output.names) == ("quaternion", ("quat",))
    assert "box [N, 5]" in text
    assert "Could be the pose too: euler (euler)" in text
    marked = {line.split(" =")[0] for line in text.splitlines() if "# fill in" in line}
    assert marked >= {"licence", "colour", "mean", "std", "box_rule", "box_scale", "order"}
    assert not marked & {"size", "layout", "name"}
    # Whoever builds with it as it is hears of each.
    assert all(name in caplog.text for name in marked)


def test_a_constant_network_is_said_to_be_none(photos: Path, tmp_path: Path, caplog) -> None:
    net = answer_net(tmp_path / "net.onnx", {"a": np.array([0.0, 0, 0, 1])}, channels=1)
    text = described(net, "--photos", photos)
    assert "not clearly better than one constant answer" in text
    assert "not clearly better than one constant answer" in caplog.text
    (tmp_path / "net.toml").write_text(text)
    assert load_description(tmp_path / "net.toml").input.colour == "GREY"


def test_names_of_a_file_cannot_break_the_description(tmp_path: Path) -> None:
    name = 'a"\n[x]\\\x7fé'
    net = answer_net(tmp_path / 'n"e t.onnx', {name: np.zeros(3), "b": np.zeros((3, 40))})
    text = described(net)
    (tmp_path / "net.toml").write_text(text, encoding="utf-8")
    found = load_description(tmp_path / "net.toml")
    assert (found.output.kind, found.output.names) == ("bins", ("b",))
    net = answer_net(tmp_path / 'n"e t.onnx', {name: np.zeros(3)})
    (tmp_path / "net.toml").write_text(described(net), encoding="utf-8")
    assert load_description(tmp_path / "net.toml").output.names == (name,)


def test_what_is_no_pose_network_is_refused(photos: Path, tmp_path: Path) -> None:
    own = pose_graph(tmp_path / "own.onnx")
    with pytest.raises(CheckpointError, match="edgehp's own"):
        read_off(own)
    features = answer_net(tmp_path / "features.onnx", {"f": np.zeros(512)})
    with pytest.raises(CheckpointError, match=r"f \[N, 512\]; expected 3 \(angles\)"):
        read_off(features)
    with pytest.raises(CheckpointError, match="expected 32 x 32 pixels"):
        read_off(answer_net(tmp_path / "net.onnx", {"f": np.zeros(3)}), 32)
    nan = answer_net(tmp_path / "nan.onnx", {"f": np.full(3, np.nan)})
    with pytest.raises(CheckpointError, match="not finite"):
        described(nan, "--photos", photos)


def test_a_description_that_was_corrected_is_not_written_over(tmp_path: Path) -> None:
    net, toml = answer_net(tmp_path / "net.onnx", {"f": np.zeros(3)}), tmp_path / "net.toml"
    described(net, "-o", toml)
    as_written = toml.read_text()
    described(net, "-o", toml)
    assert toml.read_text() == as_written
    for text in (as_written.replace("square", "stretch"), as_written + "\n", ""):
        toml.write_text(text)
        with pytest.raises(UsageError, match=r"not as 'edgehp describe' wrote it.*\nhint:"):
            described(net, "-o", toml)
        assert toml.read_text() == text


def test_a_free_size_is_asked_for(tmp_path: Path) -> None:
    net = answer_net(tmp_path / "net.onnx", {"f": np.zeros(3)})
    model = onnx.load(str(net))
    for d in model.graph.input[0].type.tensor_type.shape.dim[2:]:
        d.dim_param = "side"
    onnx.save(model, str(net))
    assert "size = 224  # fill in" in described(net)
    assert "size = 96  # fill in" in described(net, "--input-size", 96)


def test_photos_must_be_some_and_be_named(tmp_path: Path, photos: Path) -> None:
    net = answer_net(tmp_path / "net.onnx", {"f": np.zeros(3)})
    data = write_faces(tmp_path / "few", 3, np.random.default_rng(1))
    with pytest.raises(DataError, match="3 photos of known pose, expected 8"):
        described(net, "--photos", aflw2000_tree(tmp_path / "tree", data.samples))
    result = CliRunner().invoke(command, [str(net), "--boxes", str(photos / "AFLW2000.json")])
    assert "--photos where they are" in str(result.exception)


def test_only_an_unchanged_description_is_written_over(tmp_path: Path) -> None:
    net, toml, pipe = answer_net(tmp_path / "net.onnx", {"f": np.zeros(3)}), tmp_path / "a", "p"
    described(net, "-o", toml)
    described(net, "-o", toml)
    text = toml.read_text() + "# mine\n"
    toml.write_text(text)
    # Nobody writes to the pipe: whoever reads it would wait.
    os.mkfifo(tmp_path / pipe)
    for output in (toml, tmp_path / pipe):
        with pytest.raises(UsageError, match="may hold corrections\nhint: "):
            described(net, "-o", output)
    assert toml.read_text() == text
