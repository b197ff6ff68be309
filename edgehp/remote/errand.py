"""One command on one board or on many: files go there, it runs, its results come back."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from edgehp.errors import EdgehpError, EnvironmentalError
from edgehp.files import replacing
from edgehp.progress import Step, step
from edgehp.remote.boards import Board
from edgehp.remote.lab import Booking
from edgehp.remote.lease import Lease
from edgehp.remote.ssh import RUN, Session, plain
from edgehp.remote.transfer import fetch, files_below, send

__all__ = ["Errand", "Listener", "Outcome", "Returned", "Sent", "exit_code", "run_all"]

INTERRUPTED = 130
_LONGEST_LINE = 1 << 26
_KILLED = 128
# What an interrupted command may take to write its report, and the board to tidy up.
_GRACE_S = 30.0
_LOOK_S = 0.05
_ERROR = "edgehp: error: "


@dataclass(frozen=True)
class Sent:
    """A word of the command that is a path: the file or folder travels.

    Attributes:
        source: here.
        files: only these of the folder, relative to it; None for all.
        keep: called with the file or folder as it came back, after the command has ended with 0;
            None where it does not come back.
        shown: what stands for it in the command's output here; `source` if None.
    """

    source: Path
    files: tuple[str, ...] | None = None
    keep: Callable[[Path], Sequence[Path]] | None = None
    shown: Path | None = None

    def cargo(self, name: str) -> dict[str, Path]:
        """Its files by their paths below `name`.

        Raises:
            DataError: nothing is there, or it cannot be read.
        """
        if self.source.is_file():
            return {name: self.source}
        files = files_below(self.source) if self.files is None else map(Path, self.files)
        return {f"{name}/{file.as_posix()}": self.source / file for file in files}


@dataclass(frozen=True)
class Returned:
    """A word of the command that is a path it writes to: what is there afterwards comes back.

    Attributes:
        destination: here; a file, or a folder that files are put into.
        folder: which of both.
        keep: called with the folder of what came back, in place of copying its files; returns
            what it has made.
    """

    destination: Path
    folder: bool
    keep: Callable[[Path], Sequence[Path]] | None = None


@dataclass(frozen=True)
class Errand:
    """A command for a board.

    Attributes:
        words: after ``edgehp``: text, or what travels.
        any_version: whether an edgehp of another version may do it.
        timeout_s: seconds that the command may take; None for as long as it takes.
        stdout_json: whether paths are named in JSON strings.
    """

    words: tuple[str | Sent | Returned, ...]
    any_version: bool = False
    timeout_s: float | None = None
    stdout_json: bool = False


@dataclass(frozen=True)
class Outcome:
    """How an errand ended.

    Attributes:
        board: where.
        exit_code: of the command, or of the error that kept it from running.
        error: one sentence; None where it ended with 0.
        seconds: wall clock, all steps.
        stdout: what the command printed.
        results: files that came back, where they are now.
    """

    board: Board
    exit_code: int
    error: str | None
    seconds: float
    stdout: str = ""
    results: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Listener:
    """Who is told what, from a thread of the errand.

    Attributes:
        stdout: each line of the command's stdout.
        stderr: each line of its stderr.
    """

    stdout: Callable[[str], None]
    stderr: Callable[[str], None]


class _Job:
    """One errand under way, in a thread of its own."""

    def __init__(self, board: Board, errand: Errand, listener: Listener, alone: bool) -> None:
        self.board, self.errand, self.listener = board, errand, listener
        self.outcome: Outcome | None = None
        self.doing = "wait"
        # What is held of the board so far, for `abandon`: a reservation, then a folder there.
        self._held: Booking | Lease | None = None
        self._stdout: list[str] = []
        self._results: list[Path] = []
        self._said = ""
        self._running = self._interrupted = False
        # Whoever listens here hears of the steps of one errand; those of two would mix.
        run = partial(copy_context().run, self._run) if alone else self._run
        self.thread = threading.Thread(target=run, name=board.name)

    def interrupt(self) -> None:
        """As Ctrl-C: a running command may finish its report, everything else ends at once."""
        if self._running and isinstance(self._held, Lease):
            self._interrupted = True
            self._held.interrupt()
        else:
            self.abandon()

    def abandon(self) -> None:
        """End what is going on; the board tidies up."""
        self._interrupted = True
        if self._held is not None:
            self._held.abandon()

    def _run(self) -> None:
        """Every failure becomes the outcome; the board's folder is removed whatever happens."""
        started = time.monotonic()
        status, error = 1, "edgehp itself failed; see above"
        try:
            status, error = self._do()
        except EdgehpError as e:
            status, error = e.exit_code, str(e)
        except OSError as e:
            status, error = 1, f"{e.filename or self.board.name}: {e.strerror or e}"
        finally:
            # A fault of this program shows its traceback as well.
            if status == INTERRUPTED or (status and self._interrupted):
                status, error = INTERRUPTED, "interrupted"
            elif status:
                error = error or f"the command ended with exit code {status}"
            self.outcome = Outcome(
                self.board,
                status,
                error or None,
                time.monotonic() - started,
                "\n".join(self._stdout),
                tuple(self._results),
            )

    def _do(self) -> tuple[int, str]:
        cargo: dict[str, Path] = {}
        for i, word in enumerate(self.errand.words):
            if isinstance(word, Sent):
                cargo |= word.cargo(f"{i}/{_name(word.source)}")
        with ExitStack() as stack:
            if self.board.lab is not None:
                self._held = booking = Booking(self.board, self.listener.stderr)
                self.board = stack.enter_context(booking)
            if self._interrupted:
                raise EnvironmentalError("interrupted")
            with self._doing("connect"):
                self._held = Lease(self.board)
                lease = stack.enter_context(self._held)
                if not self.errand.any_version:
                    lease.require_same_version()
            if cargo:
                size = sum(path.stat().st_size for path in cargo.values())
                with self._doing("send", size) as going:
                    send(lease, cargo, going)
            # Its own steps are among the lines that it writes.
            self.doing = "run"
            status = self._command(lease)
            self._fetch(lease, status)
        return status, self._said if status else ""

    @contextmanager
    def _doing(self, name: str, size: float | None = None) -> Iterator[Step]:
        """Say what is going on: to `run_all`, and where it is the only errand to who listens."""
        self.doing = name
        with step(f"{self.board.name}: {name}", size, "B") as going:
            yield going

    def _there(self, folder: str, index: int, word: Sent | Returned) -> str:
        """The path on the board of what travels."""
        if isinstance(word, Sent):
            return f"{folder}/in/{index}/{_name(word.source)}"
        below = "" if word.folder else f"/{_name(word.destination)}"
        return f"{folder}/out/{index}{below}"

    def _command(self, lease: Lease) -> int:
        words, places = [*self.board.command], {}
        for i, word in enumerate(self.errand.words):
            if isinstance(word, str):
                words.append(word)
                continue
            words.append(self._there(lease.folder, i, word))
            shown = word.shown or word.source if isinstance(word, Sent) else word.destination
            places[words[-1]] = str(shown)

        def here(line: str, quoted: bool = False) -> str:
            """A line of the command's output, with paths of this side in place of the board's."""
            for there in sorted(places, key=len, reverse=True):
                path = places[there]
                if quoted:
                    path = json.dumps(path, ensure_ascii=False)[1:-1]
                line = line.replace(there, path)
            return line

        def stderr(line: str) -> None:
            line = here(line)
            if line.startswith(_ERROR):
                self._said = line.removeprefix(_ERROR)
            self.listener.stderr(line)

        def read(session: Session) -> None:
            out = session.begin()
            while data := out.readline(_LONGEST_LINE):
                line = plain(data.decode("utf-8", "replace").rstrip("\r\n"))
                line = here(line, self.errand.stdout_json)
                self._stdout.append(line)
                self.listener.stdout(line)

        with lease.session(RUN, words, on_stderr=stderr) as session:
            reader = threading.Thread(target=read, args=(session,), daemon=True)
            reader.start()
            self._running = True
            if self._interrupted:
                lease.interrupt()
            try:
                status = self._wait(session, lease)
            finally:
                self._running = False
            reader.join(5)
            if session.lost or not lease.alive:
                # Whatever the status says: without its connection the board has stopped it.
                raise lease.lost("the command ran")
        if status > _KILLED and status != INTERRUPTED and not self._said:
            self._said = f"the command was killed by signal {status - _KILLED}"
        return status

    def _wait(self, session: Session, lease: Lease) -> int:
        """The exit status of the command; ends it when its time is over or its folder is lost."""
        limit = self.errand.timeout_s
        end = None if limit is None else time.monotonic() + limit
        while True:
            with suppress(subprocess.TimeoutExpired):
                return session.wait(0.2)
            if not lease.alive:
                # The board has stopped the command already, or cannot be reached by anybody.
                with suppress(subprocess.TimeoutExpired):
                    return session.wait(2)
                session.kill()
                return session.wait()
            if end is not None and time.monotonic() > end:
                # Before the session ends: its output stays open until the command has.
                lease.close()
                raise EnvironmentalError(
                    f"the command did not end on {self.board.name} within {limit:g} s and was "
                    "stopped\nhint: allow more with --remote-timeout, or look at the board"
                )

    def _fetch(self, lease: Lease, status: int) -> None:
        """Put results where the command would have put them here, each whole or not at all."""
        coming: dict[str, Sent | Returned] = {}
        for i, word in enumerate(self.errand.words):
            if isinstance(word, Returned):
                coming[f"out/{i}"] = word
            elif isinstance(word, Sent) and word.keep is not None and status == 0:
                coming[f"in/{i}"] = word
        if not coming:
            return
        with self._doing("fetch"), tempfile.TemporaryDirectory(prefix="edgehp-") as folder:
            fetch(
                lease, ["out", *(name for name in coming if name.startswith("in/"))], Path(folder)
            )
            for name, word in coming.items():
                found = Path(folder, name)
                if isinstance(word, Sent) and word.keep is not None:
                    self._results += word.keep(found / _name(word.source))
                elif isinstance(word, Returned) and found.is_dir():
                    self._results += _place(found, word) if word.keep is None else word.keep(found)


