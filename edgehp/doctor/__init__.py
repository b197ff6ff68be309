"""``edgehp doctor``: what this machine can run, and what to install for the rest."""

from __future__ import annotations

from edgehp.doctor.packages import how_to_install
from edgehp.doctor.probe import Probe, RunResult
from edgehp.doctor.report import FAILED, NOT_TESTED, OK, SCHEMA_VERSION, Diagnosis, diagnose

__all__ = [
    "FAILED",
    "NOT_TESTED",
    "OK",
    "SCHEMA_VERSION",
    "Diagnosis",
    "Probe",
    "RunResult",
    "diagnose",
    "how_to_install",
]
