"""Power meters, one module a kind, and which one is used; what they share is in `base`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType

from edgehp.benchmark.power.base import Meter
from edgehp.benchmark.power.jetson import Ina3221Meter, JtopMeter
from edgehp.benchmark.power.nvml import NvmlMeter
from edgehp.benchmark.power.rapl import RaplMeter
from edgehp.benchmark.power.text import CommandMeter, CsvMeter
from edgehp.engines import PROCESSOR_ENGINES
from edgehp.errors import EnvironmentalError, MeasurementError, UsageError

# In the order in which they are tried. On a Jetson the sysfs reading comes before jtop: the same
# chips, with one process fewer between.
METERS: MappingProxyType[str, Callable[[], Meter]] = MappingProxyType(
    {"ina3221": Ina3221Meter, "jtop": JtopMeter, "nvml": NvmlMeter, "rapl": RaplMeter}
)


def open_meter(name: str, kind: str | None = None) -> tuple[Meter | None, str | None]:
    """Open a meter.

    Args:
        name: a name of `METERS`, ``"auto"``, ``"none"``, ``"csv:FILE"`` or ``"command:COMMAND"``.
        kind: of the engine; for a processor engine, ``auto`` does not take the meter of a GPU.

    Returns:
        The meter, or None and the reason why there is none.

    Raises:
        UsageError: no such meter.
        EnvironmentalError: the meter asked for by name does not work.
        DataError: the CSV file of an external meter cannot be used.
    """
    word, _, rest = name.partition(":")
    if word == "none":
        return None, "not measured, as asked for"
    if word == "csv" and rest:
        return CsvMeter(Path(rest)), None
    if word == "command" and rest:
        return CommandMeter(rest), None
    if name in METERS:
        try:
            return METERS[name](), None
        except MeasurementError as e:
            raise EnvironmentalError(f"the power meter {name} does not work: {e}") from e
    if name != "auto":
        raise UsageError(
            f"no power meter {name!r}; expected auto, none, {', '.join(METERS)}, csv:FILE or "
            "command:COMMAND"
        )
    reasons = []
    for word, opener in METERS.items():
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
