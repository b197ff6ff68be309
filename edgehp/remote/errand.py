"""One command on one board or on many: files go there, it runs, its results come back."""

from __future__ import annotations

import json
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from edgehp import __version__
from edgehp.errors import EdgehpError, EnvironmentalError
from edgehp.files import replacing
from edgehp.progress import Step, step
from edgehp.remote.boards import Board
from edgehp.remote.lab import Lab
from edgehp.remote.ssh import FOLDER, Stop, connected
from edgehp.remote.transfer import files_below

INTERRUPTED = 130
_KILLED = 128
_LOOK_S = 0.05
_ERROR = "edgehp: error: "


@dataclass(frozen=True)
class Parcel:
    """A word of the command that is a path: of what is sent, of what it writes, or both.

    Attributes:
        here: its path on this side, which also stands for it in the command's output.
        files: what is sent, by the path below it; ``""`` is a file itself.
        keep: takes what is at the path when the command has ended, and returns what it made of it.
            What was sent comes back from a command that ended with 0 alone.
    """

    here: Path
    files: Mapping[str, Path] = field(default_factory=dict)
    keep: Callable[[Path], Sequence[Path]] | None = None


def sent(source: Path) -> Parcel:
    """A file or folder that travels.

    Raises:
        DataError: nothing is there, or it cannot be read.
    """
    if source.is_file():
        return Parcel(source, {"": source})
    return Parcel(source, {file.as_posix(): source / file for file in files_below(source)})


def returned(destination: Path, *, folder: bool) -> Parcel:
    """A file that the command writes, or a folder that it writes files into, each kept whole."""

    def keep(found: Path) -> list[Path]:
        placed = []
        for source in sorted(found.rglob("*") if folder else [found]):
            if source.is_file():
                target = destination / source.relative_to(found) if folder else destination
                target.parent.mkdir(parents=True, exist_ok=True)
                with source.open("rb") as data, replacing(target) as file:
                    shutil.copyfileobj(data, file)
                placed.append(target)
        return placed

    return Parcel(destination, keep=keep)


