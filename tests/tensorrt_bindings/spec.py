"""Stand-ins for TensorRT objects that allow only what the real bindings of one version declare.

The bindings can be imported without TensorRT's libraries but nothing can be created with them. A
`Stand` knows the real class: an attribute that the class lacks is an AttributeError, a call is
checked against the signature in the real docstring, and what comes back is a `Stand` of the type
that the signature names. So the adapter's own code runs, branch by branch, against every version.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

_SIMPLE = {"bool": True, "int": 1, "str": "", "None": None, "float": 1.0, "tuple": ()}
_CPP_NAMES = {"IEngineInspector": "EngineInspector", "IParserError": "ParserError"}
_ACCEPTS = {
    bool: ("bool",),
    int: ("int", "SupportsInt"),
    float: ("float", "SupportsFloat"),
    str: ("str",),
    bytes: ("buffer", "Buffer"),
    tuple: ("Dims", "Sequence", "List", "list", "tuple"),
}


class Recorder:
    """What was called, and the answers given instead of the default ones."""

    def __init__(self, real: Any, answers: dict[str, Callable[..., Any]]) -> None:
        self.real = real
        self.answers = answers
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def answer(self, key: str, annotation: str, arguments: tuple[Any, ...]) -> Any:
        self.calls.append((key, arguments))
        if key in self.answers:
            return self.answers[key](*arguments)
        name = re.split(r"[.:]", annotation.strip().split("[")[0])[-1]
        # pybind11 knows no Python name yet where the class is bound after the method.
        name = _CPP_NAMES.get(name, name)
        if name in _SIMPLE:
            return _SIMPLE[name]
        if name == "IHostMemory":
            return b"bytes of " + key.encode()
        kind = getattr(self.real, name, None)
        if not isinstance(kind, type):
            raise TypeError(f"{key}: the stand-in does not know the answer {annotation!r}")
        if hasattr(kind, "__members__"):
            return next(iter(kind.__members__.values()))
        return Stand(self, kind)


class Stand:
    """An object of a class of the bindings."""

    def __init__(self, recorder: Recorder, kind: type, **values: Any) -> None:
        object.__setattr__(self, "_parts", (recorder, kind, values))

    def __getattr__(self, name: str) -> Any:
        recorder, kind, values = object.__getattribute__(self, "_parts")
        member = getattr(kind, name)  # AttributeError where this version has no such thing
        key = f"{kind.__name__}.{name}"
        if isinstance(member, property):
            if name in values:
                return values[name]
            return recorder.answer(key, _signatures(member.fget.__doc__ or "")[0][1], ())

        def call(*arguments: Any, **named: Any) -> Any:
            annotation = _check(key, member.__doc__ or "", arguments, named, method=True)
            if name in values:
                return values[name](*arguments)
            return recorder.answer(key, annotation, arguments)

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        recorder, kind, _ = object.__getattribute__(self, "_parts")
        member = getattr(kind, name)
        if not isinstance(member, property) or member.fset is None:
            raise AttributeError(f"{kind.__name__}.{name} cannot be set")
        recorder.calls.append((f"{kind.__name__}.{name} =", (value,)))


class SpecModule:
    """The module `tensorrt` as far as its bindings declare it."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._recorder.real, name)
        if name == "ILogger" or not isinstance(real, type) or hasattr(real, "__members__"):
            return real

        def construct(*arguments: Any, **named: Any) -> Stand:
            _check(name, real.__init__.__doc__ or "", arguments, named, method=True)
            return Stand(self._recorder, real)

        return construct


def _signatures(doc: str) -> list[tuple[list[str], str]]:
    """(parameters, return annotation) of each overload that a pybind11 docstring gives."""
    found = []
    for line in doc.strip().splitlines():
        match = re.match(r"^(?:\d+\. )?\w*\((?!\*args)(.*)\) -> (.+)$", line.strip())
        if match:
            found.append((_split(match.group(1)), match.group(2)))
    return found


def _split(text: str) -> list[str]:
    parts, depth, current = [], 0, ""
    for character in text:
        depth += (character in "[(<") - (character in "])>")
        if character == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += character
    return [*parts, current.strip()] if current.strip() else parts


def _check(
    key: str, doc: str, arguments: tuple[Any, ...], named: dict[str, Any], *, method: bool
) -> str:
    signatures = _signatures(doc)
    if not signatures:
        raise TypeError(f"{key}: no signature in the bindings' docstring: {doc[:200]!r}")
    reasons = []
    for parameters, annotation in signatures:
        reason = _mismatch(parameters[1:] if method else parameters, arguments, named)
        if not reason:
            return annotation
        reasons.append(reason)
    raise TypeError(f"{key}{arguments}: {'; '.join(reasons)}")


def _mismatch(
    parameters: list[str], arguments: tuple[Any, ...], named: dict[str, Any]
) -> str | None:
    names = [p.split(":")[0].split("=")[0].strip() for p in parameters]
    if len(arguments) > len(parameters):
        return f"takes {len(parameters)} arguments"
    if unknown := set(named) - set(names[len(arguments) :]):
        return f"has no parameter {sorted(unknown)}"
    rest = [p for p, n in zip(parameters, names, strict=True) if n not in named][len(arguments) :]
    if missing := [p for p in rest if "=" not in p]:
        return f"lacks {missing}"
    for parameter, argument in zip(parameters, arguments, strict=False):
        annotation = parameter.split(":", 1)[-1]
        wanted = _ACCEPTS.get(type(argument)) or _class_names(argument)
        if not any(re.search(rf"\b{w}\b", annotation) for w in wanted):
            return f"{argument!r} does not fit {parameter!r}"
    return None


def _class_names(argument: Any) -> tuple[str, ...]:
    if isinstance(argument, Stand):
        return (object.__getattribute__(argument, "_parts")[1].__name__,)
    return tuple(c.__name__ for c in type(argument).__mro__)
