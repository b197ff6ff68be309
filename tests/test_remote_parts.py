"""What needs no server: names of boards, lists of them, and scripts past any login shell."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pytest

from edgehp.cli._remote import print_outcomes
from edgehp.errors import DataError, EnvironmentalError, UsageError
from edgehp.remote.boards import Board, parse_board, parse_lab, read_boards
from edgehp.remote.errand import Outcome, exit_code
from edgehp.remote.ssh import MARK, Stop, connected, connection_error, encode, ssh_command
from edgehp.remote.transfer import plain, unpack


@pytest.mark.parametrize(
    "host",
    ["orin", "user@orin", "10.0.0.7", "ssh://me@orin.lab:2222", "[fe80::1%eth0]", "fe80::1", "a_b"],
)
def test_hosts_as_ssh_takes_them(host: str) -> None:
    assert parse_board(host) == Board(host, ("edgehp",))


@pytest.mark.parametrize(
    "host",
    [
        "",
        "-oProxyCommand=touch x",
        "user@-oProxyCommand=x",
        "-l@orin",
        "orin;reboot",
        "orin reboot",
        "$(reboot)",
        "`id`@orin",
        "orin\n",
        "orin\0",
        "a" * 300,
        "user@",
        "ssh://",
        "ssh://orin/path",
        "ü",
    ],
)
def test_hosts_that_are_something_else(host: str) -> None:
    with pytest.raises(UsageError, match="cannot be a host"):
        parse_board(host)


@pytest.mark.parametrize("command", ["", "  ", "'open", "a\0b"])
def test_commands_that_are_none(command: str) -> None:
    with pytest.raises(UsageError, match="--remote-command"):
        parse_board("orin", command)


def test_a_list_of_boards(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# rack 1\norin\n\n  me@xavier  '~/my venv/bin/edgehp' # slow\nthor x -y\n")
    assert read_boards(path, "python3 -m edgehp") == (
        Board("orin", ("python3", "-m", "edgehp")),
        Board("me@xavier", ("~/my venv/bin/edgehp",)),
        Board("thor", ("x", "-y")),
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "an empty file"),
        (b"# none\n", "found 0 hosts"),
        (b"orin\nxavier\norin\n", "line 3: orin is in the list twice"),
        (b"\xff\xfe", "UTF-16"),
        ("".join(f"b{i}\n" for i in range(300)).encode(), "found 300 hosts"),
    ],
)
def test_lists_that_are_none(tmp_path: Path, text: bytes, words: str) -> None:
    path = tmp_path / "hosts"
    path.write_bytes(text)
    with pytest.raises(DataError, match=words):
        read_boards(path)
    with pytest.raises(UsageError, match="line 2"):
        path.write_bytes(b"orin\n-x\n")
        read_boards(path)


def test_boards_of_a_lab() -> None:
    found = parse_lab("target=orin-nano-8gb,room=2", "x -y", power_cycle=True)
    assert (found.tags, found.power_cycle) == (("target=orin-nano-8gb", "room=2"), True)
    assert (found.command, found.name) == (("x", "-y"), "target=orin-nano-8gb,room=2")
    for tags in ("", "target", "target=", "=x", "a=b,", "a=b;c", "--wait", "Room=2"):
        with pytest.raises(UsageError, match="expected KEY=VALUE"):
            parse_lab(tags)


HOSTILE = ["plain", "a b", "-rf", "$(id)", "`id`", "'", '"', "\\", "new\nline", "!!", "~", "*", "",
           os.fsdecode(b"\xff")]  # fmt: skip


@pytest.mark.parametrize("shell", ["sh", "bash", "zsh", "fish", "csh", "tcsh"])
def test_words_reach_a_script_as_they_are(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    line = encode(f'printf "%s\\0" {shlex.join(HOSTILE)}')
    assert "\n" not in line
    done = subprocess.run([shell, "-c", line], capture_output=True, check=True, cwd=tmp_path)
    assert done.stdout.startswith(b"\n" + MARK)
    said = done.stdout.removeprefix(b"\n" + MARK).split(b"\0")[:-1]
    assert said == [os.fsencode(w) for w in HOSTILE]


def test_what_a_board_writes_steers_no_terminal() -> None:
    assert plain("\x1b]0;x\x07a\tb\x7f\r\x9b31m") == "]0;xa\tb31m"


def test_ssh_is_the_users_own_but_never_lax(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("EDGEHP_SSH", "myssh -F 'a file' -o StrictHostKeyChecking=no")
    words = ssh_command(tmp_path)
    assert words[0] == "myssh"
    # The first value wins.
    assert words.index("StrictHostKeyChecking=yes") < words.index("StrictHostKeyChecking=no")
    assert words[words.index("-F") + 1] == "a file"
    for text in ("", "'open"):
        monkeypatch.setenv("EDGEHP_SSH", text)
        with pytest.raises(UsageError, match="EDGEHP_SSH"):
            ssh_command(tmp_path)


def test_no_ssh_client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for text, error, words in (
        (str(tmp_path / "ssh"), EnvironmentalError, "openssh-client"),
        ("'open", UsageError, "EDGEHP_SSH"),
    ):
        monkeypatch.setenv("EDGEHP_SSH", text)
        with pytest.raises(error, match=words), connected(Board("orin"), [], Stop(), str):
            pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("lacks", "words"),
    [
        ("TMPDIR=/nowhere", "orin: no private folder can be made there .*; free space"),
        ("PATH=few", "orin: the command 'mktemp' is missing there .Debian, Ubuntu: coreutils"),
    ],
)
def test_what_a_board_must_have(
    lacks: str, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By a client that reaches this machine without a server."""
    for tool in ("sh", "base64"):
        (tmp_path / "few" / tool).parent.mkdir(exist_ok=True)
        (tmp_path / "few" / tool).symlink_to(str(shutil.which(tool)))
    ssh = tmp_path / "ssh"
    ssh.write_text(f'#!/bin/sh\nfor last; do :; done\nexport {lacks}\neval "$last"\n')
    ssh.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EDGEHP_SSH", str(ssh))
    with (
        pytest.raises(EnvironmentalError, match=words),
        connected(Board("orin"), [], Stop(), str),
    ):
        pass


