"""The TensorRT runtime on an emulated GPU, and everything about TensorRT that needs none."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from edgehp.driver import probe_driver
from edgehp.engines import engine_available
from edgehp.engines._trt_inspect import read_inspection
from edgehp.engines.audit import LayerPrecision, PrecisionAudit
from edgehp.engines.base import TimedEngine
from edgehp.engines.build import BuildOptions
from edgehp.engines.cuda import Cuda
from edgehp.engines.tensorrt import TensorRtEngine
from edgehp.engines.tensorrt_build import check_support
from edgehp.errors import CompatibilityError, DataError, EnvironmentalError, UsageError
from tests.tensorrt_bindings.fake_cuda import FakeCuda
from tests.tensorrt_bindings.fake_runtime import SIZE, FakeTensorRt, expected_angles


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda()


@pytest.fixture
def trt(cuda: FakeCuda) -> FakeTensorRt:
    return FakeTensorRt(cuda)


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "plan"
    path.write_bytes(b"plan")
    return path


def open_fake(
    cuda: FakeCuda, trt: FakeTensorRt, plan: Path, batch: int | None = None
) -> TensorRtEngine:
    class Engine(TensorRtEngine):
        def _open_cuda(self, device: str | None) -> Cuda:
            return cuda

        def _import(self) -> FakeTensorRt:
            return trt

    return Engine(plan, batch=batch)


def crops_of(count: int, rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 255, (count, SIZE, SIZE, 3), np.uint8)


@pytest.mark.parametrize("batch", [None, 1, 3])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9])
def test_every_batch_size_gives_the_networks_answer(
    cuda: FakeCuda,
    trt: FakeTensorRt,
    plan: Path,
    rng: np.random.Generator,
    batch: int | None,
    count: int,
) -> None:
    with open_fake(cuda, trt, plan, batch) as engine:
        for _ in range(2):
            crops = crops_of(count, rng)
            answer = engine.infer(crops)
            np.testing.assert_allclose(answer.angles, expected_angles(crops), rtol=1e-5)
            np.testing.assert_allclose(answer.spread, expected_angles(crops) + 1, rtol=1e-5)
        assert bool(cuda.launches) == (batch is not None and batch in (count, count % 4))
    assert set(trt.addresses) == {"crops", "angles", "spread"}
    assert len(set(trt.streams)) == 1
    assert trt.streams[0] != 0  # the default stream would wait for every other


@pytest.mark.parametrize("graph", [True, False])
def test_upload_inference_and_download_are_timed_on_the_gpu(
    cuda: FakeCuda, trt: FakeTensorRt, plan: Path, rng: np.random.Generator, graph: bool
) -> None:
    """Emulated: 0.25 ms a copy to the GPU, 1.5 ms a crop, twice 0.125 ms back."""
    cuda.fail_capture = not graph
    crops = crops_of(2, rng)
    with open_fake(cuda, trt, plan, 2) as engine:
        assert isinstance(engine, TimedEngine)
        assert engine.stage_clock == "CUDA events"
        for _ in range(2):
            answer, times = engine.infer_timed(crops)
            np.testing.assert_allclose(answer.angles, expected_angles(crops), rtol=1e-5)
            found = (times.upload, times.inference, times.download)
            assert found == pytest.approx((0.25e-3, 3e-3, 0.25e-3))
        assert cuda.launches == (2 if graph else 0)
        # Seven crops run in two parts of at most four.
        _, times = engine.infer_timed(crops_of(7, rng))
        assert times.inference == pytest.approx(7 * 1.5e-3)
        assert times.upload == pytest.approx(0.5e-3)
    assert not cuda.events


def test_an_engine_for_larger_batches_takes_a_single_crop(
    cuda: FakeCuda, plan: Path, rng: np.random.Generator
) -> None:
    crops = crops_of(1, rng)
    with open_fake(cuda, FakeTensorRt(cuda, (2, 4)), plan) as engine:
        np.testing.assert_allclose(engine.infer(crops).angles, expected_angles(crops), rtol=1e-5)


def test_everything_is_given_back(cuda: FakeCuda, trt: FakeTensorRt, plan: Path) -> None:
    engine = open_fake(cuda, trt, plan, 1)
    assert cuda.memory and cuda.host and cuda.streams and cuda.graphs
    engine.close()
    engine.close()
    assert not (cuda.memory or cuda.host or cuda.streams or cuda.graphs)
    assert cuda.closed
    with pytest.raises(EnvironmentalError, match="closed"):
        engine.infer(np.zeros((1, SIZE, SIZE, 3), np.uint8))


def test_a_failed_opening_gives_everything_back(
    cuda: FakeCuda, trt: FakeTensorRt, plan: Path
) -> None:
    trt.refuses_address = "spread"
    with pytest.raises(EnvironmentalError, match="use the memory for 'spread'"):
        open_fake(cuda, trt, plan)
    assert not (cuda.memory or cuda.host or cuda.streams)
    assert cuda.closed


def test_a_refused_plan_tells_tensorrts_reason(
    cuda: FakeCuda, trt: FakeTensorRt, plan: Path
) -> None:
    trt.refuses_plan = True
    with pytest.raises(CompatibilityError, match=r"built for compute capability 8\.9, found 8\.7"):
        open_fake(cuda, trt, plan)


def test_a_failed_run_tells_tensorrts_reason(cuda: FakeCuda, trt: FakeTensorRt, plan: Path) -> None:
    with open_fake(cuda, trt, plan) as engine:
        trt.fails_run = True
        with pytest.raises(EnvironmentalError, match="run the engine: illegal memory access"):
            engine.infer(np.zeros((1, SIZE, SIZE, 3), np.uint8))


def test_other_engines_are_refused(cuda: FakeCuda, trt: FakeTensorRt, plan: Path) -> None:
    trt.outputs = ("boxes",)
    with pytest.raises(DataError, match="expected one input 'crops'"):
        open_fake(cuda, trt, plan)
    again = FakeTensorRt(FakeCuda())
    again.input_type = again.DataType.FLOAT
    with pytest.raises(DataError, match="uint8"):
        open_fake(again.cuda, again, plan)


def test_a_batch_the_engine_was_not_built_for_is_refused(
    cuda: FakeCuda, trt: FakeTensorRt, plan: Path
) -> None:
    with pytest.raises(UsageError, match="batch size 5 asked for, the engine was built for 1 to 4"):
        open_fake(cuda, trt, plan, 5)


def test_without_a_graph_it_runs_and_says_so(
    cuda: FakeCuda, trt: FakeTensorRt, plan: Path, rng: np.random.Generator
) -> None:
    cuda.fail_capture = True
    crops = crops_of(1, rng)
    with open_fake(cuda, trt, plan, 1) as engine:
        assert engine.info.details["cuda_graph"] is False
        np.testing.assert_allclose(engine.infer(crops).angles, expected_angles(crops), rtol=1e-5)


def test_info_comes_from_the_engine(cuda: FakeCuda, trt: FakeTensorRt, plan: Path) -> None:
    with open_fake(cuda, trt, plan, 2) as engine:
        info = engine.info
    assert (info.kind, info.version, info.device) == ("tensorrt", "10.3.0", "Fake GPU")
    assert info.precision == "int8"
    assert info.details["cuda_graph_batch"] == 2
    json.dumps(info.to_dict())


@pytest.mark.parametrize(
    ("version", "capability", "options", "says"),
    [
        ("8.5.2", "8.7", {}, "knows 8.6, 10.x and 11.x"),
        ("9.1.0", "8.7", {}, "knows 8.6"),
        ("10.5.0", "7.0", {}, r"10\.4\.0 or older"),
        ("10.3.0", "8.7", {"dla": 0, "dla_cores": 2}, r"11\.4\.1"),
        ("10.3.0", "8.9", {"compute_capabilities": ("8.7",)}, "build on the device itself"),
    ],
)
def test_what_a_version_cannot_do_is_refused(
    version: str, capability: str, options: dict[str, object], says: str
) -> None:
    with pytest.raises(CompatibilityError, match=says):
        check_support(version, capability, BuildOptions(**options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("version", "capability"), [("8.6.2", "8.7"), ("10.4.0", "7.0"), ("11.4.1", "12.0")]
)
def test_what_a_version_can_do_is_let_through(version: str, capability: str) -> None:
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
    ]
    audit = read_inspection(json.dumps({"Layers": layers}))
    assert [(r.kind, r.precision) for r in audit.rows] == [
        ("Convolution", "int8"),
        ("Convolution", "fp16"),
        ("gemm", "fp32"),
    ]
    with pytest.raises(CompatibilityError, match="1 in fp16, 1 in int8"):
        audit.require("int8", 2, "the engine")
    audit.require("int8", 1, "the engine")


def test_convolutions_inside_fused_layers_come_from_the_network() -> None:
    engine = PrecisionAudit(
        "engine inspector", (LayerPrecision("conv1 + relu", "Convolution", "int8"),)
    )
    network = PrecisionAudit(
        "parsed network",
        tuple(LayerPrecision(n, "Convolution", "int8") for n in ("conv1", "layer1.0.conv1")),
    )
    audit = engine.completed_by(network)
    assert [r.layer for r in audit.rows] == ["conv1 + relu", "layer1.0.conv1"]
    assert "parsed network" in audit.rows[1].detail
    assert audit.opaque == "1 convolutions are inside fused layers"


def test_an_engine_without_details_is_opaque_not_fine() -> None:
    audit = read_inspection(json.dumps({"Layers": ["conv1", "conv2"]}))
    assert audit.reached == "unknown"
    with pytest.raises(CompatibilityError, match="none found"):
        audit.require("int8", 2, "the engine")


def test_a_crashing_driver_is_reported_not_suffered(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgehp import driver

    crash = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    monkeypatch.setattr(driver, "PROBE_CODE", crash)
    with pytest.raises(EnvironmentalError, match="crashed when asked for its GPUs"):
        probe_driver()
    for text, says in (
        ('print(\'{"missing": "libcuda.so.1"}\')', "no NVIDIA driver found"),
        ('print(\'{"failed": "cuInit returned 999: unknown"}\')', "cuInit returned 999"),
        ('print(\'{"version": 12060, "gpus": []}\')', "finds no GPU"),
        ("import sys; sys.exit('broken interpreter')", "gave no answer"),
    ):
        monkeypatch.setattr(driver, "PROBE_CODE", text)
        with pytest.raises(EnvironmentalError, match=says):
            probe_driver()


def test_the_probe_reads_what_the_driver_says(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgehp import driver

    text = 'print(\'{"version": 12060, "gpus": [["Orin", 8, 7]]}\')'
    monkeypatch.setattr(driver, "PROBE_CODE", text)
    probe = probe_driver()
    assert probe.cuda_version == "12.6"
    assert (probe.gpus[0].name, probe.gpus[0].compute_capability) == ("Orin", "8.7")


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


def test_availability_is_a_reason_or_nothing() -> None:
    reason = engine_available("tensorrt")
    assert reason is None or len(reason) > 20
