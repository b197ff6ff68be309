"""Accuracy-controlled precision: the fastest assignment of layers that keeps the accuracy.

Layers in INT8 save time and cost accuracy. Starting from all of them in INT8, layers go back to
floating point in order of error removed per millisecond given up, until the drop fits; then every
layer is tried in INT8 again, the most expensive first, because errors cancel.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from edgehp.errors import AccuracyError, UsageError
from edgehp.quantization.sensitivity import Sensitivity

__all__ = ["NotReachedError", "SearchResult", "search"]

_log = logging.getLogger(__name__)
# A layer that INT8 does not speed up is given back first; a tiny price keeps the ratio finite.
_SMALLEST_COST = 1e-6
# Layers named in a message.
_NAMED = 8
# Shorter prefixes that are tried where the longest does not fit.
_SHORTER = 8


@dataclass(frozen=True)
class SearchResult:
    """An assignment.

    Attributes:
        keep_float: layers that stay in floating point.
        drop: what was measured for it, in the unit of `max_drop`.
        latency: of the latency model, milliseconds.
        fastest: latency with every layer in INT8.
        evaluations: how many graphs were measured.
    """

    keep_float: tuple[str, ...]
    drop: float
    latency: float
    fastest: float
    evaluations: int

    @property
    def cost(self) -> float:
        """Milliseconds that the floating-point layers cost."""
        return self.latency - self.fastest


class NotReachedError(AccuracyError):
    """No assignment keeps the drop; carries the best one found."""

    def __init__(self, message: str, best: SearchResult) -> None:
        super().__init__(message)
        self.best = best


def search(
    evaluate: Callable[[frozenset[str]], float],
    sensitivity: Sensitivity,
    integer_ms: Mapping[str, float],
    float_ms: Mapping[str, float],
    *,
    max_drop: float,
    never_float: Sequence[str] = (),
    max_evaluations: int = 60,
) -> SearchResult:
    """Find the fastest assignment whose drop is at most `max_drop`.

    Args:
        evaluate: layers kept in floating point -> drop (degrees, or any other measure).
        sensitivity: of the same layers.
        integer_ms: layer -> milliseconds in INT8 on the target.
        float_ms: layer -> milliseconds in the target's floating point.
        max_drop: the budget, same unit as `evaluate`.
        never_float: layers that must be INT8 whatever it costs.
        max_evaluations: bound on calls of `evaluate`.

    Raises:
        NotReachedError: every permitted layer in floating point and still over budget, or the
            budget of evaluations is spent; the error carries the best assignment found.
        UsageError: the latency model lacks a layer, or an argument makes no sense.
    """
    layers = [s.layer for s in sensitivity.layers]
    if missing := [n for n in layers if n not in integer_ms or n not in float_ms]:
        raise UsageError(f"the latency model has no figure for {', '.join(missing[:4])}")
    if not max_drop >= 0 or max_evaluations < 2:
        raise UsageError(f"max_drop {max_drop} and max_evaluations {max_evaluations} make no sense")
    state = _State(evaluate, {n: float_ms[n] - integer_ms[n] for n in layers}, max_evaluations)
    state.base = sum(integer_ms[n] for n in layers)

    if state.drop(frozenset()) <= max_drop:
        return state.result(frozenset())
    order = [n for n in _order(sensitivity, state.gains) if n not in never_float]
    kept = _shortest_prefix(state, order, max_drop)
    if kept is None:
        best = state.best()
        some = ", ".join(best.keep_float[:_NAMED])
        more = len(best.keep_float) - _NAMED
        names = f" ({some}{f' and {more} more' if more > 0 else ''})" if some else ""
        raise NotReachedError(
            f"no mixed assignment keeps the drop within {max_drop:g}: the best found has "
            f"{best.drop:.4f} with {len(best.keep_float)} of {len(layers)} layers in floating "
            f"point{names}, predicted to cost {best.cost:+.3f} ms, of {best.evaluations} tried; "
            "allow a larger drop, calibrate on crops nearer to the task, or train with "
            "quantisation",
            best,
        )
    return state.result(_give_back(state, kept, max_drop))


class _State:
    def __init__(
        self, evaluate: Callable[[frozenset[str]], float], gains: dict[str, float], budget: int
    ) -> None:
        self._evaluate = evaluate
        self._budget = budget
        self._seen: dict[frozenset[str], float] = {}
        self.gains = gains
        self.base = 0.0

    @property
    def exhausted(self) -> bool:
        return len(self._seen) >= self._budget

    def drop(self, kept: frozenset[str]) -> float:
        if kept not in self._seen:
            self._seen[kept] = self._evaluate(kept)
            _log.info("%d layers in floating point: drop %.4f", len(kept), self._seen[kept])
        return self._seen[kept]

    def latency(self, kept: frozenset[str]) -> float:
        return self.base + sum(self.gains[n] for n in kept)

    def result(self, kept: frozenset[str]) -> SearchResult:
        names = tuple(n for n in self.gains if n in kept)
        drop = self._seen[kept]
        return SearchResult(names, drop, self.latency(kept), self.base, len(self._seen))

    def best(self) -> SearchResult:
        return self.result(min(self._seen, key=lambda k: (self._seen[k], self.latency(k))))


def _order(sensitivity: Sensitivity, gains: Mapping[str, float]) -> list[str]:
    """Most error removed per millisecond given up first."""

    def worth(i: int) -> float:
        s = sensitivity.layers[i]
        # Errors cancel: a layer whose leave-one-out gain is noise still shows its own error.
        harm = max(s.gain, 0.0) + 0.25 * s.alone.angles
        return harm / max(gains[s.layer], _SMALLEST_COST)

    indices = sorted(range(len(sensitivity.layers)), key=lambda i: -worth(i))
    return [sensitivity.layers[i].layer for i in indices]


def _shortest_prefix(state: _State, order: Sequence[str], max_drop: float) -> frozenset[str] | None:
    """The shortest prefix of `order` that fits, found by bisection; None if even all do not."""
    if state.drop(frozenset(order)) > max_drop:
        # Not monotonous: a part may fit where all do not. Evenly spaced: trying each would take
        # as long as all the rest, mostly to find nothing.
        step = max(1, len(order) // _SHORTER)
        for count in range(len(order) - 1, 0, -step):
            if state.exhausted:
                return None
            if state.drop(frozenset(order[:count])) <= max_drop:
                return frozenset(order[:count])
        return None
    low, high = 0, len(order)  # low does not fit, high does
    while high - low > 1:
        middle = (low + high) // 2
        if state.drop(frozenset(order[:middle])) <= max_drop:
            high = middle
        else:
            low = middle
    return frozenset(order[:high])


def _give_back(state: _State, kept: frozenset[str], max_drop: float) -> frozenset[str]:
    """Return layers to INT8, the most expensive first, as long as the drop fits."""
    for name in sorted(kept, key=lambda n: (-state.gains[n], n)):
        if state.exhausted:
            break
        if state.gains[name] > 0 and state.drop(kept - {name}) <= max_drop:
            kept -= {name}
    return kept
