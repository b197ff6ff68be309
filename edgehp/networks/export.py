"""Deployed graphs read from files, with their interface checked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgehp.errors import CheckpointError, DataError
from edgehp.networks.foreign import read_model
from edgehp.networks.graph import (
    DIGEST_KEY,
    INPUT,
    OUTPUTS,
    spec_of_graph,
)
from edgehp.networks.spec import SPEC_KEY, DeployedSpec

if TYPE_CHECKING:
    import onnx


def load_graph(path: str | Path) -> tuple[onnx.ModelProto, DeployedSpec]:
    """Read a deployed graph and its specification.

    Raises:
        CheckpointError: the file is missing, truncated or not ONNX, keeps weights in other files,
            or is not a deployed graph: other inputs or outputs, or no (or a changed) specification
            in the metadata.
        EnvironmentalError: the onnx package is not installed.
    """
    path = Path(path)
    model = read_model(path)
    import onnx

    _check_interface(model, path)
    try:
        onnx.checker.check_model(model, full_check=True)
    # UnicodeDecodeError: a name in its own message that is not UTF-8.
    except (
        onnx.checker.ValidationError,
        onnx.shape_inference.InferenceError,
        UnicodeDecodeError,
    ) as e:
        line = (str(e).strip().splitlines() or ["no reason given"])[0][:200]
        raise CheckpointError(f"{path} is not valid ONNX: {line}") from e
    return model, _specification(model, path)


def _specification(model: onnx.ModelProto, path: Path) -> DeployedSpec:
    try:
        spec = spec_of_graph(model)
    except DataError as e:
        raise CheckpointError(f"{path}: {e}") from e
    if spec is None:
        raise CheckpointError(
            f"{path} carries no network specification (metadata {SPEC_KEY}), without which nobody "
            "knows how to crop for it\nhint: build the graph with edgehp from its checkpoint"
        )
    size = model.graph.input[0].type.tensor_type.shape.dim[1].dim_value
    digest = {p.key: p.value for p in model.metadata_props}.get(DIGEST_KEY)
    if digest != spec.digest or size != spec.preprocessing.size:
        raise CheckpointError(
            f"{path}: its specification was altered (input of {size} pixels, specified "
            f"{spec.preprocessing.size}; digest {str(digest)[:12]}, computed {spec.digest[:12]})\n"
            "hint: build the graph again from its checkpoint"
        )
    return spec


def _check_interface(model: onnx.ModelProto, path: Path) -> None:
    import onnx

    kinds = onnx.TensorProto
    constants = {t.name for t in model.graph.initializer}
    inputs = [v for v in model.graph.input if v.name not in constants]
    found = (
        [_signature(v) for v in inputs],
        [_signature(v) for v in model.graph.output],
    )
    size = found[0][0][2][1] if found[0] and len(found[0][0][2]) == 4 else None
    wanted = (
        [(INPUT, kinds.UINT8, (None, size, size, 3))],
        # Networks of others without bins have no spread.
        [(name, kinds.FLOAT, (None, 3)) for name in OUTPUTS[: max(1, len(found[1]))]],
    )
    if size is None or found != wanted:
        text = [
            ", ".join(
                f"{name} {kinds.DataType.Name(kind).lower()}"
                f"[{', '.join('N' if d is None else str(d) for d in shape)}]"
                for name, kind, shape in side
            )
            or "nothing"
            for side in found
        ]
        raise CheckpointError(
            f"{path} is not a deployed graph: it takes {text[0]} and gives {text[1]}; expected "
            f"{INPUT} uint8[N, S, S, 3] to angles float[N, 3] and spread float[N, 3] with a "
            "dynamic batch N\nhint: a network of others needs a description: "
            f"'edgehp describe {path} --output net.toml', then "
            f"'edgehp build --network {path} --describe net.toml'"
        )


def _signature(value: onnx.ValueInfoProto) -> tuple[str, int, tuple[int | None, ...]]:
    tensor = value.type.tensor_type
    shape = tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim)
    return value.name, tensor.elem_type, shape
