"""OpenVINO is imported without its telemetry, and nothing else about it changes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("openvino_telemetry")

# Prints whether the telemetry's sender was loaded.
WATCHED = """
import sys
{how}
import openvino
print("backend_ga4" in " ".join(sys.modules), len(openvino.Core().available_devices))
"""


def imported(how: str, home: Path) -> list[str]:
    # Neither a consent file nor CI's variables, which silence it too.
    env = {k: v for k, v in os.environ.items() if k not in ("CI", "TF_BUILD", "JENKINS_URL")}
    done = subprocess.run(
        [sys.executable, "-c", WATCHED.format(how=how)],
        env={**env, "HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout.split()


def test_nothing_is_reported(tmp_path: Path) -> None:
    how = "from edgehp.engines.openvino import check_available; check_available()"
    loaded, devices = imported(how, tmp_path)
    assert loaded == "False"
    assert int(devices) >= 1
    assert not list(tmp_path.iterdir()), "a consent or statistics file was written"


def test_the_telemetry_is_there_for_others(tmp_path: Path) -> None:
    how = (
        "from edgehp.engines.openvino import check_available; check_available()\n"
        "import openvino_telemetry.backend.backend_ga4"
    )
    assert imported(how, tmp_path)[0] == "True"
