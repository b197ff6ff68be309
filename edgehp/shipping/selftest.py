"""The self-test: golden vectors through the engine on this device, in a process of its own."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

import edgehp
from edgehp import errors
from edgehp.artifact import golden_crops, load_artifact, verify_golden
from edgehp.device import DeviceProbe
from edgehp.engines import open_engine
from edgehp.errors import CompatibilityError, EdgehpError, EnvironmentalError
from edgehp.files import Record, strict_json

# Enough for a median that one scheduling hiccup does not move; below a second on any target.
_WARM_UP = 3
_ROUNDS = 15
_TIMEOUT_S = 120.0
# `-I` so that neither the current folder (a USB stick?) nor the environment lends modules; the
# folders this process imports from are handed over instead.
_CODE = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from edgehp.shipping.selftest import _child; _child(sys.argv[2])"
)


class SelfTestResult(Record, frozen=True):
    """What the golden vectors gave.

    Attributes:
        worst_degrees: largest difference of an angle from FP32.
        tolerance_degrees: what the manifest allows.
        latency_ms: median time of one crop, after warm-up.
        max_latency_ms: the manifest's budget, None where it has none (the time is then not judged).
    """

    worst_degrees: float
    tolerance_degrees: float
    latency_ms: float
    max_latency_ms: float | None


def self_test(artifact: Path, device: DeviceProbe | None = None) -> SelfTestResult:
    """Check the artifact, open its engine in this process and run the golden vectors.

    Args:
        artifact: its directory.
        device: facts about this device; probed when omitted.

    Raises:
        CompatibilityError: altered, for another device, angles beyond the tolerance, or slower
            than the budget.
        DataError, EnvironmentalError: as `edgehp.artifact.load_artifact` and `open_engine`.
    """
    found = load_artifact(artifact, device=device)
    golden = found.manifest.golden
    batch = found.engine.min_batch
    kind, device_name = found.engine.kind, found.engine_device
    with open_engine(kind, found.engine_path, device=device_name, batch=batch) as engine:
        worst = verify_golden(found, engine)
        crops = golden_crops(found)
        # An engine that takes no single crop is timed on its smallest batch, as it will be used.
        batch_crops = crops[[i % len(crops) for i in range(batch)]]
        times = []
        for i in range(_WARM_UP + _ROUNDS):
            started = time.perf_counter()
            engine.infer(batch_crops)
            if i >= _WARM_UP:
                times.append((time.perf_counter() - started) * 1e3)
    latency = statistics.median(times)
    if golden.max_latency_ms is not None and latency > golden.max_latency_ms:
        raise CompatibilityError(
            f"{artifact}: {'one crop takes' if batch == 1 else f'a batch of {batch} crops takes'} "
            f"{latency:.1f} ms here, the manifest allows "
            f"{golden.max_latency_ms:g} ms: set the device's full power mode (edgehp doctor), or "
            "bundle again with a larger --max-latency-ms"
        )
    return SelfTestResult(worst, golden.tolerance_degrees, latency, golden.max_latency_ms)


def run_self_test(artifact: Path) -> SelfTestResult:
    """`self_test` in a process of its own, which may crash or hang without harm.

    Raises:
        CompatibilityError: as `self_test`, or the process crashed or took longer than two minutes.
        DataError, EnvironmentalError: as `self_test`.
    """
    here = str(Path(edgehp.__file__).resolve().parent.parent)
    folders = [here, *(os.path.abspath(p) for p in sys.path if p)]  # noqa: PTH100
    command = [sys.executable, "-I", "-c", _CODE, json.dumps(folders), str(artifact.resolve())]
    try:
        done = subprocess.run(
            command, capture_output=True, timeout=_TIMEOUT_S, check=False, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired as e:
        raise CompatibilityError(
            f"{artifact}: the self-test gave no answer within {_TIMEOUT_S:g} s and was stopped; "
            "build the artifact again"
        ) from e
    except OSError as e:
        raise EnvironmentalError(f"the self-test could not be started: {e}") from e
    return _answer(artifact, done)


def _answer(artifact: Path, done: subprocess.CompletedProcess[bytes]) -> SelfTestResult:
    if done.returncode < 0:
        raise CompatibilityError(
            f"{artifact}: the engine crashed in the self-test (signal {-done.returncode})\n"
            "hint: build the artifact again for this device"
        )
    # The last line: runtimes write what they like before it.
    lines = done.stdout.decode(errors="replace").strip().splitlines()
    try:
        answer = strict_json(lines[-1].encode())
        if "error" in answer:
            raise _error(str(answer["error"]), str(answer["message"]))
        return msgspec.convert(answer, SelfTestResult)
    except (IndexError, KeyError, TypeError, ValueError) as e:
        tail = " ".join(done.stderr.decode(errors="replace").split())[-300:]
        raise CompatibilityError(
            f"{artifact}: the self-test ended with {done.returncode} and no answer: {tail}"
        ) from e


def _error(name: str, message: str) -> EdgehpError:
    """An error of the other process, as its class here."""
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, EdgehpError):
        return kind(message)
    return CompatibilityError(message)


def _child(artifact: str) -> None:
    """In the other process: test, and write the answer as the last line of stdout."""
    try:
        answer: Any = msgspec.to_builtins(self_test(Path(artifact)))
    except EdgehpError as e:
        answer = {"error": type(e).__name__, "message": str(e)}
    # Not print: this is a protocol between two processes, and nobody's output.
    sys.stdout.write(f"\n{json.dumps(answer)}\n")
    sys.stdout.flush()
