"""A real Dask scheduler with certificates of its own, and workers, started by a test.

Every worker imports this module, for the work that it gets: nothing heavy is imported at its top.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgehp.datasets.stores import Photo
from edgehp.errors import DataError
from tests.processes import REPO

TLS = "distributed.comm.tls"


def certificates(folder: Path) -> dict[str, str]:
    """Dask's settings for one certificate of our own that all use."""
    from distributed import Security

    made: Any = Security.temporary()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "node.pem").write_text(made.tls_ca_file)
    (folder / "key.pem").write_text(made.tls_client_key)
    values = {f"{TLS}.ca-file": str(folder / "node.pem")}
    for role in ("scheduler", "worker", "client"):
        values[f"{TLS}.{role}.cert"] = str(folder / "node.pem")
        values[f"{TLS}.{role}.key"] = str(folder / "key.pem")
    return values


def environment(settings: dict[str, str]) -> dict[str, str]:
    """The settings as variables for Dask's processes, and what these need of this checkout."""
    named = {k.upper().replace("-", "_").replace(".", "__"): v for k, v in settings.items()}
    return {
        **os.environ,
        **{f"DASK_{k}": v for k, v in named.items()},
        "PYTHONPATH": str(REPO),
        "OMP_NUM_THREADS": "1",
    }


@dataclass
class Cluster:
    """A scheduler and its workers; their processes end with `stop`."""

    folder: Path
    settings: dict[str, str]
    address: str = ""
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, workers: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.address = self._run("scheduler", "--protocol", "tls", "--host", "127.0.0.1")
        for _ in range(workers):
            self.add_worker()

    def add_worker(self) -> None:
        self._run("worker", self.address, "--nthreads", "1", "--host", "127.0.0.1")

    def _run(self, what: str, *words: str) -> str:
        """Start it and wait for the address that it says."""
        log = self.folder / f"{len(self.processes)}.log"
        command = [sys.executable, "-m", "dask", what, *words, "--port", "0", "--no-dashboard"]
        if what == "worker":
            command[command.index("--port")] = "--worker-port"
            command += ["--local-directory", str(self.folder)]
        with log.open("wb") as stream:
            process = subprocess.Popen(
                command,
                stdout=stream,
                stderr=stream,
                env=environment(
                    # One death is enough: edgehp itself tries a shard again.
                    self.settings | {"distributed.scheduler.allowed-failures": "0"}
                ),
                start_new_session=True,
            )
        self.processes.append(process)
        said = r"Scheduler at: +(tls://\S+)" if what == "scheduler" else r"Registered to: +(\S+)"
        for _ in range(600):
            if match := re.search(said, log.read_text()):
                return match[1]
            if process.poll() is not None:
                break
            time.sleep(0.05)
        raise RuntimeError(f"dask {what} does not start: {log.read_text()[-2000:]}")

    def stop(self) -> None:
        for process in reversed(self.processes):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@dataclass(frozen=True)
class KillingPhoto(Photo):
    """A photo that kills whoever reads it."""

    def read(self) -> bytes:
        os.kill(os.getpid(), signal.SIGKILL)
        return b""


@dataclass(frozen=True)
class Doubling:
    """Doubles numbers; some items kill their worker, or are refused."""

    folder: Path
    kills: dict[int, int] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)

    def open(self, folder: Path | None) -> Callable[[int], int]:
        def double(item: int) -> int:
            count = len(list(self.folder.glob(f"{item}-*")))
            if count < self.kills.get(item, 0):
                (self.folder / f"{item}-{count}").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if item == 13:
                raise DataError("13 is refused")
            return 2 * item + sum(
                len((folder or Path()).joinpath(n).read_bytes()) for n in self.files
            )

        return double


@dataclass(frozen=True)
class Sleeping:
    """Leaves a file for every item that it begins."""

    folder: Path
    files: dict[str, Path] = field(default_factory=dict)

    def open(self, folder: Path | None) -> Callable[[int], None]:
        def sleep(item: int) -> None:
            (self.folder / f"pid-{item}").touch()
            time.sleep(0.1)

        return sleep
