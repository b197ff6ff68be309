"""The power rails of Jetson boards: INA3221 monitors in sysfs, and the service of jetson-stats.

INA3221: ``/sys/bus/i2c/devices/*/hwmon/hwmon*/in{n}_label``, ``in{n}_input`` (mV),
``curr{n}_input`` (mA): Linux kernel, Documentation/hwmon/ina3221.rst. Channels 1 to 3 are inputs; a
channel called ``NC`` is not connected, and channel 7 is a sum of shunt voltages, no rail. Thor's
kit has an INA238 too (ina238.rst), without labels, at its carrier's input, which is called ``VIN``.

jetson-stats (jtop) is AGPL-3.0 and the user's own choice to install; nothing of it is here. Its
``avg`` is a moving figure, so only instantaneous readings are used.

Rails: NVIDIA Jetson Linux Developer Guide, "Jetson Orin Series: Power and Thermal", tables of
INA3221 channels.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from time import perf_counter
from typing import Any

from edgehp._installed import install_extra
from edgehp.benchmark.power.base import POWER, Meter, MeterInfo, Sample
from edgehp.device import SYSTEM_ROOT, read_integer, read_text
from edgehp.errors import EnvironmentalError, MeasurementError

# The input of the whole module: the other rails are behind it and must not be added to it.
_VIN = "VIN"
_INPUTS = ("VDD_IN", "POM_5V_IN", _VIN)
# Of AGX modules, whose rails are disjoint but for the one behind the last of these.
_AGX_SUM = ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0")
# What jetson-stats calls its own sum.
_JTOP_SUM = "tot"
_MEANING = {
    "VDD_IN": "the whole module",
    "POM_5V_IN": "the whole module",
    "VIN": "the whole board, at the input of its carrier",
    "VDD_CPU_GPU_CV": "CPU, GPU, DLA and PVA",
    "VDD_SOC": "memory controller, codecs and the rest of the chip",
    "VDD_GPU_SOC": "GPU and the rest of the chip",
    "VDD_CPU_CV": "CPU, DLA and PVA",
    "VDD_GPU": "GPU",
    "VDD_CPU_SOC_MSS": "CPU, memory controller and the rest of the chip",
    "VIN_SYS_5V0": "the 5 V system supply: memory, storage and what hangs on the carrier board",
    "tot": "all rails as jetson-stats adds them up; some may be behind others",
    "VDDQ_VDD2_1V8AO": "memory and always-on parts, behind VIN_SYS_5V0",
}


def rails_of(meter: str, names: Iterable[str], period_s: float) -> MeterInfo:
    """What a meter of these rails sees, and which of them make up the total.

    A measured input of the whole module is the total. AGX modules have none: there it is the sum
    that NVIDIA documents, of rails that are disjoint (``VDDQ_VDD2_1V8AO`` is behind
    ``VIN_SYS_5V0`` and not added).
    """
    rails = {name: _MEANING.get(name, "not documented here") for name in names}
    total: tuple[str, ...] = ()
    if inputs := [name for name in _INPUTS if name in rails]:
        total = (inputs[0],)
    elif rails.keys() >= set(_AGX_SUM):
        total = _AGX_SUM
    elif _JTOP_SUM in rails:
        total = (_JTOP_SUM,)
    listed = "; ".join(f"{n}: {rails[n]}" for n in total or rails)
    if total == _AGX_SUM:
        includes = (
            f"{' + '.join(_AGX_SUM)}: the sum that NVIDIA documents for AGX modules, which measure "
            "no input of the whole module; losses before these rails are not in it"
        )
    elif total:
        includes = listed
    else:
        includes = f"no total: this board measures no input of the whole module, only {listed}"
    return MeterInfo(meter, POWER, rails, total, includes, period_s)


_CHANNELS = (1, 2, 3)
# The chip averages over some milliseconds; reading more often only loads the bus.
_PERIOD_S = 0.1


class Ina3221Meter(Meter):
    """All connected rails of all INA3221 of a board, and its INA238."""

    def __init__(self, root: Path = SYSTEM_ROOT) -> None:
        """Find the rails.

        Raises:
            EnvironmentalError: there are none, or they may not be read.
        """
        self._channels = _channels(root)
        if not self._channels:
            raise EnvironmentalError("no INA3221 power monitor with a connected rail in sysfs")
        self.info = rails_of("ina3221", self._channels, _PERIOD_S)
        self.values()

    def values(self) -> dict[str, float]:
        """Watts of every rail that answers."""
        watts = {}
        for rail, files in self._channels.items():
            volts, amperes = map(read_integer, files)
            if volts is not None and amperes is not None:
                watts[rail] = volts * amperes * 1e-6
        if not watts:
            raise MeasurementError("the INA3221 power monitors no longer answer")
        return watts


def _channels(root: Path) -> dict[str, tuple[Path, Path]]:
    """Rail -> the files of its millivolts and milliamperes."""
    found: dict[str, tuple[Path, Path]] = {}
    for device in sorted((root / "sys/bus/i2c/devices").glob("*")):
        chip = (read_text(device / "name", 64) or "").strip()
        for monitor in sorted(device.glob("hwmon/hwmon*")):
            if chip == "ina238":
                found[_VIN] = monitor / "in1_input", monitor / "curr1_input"
            for n in _CHANNELS if chip == "ina3221" else ():
                label = (read_text(monitor / f"in{n}_label", 64) or "").strip()
                if not label or label.upper() == "NC":
                    continue
                name = label if label not in found else f"{label} ({device.name})"
                found[name] = monitor / f"in{n}_input", monitor / f"curr{n}_input"
    return found


_JTOP_PERIOD_S = 0.2


class JtopMeter(Meter):
    """The rails that jtop's service publishes, in milliwatts there, in watts here."""

    def __init__(self, module: Any = None) -> None:
        """Connect to the service.

        Args:
            module: stands for the package ``jtop``; imported when omitted.

        Raises:
            EnvironmentalError: the package or its service is missing.
        """
        try:
            self._package = import_module("jtop") if module is None else module
        except ImportError as e:
            raise EnvironmentalError(
                f"jetson-stats is not installed ({e}); install it with: {install_extra('jetson')}, "
                "and its service as docs/jetson.md says"
            ) from e
        self._failures = (self._package.JtopException, OSError, EOFError)
        try:
            self._jtop = self._package.jtop(interval=_JTOP_PERIOD_S)
            self._jtop.start()
            # The service keeps its own interval where somebody else set one, such as its window.
            period = float(self._jtop.interval)
            rails = self._rails()
        except self._failures as e:
            raise EnvironmentalError(
                f"the service of jetson-stats does not answer ({e})\nhint: start it with: "
                "sudo systemctl restart jtop.service"
            ) from e
        if not rails:
            self.close()
            raise EnvironmentalError("jetson-stats sees no power rail on this board")
        self.info = rails_of("jtop", rails, period)

    def read(self) -> Sample:
        """Watts of every rail, at the time the service gave them."""
        try:
            # Waits for the service's next reading, so that none is taken twice.
            if not self._jtop.ok():
                raise MeasurementError("the service of jetson-stats stopped during the run")
            rails = self._rails()
        except self._failures as e:
            raise MeasurementError(
                f"the service of jetson-stats stopped during the run ({e})"
            ) from e
        return Sample(perf_counter(), {n: mw / 1000 for n, mw in rails.items()})

    def close(self) -> None:
        """Disconnect."""
        self._jtop.close()

    def _rails(self) -> dict[str, float]:
        """Milliwatts by rail.

        The library takes the input of the module, where there is one, out of the rails and gives
        it as the total; elsewhere its total is a sum over all rails.
        """
        power = self._jtop.power
        rails = dict(power.get("rail") or {})
        total = power.get("tot") or {}
        rails[total.get("name") or _JTOP_SUM] = total
        return {
            name: float(values["power"])
            for name, values in rails.items()
            if name.upper() != "NC" and "power" in values
        }
