"""A real OpenSSH server on loopback, started by a test as a plain process with keys of its own."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tests.processes import REPO, children, eventually, free_port, listens

EDGEHP = f"{sys.executable} -m edgehp"
PROGRAM = f"{sys.executable} {REPO / 'tests' / 'board_program.py'}"
TENSORRT = f"{sys.executable} {REPO / 'tests' / 'board_tensorrt.py'}"


def need_sshd() -> str:
    """The server's path; the test is skipped where something of OpenSSH is missing."""
    found = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if found is None or shutil.which("ssh") is None:
        pytest.skip("no OpenSSH server here (Debian: openssh-server, openssh-client)")
    return found


class Server:
    """One board: a server, its temporary folder, and the processes of its connections."""

    def __init__(self, folder: Path, name: str, *more: str, path: Path | None = None) -> None:
        """`more`: further lines of its configuration; `path`: first of its PATH."""
        self.name = name
        self.folder = folder / name
        self.temporary = self.folder / "tmp"
        self.temporary.mkdir(parents=True)
        self.sshd = need_sshd()
        self.port = free_port()
        self.client_key = _key(folder / "client")
        host_key = _key(self.folder / "host")
        self.host_key = host_key.with_suffix(".pub").read_text().split()[:2]
        (self.folder / "authorized").write_text(
            self.client_key.with_suffix(".pub").read_text(encoding="utf-8")
        )
        lines = [
            "ListenAddress 127.0.0.1",
            f"Port {self.port}",
            f"HostKey {host_key}",
            f"AuthorizedKeysFile {self.folder / 'authorized'}",
            f"PidFile {self.folder / 'pid'}",
            "StrictModes no",
            "UsePAM no",
            "PasswordAuthentication no",
            "KbdInteractiveAuthentication no",
            "PermitRootLogin prohibit-password",
            "MaxStartups 100",
            f"SetEnv TMPDIR={self.temporary} PYTHONPATH={REPO} OMP_NUM_THREADS=1"
            + (f" PATH={path}:/usr/bin:/bin" if path else ""),
            *more,
        ]
        (self.folder / "sshd_config").write_text("\n".join(lines) + "\n")
        self.process: subprocess.Popen[bytes] | None = None
        # The command that was last seen to hang there.
        self.hanging: int | None = None

    def start(self) -> None:
        if os.geteuid() == 0:
            # What Debian's service makes before it starts the server as root.
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        log = self.folder / "log"
        self.process = subprocess.Popen(
            [self.sshd, "-D", "-f", str(self.folder / "sshd_config"), "-E", str(log)],
            # A test runner in the background ignores Ctrl-C, and would pass that on.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
            start_new_session=True,
        )
        ended = self.process.poll
        assert eventually(lambda: ended() is not None or listens(self.port), 10), log.read_text()
        if ended() is not None:
            pytest.skip(f"sshd does not run here: {log.read_text()[-300:]}")

    def stop(self) -> None:
        self.drop()
        if self.process is not None:
            self.process.terminate()
            self.process.wait(10)

    def connections(self) -> list[int]:
        """The server's processes for connections, not the commands they run."""
        found = [] if self.process is None else children(self.process.pid)
        return [pid for pid in found if _name(pid).startswith("sshd")]

    def signal(self, number: int) -> None:
        """Send a signal to every connection's process."""
        for pid in self.connections():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def drop(self) -> None:
        """Every connection is gone at once, as of a board that loses power."""
        self.signal(signal.SIGKILL)

    def leftovers(self) -> list[str]:
        """What is in its temporary folder."""
        return sorted(p.name for p in self.temporary.glob("edgehp-*"))

    def tidy(self, seconds: float = 15) -> bool:
        """Whether no folder and no command is left there, after some time at most."""
        return eventually(lambda: not self.leftovers() and not self._hangs(), seconds)

    def _hangs(self) -> bool:
        path = Path(f"/proc/{self.hanging}/cmdline")
        # A process that nobody waits for has no command line any more.
        return self.hanging is not None and path.exists() and path.read_bytes() != b""

    def known(self) -> str:
        return f"[127.0.0.1]:{self.port} {' '.join(self.host_key)}"

    def config(self, known_hosts: Path) -> str:
        return f"""
Host {self.name}
  HostName 127.0.0.1
  Port {self.port}
  User {getpass.getuser()}
  IdentityFile {self.client_key}
  IdentitiesOnly yes
  UserKnownHostsFile {known_hosts}
  GlobalKnownHostsFile /dev/null
"""


def _key(path: Path) -> Path:
    if not path.exists():
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(path)], check=True
        )
    return path


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text()
    except OSError:
        return ""
