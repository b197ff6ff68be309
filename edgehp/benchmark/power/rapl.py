"""RAPL: energy counters of x86 processors, read from sysfs.

``/sys/class/powercap/intel-rapl:*/energy_uj`` counts microjoules and starts again at
``max_energy_range_uj`` (Linux kernel, Documentation/power/powercap/powercap.rst). AMD processors
appear under the same name. Readable by root only, since CVE-2020-8694.
"""

from __future__ import annotations

from pathlib import Path

from edgehp.benchmark.power.base import ENERGY, Meter, MeterInfo
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


class RaplMeter(Meter):
    """Every readable domain."""

    def __init__(self, root: Path = SYSTEM_ROOT) -> None:
        """Find the domains.

        Raises:
            EnvironmentalError: there are none, or they may not be read.
        """
        # Domain -> the file that holds its count, and the value at which that starts again.
        found: dict[str, tuple[Path, int]] = {}
        for path in sorted((root / "sys/class/powercap").glob("intel-rapl:*")):
            name = (read_text(path / "name", 64) or "").strip()
            # intel-rapl:0:2 is the part "dram" of intel-rapl:0, "package-0".
            if path.name.count(":") == 2:
                name = f"{name}-{path.name.split(':')[1]}"
            if name and (largest := read_integer(path / "max_energy_range_uj")):
                found[name] = path / "energy_uj", largest
        if not found:
            raise EnvironmentalError(
                "no RAPL energy counter: not an x86 processor, or a virtual machine"
            )
        self._domains = {n: d for n, d in found.items() if read_integer(d[0]) is not None}
        if not self._domains:
            raise EnvironmentalError(
                "the RAPL energy counters can be read by root only: run as root, or allow it with "
                "chmod a+r /sys/class/powercap/intel-rapl:*/energy_uj"
            )
        self._last: dict[str, int] = {}
        self._counted = dict.fromkeys(self._domains, 0)
        # Cores are inside the package, psys around it: adding either would count twice.
        total = tuple(name for name in self._domains if name.startswith(("package", "dram")))
        included = f"{', '.join(total)}: not the board, disks or the power supply"
        self.info = MeterInfo(
            "rapl",
            ENERGY,
            {n: _MEANING.get(n.rsplit("-", 1)[0], "not documented here") for n in self._domains},
            total,
            included if total else "no total: no package counter can be read",
            _PERIOD_S,
        )

    def values(self) -> dict[str, float]:
        """Joules of every domain since the first reading; it must be read more than once a wrap."""
        for name, (path, modulus) in self._domains.items():
            if (value := read_integer(path)) is None:
                raise MeasurementError(f"the RAPL counter {name} no longer answers")
            self._counted[name] += (value - self._last.get(name, value)) % modulus
            self._last[name] = value
        return {name: count * 1e-6 for name, count in self._counted.items()}
