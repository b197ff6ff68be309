"""Building: what comes out is checked, what cannot be built is refused, nothing is half made."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from edgehp.artifact import golden_crops, load_artifact, newest_artifact, verify_golden
from edgehp.artifact.manifest import Comparison
from edgehp.artifact.open import open_artifact, open_reference
from edgehp.cli.build import command
from edgehp.cli.sensitivity import command as sensitivity_command
from edgehp.device import HostProbe
from edgehp.driver import Gpu
from edgehp.engines import open_engine
from edgehp.engines.audit import LayerPrecision, PrecisionAudit
from edgehp.engines.build import BuildOptions, BuildReport
from edgehp.errors import (
    CompatibilityError,
    DataError,
    EnvironmentalError,
    UsageError,
)
from edgehp.files import sha256_bytes, sha256_file
from edgehp.pipeline.crops import load_calibration, require_disjoint
from edgehp.pipeline.finish import finish
from edgehp.pipeline.pipeline import BuildResult, artifact_name, build
from edgehp.pipeline.plan import BuildRequest, Plan, find_place, make_plan
from edgehp.progress import listening
from tests import board_tensorrt, build_parts
from tests.build_parts import CONVOLUTIONS, SPEC

PREPROCESSING = SPEC.preprocessing


def test_an_int8_artifact_for_the_cpu(small_int8: BuildResult, small: Path) -> None:
    assert small_int8.path == small / "dist" / "small-cpu-int8"
    manifest = load_artifact(small_int8.path).manifest
    assert manifest == small_int8.manifest
    assert manifest.precision.asked == manifest.precision.reached == "int8"
    assert manifest.precision.counts == {"int8": CONVOLUTIONS}
    assert sum(row.kind == "Convolution" for row in manifest.precision.audit) == CONVOLUTIONS
    assert manifest.engine is not None
    assert manifest.engine.kind in manifest.engine.versions
    assert manifest.network.weights_sha256 == sha256_file(small / "small.onnx")
    assert {f.path for f in manifest.files} == {
        "engine.onnx",
        "golden.png",
        "calibration.csv",
        "calibration-table.json",
        "reference.onnx",
    }
    steps = [s.name for s in manifest.build.steps]
    assert steps[:4] == ["target", "network", "graph", "crops"]
    assert [p.name for p in (small / "dist").iterdir()] == [small_int8.path.name]
    assert newest_artifact(small / "dist") == small_int8.path


def test_the_calibration_list_names_every_crop(small_int8: BuildResult, small: Path) -> None:
    record = small_int8.manifest.calibration
    assert record is not None
    assert (record.count, record.duplicates, record.source) == (66, 0, "cal.zip")
    data = (small_int8.path / record.list).read_bytes()
    assert sha256_bytes(data) == record.list_sha256
    lines = data.decode().splitlines()
    crops = load_calibration(small / "cal.zip", PREPROCESSING)
    assert lines[0] == "sha256,image"
    assert lines[1:] == [
        f"{sha256_bytes(c.tobytes())},cal/{i:05d}.png" for i, c in enumerate(crops.crops)
    ]


def test_the_accuracy_is_that_of_both_graphs(small_int8: BuildResult, small: Path) -> None:
    accuracy = small_int8.manifest.accuracy
    assert accuracy is not None
    assert accuracy.reference is not None
    assert accuracy.artifact is not None
    held_out = load_calibration(small / "val.zip", PREPROCESSING)
    errors = []
    for file in ("reference.onnx", "engine.onnx"):
        with open_engine("openvino", small_int8.path / file, threads=1) as engine:
            angles = np.concatenate([engine.infer(c[None]).angles for c in held_out.crops])
        errors.append(np.abs(angles - held_out.angles).mean())
    assert accuracy.reference == pytest.approx(errors[0], abs=1e-3)
    assert accuracy.artifact == pytest.approx(errors[1], abs=1e-3)
    assert accuracy.drop == pytest.approx(errors[1] - errors[0], abs=2e-3)
    assert accuracy.interval[0] <= accuracy.drop <= accuracy.interval[1]
    assert accuracy.protocol["frames"] == accuracy.count == 64
    assert accuracy.measured_with.endswith("the engine itself")


def test_golden_vectors_hold_and_notice_swapped_colours(small_int8: BuildResult) -> None:
    artifact = load_artifact(small_int8.path)
    crops = golden_crops(artifact)
    assert crops.shape == (8, PREPROCESSING.size, PREPROCESSING.size, 3)
    with open_engine("openvino", artifact.engine_path, threads=1) as engine:
        assert verify_golden(artifact, engine) < artifact.manifest.golden.tolerance_degrees
    with open_engine("openvino", small_int8.path / "reference.onnx", threads=1) as engine:
        angles = engine.infer(crops).angles
        assert np.abs(angles - np.array(artifact.manifest.golden.angles)).max() < 0.01
        swapped = engine.infer(np.ascontiguousarray(crops[..., ::-1])).angles
    assert np.abs(swapped - np.array(artifact.manifest.golden.angles)).max() > 1


class Somewhere(HostProbe):
    """A machine without TensorRT and the GPU a test gives it."""

    def __init__(self, *gpus: Gpu) -> None:
        self._gpus = gpus

    def gpus(self) -> tuple[Gpu, ...]:
        if not self._gpus:
            raise EnvironmentalError("no NVIDIA driver found")
        return self._gpus


def test_another_device_is_named_with_what_to_run_there(
    small_request: BuildRequest, tmp_path: Path
) -> None:
    request = replace(small_request, target="v100", output=tmp_path / "d")
    with pytest.raises(EnvironmentalError) as e:
        build(request, device=Somewhere())
    for words in ("no NVIDIA driver", "8.6 to 10.4", "--target v100", "--defer"):
        assert words in str(e.value)
    with pytest.raises(EnvironmentalError, match=r"RTX 3090 with 8\.6"):
        build(request, device=Somewhere(Gpu("RTX 3090", "8.6")))
    assert not (tmp_path / "d").exists()


def test_the_right_device_is_told_what_to_install(
    small_request: BuildRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a board whose CUDA package is another driver's, not to build on another machine."""
    missing = "cuda-bindings 13.5.0 needs a driver of CUDA 13\nhint: pip install '.[cuda12]'"
    monkeypatch.setattr("edgehp.pipeline.plan.engine_available", lambda kind: missing)
    request = replace(small_request, target="v100", output=tmp_path / "d")
    with pytest.raises(EnvironmentalError) as e:
        build(request, device=Somewhere(Gpu("Tesla V100", "7.0")))
    assert str(e.value) == missing