def _place(found: Path, word: Returned) -> list[Path]:
    placed = []
    for source in sorted(p for p in found.rglob("*") if p.is_file()):
        below = source.relative_to(found)
        # A file was given a folder of its own there: it is the only one that is asked for.
        if not word.folder and below != Path(_name(word.destination)):
            continue
        target = word.destination / below if word.folder else word.destination
        target.parent.mkdir(parents=True, exist_ok=True)
        with source.open("rb") as data, replacing(target) as file:
            shutil.copyfileobj(data, file)
        placed.append(target)
    return placed


def _name(path: Path) -> str:
    return path.name or path.resolve().name or "data"


def run_all(
    errands: Sequence[tuple[Board, Errand]], listener: Callable[[Board], Listener]
) -> list[Outcome]:
    """Do all errands at once and return how they ended, in order; one costs no other anything.

    Ctrl-C or SIGTERM interrupts the commands on the boards and waits for what they still have to
    say; a second one ends everything at once.
    """
    alone = len(errands) == 1
    jobs = [_Job(board, errand, listener(board), alone) for board, errand in errands]
    # Counted, not raised: an exception in the middle of a lock or a start would leave it broken.
    presses: list[int] = []
    before = {
        s: signal.signal(s, lambda number, _: presses.append(number))
        for s in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        for job in jobs:
            job.thread.start()
        passed_on, end = 0, float("inf")
        with nullcontext() if alone else step("run", len(jobs), "boards") as going:
            while alive := [job for job in jobs if job.thread.is_alive()]:
                if going is not None:
                    text = ", ".join(f"{job.board.name}: {job.doing}" for job in alive)
                    going.update(len(jobs) - len(alive), text=text)
                time.sleep(_LOOK_S)
                overdue = time.monotonic() > end
                if len(presses) > passed_on or overdue:
                    for job in jobs:
                        if passed_on or overdue:
                            job.abandon()
                        else:
                            job.interrupt()
                    passed_on = len(presses)
                    end = float("inf") if overdue else time.monotonic() + _GRACE_S
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return [job.outcome for job in jobs if job.outcome is not None]


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """0 where all ended so; the code all failures share, else 1; 130 after an interruption."""
    codes = {o.exit_code for o in outcomes if o.exit_code}
    if INTERRUPTED in codes:
        return INTERRUPTED
    return 0 if not codes else codes.pop() if len(codes) == 1 else 1
