"""Tell systemd how the service is, and that it is alive.

The protocol is a datagram of ``NAME=VALUE`` lines to the socket in ``$NOTIFY_SOCKET``, whose first
character ``@`` stands for Linux's abstract namespace; ``$WATCHDOG_USEC`` is the longest silence.
Both are described in systemd's manual pages sd_notify(3) and sd_watchdog_enabled(3), and are stable
interfaces. Packages for it on PyPI have seen no release for years; it is ten lines.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Mapping

__all__ = ["Watchdog"]

logger = logging.getLogger(__name__)


class Watchdog:
    """Notifies the service manager; does nothing where there is none."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        """Read the environment.

        Args:
            environment: of the process by default.
        """
        env = os.environ if environment is None else environment
        address = env.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self.interval = _interval(env)
        self._next = 0.0
        self._socket: socket.socket | None = None
        if address[:1] in ("/", "@"):
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            # A manager that does not read must not hold the loop.
            self._socket.setblocking(False)

    @property
    def enabled(self) -> bool:
        """Whether somebody listens."""
        return self._socket is not None

    def ready(self, status: str) -> None:
        """The service has started."""
        self._send(f"READY=1\nSTATUS={_line(status)}")

    def status(self, status: str) -> None:
        """One line for ``systemctl status``."""
        self._send(f"STATUS={_line(status)}")

    def alive(self) -> None:
        """Call often: sends a sign of life when half of the allowed silence is over."""
        now = time.monotonic()
        if self.interval is not None and now >= self._next:
            self._next = now + self.interval
            self._send("WATCHDOG=1")

    def stopping(self) -> None:
        """The service stops on purpose."""
        self._send("STOPPING=1")

    def close(self) -> None:
        """Close the socket."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, message: str) -> None:
        if self._socket is None:
            return
        try:
            self._socket.sendto(message.encode(), self._address)
        except OSError as e:
            logger.warning("the service manager did not take %r: %s", message.split("\n")[0], e)


def _line(text: str) -> str:
    """One line: another would be an assignment of its own to the service manager."""
    return " ".join(text.split())[:200]


def _interval(env: Mapping[str, str]) -> float | None:
    """Seconds between signs of life: half of what is allowed, as the manual page advises."""
    if env.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    try:
        microseconds = int(env.get("WATCHDOG_USEC", "0"))
    except ValueError:
        return None
    return microseconds / 2e6 if microseconds > 0 else None
