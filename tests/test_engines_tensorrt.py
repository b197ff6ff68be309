"""The TensorRT runtime on the driver double, and everything about TensorRT that needs none."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

from edgehp.device import find_jetson
from edgehp.driver import DriverProbe, Gpu, RunResult, probe_driver
from edgehp.engines import open_engine, tensorrt_build
from edgehp.engines import trt as trt_module
from edgehp.engines.audit import LayerPrecision, PrecisionAudit
from edgehp.engines.base import TimedEngine
from edgehp.engines.build import BuildOptions
from edgehp.engines.cuda import Cuda, GpuLostError, check_cuda_package
from edgehp.engines.tensorrt_build import check_support, timing_cache_path
from edgehp.engines.trt import audit_network, newest_opset, read_inspection, require_parsable
from edgehp.errors import CompatibilityError, DataError, EnvironmentalError, UsageError
from edgehp.pipeline.pipeline import build
from edgehp.pipeline.plan import BuildRequest
from edgehp.quantization.qdq import Emitter
from edgehp.quantization.table import calibrate
from tests.boards import JETSONS
from tests.driver.adapter_checks import crops_of, open_double
from tests.driver.double import Driver, load_double
from tests.driver.tensorrt import TensorRtDouble, expected
from tests.helpers import random_crops
from tests.pose_graphs import graph_of, pose_graph
from tests.quantization_graphs import SIZE as GRAPH_SIZE
from tests.quantization_graphs import parse_rtx, small_network


@pytest.fixture
def driver() -> Iterator[Driver]:
    """The driver double in this process, which must hold nothing when the test is over."""
    pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")
    found = load_double()
    yield found
    found.fault(0)
    assert found.live == 0
    assert found.abandoned == 0


@pytest.fixture
def trt(driver: Driver) -> TensorRtDouble:
    del driver
    return TensorRtDouble()


def cuda() -> Cuda:
    from cuda.bindings import driver as bindings

    return Cuda(0, bindings)


@pytest.mark.parametrize("batch", [None, 1, 3])
def test_every_batch_size_gives_the_networks_answer(trt: TensorRtDouble, batch: int | None) -> None:
    with open_double(trt, cuda(), batch) as engine:
        for turn, count in enumerate((8, 3, 8, 1, 2, 3, 9, 17, 8)):
            crops = crops_of(count, turn)
            answer = engine.infer(crops)
            angles, spread = expected(crops, min(count, 8))
            np.testing.assert_allclose(answer.angles, angles, rtol=1e-5)
            rest = count % 8 if count > 8 else 0
            whole = count - rest
            np.testing.assert_allclose(answer.spread[:whole], spread[:whole], rtol=1e-5)
        assert engine.info.details["cuda_graph_batches"] == (sorted({1, 4, batch}) if batch else [])
    assert trt.violations == []


@pytest.mark.parametrize("graph", [True, False])
def test_upload_inference_and_download_are_timed_on_the_gpu(
    driver: Driver, trt: TensorRtDouble, graph: bool
) -> None:
    """The double's clock: 0.25 ms a copy to the GPU, 1 ms a crop, twice 0.125 ms back."""
    if not graph:
        driver.fail("cuStreamBeginCapture_v2", 900)
    with open_double(trt, cuda(), 4 if graph else None) as engine:
        assert isinstance(engine, TimedEngine)
        assert engine.stage_clock == "CUDA events"
        for _ in range(2):
            crops = crops_of(4)
            answer, times = engine.infer_timed(crops)
            np.testing.assert_allclose(answer.angles, expected(crops, 4)[0], rtol=1e-5)
            found = (times.upload, times.inference, times.download)
            assert found == pytest.approx((0.25e-3, 4e-3, 0.25e-3))
        # Eleven crops run in two parts of at most eight.
        _, times = engine.infer_timed(crops_of(11))
        assert times.inference == pytest.approx(11e-3)
        assert times.upload == pytest.approx(0.5e-3)
    driver.fail("", 0)


@pytest.mark.usefixtures("driver")
def test_an_engine_for_larger_batches_takes_a_single_crop() -> None:
    crops = crops_of(1)
    with open_double(TensorRtDouble((2, 2, 4)), cuda(), 2) as engine:
        np.testing.assert_allclose(engine.infer(crops).spread, expected(crops, 2)[1], rtol=1e-5)


