"""The precision audit: what each layer of a built engine really computes in.

Asking for INT8 is no proof of INT8. Each engine lists its layers here, and `require` compares the
convolutions that run in the asked precision with those that the graph quantises.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Annotated

import msgspec

from edgehp.errors import CompatibilityError
from edgehp.files import Record

INT8 = "int8"
# Common spellings -> ours. Unsigned and signed 8 bits run at the same speed: both are INT8.
_NAMES = {
    "i8": INT8,
    "u8": INT8,
    "int8": INT8,
    "uint8": INT8,
    "f16": "fp16",
    "half": "fp16",
    "fp16": "fp16",
    "float16": "fp16",
    "bf16": "bf16",
    "bfloat16": "bf16",
    "f32": "fp32",
    "float": "fp32",
    "fp32": "fp32",
    "float32": "fp32",
    "fp8": "fp8",
    "f8e4m3": "fp8",
}


class LayerPrecision(Record, frozen=True):
    """One layer of an engine.

    Attributes:
        layer: its name.
        kind: what it is; convolutions are always ``"Convolution"``.
        precision: ``"int8"``, ``"fp16"``, ``"bf16"``, ``"fp32"``, ``"fp8"``, or the runtime's own
            word for anything else.
        detail: the kernel or tactic, if the runtime tells; before it the device, for a DLA.
    """

    layer: Annotated[str, msgspec.Meta(max_length=4000)]
    kind: Annotated[str, msgspec.Meta(max_length=500)]
    precision: Annotated[str, msgspec.Meta(max_length=500)]
    detail: Annotated[str, msgspec.Meta(max_length=4000)] = ""

    @classmethod
    def of(cls, layer: str, kind: str, precision: str, detail: str = "") -> LayerPrecision:
        """A row with the runtime's word for the precision translated into ours."""
        return cls(layer, kind, _NAMES.get(precision.lower(), precision.lower()), detail)


@dataclass(frozen=True)
class PrecisionAudit:
    """The layers of an engine.

    Attributes:
        source: where the rows were read: ``"compiled model"``, ``"engine inspector"`` or
            ``"parsed network"`` (before the build: what was asked of the builder, layer by layer).
        rows: one per layer that computes; constants and inputs left out.
        opaque: why the engine could not be looked into, or empty.
    """

    source: str
    rows: tuple[LayerPrecision, ...]
    opaque: str = ""

    @property
    def convolutions(self) -> dict[str, int]:
        """How many convolutions run in each precision."""
        return dict(sorted(Counter(r.precision for r in self._convolutions()).items()))

    def _convolutions(self) -> list[LayerPrecision]:
        return [r for r in self.rows if r.kind == "Convolution"]

    def share(self, precision: str) -> float:
        """The share of convolutions that run in `precision`, 0..1; 0 where there are none."""
        total = len(self._convolutions())
        return self.convolutions.get(precision, 0) / total if total else 0.0

    @property
    def reached(self) -> str:
        """One word for the convolutions: a precision, ``"mixed"`` or ``"unknown"``.

        Quantised networks keep sensitive layers in floating point by design, so the engine is
        called ``"int8"`` when at least half of its convolutions are.
        """
        counts = self.convolutions
        if len(counts) <= 1:
            return next(iter(counts), "unknown")
        for precision in (INT8, "fp8"):
            if self.share(precision) >= 0.5:
                return precision
        return "mixed"

    def completed_by(self, network: PrecisionAudit) -> PrecisionAudit:
        """This audit of an engine, with the convolutions it does not show from `network`.

        Builders fuse whole blocks into one opaque layer; what such a layer contains is then only
        known from the parsed network. Rows from there say so in their detail.
        """
        shown = [r.layer for r in self._convolutions()]
        hidden = [
            msgspec.structs.replace(r, detail="inside a fused layer: type from the parsed network")
            for r in network._convolutions()
            if not any(r.layer in _parts(name) for name in shown)
        ]
        if not hidden:
            return self
        note = f"{len(hidden)} convolutions are inside fused layers"
        return replace(self, rows=(*self.rows, *hidden), opaque=self.opaque or note)

    def placed(self, core: int, on_gpu: Collection[str]) -> PrecisionAudit:
        """This audit of an engine for a DLA, with the device of each layer before its detail.

        Args:
            core: number of the DLA core.
            on_gpu: names of the layers that the DLA does not have.
        """
        rows = []
        for row in self.rows:
            device = "GPU" if _parts(row.layer) & set(on_gpu) else f"DLA core {core}"
            detail = f"{device}: {row.detail}" if row.detail else device
            rows.append(msgspec.structs.replace(row, detail=detail))
        return replace(self, rows=tuple(rows))

    def require(self, precision: str, at_least: int, what: str) -> None:
        """Fail unless `at_least` convolutions run in `precision`, and for floats all of them.

        Args:
            precision: ``"int8"``, ``"fp16"`` or ``"fp32"``.
            at_least: for INT8, the convolutions that the graph quantises.
            what: the engine, for the message.

        Raises:
            CompatibilityError: less was reached than asked for.
        """
        total = len(self._convolutions())
        wanted = at_least if precision == INT8 else total
        got = self.convolutions.get(precision, 0)
        if total and got >= max(wanted, 1):
            return
        counts = ", ".join(f"{n} in {p}" for p, n in self.convolutions.items()) or "none found"
        slow = [r.layer for r in self._convolutions() if r.precision != precision]
        names = f" (first: {', '.join(slow[:3])})" if slow else ""
        remedy = (
            "give a graph whose own types are that: they decide"
            if self.source == "parsed network"
            else "choose a precision this hardware has, or look at the lint of the quantised graph"
        )
        raise CompatibilityError(
            f"{what}: {precision} was asked for and {wanted or 'some'} convolutions should run in "
            f"it, but the {self.source} shows {counts}{names}; {remedy}"
        )


def _parts(name: str) -> set[str]:
    """The layers in the name of a fused one.

    TensorRT joins names by " + " (fused), by " || " (run side by side) and in ForeignNode[a...b],
    and puts "[Name]" tokens such as "[HostToDeviceCopy 0]" between them.
    """
    return {part.strip() for part in re.split(r"\s\+\s|\s*\|\|\s*|\.\.\.|[\[\]]", name)}
