"""``edgehp doctor``: what this machine can run, and what to install for the rest."""

from __future__ import annotations

from edgehp.doctor.report import (
    FAILED,
    NOT_TESTED,
    OK,
    SCHEMA_VERSION,
    Diagnosis,
    diagnose,
    how_to_install,
)
from edgehp.doctor.system import Probe, RunResult

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