@dataclass(frozen=True)
class Errand:
    """A command for a board.

    Attributes:
        board: where.
        words: after ``edgehp``.
        any_version: whether an edgehp of another version may do it.
        timeout_s: seconds that the command may take; None for as long as it takes.
        stdout_json: whether paths are named in JSON strings.
        turns: how often it runs, until it fails; a board is power cycled before each.
    """

    board: Board
    words: tuple[str | Parcel, ...]
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

    def __init__(self, errand: Errand, listener: Listener, alone: bool) -> None:
        self.board, self._errand, self._listener = errand.board, errand, listener
        self.stop = Stop()
        self.outcome: Outcome | None = None
        self.doing, self._said, self._folder = "wait", "", ""
        self._stdout: list[str] = []
        self._results: list[Path] = []
        # The command's words and its parcels, by their paths below the board's folder.
        self._words: list[str] = []
        self._parcels: dict[str, Parcel] = {}
        for i, word in enumerate(errand.words):
            if isinstance(word, Parcel):
                place = "out" if not word.files else "in" if word.keep is None else "both"
                names = (path.name.lstrip(".") for path in (word.here, word.here.resolve()))
                below = f"{place}/{i}/{next(filter(None, names), 'data')}"
                self._parcels[below] = word
            self._words.append(word if isinstance(word, str) else f"{FOLDER}/{below}")
        # Whoever listens here hears of the steps of one errand; those of two would mix.
        run = partial(copy_context().run, self._run) if alone else self._run
        self.thread = threading.Thread(target=run, name=self.board.name)

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
            if status == INTERRUPTED or (status and self.stop.presses):
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
        """The exit status of the last turn."""
        status, board = 0, self.board
        lab = Lab(self.stop, lambda text: self._listener(self.board, "stderr", text))
        with lab.taken(board) if board.tags else nullcontext(board) as self.board:
            for _ in range(self._errand.turns):
                if board.power_cycle:
                    lab.power_cycle()
                status = self._once()
                if status:
                    break
        return status

    def _once(self) -> int:
        errand = self._errand
        cargo = {
            f"{below}/{name}" if name else below: path
            for below, parcel in self._parcels.items()
            for name, path in parcel.files.items()
        }
        with ExitStack() as stack:
            with self._doing("connect"):
                link = stack.enter_context(
                    connected(self.board, self._words, self.stop, self._hear)
                )
            self._folder = link.folder
            if link.version != __version__ and not errand.any_version:
                raise EnvironmentalError(
                    f"{self.board.host} has edgehp {link.version or 'of an unknown version'}, this "
                    f"machine {__version__}: install the same version on both"
                )
            total = sum(path.stat().st_size for path in cargo.values())
            with self._doing("send", total) if cargo else nullcontext(Step("send")) as going:
                link.send(cargo, going)
            # Its own steps are among the lines that it writes.
            self.doing, self.stop.gently = "run", link.interrupt
            try:
                status = link.run(self._tell, errand.timeout_s)
            finally:
                self.stop.gently = None
            # To its end also where nothing is awaited: the folder must not go before that.
            awaited = any(parcel.keep is not None for parcel in self._parcels.values())
            if not awaited:
                # What the command did is done, whatever becomes of the connection now.
                with suppress(EnvironmentalError):
                    link.fetch(None)
                return status
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="edgehp-"))
            with self._doing("fetch"):
                link.fetch(Path(folder))
                for below, parcel in self._parcels.items():
                    found = Path(folder, below)
                    if parcel.keep is not None and found.exists():
                        self._results += parcel.keep(found)
        return status

    @contextmanager
    def _doing(self, name: str, size: float | None = None) -> Iterator[Step]:
        """Say what is going on: to `run_all`, and where it is the only errand to who listens."""
        self.doing = name
        with step(f"{self.board.name}: {name}", size, "B") as going:
            yield going

    def _here(self, line: str, quoted: bool = False) -> str:
        """A line of the command's output, with paths of this side in place of the board's."""
        for below, parcel in self._parcels.items():
            path = str(parcel.here)
            path = json.dumps(path, ensure_ascii=False)[1:-1] if quoted else path
            line = line.replace(f"{self._folder}/{below}", path)
        return line

    def _hear(self, line: str) -> None:
        """A line of stderr there."""
        line = self._here(line)
        if line.startswith(_ERROR):
            self._said = line.removeprefix(_ERROR)
        self._listener(self.board, "stderr", line)

    def _tell(self, line: str) -> None:
        """A line of stdout there."""
        line = self._here(line, self._errand.stdout_json)
        self._stdout.append(line)
        self._listener(self.board, "stdout", line)


def run_all(errands: Sequence[Errand], listener: Listener) -> list[Outcome]:
    """Do all errands at once and return how they ended, in order; one costs no other anything.

    Ctrl-C or SIGTERM interrupts the commands on the boards and waits for what they still have to
    say; a second one ends everything at once.
    """
    alone = len(errands) == 1
    jobs = [_Job(errand, listener, alone) for errand in errands]
    # Counted, not raised: an exception in the middle of a lock or a start would leave it broken.
    presses: list[int] = []
    before = {
        s: signal.signal(s, lambda number, _: presses.append(number))
        for s in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        for job in jobs:
            job.thread.start()
        with nullcontext() if alone else step("run", len(jobs), "boards") as going:
            while alive := [job for job in jobs if job.thread.is_alive()]:
                if going is not None:
                    text = ", ".join(f"{job.board.name}: {job.doing}" for job in alive)
                    going.update(len(jobs) - len(alive), text=text)
                time.sleep(_LOOK_S)
                if presses:
                    presses.clear()
                    for job in jobs:
                        job.stop.press()
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
