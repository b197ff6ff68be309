"""Boards over SSH, against real OpenSSH servers on loopback."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgehp import __version__
from edgehp.artifact import load_artifact
from edgehp.cli import main as root
from edgehp.errors import EnvironmentalError
from edgehp.files import sha256_file
from edgehp.progress import Step
from edgehp.remote import boards, ssh
from edgehp.shipping.bundle import make_bundle
from tests import build_parts, ship_parts
from tests.board_tensorrt import MODULE
from tests.processes import eventually, python
from tests.ssh_server import EDGEHP, PROGRAM, TENSORRT, Server

# ruff: noqa: SIM905
BENCH = "bench --power none --threads 1 --duration 1 --idle 0 --warm-up 1 --allow-invalid".split()
REPORT = "bench-single-stream.json"


class Rack:
    """Two boards, the user's SSH configuration and an artifact."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.known_hosts = folder / "known_hosts"
        self.config = folder / "config"
        # The second greets everybody, as some login shells do.
        greeting = "echo Welcome; echo to xavier >&2"
        self.orin = Server(folder, "orin")
        self.xavier = Server(
            folder, "xavier", f'ForceCommand {greeting}; eval "$SSH_ORIGINAL_COMMAND"'
        )
        self.rogue = Server(folder, "rogue", path=folder / "rogue" / "bin")
        tar = self.rogue.folder / "bin" / "tar"
        tar.parent.mkdir()
        tar.write_text(f"#!{sys.executable}\n{ROGUE_TAR}")
        tar.chmod(0o755)
        self.boards = (self.orin, self.xavier, self.rogue)
        self.config.write_text("".join(b.config(self.known_hosts) for b in self.boards))
        self.artifact = ship_parts.tiny_artifact(folder / "dist" / "tiny")

    def trust(self) -> None:
        self.known_hosts.write_text("".join(f"{b.known()}\n" for b in self.boards))

    def ssh(self, *options: str) -> str:
        return " ".join(["ssh", "-F", str(self.config), *options])

    def when_running(self, board: Server, act: Callable[[], None]) -> threading.Thread:
        """Do something to the board once a command hangs there."""
        thread = threading.Thread(target=lambda: (self.running(board), act()))
        thread.start()
        return thread

    def running(self, board: Server) -> None:
        """Wait until a command hangs on the board."""
        mark = board.temporary / "hangs"
        assert eventually(mark.exists), f"nothing runs on {board.name}"
        board.hanging = int(mark.read_text())
        mark.unlink()


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rack]:
    rack = Rack(tmp_path_factory.mktemp("rack"))
    for board in rack.boards:
        board.start()
    yield rack
    for board in rack.boards:
        board.stop()


