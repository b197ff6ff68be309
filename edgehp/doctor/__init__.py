"""``edgehp doctor``: what this machine can run, and what to install for the rest."""

from __future__ import annotations

from edgehp.doctor.packages import how_to_install
from edgehp.doctor.probe import Probe, RunResult
from edgehp.doctor.report import Diagnosis, diagnose

__all__ = ["Diagnosis", "Probe", "RunResult", "diagnose", "how_to_install"]
