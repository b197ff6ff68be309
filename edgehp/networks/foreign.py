"""ONNX files of any exporter, read into one form that the rest of edgehp knows.

`read_network` gives a graph of float32 in operator set 17 where it can be brought there: weights in
the file and not among the inputs, local functions inlined, half precision widened, nodes named, and
integers of an earlier quantization turned back into the numbers that they stand for.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from edgehp._installed import import_package
from edgehp.errors import CheckpointError
from edgehp.files import stand_in

if TYPE_CHECKING:
    import onnx

_log = logging.getLogger(__name__)

# Per-channel Q/DQ and every TensorRT from 8.5 on know this operator set.
OPSET = 17
_OLDEST = 7
_LARGEST_FILE = 2 << 30  # protobuf's own limit
_NAMED = 6
# Of QLinear operators and of dynamic quantization: other forms than Q/DQ pairs.
_INTEGER = ("QLinear", "DynamicQuantize", "MatMulInteger", "ConvInteger", "QAttention", "QGemm")


def read_model(path: Path, *, external: bool = False) -> onnx.ModelProto:
    """Read an ONNX file.

    Args:
        path: the file.
        external: whether weights may lie in other files of its folder.

    Raises:
        CheckpointError: it is missing, truncated, damaged, too large or no ONNX, or its weights
            lie elsewhere.
        EnvironmentalError: the onnx package is not installed.
    """
    import_package("onnx", "reading an ONNX graph needs")
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise CheckpointError(f"{path} is larger than 2 GiB, the most that ONNX allows")
        data = path.read_bytes()
    except OSError as e:
        raise CheckpointError(f"{path} cannot be read: {e.strerror or e}") from e
    if not data:
        raise CheckpointError(f"{path} is empty: copy it again")
    if (other := stand_in(data[:512])) is not None:
        raise CheckpointError(f"{path} is {other}")
    try:
        model = onnx.load_model_from_string(data)
    except DecodeError as e:
        raise CheckpointError(
            f"{path} is truncated or not an ONNX file; copy it again or build it with edgehp"
        ) from e
    # protobuf leaves a name that is not UTF-8 as bytes, which nothing behind this expects.
    if any(isinstance(text, bytes) for text in _texts(model)):
        raise CheckpointError(f"{path} is damaged: a name in it is not UTF-8; copy it again")
    types = {v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)}
    types |= {t.data_type for t in _tensors(model.graph)}
    if unknown := sorted(types - set(onnx.TensorProto.DataType.values())):
        raise CheckpointError(
            f"{path} has the element type {unknown[0]}, which onnx {onnx.__version__} does not know"
        )
    # Older exporters list weights among the inputs, which lets nobody tell them from crops.
    constants = {t.name for t in model.graph.initializer}
    inputs = [i for i in model.graph.input if i.name not in constants]
    replace_all(model.graph.input, inputs)
    outside = [t for t in _tensors(model.graph) if t.data_location == t.EXTERNAL]
    if outside and not external:
        # Paths in an untrusted file are not followed: a deployed graph is one file.
        raise CheckpointError(f"{path} keeps weights in other files; a deployed graph is one file")
    if outside:
        _load_external(model, outside, path)
    return model


def _texts(message: Any) -> Iterator[str | bytes]:
    """All texts in a protobuf message and in those inside it."""
    for field, value in message.ListFields():
        values = (
            [value] if isinstance(value, (str, bytes)) or hasattr(value, "ListFields") else value
        )
        if field.type == field.TYPE_STRING:
            yield from values
        elif field.type == field.TYPE_MESSAGE:
            for one in values:
                yield from _texts(one)


def _load_external(model: onnx.ModelProto, outside: Sequence[onnx.TensorProto], path: Path) -> None:
    """Read the weights beside the file; names that lead out of its folder are refused."""
    from onnx import external_data_helper

    places = {e.value for t in outside for e in t.external_data if e.key == "location"}
    size = 0
    for place in sorted(places):
        plain = PurePosixPath(place.replace("\\", "/"))
        file = path.parent / plain
        inside = not plain.is_absolute() and ".." not in plain.parts and not file.is_symlink()
        if not inside or path.parent.resolve() not in file.resolve().parents:
            raise CheckpointError(
                f"{path} keeps weights in {place!r}, outside of its folder; that is not followed"
            )
        if not file.is_file():
            raise CheckpointError(
                f"{path} keeps its weights in {place}, which is not beside it\n"
                "hint: copy both files"
            )
        size += file.stat().st_size
    if size > _LARGEST_FILE:
        raise CheckpointError(
            f"{path}: its weights have {size / 2**30:.1f} GiB, at most 2 are read"
        )
    try:
        external_data_helper.load_external_data_for_model(model, str(path.parent))
    # Whatever onnx makes of offsets and lengths that lie.
    except Exception as e:
        raise CheckpointError(f"{path}: the weights beside it cannot be read: {e}") from e


def _tensors(graph: onnx.GraphProto) -> Iterable[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for a in node.attribute:
            if a.name == "value" and node.op_type == "Constant":
                yield a.t


def read_network(path: Path, *, as_written: bool = False) -> onnx.ModelProto:
    """Read a network of any exporter; see the module's docstring.

    Args:
        path: the file.
        as_written: keep the Q/DQ pairs of one that is quantized.

    Raises:
        CheckpointError: the file cannot be read, or holds what edgehp cannot deploy: operators of
            another domain, control flow, an unknown element type, QLinear operators.
        EnvironmentalError: the onnx package is not installed.
    """
    model = read_model(path, external=True)
    import onnx  # read_model says it where onnx is missing

    if not model.graph.node:
        raise CheckpointError(f"{path} is empty or holds no network")
    for node in model.graph.node:
        if not node.output or (node.op_type == "Constant" and not node.attribute):
            raise CheckpointError(f"{path} is damaged: a node gives nothing; copy it again")
    _refuse(
        model,
        lambda n: n.domain not in ("", "ai.onnx", *(f.domain for f in model.functions)),
        f"{path} has operators that are not ONNX's own: ",
        "\nhint: export the network without them, before any tool optimised or quantized it",
    )
    if model.functions:
        from onnx import inliner

        model = inliner.inline_local_functions(model)
    _refuse(
        model,
        lambda n: n.op_type in ("If", "Loop", "Scan"),
        f"{path} decides while it runs (",
        "), which no engine here fixes\n"
        "hint: export it with torch.onnx.export(..., dynamo=True), in evaluation mode",
    )
    _refuse(
        model,
        lambda n: n.op_type.startswith(_INTEGER),
        f"{path} is quantized already, in integer operators (",
        ")\nhint: give the network before quantization, or one with Q/DQ pairs",
    )
    _lift_constants(model)
    _name_nodes(model)
    _widen(model)
    model = _at_opset(model, path)
    if not as_written:
        _dequantize(model, path)
    try:
        onnx.checker.check_model(model, full_check=False)
    except onnx.checker.ValidationError as e:
        raise CheckpointError(f"{path} is not valid ONNX: {_line(e)}") from e
    return model


def shape_of(value: onnx.ValueInfoProto) -> list[int | None]:
    """The dimensions of a tensor; None for a free one."""
    dims = value.type.tensor_type.shape.dim
    return [d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else None for d in dims]


def free_batch(
    model: onnx.ModelProto, given: str, sides: Sequence[int], outputs: Sequence[str]
) -> onnx.ModelProto:
    """The part of a network that leads to `outputs`, with a free batch and a fixed size.

    Exporters write a batch of their own into shapes; Reshape and Expand are told to keep the one
    that comes. Whether that was all of it, the caller must try.

    Args:
        model: of one input.
        given: its name.
        sides: of the input behind the batch.
        outputs: names.
    """
    import onnx

    from edgehp.quantization.graph import GraphView, drop_unread

    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    shapes = {v.name: shape_of(v) for v in [*inferred.graph.value_info, *model.graph.input]}
    view = GraphView(model)
    batch = shapes[given][0]
    needed, wanted = set[str](), list(outputs)
    while wanted:
        node = view.producer.get(wanted.pop())
        if node is not None and node.name not in needed:
            needed.add(node.name)
            wanted.extend(node.input)
    replace_all(model.graph.node, [n for n in model.graph.node if n.name in needed])
    value_info = onnx.helper.make_tensor_value_info
    replace_all(model.graph.output, map(onnx.helper.make_empty_tensor_value_info, outputs))
    crops = value_info(given, onnx.TensorProto.FLOAT, ["batch", *sides])
    replace_all(model.graph.input, [crops])
    del model.graph.value_info[:]
    if batch is not None:
        _keep_batch(model, view, shapes, batch)
    drop_unread(model)
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    replace_all(model.graph.output, inferred.graph.output)
    return model


def _keep_batch(
    model: onnx.ModelProto, view: Any, shapes: dict[str, list[int | None]], batch: int
) -> None:
    """Let Reshape and Expand copy the batch that comes instead of writing the exporter's own."""
    from onnx import numpy_helper

    for node in model.graph.node:
        if node.op_type not in ("Reshape", "Expand") or not view.is_constant(node.input[1]):
            continue
        wanted = view.array(node.input[1]).copy()
        source = shapes.get(node.input[0]) or []
        if not wanted.size or wanted[0] != batch or not source or source[0] != batch:
            continue
        if node.op_type == "Reshape":
            wanted[0] = 0
            # torch.export's exporter sets it, and 0 would stand for no crop at all.
            replace_all(node.attribute, [a for a in node.attribute if a.name != "allowzero"])
        else:
            wanted[0] = 1
        name = f"{node.name}.shape"
        model.graph.initializer.append(numpy_helper.from_array(wanted, name))
        node.input[1] = name


