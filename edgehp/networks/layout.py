"""Which tensors a network's weights consist of: names, shapes, and the other way round.

Needs neither torch nor a file: the checkpoint reader and the ONNX graph builder share it.

========= ================================ ======== ==========================
network    backbone (torchvision's names)   neck     heads
========= ================================ ======== ==========================
kd-resnet  ``encoder_net.model.*``          none     ``head_net.{angle}.*``
ehpnet     ``backbone.*``                   neck.0.* ``heads.{angle}.*``
========= ================================ ======== ==========================

The first is the layout of the checkpoints published with arXiv 2108.09183. The second is edgehp's
own; the flat layout of the published code for arXiv 2210.13705 (``conv1.*``, ``layer1.*``,
``linear.*``, ``fc_{angle}.*``) is renamed to it by `canonical_names`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from msgspec.structs import replace

from edgehp.errors import CheckpointError
from edgehp.networks.spec import EHPNET, KD_RESNET, RESNET_STAGES, NetworkSpec

Weights = dict[str, npt.NDArray[np.float32]]
Shape = tuple[int, ...]

ANGLES = ("pitch", "yaw", "roll")
# What torchvision's names of a ResNet without its classifier begin with.
BACKBONE = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")
_NECK_WIDTH = 128  # arXiv 2210.13705: a 512-128 layer before the heads
_STATISTICS = ("weight", "bias", "running_mean", "running_var")
# num_batches_tracked steers the averaging of training-time statistics and nothing else.
_OPTIONAL = "num_batches_tracked"
_NAMED = 4
# In front of every name: DataParallel and SWA, torch.compile, Lightning and others.
WRAPPERS = ("module.", "_orig_mod.", "model.", "network.", "net.")


@dataclass(frozen=True)
class BatchNorm:
    """The names of a convolution and of the batch normalisation behind it, and their shapes.

    Attributes:
        conv: name of the convolution, without ``.weight``.
        norm: name of the normalisation.
        shape: of the weight, [cout, cin, kernel, kernel].
        stride: of the convolution; its padding is always ``kernel // 2``.
    """

    conv: str
    norm: str
    shape: tuple[int, int, int, int]
    stride: int


# The convolution that every ResNet starts with (named without the prefix).
STEM = BatchNorm("conv1", "bn1", (64, 3, 7, 7), 2)


@dataclass(frozen=True)
class Block:
    """A residual block: convolutions in order and, where the shape changes, a downsampling one."""

    name: str
    convolutions: tuple[BatchNorm, ...]
    downsample: BatchNorm | None


def backbone_prefix(spec: NetworkSpec) -> str:
    """What the names of the backbone's tensors begin with, dot included."""
    return "encoder_net.model." if spec.architecture == "kd-resnet" else "backbone."


def neck_prefix(spec: NetworkSpec) -> str | None:
    """Name of the linear layer between backbone and heads, or None where there is none."""
    return "neck.0" if spec.architecture == "ehpnet" else None


def heads_prefix(spec: NetworkSpec) -> str:
    """What the names of the heads' tensors begin with, dot included."""
    return "head_net." if spec.architecture == "kd-resnet" else "heads."


def feature_count(depth: int) -> int:
    """Width of the pooled features of a ResNet: 512, or 2048 with bottleneck blocks."""
    return 2048 if RESNET_STAGES[depth][1] else 512


def resnet_blocks(depth: int) -> Iterator[Block]:
    """The residual blocks of a ResNet in order (torchvision's names, without a prefix)."""
    counts, bottleneck = RESNET_STAGES[depth]
    cin = 64
    for stage, count in enumerate(counts):
        width = 64 << stage
        cout = 4 * width if bottleneck else width
        for i in range(count):
            stride = 2 if i == 0 and stage > 0 else 1
            name = f"layer{stage + 1}.{i}"
            # (cout, cin, kernel, stride) of each; the bottleneck's stride sits on its 3x3.
            plan = (
                [(width, cin, 1, 1), (width, width, 3, stride), (cout, width, 1, 1)]
                if bottleneck
                else [(width, cin, 3, stride), (width, width, 3, 1)]
            )
            convolutions = tuple(
                BatchNorm(f"{name}.conv{n}", f"{name}.bn{n}", (o, c, k, k), s)
                for n, (o, c, k, s) in enumerate(plan, 1)
            )
            downsample = None
            if cin != cout or stride != 1:
                side = f"{name}.downsample"
                downsample = BatchNorm(f"{side}.0", f"{side}.1", (cout, cin, 1, 1), stride)
            yield Block(name, convolutions, downsample)
            cin = cout


