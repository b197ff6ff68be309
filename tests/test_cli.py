"""The root of the command line: laziness, exit codes, errors in a sentence, tables and JSON."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from edgehp import __version__, errors
from edgehp.cli import main as root
from edgehp.cli._command import Command, note, start_logging
from edgehp.cli._display import Display
from edgehp.cli._output import format_table, print_json, wrapped
from edgehp.progress import Step, listening, step, track


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edgehp", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> int:
    """The exit code of a command that raises `error`."""

    @click.command("doctor")
    def command() -> None:
        raise error

    monkeypatch.setattr(root.LazyGroup, "get_command", lambda *_: command)
    with pytest.raises(SystemExit) as stopped:
        root.main(["doctor"])
    code = stopped.value.code
    assert isinstance(code, int)
    return code


HELPS = """
import sys
import click
from edgehp.cli.main import cli, main

def commands(group, words=()):
    context = click.Context(group)
    yield words
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from commands(command, (*words, name))
        else:
            yield (*words, name)

helps = list(commands(cli))
for words in helps:
    try:
        main([*words, "--help"])
    except SystemExit as e:
        assert e.code == 0, words
print(len(helps), *{name.partition(".")[0] for name in sys.modules}, file=sys.stderr)
"""


def test_no_help_imports_more_than_click(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HELPS],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,  # without a project file
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    count, *loaded = done.stderr.split()
    assert int(count) > len(root.COMMANDS)
    packages = {n for n in loaded if not n.startswith("_")} - sys.stdlib_module_names
    assert packages == {"click", "edgehp"}
    # What costs as much as a package: servers, processes, downloads.
    assert not {"asyncio", "concurrent", "http", "multiprocessing", "ssl"} & set(loaded)


@pytest.mark.parametrize("words", [[], ["repo"]])
def test_a_group_alone_shows_its_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        root.main(words)
    said = capsys.readouterr()
    assert said.out.startswith("Usage: ") and said.err == ""


def test_help_lists_commands_that_exist_in_order() -> None:
    text = CliRunner().invoke(root.cli, ["--help"]).stdout.partition("Commands:")[2]
    assert [line.split()[0] for line in text.splitlines() if line.strip()] == list(root.COMMANDS)
    assert __version__ in CliRunner().invoke(root.cli, ["--version"]).stdout


@pytest.mark.parametrize(
    ("arguments", "said", "hint"),
    [
        (["targtes"], "no command 'targtes'", "did you mean 'targets'?"),
        (["--nonsense"], "No such option", "edgehp --help"),
        (["bench", "--nonsense"], "No such option", "edgehp bench --help"),
        (["targets", "show"], "Missing argument", "edgehp targets show --help"),
    ],
)
def test_usage_errors_are_a_sentence_and_a_hint(
    arguments: list[str], said: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        root.main(arguments)
    out, err = capsys.readouterr()
    assert (stopped.value.code, out) == (2, "")
    first, last = err.splitlines()
    assert first.startswith(f"edgehp: error: {said}") and last == f"hint: {hint}"


def test_what_no_option_can_take_is_refused_before_anything_is_done(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for arguments, words in (
        (["run", "a.mp4", "--fps", "nan"], "'--fps': nan is no finite number"),
        (["bench", "--duration", "inf"], "'--duration': inf is no finite number"),
        (["validate", os.fsdecode(b"dist/caf\xe9")], "name is not UTF-8\nhint: rename it"),
        (["build", "-o", os.fsdecode(b"caf\xe9")], "name is not UTF-8\nhint: rename it"),
    ):
        with pytest.raises(SystemExit) as stopped:
            root.main(arguments)
        assert stopped.value.code and words in capsys.readouterr().err


def test_passwords_reach_no_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = "https://me:hush@host/a?token=hush"
    assert raising(monkeypatch, errors.DataError(f"{url} is no repository")) == 1
    start_logging()
    logging.getLogger("edgehp.somewhere").warning("%s again", url)
    note(url)
    said = capsys.readouterr().err
    assert said.count("https://me:***@host/a?token=***") == 3 and "hush" not in said


def test_opencv_writes_nothing_by_itself(tmp_path: Path) -> None:
    film = tmp_path / "a.mp4"
    film.write_bytes(b"\0\0\0\x18ftypisom" + bytes(500))
    done = run("predict", str(film), "--boxes", "1,1,50,50")
    assert done.returncode == 1 and "cannot be opened" in done.stderr
    assert all(line.startswith(("edgehp:", "hint:")) for line in done.stderr.splitlines())


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        *(
            (kind("found this, expected that"), code, "found this, expected that\n")
            for kind, code in {
                errors.EdgehpError: 1,
                errors.UsageError: 2,
                errors.DataError: 1,
                errors.CheckpointError: 1,
                errors.AccuracyError: 3,
                errors.CompatibilityError: 4,
                errors.EnvironmentalError: 5,
                errors.MeasurementError: 6,
            }.items()
        ),
        (PermissionError(13, "Permission denied", "/x/y"), 1, "/x/y: Permission denied\n"),
        (ModuleNotFoundError("no", name="onnx.helper"), 5, "[build]'"),
    ],
)
def test_errors_are_a_sentence_and_their_code(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    code: int,
    said: str,
) -> None:
    assert raising(monkeypatch, error) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("edgehp: error: ") and said in err


def test_an_error_without_its_hints_goes_into_another() -> None:
    error = errors.DataError("found this, expected that\nhint: do this\nhint: or that")
    assert error.sentence == "found this, expected that"
    assert errors.DataError("plain").sentence == "plain"


TERMINATED = """
import os, pathlib, signal, sys, time
import click
from edgehp.cli import main as root