def test_what_to_run_there_repeats_every_option(
    small_request: BuildRequest, tmp_path: Path
) -> None:
    calibration = build_parts.faces(tmp_path / "my faces;.zip", 66, 1)
    request = replace(
        small_request,
        target="v100",
        calibration=calibration,
        max_drop=0.05,
        mixed=True,
        batch=(2, 4, 16),
        input_size=96,
        threads=3,
        skip_bad=True,
        output=tmp_path / "d",
    )
    with pytest.raises(EnvironmentalError) as e:
        build(request, device=Somewhere())
    here, there = str(e.value).splitlines()[2:4]
    words = shlex.split(here)
    assert words[:2] == ["edgehp", "build"] and words[-1] == "--defer"
    # Read by the command itself, they ask for the same build.
    found = command.make_context("build", words[2:]).params
    assert found["calibration"] == calibration
    assert found["calibration_method"] == "minmax"
    assert found["validate_on"] == request.validate_on
    assert (found["max_drop"], found["mixed"], found["skip_bad"]) == (0.05, True, True)
    assert (found["batch"], found["input_size"], found["threads"]) == ("2,4,16", 96, 3)
    assert (found["output"], found["network"]) == (tmp_path / "d", request.network)
    assert shlex.split(there)[2:] == [
        "--finish", "ARTIFACT", "--validate-on", str(request.validate_on), "--threads", "3",
        "--host", "me@board",
    ]  # fmt: skip


def test_what_to_run_there_is_short_where_nothing_was_asked_for() -> None:
    with pytest.raises(EnvironmentalError) as e:
        build(BuildRequest("v100"), device=Somewhere())
    assert str(e.value).splitlines()[2:] == [
        "  edgehp build --target v100 --defer",
        "  edgehp build --finish dist/kd-resnet18-112-v100-int8 --host me@board",
    ]
    assert len(str(e.value).splitlines()[0]) < 300


