"""Trained quantisation: int8 weights, scales and activation ranges that travel with a network.

Quantisation-aware distillation writes a checkpoint that holds, beside the weights of the float
network, the integers it trained, for one flavour or both. The file stays what it was for whoever
wants the float network; a build in INT8 takes the integers as they are. Tensors, by flavour F and
graph node N::

    quantised.F.N.weight  int8 [Cout, ...]      quantised.F.N.scale  float32 [Cout]
    quantised.F.N.bias    float32 [Cout]        quantised.F.table    uint8, the table's JSON

A layer that stays in floating point in flavour F has a float32 weight and no scale.

The table is a `CalibrationTable` whose ranges are the trained ones, under ``"minmax"``, the method
that takes a range as it is. Its key ``network`` is the digest of the other tensors, so that neither
can be exchanged alone, and ``preprocessing`` ties it to the input size it was trained at.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgehp.errors import CheckpointError, DataError, EnvironmentalError, UsageError
from edgehp.networks.checkpoint import QUANTISED_PREFIX
from edgehp.quantization.graphview import GraphView
from edgehp.quantization.lint import lint
from edgehp.quantization.placement import FLAVOURS, place
from edgehp.quantization.qdq import Recipe
from edgehp.quantization.quantise import QuantisedModel, emit
from edgehp.quantization.select import Judge, Subset, split_crops
from edgehp.quantization.table import CalibrationTable

if TYPE_CHECKING:
    import onnx

    from edgehp.networks.spec import NetworkSpec

__all__ = [
    "TRAINED",
    "TRAINED_METHOD",
    "TrainedLayer",
    "TrainedQuantisation",
    "layers_digest",
    "read_trained",
    "stored_tensors",
    "trained_for",
]

TRAINED = "trained"
TRAINED_METHOD = "minmax"
_TABLE = "table"
_PARTS = ("weight", "scale", "bias")

Crop = npt.NDArray[np.uint8]
Tensors = Mapping[str, npt.NDArray[np.generic]]


@dataclass(frozen=True, eq=False)
class TrainedLayer:
    """A convolution or linear layer.

    Attributes:
        weight: int8 [Cout, ...] in -127..127, or float32 where the layer is not quantised.
        bias: float32 [Cout].
        scale: float32 [Cout] of an int8 weight, else None. The largest magnitude of every channel
            is 127, or the channel is all zero: the emitters, which take a channel's scale from its
            largest weight, then find `scale` again.
    """

    weight: npt.NDArray[np.generic]
    bias: npt.NDArray[np.float32]
    scale: npt.NDArray[np.float32] | None = None

    @property
    def integers(self) -> npt.NDArray[np.int8] | None:
        """The weight, where it is quantised."""
        return None if self.scale is None else np.asarray(self.weight, np.int8)

    @property
    def values(self) -> npt.NDArray[np.float32]:
        """The weight, or what its integers stand for."""
        if self.scale is None:
            return np.asarray(self.weight, np.float32)
        shape = (-1,) + (1,) * (self.weight.ndim - 1)
        return np.asarray(self.weight, np.float32) * self.scale.reshape(shape)

    @property
    def parts(self) -> dict[str, npt.NDArray[np.generic]]:
        """The arrays by the last part of their names in a file."""
        found: dict[str, npt.NDArray[np.generic]] = {"weight": self.weight, "bias": self.bias}
        return found if self.scale is None else {**found, "scale": self.scale}


@dataclass(frozen=True, eq=False)
class TrainedQuantisation:
    """What was trained for one flavour.

    Attributes:
        flavour: ``"cpu"`` or ``"tensorrt"``.
        layers: by node of the deployed float graph.
        table: activation ranges by tensor, under `TRAINED_METHOD`.
    """

    flavour: str
    layers: Mapping[str, TrainedLayer]
    table: CalibrationTable

    def float_graph(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """The deployed graph of the float network with the trained weights in place of its own.

        Raises:
            CheckpointError: these layers are not that graph's.
        """
        import onnx
        from onnx import numpy_helper

        out = onnx.ModelProto()
        out.CopyFrom(model)
        view = GraphView(out)
        placement = place(view, self.flavour)
        weighted = {n.name for n in model.graph.node if view.has_weight(n)}
        quantised = {n for n, layer in self.layers.items() if layer.scale is not None}
        wrong = set(self.layers) ^ weighted | quantised ^ set(placement.weights)
        if wrong := wrong | set(placement.tensors) - set(self.table.tensors):
            names = ", ".join(sorted(wrong)[:4])
            raise _damaged(self.flavour, f"layers or ranges do not fit the network ({names})")
        for name, layer in self.layers.items():
            node = view.nodes[name]
            for parameter, values in zip(node.input[1:], (layer.values, layer.bias), strict=True):
                tensor = view.tensor(parameter)
                if tensor is None or tuple(tensor.dims) != values.shape:
                    raise _damaged(self.flavour, f"{name} has the shape {values.shape}")
                tensor.CopyFrom(numpy_helper.from_array(values, parameter))
        return out

    def graph(self, model: onnx.ModelProto, body: str = "fp32") -> onnx.ModelProto:
        """The Q/DQ graph with the trained integers and scales.

        Args:
            model: the deployed graph of the float network; not modified.
            body: ``"fp32"`` or, for ``tensorrt``, ``"fp16"``.

        Raises:
            CheckpointError: these layers are not that graph's.
            UsageError: an FP16 body in the ``cpu`` flavour.
        """
        source = self.float_graph(model)
        return emit(source, self.table, self._recipe(), flavour=self.flavour, body=body)

    def quantised(
        self,
        model: onnx.ModelProto,
        crops: Sequence[Crop],
        *,
        body: str = "fp32",
        threads: int | None = None,
    ) -> QuantisedModel:
        """`graph` as `edgehp.quantization.quantise.quantise` gives one, compared with `model`.

        Args:
            model: the deployed graph of the float network; not modified.
            crops: uint8 [S, S, 3] RGB; those that `quantise` would hold back judge the result.
            body: see `graph`.
            threads: of the engine; None takes all cores.

        Raises:
            CheckpointError, UsageError: as `graph`.
        """
        source, recipe = self.float_graph(model), self._recipe()
        made = emit(source, self.table, recipe, flavour=self.flavour, body=body)
        held = split_crops(crops)[1]
        difference = Judge(model, Subset(crops, held), threads=threads)(made)
        return QuantisedModel(
            model=made,
            table=self.table,
            recipe=recipe,
            scores=MappingProxyType({TRAINED: difference}),
            chosen=TRAINED,
            held_back=len(held),
            findings=lint(made, self.flavour, head=self.flavour == "cpu"),
            flavour=self.flavour,
            source=source,
            source_table=self.table,
        )

    def _recipe(self) -> Recipe:
        integers = {n: q for n, la in self.layers.items() if (q := la.integers) is not None}
        return Recipe(method=TRAINED_METHOD, weights=integers)


def trained_for(path: Path | str, spec: NetworkSpec, flavour: str) -> TrainedQuantisation | None:
    """What a checkpoint holds for a flavour; None where nothing in it was trained as integers.

    Raises:
        UsageError: it holds integers of the other flavour alone, or of another preprocessing.
        CheckpointError, EnvironmentalError: as `read_trained`.
    """
    found = read_trained(path)
    if not found:
        return None
    name = Path(path).name
    advice = "or choose a --calibration-method to quantise its float weights after training"
    if flavour not in found:
        raise UsageError(
            f"{name} holds integers trained for the flavour {', '.join(found)}, not {flavour}: "
            f"train those too with 'edgehp distill --quantization-aware --flavour {flavour} "
            f"--start {name}', {advice}"
        )
    trained = found[flavour]
    if trained.table.preprocessing != spec.preprocessing.digest:
        raise UsageError(
            f"{name} holds integers trained for other crops than these of "
            f"{spec.preprocessing.size} pixels: build at the size they were trained at, {advice}"
        )
    return trained


def layers_digest(layers: Mapping[str, TrainedLayer]) -> str:
    """SHA-256 (hex) of names, shapes and values of all layers."""
    digest = hashlib.sha256()
    for name in sorted(layers):
        for part, array in sorted(layers[name].parts.items()):
            digest.update(f"{name}.{part}{array.dtype.str}{list(array.shape)}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def stored_tensors(trained: TrainedQuantisation) -> dict[str, npt.NDArray[np.generic]]:
    """The tensors of a file by name; see the module's text."""
    start = f"{QUANTISED_PREFIX}{trained.flavour}."
    found: dict[str, npt.NDArray[np.generic]] = {}
    for name, layer in trained.layers.items():
        found |= {f"{start}{name}.{part}": array for part, array in layer.parts.items()}
    found[start + _TABLE] = np.frombuffer(trained.table.to_json().encode(), np.uint8)
    return found


