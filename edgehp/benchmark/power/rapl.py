"""RAPL: energy counters of x86 processors, read from sysfs.

``/sys/class/powercap/intel-rapl:*/energy_uj`` counts microjoules and starts again at
``max_energy_range_uj`` (Linux kernel, Documentation/power/powercap/powercap.rst). AMD processors
appear under the same name. Readable by root only, since CVE-2020-8694.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from edgehp.benchmark.power.base import ENERGY, Meter, MeterInfo, Sample
from edgehp.device import SYSTEM_ROOT, read_integer, read_text
from edgehp.errors import EnvironmentalError, MeasurementError

# Hardware updates every millisecond; the shortest wrap of a big server takes about a minute.
_PERIOD_S = 0.1
_MEANING = {
    "package": "the processor package",
    "dram": "the memory of a package",
    "core": "the cores, part of the package",
    "uncore": "the graphics unit, part of the package",
    "psys": "the platform as its maker wired it; contains the package",
}


@dataclass
class _Domain:
    """A counter that starts again at zero, read as one that does not.

    Attributes:
        name: for people.
        path: the file that holds the count.
        modulus: the value at which it starts again.
    """

    name: str
    path: Path
    modulus: int
    _last: int | None = None
    _counted: int = 0

    def count(self) -> int:
        """Microjoules since the first reading; it must be read more than once a wrap.

        Raises:
            MeasurementError: it no longer answers.
        """
        value = read_integer(self.path)
        if value is None:
            raise MeasurementError(f"the RAPL counter {self.name} no longer answers")
        if self._last is not None:
            self._counted += (value - self._last) % self.modulus
        self._last = value
        return self._counted


class RaplMeter(Meter):
    """Every readable domain."""

    def __init__(self, root: Path = SYSTEM_ROOT, clock: Callable[[], float] = perf_counter) -> None:
        """Find the domains.

        Raises:
            EnvironmentalError: there are none, or they may not be read.
        """
        self._clock = clock
        found = _domains(root)
        if not found:
            raise EnvironmentalError(
                "no RAPL energy counter: not an x86 processor, or a virtual machine"
            )
        self._domains = [d for d in found if read_integer(d.path) is not None]
        if not self._domains:
            raise EnvironmentalError(
                "the RAPL energy counters can be read by root only: run as root, or allow it with "
                "chmod a+r /sys/class/powercap/intel-rapl:*/energy_uj"
            )
        # Cores are inside the package, psys around it: adding either would count twice.
        total = tuple(d.name for d in self._domains if d.name.startswith(("package", "dram")))
        self.info = MeterInfo(
            "rapl",
            ENERGY,
            {d.name: _meaning(d.name) for d in self._domains},
            total,
            f"{', '.join(total)}: not the board, disks or the power supply"
            if total
            else "no total: no package counter can be read",
            _PERIOD_S,
        )

    def read(self) -> Sample:
        """Joules of every domain since the first reading.

        Raises:
            MeasurementError: a counter no longer answers.
        """
        before = self._clock()
        joules = {domain.name: domain.count() * 1e-6 for domain in self._domains}
        return Sample((before + self._clock()) / 2, joules)


def _domains(root: Path) -> list[_Domain]:
    found = []
    base = root / "sys/class/powercap"
    for path in sorted(base.glob("intel-rapl:*")):
        name = (read_text(path / "name", 64) or "").strip()
        largest = read_integer(path / "max_energy_range_uj")
        if not name or not largest:
            continue
        # intel-rapl:0:2 is the part "dram" of intel-rapl:0, "package-0".
        if path.name.count(":") == 2:
            name = f"{name}-{path.name.split(':')[1]}"
        found.append(_Domain(name, path / "energy_uj", largest))
    return found


def _meaning(name: str) -> str:
    return _MEANING.get(name.rsplit("-", 1)[0], "not documented here")