def test_what_ssh_says_steers_no_terminal() -> None:
    error = connection_error("orin", "connecting", "first\nlast \x1b[2Jwords\n\n")
    assert str(error).startswith("orin cannot be reached (last [2Jwords): check")


@pytest.mark.parametrize(
    ("codes", "code"), [((0, 0), 0), ((0, 5), 5), ((3, 5), 1), ((6, 6), 6), ((5, 130), 130)]
)
def test_the_exit_code_of_many(codes: tuple[int, ...], code: int) -> None:
    assert exit_code([Outcome(Board("x"), c, None, 0.0) for c in codes]) == code


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": 1, "a": 2}', '"\\ud800"', "1" * 5000, "no"])
def test_what_a_board_calls_json_costs_no_other_board_its_row(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    outcomes = [Outcome(Board(h), 0, None, 1.0, t) for h, t in (("a", text), ("b", '{"x": 1}'))]
    print_outcomes(outcomes, as_json=True)
    assert [row["result"] for row in json.loads(capsys.readouterr().out)] == [None, {"x": 1}]


LONG = "out/" + "n" * 150


def archive(*members: tuple[str, bytes, dict[str, Any]]) -> bytes:
    """What a board sends: these members."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w|", format=tarfile.GNU_FORMAT) as tar:
        for name, data, more in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for key, value in more.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def test_long_names_come_back(tmp_path: Path) -> None:
    unpack(io.BytesIO(archive((LONG, b"x", {}))), tmp_path, "rogue")
    assert (tmp_path / LONG).read_bytes() == b"x"


def negative(name: str) -> bytes:
    """A member that says it is smaller than nothing."""
    header = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 12
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + bytes(1024)


def endless() -> bytes:
    """An extended header that tarfile would read until there is no memory."""
    header = tarfile.TarInfo("h")
    header.type, header.size = tarfile.XHDTYPE, 8 << 30
    return header.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (archive(("out/../../../escaped", b"x", {})), "leads elsewhere; nothing of it is kept"),
        (archive(("out/.bashrc", b"x", {})), "a hidden file"),
        (archive(("out/x\x1b[2J", b"x", {})), "no plain file of its results"),
        (archive(("out/x", b"x" * 1000, {}))[:700], "did not arrive whole"),
    ],
)
def test_names_that_no_result_has(sent: bytes, words: str, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentalError, match=words):
        unpack(io.BytesIO(sent), tmp_path, "rogue")


@pytest.mark.parametrize(
    "sent",
    [
        # tarfile would believe it about the next member.
        archive(("h", b"18 path=/etc/x1234\n", {"type": tarfile.XHDTYPE}), (LONG, b"x", {})),
        archive(("h", b"9 size=-1\n", {"type": tarfile.XGLTYPE}), (LONG, b"x", {})),
        archive(("././@LongLink", b"n" * 5000, {"type": tarfile.GNUTYPE_LONGNAME})),
        archive(("././@LongLink", b"/etc/passwd\0", {"type": tarfile.GNUTYPE_LONGLINK})),
        archive(("out/sparse", b"x" * 512, {"type": tarfile.GNUTYPE_SPARSE})),
        archive(("out/link", b"", {"type": tarfile.LNKTYPE, "linkname": "/etc/passwd"})),
        archive(("out/device", b"", {"type": tarfile.CHRTYPE})),
        archive(("out/fifo", b"", {"type": tarfile.FIFOTYPE})),
        negative("out/x"),
        endless(),
    ],
)
def test_headers_that_no_board_needs(sent: bytes, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentalError, match=r"rogue sent .* no plain file .* nothing of it"):
        unpack(io.BytesIO(sent), tmp_path, "rogue")
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_a_press_ends_what_goes_on_but_not_what_tidies_up() -> None:
    stop = Stop()
    with stop.start(["sleep", "30"], "") as going:
        with stop.start(["sleep", "30"], "", anyway=True) as tidying:
            stop.press()
            with pytest.raises(subprocess.TimeoutExpired):
                tidying.wait(0.3)
            tidying.kill()
        going.kill()
    with pytest.raises(EnvironmentalError, match="interrupted"):
        stop.start(["true"], "")
    stop.start(["true"], "", anyway=True).communicate()