def test_a_limit_without_the_search_is_repeated_without_it(small_request: BuildRequest) -> None:
    with pytest.raises(EnvironmentalError, match=r"--max-drop 90\.0 .*--no-mixed"):
        build(replace(small_request, target="v100"), device=Somewhere())
    with pytest.raises(UsageError, match="--mixed"):
        BuildRequest("cpu", precision="fp32", mixed=True)


@pytest.mark.parametrize("option", ["calibration", "validate_on"])
@pytest.mark.parametrize("kind", ["missing", "empty", "two photos", "no zip"])
def test_photos_that_cannot_do_are_refused_before_any_work(
    small_request: BuildRequest, tmp_path: Path, option: str, kind: str
) -> None:
    path = tmp_path / "photos"
    if kind == "empty":
        path.mkdir()
    elif kind == "two photos":
        build_parts.faces(path, 2, 1)
    elif kind == "no zip":
        path.write_bytes(bytes(1000))
    # Neither network nor target is looked at: both would be errors of their own.
    request = replace(
        small_request,
        target="nonsense",
        network="nonsense",
        output=tmp_path / "d",
        **{option: path},
    )
    listener = Mock()
    words = {"two photos": "2 photos, at least 64"}.get(kind, str(path))
    match = f"--{option.replace('_', '-')} .*{re.escape(words)}"
    with pytest.raises(DataError, match=match), listening(listener):
        build(request)
    assert not listener.begin.called
    assert not (tmp_path / "d").exists()


@pytest.fixture(scope="module")
def deferred(small_request: BuildRequest, small: Path) -> BuildResult:
    request = replace(small_request, target="orin-nano-8gb", defer=True, output=small / "deferred")
    return build(request, device=Somewhere())


def test_a_deferred_artifact_has_all_but_the_engine(deferred: BuildResult) -> None:
    manifest = load_artifact(deferred.path, allow_deferred=True).manifest
    assert manifest.state == "deferred"
    assert manifest.engine is None
    assert manifest.precision.reached is None
    assert {"graph.onnx", "reference.npz", "golden.png"} <= {f.path for f in manifest.files}
    assert manifest.target.compute_capabilities == ("8.7",)
    assert manifest.accuracy is not None
    assert "emulation" in manifest.accuracy.measured_with
    with pytest.raises(CompatibilityError, match="edgehp build --finish"):
        load_artifact(deferred.path)


def test_what_is_not_finished(deferred: BuildResult, small_int8: BuildResult, small: Path) -> None:
    with pytest.raises(UsageError, match="complete already"):
        finish(small_int8.path)
    before = sorted((p.name, sha256_file(p)) for p in deferred.path.iterdir())
    with pytest.raises(UsageError, match=r"val\.zip: give it with --validate-on"):
        finish(deferred.path, device=Somewhere())
    with pytest.raises(EnvironmentalError, match="no NVIDIA driver"):
        finish(deferred.path, device=Somewhere(), validate_on=small / "val.zip")
    assert sorted((p.name, sha256_file(p)) for p in deferred.path.iterdir()) == before


