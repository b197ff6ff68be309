"""The one place that imports OpenVINO, without its telemetry.

Since 2024 ``import openvino`` reports to its maker that it was imported, from a process that it
forks, unless CI is set or a consent file says no. Neither a car nor a calibration has to tell
anybody that it runs; and a fork of a process with threads can hang for ever on a lock that one of
them held. OpenVINO has a stub of its own for where the package ``openvino_telemetry`` is missing
(``openvino/tools/ovc/telemetry_utils.py``): it finds it missing here.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from edgehp.errors import EnvironmentalError

_TELEMETRY = "openvino_telemetry"


def import_openvino() -> Any:
    """The module ``openvino``.

    Raises:
        EnvironmentalError: it is missing or cannot load its libraries.
    """
    absent = object()
    before = sys.modules.get(_TELEMETRY, absent)
    # None is what the import system takes for "not there" (importlib, `sys.modules`).
    sys.modules[_TELEMETRY] = None  # type: ignore[assignment]
    try:
        return import_module("openvino")
    except (ImportError, OSError) as e:
        raise EnvironmentalError(
            f"OpenVINO cannot be used ({e}); install it with: pip install openvino"
        ) from e
    finally:
        if before is absent:
            del sys.modules[_TELEMETRY]
        else:
            sys.modules[_TELEMETRY] = before  # type: ignore[assignment]
