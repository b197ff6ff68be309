"""The TensorRT adapter against the real bindings of every version line, without TensorRT."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

VERSIONS = ("8.6.1", "10.3.0", "10.4.0", "10.13.3.9", "10.16.1.11", "11.4.0.106")


@pytest.fixture(scope="module")
def tool(repo: Path) -> ModuleType:
    path = repo / "tools" / "check_tensorrt_bindings.py"
    spec = importlib.util.spec_from_file_location("check_tensorrt_bindings", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=VERSIONS)
def result(request: pytest.FixtureRequest, tool: ModuleType) -> dict[str, Any]:
    """What the adapter did; the bindings are downloaded once and kept in a cache directory."""
    try:
        found: dict[str, Any] = tool.check(request.param, tool.default_cache())
    except tool.Unavailable as e:
        # 8.6.1 has no wheel after Python 3.11, and a machine may be offline or lack a compiler.
        if os.environ.get("EDGEHP_REQUIRE_BINDINGS"):
            pytest.fail(str(e))
        pytest.skip(str(e))
    assert found["version"].startswith(request.param)
    return found


def test_each_version_gets_the_branch_meant_for_it(result: dict[str, Any]) -> None:
    weakly_typed = result["version"].startswith("8.")
    for precision, build in result["build"].items():
        assert build["network"] == (["EXPLICIT_BATCH"] if weakly_typed else ["STRONGLY_TYPED"])
        said = " ".join(build["said"])
        assert ("weakly typed" in said) == (weakly_typed and precision != "fp32")
        assert "built for DLA core 0" in said
        # FP32 must be FP32: no ten-bit mantissas, which TensorRT allows unless told.
        assert build["cleared"] == ["TF32"]
        wanted = {"fp32": set(), "fp16": {"FP16"}, "int8": {"INT8", "FP16"}}[precision]
        assert {"INT8", "FP16"} & set(build["set"]) == (wanted if weakly_typed else set())
        # Only there can the builder lower the decoding, so only there is it held.
        assert bool(build["kept_float"]) == (weakly_typed and precision != "fp32")


def test_the_build_goes_through_with_every_option(result: dict[str, Any]) -> None:
    for build in result["build"].values():
        assert {
            "Builder.build_serialized_network",
            "EngineInspector.get_engine_information",
            "IBuilderConfig.DLA_core =",
            "IBuilderConfig.set_memory_pool_limit",
            "IBuilderConfig.set_timing_cache",
            "ITensor.shape =",
            "IBuilderConfig.builder_optimization_level =",
            "IBuilderConfig.can_run_on_DLA",
            "Runtime.DLA_core =",
            "ITimingCache.serialize",
        } <= set(build["calls"])


def test_compatible_engines_are_asked_for_in_every_version(result: dict[str, Any]) -> None:
    assert "VERSION_COMPATIBLE" in result["compatible"]["set"]
    assert "IBuilderConfig.hardware_compatibility_level =" in result["compatible"]["calls"]
    assert "VERSION_COMPATIBLE" not in result["build"]["int8"]["set"]
    assert "Runtime.engine_host_code_allowed =" in result["run"]["calls"]


def test_a_dla_engine_says_so_in_its_audit(result: dict[str, Any]) -> None:
    for build in result["build"].values():
        assert build["dla_core"] == 0
        assert {d.partition(":")[0] for d in build["details"]} <= {"DLA core 0", "GPU"}


def test_ranges_make_int8_where_the_version_takes_them(result: dict[str, Any]) -> None:
    """For Volta, whose last TensorRT is 10.4."""
    found, major = result["by_ranges"], int(result["version"].partition(".")[0])
    if major >= 11:
        assert found.endswith("takes no ranges")
        return
    assert found["network"] == (1 if major == 8 else 0)
    assert {"INT8", "FP16", "OBEY_PRECISION_CONSTRAINTS"} <= set(found["flags"])
    assert found["ranges"] == [[-3.0, 3.0]]
    assert "INT8" in found["precisions"] and "FLOAT" in found["precisions"]


def test_a_refused_graph_is_one_sentence(result: dict[str, Any]) -> None:
    assert "parser refuses the graph: unsupported" in result["refusal"]


def test_the_runtime_uses_what_every_version_has(result: dict[str, Any]) -> None:
    assert result["run"]["shape"] == [2, 3]
    assert result["run"]["precision"] == "int8"
    calls = set(result["run"]["calls"])
    assert {
        "IExecutionContext.set_tensor_address",
        "IExecutionContext.set_input_shape",
        "IExecutionContext.execute_async_v3",
    } <= calls


def test_the_adapter_fits_the_published_types(tool: ModuleType, tmp_path: Path) -> None:
    try:
        assert tool.check_types(tool.default_cache()) == ""
    except tool.Unavailable as e:
        pytest.skip(str(e))
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "from tensorrt import IExecutionContext\n\n\n"
        "def run(context: IExecutionContext) -> None:\n"
        "    context.execute_async_v2([1], 2)\n"
    )
    assert "execute_async_v2" in tool.check_types(tool.default_cache(), (wrong,))


def test_the_stand_ins_refuse_what_the_bindings_lack(tool: ModuleType) -> None:
    """Or all the tests above would pass whatever the adapter does."""
    cache = tool.default_cache()
    try:
        tool.check("10.3.0", cache)
    except tool.Unavailable as e:
        pytest.skip(str(e))
    directory = tool._bindings("10.3.0", cache)
    code = (
        "import os, sys\n"
        f"sys.path[:0] = [{str(directory)!r}, {str(tool.REPO)!r}]\n"
        "sys.setdlopenflags(os.RTLD_LAZY)\n"
        "import tensorrt_bindings as real\n"
        "from tests.tensorrt_bindings.spec import Recorder, SpecModule, Stand\n"
        "recorder = Recorder(real, {})\n"
        "context = Stand(recorder, real.IExecutionContext)\n"
        "context.execute_async_v3(3)\n"
        "wrong = [\n"
        "    lambda: context.execute_async_v2([1], 3),\n"
        "    lambda: context.execute_async_v3(),\n"
        "    lambda: context.execute_async_v3(3, 4),\n"
        "    lambda: context.execute_async_v3('3'),\n"
        "    lambda: context.set_tensor_address(address=1),\n"
        "    lambda: SpecModule(recorder).NoSuchThing,\n"
        "    lambda: SpecModule(recorder).NetworkDefinitionCreationFlag.NO_SUCH_FLAG,\n"
        "    lambda: setattr(context, 'no_such_property', 1),\n"
        "]\n"
        "for call in wrong:\n"
        "    try:\n"
        "        call()\n"
        "    except (AttributeError, TypeError):\n"
        "        continue\n"
        "    sys.exit('accepted: ' + str(wrong.index(call)))\n"
    )
    environment = {**os.environ, "LD_LIBRARY_PATH": str(directory / "stubs")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
