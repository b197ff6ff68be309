"""One command on one board or on many: files go there, it runs, its results come back."""

from __future__ import annotations

import json
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from edgehp import __version__
from edgehp.errors import EdgehpError, EnvironmentalError
from edgehp.files import replacing
from edgehp.progress import Step, step
from edgehp.remote.boards import Board
from edgehp.remote.lab import Booking
from edgehp.remote.ssh import FOLDER, Link
from edgehp.remote.transfer import fetch, files_below, send

INTERRUPTED = 130
_KILLED = 128
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
        turns: how often it runs, until it fails; a board is power cycled before each.
    """

    words: tuple[str | Sent | Returned, ...]
    any_version: bool = False
    timeout_s: float | None = None
    stdout_json: bool = False
    turns: int = 1


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


# Told, from a thread of the errand: by which board, "stdout" or "stderr", and a line.
Listener = Callable[[Board, str, str], None]


class _Job:
    """One errand under way, in a thread of its own."""

    def __init__(self, board: Board, errand: Errand, listener: Listener, alone: bool) -> None:
        self.board, self.errand, self._listener = board, errand, listener
        self.outcome: Outcome | None = None
        self.doing = "wait"
        # What is held of the board so far, for `abandon`: a reservation, then a connection.
        self._held: Booking | Link | None = None
        self._link: Link | None = None
        self._running = self._interrupted = False
        self._stdout: list[str] = []
        self._results: list[Path] = []
        self._said = ""
        # Whoever listens here hears of the steps of one errand; those of two would mix.
        run = partial(copy_context().run, self._run) if alone else self._run
        self.thread = threading.Thread(target=run, name=board.name)

    def _say(self, kind: str, text: str) -> None:
        self._listener(self.board, kind, text)

    def interrupt(self) -> None:
        """As Ctrl-C: a running command may finish its report, everything else ends at once."""
        self._interrupted = True
        if self._running and self._link is not None:
            self._link.interrupt()
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
            status = self._do()
            # Only now is all known that it said.
            error = self._said
        except EdgehpError as e:
            status, error = e.exit_code, str(e)
        except OSError as e:
            status, error = 1, f"{e.filename or self.board.name}: {e.strerror or e}"
        finally:
            # A fault of this program shows its traceback as well.
            if status == INTERRUPTED or (status and self._interrupted):
                status, error = INTERRUPTED, "interrupted"
            elif status > _KILLED:
                error = error or f"the command was killed by signal {status - _KILLED}"
            elif status:
                error = error or f"the command ended with exit code {status}"
            self.outcome = Outcome(
                self.board,
                status,
                error if status else None,
                time.monotonic() - started,
                "\n".join(self._stdout),
                tuple(self._results),
            )

    def _do(self) -> int:
        cargo: dict[str, Path] = {}
        for i, word in enumerate(self.errand.words):
            if isinstance(word, Sent):
                cargo |= word.cargo(f"{i}/{_name(word.source)}")
        status, booking = 0, None
        with ExitStack() as stack:
            if self.board.tags:
                self._held = booking = Booking(self.board, partial(self._say, "stderr"))
                self.board = stack.enter_context(booking)
            for _ in range(self.errand.turns):
                if booking is not None and self.board.power_cycle:
                    self._held = booking
                    booking.power_cycle()
                status = self._once(cargo)
                if status:
                    break
        return status

    def _once(self, cargo: Mapping[str, Path]) -> int:
        if self._interrupted:
            raise EnvironmentalError("interrupted")
        self._held = self._link = link = Link(self.board, self._hear)
        with link:
            words = [_there(i, word) for i, word in enumerate(self.errand.words)]
            with self._doing("connect"):
                found = link.open(words, self._back(0), self._back(1))
            if found != __version__ and not self.errand.any_version:
                raise EnvironmentalError(
                    f"{self.board.host} has edgehp {found or 'of an unknown version'}, this "
                    f"machine {__version__}: install the same version on both"
                )
            total = sum(path.stat().st_size for path in cargo.values())
            with self._doing("send", total) if cargo else nullcontext(Step("send")) as going:
                send(link, cargo, going)
            # Its own steps are among the lines that it writes.
            self.doing = "run"
            status, size = self._command(link)
            self._fetch(link, status, size)
        return status

    @contextmanager
    def _doing(self, name: str, size: float | None = None) -> Iterator[Step]:
        """Say what is going on: to `run_all`, and where it is the only errand to who listens."""
        self.doing = name
        with step(f"{self.board.name}: {name}", size, "B") as going:
            yield going

    def _back(self, status: int) -> list[str]:
        """What comes back after the command has ended with `status`, below the board's folder."""
        words = enumerate(self.errand.words)
        sent = [f"in/{i}" for i, w in words if isinstance(w, Sent) and w.keep and status == 0]
        return (["out"] if any(isinstance(w, Returned) for w in self.errand.words) else []) + sent

    def _here(self, line: str, quoted: bool = False) -> str:
        """A line of the command's output, with paths of this side in place of the board's."""
        link = self._link
        # From behind, or 1 would be found in 10.
        for i, word in reversed([*enumerate(self.errand.words)]):
            if isinstance(word, str) or link is None:
                continue
            shown = word.shown or word.source if isinstance(word, Sent) else word.destination
            path = json.dumps(str(shown), ensure_ascii=False)[1:-1] if quoted else str(shown)
            line = line.replace(_there(i, word).replace(FOLDER, link.folder), path)
        return line

    def _hear(self, line: str) -> None:
        """A line of stderr there; before there is a folder it is a login shell's."""
        if self._link is None or not self._link.folder:
            return
        line = self._here(line)
        if line.startswith(_ERROR):
            self._said = line.removeprefix(_ERROR)
        self._say("stderr", line)

    def _tell(self, line: str) -> None:
        """A line of stdout there."""
        line = self._here(line, self.errand.stdout_json)
        self._stdout.append(line)
        self._say("stdout", line)

    def _command(self, link: Link) -> tuple[int, int]:
        """The exit status of the command, and the bytes of results that follow."""
        limit = self.errand.timeout_s
        timer = threading.Timer(limit or 0, link.stop)
        timer.daemon = True
        self._running = True
        try:
            if limit is not None:
                timer.start()
            if self._interrupted:
                link.interrupt()
            return link.read(self._tell)
        except EnvironmentalError as e:
            if limit is None or not timer.finished.is_set():
                raise
            raise EnvironmentalError(
                f"the command did not end on {self.board.name} within {limit:g} s and was "
                "stopped\nhint: allow more with --remote-timeout, or look at the board"
            ) from e
        finally:
            self._running = False
            timer.cancel()

    def _fetch(self, link: Link, status: int, size: int) -> None:
        """Put results where the command would have put them here, each whole or not at all."""
        if not size:
            return
        with self._doing("fetch"), tempfile.TemporaryDirectory(prefix="edgehp-") as folder:
            fetch(link, size, Path(folder))
            for i, word in enumerate(self.errand.words):
                if isinstance(word, Sent) and word.keep is not None and status == 0:
                    self._results += word.keep(Path(folder, "in", str(i), _name(word.source)))
                found = Path(folder, "out", str(i))
                if isinstance(word, Returned) and found.is_dir():
                    self._results += _place(found, word) if word.keep is None else word.keep(found)