def test_closing_frees_everything(driver: Driver, trt: TensorRtDouble) -> None:
    engine = open_double(trt, cuda(), 1)
    assert driver.live > 10
    engine.close()
    engine.close()
    assert driver.live == 0
    with pytest.raises(EnvironmentalError, match="closed"):
        engine.infer(crops_of(1))


@pytest.mark.parametrize(
    ("call", "after"),
    [
        ("cuMemHostAlloc", 0),
        ("cuMemHostAlloc", 1),
        ("cuMemAlloc_v2", 0),
        ("cuMemAlloc_v2", 2),
        ("cuStreamCreate", 0),
        ("cuEventCreate", 3),
        ("cuStreamSynchronize", 1),
    ],
)
def test_a_failed_opening_frees_everything(
    driver: Driver, trt: TensorRtDouble, call: str, after: int
) -> None:
    driver.fail(call, 2, after)
    with pytest.raises(EnvironmentalError, match="failed with CUDA_ERROR_OUT_OF_MEMORY"):
        open_double(trt, cuda(), 1)
    assert driver.live == 0


def test_tensorrts_reasons_are_told(trt: TensorRtDouble) -> None:
    with open_double(trt, cuda()) as engine:
        trt.fails_run = True
        with pytest.raises(EnvironmentalError, match="run the engine: shapes or addresses"):
            engine.infer(crops_of(1))
    trt.refuses_address = "spread"
    with pytest.raises(EnvironmentalError, match="use the memory for 'spread'"):
        open_double(trt, cuda())
    trt.refuses_plan = True
    with pytest.raises(CompatibilityError, match=r"built for compute capability 8\.9, found 8\.7"):
        open_double(trt, cuda())


@pytest.mark.parametrize("status", [700, 719])
def test_a_lost_gpu_is_told_as_one(driver: Driver, trt: TensorRtDouble, status: int) -> None:
    engine = open_double(trt, cuda(), 1)
    driver.fault(status)
    with pytest.raises(GpuLostError, match="start the command again"):
        engine.infer(crops_of(1))
    driver.fault(0)
    engine.close()


def test_other_engines_and_batches_are_refused(trt: TensorRtDouble) -> None:
    with pytest.raises(UsageError, match="batch size 9 asked for, the engine was built for 1 to 8"):
        open_double(trt, cuda(), 9)
    trt.outputs = ("boxes",)
    with pytest.raises(DataError, match="expected one input 'crops'"):
        open_double(trt, cuda())
    again = TensorRtDouble()
    again.input_type = again.DataType.FLOAT
    with pytest.raises(DataError, match="uint8"):
        open_double(again, cuda())


def test_without_a_graph_it_runs_and_says_so(driver: Driver, trt: TensorRtDouble) -> None:
    crops = crops_of(1)
    driver.fail("cuGraphInstantiateWithFlags", 2)
    with open_double(trt, cuda(), 1) as engine:
        assert engine.info.details["cuda_graph_batches"] == [4]
        np.testing.assert_allclose(engine.infer(crops).spread, expected(crops, 1)[1], rtol=1e-5)


def test_info_comes_from_the_engine(trt: TensorRtDouble) -> None:
    with open_double(trt, cuda(), 2) as engine:
        info = engine.info
    assert (info.kind, info.version, info.device) == ("tensorrt", "10.3.0", "Double GPU")
    assert info.precision == "int8"
    json.dumps(info.to_dict())


@pytest.mark.parametrize(
    ("version", "capability", "options", "says"),
    [
        ("8.5.2", "8.7", {}, "knows 8.6, 10.x and 11.x"),
        ("9.1.0", "8.7", {}, "knows 8.6"),
        ("10.5.0", "7.0", {}, r"10\.4\.0 or older"),
        ("10.3.0", "8.7", {"dla": 0, "dla_cores": 2, "batch": (1, 1, 1)}, r"11\.4\.1"),
        ("10.3.0", "8.9", {"compute_capabilities": ("8.7",)}, "build on the device itself"),
        ("10.3.0", "8.7", {"hardware_compatible": True}, "discrete GPUs from Ampere on"),
        ("10.3.0", "7.5", {"hardware_compatible": True}, "discrete GPUs from Ampere on"),
    ],
)
def test_what_a_version_cannot_do_is_refused(
    version: str, capability: str, options: dict[str, object], says: str
) -> None:
    with pytest.raises(CompatibilityError, match=says):
        check_support(version, capability, BuildOptions(**options))  # type: ignore[arg-type]