@click.command("doctor")
def command():
    made = pathlib.Path(sys.argv[1])
    made.touch()
    try:
        ready, say = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(say, b"1")  # a signal before the fork is through would be lost
            time.sleep(60)
            os._exit(0)
        os.read(ready, 1)
        os.kill(child, signal.SIGTERM)
        print("child", os.waitpid(child, 0)[1], flush=True)
        time.sleep(60)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)  # as timeout does: a second one while tidying up
        made.unlink()

root.LazyGroup.get_command = lambda *_: command
root.main(["doctor"])
"""


def test_sigterm_tidies_up_as_ctrl_c_does(tmp_path: Path) -> None:
    made = tmp_path / "half-written"
    process = subprocess.Popen(
        [sys.executable, "-c", TERMINATED, str(made)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    # A forked child ends at once, without running what its parent has to tidy up.
    assert process.stdout.readline() == f"child {int(signal.SIGTERM)}\n"
    assert made.exists()
    process.terminate()
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.strip() == "edgehp: error: ended by SIGTERM; what was unfinished is removed"
    assert not made.exists()


def test_interruption_ends_with_130_and_puts_the_handler_of_sigterm_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert raising(monkeypatch, KeyboardInterrupt()) == 130
    assert signal.getsignal(signal.SIGTERM) is before


def test_reader_that_goes_away_is_no_traceback() -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "edgehp", "targets", "--json"],
            stdout=closed,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr == ""


def test_table_aligns_what_is_seen() -> None:
    styled = click.style("ok", fg="green")
    lines = format_table(["a", "n"], [(styled, 1.5), ("long", None)], right=(1,)).splitlines()
    assert [click.unstyle(line) for line in lines] == [
        "a       n",
        "----  ---",
        "ok    1.5",
        "long    -",
    ]


def test_table_refuses_a_ragged_row() -> None:
    with pytest.raises(ValueError, match="expected 2"):
        format_table(["a", "b"], [("one",)])


def test_json_has_paths_but_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"p": Path("a/b")})
    assert json.loads(capsys.readouterr().out) == {"p": "a/b"}
    with pytest.raises(ValueError):
        print_json({"x": float("nan")})


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def work(stream: io.StringIO) -> None:
    with Display(stream), step("build"):
        with step("crops"):
            for _ in track(range(3), "photos"):
                pass
        logging.getLogger("edgehp.test").warning("something to know")
        with step("quantize"), step("ranges", 2, "crops") as going:
            going.advance(2)


@pytest.fixture
def notes() -> Iterator[None]:
    before = logging.getLogger().handlers[:]
    start_logging()
    yield
    logging.getLogger().handlers[:] = before


@pytest.mark.usefixtures("notes")
def test_a_terminal_gets_a_live_display(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = Terminal()
    work(terminal)
    drawn = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    last = [line.strip() for line in drawn.rstrip().splitlines()[-3:]]
    assert re.fullmatch(r".crops +\d+\.\d s", last[0].replace(" ", "", 1))
    assert last[1].split()[1] == "quantize"
    assert last[2] == "! something to know"  # below what is done, without a module's name
    assert "\x1b[3" not in terminal.getvalue()  # no color


@pytest.mark.usefixtures("notes")
def test_elsewhere_progress_is_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    pipe = io.StringIO()
    work(pipe)
    lines = [re.sub(r"\d+\.\d", "N", line) for line in pipe.getvalue().splitlines()]
    assert lines == ["edgehp: crops: N s", "edgehp: quantize: N s"]
    assert capsys.readouterr().err == "edgehp: warning: something to know\n"


def test_without_rich_a_terminal_gets_the_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgehp.cli._display.find_spec", lambda _: None)
    terminal = Terminal()
    work(terminal)
    assert terminal.getvalue().startswith("edgehp: crops: ")


@pytest.mark.parametrize("loop", ["photos", ""])
def test_a_long_step_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch, loop: str) -> None:
    """Also where its loop has no name."""
    monkeypatch.setattr("edgehp.cli._display._PLAIN_SECONDS", 0.0)
    pipe = io.StringIO()
    with Display(pipe), step("label"), step(loop, 4, "crops") as going:
        going.advance()
    assert pipe.getvalue().startswith(f"edgehp: {loop or 'label'}: 1/4 crops")


def test_a_step_that_fails_says_where_it_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgehp.cli._display._PLAIN_SECONDS", 0.0)
    pipe = io.StringIO()
    with pytest.raises(errors.DataError), Display(pipe), step("build"), step("read"):
        raise errors.DataError("no")
    assert "read: stopped after" in pipe.getvalue()


@pytest.mark.usefixtures("notes")
def test_quiet_shows_no_progress_and_no_notes() -> None:
    @click.command("doctor", cls=Command)
    def command() -> None:
        work(pipe)
        note("nothing that matters")

    pipe = io.StringIO()
    for place in (["doctor", "--quiet"], ["-q", "doctor"]):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(root.LazyGroup, "get_command", lambda *_: command)
            done = CliRunner().invoke(root.cli, place)
        assert done.exit_code == 0 and done.output == "edgehp: warning: something to know\n"
    assert pipe.getvalue() == ""


def test_loops_are_counted_and_left_early_without_harm() -> None:
    seen: list[Step] = []

    class Listener:
        def begin(self, step: Step) -> Callable[[], None]:
            seen.append(step)
            return lambda: None

        def end(self, step: Step, completed: bool) -> None:
            assert completed

    with listening(Listener()):
        for i in track(iter(range(10)), "crops", total=10):
            if i == 4:
                break
    assert (seen[0].done, seen[0].total, seen[0].unit) == (4, 10, "crops")
    assert list(track([1, 2], "crops")) == [1, 2]  # without a listener: the loop alone


def test_sentences_are_wrapped_by_what_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    words = [click.style("word", fg="red", bold=True)] * 22
    text = wrapped(f"{' '.join(words)}\n  a command {'x' * 80}", "  ")
    seen = [click.unstyle(line) for line in text.splitlines()]
    assert [len(line) for line in seen[:-1]] == [49, 46, 16]  # ten words, then nine behind blanks
    assert seen[-1] == f"  a command {'x' * 80}"


def test_tables_fit_the_terminal() -> None:
    long = click.style(" ".join(["word"] * 40), fg="red")
    text = format_table(["name", "what", "n"], [("a", long, 1.5), ("b", "x", 2)], (2,), width=60)
    lines = text.splitlines()
    assert max(len(click.unstyle(line)) for line in lines) <= 60
    assert click.unstyle(text).split().count("word") == 40
    assert all(line.count("\x1b[31m") == line.count("\x1b[0m") for line in lines)
