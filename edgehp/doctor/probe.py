"""The doctor's hands: everything it learns from outside Python goes through a `Probe`.

Libraries are only ever loaded in a subprocess with a time limit: a driver that crashes or hangs is
reported, not suffered.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edgehp.device import SYSTEM_ROOT

__all__ = ["Probe", "RunResult", "run"]

TIMEOUT_SECONDS = 30.0


@dataclass(frozen=True)
class RunResult:
    """How a subprocess ended.

    Attributes:
        code: exit status, negative for the signal that killed it; None if it never ran or was
            stopped by the time limit.
        stdout: what it wrote.
        stderr: what it complained.
        problem: None for exit status 0, else one clause for people.
    """

    code: int | None
    stdout: str
    stderr: str
    problem: str | None


def _problem(code: int, stderr: str) -> str | None:
    if code == 0:
        return None
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        return f"crashed with {name}"
    lines = stderr.strip().splitlines()
    return lines[-1].strip() if lines else f"ended with status {code}"


def run(command: Sequence[str], timeout: float = TIMEOUT_SECONDS) -> RunResult:
    """Run `command` without a shell and without input; never raises for what it does."""
    try:
        done = subprocess.run(
            list(command),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout,
            check=False,
            encoding="utf-8",
            errors="replace",
            env={**os.environ, "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired:
        return RunResult(None, "", "", f"did not end within {timeout:g} s")
    except OSError as e:
        return RunResult(None, "", "", f"cannot be run ({e.strerror or e})")
    return RunResult(
        done.returncode, done.stdout, done.stderr, _problem(done.returncode, done.stderr)
    )


@dataclass(frozen=True)
class Probe:
    """Where the doctor looks; tests hand in a tree and a runner of their own.

    Attributes:
        root: of the file system that ``/proc``, ``/sys`` and ``/etc`` are read from.
        runner: runs a command within a number of seconds.
        which: path of a program, or None.
        python: interpreter that import probes run in.
        disk: directory whose free space counts.
    """

    root: Path = SYSTEM_ROOT
    runner: Callable[[Sequence[str], float], RunResult] = run
    which: Callable[[str], str | None] = shutil.which
    python: str = sys.executable
    disk: Path = field(default_factory=Path.cwd)

    def python_code(self, code: str, timeout: float = TIMEOUT_SECONDS) -> RunResult:
        """Run Python `code` in a process of its own."""
        return self.runner([self.python, "-c", code], timeout)
