"""A lint that knows what TensorRT, OpenVINO and onnxruntime do with a Q/DQ graph.

Its rules are data (`edgehp.quantization.lint_rules.RULES`). It runs before every build.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgehp.errors import UsageError
from edgehp.quantization.graphview import GraphView
from edgehp.quantization.lint_checks import Context
from edgehp.quantization.lint_rules import EXTERNAL, RULES, Rule
from edgehp.quantization.placement import FLAVOURS

if TYPE_CHECKING:
    import onnx

__all__ = ["RULES", "Finding", "Rule", "lint"]


@dataclass(frozen=True)
class Finding:
    """One place where a graph breaks a rule."""

    rule: str
    node: str
    message: str
    remedy: str


def lint(
    model: onnx.ModelProto,
    flavour: str,
    *,
    keep_float: Collection[str] = (),
    head: bool | None = None,
) -> tuple[Finding, ...]:
    """Check a Q/DQ graph against the rules of its flavour.

    Args:
        model: the Q/DQ graph.
        flavour: ``"tensorrt"`` or ``"cpu"``.
        keep_float: nodes that are meant to stay in floating point.
        head: whether the Gemm nodes are meant to be integers; None: in ``"cpu"`` only.

    Raises:
        UsageError: unknown flavour.
    """
    if flavour not in FLAVOURS:
        raise UsageError(f"unknown Q/DQ flavour {flavour!r}; known: {', '.join(FLAVOURS)}")
    external = [
        Finding(EXTERNAL.id, t.name, f"{t.name}: {EXTERNAL.what}", EXTERNAL.remedy)
        for t in model.graph.initializer
        if t.data_location == t.EXTERNAL
    ]
    if external:  # the values that the other rules look at are not here
        return tuple(external)
    context = Context(
        GraphView(model), frozenset(keep_float), flavour == "cpu" if head is None else head
    )
    return tuple(
        _finding(rule, node, detail)
        for rule in RULES
        if flavour in rule.flavours
        for node, detail in rule.check(context)
    )


def _finding(rule: Rule, node: str, detail: str) -> Finding:
    message = f"{node}: {rule.what}" + (f" ({detail})" if detail else "")
    return Finding(rule.id, node, message, rule.remedy)
