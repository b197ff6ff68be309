"""Reading and writing network weights.

``.safetensors`` is edgehp's own form: half-precision tensors by canonical name
(`edgehp.networks.layout`) and the network's specification as JSON in the metadata key
``edgehp.spec``. It is read without torch. ``.pth`` and ``.pt`` are read by torch with
``weights_only=True``, which refuses pickles that would run code. Either may hold the layouts
published with the two papers, unchanged.
"""

from __future__ import annotations

import json
import logging
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgehp._installed import import_package
from edgehp.errors import CheckpointError, DataError, EnvironmentalError, UsageError
from edgehp.files import stand_in, write_whole
from edgehp.networks.layout import (
    BACKBONE,
    Weights,
    backbone_prefix,
    canonical_names,
    check_weights,
    expected_shapes,
    infer_spec,
)
from edgehp.networks.spec import SPEC_KEY, DeployedSpec, NetworkSpec

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)

SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".tar", ".pkl")
# ResNet152, the largest network here, takes 235 MB in single precision.
_LARGEST_FILE = 2 << 30
_FLOATS: dict[str, np.dtype[Any]] = {
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    # The upper half of a float32.
    "BF16": np.dtype("<u2"),
}
# Under which trainers keep the weights, the averaged ones first: they are what is deployed.
_AVERAGED = ("state_dict_ema", "model_ema", "ema", "ema_state_dict", "averaged", "swa_state_dict")
_RAW = ("state_dict", "model_state_dict", "model", "weights", "net", "network")
# What torch's readers raise on files that are truncated, corrupted or made to confuse them.
_READING_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError),
    *(OSError, RuntimeError, TypeError, ValueError),
)
_ADVICE = "give a .safetensors or .pth file with the weights of a KD-ResNet or an EHPNet"


def load_weights(
    path: str | Path, spec: NetworkSpec | None = None, key: str | None = None
) -> tuple[Weights, NetworkSpec]:
    """Read a checkpoint and check it against the network it belongs to.

    Args:
        path: a file with one of `SUFFIXES`.
        key: of the weights in a torch checkpoint that holds several, e.g. ``"state_dict_ema"`` or
            ``"ema.module"``. None takes averaged weights before raw ones, and says so.
        spec: the network the file must hold. None takes the specification in the file or, where
            there is none, the published network that names and shapes tell (`infer_spec`).

    Returns:
        float32 arrays by canonical name, in network order and without ``num_batches_tracked``, and
        the network's specification.

    Raises:
        CheckpointError: the file is missing, truncated, not a checkpoint, needs a pickle that runs
            code, does not fit the network, or holds values that are not finite.
        EnvironmentalError: the package that reads it is not installed.
        UsageError: the file name has another suffix.
    """
    arrays, found = _read(Path(path), key)
    spec = spec or found or infer_spec({k: v.shape for k, v in arrays.items()}, str(path))
    return _checked(arrays, spec, str(path)), spec


def save_weights(
    path: str | Path,
    state: Mapping[str, Any],
    spec: NetworkSpec,
    dtype: npt.DTypeLike = np.float16,
) -> None:
    """Write weights and specification to a ``.safetensors`` file, whole or not at all.

    Args:
        path: where to; an existing file is replaced in one step.
        state: arrays or torch tensors by name, canonical or with ``module.`` in front.
        spec: the network.
        dtype: float16 or float32, of convolution and linear weights. Vectors (biases and the
            normalisation's statistics) stay float32: they weigh little, and a small variance
            would lose its digits in half precision.

    Raises:
        CheckpointError: the weights do not fit `spec`, are not finite, or overflow `dtype`.
        DataError: the file cannot be written.
        UsageError: another dtype or suffix.
        EnvironmentalError: safetensors is not installed.
    """
    path, kind = Path(path), np.dtype(dtype)
    if kind not in (np.dtype(np.float16), np.dtype(np.float32)) or path.suffix != ".safetensors":
        raise UsageError(f"{path}: weights are written as float16 or float32 to .safetensors files")
    names = canonical_names(list(state))
    # numpy takes no torch tensor that requires a gradient, lives on a GPU or is bfloat16.
    arrays = {
        names[k]: np.asarray(v.detach().float().cpu() if hasattr(v, "detach") else v)
        for k, v in state.items()
    }
    weights = _checked(arrays, spec, f"the weights for {path}")
    stored: dict[str, npt.NDArray[Any]] = {}
    for name, value in weights.items():
        if value.ndim == 1:
            stored[name] = value
            continue
        largest = float(np.abs(value).max())
        if largest > float(np.finfo(kind).max):
            raise CheckpointError(f"{name} reaches {largest:.3g}, which {kind.name} cannot hold")
        stored[name] = np.ascontiguousarray(value.astype(kind))
    safetensors = import_package("safetensors.numpy", "writing weights needs")
    # A single key: safetensors writes several in no fixed order, and files would not be equal.
    data = safetensors.save(stored, {SPEC_KEY: spec.to_json()})
    try:
        write_whole(path, data)
    except OSError as e:
        raise DataError(f"{path} cannot be written: {e.strerror or e}") from e


