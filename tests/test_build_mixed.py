"""Accuracy-controlled precision: only where needed, exactly the layers named, or exit 3."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from edgehp.artifact import load_artifact
from edgehp.artifact.manifest import MixedRecord
from edgehp.cli.build import command
from edgehp.cli.sensitivity import command as sensitivity_command
from edgehp.engines.audit import LayerPrecision, PrecisionAudit
from edgehp.errors import AccuracyError, CompatibilityError, DataError, UsageError
from edgehp.pipeline.engine import convolutions_of
from edgehp.pipeline.pipeline import BuildResult, build
from edgehp.pipeline.plan import BuildRequest, make_plan
from edgehp.quantization.quantize import QuantizationConfig
from edgehp.report.gather import gather
from edgehp.report.page import html_page, markdown
from tests.build_parts import CONVOLUTIONS, convolutions_in_float
from tests.test_build import Somewhere

CONFIG = QuantizationConfig("cpu", "minmax", rounding=False, threads=1)


@pytest.fixture(scope="module")
def request_(small_request: BuildRequest, small: Path) -> BuildRequest:
    # Without labels the deviation counts: nothing but more floating point makes it smaller.
    bare, output = small / "bare.zip", small / "searched"
    return replace(small_request, validate_on=bare, output=output, mixed=True)


@pytest.fixture(scope="module")
def plain(request_: BuildRequest) -> BuildResult:
    return build(request_)


@pytest.fixture(scope="module")
def half_drop(plain: BuildResult) -> float:
    assert plain.manifest.accuracy is not None
    return plain.manifest.accuracy.drop / 2


@pytest.fixture(scope="module")
def mixed(request_: BuildRequest, small: Path, half_drop: float) -> BuildResult:
    return build(replace(request_, max_drop=half_drop, output=small / "mixed"))


def test_what_fits_is_not_searched(plain: BuildResult) -> None:
    assert plain.manifest.precision.mixed is None
    assert plain.manifest.precision.counts == {"int8": CONVOLUTIONS}
    assert not [s for s in plain.manifest.build.steps if s.name == "search"]
    assert not (plain.path / "sensitivity.json").exists()


def test_layers_go_back_to_float_until_the_drop_fits(mixed: BuildResult, half_drop: float) -> None:
    manifest = load_artifact(mixed.path).manifest
    assert manifest == mixed.manifest
    found, accuracy = manifest.precision.mixed, manifest.accuracy
    assert found is not None
    assert accuracy is not None
    assert accuracy.drop <= half_drop < found.all_int8_drop
    # The manifest names what the graph does, no more and no less.
    kept = set(found.float_layers) & set(convolutions_of(mixed.path / "engine.onnx"))
    assert convolutions_in_float(mixed.path / "engine.onnx") == kept
    assert manifest.precision.counts.get("fp32", 0) == len(kept) < CONVOLUTIONS
    assert found.float_precision == "fp32"
    assert found.latency_model.startswith("roofline of one processor core")
    assert found.measured_ms is not None
    assert any("predicted to cost" in w for w in manifest.build.warnings)


def test_the_sensitivity_that_was_measured_is_kept(mixed: BuildResult) -> None:
    record = mixed.manifest.file("sensitivity.json")
    assert record.role == "report"
    material = gather([mixed.path])
    assert {x.name for x in material.sensitivity} >= {"conv1", "a.add", "heads"}
    page, text = html_page(material), markdown(material)
    assert mixed.manifest.precision.mixed is not None
    for layer in mixed.manifest.precision.mixed.float_layers:
        assert layer in text
    for words in ("Layers in floating point", "Sensitivity of the layers", "Accuracy at the build"):
        assert words in page
    assert "near-infrared" in page


@pytest.mark.parametrize(("mixed", "words"), [(True, "layers in floating"), (False, "deviation")])
def test_out_of_reach_ends_with_exit_code_3_and_nothing_written(
    request_: BuildRequest, tmp_path: Path, mixed: bool, words: str
) -> None:
    with pytest.raises(AccuracyError, match=f"no artifact was made: .*{words}") as e:
        build(replace(request_, max_drop=0.0, mixed=mixed, output=tmp_path))
    assert e.value.exit_code == 3
    assert list(tmp_path.iterdir()) == []


def test_a_deferred_build_for_another_board_searches_by_its_roofline(
    request_: BuildRequest, small: Path, tmp_path: Path
) -> None:
    request = replace(request_, target="orin-nano-8gb", defer=True, output=tmp_path)
    drop = build(request, device=Somewhere()).manifest.accuracy
    assert drop is not None
    result = build(replace(request, max_drop=drop.drop * 0.6), device=Somewhere())
    found = result.manifest.precision.mixed
    assert found is not None
    assert found.float_precision == "fp16"
    assert found.latency_model == "roofline of 15W at batch 1, not measured"
    assert found.measured_ms is None
    assert found.predicted_cost_ms > 0
    artifact = load_artifact(result.path, allow_deferred=True)
    names = set(found.float_layers) & set(convolutions_of(artifact.graph_path))
    assert convolutions_in_float(artifact.graph_path) == names


def test_tensorrt_rtx_builds_the_mixture_and_its_audit_agrees(
    request_: BuildRequest, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    request = replace(request_, target="rtx-30", output=tmp_path)
    plain = build(request, device=Somewhere()).manifest
    assert plain.accuracy is not None
    found = build(replace(request, max_drop=plain.accuracy.drop * 0.7), device=Somewhere()).manifest
    mixed = found.precision.mixed
    assert mixed is not None
    assert mixed.float_precision == "fp16"
    assert "roofline of RTX 3060" in mixed.latency_model
    kept = set(mixed.float_layers) & {
        r.layer for r in plain.precision.audit if r.kind == "Convolution"
    }
    assert found.precision.counts.get("int8") == CONVOLUTIONS - len(kept)
    assert found.precision.counts.get("fp16", 0) == len(kept)


@pytest.mark.parametrize(
    ("outside", "words"),
    [
        ([], "but not a.conv1"),
        (["a.conv1 + a.relu1", "b.conv2"], "b.conv2 too"),
        (["__myl_fused_7"], "__myl_fused_7 too"),
    ],
)
def test_the_audit_takes_exactly_the_layers_named(
    plain: BuildResult, outside: list[str], words: str
) -> None:
    from edgehp.pipeline.engine import _require_exactly

    graph = plain.path / "engine.onnx"
    record = MixedRecord(("a.conv1", "a.add"), "fp16", 0.1, 1, 1, 2, "test", 3)

    def audit(names: list[str]) -> PrecisionAudit:
        rows = [LayerPrecision(n, "Convolution", "fp16") for n in names]
        return PrecisionAudit("test", (*rows, LayerPrecision("conv1", "Convolution", "int8")))

    names = convolutions_of(graph)
    _require_exactly(record, audit(["a.conv1/WithoutBiases"]), names, frozenset())
    # Too narrow a layer, say, which the quantization left out by itself.
    beside = ["a.conv1", "b.conv1"]
    _require_exactly(record, audit(beside), names, frozenset(beside))
    with pytest.raises(CompatibilityError, match=words):
        _require_exactly(record, audit(outside), names, frozenset(["b.conv1", "a.conv1"]))


@pytest.mark.parametrize(
    ("arguments", "searched"),
    [
        ([], False),
        (["--max-drop", "0.3"], True),
        (["--max-drop", "0.3", "--no-mixed"], False),
        (["--mixed"], True),
    ],
)
def test_a_limit_that_was_typed_is_searched_for(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], searched: bool
) -> None:
    seen: list[BuildRequest] = []

    def record(request: BuildRequest, *_: object) -> BuildResult:
        seen.append(request)
        raise UsageError("far enough")

    monkeypatch.setattr("edgehp.pipeline.pipeline.build", record)
    CliRunner().invoke(command, ["--target", "cpu", *arguments])
    assert [r.mixed for r in seen] == [searched]


def test_the_sensitivity_command_needs_the_artifact_only(
    plain: BuildResult, tmp_path: Path
) -> None:
    arguments = [str(plain.path), "--threads", "1", "--crops", "8"]
    arguments += ["--plot", str(tmp_path / "s.svg")]
    result = CliRunner().invoke(sensitivity_command, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    values = json.loads((plain.path / "reports" / "sensitivity.json").read_text("utf-8"))
    assert values["kind"] == "sensitivity"
    assert len(values["layers"]) == 11
    for row in values["layers"]:
        assert row["degrees"] == row["alone"]["angles"] >= 0
        assert row["gain"] == pytest.approx(
            values["all_int8"]["angles"] - row["left_out"]["angles"]
        )
        assert row["name"] in result.output
    assert (tmp_path / "s.svg").read_text("utf-8").startswith("<svg")
    # Written beside the listed files: the artifact is still what its manifest says.
    load_artifact(plain.path)
    assert [x.name for x in gather([plain.path]).sensitivity] == [
        r["name"] for r in values["layers"]
    ]


@pytest.mark.parametrize("value", ['"much"', "null"])
def test_a_sensitivity_report_of_others_is_drawn_or_refused(
    plain: BuildResult, tmp_path: Path, caplog: pytest.LogCaptureFixture, value: str
) -> None:
    from edgehp.report.plots import sensitivity_plot

    path = Path(shutil.copytree(plain.path, tmp_path / "artifact"))
    (path / "reports").mkdir(exist_ok=True)
    file = path / "reports" / "sensitivity.json"
    text = '{"kind": "sensitivity", "layers": [{"name": "conv1", "degrees": %s}]}'
    file.write_text(text % "0.25", "utf-8")
    found = gather([path]).sensitivity
    assert [(x.name, x.degrees, x.gain) for x in found] == [("conv1", 0.25, None)]
    assert sensitivity_plot(found, ["conv1"]).startswith("<svg")
    file.write_text(text % value, "utf-8")
    with pytest.raises(DataError, match=r"sensitivity\.json: .*layers"):
        gather([path])
    # What is no JSON is no report, and said to be none.
    file.write_text(text % "NaN", "utf-8")
    assert gather([path]).sensitivity == ()
    assert "NaN is no JSON number" in caplog.text


def test_what_openvino_computes_in_float_beside_is_given_back_too(
    request_: BuildRequest, tmp_path: Path
) -> None:
    from edgehp.artifact.write import ArtifactWriter
    from edgehp.networks.graph import graph_bytes
    from edgehp.pipeline.accuracy import run_graph
    from edgehp.pipeline.crops import held_out_crops, load_calibration
    from edgehp.pipeline.engine import build_here
    from edgehp.pipeline.mixed import MixedSearch
    from edgehp.pipeline.pipeline import open_network
    from edgehp.pipeline.plan import BuildContext, Place
    from edgehp.quantization.qdq import remove_qdq
    from edgehp.quantization.quantize import quantize

    network = open_network(request_.network, None).network
    crops = load_calibration(request_.calibration, network.spec.preprocessing).crops[:10]
    held_out = held_out_crops(request_.validate_on, network.spec.preprocessing)
    source = network.graph()
    model = quantize(source, list(crops), CONFIG).model
    plan = make_plan(request_)
    with ArtifactWriter(tmp_path / "a") as writer:
        graph = tmp_path / "graph.onnx"
        graph.write_bytes(graph_bytes(source))
        reference = run_graph("openvino", graph, held_out, threads=1).answers.clean
        context = BuildContext(request_, plan, Place(), writer, Somewhere())
        search = MixedSearch(context, model, source, crops, held_out, reference, 1.0)
        # Both read the same tensor; with one of them in floating point OpenVINO computes the other
        # so too, although it is quantized.
        drop, kept = search.evaluate(frozenset({"b.conv1"}))
        assert kept == {"b.conv1", "b.downsample"}
        assert drop > 0
        assert search.evaluate(frozenset({"a.conv1"}))[1] == {"a.conv1"}
        for layers, fits in ((kept, True), (frozenset({"b.conv1"}), False)):
            graph.write_bytes(graph_bytes(remove_qdq(model, layers, source)))
            record = MixedRecord(tuple(layers), "fp32", 1.0, 1, 1, 2, "test", 1)
            arguments = (plan, Place(), graph, writer.path)
            if fits:
                assert build_here(*arguments, mixed=record).precision.counts["fp32"] == 2
            else:
                with pytest.raises(CompatibilityError, match=r"b\.downsample"):
                    build_here(*arguments, mixed=record)
