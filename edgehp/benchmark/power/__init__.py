"""Power meters behind one interface, and energy by integration over exactly the measured time.

A figure that cannot be had is None with a reason; nothing is estimated, and rails are never summed
unless the hardware says that they are disjoint.
"""

from __future__ import annotations

from edgehp.benchmark.power.base import Meter, MeterInfo, Rail, Sample
from edgehp.benchmark.power.integrate import Energy, energy_over
from edgehp.benchmark.power.sampler import PowerRecorder

__all__ = ["Energy", "Meter", "MeterInfo", "PowerRecorder", "Rail", "Sample", "energy_over"]