def _refuse(
    model: onnx.ModelProto, what: Callable[[onnx.NodeProto], bool], before: str, after: str
) -> None:
    """Count the nodes that nothing here takes, between the halves of the sentence about them."""
    kinds = Counter(
        n.op_type if n.domain in ("", "ai.onnx") else f"{n.domain}.{n.op_type}"
        for n in model.graph.node
        if what(n)
    )
    if kinds:
        shown = [f"{n} {kind}" for kind, n in kinds.most_common(_NAMED)]
        more = ", ..." if len(kinds) > _NAMED else ""
        raise CheckpointError(f"{before}{', '.join(shown)}{more}{after}")


def replace_all(field: Any, values: Iterable[Any]) -> None:
    """Let a repeated field of a protobuf message hold these and no other values."""
    kept = list(values)
    del field[:]
    field.extend(kept)


def _lift_constants(model: onnx.ModelProto) -> None:
    """Constant nodes as constants of the graph."""
    from onnx import helper, numpy_helper

    kept = []
    for node in model.graph.node:
        if node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
            kept.append(node)
            continue
        attribute = node.attribute[0]
        value = helper.get_attribute_value(attribute)
        if attribute.name == "value":
            tensor = value
        elif attribute.name.startswith("value_float"):
            tensor = numpy_helper.from_array(np.asarray(value, np.float32))
        elif attribute.name.startswith("value_int"):
            tensor = numpy_helper.from_array(np.asarray(value, np.int64))
        else:
            kept.append(node)
            continue
        copy = model.graph.initializer.add()
        copy.CopyFrom(tensor)
        copy.name = node.output[0]
    replace_all(model.graph.node, kept)