def read_trained(path: Path | str) -> dict[str, TrainedQuantisation]:
    """What a checkpoint holds of trained quantisation, by flavour; empty for any other file.

    Raises:
        CheckpointError: the file is damaged, or its parts do not belong together.
        EnvironmentalError: safetensors is not installed.
    """
    path = Path(path)
    if path.suffix.lower() != ".safetensors":
        return {}
    try:
        import safetensors
    except ImportError as e:
        raise EnvironmentalError(
            f"weights need the safetensors package ({e}); install it with: pip install safetensors"
        ) from e
    try:
        with safetensors.safe_open(path, "numpy") as file:
            names = [n for n in file.keys() if n.startswith(QUANTISED_PREFIX)]  # noqa: SIM118
            tensors = {n.removeprefix(QUANTISED_PREFIX): file.get_tensor(n) for n in names}
    except (safetensors.SafetensorError, OSError, TypeError, ValueError) as e:
        raise CheckpointError(
            f"{path} is truncated or not a safetensors file ({e}); copy or download it again"
        ) from e
    flavours = dict.fromkeys(name.partition(".")[0] for name in tensors)
    try:
        return {f: _flavour(f, tensors) for f in flavours}
    except (CheckpointError, DataError) as e:
        raise CheckpointError(f"{path}: {e}") from e


