"""stub"""
from __future__ import annotations
from edgehp.benchmark.power.base import Meter
def open_meter(name: str) -> tuple[Meter | None, str | None]:
    """Stub."""
    return None, "not yet"