def build_module(spec: NetworkSpec) -> nn.Module:
    """The torch module of a network, with fresh weights.

    Raises:
        EnvironmentalError: torch is not installed.
    """
    _torch()
    from edgehp.networks.modules import EHPNet, KDResNet

    return EHPNet(spec) if spec.architecture == "ehpnet" else KDResNet(spec)


def load_module(path: str | Path) -> tuple[nn.Module, NetworkSpec]:
    """The torch module of a checkpoint in evaluation mode, and its specification.

    Raises:
        CheckpointError, EnvironmentalError, UsageError: as `load_weights` and `build_module`.
    """
    weights, spec = load_weights(path)
    module = build_module(spec)
    torch = _torch()
    state = {k: torch.from_numpy(v) for k, v in weights.items()}
    # strict=False for num_batches_tracked alone: load_weights has compared all other names.
    module.load_state_dict(state, strict=False)
    return module.eval(), spec


def load_start(path: str | Path, spec: NetworkSpec) -> tuple[Weights, bool]:
    """Weights to begin a training with: a network's, or torchvision's ResNet as the backbone.

    A ResNet by torchvision's names (``conv1``, ``bn1``, ``layer1`` ... and ``fc``, as 6DRepNet and
    Hopenet have them too, whose heads have other names) gives the backbone alone: neck and heads
    stay as they are, which a warning says.

    Args:
        path: a file with one of `SUFFIXES`.
        spec: the network to train, of any input size.

    Returns:
        float32 arrays by canonical name, and whether they are the backbone alone.

    Raises:
        CheckpointError, EnvironmentalError, UsageError: as `load_weights`; or the backbone is of
            another depth than `spec`.
    """
    arrays, found = _read(Path(path), None)
    prefix = backbone_prefix(spec)
    if any(k.startswith(prefix) for k in arrays) or "conv1.weight" not in arrays:
        found = found or infer_spec({k: v.shape for k, v in arrays.items()}, str(path))
        return _checked(arrays, found, str(path)), False
    backbone = {f"{prefix}{k}": v for k, v in arrays.items() if k.partition(".")[0] in BACKBONE}
    shapes = {k: s for k, s in expected_shapes(spec).items() if k.startswith(prefix)}
    wrong = [k for k, s in shapes.items() if k not in backbone or backbone[k].shape != s]
    if wrong or len(backbone) != len(shapes):
        found_at = backbone[wrong[0]].shape if wrong and wrong[0] in backbone else "nothing"
        raise CheckpointError(
            f"{path}: expected the backbone of a ResNet{spec.depth} with {len(shapes)} tensors, "
            f"found {len(backbone)}"
            + (f"; {wrong[0]} is {found_at}, expected {shapes[wrong[0]]}" if wrong else "")
            + "\nhint: give the weights of the depth that --network names"
        )
    if any(not np.isfinite(v).all() for v in backbone.values()):
        raise CheckpointError(f"{path}: the weights hold NaN or infinite values")
    logger.warning(
        "%s: a ResNet's backbone is taken (%d tensors); the heads begin at random",
        path,
        len(backbone),
    )
    return {k: np.ascontiguousarray(backbone[k], np.float32) for k in shapes}, True


