"""Power meters behind one interface, and which one is used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import cast

from edgehp.benchmark.power.base import (
    Energy,
    Meter,
    MeterInfo,
    PowerRecorder,
    Rail,
    Sample,
    energy_over,
)
from edgehp.engines import PROCESSOR_ENGINES
from edgehp.errors import EnvironmentalError, MeasurementError, UsageError

__all__ = [
    "AUTO",
    "METERS",
    "Energy",
    "Meter",
    "MeterInfo",
    "PowerRecorder",
    "Rail",
    "Sample",
    "energy_over",
    "open_meter",
]

AUTO, NONE = "auto", "none"


def _opener(module: str, name: str) -> Callable[[], Meter]:
    """Opens the meter `name`, whose module is imported only then."""

    def opener() -> Meter:
        found = import_module(f"edgehp.benchmark.power.{module}")
        return cast(Meter, getattr(found, name)())

    return opener


# In the order in which they are tried. On a Jetson the sysfs reading comes before jtop: the same
# chips, with one process fewer between.
METERS: Mapping[str, Callable[[], Meter]] = MappingProxyType(
    {
        "ina3221": _opener("jetson", "Ina3221Meter"),
        "jtop": _opener("jetson", "JtopMeter"),
        "nvml": _opener("nvml", "NvmlMeter"),
        "rapl": _opener("rapl", "RaplMeter"),
    }
)


def open_meter(
    name: str, kind: str | None = None, meters: Mapping[str, Callable[[], Meter]] | None = None
) -> tuple[Meter | None, str | None]:
    """Open a meter.

    Args:
        name: a name of `METERS`, ``"auto"``, ``"none"``, ``"csv:FILE"`` or ``"command:COMMAND"``.
        kind: of the engine; for a processor engine, ``auto`` does not take the meter of a GPU.
        meters: other ones than `METERS`, for tests.

    Returns:
        The meter, or None and the reason why there is none.

    Raises:
        UsageError: no such meter.
        EnvironmentalError: the meter asked for by name does not work.
        DataError: the CSV file of an external meter cannot be used.
    """
    known = METERS if meters is None else meters
    word, _, rest = name.partition(":")
    if word == NONE:
        return None, "not measured, as asked for"
    if word in ("csv", "command") and rest:
        from edgehp.benchmark.power.text import CommandMeter, CsvMeter

        meter = CsvMeter(Path(rest)) if word == "csv" else CommandMeter(rest)
        return cast(Meter, meter), None
    if word in known and not rest:
        try:
            return known[word](), None
        except MeasurementError as e:
            raise EnvironmentalError(f"the power meter {word} does not work: {e}") from e
    if name != AUTO:
        raise UsageError(
            f"no power meter {name!r}; expected auto, none, {', '.join(known)}, csv:FILE or "
            "command:COMMAND"
        )
    reasons = []
    for word, opener in known.items():
        if word == "nvml" and kind in PROCESSOR_ENGINES:
            reasons.append("nvml: measures a GPU, and this engine runs on the processor")
            continue
        if word == "rapl" and kind in ("tensorrt", "tensorrt-rtx"):
            reasons.append("rapl: measures the processor, and this engine runs on the GPU")
            continue
        try:
            return opener(), None
        except (EnvironmentalError, MeasurementError) as e:
            reasons.append(f"{word}: {e}")
    return None, "no power meter works here: " + "; ".join(reasons)
