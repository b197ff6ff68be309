"""Boards of a real labgrid coordinator and exporter on loopback, with two real OpenSSH servers."""

from __future__ import annotations

import getpass
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import venv
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.processes import REPO, eventually, free_port, listens, python
from tests.ship_parts import tiny_artifact
from tests.ssh_server import EDGEHP, PROGRAM, Server

pytestmark = pytest.mark.slow

TAG = "target=orin-nano-8gb"
REPORT = "bench-single-stream.json"


@pytest.fixture(scope="module")
def labgrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of labgrid's commands: LGPL, so in an environment of its own."""
    if found := shutil.which("labgrid-coordinator"):
        return Path(found).parent
    folder = tmp_path_factory.mktemp("labgrid")
    venv.create(folder, with_pip=False, symlinks=True)
    # The tests' own pip installs into it: making a second one takes longer than using it.
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python"]
    done = subprocess.run(
        [*pip, folder / "bin/python", "install", "-q", "labgrid>=26"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode:
        pytest.skip(f"labgrid cannot be installed here: {done.stderr[-300:]}")
    return folder / "bin"


@dataclass
class Lab:
    """A coordinator, an exporter, and the two boards it exports."""

    folder: Path
    environment: dict[str, str]
    boards: tuple[Server, ...]
    relays: list[str]
    artifact: Path

    def client(self, *words: str) -> str:
        done = subprocess.run(
            ["labgrid-client", *words], env=self.environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def bench(
        self, *words: object, artifact: Path | None = None, program: str = PROGRAM
    ) -> subprocess.Popen[str]:
        """``edgehp bench`` on a board of the lab, as a user starts it."""
        command = ["bench", artifact or self.artifact, *words, "--remote-command", program]
        how = {"env": self.environment, "cwd": self.folder, "text": True}
        return python("-m", "edgehp", *command, stdout=subprocess.PIPE, **how)

    def free(self) -> bool:
        """Whether nobody has or wants a board."""
        return len(self.client("who").splitlines()) == 1 and not self.client("reservations")


@pytest.fixture(scope="module")
def lab(labgrid: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("lab")
    boards = tuple(Server(folder, name) for name in ("orin-1", "orin-2"))
    known, config = folder / "known_hosts", folder / "config"
    known.write_text("".join(f"{board.known()}\n" for board in boards))
    config.write_text(
        boards[0]
        .config(known)
        .replace("Host orin-1", "Host 127.0.0.1")
        .replace(f"  Port {boards[0].port}\n", "")
    )
    relays: list[str] = []
    power = http.server.HTTPServer(("127.0.0.1", 0), relay(relays))
    exported: dict[str, dict[str, object]] = {
        board.name: {
            "NetworkService": {
                "address": "127.0.0.1",
                "username": getpass.getuser(),
                "port": board.port,
            }
        }
        for board in boards
    }
    # Only the first can be switched.
    url = f"http://127.0.0.1:{power.server_port}/{{index}}"
    exported["orin-1"]["NetworkPowerPort"] = {"model": "rest", "host": url, "index": 1}
    (folder / "exporter.yaml").write_text(json.dumps(exported))
    port = free_port()
    address = f"127.0.0.1:{port}"
    environment = {
        **os.environ,
        "PATH": f"{labgrid}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPO),
        "LG_COORDINATOR": address,
        "EDGEHP_SSH": f"ssh -F {config}",
        "OMP_NUM_THREADS": "1",
    }
    found = Lab(folder, environment, boards, relays, tiny_artifact(folder / "dist" / "tiny"))
    processes = []
    try:
        threading.Thread(target=power.serve_forever, daemon=True).start()
        for board in boards:
            board.start()
        for command in (
            ["labgrid-coordinator", "-l", address],
            ["labgrid-exporter", "-n", "rack", str(folder / "exporter.yaml")],
        ):
            with (folder / f"{command[0]}.log").open("wb") as log:
                processes.append(
                    subprocess.Popen(
                        [str(labgrid / command[0]), *command[1:]],
                        env=environment, stdout=log, stderr=log, cwd=folder,
                    )
                )  # fmt: skip
            if command[0] == "labgrid-coordinator":
                assert eventually(lambda: listens(port))

        def make(board: Server) -> None:
            found.client("-p", board.name, "create")
            found.client("-p", board.name, "add-match", f"rack/{board.name}/*")
            found.client("-p", board.name, "set-tags", TAG)

        with ThreadPoolExecutor() as pool:
            list(pool.map(make, boards))
        assert eventually(lambda: "orin-2/NetworkService" in found.client("resources"))
        yield found
    finally:
        for process in reversed(processes):
            process.kill()
            process.wait()
        for board in boards:
            board.stop()
        power.shutdown()
        power.server_close()


def relay(seen: list[str]) -> type[http.server.BaseHTTPRequestHandler]:
    class Relay(http.server.BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            seen.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    return Relay


def test_a_board_is_reserved_used_and_given_back(lab: Lab) -> None:
    process = lab.bench("--lab", TAG, "--json", "--output", "one")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert json.loads(out)["folder"].endswith("one")
    assert json.loads((lab.folder / "one" / REPORT).read_text()) == {"state": "complete"}
    assert f"{TAG}: has orin-" in err
    assert lab.free()


def test_all_boards_one_of_them_switched_off_first(lab: Lab) -> None:
    process = lab.bench("--lab", TAG, "--all", "--power-cycle", "--output", "all")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 5
    rows = {line.split()[0]: line for line in out.splitlines()[-2:]}
    assert rows["orin-1"].split()[1:3] == ["ok", "0"], err
    assert "the place orin-2 has no power port" in rows["orin-2"]
    assert lab.relays == ["0", "1"]
    assert [p.parent.name for p in (lab.folder / "all").rglob(REPORT)] == ["orin-1"]
    assert lab.free()


def test_who_waits_is_told_its_place_and_may_leave(lab: Lab) -> None:
    for board in lab.boards:
        (board.temporary / "hangs").unlink(missing_ok=True)
    first = [
        lab.bench("--lab", f"name={b.name}", program=f"{PROGRAM} mode:hang=60") for b in lab.boards
    ]
    for board in lab.boards:
        assert eventually((board.temporary / "hangs").exists)
    waiting = lab.bench("--lab", TAG)
    assert waiting.stderr is not None
    assert waiting.stderr.readline() == f"{TAG}: waits: 1 of 1 in the queue\n"
    waiting.send_signal(signal.SIGINT)
    _, err = waiting.communicate(timeout=60)
    assert waiting.returncode == 130 and "interrupted" in err
    assert lab.client("reservations").count("state: acquired") == 2
    assert "state: waiting" not in lab.client("reservations")
    # One board vanishes, the other's user has enough.
    lab.boards[0].drop()
    first[1].send_signal(signal.SIGINT)
    ends = [process.communicate(timeout=60)[1] for process in first]
    assert [p.returncode for p in first] == [5, 130], ends
    assert "was lost while" in ends[0]
    assert lab.free()


def test_a_board_that_the_lab_does_not_have(lab: Lab) -> None:
    process = lab.bench("--lab", "target=thor")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 5
    assert "the lab has no board with target=thor\nhint: 'labgrid-client -v places'" in err
    assert lab.free()


def test_a_cold_start_after_each_power_cycle(lab: Lab, tmp_path: Path) -> None:
    lab.relays.clear()
    artifact = tiny_artifact(tmp_path / "tiny")
    words = ["--scenario", "cold-start", "--starts", 2, "--threads", 1, "--allow-invalid"]
    words += ["--lab", "name=orin-1", "--power-cycle"]
    process = lab.bench(*words, artifact=artifact, program=EDGEHP)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert lab.relays == ["0", "1"] * 2
    assert out.count("median of 1") == 2
    report = json.loads((artifact / "reports" / "bench-cold-start.json").read_text())
    assert len(report["starts"]) == report["scenario"]["starts"] == 2
    assert lab.free()