def _read(path: Path, key: str | None) -> tuple[dict[str, Any], NetworkSpec | None]:
    """The arrays of a checkpoint by canonical name, and the specification in it.

    Raises:
        CheckpointError, EnvironmentalError, UsageError: as `load_weights`.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(
            f"{path}: a checkpoint's name ends with {', '.join(SUFFIXES)}, not {path.suffix!r}"
        )
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as e:
        raise CheckpointError(f"{path} cannot be read ({e.strerror or e}); {_ADVICE}") from e
    if size == 0:
        raise CheckpointError(f"{path} is empty; {_ADVICE}")
    if size > _LARGEST_FILE:
        raise CheckpointError(f"{path} has {size / 2**30:.1f} GiB: no network here is so large")
    if (other := stand_in(head)) is not None:
        raise CheckpointError(f"{path} is {other}")
    if path.suffix.lower() == ".safetensors":
        if key is not None:
            raise UsageError(f"{path} holds one set of weights, none is called {key!r}")
        arrays, spec = _read_safetensors(path, head)
    else:
        arrays, spec = _read_torch(path, head, key), None
    names = canonical_names(list(arrays))
    return {names[k]: v for k, v in arrays.items()}, spec


def _read_safetensors(path: Path, head: bytes) -> tuple[dict[str, Any], NetworkSpec | None]:
    safetensors = import_package("safetensors", "reading weights needs")
    if head.startswith(b"PK"):
        raise CheckpointError(f"{path} is a torch checkpoint: name it .pth, or convert it")
    try:
        data = path.read_bytes()
        tensors = safetensors.deserialize(data)
    except (safetensors.SafetensorError, OSError) as e:
        raise CheckpointError(
            f"{path} is truncated or not a safetensors file ({e}); copy or download it again"
        ) from e
    arrays = {}
    for name, tensor in tensors:
        if name.endswith("num_batches_tracked"):
            continue
        kind: str = tensor["dtype"]
        if kind not in _FLOATS:
            raise CheckpointError(
                f"{path}: {name} is stored as {kind}; expected weights as {', '.join(_FLOATS)} "
                "(quantized checkpoints cannot be used: give the one before quantization)"
            )
        values: npt.NDArray[Any] = np.frombuffer(tensor["data"], _FLOATS[kind])
        if kind == "BF16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        with np.errstate(over="ignore"):  # an overflow becomes inf, which _checked reports
            arrays[name] = values.astype(np.float32).reshape(tensor["shape"])
    # deserialize has checked the header: its length (8 bytes, little endian), then JSON.
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    text = header.get("__metadata__", {}).get(SPEC_KEY)
    if text is None:
        return arrays, None
    try:
        spec = DeployedSpec.from_json(text)
        if not isinstance(spec, NetworkSpec):
            raise DataError(f"the specification in the metadata ({SPEC_KEY}) has no architecture")
    except DataError as e:
        raise CheckpointError(f"{path}: {e}") from e
    return arrays, spec


def _read_torch(path: Path, head: bytes, key: str | None) -> dict[str, Any]:
    torch = _torch()
    if not head.startswith((b"PK\x03\x04", b"\x80")):
        raise CheckpointError(f"{path} is not a file that torch.save wrote; {_ADVICE}")
    _refuse_other_zips(path)
    try:
        with warnings.catch_warnings():
            # About old pickle protocols: either the file loads, or the error below says enough.
            warnings.simplefilter("ignore", UserWarning)
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        raise CheckpointError(
            f"{path} holds more than tensors and is refused, because loading it could run code "
            "(or it is corrupt); where you trust it, save its state_dict() alone with torch.save"
        ) from e
    except _READING_ERRORS as e:
        raise CheckpointError(
            f"{path} is truncated or corrupted ({type(e).__name__}); copy or download it again"
        ) from e
    state = _state_dict(content, key, path)
    # SWA's counter beside the weights.
    state = {k: v for k, v in state.items() if k != "n_averaged"}
    arrays = {}
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"{path}: {name!r} is a {type(value).__name__}, expected a tensor; {_ADVICE}"
            )
        if name.endswith("num_batches_tracked"):
            continue
        if not value.is_floating_point() or value.layout is not torch.strided:
            raise CheckpointError(f"{path}: {name} is {value.dtype}, expected a dense float tensor")
        arrays[name] = value.detach().to(torch.float32).numpy()
    return arrays


def _refuse_other_zips(path: Path) -> None:
    """Name zips that are no checkpoint themselves: TorchScript, and one that holds a checkpoint.

    Raises:
        CheckpointError: it is one.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(n.endswith("/constants.pkl") for n in names):
        raise CheckpointError(
            f"{path} is TorchScript, a program and not weights alone\n"
            "hint: save its weights: torch.save(torch.jit.load(FILE).state_dict(), 'weights.pth')"
        )
    inner = [n for n in names if n.lower().endswith(SUFFIXES) and not n.endswith("data.pkl")]
    if inner and not any(n.endswith("data.pkl") for n in names):
        raise CheckpointError(
            f"{path} is a zip that holds {inner[0]}\nhint: unzip it and give that file"
        )


