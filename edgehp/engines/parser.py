"""Which operator sets and element types the ONNX parser of a TensorRT takes.

From the list of operators of each release of onnx-tensorrt; releases between two rows count as the
older one. None was tried on hardware.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgehp.errors import CompatibilityError
from edgehp.versions import parse_version

if TYPE_CHECKING:
    import onnx

# TensorRT from this release on -> the newest operator set.
_OPSETS = (("8.5", 17), ("9.0", 19), ("10.0", 20), ("10.15", 24), ("11.5", 25))
# Element type -> the first release with it.
_SINCE = {
    **dict.fromkeys(("FLOAT", "DOUBLE", "FLOAT16", "INT8", "INT32", "INT64", "BOOL"), "8.5"),
    "UINT8": "8.5",  # of inputs and outputs; edgehp's own input is
    **dict.fromkeys(("BFLOAT16", "FLOAT8E4M3FN"), "9.0"),
    "INT4": "10.0",
}


def newest_opset(version: str) -> int:
    """The newest operator set that TensorRT `version` (``"10.3.0.30"``) documents."""
    found = parse_version(version)
    known = [opset for first, opset in _OPSETS if parse_version(first) <= found]
    return known[-1] if known else _OPSETS[0][1]


def require_parsable(model: onnx.ModelProto, version: str, target: str) -> None:
    """Refuse a graph that the target's TensorRT cannot read.

    Args:
        model: the graph.
        version: of TensorRT.
        target: its name, for the message.

    Raises:
        CompatibilityError: its operator set is newer, or an element type is unknown there.
    """
    import onnx

    opset = max(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    newest = newest_opset(version)
    if opset > newest:
        raise CompatibilityError(
            f"the network is in ONNX operator set {opset}; TensorRT {version} of {target} reads at "
            f"most {newest}\nhint: export it with opset 17, which every TensorRT from 8.5 on reads"
        )
    types = {t.data_type for t in model.graph.initializer}
    types |= {v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)}
    for node in model.graph.node:
        for a in node.attribute:
            if node.op_type == "Cast" and a.name == "to":
                types.add(a.i)
            elif a.type == a.TENSOR:
                types.add(a.t.data_type)
    names = {n: k for k, n in onnx.TensorProto.DataType.items()}
    for kind in sorted(types):
        name = names.get(kind, str(kind))
        since = _SINCE.get(name)
        if since is None or parse_version(since) > parse_version(version):
            raise CompatibilityError(
                f"the network holds {name}, which TensorRT {version} of {target} does not take"
                + (f" (from {since} on)" if since else "")
                + "\nhint: export it in float32 or float16"
            )