def test_a_deferred_artifact_is_finished_where_the_engine_is(
    deferred: BuildResult, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device's TensorRT is played by OpenVINO: everything around it is real."""
    monkeypatch.setattr("edgehp.pipeline.finish.find_place", board_tensorrt.place_here)
    monkeypatch.setattr("edgehp.pipeline.finish.make_plan", board_tensorrt.plan_here)
    monkeypatch.setattr("edgehp.pipeline.engine.build_engine", board_tensorrt.build_here)
    path = shutil.copytree(deferred.path, tmp_path / deferred.path.name)
    result = finish(path, validate_on=small / "val.zip", threads=1)
    assert result.manifest.state == "complete"
    assert not (path / "reference.npz").exists()
    manifest = result.manifest
    assert manifest.target.module == board_tensorrt.MODULE
    assert manifest.precision.reached == "int8"
    assert manifest.accuracy is not None
    assert manifest.accuracy.measured_with.endswith("the engine itself")
    assert manifest.build.steps[-1].name == "accuracy, on the device"
    # The building machine's emulation says nothing about this engine; the gate's words do.
    assert any("run by" in w for w in deferred.manifest.build.warnings)
    assert not any("run by" in w for w in manifest.build.warnings)
    assert {f.path for f in manifest.files} >= {"engine.onnx", "golden.png", "calibration.csv"}


def test_finishing_times_int8_against_fp16_where_the_target_asks(
    deferred: BuildResult, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan(request: BuildRequest) -> Plan:
        return replace(board_tensorrt.plan_here(request), compare=True)

    monkeypatch.setattr("edgehp.pipeline.finish.find_place", board_tensorrt.place_here)
    monkeypatch.setattr("edgehp.pipeline.finish.make_plan", plan)

    def build_either(kind: str, graph: Path, out: Path, options: BuildOptions) -> BuildReport:
        if options.precision == "int8":
            return board_tensorrt.build_here(kind, graph, out, options)
        shutil.copyfile(graph, out)
        rows = (LayerPrecision("conv1", "Convolution", "fp16"),)
        return BuildReport((out,), {}, PrecisionAudit("played", rows))

    seen: list[tuple[set[str], int]] = []

    def faster(kind: str, one: Path, other: Path, crops: np.ndarray) -> tuple[float, float]:
        seen.append(({n.op_type for n in onnx.load(str(other)).graph.node}, len(crops)))
        return 2.0, 1.0

    monkeypatch.setattr("edgehp.pipeline.engine.build_engine", build_either)
    monkeypatch.setattr("edgehp.pipeline.engine.compare_engines", faster)
    path = shutil.copytree(deferred.path, tmp_path / deferred.path.name)
    record = finish(path, validate_on=small / "val.zip", threads=1).manifest.build
    assert record.int8_against_fp16 == Comparison(2.0, 1.0, 1)
    assert any("INT8 is NOT faster: use --precision fp16" in w for w in record.warnings)
    (nodes, batch), *_ = seen
    assert "Conv" in nodes and "QuantizeLinear" not in nodes and batch == 1


@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_rtx_engines_are_really_built(
    small_request: BuildRequest, tmp_path: Path, precision: str
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    calibration = small_request.calibration if precision == "int8" else None
    request = replace(
        small_request, target="rtx", precision=precision, calibration=calibration, output=tmp_path
    )
    result = build(request, device=Somewhere())
    manifest = result.manifest
    assert manifest.state == "complete"
    assert manifest.precision.reached == precision
    assert manifest.target.compute_capabilities == ("7.5", "8.6", "8.9", "12.0")
    assert (result.path / "engine.plan").stat().st_size > 10_000
    here = Somewhere(Gpu("RTX 4090", "8.9"))
    assert load_artifact(result.path, device=here).engine.kind == "tensorrt-rtx"
    with pytest.raises(CompatibilityError, match="V100"):
        load_artifact(result.path, device=Somewhere(Gpu("V100", "7.0")))
    with pytest.raises(EnvironmentalError, match="no NVIDIA driver"):
        load_artifact(result.path, device=Somewhere())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target": "cpu", "precision": "fp16", "calibration": None}, "fp16"),
        ({"target": "rtx", "precision": "fp32", "calibration": None}, "7.5"),
        ({"target": "orni"}, "did you mean"),
        ({"network": "kd-resnet"}, "did you mean 'kd-resnet18"),
    ],
)
def test_what_a_target_does_not_have(
    small_request: BuildRequest, tmp_path: Path, change: dict[str, object], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        build(replace(small_request, output=tmp_path / "d", **change))
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"precision": "int4"},
        {"calibration_method": "guess"},
        {"max_drop": float("nan")},
        {"max_drop": -1.0},
        {"precision": "fp32"},
        {"batch": (2, 1, 4)},
        {"batch": (0, 1, 1)},
    ],
)
def test_requests_that_cannot_be_right(
    small_request: BuildRequest, change: dict[str, object]
) -> None:
    with pytest.raises(UsageError):
        replace(small_request, **change)


