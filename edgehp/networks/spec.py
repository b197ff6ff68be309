"""What a network is, in plain data: architecture, bins, pose convention and preprocessing.

The specification travels with the weights (in the metadata of the safetensors file), so that the
same file gives the torch module, the ONNX graph and the hash in the manifest.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import numpy.typing as npt
from msgspec.structs import replace

from edgehp.crop import Preprocessing
from edgehp.errors import DataError, UsageError
from edgehp.files import Record, json_digest, parse_json, plain, to_record
from edgehp.pose import CONVENTIONS

# In the metadata of weights and graphs.
SPEC_KEY = "edgehp.spec"

# ResNet depth -> (blocks per stage, bottleneck blocks?), He et al. 2015, table 1.
RESNET_STAGES: dict[int, tuple[tuple[int, int, int, int], bool]] = {
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
    152: ((3, 8, 36, 3), True),
}
ARCHITECTURES = ("kd-resnet", "ehpnet")


class Bins(Record, frozen=True):
    """Evenly spaced bin values of a regression-via-classification (RvC) head, in degrees.

    `first` and `last` are the values that the softmax expectation is taken over: bin centres for
    KD-ResNet, left edges for EHPNet.
    """

    count: int
    first: float
    last: float

    def __post_init__(self) -> None:
        """Refuse bins that no expectation can be taken over."""
        if not 2 <= self.count <= 4096 or not self.first < self.last:
            raise UsageError(f"bins {self.count} from {self.first} to {self.last} make no sense")

    @property
    def values(self) -> npt.NDArray[np.float64]:
        """The bin values [count] in degrees."""
        return np.linspace(self.first, self.last, self.count)


class DeployedSpec(Record, frozen=True, kw_only=True):
    """What is known of any deployed network, one of others too.

    Attributes:
        name: what the user calls it; names artifacts.
        bins: of each of the three heads; None where there are none, and so no spread.
        preprocessing: from photo and box to the input tensor.
        licence: of the weights, for the user's eyes.
    """

    name: str
    bins: Bins | None
    preprocessing: Preprocessing
    licence: str = ""

    def to_dict(self) -> dict[str, Any]:
        """A dictionary for JSON."""
        values: dict[str, Any] = plain(self)
        return values

    def to_json(self) -> str:
        """As `SPEC_KEY` holds it; the same specification gives the same text."""
        return json.dumps(self.to_dict(), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> DeployedSpec:
        """The inverse of `to_json`, of a `NetworkSpec` too.

        Raises:
            DataError: no JSON object, a key is missing or unknown, or a value makes no sense.
        """
        where = f"the specification in the metadata ({SPEC_KEY})"
        values = parse_json(text.encode(), dict[str, Any], where)
        try:
            return to_record(values, NetworkSpec if "architecture" in values else cls, where)
        except UsageError as e:
            raise DataError(f"{where}: {e}") from e

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the canonical JSON of this specification."""
        return json_digest(self.to_dict())


class NetworkSpec(DeployedSpec, frozen=True, kw_only=True):
    """A head-pose network that can be built from its weights, in plain data.

    Attributes:
        architecture: ``"kd-resnet"`` or ``"ehpnet"``.
        depth: ResNet depth: 18, 34, 50, 101 or 152.
        bins: of each of the three heads.
        convention: pose convention of the raw heads (`edgehp.pose.CONVENTIONS`); the deployed
            graph converts to ``"aflw2000"``.
    """

    architecture: str
    depth: int
    bins: Bins
    convention: str

    def __post_init__(self) -> None:
        """Refuse what no network here can be built from."""
        if self.architecture not in ARCHITECTURES:
            raise UsageError(
                f"unknown architecture {self.architecture!r}; known: {', '.join(ARCHITECTURES)}"
            )
        if self.depth not in RESNET_STAGES:
            raise UsageError(f"ResNet depth {self.depth} is none of {sorted(RESNET_STAGES)}")
        if self.architecture == "ehpnet" and self.depth != 18:
            raise UsageError("EHPNet is a ResNet18")
        if self.convention not in CONVENTIONS or CONVENTIONS[self.convention].radians:
            raise UsageError(f"network outputs cannot have the convention {self.convention!r}")

    def with_size(self, size: int) -> NetworkSpec:
        """The same network for another input size in pixels."""
        return replace(self, preprocessing=replace(self.preprocessing, size=size))


# Sheka & Samun, arXiv 2108.09183: 198 bins of one degree, softmax expectation over the centres,
# the published box as it is, stretched to 224x224, ImageNet normalisation.
KD_RESNET = NetworkSpec(
    name="kd-resnet18",
    architecture="kd-resnet",
    depth=18,
    bins=Bins(198, -98.5, 98.5),
    convention="kd-resnet",
    preprocessing=Preprocessing(size=224, box_rule="stretch"),
)
# Thai et al., arXiv 2210.13705: 62 bins of three degrees, expectation over the left edges
# (sum p * 3 i - 93), 112x112 BGR, (x - 127.5) / 128.
EHPNET = NetworkSpec(
    name="ehpnet",
    architecture="ehpnet",
    depth=18,
    bins=Bins(62, -93.0, 90.0),
    convention="aflw2000",
    preprocessing=Preprocessing(
        size=112, colour="BGR", mean=(127.5,) * 3, std=(128.0,) * 3, box_rule="square"
    ),
)