def test_what_a_version_can_do_is_let_through() -> None:
    for version, capability in (("8.6.2", "8.7"), ("10.4.0", "7.0"), ("11.4.1", "12.0")):
        check_support(version, capability, BuildOptions(compute_capabilities=(capability,)))


def test_the_inspectors_words_are_understood() -> None:
    layers = [
        {
            "Name": "conv1 + relu",
            "LayerType": "CaskConvolution",
            "ParameterType": "Convolution",
            "Inputs": [{"Format/Datatype": "N/A due to dynamic shapes"}],
            "Weights": {"Type": "Int8", "Count": 9},
            "TacticName": "sm80_xmma",
        },
        {
            "Name": "conv2",
            "LayerType": "CaskConvolution",
            "Inputs": [{"Format/Datatype": "Channel major FP16 format"}],
        },
        {"Name": "heads", "LayerType": "gemm", "Inputs": [{"Format/Datatype": "Float"}]},
        {"Name": "more", "LayerType": "gemm", "Inputs": [{"Format/Datatype": "Row BFloat16"}]},
    ]
    audit = read_inspection(json.dumps({"Layers": layers}))
    assert [(r.kind, r.precision) for r in audit.rows] == [
        ("Convolution", "int8"),
        ("Convolution", "fp16"),
        ("gemm", "fp32"),
        ("gemm", "bf16"),
    ]
    with pytest.raises(CompatibilityError, match="1 in fp16, 1 in int8"):
        audit.require("int8", 2, "the engine")
    audit.require("int8", 1, "the engine")
    # An engine without details is opaque, not fine.
    audit = read_inspection(json.dumps({"Layers": ["conv1", "conv2"]}))
    assert audit.reached == "unknown"
    with pytest.raises(CompatibilityError, match="none found"):
        audit.require("int8", 2, "the engine")


def convolutions(source: str, *names: str) -> PrecisionAudit:
    return PrecisionAudit(source, tuple(LayerPrecision(n, "Convolution", "int8") for n in names))


def test_convolutions_inside_fused_layers_come_from_the_network() -> None:
    engine = convolutions("engine inspector", "conv1 + relu")
    audit = engine.completed_by(convolutions("parsed network", "conv1", "layer1.0.conv1"))
    assert [r.layer for r in audit.rows] == ["conv1 + relu", "layer1.0.conv1"]
    assert "parsed network" in audit.rows[1].detail
    assert audit.opaque == "1 convolutions are inside fused layers"
    # Those whose names are joined are not counted again.
    for name in ("a || b", "a + relu || b", "{ForeignNode[a...b]}"):
        engine = convolutions("engine inspector", name)
        assert engine.completed_by(convolutions("parsed network", "a", "b")) is engine


def test_each_layer_of_a_dla_engine_says_where_it_runs() -> None:
    rows = (
        LayerPrecision("{ForeignNode[conv1...relu]}", "DLA", "int8"),
        LayerPrecision("softmax + squeeze", "Softmax", "fp16", "tactic"),
    )
    audit = PrecisionAudit("engine inspector", rows).placed(1, ["softmax", "to_float"])
    assert [r.detail for r in audit.rows] == ["DLA core 1", "GPU: tactic"]


def test_timings_are_kept_by_gpu_version_and_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    options = BuildOptions()
    paths = {
        timing_cache_path("Orin (nvgpu)", "10.3.0", options),
        timing_cache_path("Orin (nvgpu)", "10.16.2", options),
        timing_cache_path("NVIDIA L4", "10.3.0", options),
        timing_cache_path("NVIDIA L4", "10.3.0", replace(options, precision="fp16")),
    }
    assert len(paths) == 4
    assert all(p.is_relative_to(tmp_path / "edgehp" / "timing") for p in paths)


@pytest.mark.parametrize(
    ("driver_of", "installed", "answer"),
    [
        ("12.2", {}, "[cuda12]"),
        ("12.6", {}, "[cuda12]"),
        ("13.2", {}, "[cuda13]"),
        ("12.6", {"cuda.bindings": "13.5.0"}, "needs a driver of CUDA 13"),
        ("12.6", {"cuda.bindings": "12.9.10", "pycuda": "2026.1"}, "cuda-bindings"),
        ("13.2", {"cuda.bindings": "12.9.10"}, "cuda-bindings"),
        ("12.6", {"pycuda": "2026.1"}, "pycuda"),
    ],
)
def test_the_cuda_package_is_that_of_the_driver(
    monkeypatch: pytest.MonkeyPatch, driver_of: str, installed: dict[str, str], answer: str
) -> None:
    monkeypatch.setattr("edgehp.engines.cuda._installed", installed.__contains__)
    monkeypatch.setattr(metadata, "version", lambda name: installed["cuda.bindings"])
    probe = DriverProbe(driver_of, (Gpu("Orin", "8.7"),))
    if answer in ("cuda-bindings", "pycuda"):
        assert check_cuda_package(probe) == answer
        return
    with pytest.raises(EnvironmentalError) as e:
        check_cuda_package(probe)
    assert answer in str(e.value) and f"CUDA {driver_of}" in str(e.value)
    assert f"[cuda{driver_of[:2]}]'" in str(e.value).partition("\nhint: ")[2]