@pytest.mark.parametrize(
    ("gpu", "version", "error", "words"),
    [
        (Gpu("V100", "7.0"), "10.13.3", CompatibilityError, "10.4"),
        (Gpu("V100", "7.0"), "8.5.2", CompatibilityError, "8.6"),
        (Gpu("T4", "7.5"), "10.3.0", EnvironmentalError, "T4 with 7.5"),
    ],
)
def test_where_an_engine_can_be_built(
    monkeypatch: pytest.MonkeyPatch, gpu: Gpu, version: str, error: type[Exception], words: str
) -> None:
    monkeypatch.setattr("edgehp.pipeline.plan.engine_available", lambda kind: None)
    device = Somewhere(gpu)
    monkeypatch.setattr(device, "version", lambda kind: version)
    with pytest.raises(error, match=words):
        find_place(make_plan(BuildRequest("v100")), device)


def test_v100_warns_and_compares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgehp.pipeline.plan.engine_available", lambda kind: None)
    plan = make_plan(BuildRequest("v100"))
    assert plan.compare
    assert "slower" in plan.warnings[0]
    assert not make_plan(BuildRequest("v100", precision="fp16")).compare
    device = Somewhere(Gpu("V100", "7.0"))
    monkeypatch.setattr(device, "version", lambda kind: "10.4.0")
    assert find_place(plan, device).tensorrt == "10.4.0"


@pytest.mark.parametrize("target", ["cpu", "orin-nano-8gb"])
def test_a_dla_is_refused_where_there_is_none(target: str) -> None:
    with pytest.raises(UsageError, match="no DLA"):
        make_plan(BuildRequest(target, dla=0))


def test_a_dla_where_there_is_one_warns_and_reaches_the_engine() -> None:
    plan = make_plan(BuildRequest("orin-agx-64gb", dla=1, batch=(1, 1, 1)))
    assert any("DLA" in w for w in plan.warnings)
    assert (plan.options.dla, plan.options.dla_cores) == (1, 2)
    with pytest.raises(UsageError, match="batch sizes 1 to 8 for the DLA, which takes one"):
        make_plan(BuildRequest("orin-agx-64gb", dla=1, batch=(1, 1, 8)))
    assert make_plan(BuildRequest("orin-agx-64gb")).options.dla is None
    with pytest.raises(UsageError, match=r"DLA core 2 asked for, but the target has 2"):
        make_plan(BuildRequest("orin-agx-64gb", dla=2, batch=(1, 1, 1)))


@pytest.mark.parametrize("option", ["version_compatible", "hardware_compatible"])
def test_compatible_engines_are_tensorrts(option: str) -> None:
    assert getattr(make_plan(BuildRequest("a10", **{option: True})).options, option)
    words = f"--{option.replace('_', '-')} is for TensorRT; cpu has openvino"
    with pytest.raises(UsageError, match=words):
        make_plan(BuildRequest("cpu", **{option: True}))
    with pytest.raises(UsageError, match="for the DLA is neither"):
        make_plan(BuildRequest("orin-agx-64gb", dla=0, batch=(1, 1, 1), **{option: True}))


def test_too_few_crops_and_duplicates(small: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="63 different calibration crops"):
        load_calibration(build_parts.faces(tmp_path / "few.zip", 63, 5), PREPROCESSING)
    folder = tmp_path / "twice"
    folder.mkdir()
    build_parts.faces(folder / "a.zip", 40, 5)
    shutil.copy(folder / "a.zip", folder / "b.zip")
    with zipfile.ZipFile(folder / "a.zip") as a, zipfile.ZipFile(folder / "b.zip", "w") as b:
        for name in a.namelist():
            b.writestr(name.replace("a/", "b/"), a.read(name))
    with pytest.raises(DataError, match=r"40 different calibration crops \(40 duplicates"):
        load_calibration(folder, PREPROCESSING)