def _name_nodes(model: onnx.ModelProto) -> None:
    """Every node a name of its own: its output's where it has none."""
    seen: set[str] = set()
    for node in model.graph.node:
        name = node.name or node.output[0]
        while name in seen:
            name += "_"
        node.name = name
        seen.add(name)


def _widen(model: onnx.ModelProto) -> None:
    """Half precision and doubles as float32: engines choose the precision, not the file."""
    import onnx
    from onnx import numpy_helper

    kinds = onnx.TensorProto
    others = {kinds.FLOAT16, kinds.BFLOAT16, kinds.DOUBLE}
    for tensor in model.graph.initializer:
        if tensor.data_type in others:
            values = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        if value.type.tensor_type.elem_type in others:
            value.type.tensor_type.elem_type = kinds.FLOAT
    for node in model.graph.node:
        for a in node.attribute:
            if node.op_type == "Cast" and a.name == "to" and a.i in others:
                a.i = kinds.FLOAT
            elif a.type == a.TENSOR and a.t.data_type in others:
                values = numpy_helper.to_array(a.t).astype(np.float32)
                a.t.CopyFrom(numpy_helper.from_array(values))


def _at_opset(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """The same in operator set `OPSET`, or in its own where a newer one cannot be lowered."""
    import onnx
    from onnx import helper, version_converter

    found = max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0)
    newest = onnx.defs.onnx_opset_version()
    if not _OLDEST <= found <= newest:
        raise CheckpointError(
            f"{path} is in ONNX operator set {found}; onnx {onnx.__version__} reads {_OLDEST} to "
            f"{newest}\nhint: export it with opset {OPSET}"
        )
    if found != OPSET:
        try:
            made = version_converter.convert_version(model, OPSET)
            onnx.checker.check_model(made)
            model = made
        # The converter raises RuntimeError, and what its C++ parts do not catch.
        except Exception as e:
            if found < OPSET:
                raise CheckpointError(
                    f"{path}: operator set {found} cannot be raised to {OPSET}: {_line(e)}\n"
                    f"hint: export it with opset {OPSET}"
                ) from e
            _log.info("%s stays in operator set %d: %s", path, found, _line(e))
    own = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    replace_all(model.opset_import, [helper.make_opsetid("", own)])
    model.ir_version = helper.find_min_ir_version_for(model.opset_import)
    _lift_constants(model)
    _name_nodes(model)
    return model


