"""Quantisation-aware distillation: the module is the graph, it learns, and its file is checked."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner
from onnx import numpy_helper

from edgehp import pose
from edgehp.crop import crop_face
from edgehp.errors import CheckpointError, DataError, UsageError
from edgehp.networks.bundled import bundled_path
from edgehp.networks.checkpoint import QUANTISED_PREFIX, load_weights, save_weights
from edgehp.networks.graph import INPUT, build_graph, graph_bytes
from edgehp.networks.layout import Weights
from edgehp.networks.spec import NetworkSpec
from edgehp.pipeline.graphs import open_network, quantised_graph
from edgehp.quantization.calibrate import calibrate
from edgehp.quantization.lint import lint
from edgehp.quantization.qdq import Recipe
from edgehp.quantization.quantise import QuantisedModel, emit
from edgehp.quantization.table import CalibrationTable
from edgehp.quantization.trained import (
    TRAINED,
    TrainedQuantisation,
    read_trained,
    stored_tensors,
    trained_for,
)
from tests.faces import write_faces
from tests.helpers import random_crops, random_network

torch = pytest.importorskip("torch", reason="training needs torch")

from edgehp.cli.distill import command as distill_command  # noqa: E402
from edgehp.networks.checkpoint import load_module  # noqa: E402
from edgehp.networks.kd_resnet import expectation  # noqa: E402
from edgehp.training.data import split, with_labels  # noqa: E402
from edgehp.training.fake_quantised import FakeQuantised  # noqa: E402
from edgehp.training.loop import Trainer, normalise  # noqa: E402
from edgehp.training.quantization_aware import (  # noqa: E402
    FloatTeacher,
    fake_quantised,
    train_quantised,
    trained_quantisation,
    unlabelled_items,
)
from tests.test_training import CONFIG  # noqa: E402

SIZE = 32


def shipped() -> tuple[Weights, NetworkSpec]:
    """A trained network, at a size that is quick."""
    weights, spec = load_weights(bundled_path("kd-resnet18-112"))
    return weights, spec.with_size(SIZE)


@cache
def shipped_start(flavour: str) -> QuantisedModel:
    """The shipped network quantised after training."""
    weights, spec = shipped()
    return emitted(build_graph(weights, spec), shipped_table(), flavour)


@cache
def shipped_table() -> CalibrationTable:
    return measured(build_graph(*shipped()))


def measured(graph: onnx.ModelProto) -> CalibrationTable:
    return calibrate(graph, random_crops(8, SIZE, seed=1), methods=("minmax",), threads=1)


def emitted(graph: onnx.ModelProto, table: CalibrationTable, flavour: str) -> QuantisedModel:
    """What `quantise` gives, without its search."""
    recipe = Recipe("minmax", bias_correction=True)
    made = emit(graph, table, recipe, flavour=flavour)
    return QuantisedModel(made, table, recipe, {}, "minmax", 0, (), flavour, graph, table)


def moved(network: FakeQuantised) -> FakeQuantised:
    """The module after some learning: every parameter a few steps from its start."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in network.parameters():
            p += torch.randn(p.shape, generator=generator)
    return network.eval()


def angles_of(network: torch.nn.Module, crops: np.ndarray, spec: NetworkSpec) -> np.ndarray:
    with torch.no_grad():
        logits = network(normalise(torch.from_numpy(crops), spec))
    return pose.to_aflw2000(expectation(logits, spec.bins)[0].numpy(), spec.convention)


def run_exactly(model: onnx.ModelProto, crops: np.ndarray) -> np.ndarray:
    """The graph node by node: engines that fuse nodes round in places of their own."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        graph_bytes(model), options, providers=["CPUExecutionProvider"]
    )
    return session.run(["angles"], {INPUT: crops})[0]


def constants(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


@pytest.fixture(scope="module")
def trained(request: pytest.FixtureRequest) -> tuple[TrainedQuantisation, FakeQuantised]:
    _, spec = shipped()
    start = shipped_start(request.param)
    network = moved(fake_quantised(start, spec))
    return trained_quantisation(network, start.source_table, spec), network


@pytest.fixture(scope="module")
def cpu_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that holds integers for the cpu flavour."""
    weights, spec = shipped()
    start = shipped_start("cpu")
    done = trained_quantisation(moved(fake_quantised(start, spec)), start.source_table, spec)
    path = tmp_path_factory.mktemp("trained") / "net.safetensors"
    save_weights(path, weights, spec, extra=stored_tensors(done))
    return path


