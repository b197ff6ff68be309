"""One command on one board: files go there, it runs, its results come back."""

from __future__ import annotations

import logging
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgehp.errors import EdgehpError, EnvironmentalError
from edgehp.files import replacing
from edgehp.remote.boards import Board
from edgehp.remote.control import INTERRUPTED, Control, Interrupted
from edgehp.remote.lease import Lease
from edgehp.remote.scripts import FOLDER_GONE, RUN
from edgehp.remote.ssh import CONNECTION_FAILED, ConnectionLostError, Session, plain
from edgehp.remote.transfer import Cargo, fetch, files_below, send

__all__ = ["Errand", "Listener", "Outcome", "Returned", "Sent", "run"]

logger = logging.getLogger(__name__)

_LONGEST_LINE = 1 << 26
_KILLED = 128
_ATTEMPTS = 3
_PAUSE_S = 2.0


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
        step: what is going on, in words for a person.
    """

    stdout: Callable[[str], None]
    stderr: Callable[[str], None]
    step: Callable[[str], None]


def run(board: Board, errand: Errand, control: Control, listener: Listener) -> Outcome:
    """Do an errand; every failure becomes its outcome.

    The board's folder is private, and removed whatever happens.
    """
    started = time.monotonic()
    job = _Job(board, errand, control, listener)
    try:
        status, error = job.run()
    except Interrupted:
        status, error = INTERRUPTED, "interrupted"
    except EdgehpError as e:
        if control.abandoned:
            status, error = INTERRUPTED, "interrupted"
        else:
            status, error = e.exit_code, str(e)
    except OSError as e:
        status, error = 1, f"{e.filename or board.host}: {e.strerror or e}"
    seconds = time.monotonic() - started
    text = "\n".join(job.stdout)
    return Outcome(board, status, error, seconds, text, tuple(job.results))


class _Job:
    """One errand under way."""

    def __init__(self, board: Board, errand: Errand, control: Control, listener: Listener) -> None:
        self.board, self.errand, self.control, self.listener = board, errand, control, listener
        self.stdout: list[str] = []
        self.results: list[Path] = []
        self._said = ""
        self._sending = False

    def run(self) -> tuple[int, str | None]:
        cargo = self._cargo()
        attempt = 0
        while True:
            try:
                status = self._once(cargo)
                break
            except ConnectionLostError as e:
                # Nothing has run yet and the board has tidied up: from the beginning.
                attempt += 1
                if not self._sending or attempt == _ATTEMPTS:
                    raise
                self.control.check()
                logger.warning("%s; trying again", e)
                time.sleep(_PAUSE_S * attempt)
        if status == 0:
            return 0, None
        if status == INTERRUPTED or self.control.interrupted:
            return INTERRUPTED, "interrupted"
        return status, self._said or f"the command ended with exit code {status}"

    def _once(self, cargo: Sequence[Cargo]) -> int:
        self._sending = False
        self.listener.step("connecting")
        with Lease(self.board, track=self.control.track) as lease:
            if not self.errand.any_version:
                lease.require_same_version()
            if cargo:
                self._sending = True
                self._send(lease, cargo)
                self._sending = False
            self.control.check()
            status = self._command(lease)
            self._fetch(lease, status)
            return status

    def _cargo(self) -> list[Cargo]:
        cargo: list[Cargo] = []
        for i, word in enumerate(self.errand.words):
            if isinstance(word, Sent):
                name = f"{i}/{_name(word.source)}"
                if word.files is None:
                    cargo += files_below(word.source, name)
                else:
                    cargo += [Cargo(word.source / f, f"{name}/{f}") for f in word.files]
        return cargo

    def _send(self, lease: Lease, cargo: Sequence[Cargo]) -> None:
        def watch(done: int, total: int) -> None:
            self.listener.step(f"sending {done / 1e6:.1f} of {total / 1e6:.1f} MB")

        try:
            send(lease, cargo, watch, self.control.track)
        finally:
            self.control.track(None)

    def _places(self, folder: str) -> dict[str, str]:
        """Paths there and what a reader here should see in their place, longest first."""
        places = {}
        for i, word in enumerate(self.errand.words):
            if isinstance(word, Sent):
                places[f"{folder}/in/{i}/{_name(word.source)}"] = str(word.shown or word.source)
            elif isinstance(word, Returned):
                places[_returned(folder, i, word)] = str(word.destination)
        return dict(sorted(places.items(), key=lambda p: len(p[0]), reverse=True))

    def _words(self, folder: str) -> list[str]:
        words = []
        for i, word in enumerate(self.errand.words):
            if isinstance(word, Sent):
                words.append(f"{folder}/in/{i}/{_name(word.source)}")
            elif isinstance(word, Returned):
                words.append(_returned(folder, i, word))
            else:
                words.append(word)
        return words

    def _command(self, lease: Lease) -> int:
        places = self._places(lease.folder)

        def here(line: str, quoted: bool = False) -> str:
            for there, path in places.items():
                line = line.replace(there, _in_json(path) if quoted else path)
            return line

        def stderr(line: str) -> None:
            line = here(line)
            if line.startswith("edgehp: error: "):
                self._said = line.removeprefix("edgehp: error: ")
            self.listener.stderr(line)

        self.listener.step("running")
        arguments = [*self.board.command, *self._words(lease.folder)]
        with lease.session(RUN, arguments, on_stderr=stderr) as session:
            self.control.track(session, lease)
            reader = threading.Thread(target=self._read, args=(session, here), daemon=True)
            reader.start()
            try:
                status = self._wait(session, lease)
            finally:
                self.control.track(None)
            reader.join(5)
            ended = status in (CONNECTION_FAILED, FOLDER_GONE) or status < 0
            if ended or not lease.alive:
                # Whatever the status says: without its connection the board has stopped it.
                self.control.check()
                raise lease.lost("the command ran", session)
            if status > _KILLED and status != INTERRUPTED and not self._said:
                self._said = f"the command was killed by signal {status - _KILLED}"
            return status

    def _read(self, session: Session, here: Callable[[str, bool], str]) -> None:
        out = session.begin()
        while data := out.readline(_LONGEST_LINE):
            line = plain(data.decode("utf-8", "replace").rstrip("\r\n"))
            line = here(line, self.errand.stdout_json)
            self.stdout.append(line)
            self.listener.stdout(line)

    def _wait(self, session: Session, lease: Lease) -> int:
        """The exit status of the command; ends it when its time is over or its folder is lost."""
        limit = self.errand.timeout_s
        end = None if limit is None else time.monotonic() + limit
        while True:
            try:
                return session.wait(0.2)
            except subprocess.TimeoutExpired:
                pass
            if not lease.alive:
                # The board has stopped the command already, or cannot be reached by anybody.
                try:
                    return session.wait(2)
                except subprocess.TimeoutExpired:
                    session.kill()
                    return session.wait()
            if end is not None and time.monotonic() > end:
                session.kill()
                session.wait()
                raise EnvironmentalError(
                    f"the command did not end on {self.board.host} within {limit:g} s and was "
                    "stopped; allow more with --remote-timeout, or look at the board"
                )

    def _fetch(self, lease: Lease, status: int) -> None:
        """Put results where the command would have put them here, each whole or not at all."""
        coming: list[tuple[int, Sent | Returned]] = [
            (i, w)
            for i, w in enumerate(self.errand.words)
            if isinstance(w, Returned)
            or (isinstance(w, Sent) and w.keep is not None and status == 0)
        ]
        if not coming:
            return
        self.listener.step("fetching results")
        with tempfile.TemporaryDirectory(prefix="edgehp-") as text:
            folder = Path(text)
            for i, word in coming:
                into = folder / str(i)
                into.mkdir()
                what = f"in/{i}" if isinstance(word, Sent) else f"out/{i}"
                try:
                    found = fetch(lease, what, into, self.control.track)
                finally:
                    self.control.track(None)
                if found is None:
                    if isinstance(word, Sent):
                        raise EnvironmentalError(f"{self.board.host}: {what} has gone there")
                elif isinstance(word, Returned):
                    self.results += (word.keep or _placing(word))(found)
                elif word.keep is not None:
                    self.results += word.keep(found / _name(word.source))


def _placing(word: Returned) -> Callable[[Path], Sequence[Path]]:
    return lambda found: _place(found, word)


def _place(found: Path, word: Returned) -> list[Path]:
    sources = sorted(p for p in found.rglob("*") if p.is_file())
    for below in (s.relative_to(found) for s in sources):
        # No result is called so, but what steers a shell or a repository is.
        if word.folder and any(part.startswith(".") for part in below.parts):
            raise EnvironmentalError(
                f"the board sent {str(below)!r}, a hidden file, as a result; nothing of it is kept"
            )
    placed = []
    for source in sources:
        below = source.relative_to(found)
        # A file was given a folder of its own there: it is the only one that is asked for.
        if not word.folder and below != Path(_name(word.destination)):
            continue
        target = word.destination / below if word.folder else word.destination
        target.parent.mkdir(parents=True, exist_ok=True)
        with source.open("rb") as data, replacing(target) as file:
            while piece := data.read(1 << 20):
                file.write(piece)
        placed.append(target)
    return placed


def _name(path: Path) -> str:
    return path.name or path.resolve().name or "data"


def _returned(folder: str, index: int, word: Returned) -> str:
    below = "" if word.folder else f"/{_name(word.destination)}"
    return f"{folder}/out/{index}{below}"


def _in_json(text: str) -> str:
    import json

    return json.dumps(text, ensure_ascii=False)[1:-1]
