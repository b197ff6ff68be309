"""The deployed graph: equal to torch, to OpenVINO, and to itself."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from msgspec.structs import replace

from edgehp.errors import CheckpointError, DataError, EnvironmentalError, UsageError
from edgehp.networks.graph import (
    DIGEST_KEY,
    build_graph,
    graph_bytes,
    load_graph,
    spec_of_graph,
)
from edgehp.networks.layout import Weights
from edgehp.networks.simplify import simplify
from edgehp.networks.spec import NetworkSpec
from edgehp.pose import convention
from tests.helpers import random_crops, random_network
from tests.pose_graphs import SPEC, pose_graph

Array = npt.NDArray[np.float64]
TOLERANCE = 1e-3  # degrees, from the project's requirements
NETWORKS = [("kd-resnet18", 64), ("kd-resnet50", 32), ("ehpnet", 48)]


def run_onnx(model: onnx.ModelProto, crops: npt.NDArray[np.uint8]) -> tuple[Array, Array]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        graph_bytes(model), options, providers=["CPUExecutionProvider"]
    )
    angles, spread = session.run(["angles", "spread"], {"crops": crops})
    assert angles.dtype == spread.dtype == np.float32
    assert angles.shape == spread.shape == (len(crops), 3)
    return angles.astype(np.float64), spread.astype(np.float64)


def run_torch(
    weights: Weights, spec: NetworkSpec, crops: npt.NDArray[np.uint8]
) -> tuple[Array, Array]:
    """The network as it is trained: normalisation and decode outside of it."""
    torch = pytest.importorskip("torch")

    from edgehp.networks.checkpoint import build_module
    from edgehp.networks.modules import expectation

    module = build_module(spec).eval()
    module.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()}, strict=False)
    pixels = crops[..., ::-1] if spec.preprocessing.colour == "BGR" else crops
    x = (pixels - np.float32(spec.preprocessing.mean)) / np.float32(spec.preprocessing.std)
    with torch.no_grad():
        logits = module(torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2))))
        mean, spread = expectation(logits, spec.bins)
    signs = np.array(convention(spec.convention).signs)
    return mean.numpy().astype(np.float64) * signs, spread.numpy().astype(np.float64)


@pytest.fixture(scope="module")
def small() -> tuple[Weights, NetworkSpec]:
    return random_network("kd-resnet18", 32)


@pytest.fixture(scope="module")
def small_graph(small: tuple[Weights, NetworkSpec]) -> onnx.ModelProto:
    return build_graph(*small)


@pytest.mark.parametrize(("name", "size"), NETWORKS)
def test_torch_onnxruntime_and_openvino_agree(name: str, size: int, seed: int) -> None:
    openvino = pytest.importorskip("openvino")
    weights, spec = random_network(name, size, seed)
    crops = random_crops(12, size, seed)
    expected = run_torch(weights, spec, crops)
    # Otherwise any constant would pass.
    assert (expected[0].std(0) > 3).all(), expected[0].std(0)
    model = build_graph(weights, spec)
    core = openvino.Core()
    compiled = core.compile_model(
        core.read_model(graph_bytes(model)),
        "CPU",
        {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1},
    )
    for batch in (1, 3, 12):
        given, wanted = crops[:batch], [e[:batch] for e in expected]
        answers = compiled(given)
        for found in (run_onnx(model, given), [answers[o] for o in ("angles", "spread")]):
            assert np.abs(np.subtract(found, wanted)).max() < TOLERANCE


def test_every_opset_gives_the_same_answer(
    small: tuple[Weights, NetworkSpec], small_graph: onnx.ModelProto
) -> None:
    crops = random_crops(4, 32)
    for opset in (19, 21):
        model = build_graph(*small, opset=opset)
        assert model.opset_import[0].version == opset
        found = run_onnx(model, crops)
        assert np.abs(np.subtract(found, run_onnx(small_graph, crops))).max() < 1e-5


def test_a_bgr_network_gets_its_colours_swapped_inside(
    small: tuple[Weights, NetworkSpec],
) -> None:
    weights, spec = small
    # Unequal constants, so that swapping the channels without them would show too.
    rgb = replace(spec.preprocessing, mean=(120.0, 110.0, 100.0), std=(50.0, 60.0, 70.0))
    spec = replace(spec, preprocessing=rgb)
    swapped = replace(spec, preprocessing=replace(rgb, colour="BGR"))
    crops = random_crops(8, 32)
    as_bgr = run_onnx(build_graph(weights, swapped), crops)
    assert np.abs(np.subtract(as_bgr, run_torch(weights, swapped, crops))).max() < TOLERANCE
    as_rgb = run_onnx(build_graph(weights, spec), crops)
    assert np.abs(as_rgb[0] - as_bgr[0]).max() > 1
    mirrored = run_onnx(build_graph(weights, spec), np.ascontiguousarray(crops[..., ::-1]))
    assert np.abs(np.subtract(mirrored, as_bgr)).max() < TOLERANCE


def test_the_convention_flips_the_pitch_and_nothing_else(
    small: tuple[Weights, NetworkSpec], small_graph: onnx.ModelProto
) -> None:
    weights, spec = small
    assert spec.convention == "kd-resnet"
    crops = random_crops(8, 32)
    plain = run_onnx(build_graph(weights, replace(spec, convention="aflw2000")), crops)
    flipped = run_onnx(small_graph, crops)
    assert np.abs(plain[0]).min(axis=0).max() > 0
    assert np.abs(flipped[0] - plain[0] * [-1, 1, 1]).max() < 1e-4
    assert np.abs(flipped[1] - plain[1]).max() < 1e-4
    assert np.abs(flipped[0][:, 0] - plain[0][:, 0]).max() > 1


def test_heads_keep_their_order(small: tuple[Weights, NetworkSpec]) -> None:
    weights, spec = small
    forced = dict(weights)
    for angle, degrees in (("pitch", 10.5), ("yaw", -40.5), ("roll", 70.5)):
        bias = np.full(198, -100, np.float32)
        bias[np.flatnonzero(spec.bins.values == degrees)] = 100
        forced[f"head_net.{angle}.bias"] = bias
        forced[f"head_net.{angle}.weight"] = np.zeros((198, 512), np.float32)
    angles, spread = run_onnx(build_graph(forced, spec), random_crops(2, 32))
    # -10.5: the authors' pitch points down.
    assert np.abs(angles - [-10.5, -40.5, 70.5]).max() < 1e-4
    assert spread.max() < 1e-3


def test_spread_of_a_uniform_distribution(small: tuple[Weights, NetworkSpec]) -> None:
    weights, spec = small
    flat = {k: np.zeros_like(v) if k.startswith("head_net") else v for k, v in weights.items()}
    angles, spread = run_onnx(build_graph(flat, spec), random_crops(1, 32))
    # Standard deviation of n equal steps of one: sqrt((n^2 - 1) / 12).
    assert np.abs(spread - np.sqrt((198**2 - 1) / 12)).max() < 1e-3
    assert np.abs(angles).max() < 1e-3


def test_the_same_input_gives_the_same_bytes(
    small: tuple[Weights, NetworkSpec], small_graph: onnx.ModelProto
) -> None:
    weights, spec = small
    again = dict(reversed(list(weights.items())))
    assert graph_bytes(small_graph) == graph_bytes(build_graph(again, spec))


def test_simplify_keeps_names_metadata_and_the_symbolic_batch(
    small_graph: onnx.ModelProto,
) -> None:
    pytest.importorskip("onnxsim")
    simple = simplify(small_graph)
    assert [n.output[0] for n in simple.graph.node] == [n.output[0] for n in small_graph.graph.node]
    assert simple.metadata_props == small_graph.metadata_props
    assert simple.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert {t.name for t in simple.graph.initializer} == {
        t.name for t in small_graph.graph.initializer
    }


def _other_bins(model: onnx.ModelProto) -> None:
    bins = next(t for t in model.graph.initializer if t.name == "bins")
    bins.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bins) + 0.01, "bins"))


def _one_crop(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1


@pytest.mark.parametrize(
    ("change", "says"),
    [(_other_bins, r"changed the answer by 0\.01"), (_one_crop, "symbolic batch")],
)
def test_simplify_refuses_what_onnxsim_changed(
    small_graph: onnx.ModelProto,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[onnx.ModelProto], None],
    says: str,
) -> None:
    pytest.importorskip("onnxsim")

    def broken(model: onnx.ModelProto) -> onnx.ModelProto:
        out = onnx.ModelProto.FromString(model.SerializeToString())
        change(out)
        return out

    monkeypatch.setattr("edgehp.networks.simplify._onnxsim", broken)
    with pytest.raises(EnvironmentalError, match=says):
        simplify(small_graph)


def test_onnxsim_runs_without_torch_and_its_own_words_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another onnxsim on the way that packages are looked for: the child takes that one too."""
    (tmp_path / "onnxsim.py").write_text(
        "try:\n    import torch\nexcept ImportError:\n    torch = None\n"
        "def simplify(model):\n    raise ValueError(f'torch is {torch}')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(EnvironmentalError, match="ValueError: torch is None"):
        simplify(onnx.load(pose_graph(tmp_path / "net.onnx")))


def test_without_onnxsim_the_graph_stays_and_the_log_says_so(
    small_graph: onnx.ModelProto,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setitem(sys.modules, "onnxsim", None)
    assert simplify(small_graph) is small_graph
    assert "onnxsim is not installed" in caplog.text


def test_without_onnx_the_error_says_what_to_install(
    small: tuple[Weights, NetworkSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(EnvironmentalError, match="pip install onnx"):
        build_graph(*small)


def test_the_graph_carries_its_specification(
    small: tuple[Weights, NetworkSpec], small_graph: onnx.ModelProto
) -> None:
    assert spec_of_graph(small_graph) == small[1]
    assert small_graph.producer_name == "edgehp"
    metadata = {p.key: p.value for p in small_graph.metadata_props}
    assert metadata[DIGEST_KEY] == small[1].digest
    small_graph = onnx.ModelProto.FromString(small_graph.SerializeToString())
    small_graph.metadata_props[0].value = "no json"
    with pytest.raises(DataError, match="not valid JSON"):
        spec_of_graph(small_graph)


def test_tensor_names_do_not_change(small_graph: onnx.ModelProto) -> None:
    """Calibration tables are keyed by these names: changing one orphans every table."""
    names = [n.output[0] for n in small_graph.graph.node]
    first = "to_float to_nchw centred conv1 relu maxpool layer1.0.conv1 layer1.0.relu1"
    assert names[:12] == f"{first} layer1.0.conv2 layer1.0.add layer1.0.relu layer1.1.conv1".split()
    last = "avgpool features heads logits probabilities weighted expectation deviation"
    last += " deviation.weighted deviation.squared variance angles spread"
    assert names[-13:] == last.split()
    assert "layer2.0.downsample" in names
    assert all(n.name == n.output[0] and len(n.output) == 1 for n in small_graph.graph.node)


def test_what_cannot_be_built_is_refused(small: tuple[Weights, NetworkSpec]) -> None:
    weights, spec = small
    with pytest.raises(UsageError, match="opset 16"):
        build_graph(weights, spec, 16)
    changes = {"colour": "GREY", "mean": (1.0,), "std": (1.0,)}
    grey = replace(spec, preprocessing=replace(spec.preprocessing, **changes))
    with pytest.raises(UsageError, match="three channels"):
        build_graph(weights, grey)


def test_undefined_statistics_are_refused(small: tuple[Weights, NetworkSpec]) -> None:
    weights, spec = small
    name = "encoder_net.model.layer1.0.bn1.running_var"
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        build_graph({**weights, name: -weights[name]}, spec)
    with pytest.raises(CheckpointError, match=r"conv1\.weight is not finite"):
        name = "encoder_net.model.conv1.weight"
        build_graph({**weights, name: weights[name] * np.float32(np.inf)}, spec)


def test_graphs_that_are_no_deployed_graphs(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"

    def refused(match: str) -> None:
        with pytest.raises(CheckpointError, match=match):
            load_graph(path)

    refused("cannot be read")
    good = pose_graph(path).read_bytes()
    model, spec = load_graph(path)
    assert graph_bytes(model) == good and spec == SPEC
    for content, says in ((good[:-50], "truncated or not an ONNX"), (b"", "is empty")):
        path.write_bytes(content)
        refused(says)

    def changed(says: str) -> Iterator[onnx.ModelProto]:
        model = onnx.load_model_from_string(good)
        yield model
        path.write_bytes(graph_bytes(model))
        refused(says)

    for model in changed("no network specification"):
        del model.metadata_props[:]
    for text in ("5", "[]", "{"):
        for model in changed("specification in the metadata"):
            model.metadata_props[0].value = text
    for model in changed("altered"):
        model.metadata_props[0].value = model.metadata_props[0].value.replace(SPEC.name, "other")
    for model in changed(r"takes crops float\[N, 48, 48, 3\].*expected crops uint8"):
        model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    for model in changed("one file"):
        model.graph.initializer[0].data_location = onnx.TensorProto.EXTERNAL


def test_building_needs_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; from tests.helpers import random_network; "
        "from edgehp.networks.graph import build_graph; "
        "print(len(build_graph(*random_network(size=32)).graph.node))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=120, capture_output=True, text=True
    )
    assert int(out.stdout) > 50