@pytest.mark.parametrize("trained", ["cpu", "tensorrt"], indirect=True)
def test_the_graph_answers_as_the_module_through_a_file(
    trained: tuple[TrainedQuantisation, FakeQuantised], tmp_path: Path
) -> None:
    done, network = trained
    weights, spec = shipped()
    path = tmp_path / "net.safetensors"
    save_weights(path, weights, spec, extra=stored_tensors(done))
    again, same_spec = load_weights(path)
    assert same_spec == spec
    assert all(np.array_equal(again[k], weights[k]) for k in weights)
    read = trained_for(path, spec, done.flavour)
    assert read is not None
    graph = build_graph(weights, spec)
    made = read.graph(graph)
    crops = random_crops(64, SIZE, seed=3)
    found, wanted = run_exactly(made, crops), angles_of(network, crops, spec)
    assert np.abs(found - wanted).mean() < 0.02
    # Not by doing nothing: the float network and the untrained integers answer otherwise.
    assert np.abs(run_exactly(graph, crops) - wanted).mean() > 0.1
    values = constants(made)
    for name, layer in done.layers.items():
        if layer.scale is not None:
            np.testing.assert_array_equal(values[f"{name}.weight.int8"], layer.weight)
            np.testing.assert_allclose(values[f"{name}.weight.scale"], layer.scale, rtol=3e-7)
    for tensor, (scale, zero) in network.scales().items():
        if f"{tensor}.scale" in values:
            assert values[f"{tensor}.scale"] == pytest.approx(scale, rel=3e-7)
            assert values[f"{tensor}.zero_point"] == zero
    assert lint(made, done.flavour) == ()


@pytest.mark.parametrize("trained", ["tensorrt"], indirect=True)
def test_fp16_scales_are_the_trained_ones(
    trained: tuple[TrainedQuantisation, FakeQuantised],
) -> None:
    done, _ = trained
    full, half = (constants(done.graph(build_graph(*shipped()), body)) for body in ("fp32", "fp16"))
    for name, layer in done.layers.items():
        if layer.scale is not None:
            np.testing.assert_array_equal(half[f"{name}.weight.int8"], layer.weight)
            scale = half[f"{name}.weight.scale"]
            assert scale.dtype == np.float16
            np.testing.assert_array_equal(scale, full[f"{name}.weight.scale"].astype(np.float16))
            np.testing.assert_array_equal(scale.astype(np.float32), layer.scale)


def test_an_ehpnet_in_bgr_with_a_neck_is_followed_too() -> None:
    weights, spec = random_network("ehpnet", SIZE)
    graph = build_graph(weights, spec)
    start = emitted(graph, measured(graph), "cpu")
    network = fake_quantised(start, spec).eval()
    crops = random_crops(16, SIZE, seed=3)
    made = trained_quantisation(network, start.source_table, spec).graph(start.source)
    assert np.abs(run_exactly(made, crops) - angles_of(network, crops, spec)).mean() < 0.02


