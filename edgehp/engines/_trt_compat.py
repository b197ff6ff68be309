"""What differs between TensorRT 8.6, 10.x, 11.x and TensorRT for RTX, in one table.

Names, never numbers: the integers behind the enumerations shift between major versions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgehp.errors import CompatibilityError, EnvironmentalError

__all__ = ["RTX", "Dialect", "bit", "dialect_of", "version_of"]


@dataclass(frozen=True)
class Dialect:
    """How one line of TensorRT is spoken to.

    Attributes:
        network_flags: names in `NetworkDefinitionCreationFlag`.
        builder_flags: precision asked -> names in `BuilderFlag`. Where the network is strongly
            typed there are none: the graph's own types decide.
        strongly_typed: whether the graph's own types decide.
    """

    network_flags: tuple[str, ...]
    strongly_typed: bool
    builder_flags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


_HALF = ("FP16", "OBEY_PRECISION_CONSTRAINTS")
_BY_MAJOR = {
    # 8.6 is weakly typed: the flags allow what the graph asks for, the constraints keep the
    # decoding in FP32, and Q/DQ nodes decide which layers are INT8.
    8: Dialect(
        network_flags=("EXPLICIT_BATCH",),
        strongly_typed=False,
        builder_flags={"fp32": (), "fp16": _HALF, "int8": ("INT8", *_HALF)},
    ),
    10: Dialect(network_flags=("STRONGLY_TYPED",), strongly_typed=True),
    # Accepted and ignored by 11: every network is strongly typed.
    11: Dialect(network_flags=("STRONGLY_TYPED",), strongly_typed=True),
}
RTX = Dialect(network_flags=("STRONGLY_TYPED",), strongly_typed=True)


def version_of(text: str) -> tuple[int, ...]:
    """The leading numbers of a version such as ``"10.3.0.post1"``.

    Raises:
        EnvironmentalError: it begins with no number.
    """
    found = re.match(r"\d+(?:\.\d+)*", text)
    if not found:
        raise EnvironmentalError(f"TensorRT calls its version {text!r}; install it again")
    return tuple(int(part) for part in found.group().split("."))


def dialect_of(version: str) -> Dialect:
    """The dialect of a TensorRT (not RTX) version.

    Raises:
        CompatibilityError: no adapter for it exists here.
    """
    numbers = version_of(version)
    dialect = _BY_MAJOR.get(numbers[0])
    if dialect is None or numbers[:2] < (8, 6):
        raise CompatibilityError(
            f"TensorRT {version} found; edgehp knows 8.6, 10.x and 11.x: install one of those "
            "(JetPack 6 or later on a Jetson)"
        )
    return dialect


def bit(enumeration: Any, name: str) -> int:
    """The bit mask of an enumeration's value, as `create_network` takes it.

    Raises:
        EnvironmentalError: this TensorRT has no such value.
    """
    value = getattr(enumeration, name, None)
    if value is None:
        kind = getattr(enumeration, "__name__", "enumeration")
        raise EnvironmentalError(
            f"this TensorRT has no {kind}.{name}, which its version should have; install it again"
        )
    return 1 << int(value)