def test_the_builder_leaves_a_jetson_its_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = JETSONS["Nano super kit, 6.2"].write(tmp_path)
    monkeypatch.setattr(trt_module, "find_jetson", lambda: find_jetson(root))
    limits = []
    module, config = SimpleNamespace(), SimpleNamespace()
    for name in ("BuilderFlag", "ProfilingVerbosity", "MemoryPoolType"):
        setattr(module, name, SimpleNamespace(TF32=1, DETAILED=2, WORKSPACE="workspace"))
    config.clear_flag = lambda flag: None
    config.set_memory_pool_limit = lambda pool, size: limits.append(size)
    for options in (BuildOptions(), BuildOptions(workspace_mib=64)):
        trt_module.configure(module, config, options)
    monkeypatch.setattr(trt_module, "find_jetson", lambda: None)
    trt_module.configure(module, config, BuildOptions())
    # A quarter of what Linux has; what was asked for; elsewhere TensorRT's own.
    assert limits == [1904 << 20, 64 << 20]


def test_a_slice_that_fills_has_inputs_that_are_not_there() -> None:
    """As TensorRT parses Pad: the audit must go past them to the convolution behind."""
    text = "padded (float[1, 3, 8, 8] x) => (float[1, 4, 8, 8] y) { p = Pad (x, pads, value)"
    ones = np.ones((4, 3, 3, 3))
    pads = {"pads": [0, 0, 1, 1, 0, 0, 1, 1], "value": 1.0, "w": ones}
    _, network = parse_rtx(graph_of(text + " y = Conv (p, w) }", pads))
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    assert any(layer.get_input(j) is None for layer in layers for j in range(layer.num_inputs))
    assert audit_network(network).convolutions == {"fp32": 1}


def test_the_way_to_wait_reaches_a_gpu_and_no_processor(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("edgehp.engines.tensorrt.import_tensorrt", TensorRtDouble)
    probe = DriverProbe("13.0", (Gpu("Double GPU", "8.9"),))
    monkeypatch.setattr("edgehp.engines.cuda.probe_driver", lambda: probe)
    plan = tmp_path / "engine.plan"
    plan.write_bytes(b"plan")
    for wait, said in (("block", "blocks"), ("spin", "spins")):
        with open_engine("tensorrt", plan, wait=wait) as engine:
            assert engine.info.details["spin_wait"] == said
    driver.library.cuDevicePrimaryCtxSetFlags_v2(0, 0)
    with pytest.raises(UsageError, match="found --wait spin for openvino"):
        open_engine("openvino", plan, wait="spin")


@pytest.mark.parametrize("ranges_build", [True, False])
def test_volta_gets_int8_by_ranges_or_the_truth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranges_build: bool
) -> None:
    """Explicit Q/DQ has no implementation there; what TensorRT says is its own sentence."""
    network = small_network()
    table = calibrate(network, random_crops(4, GRAPH_SIZE), threads=1)
    graph = tmp_path / "graph.onnx"
    graph.write_bytes(Emitter(network, "tensorrt", "fp16")(table, "mse").SerializeToString())
    asked: list[object] = []

    def build_plan(
        trt: object, path: Path, options: BuildOptions, quantised: int, ranges: object = None
    ) -> tuple[bytes, PrecisionAudit, tuple[str, ...]]:
        asked.append(ranges)
        nodes = {n.op_type for n in onnx.load(str(path)).graph.node}
        if ranges is None or not ranges_build:
            assert ("QuantizeLinear" in nodes) == (ranges is None)
            raise EnvironmentalError("Could not find any implementation for node conv1")
        return b"plan", PrecisionAudit("engine inspector", ()), ("weakly typed",)

    monkeypatch.setattr(tensorrt_build, "build_plan", build_plan)
    volta = DriverProbe("12.4", (Gpu("Tesla V100-SXM2-16GB", "7.0"),))
    monkeypatch.setattr(tensorrt_build, "probe_driver", lambda: volta)
    monkeypatch.setattr(
        "edgehp.engines.tensorrt.import_tensorrt", lambda: SimpleNamespace(__version__="10.4.0")
    )
    out = tmp_path / "engine.plan"
    if not ranges_build:
        with pytest.raises(
            EnvironmentalError, match=r"no INT8 tensor cores\nhint: --precision fp16"
        ):
            tensorrt_build.build("tensorrt", graph, out, BuildOptions())
        assert len(asked) == 2 and not out.exists()
        return
    report = tensorrt_build.build("tensorrt", graph, out, BuildOptions())
    assert "built from the float graph and the ranges" in report.warnings[0]
    assert report.warnings[1] == "weakly typed"
    assert isinstance(asked[1], dict) and {"relu", "maxpool"} & set(asked[1])