def test_training_begins_from_layers_of_the_float_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounded weights or a rewritten stem have biases that the module would add to other sums."""
    weights, spec = shipped()
    start = shipped_start("cpu")
    for other in (Recipe(exact_input=True), Recipe(full_stem=True)):
        with pytest.raises(UsageError, match="rounding=False"):
            fake_quantised(replace(start, recipe=other), spec)
    file = tmp_path / "float.safetensors"
    save_weights(file, weights, spec)
    data = write_faces(tmp_path / "faces", 24, np.random.default_rng(7), labelled=False)

    def only_asked(*_: object, rounding: bool | None = None, **__: object) -> None:
        raise DataError(f"asked for rounding: {rounding}")

    # The method that is chosen where none is named rounds, unless told not to.
    monkeypatch.setattr("edgehp.training.quantization_aware.quantise", only_asked)
    items = unlabelled_items(data.samples)
    with pytest.raises(DataError, match="rounding: False"):
        train_quantised(items, CONFIG, tmp_path / "run", start=file, flavour="cpu", labelled=False)


def test_a_scale_learns_from_rounding_inside_and_from_clipping_outside() -> None:
    network = fake_quantised(shipped_start("cpu"), shipped()[1])
    activation = network.activations["relu"]
    scale = float(activation.scale().detach())
    x = torch.tensor([0.4 * scale, 7.3 * scale, 300 * scale], requires_grad=True)
    activation(x).floats().backward(torch.ones(3))
    # Esser et al., equation 3: q - x / scale inside, the last integer outside.
    expected = (0 - 0.4) + (7 - 7.3) + 255
    assert float(activation.steps.grad) == pytest.approx(0.5 * scale * expected, rel=1e-4)
    assert x.grad.tolist() == pytest.approx([1, 1, 0])


def test_a_disturbed_network_learns_to_answer_as_its_float_teacher(tmp_path: Path) -> None:
    _, spec = shipped()
    network = moved(fake_quantised(shipped_start("cpu"), spec))
    teacher = load_module(bundled_path("kd-resnet18-112"), spec)[0].requires_grad_(False)
    objective = FloatTeacher(teacher, spec)
    items = unlabelled_items(write_faces(tmp_path / "faces", 32, np.random.default_rng(7)).samples)
    config = replace(CONFIG, epochs=3, learning_rate=0.05, flatten=0, weight_decay=0)
    trainer = Trainer(network, spec, objective, items, config, tmp_path / "run")
    losses = [progress.loss for progress in trainer.run()]
    assert np.mean(losses[-4:]) < 0.5 * np.mean(losses[:4])


def test_a_run_keeps_its_best_epoch_and_says_how_near_it_is(tmp_path: Path) -> None:
    weights, spec = shipped()
    start = tmp_path / "float.safetensors"
    save_weights(start, weights, spec)
    data = write_faces(tmp_path / "faces", 24, np.random.default_rng(7), labelled=False)
    items = unlabelled_items(data.samples)
    config = replace(CONFIG, learning_rate=0.002)
    chosen = {"start": start, "held_back": 0.15, "method": "minmax", "labelled": False}
    folder = tmp_path / "run"
    result = train_quantised(items, config, folder, flavour="tensorrt", **chosen)
    differences = [row["difference"] for row in result.history]
    assert [row["epoch"] for row in result.history] == [0, 1, 2]
    assert "mae" not in result.history[0]
    done = trained_for(result.weights, spec, "tensorrt")
    assert done is not None
    graph = build_graph(weights, spec)
    held = split(items, 0.15)[1]
    crops = np.stack([crop_face(i.sample.load(), i.sample.box, spec.preprocessing) for i in held])
    found = np.abs(run_exactly(done.graph(graph), crops) - run_exactly(graph, crops)).mean()
    assert found == pytest.approx(min(differences), abs=0.02)
    made = done.quantised(graph, list(crops), threads=1)
    assert made.chosen == TRAINED
    assert made.findings == ()
    # A finished run is not begun again.
    again = train_quantised(items, config, folder, flavour="tensorrt", **chosen)
    assert [row["difference"] for row in again.history] == differences
    with pytest.raises(UsageError, match="quantised already"):
        train_quantised(
            items, config, folder, flavour="tensorrt", **{**chosen, "start": result.weights}
        )


def test_the_other_flavour_joins_the_file(tmp_path: Path, cpu_file: Path) -> None:
    data = write_faces(tmp_path / "faces", 24, np.random.default_rng(7))
    config = replace(CONFIG, epochs=1, learning_rate=0.01)
    result = train_quantised(
        with_labels(data.samples),
        config,
        tmp_path / "run",
        start=cpu_file,
        flavour="tensorrt",
        label_weight=0.1,
        held_back=0.15,
        limit=12,
        method="minmax",
    )
    assert result.trained <= 12
    assert set(read_trained(result.weights)) == {"cpu", "tensorrt"}
    assert result.history[-1]["float_mean"] > 0
    assert len(result.history[-1]["mae"]) == 3
    # The flavour is among the settings, so a run of the other one is not mixed in.
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert "tensorrt" in json.loads(state["config"])["task"]


def test_damaged_or_foreign_integers_are_refused(tmp_path: Path, cpu_file: Path) -> None:
    weights, spec = load_weights(cpu_file)
    stored = stored_tensors(read_trained(cpu_file)["cpu"])
    start = f"{QUANTISED_PREFIX}cpu."
    table = start + "table"
    other = stored[start + "conv1.weight"].copy()
    other[0, 0, 0, 0] ^= 1
    hurt = {
        "its table belongs to the weights": {**stored, start + "conv1.weight": other},
        "no table": {k: v for k, v in stored.items() if k != table},
        "JSON": {**stored, table: stored[table][:100]},
        "conv1 has bias float32, scale float32": {
            k: v for k, v in stored.items() if k != start + "conv1.weight"
        },
        "shapes": {**stored, start + "conv1.scale": np.ones(3, np.float32)},
        "values that cannot be": {**stored, start + "conv1.scale": np.zeros(64, np.float32)},
        "weight float16": {**stored, start + "conv1.weight": other.astype(np.float16)},
        "nobody knows what": {**stored, start + "conv1.colour": np.ones(3, np.float32)},
        "known flavours": {QUANTISED_PREFIX + "dsp.table": stored[table]},
    }
    path = tmp_path / "net.safetensors"
    for message, tensors in hurt.items():
        save_weights(path, weights, spec, extra=tensors)
        with pytest.raises(CheckpointError, match=message):
            read_trained(path)
        assert load_weights(path)[1] == spec  # the float network is whole
    path.write_bytes(cpu_file.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="truncated"):
        read_trained(path)
    with pytest.raises(UsageError, match="for the flavour cpu, not tensorrt"):
        trained_for(cpu_file, spec, "tensorrt")
    with pytest.raises(UsageError, match="other crops than these of 64 pixels"):
        trained_for(cpu_file, spec.with_size(64), "cpu")
    deeper = build_graph(*random_network("kd-resnet34", SIZE))
    with pytest.raises(CheckpointError, match="do not fit the network"):
        read_trained(cpu_file)["cpu"].graph(deeper)
    assert read_trained(bundled_path("kd-resnet18-112")) == {}


def test_a_build_takes_the_trained_integers_or_says_why_not(tmp_path: Path, cpu_file: Path) -> None:
    network, named, _ = open_network(str(cpu_file), None)
    assert not named
    graph, crops = network.graph(), random_crops(16, SIZE, seed=5)
    made = quantised_graph(graph, crops, network, "cpu", "auto", half=False, threads=1)
    assert made.method == TRAINED
    trained = read_trained(cpu_file)["cpu"]
    assert graph_bytes(made.model) == graph_bytes(trained.graph(graph))
    kept = made.keeping(["layer1.0.conv1"])
    assert "layer1.0.conv1.weight.int8" not in constants(kept)
    again = quantised_graph(graph, crops, network, "cpu", "minmax", half=False, threads=1)
    assert again.method != TRAINED
    with pytest.raises(UsageError, match="not tensorrt"):
        quantised_graph(graph, crops, network, "tensorrt", "auto", half=True, threads=1)


def test_bad_command_lines_end_in_one_clear_sentence(tmp_path: Path, cpu_file: Path) -> None:
    faces = tmp_path / "faces"
    write_faces(faces, 8, np.random.default_rng(7), labelled=False)
    graph = tmp_path / "graph.onnx"
    graph.write_bytes(b"x")
    base = [str(faces), "--out", str(tmp_path / "run"), "--device", "cpu"]
    aware = [*base, "--quantization-aware"]
    start = ["--start", str(cpu_file)]
    trt = ["--flavour", "tensorrt"]
    cases = {
        "give its checkpoint with --start": [*aware, *trt],
        "give --target, or --flavour": [*aware, *start],
        "and not both": [*aware, *start, *trt, "--target", "cpu"],
        "quantised already: it holds": [*aware, *start, "--flavour", "cpu"],
        "possibly quantised already": [*aware, *trt, "--start", str(graph)],
        "is the teacher here": [*aware, *start, *trt, "--teacher", str(cpu_file)],
        "leave --size out": [*aware, *start, *trt, "--size", "64"],
        "need photos with labels": [*aware, *start, *trt, "--label-weight", "1"],
        "FP16 cannot hold": [*aware, *start, *trt, "--precision", "fp16"],
        "--flavour is for --quantization-aware": [*base, *trt],
    }
    for message, arguments in cases.items():
        result = CliRunner().invoke(distill_command, arguments)
        assert isinstance(result.exception, UsageError), (message, result.output)
        assert message in str(result.exception)
        assert "\n" not in str(result.exception)
    unknown = CliRunner().invoke(distill_command, [*aware, *start, "--flavour", "dsp"])
    assert unknown.exit_code == 2
    assert "'dsp' is not one of" in unknown.output
    nowhere = CliRunner().invoke(distill_command, [*aware, *start, "--target", "orinn"])
    assert isinstance(nowhere.exception, UsageError)
    assert not (tmp_path / "run").exists()
