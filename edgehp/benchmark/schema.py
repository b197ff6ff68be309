"""The published form of a benchmark report, and the check that a report has it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgehp.artifact.schema import first_fault

__all__ = ["benchmark_schema", "report_fault"]


def benchmark_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a benchmark report."""
    path = Path(__file__).with_name("benchmark-report.schema.json")
    schema: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return schema


def report_fault(report: Mapping[str, Any]) -> str | None:
    """The first thing in which a report breaks the schema, or None."""
    return first_fault(dict(report), benchmark_schema())