@pytest.fixture
def rack(servers: Rack, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Rack]:
    servers.trust()
    for board in servers.boards:
        # Of an earlier test whose command nobody waited for.
        (board.temporary / "hangs").unlink(missing_ok=True)
        board.hanging = None
    monkeypatch.setenv("EDGEHP_SSH", servers.ssh())
    monkeypatch.chdir(tmp_path)
    yield servers
    for board in servers.boards:
        board.signal(signal.SIGCONT)
        assert board.tidy(), f"{board.name} still has {board.leftovers()}"


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def invoke(*words: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            root.main([str(w) for w in words])
        out, err = capfd.readouterr()
        assert "Traceback" not in err, err
        return int(stopped.value.code or 0), out, err

    return invoke


def words_of(*words: object, program: str = PROGRAM) -> list[object]:
    return [*BENCH, *words, "--remote-command", program]


@pytest.fixture
def bench(rack: Rack, run: Callable[..., Any]) -> Callable[..., tuple[int, str, str]]:
    """``edgehp bench`` of the rack's artifact on one board."""
    return lambda host, *words, program=PROGRAM: run(
        *words_of(rack.artifact, "--host", host, *words, program=program)
    )


def program(*modes: str) -> str:
    return " ".join([PROGRAM, *(f"mode:{m}" for m in modes)])


def test_a_benchmark_runs_there_and_its_report_lands_here(rack: Rack, run, tmp_path) -> None:
    artifact = ship_parts.tiny_artifact(tmp_path / "dist" / "tiny")
    # Without a name it is the newest here that travels.
    code, out, err = run(*words_of("--against", "none", "--host", "orin", program=EDGEHP))
    assert code == 0, err
    report = artifact / "reports" / REPORT
    assert json.loads(report.read_text())["kind"] == "benchmark"
    # The path that is printed is the one here.
    assert f"measured {report.relative_to(tmp_path)}" in out
    assert "edgehp-" not in out
    assert "orin: turn 1: artifact" in err
    assert re.search(r"^edgehp: orin: send: [\d.]+ s$", err, re.M)


def test_what_travels_is_the_artifact_and_the_frames(rack: Rack, bench, tmp_path: Path) -> None:
    (tmp_path / "my frames.zip").write_bytes(b"zip")
    (rack.artifact / "reports").mkdir(exist_ok=True)
    (rack.artifact / "reports" / "old.json").write_text("{}")
    code, out, _ = bench("xavier", "--frames", "my frames.zip", "--json")
    assert code == 0
    said = json.loads(out)
    manifest = load_artifact(rack.artifact).manifest
    name = rack.artifact.name
    wanted = {f"{name}/{f.path}": f.sha256 for f in manifest.files}
    wanted[f"{name}/manifest.json"] = sha256_file(rack.artifact / "manifest.json")
    wanted["my frames.zip"] = sha256_file(tmp_path / "my frames.zip")
    sent = {k: v for k, v in said["files"].items() if not k.endswith(REPORT)}
    assert sent == wanted
    # Options as they were typed, places as they are there.
    assert said["words"][:2] == ["-v", "bench"]
    said_options = [said["words"][said["words"].index(o) + 1] for o in ("--power", "--duration")]
    assert said_options == ["none", "1.0"]
    assert {"--allow-invalid", "--json"} <= set(said["words"])
    assert not {"--host", "--remote-command", "--fps"} & set(said["words"])
    assert said["folder"] == str(rack.artifact / "reports")


def test_the_exit_code_is_that_of_the_command_there(bench, tmp_path) -> None:
    code, _, err = bench("orin", "--output", tmp_path, program=program("exit=3"))
    assert code == 3
    assert "orin: error: found this, expected that" in err
    assert err.count("found this") == 1
    # A gate that was missed has a report too.
    assert json.loads((tmp_path / REPORT).read_text()) == {"state": "complete"}


def test_no_other_host_key_is_accepted_whatever_the_users_ssh_says(
    rack: Rack, bench, monkeypatch
) -> None:
    rack.known_hosts.write_text("")
    monkeypatch.setenv("EDGEHP_SSH", rack.ssh("-o", "StrictHostKeyChecking=no"))
    code, out, err = bench("orin")
    assert (code, out) == (5, "")
    assert err.count("\n") == 1
    assert "not among your known hosts" in err
    assert "ssh orin" in err
    assert rack.known_hosts.read_text() == ""
    words = rack.orin.known().split()
    rack.known_hosts.write_text(f"{words[0]} {' '.join(rack.xavier.host_key)}\n")
    code, _, err = bench("orin")
    assert code == 5
    assert "not the one in your known hosts" in err


def test_a_board_without_edgehp_or_with_another(bench, run) -> None:
    code, _, err = bench("orin", program="edgehp")
    assert code == 5
    assert "edgehp was not found on orin" in err
    assert "--remote-command" in err
    code, _, err = bench("orin", program=program("version=0.0.7"))
    assert code == 5
    assert err == (
        f"edgehp: error: orin has edgehp 0.0.7, this machine {__version__}: install the same "
        "version on both\n"
    )
    # The doctor is asked about just that.
    words = ["doctor", "--host", "orin", "--remote-command", program("version=0.0.7")]
    code, _, err = run(*words)
    assert code == 0
    # Nothing comes back from it, so nothing is said about that.
    assert [line for line in err.splitlines() if line.startswith("orin: ")] == [
        "orin: quantize: 1.2 s"
    ]


def test_a_board_that_is_not_there(rack: Rack, bench) -> None:
    rack.config.write_text(rack.config.read_text() + "\nHost off\n  HostName 127.0.0.1\n  Port 1\n")
    code, _, err = bench("off")
    assert code == 5
    assert "off cannot be reached" in err
    assert "refused" in err


def test_a_board_that_falls_silent_is_noticed(rack: Rack, bench, monkeypatch) -> None:
    options = ("-o", "ServerAliveInterval=1", "-o", "ServerAliveCountMax=2")
    monkeypatch.setenv("EDGEHP_SSH", rack.ssh(*options))
    thread = rack.when_running(rack.orin, lambda: rack.orin.signal(signal.SIGSTOP))
    started = time.monotonic()
    code, _, err = bench("orin", program=program("hang=60"))
    thread.join()
    assert code == 5
    assert "the connection to orin was lost" in err
    assert time.monotonic() - started < 30
    # It comes back to life: what still runs there is stopped, as `rack` checks.


def test_one_of_two_boards_vanishes_and_costs_its_own_row(
    rack: Rack, run, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")  # a line a board
    hosts = tmp_path / "hosts"
    hosts.write_text(
        f"# the rack\norin {program('hang=2')}\nxavier {program('hang=60')}\n\nnowhere.invalid\n"
    )
    thread = rack.when_running(rack.xavier, rack.xavier.drop)
    code, out, err = run(
        *words_of(rack.artifact, "--hosts", hosts, "--output", tmp_path / "reports")
    )
    thread.join()
    assert code == 5
    rows = {line.split()[0]: line for line in out.splitlines()[-3:]}
    assert rows["orin"].split()[1:3] == ["ok", "0"]
    assert rows["xavier"].split()[1:3] == ["FAILED", "5"]
    assert "was lost while" in rows["xavier"]
    assert "no address is known" in rows["nowhere.invalid"]
    assert err.splitlines()[-1].endswith("2 of 3 boards failed: xavier, nowhere.invalid")
    assert json.loads((tmp_path / "reports" / "orin" / REPORT).read_text())["state"] == "complete"
    assert not (tmp_path / "reports" / "xavier").exists()


def test_many_boards_as_json(rack: Rack, run, tmp_path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text(f"orin {program('exit=6')}\nxavier\n")
    code, out, _ = run(*words_of(rack.artifact, "--hosts", hosts, "--json", "--output", tmp_path))
    assert code == 6
    rows = json.loads(out)
    assert [(r["host"], r["exit_code"], r["error"]) for r in rows] == [
        ("orin", 6, "found this, expected that"),
        ("xavier", 0, None),
    ]
    assert [r["files"] for r in rows] == [
        [str(tmp_path / name / REPORT)] for name in ("orin", "xavier")
    ]
    assert rows[1]["result"]["folder"] == str(tmp_path / "xavier")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_what_stops_here_stops_there(rack: Rack, tmp_path: Path, number: signal.Signals) -> None:
    words = (rack.artifact, "--host", "orin", "--output", tmp_path)
    process = python("-m", "edgehp", *words_of(*words, program=program("hang=60")), text=True)
    rack.running(rack.orin)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    if number != signal.SIGKILL:
        assert process.returncode == 130, err
        assert "interrupted" in err
        # The command had its chance to write what it had measured.
        assert json.loads((tmp_path / REPORT).read_text()) == {"state": "partial"}
    else:
        assert process.returncode == -9
    # `rack` sees to it that nothing is left there, though nobody here asked for it.


def test_a_reader_here_that_has_enough_does_not_stop_the_command_there(
    rack: Rack, tmp_path
) -> None:
    words = (rack.artifact, "--host", "orin", "--output", tmp_path)
    command = words_of(*words, program=program("lines=2000"))
    process = python("-m", "edgehp", *command, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 1
    assert (tmp_path / REPORT).exists()


def test_a_command_that_takes_too_long(bench) -> None:
    began = time.monotonic()
    code, _, err = bench("orin", "--remote-timeout", 1, program=program("hang=60"))
    assert code == 5
    assert "did not end on orin within 1 s" in err
    # It is stopped, not waited for.
    assert time.monotonic() - began < 40


def test_an_altered_artifact_does_not_travel(rack: Rack, run, tmp_path: Path) -> None:
    copy = ship_parts.tiny_artifact(tmp_path / "tiny")
    (copy / "engine.onnx").write_bytes((copy / "engine.onnx").read_bytes()[:-1] + b"?")
    code, _, err = run(*words_of(copy, "--host", "orin"))
    assert code == 4
    assert "was changed" in err


def test_photos_are_sent_or_are_there(rack: Rack, run, tmp_path: Path) -> None:
    photos = tmp_path / "-rf $(touch pwned) `id`"
    (photos / "sub").mkdir(parents=True)
    names = ["plain.jpg", "a b.jpg", "-rf", "new\nline", "'\"$HOME\\", "sub/ü.png", "*"]
    for name in names:
        (photos / name).write_bytes(name.encode())
    (photos / os.fsdecode(b"latin-\xe9")).write_bytes(b"x")
    (photos / "loop").symlink_to(photos)
    words = ["validate", rack.artifact, "--host", "xavier", "--dataset", "aflw2000", "--json"]
    words += ["--remote-command", PROGRAM]
    code, out, _ = run(*words, "--data-root", photos)
    assert code == 0
    files = {k for k in json.loads(out)["files"] if k.startswith(photos.name)}
    wanted = {f"{photos.name}/{n}".encode().decode("latin-1") for n in names}
    assert files == wanted | {f"{photos.name}/latin-\xe9"}
    code, out, _ = run(*words, "--remote-data-root", "/data/my aflw")
    said = json.loads(out)["words"]
    assert said[said.index("--data-root") + 1] == "/data/my aflw"
    code, _, err = run(*words)
    assert code == 2
    assert "--remote-data-root" in err


def test_a_deferred_build_is_finished_there(rack: Rack, run, tmp_path: Path) -> None:
    build_parts.small_request(tmp_path)
    words = "build --target orin-nano-8gb --network small.onnx --calibration cal.zip --threads 1"
    words += " --calibration-method minmax --validate-on val.zip --max-drop 90 --host orin"
    code, out, err = run(*words.split(), "--remote-command", TENSORRT)
    assert code == 0, err
    path = Path("dist/small-orin-nano-8gb-int8")
    manifest = load_artifact(path, bytes_only=True).manifest
    assert manifest.state == "complete"
    assert manifest.target.module == MODULE
    assert manifest.accuracy is not None
    assert manifest.accuracy.measured_with.endswith("the engine itself")
    # As if it were built here: the path, no word of the half of the way, nothing beside it.
    assert str(path) in out
    assert "Deferred" not in out
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert "orin: engine:" in err


def test_a_signed_bundle_is_installed_there(rack: Rack, run, tmp_path: Path) -> None:
    """The real installer on the board: verified, tested with its engine, and current there."""
    signer, other = ship_parts.new_signer(tmp_path), ship_parts.new_signer(tmp_path, "other")
    artifact = ship_parts.tiny_artifact(tmp_path / "one")
    bundle = make_bundle(artifact, tmp_path / "one.edgehp", key=signer.private)
    slots = rack.orin.folder / "slots"
    there = ["--root", slots, "--host", "orin", "--remote-command", EDGEHP]
    keys = ["--public-key", other.public, "--public-key", signer.public]
    install = ["install", bundle.path, *keys, *there]

    code, out, err = run(*install)
    assert code == 0, err
    assert out.startswith("slot a (current): one")
    assert [
        s for s in ("verify", "unpack", "self-test", "switch") if f"orin: {s}: " not in err
    ] == []
    code, out, err = run("status", "--json", *there)
    assert code == 0, err
    said = json.loads(out)
    assert (said["current"]["digest"], said["other"]) == (bundle.digest, None)
    assert Path(said["current"]["artifact"]) == slots / "slots" / "a" / "artifact"
    # One bit on the way, and what runs there stays.
    data = bytearray(bundle.path.read_bytes())
    data[-100] ^= 1
    bundle.path.write_bytes(data)
    code, _, err = run(*install)
    assert code == 4 and "altered" in err
    assert sorted(p.name for p in (slots / "slots").iterdir()) == ["a"]


def test_options_that_do_not_fit_together(rack: Rack, run, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("orin\n")
    assert run("bench", "--host", "orin", "--hosts", "hosts")[0] == 2
    assert run("bench", "--remote-command", "x")[0] == 2
    assert run("bench", "--host", "orin", "--all")[0] == 2
    assert run("validate", rack.artifact, "--remote-data-root", "x")[0] == 2
    assert run("bench", "--host", "orin", "--lab", "target=x")[0] == 2
    code, _, err = run("bench", "--host", "-oProxyCommand=touch pwned")
    assert code == 2
    assert "cannot be a host" in err
    assert run("bench", "--hosts", "missing")[0] == 1


def test_a_connection_lost_while_sending_leaves_nothing(rack: Rack, bench, tmp_path: Path) -> None:
    (tmp_path / "faces.zip").touch()
    os.truncate(tmp_path / "faces.zip", 10**9)

    def drop() -> None:
        assert eventually(lambda: list(rack.orin.temporary.rglob("faces.zip")))
        rack.orin.drop()

    thread = threading.Thread(target=drop)
    thread.start()
    code, out, err = bench("orin", "--frames", "faces.zip", "--json")
    thread.join()
    assert (code, out) == (5, "")
    assert "the connection to orin was lost while sending files" in err
    # `rack` sees to it that nothing is left there.


# What a board may put in place of tar: what it sends is what no board has a reason to.
ROGUE_TAR = """
import io, os, sys, tarfile
if "-cf" not in sys.argv:
    os.execv("/bin/tar", ["tar", *sys.argv[1:]])
with tarfile.open(fileobj=sys.stdout.buffer, mode="w|") as tar:
    info = tarfile.TarInfo(open(os.path.join(os.path.dirname(__file__), "name")).read())
    info.size = 1
    tar.addfile(info, io.BytesIO(b"x"))
"""


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("out/1/../../../../escaped", 5, "a hidden file or a path that leads elsewhere"),
        # Nobody asked for it, so it is not kept.
        ("/tmp/edgehp-escaped", 0, ""),
    ],
)
def test_a_board_that_sends_something_else(
    rack: Rack, bench, tmp_path: Path, name: str, code: int, words: str
) -> None:
    (rack.rogue.folder / "bin" / "name").write_text(name)
    found, _, err = bench("rogue", "--output", tmp_path / "out")
    assert found == code
    assert words in err
    assert not list(tmp_path.rglob("*"))
    assert not Path("/tmp/edgehp-escaped").exists()


def test_a_caller_that_falls_silent_is_given_up(
    rack: Rack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that swallows everything looks like this from the board."""
    monkeypatch.setattr(ssh, "PATIENCE_S", 1)
    monkeypatch.setattr(ssh, "BEAT_S", 60)
    orin = boards.parse_board("orin", program("hang=60"))
    with ssh.connected(orin, ["bench"], ssh.Stop(), str) as held:
        assert held.folder.startswith(str(rack.orin.temporary))
        assert Path(held.folder).stat().st_mode & 0o777 == 0o700
        held.send({}, Step("send"))
        rack.running(rack.orin)
        # As long as there are signs of life.
        for _ in range(15):
            time.sleep(0.1)
            held._sign(b".")
        assert rack.orin.leftovers()
        assert rack.orin.tidy(60)
        with pytest.raises(EnvironmentalError, match="lost while the command ran"):
            held.run(str)
    # Nor does it wait for the rest of what was to be sent.
    with ssh.connected(orin, ["bench"], ssh.Stop(), str) as held:
        held._stdin.write(b"00010000" + bytes(1000))
        held._stdin.flush()
        assert rack.orin.tidy(60)