def _there(index: int, word: str | Sent | Returned) -> str:
    """A word of the command as it is on the board."""
    if isinstance(word, str):
        return word
    if isinstance(word, Sent):
        return f"{FOLDER}/in/{index}/{_name(word.source)}"
    return f"{FOLDER}/out/{index}" + ("" if word.folder else f"/{_name(word.destination)}")


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


def run_all(errands: Sequence[tuple[Board, Errand]], listener: Listener) -> list[Outcome]:
    """Do all errands at once and return how they ended, in order; one costs no other anything.

    Ctrl-C or SIGTERM interrupts the commands on the boards and waits for what they still have to
    say; a second one ends everything at once.
    """
    alone = len(errands) == 1
    jobs = [_Job(board, errand, listener, alone) for board, errand in errands]
    # Counted, not raised: an exception in the middle of a lock or a start would leave it broken.
    presses: list[int] = []
    before = {
        s: signal.signal(s, lambda number, _: presses.append(number))
        for s in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        for job in jobs:
            job.thread.start()
        passed_on = 0
        with nullcontext() if alone else step("run", len(jobs), "boards") as going:
            while alive := [job for job in jobs if job.thread.is_alive()]:
                if going is not None:
                    text = ", ".join(f"{job.board.name}: {job.doing}" for job in alive)
                    going.update(len(jobs) - len(alive), text=text)
                time.sleep(_LOOK_S)
                if len(presses) > passed_on:
                    for job in jobs:
                        if passed_on:
                            job.abandon()
                        else:
                            job.interrupt()
                    passed_on = len(presses)
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
