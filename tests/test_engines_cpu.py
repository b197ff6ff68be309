"""OpenVINO and onnxruntime on a real graph: they agree, and refuse what is not a crop."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

from edgehp.engines import (
    Engine,
    StreamingEngine,
    engine_available,
    open_engine,
)
from edgehp.engines.base import constant_types
from edgehp.engines.build import BuildOptions, build_engine, quantised_convolutions
from edgehp.errors import CompatibilityError, DataError, EnvironmentalError, UsageError
from edgehp.networks.graph import build_graph, graph_bytes
from edgehp.quantization.qdq import Emitter
from edgehp.quantization.table import calibrate
from tests.helpers import random_crops, random_network
from tests.tensorrt_bindings.graphs import tiny_graph

SIZE = 64
KINDS = ("openvino", "onnxruntime")


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    weights, spec = random_network(size=SIZE)
    path = tmp_path_factory.mktemp("graph") / "network.onnx"
    path.write_bytes(graph_bytes(build_graph(weights, spec)))
    return path


@pytest.fixture(scope="module", params=KINDS)
def engine(request: pytest.FixtureRequest, graph: Path) -> Iterator[Engine]:
    with open_engine(request.param, graph, threads=1) as opened:
        yield opened


def test_the_two_runtimes_agree(graph: Path, seed: int) -> None:
    crops = random_crops(5, SIZE, seed)
    answers = []
    for kind in KINDS:
        with open_engine(kind, graph, threads=1) as engine:
            answers.append(engine.infer(crops))
    first, second = answers
    assert first.angles.dtype == first.spread.dtype == np.float32
    assert first.angles.shape == first.spread.shape == (5, 3)
    assert np.ptp(first.angles, axis=0).min() > 1  # or agreement would mean little
    np.testing.assert_allclose(first.angles, second.angles, atol=1e-3)
    np.testing.assert_allclose(first.spread, second.spread, atol=1e-3)


@pytest.mark.parametrize("batch", [None, 1, 4])
def test_any_batch_size_gives_the_same_answer(graph: Path, batch: int | None, seed: int) -> None:
    crops = random_crops(4, SIZE, seed)
    for kind in KINDS:
        with open_engine(kind, graph, threads=1, batch=batch) as engine:
            whole = engine.infer(crops)
            parts = [engine.infer(crops[:3]), engine.infer(crops[3:])]
        angles = np.concatenate([p.angles for p in parts])
        np.testing.assert_allclose(angles, whole.angles, atol=1e-3)


def test_answers_are_not_overwritten_by_the_next_call(engine: Engine, seed: int) -> None:
    crops = random_crops(2, SIZE, seed)
    first = engine.infer(crops[:1])
    kept = first.angles.copy()
    engine.infer(crops[1:])
    np.testing.assert_array_equal(first.angles, kept)


def test_strided_and_read_only_crops_are_taken(engine: Engine, seed: int) -> None:
    crops = random_crops(4, SIZE, seed)
    expected = engine.infer(crops[::2].copy())
    np.testing.assert_allclose(engine.infer(crops[::2]).angles, expected.angles, atol=1e-4)
    frozen = crops[::2].copy()
    frozen.flags.writeable = False
    np.testing.assert_allclose(engine.infer(frozen).angles, expected.angles, atol=1e-4)


@pytest.mark.parametrize(
    ("crops", "says"),
    [
        (np.zeros((1, SIZE, SIZE, 3), np.float32), "normalisation is inside the graph"),
        (np.zeros((SIZE, SIZE, 3), np.uint8), "add the batch dimension"),
        (np.zeros((1, 3, SIZE, SIZE), np.uint8), "channels come last"),
        (np.zeros((1, SIZE, SIZE + 1, 3), np.uint8), r"\[1, 64, 65, 3\]"),
        (np.zeros((0, SIZE, SIZE, 3), np.uint8), "empty batch"),
        ([[1]], "numpy array"),
    ],
)
def test_what_is_no_crop_is_refused(engine: Engine, crops: object, says: str) -> None:
    with pytest.raises(DataError, match=says):
        engine.infer(crops)  # type: ignore[arg-type]


def test_info_tells_what_runs(engine: Engine) -> None:
    info = engine.info
    assert info.kind in KINDS
    assert info.threads == 1
    assert engine.input_size == SIZE
    if info.kind == "openvino":
        assert info.precision == "fp32"  # bf16 on many processors without the hint


def test_a_stream_keeps_order_and_sizes(graph: Path, seed: int) -> None:
    crops = random_crops(7, SIZE, seed)
    with open_engine("openvino", graph, threads=2) as engine:
        assert isinstance(engine, StreamingEngine)
        expected = engine.infer(crops).angles
        batches = [crops[:2], crops[2:3], crops[3:6], crops[6:]]
        answers = list(engine.stream(iter(batches)))
        # Stopping early leaves the engine usable.
        next(iter(engine.stream(iter(batches))))
        again = engine.infer(crops).angles
    assert [len(a.angles) for a in answers] == [2, 1, 3, 1]
    np.testing.assert_allclose(np.concatenate([a.angles for a in answers]), expected, atol=1e-3)
    np.testing.assert_allclose(again, expected, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_refused(kind: str, graph: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        open_engine(kind, tmp_path / "absent.onnx")
    broken = tmp_path / "broken.onnx"
    for content in (b"", graph.read_bytes()[:2000], b"not a graph" * 100):
        broken.write_bytes(content)
        with pytest.raises(DataError, match=r"broken\.onnx"):
            open_engine(kind, broken)


@pytest.mark.parametrize("kind", KINDS)
def test_another_graph_is_refused(kind: str, tmp_path: Path) -> None:
    text = '<ir_version: 8, opset_import: ["" : 17]> other (float[n, 3] x) => (float[n, 3] y) '
    path = tmp_path / "other.onnx"
    onnx.save(onnx.parser.parse_model(text + "{ y = Relu (x) }"), path)
    with pytest.raises(DataError, match="expected one input 'crops'"):
        open_engine(kind, path)


def test_a_closed_engine_says_so(graph: Path) -> None:
    for kind in KINDS:
        engine = open_engine(kind, graph, threads=1)
        engine.close()
        engine.close()
        with pytest.raises(EnvironmentalError, match="closed"):
            engine.infer(np.zeros((1, SIZE, SIZE, 3), np.uint8))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrong", [{"threads": 0}, {"device": "GPU"}])
def test_wrong_settings_are_refused(kind: str, wrong: dict[str, object], graph: Path) -> None:
    with pytest.raises(UsageError):
        open_engine(kind, graph, **wrong)  # type: ignore[arg-type]


def test_unknown_engines_are_named() -> None:
    with pytest.raises(UsageError, match="known: openvino, onnxruntime"):
        open_engine("torch", "x")
    assert engine_available("openvino") is None


@pytest.fixture(scope="module")
def quantised(graph: Path) -> dict[str, Path]:
    """The graph with Q/DQ nodes, in the flavor of each engine."""
    model = onnx.load(str(graph))
    table = calibrate(model, list(random_crops(8, SIZE, 1)), methods=("minmax",), threads=1)
    paths = {}
    for kind, flavor in (("openvino", "cpu"), ("onnxruntime", "onnxruntime")):
        paths[kind] = graph.with_name(f"quantised-{kind}.onnx")
        paths[kind].write_bytes(graph_bytes(Emitter(model, flavor)(table, "minmax")))
    return paths


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_graph_really_runs_in_int8(
    kind: str, quantised: dict[str, Path], tmp_path: Path
) -> None:
    quantised, out = quantised[kind], tmp_path / "engine.onnx"
    report = build_engine(kind, quantised, out, BuildOptions(precision="int8", threads=1))
    assert report.audit.convolutions.get("int8") == len(quantised_convolutions(quantised)) > 0
    assert report.audit.reached == "int8"
    # The engine is the graph, so its hash does not depend on the machine that built it.
    assert out.read_bytes() == quantised.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["engine.onnx"]


@pytest.mark.parametrize("kind", KINDS)
def test_precision_and_graph_must_fit(
    kind: str, graph: Path, quantised: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "engine.onnx"
    with pytest.raises(DataError, match="no convolution of the graph has Q/DQ"):
        build_engine(kind, graph, out, BuildOptions(precision="int8"))
    with pytest.raises(DataError, match="convolutions of the graph have Q/DQ nodes"):
        build_engine(kind, quantised[kind], out, BuildOptions(precision="fp32"))
    with pytest.raises(UsageError, match="no fp16"):
        build_engine(kind, graph, out, BuildOptions(precision="fp16"))
    assert not out.exists()


def test_less_than_int8_is_an_error(tmp_path: Path) -> None:
    # Signed activations in an FP16 graph: onnxruntime would run its convolutions in FP32.
    path = tmp_path / "signed.onnx"
    path.write_bytes(tiny_graph("int8"))
    with pytest.raises(CompatibilityError, match="int8 was asked for and 2 convolutions"):
        build_engine("onnxruntime", path, tmp_path / "engine", BuildOptions(precision="int8"))


def test_types_of_constants_are_found_without_onnx(graph: Path, tmp_path: Path) -> None:
    path = tmp_path / "half.onnx"
    path.write_bytes(tiny_graph("int8"))
    half, int8 = onnx.TensorProto.FLOAT16, onnx.TensorProto.INT8
    assert {half, int8} <= constant_types(path)
    assert not {half, int8} & constant_types(graph)
    for content in (b"", b"not a graph" * 50, path.read_bytes()[:40]):
        path.write_bytes(content)
        assert not constant_types(path)


@pytest.mark.parametrize("used_by_others", [False, True])
def test_openvino_is_imported_without_its_telemetry(tmp_path: Path, used_by_others: bool) -> None:
    """Nothing is reported, and nothing else about it changes."""
    pytest.importorskip("openvino_telemetry")
    code = (
        "import sys\n"
        "from edgehp.engines.openvino import check_available; check_available()\n"
        f"{'import openvino_telemetry.backend.backend_ga4' * used_by_others}\n"
        "import openvino\n"
        # Whether the telemetry's sender was loaded.
        "print('backend_ga4' in ' '.join(sys.modules), len(openvino.Core().available_devices))"
    )
    # Neither a consent file nor CI's variables, which silence it too.
    env = {k: v for k, v in os.environ.items() if k not in ("CI", "TF_BUILD", "JENKINS_URL")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**env, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    loaded, devices = done.stdout.split()
    assert loaded == str(used_by_others)
    assert int(devices) >= 1
    assert not list(tmp_path.iterdir()), "a consent or statistics file was written"