def expected_shapes(spec: NetworkSpec) -> dict[str, Shape]:
    """Names and shapes of all tensors that the network's weights must hold, in network order."""
    shapes: dict[str, Shape] = {}
    prefix = backbone_prefix(spec)

    def convolution(c: BatchNorm) -> None:
        shapes[f"{prefix}{c.conv}.weight"] = c.shape
        for part in _STATISTICS:
            shapes[f"{prefix}{c.norm}.{part}"] = c.shape[:1]

    convolution(STEM)
    for block in resnet_blocks(spec.depth):
        for c in block.convolutions:
            convolution(c)
        if block.downsample is not None:
            convolution(block.downsample)
    width = feature_count(spec.depth)
    if (neck := neck_prefix(spec)) is not None:
        shapes[f"{neck}.weight"] = (_NECK_WIDTH, width)
        shapes[f"{neck}.bias"] = (_NECK_WIDTH,)
        width = _NECK_WIDTH
    for angle in ANGLES:
        shapes[f"{heads_prefix(spec)}{angle}.weight"] = (spec.bins.count, width)
        shapes[f"{heads_prefix(spec)}{angle}.bias"] = (spec.bins.count,)
    return shapes


def check_weights(shapes: Mapping[str, Shape], spec: NetworkSpec, source: str) -> None:
    """Compare the names and shapes found with those the network needs.

    Args:
        shapes: shape by name; ``num_batches_tracked`` may be there or not.
        spec: the network.
        source: where the weights came from, for the message.

    Raises:
        CheckpointError: names are missing or unexpected, or shapes differ; the first few are
            named and all are counted.
    """
    expected = expected_shapes(spec)
    found = {k: tuple(v) for k, v in shapes.items() if not k.endswith(_OPTIONAL)}
    missing = [k for k in expected if k not in found]
    unexpected = sorted(k for k in found if k not in expected)
    different = [
        f"{k} is {list(found[k])}, expected {list(shape)}"
        for k, shape in expected.items()
        if k in found and found[k] != shape
    ]
    problems = [
        f"{len(names)} {what} ({', '.join(names[:_NAMED])}{', ...' if len(names) > _NAMED else ''})"
        for names, what in (
            (missing, "missing"),
            (unexpected, "unexpected"),
            (different, "of another shape"),
        )
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{source} does not fit {spec.architecture} of depth {spec.depth} with "
            f"{spec.bins.count} bins: of {len(expected)} tensors {'; '.join(problems)}\n"
            "hint: give the checkpoint of this network, or the network this checkpoint belongs to."
        )


def canonical_names(names: list[str]) -> dict[str, str]:
    """Canonical name by name found.

    Strips what wrappers put in front of every name (`WRAPPERS`, in any order) and renames the flat
    layout of the published code for arXiv 2210.13705. Names that belong to neither are left as
    they are.
    """
    stripped = {n: n for n in names}
    while names and (
        prefix := next(
            (w for w in WRAPPERS if all(s.startswith(w) for s in stripped.values())), None
        )
    ):
        stripped = {n: s.removeprefix(prefix) for n, s in stripped.items()}
    if {"conv1.weight", "linear.weight", "fc_yaw.weight"} <= set(stripped.values()):
        return {n: _from_flat(s) for n, s in stripped.items()}
    return stripped


def _from_flat(name: str) -> str:
    head, _, rest = name.partition(".")
    if head == "linear":
        return f"neck.0.{rest}"
    if head.startswith("fc_") and head[3:] in ANGLES:
        return f"heads.{head[3:]}.{rest}"
    if head in BACKBONE:
        return f"backbone.{name}"
    return name


def infer_spec(shapes: Mapping[str, Shape], source: str) -> NetworkSpec:
    """The published network whose weights these are, or the nearest to them, told by their names.

    Raises:
        CheckpointError: neither layout is recognised, or the heads have a number of bins whose
            values are nowhere written down.
    """
    base = next(
        (b for b in (KD_RESNET, EHPNET) if any(k.startswith(backbone_prefix(b)) for k in shapes)),
        None,
    )
    if base is None:
        first = ", ".join(sorted(shapes)[:_NAMED]) or "nothing"
        raise CheckpointError(
            f"{source} holds no network known here: found {len(shapes)} tensors ({first}, ...), "
            "expected missing names such as encoder_net.model.conv1.weight (KD-ResNet) or "
            "backbone.conv1.weight (EHPNet)"
        )
    specs = [base]
    if base is KD_RESNET:
        specs = [replace(base, name=f"kd-resnet{depth}", depth=depth) for depth in RESNET_STAGES]
    head = tuple(shapes.get(f"{heads_prefix(base)}yaw.bias", (base.bins.count,)))
    if head != (base.bins.count,):
        raise CheckpointError(
            f"{source}: heads of shape {list(head)}, expected [{base.bins.count}] as published "
            f"for {base.architecture}; other bins need a .safetensors file that carries their "
            "specification"
        )
    # Where tensors were lost or added, `check_weights` names them.
    return min(specs, key=lambda spec: len(expected_shapes(spec).keys() ^ shapes.keys()))
