"""jetson-stats (jtop): the rails of a Jetson as its service reads them.

The package is AGPL-3.0 and a user's own choice to install; nothing of it is here. Its ``avg`` is a
moving figure and no mean of anything, so only instantaneous readings are used.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from time import perf_counter
from typing import Any

from edgehp.benchmark.power.base import POWER, TOTAL, MeterInfo, Rail, Sample
from edgehp.benchmark.power.rails import describe_rail, total_of
from edgehp.errors import EnvironmentalError, MeasurementError

__all__ = ["JtopMeter"]

_PERIOD_S = 0.2


class JtopMeter:
    """The rails that jtop's service publishes, in milliwatts there, in watts here."""

    def __init__(self, module: Any = None, clock: Callable[[], float] = perf_counter) -> None:
        """Connect to the service.

        Args:
            module: stands for the package ``jtop``; imported when omitted.
            clock: monotonic seconds.

        Raises:
            EnvironmentalError: the package or its service is missing.
        """
        self._clock = clock
        try:
            self._package = import_module("jtop") if module is None else module
        except ImportError as e:
            raise EnvironmentalError(
                f"jetson-stats is not installed ({e}); install it with: pip install jetson-stats"
            ) from e
        self._failures = (self._package.JtopException, OSError, EOFError)
        try:
            self._jtop = self._package.jtop(interval=_PERIOD_S)
            self._jtop.start()
            rails = self._rails()
        except self._failures as e:
            raise EnvironmentalError(
                f"the service of jetson-stats does not answer ({e}); start it with: "
                "sudo systemctl restart jtop.service"
            ) from e
        if not rails:
            self.close()
            raise EnvironmentalError("jetson-stats sees no power rail on this board")
        total, includes = total_of(tuple(rails))
        self._info = MeterInfo(
            "jtop",
            POWER,
            tuple(Rail(n, describe_rail(n)) for n in rails),
            total,
            includes,
            _PERIOD_S,
        )

    @property
    def info(self) -> MeterInfo:
        """What it is."""
        return self._info

    def read(self) -> Sample:
        """Watts of every rail.

        Raises:
            MeasurementError: the service went away.
        """
        try:
            # Waits for the service's next reading, so that none is taken twice.
            if not self._jtop.ok():
                raise MeasurementError("the service of jetson-stats stopped during the run")
            rails = self._rails()
        except self._failures as e:
            raise MeasurementError(
                f"the service of jetson-stats stopped during the run ({e})"
            ) from e
        return Sample(self._clock(), {n: mw / 1000 for n, mw in rails.items()})

    def close(self) -> None:
        """Disconnect."""
        self._jtop.close()

    def _rails(self) -> dict[str, float]:
        rails = self._jtop.power.get("rail", {})
        return {
            name: float(values["power"])
            for name, values in rails.items()
            if name.upper() not in ("NC", TOTAL.upper()) and "power" in values
        }
