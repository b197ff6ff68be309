"""Artifacts: an engine with a manifest that says what it is and where it may run."""

from __future__ import annotations

from edgehp.artifact.check import (
    Artifact,
    golden_crops,
    load_artifact,
    newest_artifact,
    verify_golden,
)
from edgehp.artifact.manifest import Manifest

__all__ = [
    "Artifact",
    "Manifest",
    "golden_crops",
    "load_artifact",
    "newest_artifact",
    "verify_golden",
]
