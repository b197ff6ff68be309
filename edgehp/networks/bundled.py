"""The networks of the distribution ``edgehp-networks``, and what a user may name a network by.

Their weights have a licence of their own and are installed apart: ``networks/`` in the sources.
"""

from __future__ import annotations

import difflib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgehp._installed import install_networks
from edgehp.errors import EnvironmentalError, UsageError
from edgehp.files import PACKAGE, json_digest, sha256_file
from edgehp.networks.checkpoint import SUFFIXES, load_weights
from edgehp.networks.described import deployed_graph, described_spec
from edgehp.networks.description import Description, load_description
from edgehp.networks.graph import build_graph, load_graph
from edgehp.networks.layout import Weights
from edgehp.networks.spec import DeployedSpec, NetworkSpec

if TYPE_CHECKING:
    import onnx

BUNDLED = ("kd-resnet18", "kd-resnet18-112")
DEFAULT_NETWORK = "kd-resnet18-112"
_MODULE = "edgehp_networks"


@dataclass(frozen=True)
class Network:
    """A network that a user named.

    Attributes:
        source: what the user wrote.
        path: the file it was read from.
        spec: the network, with the licence to show.
        weights: float32 arrays by canonical name; None where the file is a graph.
        description: of a network of others; None where it is one of edgehp's own.
    """

    source: str
    path: Path
    spec: DeployedSpec
    weights: Weights | None
    description: Description | None = None

    def graph(self) -> onnx.ModelProto:
        """The deployed graph: built from the weights, wrapped by a description, or read.

        Raises:
            CheckpointError, UsageError, EnvironmentalError: as `build_graph`, `deployed_graph` and
                `load_graph`.
        """
        if self.weights is not None and isinstance(self.spec, NetworkSpec):
            return build_graph(self.weights, self.spec)
        if self.description is not None:
            return deployed_graph(self.description)[0]
        return load_graph(self.path)[0]

    @property
    def is_one_file(self) -> bool:
        """Whether the file is the deployed graph itself."""
        return self.weights is None and self.description is None

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the file that holds the weights, or of those of all files."""
        if self.description is None:
            return sha256_file(self.path)
        digests = [sha256_file(path) for path in self.description.paths]
        return digests[0] if len(digests) == 1 else json_digest(digests)


def bundled_path(name: str) -> Path:
    """Where the weights of a bundled network are.

    Raises:
        UsageError: no network of this name is bundled.
        EnvironmentalError: it is not installed.
    """
    if name not in BUNDLED:
        raise UsageError(f"no bundled network is called {name!r}{_near(name)}")
    folder = _folder()
    path = folder / f"{name}.safetensors" if folder is not None else None
    if path is None or not path.is_file():
        raise EnvironmentalError(
            f"the network {name!r} is not installed: its weights are a package of their own, for "
            f"research, non-commercial use only\nhint: {install_networks()}, or name a network of "
            "your own with --network FILE"
        )
    return path


def _folder() -> Path | None:
    """Where the weights are; those of a checkout go before installed ones, as its code does."""
    checkout = PACKAGE.parent / "networks" / _MODULE
    if checkout.is_dir():
        return checkout
    found = importlib.util.find_spec(_MODULE)
    return None if found is None or found.origin is None else Path(found.origin).parent


def resolve_network(text: str, describe: Path | None = None) -> Network:
    """Find the network that a user named.

    Args:
        text: a bundled name, the path of a checkpoint (``.safetensors``, ``.pth``, ...), of a
            deployed graph (``.onnx``), or of a description (``.toml``) of any other network.
            ``FILE#KEY`` takes the weights under a key of a checkpoint that holds several sets, e.g.
            ``run.pth#state_dict_ema``.
        describe: description of the network `text`, which is its file or the folder of its files.

    Raises:
        UsageError: neither a bundled name nor a file of a known kind.
        CheckpointError: the file is missing, damaged, or not such a network.
        EnvironmentalError: a package that reads it, or a bundled file, is missing.
    """
    if describe is not None:
        return _described(text, describe, Path(text))
    if text in BUNDLED:
        path = bundled_path(text)
        weights, spec = load_weights(path)
        return Network(text, path, spec, weights)
    path = Path(text)
    key = None
    if not path.exists() and "#" in path.name:
        file, _, key = text.rpartition("#")
        path = Path(file)
    suffix = path.suffix.lower()
    if suffix in SUFFIXES:
        weights, spec = load_weights(path, key=key)
        return Network(text, path, spec, weights)
    if suffix == ".toml":
        return _described(text, path, None)
    if suffix == ".onnx":
        return Network(text, path, load_graph(path)[1], None)
    raise UsageError(
        f"{text!r} is neither a bundled network nor a file that ends with "
        f"{', '.join(SUFFIXES)}, .onnx or .toml{_near(text)}"
    )


def _described(text: str, describe: Path, network: Path | None) -> Network:
    description = load_description(describe, network)
    if description.input.deployed:
        path = description.paths[0]
        return Network(text, path, load_graph(path)[1], None)
    spec = described_spec(description)
    return Network(text, description.paths[0], spec, None, description)


def _near(name: str) -> str:
    known = f" (bundled: {', '.join(BUNDLED)})"
    close = difflib.get_close_matches(name, BUNDLED, n=1)
    return f"; did you mean {close[0]!r}?{known}" if close else known