@pytest.mark.parametrize(("device", "core"), [(None, 0), ("dla:1", 1)])
def test_dla_core_is_set_before_the_engine_is_read(
    trt: TensorRtDouble, device: str | None, core: int
) -> None:
    trt.dla_cores = 2
    open_double(trt, cuda(), device=device).close()
    assert trt.dla == core
    assert trt.violations == []


def test_a_crashing_driver_is_reported_not_suffered(monkeypatch: pytest.MonkeyPatch) -> None:
    crash = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    monkeypatch.setattr("edgehp.driver.PROBE_CODE", crash)
    with pytest.raises(EnvironmentalError, match="crashed with SIGSEGV when asked for its GPUs"):
        probe_driver()


def test_the_drivers_answer_is_read() -> None:
    def read(answer: str) -> DriverProbe:
        return probe_driver(lambda *_: RunResult(0, answer, "broken interpreter", None))

    found = read('{"version": 12060, "gpus": [["Orin", 8, 7]]}')
    assert found == DriverProbe("12.6", (Gpu("Orin", "8.7"),))
    for text, says in (
        ('{"missing": "libcuda.so.1"}', "no NVIDIA driver found"),
        ('{"failed": "cuInit returned 999: unknown"}', "cuInit returned 999"),
        ('{"version": 12060, "gpus": []}', "finds no GPU"),
        ("", "gave no answer: broken interpreter"),
    ):
        with pytest.raises(EnvironmentalError, match=says):
            read(text)


def test_stubs_alone_are_not_tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgehp.engines.tensorrt import import_tensorrt

    if "tensorrt" in sys.modules:
        pytest.skip("TensorRT is loaded already")
    (tmp_path / "tensorrt").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        with pytest.raises(EnvironmentalError, match="only its type stubs"):
            import_tensorrt()
    finally:
        sys.modules.pop("tensorrt", None)


def test_operator_sets_and_element_types_are_refused(tmp_path: Path) -> None:
    known = {"8.6.2": 17, "9.2": 19, "10.3.0.30": 20, "10.16.2.10": 24, "11.5": 25}
    assert {version: newest_opset(version) for version in known} == known
    model = onnx.load(pose_graph(tmp_path / "net.onnx"))
    with pytest.raises(CompatibilityError, match=r"set 18; TensorRT 8\.6 of orin reads at most 17"):
        require_parsable(model, "8.6", "orin")
    require_parsable(model, "10.3", "orin")
    cast = next(n for n in model.graph.node if n.op_type == "Cast")
    for name, version in (("BFLOAT16", "8.6"), ("INT4", "9.2"), ("UINT4", "11.5")):
        cast.attribute[0].i = onnx.TensorProto.DataType.Value(name)
        model.opset_import[0].version = 17
        with pytest.raises(CompatibilityError, match=f"holds {name}, which TensorRT {version}"):
            require_parsable(model, version, "orin")


def test_a_deferred_build_is_refused_before_its_work(tmp_path: Path) -> None:
    path = pose_graph(tmp_path / "net.onnx")
    model = onnx.load(path)
    model.opset_import[0].version = 25
    onnx.save(model, path)
    request = BuildRequest("orin-agx-64gb", network=str(path), output=tmp_path / "dist", defer=True)
    with pytest.raises(CompatibilityError, match=r"TensorRT 10\.16\.2\.10 of orin"):
        build(request)
    assert not list((tmp_path / "dist").glob("*"))