def _state_dict(content: Any, key: str | None, path: Path) -> Mapping[str, Any]:
    """The weights in what a trainer saved.

    Raises:
        CheckpointError: there are none, or none under `key`.
    """
    sets = _weight_sets(content)
    if key is not None:
        if key not in sets:
            raise CheckpointError(
                f"{path} has no weights {key!r}; it has: {', '.join(sets) or 'none'}"
            )
        return sets[key]
    if not sets:
        what = type(content).__name__
        found = (
            f"a {what} with the keys {', '.join(map(str, content))[:120]}"
            if isinstance(content, Mapping) and content
            else f"a {what}"
        )
        raise CheckpointError(f"{path} holds {found}, expected a state dict; {_ADVICE}")
    order = {k: i for i, k in enumerate((*_AVERAGED, *_RAW))}
    chosen = min(sets, key=lambda k: order.get(k.partition(".")[0], -1 if k == "" else len(order)))
    if len(sets) > 1:
        others = " or ".join(f"--weights {k}" for k in sets if k != chosen)
        logger.warning(
            "%s holds several sets of weights: %s is taken; %s takes another", path, chosen, others
        )
    return sets[chosen]


def _weight_sets(content: Any, name: str = "", depth: int = 0) -> dict[str, Mapping[str, Any]]:
    """Mappings with tensors, by the dotted path of keys to them; ``""`` for the outermost.

    Only keys that trainers use for weights are followed: an optimizer has tensors as well.
    """
    if not isinstance(content, Mapping) or not content:
        return {}
    if any(str(k).endswith((".weight", ".bias")) for k in content):
        return {name: content}
    found: dict[str, Mapping[str, Any]] = {}
    if depth < 4:
        for k in (*_AVERAGED, *_RAW, "module"):
            inner = f"{name}.{k}" if name else k
            found |= _weight_sets(content.get(k), inner, depth + 1)
    return found


def _checked(arrays: Mapping[str, Any], spec: NetworkSpec, source: str) -> Weights:
    """float32 copies in network order, if they fit `spec` and are finite."""
    check_weights({k: v.shape for k, v in arrays.items()}, spec, source)
    with np.errstate(over="ignore"):
        weights = {
            k: np.ascontiguousarray(arrays[k], dtype=np.float32) for k in expected_shapes(spec)
        }
    bad = [k for k, v in weights.items() if not np.isfinite(v).all()]
    if bad:
        raise CheckpointError(
            f"{source}: {len(bad)} tensors hold NaN or infinite values ({', '.join(bad[:4])}"
            f"{', ...' if len(bad) > 4 else ''}): the training diverged or the file is corrupt"
        )
    return weights


def _torch() -> Any:
    try:
        import torch
    except ImportError as e:
        raise EnvironmentalError(
            f"torch checkpoints and modules need torch ({e})\n"
            "hint: install it with: pip install torch, or use a .safetensors file, which needs none"
        ) from e
    return torch
