"""Ending an errand from another thread."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from edgehp.remote.lease import Lease
from edgehp.remote.ssh import Session

__all__ = ["INTERRUPTED", "Control", "Interrupted"]

INTERRUPTED = 130


@dataclass
class Control:
    """Interrupts an errand from another thread.

    Attributes:
        interrupted: whether somebody did.
        abandoned: whether not even results are awaited.
    """

    interrupted: bool = False
    abandoned: bool = False
    _lease: Lease | None = None
    _session: Session | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def interrupt(self) -> None:
        """As Ctrl-C: a running command may finish its report, everything else ends at once."""
        with self._lock:
            self.interrupted = True
            if self._lease is not None:
                self._lease.interrupt()
                return
        self.abandon()

    def abandon(self) -> None:
        """End what is going on; the board tidies up."""
        with self._lock:
            self.interrupted = self.abandoned = True
            if self._session is not None:
                self._session.kill()

    def check(self) -> None:
        """Stop here if the errand was abandoned.

        Raises:
            Interrupted: it was.
        """
        if self.abandoned:
            raise Interrupted

    def track(self, session: Session | None, lease: Lease | None = None) -> None:
        """Note what an interruption has to reach: a session, and the lease a command runs in.

        Raises:
            Interrupted: the errand was abandoned already.
        """
        with self._lock:
            self._session, self._lease = session, lease
        if session is not None:
            self.check()


class Interrupted(Exception):  # noqa: N818 - as KeyboardInterrupt; becomes an outcome
    """Somebody here has interrupted."""