def _dequantize(model: onnx.ModelProto, path: Path) -> None:
    """Take Q/DQ pairs out; integer weights become the numbers that they stand for.

    The quantization of edgehp is made anew, for the target: scales of another tool are of its
    placement, which an engine may not have kernels for.
    """
    from onnx import helper, numpy_helper

    from edgehp.quantization.graph import GraphView, drop_unread

    view = GraphView(model)
    removed, renamed, pairs, weights = set[str](), dict[str, str](), 0, 0
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear":
            continue
        source = node.input[0]
        before = view.producer.get(source)
        if before is not None and before.op_type == "QuantizeLinear":
            renamed[node.output[0]] = before.input[0]
            removed |= {node.name, before.name}
            pairs += 1
        elif view.is_constant(source):
            scale = view.array(node.input[1]).astype(np.float64)
            zero = view.array(node.input[2]).astype(np.float64) if len(node.input) > 2 else 0.0
            q = view.array(source).astype(np.float64)
            if scale.ndim and scale.size > 1:
                axis = view.attribute(node, "axis", 1) % q.ndim
                shape = [-1 if i == axis else 1 for i in range(q.ndim)]
                scale, zero = scale.reshape(shape), np.reshape(zero, shape)
            values = ((q - zero) * scale).astype(np.float32)
            model.graph.initializer.append(numpy_helper.from_array(values, node.output[0]))
            removed.add(node.name)
            weights += 1
    if not removed:
        return
    pairs_and_rest = view.of_type("QuantizeLinear", "DequantizeLinear")
    if left := [n.name for n in pairs_and_rest if n.name not in removed]:
        raise CheckpointError(
            f"{path} is quantized already, and {left[0]} is no part of a Q/DQ pair\n"
            "hint: give the network before quantization"
        )

    def original(name: str) -> str:
        while name in renamed:
            name = renamed[name]
        return name

    kept = [n for n in model.graph.node if n.name not in removed]
    for node in kept:
        node.input[:] = [original(n) for n in node.input]
    outputs = {o.name for o in model.graph.output}
    for name in outputs & set(renamed):
        same = helper.make_node("Identity", [original(name)], [name], name=f"{name}.same")
        kept.append(same)
    replace_all(model.graph.node, kept)
    drop_unread(model)
    _log.warning(
        "%s is quantized already (%d Q/DQ pairs, %d integer constants): they are turned back into "
        "floating point, and it is quantized anew",
        path.name,
        pairs,
        weights,
    )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
