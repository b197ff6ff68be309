"""TensorRT for RTX: real engines, built ahead of time without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from edgehp.engines import engine_available, open_engine
from edgehp.engines.build import BuildOptions, BuildReport, build_engine
from edgehp.engines.tensorrt_rtx import check_plan
from edgehp.errors import CompatibilityError, DataError, EnvironmentalError, UsageError
from tests.tensorrt_bindings.graphs import tiny_graph

pytest.importorskip("tensorrt_rtx", reason="needs the wheel tensorrt-rtx-cu13")


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("graphs")
    for kind in ("fp32", "fp16", "int8"):
        (directory / f"{kind}.onnx").write_bytes(tiny_graph(kind))
    return directory


@pytest.fixture(scope="module")
def engine_file(graphs: Path) -> Path:
    """An INT8 engine for one GPU."""
    out = graphs / "int8.engine"
    build(graphs, "int8", out, ("8.6",))
    return out


def build(graphs: Path, kind: str, out: Path, capabilities: tuple[str, ...]) -> BuildReport:
    options = BuildOptions(precision=kind, compute_capabilities=capabilities, batch=(1, 1, 4))
    return build_engine("tensorrt-rtx", graphs / f"{kind}.onnx", out, options)


@pytest.mark.parametrize(
    ("kind", "capabilities"),
    [
        ("fp32", ("8.6", "8.9")),
        ("fp16", ("8.6", "8.9")),
        ("int8", ("7.5", "8.6", "8.9", "12.0")),
    ],
)
def test_engines_are_built_and_their_header_is_accepted(
    graphs: Path, tmp_path: Path, kind: str, capabilities: tuple[str, ...]
) -> None:
    out = tmp_path / "engine"
    report = build(graphs, kind, out, capabilities)
    assert report.files == (out,)
    assert report.audit.convolutions == {kind: 2}
    assert report.versions["tensorrt-rtx"].startswith("1.")
    check_plan(out)
    assert [p.name for p in tmp_path.iterdir()] == ["engine"]


def test_a_capability_it_does_not_know_stops_the_build(graphs: Path, tmp_path: Path) -> None:
    # The library itself would go on and build for the capability set before.
    with pytest.raises(CompatibilityError, match=r"does not build for compute capability 7\.0"):
        build(graphs, "fp32", tmp_path / "engine", ("8.6", "7.0"))
    assert not list(tmp_path.iterdir())


def test_turing_has_no_fp32_matrix_product(graphs: Path, tmp_path: Path) -> None:
    with pytest.raises(CompatibilityError, match=r"7\.5 .*heads.*fp16"):
        build(graphs, "fp32", tmp_path / "engine", ("7.5",))


def test_less_precision_than_asked_for_is_an_error(graphs: Path, tmp_path: Path) -> None:
    options = BuildOptions(precision="fp16", compute_capabilities=("8.6",))
    with pytest.raises(CompatibilityError, match=r"fp16 was asked for.*2 in fp32"):
        build_engine("tensorrt-rtx", graphs / "fp32.onnx", tmp_path / "engine", options)
    options = BuildOptions(precision="int8", compute_capabilities=("8.6",))
    with pytest.raises(DataError, match="no convolution of the graph has Q/DQ"):
        build_engine("tensorrt-rtx", graphs / "fp16.onnx", tmp_path / "engine", options)


def test_the_parsers_reasons_are_in_the_sentence(tmp_path: Path) -> None:
    model = onnx.load_from_string(tiny_graph("int8"))
    # uint8 activations are the processor's flavor; TensorRT refuses them.
    for tensor in model.graph.initializer:
        if tensor.name.endswith(".z"):
            tensor.CopyFrom(onnx.helper.make_tensor(tensor.name, onnx.TensorProto.UINT8, [], [128]))
    path = tmp_path / "cpu.onnx"
    path.write_bytes(model.SerializeToString())
    options = BuildOptions(precision="int8", compute_capabilities=("8.6",))
    with pytest.raises(DataError, match="parser refuses the graph") as caught:
        build_engine("tensorrt-rtx", path, tmp_path / "engine", options)
    assert "gave no reason" not in str(caught.value)


def test_damaged_engines_are_told_apart(engine_file: Path, tmp_path: Path) -> None:
    content = engine_file.read_bytes()
    path = tmp_path / "engine"
    for damaged, says in (
        (content[:-100], "truncated"),
        (content + b"123", "truncated or was added to"),
        (content[:40], "has 40 bytes"),
        (b"x" * len(content), "does not begin as an engine"),
        (b"", "0 bytes"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=says):
            check_plan(path)
    with pytest.raises(DataError, match="does not exist"):
        check_plan(tmp_path / "absent")


def test_what_makes_no_sense_is_refused(graphs: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="say for which GPUs"):
        build(graphs, "fp32", tmp_path / "engine", ())
    with pytest.raises(UsageError, match=r"'8\.6'"):
        BuildOptions(compute_capabilities=("sm86",))
    with pytest.raises(UsageError, match="no DLA core"):
        BuildOptions(dla=0, batch=(1, 1, 1))
    with pytest.raises(UsageError, match="batch sizes"):
        BuildOptions(batch=(2, 1, 8))
    with pytest.raises(UsageError, match="is not a directory"):
        build(graphs, "fp32", tmp_path / "absent" / "engine", ("8.6",))


def test_kernels_are_compiled_before_the_first_run_and_kept(tmp_path: Path, repo: Path) -> None:
    """By what the real bindings declare, on the driver double; nothing is captured by hand."""
    pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")
    done = subprocess.run(
        [sys.executable, repo / "tests/tensorrt_bindings/probe.py", "rtx"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["set"]["IRuntimeConfig.cuda_graph_strategy ="] == "WHOLE_GRAPH_CAPTURE"
    eager = "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy ="
    assert found["set"][eager] == "EAGER"
    assert "IRuntimeConfig.set_runtime_cache" in found["calls"]
    assert found["graphs"] == "captured by TensorRT for RTX"
    # Written once, after the first run.
    assert found["serialized"] == 1
    assert len(list(tmp_path.glob("edgehp/tensorrt-rtx/*.cache"))) == 1


def test_opening_without_a_gpu_says_what_is_missing(engine_file: Path) -> None:
    reason = engine_available("tensorrt-rtx")
    if reason is None:
        pytest.skip("there is a GPU here")
    with pytest.raises(EnvironmentalError, match=r"driver|GPU"):
        open_engine("tensorrt-rtx", engine_file)
