"""Run onnxsim over a deployed graph, in a process of its own, and check what it made."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgehp._installed import import_package
from edgehp._memory import give_back
from edgehp.errors import EnvironmentalError
from edgehp.networks.graph import INPUT, graph_bytes

if TYPE_CHECKING:
    import onnx

_TOLERANCE = 1e-3  # degrees
_CROPS = 8

# onnxsim imports torch where there is one, for functions that are not used here: 150 MiB that
# would stay until the end of a build. A process of its own, without torch, gives them back. It
# looks for packages where this one does and nowhere else.
_PROGRAM = """
import sys
sys.path[:] = sys.argv[3:]
sys.modules["torch"] = None
import onnx, onnxsim
onnx.save(onnxsim.simplify(onnx.load(sys.argv[1]))[0], sys.argv[2])
"""

_log = logging.getLogger(__name__)

Array = npt.NDArray[np.float64]


def simplify(model: onnx.ModelProto) -> onnx.ModelProto:
    """Run onnxsim over a deployed graph and check the result on random crops.

    For graphs of others: that of `edgehp.networks.graph.build_graph` is as simple as onnxsim makes
    it already. Where onnxsim is not installed the graph is returned as it is, which the log says.

    Returns:
        A new graph with the same metadata, inputs and outputs, symbolic batch included.

    Raises:
        EnvironmentalError: onnxsim failed or changed the answer or the interface, or onnxruntime,
            which the check needs, is not installed.
    """
    import onnx

    if importlib.util.find_spec("onnxsim") is None:
        _log.warning("onnxsim is not installed: the graph stays as it was built")
        return model
    give_back()
    simple = _onnxsim(model)
    try:
        onnx.checker.check_model(simple, full_check=True)
    except onnx.checker.ValidationError as e:
        raise _failed(f"made a graph that is not valid ({str(e).strip()[:200]})") from e
    # onnxsim writes a log of its own into the metadata, which differs between its versions.
    del simple.metadata_props[:]
    simple.metadata_props.extend(model.metadata_props)
    for field in ("input", "output"):
        if list(getattr(simple.graph, field)) != list(getattr(model.graph, field)):
            raise _failed(
                f"changed the graph's {field}s (expected a symbolic batch and the same names)"
            )
    size = model.graph.input[0].type.tensor_type.shape.dim[1].dim_value
    crops = np.random.default_rng(0).integers(0, 256, (_CROPS, size, size, 3), np.uint8)
    outputs = [o.name for o in model.graph.output]
    before, after = (run_graph(m, crops, outputs) for m in (model, simple))
    worst = max(float(np.abs(a - b).max()) for a, b in zip(before, after, strict=True))
    if not worst <= _TOLERANCE:  # not the same as >, for a NaN
        raise _failed(f"changed the answer by {worst:.3g} degrees, expected at most {_TOLERANCE}")
    return simple


def _onnxsim(model: onnx.ModelProto) -> onnx.ModelProto:
    """What onnxsim makes of the graph."""
    import onnx

    with tempfile.TemporaryDirectory(prefix="edgehp-") as folder:
        given, made = Path(folder) / "given.onnx", Path(folder) / "made.onnx"
        given.write_bytes(graph_bytes(model))
        command = [sys.executable, "-c", _PROGRAM, str(given), str(made), *sys.path]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
        )
        if done.returncode != 0 or not made.is_file():
            lines = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
            raise _failed(f"failed on the graph ({lines[-1][:200]})")
        simple: onnx.ModelProto = onnx.load(made)
    return simple


def _failed(why: str) -> EnvironmentalError:
    """The error about an onnxsim that did what it must not."""
    try:
        version = importlib.metadata.version("onnxsim")
    except importlib.metadata.PackageNotFoundError:
        version = "of unknown version"
    return EnvironmentalError(
        f"onnxsim {version} {why}\n"
        "hint: install another version of onnxsim, or uninstall it to use the graph as it was built"
    )


def run_graph(
    model: onnx.ModelProto, crops: npt.NDArray[np.uint8], outputs: Sequence[str]
) -> list[Array]:
    """What a deployed graph says about crops [N, S, S, 3], computed as it is written.

    Raises:
        EnvironmentalError: onnxruntime is not installed.
        RuntimeError: it cannot run the graph.
    """
    onnxruntime = import_package("onnxruntime", "checking a graph needs")
    give_back()  # of the session before this one
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    try:
        session = onnxruntime.InferenceSession(
            graph_bytes(model), options, providers=["CPUExecutionProvider"]
        )
        return [np.asarray(o, np.float64) for o in session.run(list(outputs), {INPUT: crops})]
    except Exception as e:  # onnxruntime's errors share no public base class
        raise RuntimeError(str(e)) from e
