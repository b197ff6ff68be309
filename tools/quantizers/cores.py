"""The float core of a deployed graph, and a quantised core put back into it.

Other quantisers are made for float networks: normalised float32 NCHW in, raw scores out. They get
exactly that part of the deployed graph, as their users would; the uint8 input, the normalisation
and the decoding of the bins are put around what they return, so that every result is used alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgehp.errors import DataError

if TYPE_CHECKING:
    import onnx

# Tensors of every deployed graph (`edgehp.networks.graph`): what the core takes and gives.
FIRST, LAST = "centred", "heads"

Crops = npt.NDArray[np.uint8]
Array = npt.NDArray[np.float64]


def split(model: onnx.ModelProto) -> onnx.ModelProto:
    """The core: ``centred`` float32 [batch, 3, S, S] to ``heads`` float32 [batch, 3 bins].

    Raises:
        DataError: the graph has no such tensors.
    """
    import onnx

    size = model.graph.input[0].type.tensor_type.shape.dim[1].dim_value
    inside = _inside(model)
    used = {name for node in inside for name in node.input}
    weights = [t for t in model.graph.initializer if t.name in used]
    last = next(n for n in inside if LAST in n.output)
    width = next(int(t.dims[0]) for t in weights if t.name == last.input[1])
    kind = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        inside,
        "core",
        [onnx.helper.make_tensor_value_info(FIRST, kind, ["batch", 3, size, size])],
        [onnx.helper.make_tensor_value_info(LAST, kind, ["batch", width])],
        weights,
    )
    return onnx.helper.make_model(
        graph, opset_imports=model.opset_import, ir_version=model.ir_version
    )


def joined(model: onnx.ModelProto, core: onnx.ModelProto) -> onnx.ModelProto:
    """The deployed graph `model` with `core` in the place of its own core.

    Raises:
        DataError: the core's input or output has another name.
    """
    import onnx

    if [i.name for i in core.graph.input if i.name == FIRST] != [FIRST]:
        raise DataError(f"the quantised network takes {[i.name for i in core.graph.input]}")
    if LAST not in [o.name for o in core.graph.output]:
        raise DataError(f"the quantised network gives {[o.name for o in core.graph.output]}")
    inside = {n.output[0] for n in _inside(model)}
    outside = [n for n in model.graph.node if n.output[0] not in inside]
    early = _ancestors(model, FIRST)
    before = [n for n in outside if n.output[0] in early]
    after = [n for n in outside if n.output[0] not in early]
    used = {name for node in outside for name in node.input}
    own = [t for t in model.graph.initializer if t.name in used]
    taken = {t.name for t in core.graph.initializer} | {
        o for n in core.graph.node for o in n.output
    }
    if clash := sorted(taken & ({t.name for t in own} - {FIRST, LAST})):
        raise DataError(f"the quantised network uses the names {', '.join(clash[:4])}")
    graph = onnx.helper.make_graph(
        [*before, *core.graph.node, *after],
        model.graph.name,
        model.graph.input,
        model.graph.output,
        [*own, *core.graph.initializer],
    )
    opsets = {o.domain: o.version for o in model.opset_import}
    for o in core.opset_import:
        opsets[o.domain] = max(o.version, opsets.get(o.domain, 0))
    out = onnx.helper.make_model(
        graph,
        opset_imports=[onnx.helper.make_opsetid(d, v) for d, v in opsets.items()],
        ir_version=max(model.ir_version, core.ir_version),
    )
    out.metadata_props.extend(model.metadata_props)
    return out


def joined_openvino(model: Any, core: Any) -> Any:
    """The same for OpenVINO models: `model` (read from the deployed graph) around `core`."""
    import openvino

    before = _output(model, FIRST)
    inside = _output(model, LAST)
    result = core.output(0).get_node().input_value(0)
    parameter = core.input(0).get_node()
    parameter.output(0).replace(before)
    inside.replace(result)
    return openvino.Model(model.get_results(), model.get_parameters(), "joined")


def batches_of(crops: Crops, mean: Array, size: int = 1) -> Iterator[npt.NDArray[np.float32]]:
    """What the core takes, [size, 3, S, S] a time: computed as the deployed graph does.

    Args:
        crops: uint8 [N, S, S, 3].
        mean: see `mean_of`.
        size: crops a time.
    """
    for start in range(0, len(crops), size):
        nchw = crops[start : start + size].transpose(0, 3, 1, 2).astype(np.float32)
        yield np.ascontiguousarray(nchw - mean.astype(np.float32))


def mean_of(model: onnx.ModelProto) -> Array:
    """What the deployed graph takes from the pixels: [1, 3, 1, 1]."""
    from onnx import numpy_helper

    node = next(n for n in model.graph.node if FIRST in n.output)
    values = {t.name: t for t in model.graph.initializer}
    if node.op_type != "Sub" or node.input[1] not in values:
        raise DataError(f"{FIRST} is not the difference of pixels and a constant")
    return np.asarray(numpy_helper.to_array(values[node.input[1]]), np.float64)


def decode(model: onnx.ModelProto, scores: npt.NDArray[np.floating[Any]]) -> Array:
    """Angles [N, 3] in degrees of the core's scores [N, 3 bins]."""
    from onnx import numpy_helper

    bins = next(numpy_helper.to_array(t) for t in model.graph.initializer if t.name == "bins")
    logits = np.asarray(scores, np.float64).reshape(len(scores), 3, -1)
    p = np.exp(logits - logits.max(axis=2, keepdims=True))
    return np.asarray((p / p.sum(axis=2, keepdims=True) * bins).sum(axis=2))


def _inside(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The nodes between `FIRST` and `LAST`, in order."""
    made = {o for n in model.graph.node for o in n.output}
    if FIRST not in made or LAST not in made:
        raise DataError(f"not a deployed graph: it has no tensors {FIRST} and {LAST}")
    found = _ancestors(model, LAST) - _ancestors(model, FIRST)
    return [n for n in model.graph.node if n.output[0] in found]


def _ancestors(model: onnx.ModelProto, tensor: str) -> set[str]:
    """First outputs of the nodes that `tensor` is computed by."""
    made = {o: n for n in model.graph.node for o in n.output}
    wanted, found = [tensor], set()
    while wanted:
        node = made.get(wanted.pop())
        if node is not None and node.output[0] not in found:
            found.add(node.output[0])
            wanted += node.input
    return found


def _output(model: Any, name: str) -> Any:
    for op in model.get_ordered_ops():
        for output in op.outputs():
            if name in output.get_names():
                return output
    raise DataError(f"the OpenVINO model has no tensor {name}")