def _flavour(flavour: str, tensors: Tensors) -> TrainedQuantisation:
    if flavour not in FLAVOURS:
        raise _damaged(flavour, f"known flavours are {', '.join(FLAVOURS)}")
    parts: dict[str, dict[str, npt.NDArray[np.generic]]] = {}
    text: npt.NDArray[np.generic] | None = None
    for name, values in tensors.items():
        if not name.startswith(f"{flavour}."):
            continue
        node, _, part = name.removeprefix(f"{flavour}.").rpartition(".")
        if not node and part == _TABLE:
            text = values
        elif node and part in _PARTS:
            parts.setdefault(node, {})[part] = values
        else:
            raise _damaged(flavour, f"nobody knows what {name[:80]} is")
    if text is None or text.dtype != np.uint8:
        raise _damaged(flavour, "it has no table of activation ranges")
    table = CalibrationTable.from_json(
        text.tobytes().decode("utf-8", "replace"), f"the trained table ({flavour})"
    )
    layers = {n: _layer(flavour, n, p) for n, p in parts.items()}
    if (digest := layers_digest(layers)) != table.network:
        raise _damaged(
            flavour, f"its table belongs to the weights {table.network[:12]}, found {digest[:12]}"
        )
    return TrainedQuantisation(flavour, layers, table)


def _layer(flavour: str, name: str, parts: Tensors) -> TrainedLayer:
    kinds = {k: v.dtype for k, v in parts.items()}
    floats = {"weight": np.dtype(np.float32), "bias": np.dtype(np.float32)}
    if kinds not in (floats, {**floats, "weight": np.dtype(np.int8), "scale": floats["bias"]}):
        text = ", ".join(f"{k} {v}" for k, v in sorted(kinds.items()))
        raise _damaged(flavour, f"{name[:80]} has {text}")
    weight, bias = parts["weight"], np.asarray(parts["bias"], np.float32)
    scale = np.asarray(parts["scale"], np.float32) if "scale" in parts else None
    vectors = [bias] if scale is None else [bias, scale]
    if weight.ndim < 2 or any(v.shape != weight.shape[:1] for v in vectors):
        shapes = ", ".join(str(v.shape) for v in (weight, *vectors))
        raise _damaged(flavour, f"{name[:80]} has the shapes {shapes}")
    layer = TrainedLayer(weight, bias, scale)
    if not all(np.isfinite(v).all() for v in (layer.values, *vectors)) or (
        scale is not None and not (scale > 0).all()
    ):
        raise _damaged(flavour, f"{name[:80]} holds values that cannot be")
    return layer


def _damaged(flavour: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"the trained quantisation ({flavour[:20]}) cannot be used: {what}; distil it again or "
        "take the file from before"
    )
