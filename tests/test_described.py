"""Networks of others: any exporter's ONNX, described by TOML, as deployed graphs and artifacts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import convert_model_to_external_data

from edgehp import pose
from edgehp.cli.build import command as build_command
from edgehp.errors import CheckpointError, DataError
from edgehp.networks.bundled import resolve_network
from edgehp.networks.described import deployed_graph
from edgehp.networks.description import OutputSpec, load_description
from edgehp.networks.simplify import run_graph
from edgehp.quantization.graph import GraphView
from edgehp.quantization.placement import float_operators
from edgehp.quantization.quantize import QuantizationConfig, quantize
from tests.pose_graphs import graph_of

SIZE = 16


def answer_net(
    path: Path,
    values: dict[str, np.ndarray],
    *,
    channels: int = 3,
    batch: int | str = "n",
    opset: int = 17,
    kind: int = TensorProto.FLOAT,
    nhwc: bool = False,
) -> Path:
    """A network that answers each of `values` plus 0.1, 0.2, 0.3 times the means of its channels.

    So that its answer depends on the input, and a wrong normalisation or order shows.
    """
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    nodes, constants, outputs = [], [], []
    axes = [1, 2] if nhwc else [2, 3]
    if opset < 18:
        nodes.append(helper.make_node("ReduceMean", ["x"], ["m"], axes=axes, keepdims=0))
    else:
        constants.append(numpy_helper.from_array(np.array(axes), "axes"))
        nodes.append(helper.make_node("ReduceMean", ["x", "axes"], ["m"], keepdims=0))
    for name, value in values.items():
        flat = np.asarray(value, dtype).reshape(-1)
        weight = np.zeros((channels, flat.size), dtype)
        weight[:, 0] = 0.1 * np.arange(1, channels + 1)
        constants += [
            numpy_helper.from_array(weight, f"{name}.w"),
            numpy_helper.from_array(flat, f"{name}.b"),
            numpy_helper.from_array(
                np.array([batch if isinstance(batch, int) else -1, *np.shape(value)]), f"{name}.s"
            ),
        ]
        nodes += [
            helper.make_node("MatMul", ["m", f"{name}.w"], [f"{name}.p"]),
            helper.make_node("Add", [f"{name}.p", f"{name}.b"], [f"{name}.a"]),
            helper.make_node("Reshape", [f"{name}.a", f"{name}.s"], [name]),
        ]
        outputs.append(helper.make_tensor_value_info(name, kind, [batch, *np.shape(value)]))
    shape = [batch, SIZE, SIZE, channels] if nhwc else [batch, channels, SIZE, SIZE]
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("x", kind, shape)], outputs, constants
    )
    opsets = [helper.make_opsetid("", opset)]
    ir = helper.find_min_ir_version_for(opsets)
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=ir), str(path))
    return path


def table_net(path: Path, tables: dict[str, np.ndarray]) -> Path:
    """A network that answers a crop of the level 128 + k with row k of each table [K, ...]."""
    shapes = {name: ", ".join(map(str, ("n", *t.shape[1:]))) for name, t in tables.items()}
    last = min(len(table) for table in tables.values()) - 1
    model = graph_of(
        f"""
        table (float[n, 3, {SIZE}, {SIZE}] x)
        => ({", ".join(f"float[{shape}] {name}" for name, shape in shapes.items())}) {{
            level = ReduceMean <axes = [1, 2, 3], keepdims = 0> (x)
            row = Clip (level, low, high)
            whole = Round (row)
            k = Cast <to = 7> (whole)
            {" ".join(f"{name} = Gather ({name}_rows, k)" for name in tables)}
        }}""",
        {"low": 0.0, "high": float(last)} | {f"{k}_rows": table for k, table in tables.items()},
    )
    onnx.save(model, str(path))
    return path


def describe(
    path: Path, output: str, *, colour: str = "RGB", more: str = "", mean: float = 128
) -> Path:
    """A description that takes `mean` off and divides by one."""
    channels = 1 if colour == "GREY" else 3
    path = path.with_suffix(".toml")
    path.write_text(
        f'name = "net"\nfiles = ["{path.stem}.onnx"]\n[input]\nsize = {SIZE}\n'
        f'colour = "{colour}"\nmean = {[mean] * channels}\nstd = {[1] * channels}\n{more}\n'
        f"[output]\n{output}\n"
    )
    return path


def angles_of(description: Path, crops: np.ndarray | None = None, *, simple: bool = False):
    model, spec = deployed_graph(load_description(description), simple=simple)
    crops = np.full((2, SIZE, SIZE, 3), 128, np.uint8) if crops is None else crops
    return run_graph(model, crops, [o.name for o in model.graph.output]), spec


POSES = [(20.0, -50.0, 10.0), (-80.0, 5.0, -170.0), (0.0, 89.0, 0.0), (30.0, -100.0, 20.0)]
# What a network says whose pose is that, by what its description says of its output.
KINDS = {
    "euler": OutputSpec("euler"),
    "euler in another order": OutputSpec("euler", order=("yaw", "roll", "pitch"), signs=(1, -1, 1)),
    "radians": OutputSpec("euler", convention="aflw"),
    "quaternion": OutputSpec("quaternion"),
    "wxyz": OutputSpec("quaternion", order=("w", "x", "y", "z")),
    "inverse quaternion": OutputSpec("quaternion", order=("y", "w", "x", "z"), transposed=True),
    "sixd": OutputSpec("sixd"),
    "matrix": OutputSpec("matrix"),
    "plain matrix": OutputSpec("matrix", signs=(1, 1, 1), transposed=False),
    "mirrored matrix": OutputSpec("matrix", signs=(-1, 1, 1), transposed=False),
}


def raw_outputs(kind: str, angles: np.ndarray) -> np.ndarray:
    from scipy.spatial.transform import Rotation

    rotation = pose.matrix_from_euler(angles)
    x, y, z, w = Rotation.from_matrix(rotation).as_quat().T * 3
    # 6DRepNet's get_R(pitch, yaw, roll) multiplies Rz Ry Rx.
    theirs = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    return {
        "euler": angles,
        "euler in another order": (angles * (1, -1, 1))[:, [1, 2, 0]],
        "radians": np.radians(angles * pose.CONVENTIONS["aflw"].signs),
        "quaternion": np.stack([x, y, z, w], 1),
        "wxyz": np.stack([w, x, y, z], 1),
        "inverse quaternion": np.stack([-y, w, -x, -z], 1),
        "sixd": np.concatenate([2 * theirs[:, :, 0], theirs[:, :, 1]], 1),
        "matrix": theirs,
        "plain matrix": rotation,
        "mirrored matrix": rotation * np.outer((-1, 1, 1), (-1, 1, 1)),
    }[kind]


def output_table(spec: OutputSpec, *names: str) -> str:
    """The table [output] of a description."""
    values = {n: getattr(spec, n) for n in ("order", "signs")} | {"names": names}
    lines = [f"{key} = {list(value)}" for key, value in values.items()]
    lines += [f'kind = "{spec.kind}"', f'convention = "{spec.convention}"']
    lines += [f"first = {spec.first}", f"last = {spec.last}"]
    if spec.transposed is not None:
        lines.append(f"transposed = {str(spec.transposed).lower()}")
    return "\n".join(lines)


def levels(count: int) -> np.ndarray:
    """Crops of the levels 128 and up."""
    return np.full((SIZE, SIZE, 3, count), 128 + np.arange(count), np.uint8).transpose(3, 0, 1, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_output_becomes_the_same_pose(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(3)
    angles = np.concatenate([POSES, rng.uniform(-85, 85, (50, 3)) * (2, 1, 2)])
    raw, spec = raw_outputs(kind, angles), KINDS[kind]
    path = table_net(tmp_path / "net.onnx", {"pose": raw})
    (built,), found = angles_of(describe(path, output_table(spec, "pose")), levels(len(angles)))
    assert found.bins is None
    wanted = pose.matrix_from_euler(angles)
    # The deployed graph, and what `edgehp describe` tries.
    for said in (built, spec.decode([raw])):
        assert pose.geodesic_degrees(pose.matrix_from_euler(said), wanted).max() < 0.01


@pytest.mark.parametrize("outputs", [1, 3])
def test_bins_give_expectation_and_spread(tmp_path: Path, outputs: int) -> None:
    logits = np.random.default_rng(3).normal(0, 2, (20, 3, 10))
    names = ["yaw", "pitch", "roll"] if outputs == 3 else ["all"]
    tables = dict(zip(names, logits.swapaxes(0, 1) if outputs == 3 else [logits], strict=True))
    order = ("yaw", "pitch", "roll")
    spec = OutputSpec("bins", order=order, signs=(-1, 1, 1), first=-90, last=90)
    path = describe(table_net(tmp_path / "net.onnx", tables), output_table(spec, *names))
    (angles, spread), found = angles_of(path, levels(20))
    p = np.exp(logits) / np.exp(logits).sum(2, keepdims=True)
    bins = np.linspace(-90, 90, 10)
    mean = p @ bins
    deviation = np.sqrt((p * (bins - mean[..., None]) ** 2).sum(2))
    assert found.bins is not None and found.bins.count == 10
    for said in (angles, spec.decode(list(tables.values()))):
        np.testing.assert_allclose(said, mean[:, [1, 0, 2]] * (-1, 1, 1), atol=1e-3)
    np.testing.assert_allclose(spread, deviation[:, [1, 0, 2]], atol=1e-3)


@pytest.mark.parametrize("colour", ["RGB", "BGR", "GREY"])
@pytest.mark.parametrize("nhwc", [False, True])
def test_the_input_is_normalised_as_described(tmp_path: Path, colour: str, nhwc: bool) -> None:
    channels = 1 if colour == "GREY" else 3
    path = answer_net(tmp_path / "net.onnx", {"pose": np.zeros(3)}, channels=channels, nhwc=nhwc)
    crops = np.full((2, SIZE, SIZE, 3), (178, 128, 78), np.uint8)
    (found,), _ = angles_of(describe(path, 'kind = "euler"', colour=colour), crops)
    # 50 more red than the mean and 50 less blue, by the weights of the network's channels.
    wanted = {"RGB": (0.1 - 0.3) * 50, "BGR": (0.3 - 0.1) * 50, "GREY": 0.1 * (0.299 - 0.114) * 50}
    assert found[0, 0] == pytest.approx(wanted[colour], abs=1e-3)


def test_dark_crops_are_brightened(tmp_path: Path) -> None:
    path = answer_net(tmp_path / "net.onnx", {"pose": np.zeros(3)}, channels=1)
    dark = "[input.dark]\npercentile = 90\nbelow = 127\ngain = 100\nfloor = 5"
    crop = np.zeros((1, SIZE, SIZE, 3), np.uint8)
    crop[:, :, : SIZE // 2] = 60
    (found,), _ = angles_of(
        describe(path, 'kind = "euler"', colour="GREY", more=dark),
        np.concatenate([crop, crop + 140]),
    )
    assert found[0, 0] == pytest.approx(0.1 * (30 * 100 / 60 - 128), abs=1e-2)
    assert found[1, 0] == pytest.approx(0.1 * (170 - 128), abs=1e-2)


@pytest.mark.parametrize(
    ("given", "simple"),
    [
        ({"opset": 11}, False),
        ({"opset": 20}, True),
        ({"batch": 1}, False),
        ({"batch": 16}, False),
        ({"kind": TensorProto.FLOAT16}, False),
        ({"kind": TensorProto.DOUBLE}, False),
    ],
)
def test_exports_of_any_kind_are_read(tmp_path: Path, given: dict, simple: bool) -> None:
    path = answer_net(tmp_path / "net.onnx", {"pose": np.array([1.0, 2.0, 3.0])}, **given)
    (found,), _ = angles_of(describe(path, 'kind = "euler"'), simple=simple)
    np.testing.assert_allclose(found, [[1, 2, 3]] * 2, atol=1e-3)


def test_torch_exports_shapes_of_one_crop_are_freed(tmp_path: Path) -> None:
    """The exporter by torch.export writes allowzero beside them."""
    path = answer_net(tmp_path / "net.onnx", {"pose": np.array([1.0, 2.0, 3.0])}, batch=1)
    model = onnx.load(path)
    for output in model.graph.output:
        maker = next(n for n in model.graph.node if output.name in n.output)
        maker.output[0] = "before"
        shape = numpy_helper.from_array(np.array([1, 3]), "one_crop")
        model.graph.initializer.append(shape)
        given = ["before", "one_crop"]
        model.graph.node.append(helper.make_node("Reshape", given, [output.name], allowzero=1))
    onnx.save(model, path)
    (found,), _ = angles_of(describe(path, 'kind = "euler"'))
    np.testing.assert_allclose(found, [[1, 2, 3]] * 2, atol=1e-3)


def test_weights_beside_the_file_and_among_the_inputs_are_read(tmp_path: Path) -> None:
    path = answer_net(tmp_path / "net.onnx", {"pose": np.array([1.0, 2.0, 3.0])})
    model = onnx.load(path)
    for t in model.graph.initializer:
        value = helper.make_tensor_value_info(t.name, t.data_type, list(t.dims))
        model.graph.input.append(value)
    convert_model_to_external_data(model, location="net.data", size_threshold=0)
    onnx.save(model, path)
    text = describe(path, 'kind = "euler"')
    (found,), _ = angles_of(text)
    np.testing.assert_allclose(found[0], [1, 2, 3], atol=1e-3)
    (tmp_path / "net.data").unlink()
    with pytest.raises(CheckpointError, match=r"net\.data, which is not beside it"):
        angles_of(text)


def test_weights_outside_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    path = answer_net(tmp_path / "a" / "net.onnx", {"pose": np.zeros(3)})
    model = onnx.load(path)
    convert_model_to_external_data(model, location="net.data", size_threshold=0)
    onnx.save(model, path)
    for t in model.graph.initializer:
        for e in t.external_data:
            if e.key == "location":
                e.value = "../net.data"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(CheckpointError, match="outside of its folder"):
        angles_of(describe(path, 'kind = "euler"'))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ('kind = "quaternion"', r"the output is pose \['N', 3\], expected 4 values"),
        ('kind = "euler"\nname = "angle"', "no output 'angle', found pose"),
        ('kind = "bins"', "3 values in the output of bins"),
    ],
)
def test_a_network_that_is_not_as_described_is_refused(
    tmp_path: Path, output: str, message: str
) -> None:
    path = answer_net(tmp_path / "net.onnx", {"pose": np.zeros(3)})
    with pytest.raises(CheckpointError, match=message):
        angles_of(describe(path, output))


def test_another_size_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    path = describe(answer_net(tmp_path / "net.onnx", {"pose": np.zeros(3)}), 'kind = "euler"')
    path.write_text(path.read_text().replace("size = 16", "size = 32"))
    with pytest.raises(CheckpointError, match=r"description says \['N', 3, 32, 32\]"):
        angles_of(path)
    (tmp_path / "net.onnx").unlink()
    with pytest.raises(DataError, match=r"net\.onnx is not in"):
        load_description(path)


def test_operators_of_others_and_unknown_types_are_named(tmp_path: Path) -> None:
    path = answer_net(tmp_path / "net.onnx", {"pose": np.zeros(3)})
    text = describe(path, 'kind = "euler"')
    model = onnx.load(path)
    other = onnx.ModelProto()
    other.CopyFrom(model)
    other.graph.node[0].domain = "com.microsoft"
    path.write_bytes(other.SerializeToString())
    with pytest.raises(CheckpointError, match=r"1 com\.microsoft\.ReduceMean"):
        angles_of(text)
    for node in (helper.make_node("Relu", ["x"], []), helper.make_node("Constant", [], ["c"])):
        other.CopyFrom(model)
        other.graph.node.append(node)
        path.write_bytes(other.SerializeToString())
        with pytest.raises(CheckpointError, match="a node gives nothing"):
            angles_of(text)
    model.graph.input[0].type.tensor_type.elem_type = 99
    path.write_bytes(model.SerializeToString())
    with pytest.raises(CheckpointError, match="element type 99"):
        angles_of(text)


def test_names_that_are_no_utf8_are_refused(tmp_path: Path) -> None:
    path = answer_net(tmp_path / "net.onnx", {"pose": np.zeros(3)})
    text = describe(path, 'kind = "euler"')
    data = path.read_bytes()
    for name in (b"ReduceMean", b"pose"):  # of an operator, of a tensor
        path.write_bytes(data.replace(name, b"\xff" + name[1:]))
        with pytest.raises(CheckpointError, match="a name in it is not UTF-8"):
            angles_of(text)


def torch_net():
    """A small network with what others have: depthwise convolutions, gates, SiLU, PReLU, Concat."""
    import torch
    from torch import nn

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16))
            self.depthwise = nn.Conv2d(16, 16, 3, 1, 1, groups=16)
            self.gate = nn.Sequential(
                nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 1)
            )
            self.leaky, self.prelu = nn.LeakyReLU(0.1), nn.PReLU(16)
            self.last = nn.Conv2d(32, 16, 3, 2, 1)
            self.heads = nn.ModuleList(nn.Linear(16, 18) for _ in range(3))
            self.sixd = nn.Linear(16, 6)

        def forward(self, x):
            x = nn.functional.silu(self.stem(x))
            y = nn.functional.relu6(self.depthwise(x))
            y = x + y * torch.sigmoid(self.gate(y))
            x = self.last(torch.cat([self.leaky(x), self.prelu(y)], 1))
            x = nn.functional.hardswish(x).mean((2, 3))
            return self.sixd(x), *(head(x) for head in self.heads)

    torch.manual_seed(7)
    net = Gated()
    for _ in range(3):
        net(torch.randn(8, 3, 32, 32))  # statistics of the normalisation
    return net.eval()


def torch_export(path: Path, *, dynamo: bool = False) -> Path:
    import torch

    names = ["sixd", "pitch", "yaw", "roll"]
    given = (torch.zeros(1, 3, 32, 32),)
    torch.onnx.export(torch_net(), given, str(path), output_names=names, dynamo=dynamo)
    return path


def described_for_32(path: Path, output: str, std: int = 1) -> Path:
    text = describe(path, output, mean=128)
    changed = text.read_text().replace("size = 16", "size = 32")
    text.write_text(changed.replace("std = [1, 1, 1]", f"std = {[std] * 3}"))
    return text


@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_exports_of_torch_are_quantized(tmp_path: Path, dynamo: bool) -> None:
    torch = pytest.importorskip("torch")
    if dynamo:
        pytest.importorskip("onnxscript")
    path = torch_export(tmp_path / "net.onnx", dynamo=dynamo)
    crops = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), np.uint8)
    with torch.no_grad():
        given = torch.from_numpy(crops[:4].transpose(0, 3, 1, 2).astype(np.float32) - 128)
        sixd, *bins = torch_net()(given)
    p = torch.stack(bins, 1).softmax(-1).numpy()
    outputs = {
        'kind = "sixd"\nname = "sixd"': OutputSpec("sixd").decode([sixd.numpy()]),
        'kind = "bins"\nnames = ["pitch", "yaw", "roll"]': p @ np.linspace(-99, 99, 18),
    }
    for output, theirs in outputs.items():
        model, spec = deployed_graph(load_description(described_for_32(path, output)))
        ours = run_graph(model, crops[:4], [o.name for o in model.graph.output])
        apart = pose.geodesic_degrees(*map(pose.matrix_from_euler, (ours[0], theirs)))
        assert apart.max() < 0.05
        assert "BatchNormalization" not in {n.op_type for n in model.graph.node}
        view = GraphView(model)
        for flavor in ("cpu", "tensorrt"):
            assert float_operators(view, flavor) == {}
        with_bins = spec.bins is not None
        config = QuantizationConfig("cpu", "minmax", rounding=with_bins, threads=1)
        made = quantize(model, list(crops), config)
        kept = GraphView(made.model)
        integer = [n.name for n in kept.of_type("Conv", "Gemm") if not kept.has_weight(n)]
        # Six values are too few channels: that layer stays in floating point.
        assert len(integer) == 5 + (3 if with_bins else 0)
        assert made.difference.angles < 6
        assert (made.difference.spread is None) == (not with_bins)


def test_a_deployed_graph_without_spread_is_read_again(tmp_path: Path) -> None:
    """As `edgehp sensitivity` reads it from an artifact; weights may be listed as inputs."""
    path = answer_net(tmp_path / "net.onnx", {"pose": np.zeros(3)})
    text = describe(path, 'kind = "euler"')
    model, spec = deployed_graph(load_description(text), simple=False)
    for t in model.graph.initializer:
        given = helper.make_tensor_value_info(t.name, t.data_type, list(t.dims))
        model.graph.input.append(given)
    onnx.save(model, tmp_path / "deployed.onnx")
    found = resolve_network(str(tmp_path / "deployed.onnx"))
    assert found.spec == spec
    assert [i.name for i in found.graph().graph.input] == ["crops"]
    model.graph.input[0].type.tensor_type.elem_type = 99
    onnx.save(model, tmp_path / "deployed.onnx")
    with pytest.raises(CheckpointError, match="element type 99"):
        resolve_network(str(tmp_path / "deployed.onnx"))


def test_a_described_network_is_resolved_by_its_toml_or_with_it(tmp_path: Path) -> None:
    path = answer_net(tmp_path / "net.onnx", {"pose": np.zeros(3)})
    text = describe(path, 'kind = "euler"')
    alone = resolve_network(str(text))
    (tmp_path / "other").mkdir()
    other = path.rename(tmp_path / "other" / "renamed.onnx")
    named = resolve_network(str(other), text)
    assert alone.spec == named.spec
    assert named.description is not None
    assert named.digest == resolve_network(str(other), text).digest


def test_a_quantized_network_is_turned_back_which_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgehp.networks.described.simplify", lambda model: model)
    path = answer_net(tmp_path / "net.onnx", {"pose": np.array(POSES[0])})
    model = onnx.load(path)
    scale = [numpy_helper.from_array(np.float32(2), "scale")]
    model.graph.initializer.extend([*scale, numpy_helper.from_array(np.int8(0), "zero")])
    for node in model.graph.node:
        node.input[:] = ["x.dq" if i == "x" else i for i in node.input]
    for kind, given, made in (("Dequantize", "x.q", "x.dq"), ("Quantize", "x", "x.q")):
        pair = helper.make_node(f"{kind}Linear", [given, "scale", "zero"], [made])
        model.graph.node.insert(0, pair)
    onnx.save(model, path)
    graph = resolve_network(str(path), describe(path, 'kind = "euler"')).graph()
    assert not {n.op_type for n in graph.graph.node} & {"QuantizeLinear", "DequantizeLinear"}
    said = [m for m in caplog.messages if "quantized already" in m]
    assert len(said) == 1 and "1 Q/DQ pairs" in said[0]


@pytest.mark.filterwarnings("ignore")
def test_the_command_builds_an_artifact_without_spread(tmp_path: Path) -> None:
    pytest.importorskip("onnxsim")
    pytest.importorskip("torch")
    path = torch_export(tmp_path / "net.onnx")
    text = described_for_32(path, 'kind = "sixd"', std=64)
    arguments = ["--network", str(path), "--describe", str(text), "--target", "cpu"]
    options = ["--output", str(tmp_path / "dist"), "--max-drop", "90", "--no-mixed"]
    options += ["--calibration-method", "minmax"]
    result = CliRunner().invoke(build_command, [*arguments, *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    from edgehp.artifact import load_artifact
    from edgehp.artifact.open import open_artifact, open_reference

    artifact = load_artifact(tmp_path / "dist" / "net-cpu-int8")
    assert artifact.manifest.golden.spread is None
    assert artifact.manifest.network.spec is not None
    assert artifact.manifest.network.spec["bins"] is None
    assert any("confidence is null" in w for w in artifact.manifest.build.warnings)
    with open_artifact(artifact.path) as opened:
        assert opened.bins is None
        prediction = opened.engine.infer(np.zeros((1, 32, 32, 3), np.uint8))
        assert prediction.spread is None
        with open_reference(opened, str(text)) as reference:
            assert reference.digest == opened.digest