def test_damaged_and_missing_photos_are_left_out_where_asked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = build_parts.faces(tmp_path / "a.zip", 66, 5, labels=True)
    with zipfile.ZipFile(path) as given, zipfile.ZipFile(tmp_path / "b.zip", "w") as bad:
        photo, other, *rest = (n for n in given.namelist() if n.endswith(".png"))
        bad.writestr(photo, given.read(photo)[:100])
        for name in {*given.namelist()} - {photo, other}:
            bad.writestr(name, given.read(name))
    with pytest.raises(DataError, match=other):
        load_calibration(tmp_path / "b.zip", PREPROCESSING)
    crops = load_calibration(tmp_path / "b.zip", PREPROCESSING, skip_bad=True)
    assert len(crops) == len(rest) == 64
    assert crops.protocol["skipped"] == 2 and crops.duplicates == 0
    assert caplog.text.count("skipped") == 2 and photo in caplog.text


def test_calibration_crops_are_not_validated_on(small: Path) -> None:
    crops, other = (load_calibration(small / f, PREPROCESSING) for f in ("cal.zip", "val.zip"))
    require_disjoint(crops, other)
    with pytest.raises(UsageError, match="66 of the 66"):
        require_disjoint(crops, crops)


def test_names_of_artifacts() -> None:
    assert artifact_name("kd-resnet18", "cpu", "int8") == "kd-resnet18-cpu-int8"
    assert artifact_name("../a b\n", "cpu", "int8") == "_a_b_-cpu-int8"
    assert artifact_name("...", "cpu", "int8") == "network-cpu-int8"


def test_the_command_line_without_quantisation(small_request: BuildRequest, tmp_path: Path) -> None:
    arguments = ["--target", "cpu", "--precision", "fp32", "--network", small_request.network]
    arguments += ["--validate-on", str(small_request.validate_on), "--output", str(tmp_path)]
    arguments += ["--threads", "1", "--json"]
    done = CliRunner().invoke(command, arguments, catch_exceptions=False)
    values = json.loads(done.stdout)
    assert values["manifest"]["state"] == "complete"
    manifest = load_artifact(values["path"]).manifest
    assert manifest.precision.reached == "fp32"
    assert manifest.calibration is None
    assert manifest.accuracy is not None
    assert manifest.accuracy.drop == pytest.approx(0, abs=1e-4)
    refused = CliRunner().invoke(sensitivity_command, [values["path"]]).exception
    assert isinstance(refused, UsageError) and "INT8 artifact" in str(refused)


def test_a_network_of_64_pixels_at_48(tmp_path: Path) -> None:
    """From the command line to the device's own checks."""
    network = build_parts.checkpoint(tmp_path / "net.safetensors")
    arguments = ["--target", "cpu", "--network", str(network), "--input-size", "48"]
    arguments += ["--calibration", str(build_parts.faces(tmp_path / "cal.zip", 66, 1))]
    held_out = build_parts.faces(tmp_path / "val.zip", 64, 2, labels=True)
    arguments += ["--calibration-method", "minmax", "--validate-on", str(held_out)]
    arguments += ["--threads", "1", "--max-drop", "90", "--no-mixed", "--output", str(tmp_path)]
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert "48 pixels (trained at 64)" in result.output
    artifact = load_artifact(tmp_path / "kd-resnet18-48px-cpu-int8")
    manifest = artifact.manifest
    assert manifest.preprocessing.size == 48
    assert manifest.build.recipe["own_size"] == 64
    words = "trained for crops of 64 pixels and run at 48 without training"
    assert any(words in w for w in manifest.build.warnings)
    # Coloured noise is no face, and a random network no network: said, whatever the drop is.
    assert any("FP32 itself errs by" in w for w in manifest.build.warnings)
    # The device sees crops of the size that was built, and its own reference.
    assert golden_crops(artifact).shape[1:] == (48, 48, 3)
    with (
        open_artifact(artifact.path, threads=1) as tested,
        open_reference(tested, threads=1) as reference,
    ):
        assert tested.engine.input_size == reference.engine.input_size == 48
        assert verify_golden(artifact, tested.engine) < manifest.golden.tolerance_degrees


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--target", "cpu", "--batch-sizes", "1,2"],
        ["--target", "cpu", "--batch-sizes", "x"],
        ["--finish", "a", "--target", "cpu"],
        ["a", "--finish", "a"],
    ],
)
def test_arguments_that_cannot_be_right(arguments: list[str]) -> None:
    assert isinstance(CliRunner().invoke(command, arguments).exception, UsageError)
