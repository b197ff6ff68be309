"""Run the adapter against the bindings of one TensorRT version; prints what it did as JSON.

Started by tools/check_tensorrt_bindings.py in a process of its own, with stub libraries on
LD_LIBRARY_PATH: two versions of the bindings cannot live in one process.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [sys.argv[1], str(HERE.parent.parent)]


from edgehp.engines import tensorrt_build  # noqa: E402
from edgehp.engines.build import BuildOptions  # noqa: E402
from edgehp.engines.cuda import Cuda  # noqa: E402
from edgehp.engines.tensorrt import TensorRtEngine  # noqa: E402
from edgehp.errors import CompatibilityError, DataError, EnvironmentalError  # noqa: E402
from tests.driver.double import load_double  # noqa: E402
from tests.tensorrt_bindings.spec import Recorder, SpecModule, Stand  # noqa: E402

SIZE = 32


def layers_of(recorder: Recorder, precision: str) -> list[Stand]:
    """A network of one convolution, a matrix product and a softmax."""
    real = recorder.real
    kind, types = real.LayerType, real.DataType
    body = types.HALF if precision == "fp16" else types.FLOAT

    def tensor(name: str, dtype: Any) -> Stand:
        return Stand(recorder, real.ITensor, name=name, dtype=dtype)

    def layer(name: str, type_: Any, inputs: list[Stand], dtype: Any) -> Stand:
        return Stand(
            recorder,
            real.ILayer,
            name=name,
            type=type_,
            num_inputs=len(inputs),
            num_outputs=1,
            get_input=lambda i: inputs[i],
            get_output=lambda i: tensor(name, dtype),
        )

    int8 = tensor("q", types.INT8)
    sources = [tensor("a", types.FLOAT), tensor("b", types.FLOAT)]
    made = []
    if precision == "int8":
        made = [layer(n, kind.DEQUANTIZE, [int8], body) for n in ("a", "b")]
    return [
        *made,
        layer("conv1", kind.CONVOLUTION, sources, body),
        layer("heads", kind.MATRIX_MULTIPLY, [tensor("conv1", body)], body),
        layer("probabilities", kind.SOFTMAX, [tensor("heads", body)], types.FLOAT),
    ]


def answers(
    real: Any, precision: str, parses: bool = True, network: str | None = None
) -> tuple[Recorder, SpecModule]:
    """A module whose builder and engine answer as a working TensorRT would."""
    recorder = Recorder(real, {})
    layers = layers_of(recorder, network or precision)
    names = ["crops", "angles", "spread"]
    weights = {"int8": "Int8", "fp16": "Half", "fp32": "Float"}[precision]
    shown = {
        "Name": "conv1",
        "LayerType": "CaskConvolution",
        "ParameterType": "Convolution",
        "Inputs": [{"Format/Datatype": "N/A due to dynamic shapes"}],
        "Weights": {"Type": weights, "Count": 1},
    }
    types = real.DataType
    shapes = [(1, SIZE, SIZE, 3), (1, SIZE, SIZE, 3), (8, SIZE, SIZE, 3)]
    io = {
        n: Stand(
            recorder,
            real.ITensor,
            name=n,
            dtype=types.UINT8 if n == "crops" else types.FLOAT,
            shape=(-1, SIZE, SIZE, 3),
        )
        for n in names
    }
    mode = real.TensorIOMode
    recorder.answers.update(
        {
            "INetworkDefinition.num_inputs": lambda: 1,
            "INetworkDefinition.num_outputs": lambda: 2,
            "INetworkDefinition.get_input": lambda i: io["crops"],
            "INetworkDefinition.get_output": lambda i: io[names[1 + i]],
            "INetworkDefinition.num_layers": lambda: len(layers),
            "INetworkDefinition.get_layer": lambda i: layers[i],
            "OnnxParser.parse": lambda *a: parses,
            "ParserError.desc": lambda: "unsupported",
            "IOptimizationProfile.set_shape": lambda *a: None,
            "IBuilderConfig.add_optimization_profile": lambda p: 0,
            "EngineInspector.get_engine_information": lambda f: json.dumps({"Layers": [shown]}),
            "ICudaEngine.num_io_tensors": lambda: 3,
            "ICudaEngine.get_tensor_name": lambda i: names[i],
            "ICudaEngine.get_tensor_mode": lambda n: mode.INPUT if n == "crops" else mode.OUTPUT,
            "ICudaEngine.get_tensor_shape": lambda n: (-1, SIZE, SIZE, 3),
            "ICudaEngine.get_tensor_dtype": lambda n: io[n].dtype,
            "ICudaEngine.get_tensor_profile_shape": lambda n, p: shapes,
        }
    )
    return recorder, SpecModule(recorder)


def build(
    real: Any, precision: str, directory: Path, *, compatible: bool = False
) -> dict[str, Any]:
    """Build with every option set; which flags were used."""
    recorder, module = answers(real, precision)
    options = BuildOptions(
        precision=precision,
        workspace_mib=64,
        timing_cache=directory / f"{precision}.cache",
        dla=0,
        batch=(1, 1, 1) if precision == "fp32" else (4, 4, 4),
        optimization_level=3,
        dla_cores=1,
    )
    if compatible:
        compatible_with = {"version_compatible": True, "hardware_compatible": True}
        options = replace(options, dla=None, **compatible_with)
    graph = directory / "graph.onnx"
    graph.write_bytes(b"not read by the stand-in")
    _, audit, said = tensorrt_build.build_plan(
        module, graph, options, 1 if precision == "int8" else 0
    )
    calls = recorder.calls
    flags = next(a[0] for k, a in calls if k == "Builder.create_network")
    creation = real.NetworkDefinitionCreationFlag.__members__
    return {
        "network": sorted(n for n, v in creation.items() if flags & (1 << int(v))),
        "set": [a[0].name for k, a in calls if k == "IBuilderConfig.set_flag"],
        "cleared": [a[0].name for k, a in calls if k == "IBuilderConfig.clear_flag"],
        "kept_float": sum(k == "ILayer.precision =" for k, _ in calls),
        "calls": sorted({k for k, _ in calls}),
        "details": sorted({row.detail for row in audit.rows}),
        "dla_core": next((a[0] for k, a in calls if k == "IBuilderConfig.DLA_core ="), None),
        "said": said,
    }


def build_by_ranges(real: Any, directory: Path) -> dict[str, Any] | str:
    """INT8 of a float graph with ranges; which calls that took, or why not."""
    recorder, module = answers(real, "int8", network="fp32")
    graph = directory / "graph.onnx"
    graph.write_bytes(b"not read by the stand-in")
    try:
        tensorrt_build.build_plan(module, graph, BuildOptions(), 1, {"a": 2.0, "conv1": 3.0})
    except CompatibilityError as e:
        return str(e)
    set_to = [a for k, a in recorder.calls if k == "ITensor.set_dynamic_range"]
    return {
        "network": next(a[0] for k, a in recorder.calls if k == "Builder.create_network"),
        "flags": [a[0].name for k, a in recorder.calls if k == "IBuilderConfig.set_flag"],
        "ranges": set_to,
        "precisions": [a[0].name for k, a in recorder.calls if k == "ILayer.precision ="],
    }


def refuse(real: Any, directory: Path) -> str:
    """The sentence about a graph that the parser refuses."""
    _, module = answers(real, "fp32", parses=False)
    graph = directory / "graph.onnx"
    graph.write_bytes(b"not read by the stand-in")
    try:
        tensorrt_build.build_plan(module, graph, BuildOptions(precision="fp32"), 0)
    except DataError as e:
        return str(e)
    raise EnvironmentalError("the parser's refusal was not noticed")


def run(real: Any, directory: Path, kind: type[TensorRtEngine] = TensorRtEngine) -> dict[str, Any]:
    """Open an engine of this class and run two batches."""
    import numpy as np

    load_double()
    from cuda.bindings import driver

    recorder, module = answers(real, "int8")

    class Gpu(Cuda):
        # NVRTC would call the libraries that stand in for TensorRT's, which do nothing, and crash.
        has_kernels = False

    class Engine(kind):  # type: ignore[misc, valid-type]
        # The header of the file is looked at elsewhere, by the real library.
        _load = TensorRtEngine._load

        def _open_cuda(self, device: str | None, wait: str) -> Cuda:
            return Gpu(0, driver)

        def _import(self) -> Any:
            return module

    plan = directory / "plan"
    plan.write_bytes(b"not read by the stand-in")
    with Engine(plan, batch=1) as engine:
        for _ in range(2):
            shape = list(engine.infer(np.zeros((2, SIZE, SIZE, 3), np.uint8)).angles.shape)
        info = engine.info
    return {
        "shape": shape,
        "precision": info.precision,
        "calls": sorted({k for k, _ in recorder.calls}),
        "set": {
            k: a[0].name for k, a in recorder.calls if k.endswith("=") and hasattr(a[0], "name")
        },
        "serialized": sum(k == "IRuntimeCache.serialize" for k, _ in recorder.calls),
        "graphs": info.details["cuda_graph"],
    }


def run_rtx() -> dict[str, Any]:
    """As `run`, with TensorRT for RTX."""
    import tensorrt_rtx as real

    from edgehp.engines.tensorrt_rtx import TensorRtRtxEngine

    with tempfile.TemporaryDirectory() as name:
        return run(real, Path(name), TensorRtRtxEngine)


def main() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    warnings.simplefilter("ignore")
    if sys.argv[1] == "rtx":
        print(json.dumps(run_rtx()))
        return
    sys.setdlopenflags(os.RTLD_LAZY)
    import tensorrt_bindings as real

    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        result = {
            "version": real.__version__,
            "build": {p: build(real, p, directory) for p in ("fp32", "fp16", "int8")},
            "compatible": build(real, "int8", directory, compatible=True),
            "by_ranges": build_by_ranges(real, directory),
            "refusal": refuse(real, directory),
            "run": run(real, directory),
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
