# The functions of os are what is under test.
# ruff: noqa: PTH116, PTH123, PTH208
"""Power cuts: a process killed at any file-system call, and disks that lose what was not flushed.

Two layers, both without a compiler or privileges.

`deaths` runs an action in a forked child that dies by SIGKILL right before its n-th call of a
function of ``os`` (or of `open`); a write can also die half way. What the kernel had accepted is
kept, as after a crash of the process.

`cuts` runs an action here and notes, after every such call, what the folder holds and what was
flushed. Then it makes what may be found there after a power cut at each moment, by rules harsher
than those of any journalling file system:

- content that was not flushed with fsync is old, torn, zeros, or there;
- an entry of a folder (new file, removal, rename) that was not flushed by fsync of that folder did
  happen or did not, each independently of the others and of their order;
- a rename is atomic; flushing a file does not keep its name.
"""

from __future__ import annotations

import builtins
import gc
import io
import os
import random
import shutil
import signal
import stat
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Every function of os that looks at or changes a disk and that shipping may call.
CALLS = (
    "open", "close", "pread", "read", "write", "fsync", "fdatasync", "rename", "replace", "link",
    "symlink", "unlink", "remove", "mkdir", "rmdir", "truncate", "ftruncate", "stat", "lstat",
    "fstat", "statvfs", "listdir", "scandir", "utime", "chmod",
)  # fmt: skip
_NEVER = 10**9


@contextmanager
def no_flush() -> Iterator[None]:
    """Let os.fsync return at once: for what is not under test."""
    real = os.fsync
    os.fsync = lambda descriptor: None  # type: ignore[assignment]
    try:
        yield
    finally:
        os.fsync = real


def killed(action: Callable[[], object], point: int) -> int | None:
    """Run `action` in a child that dies before its file-system call number `point`, from 0.

    Flushing is left out in the child: for a process that dies it changes nothing. A write counts as
    two calls: before it, and half way.

    Returns:
        None if it was killed, else how many calls it made.

    Raises:
        AssertionError: the action raised.
    """
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        # From Python 3.12 on, of forking beside threads: the child only runs `action` and dies.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        _in_child(action, point, writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        told = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return None
    if not told.isdigit():
        raise AssertionError(f"the child failed at point {point}:\n{told}")
    return int(told)


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder in memory where there is one: some disks take long to remove thousands of them."""
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = Path(tempfile.mkdtemp(dir=place))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def deaths(
    action: Callable[[Path], object], source: Path, every: int, first: int
) -> Iterator[tuple[int, Path]]:
    """Copies of `source` after `action` was killed in them at every n-th call, and at the last."""
    with scratch() as folder:
        counted = shutil.copytree(source, folder / "counted")
        count = killed(lambda: action(counted), _NEVER) or 0
        for point in [*range(first % every, count - 1, every), count - 1]:
            # The copy is made here, so that every call of the child belongs to the action.
            copy = shutil.copytree(source, folder / str(point))
            assert killed(lambda: action(copy), point) is None  # noqa: B023
            yield point, copy
            shutil.rmtree(copy)


def cuts(
    action: Callable[[Path], object], source: Path, how: Sequence[str], rng: random.Random
) -> Iterator[tuple[str, Path]]:
    """What a copy of `source` may be after power cuts during `action`, every state once."""
    with scratch() as folder:
        copy = shutil.copytree(source, folder / "copy")
        recorder = _Recorder(copy)
        with _hooked(recorder.before, recorder.after):
            action(copy)
        seen = set()
        for number, moment in enumerate(recorder.moments):
            for each in how:
                state = moment.after_cut(each, rng)
                if (key := hash(tuple(state.items()))) in seen:
                    continue
                seen.add(key)
                found = folder / "found"
                for path, content in state.items():
                    if content is None:
                        (found / path).mkdir()
                    else:
                        (found / path).write_bytes(content)
                yield f"{each} at {number}", found
                shutil.rmtree(found)
    # One that always found the same would prove nothing. A flush ends in a state that was possible
    # before it, so that a short action has fewer states than calls.
    assert 2 * len(seen) > len(recorder.moments)


def _in_child(action: Callable[[], object], point: int, writing: int) -> None:
    count = 0
    write = os.write

    def before(name: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if count == point:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        if name == "write":
            if count == point:
                write(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

    code = 1
    # The collector would touch, and so copy, every page that is shared with the parent.
    gc.disable()
    try:
        with no_flush(), _hooked(before, lambda *_: None):
            action()
        write(writing, str(count).encode())
        code = 0
    except BaseException:
        write(writing, traceback.format_exc().encode())
    finally:
        # Not sys.exit: the child must not run the parent's clean-up.
        os._exit(code)


@contextmanager
def _hooked(
    before: Callable[[str, tuple[Any, ...]], None], after: Callable[[str, tuple[Any, ...]], None]
) -> Iterator[None]:
    """Call `before` and `after` around every function of `CALLS` and `open`."""
    inside = False

    def wrap(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal inside
            if inside:
                return real(*arguments, **options)
            inside = True
            try:
                before(name, arguments)
                result = real(*arguments, **options)
                after(name, arguments)
                return result
            finally:
                inside = False

        return call

    real = {name: getattr(os, name) for name in CALLS}
    opened = builtins.open
    try:
        for name, function in real.items():
            setattr(os, name, wrap(name, function))
        builtins.open = io.open = wrap("open", opened)
        yield
    finally:
        for name, function in real.items():
            setattr(os, name, function)
        builtins.open = io.open = opened


# --- disks that lose what was not flushed ---------------------------------------------------------


# An entry change: (folder, name, object or None). A rename is two of them in one operation.
_Change = tuple[int, str, "int | None"]


@dataclass
class _Moment:
    """The disk after one call: what is flushed, and what only the kernel knows."""

    root: int
    entries: dict[int, dict[str, int]]
    pending: list[list[_Change]]
    flushed: dict[int, bytes]
    contents: dict[int, bytes]

    def after_cut(self, how: str, rng: random.Random) -> dict[str, bytes | None]:
        """What may be found after a power cut now: contents by path, None of a folder.

        Args:
            how: ``"nothing"`` that was not flushed is there, ``"everything"`` is, ``"names"``
                (all entries, no content), or ``"random"``.
            rng: for ``"random"``, and for where torn files are torn.
        """
        entries = {folder: dict(names) for folder, names in self.entries.items()}
        for operation in self.pending:
            if how in ("everything", "names") or (how == "random" and rng.random() < 0.5):
                _apply(operation, entries)
        contents = {
            key: _after_cut(self.flushed.get(key, b""), data, how, rng)
            for key, data in self.contents.items()
        }

        def below(folder: int, path: str) -> Iterator[tuple[str, bytes | None]]:
            yield path, None
            for name, found in sorted(entries.get(folder, {}).items()):
                if found in contents:
                    yield f"{path}/{name}", contents[found]
                else:
                    yield from below(found, f"{path}/{name}")

        return dict(below(self.root, "."))


def _apply(operation: list[_Change], entries: dict[int, dict[str, int]]) -> None:
    for folder, name, found in operation:
        if found is None:
            entries.setdefault(folder, {}).pop(name, None)
        else:
            entries.setdefault(folder, {})[name] = found


def _after_cut(flushed: bytes, current: bytes, how: str, rng: random.Random) -> bytes:
    if flushed == current or how == "everything":
        return current
    if how == "nothing":
        return flushed
    choice = 2 if how == "names" else rng.randrange(5)
    cut = rng.randrange(len(current) + 1)
    return (
        flushed,
        current,
        bytes(len(current)),
        current[:cut],
        current[:cut] + bytes(len(current) - cut),
    )[choice]


class _Recorder:
    """Compares a folder, after every call, with what it was after the call before.

    Objects are told apart by their inodes, so that changes are seen however they were made. What is
    there at first counts as flushed.
    """

    def __init__(self, root: Path) -> None:
        self._path = str(root)
        self._objects: dict[int, int] = {}
        self._next = 1
        self._contents: dict[int, bytes] = {}
        self._stamps: dict[int, tuple[int, int]] = {}
        self._synced: int | None = None
        self.moments: list[_Moment] = []
        self._pending: list[list[_Change]] = []
        self._names, self._contents = self._read()
        self._root = self._objects[os.stat(self._path).st_ino]
        self._flushed_names = {k: dict(v) for k, v in self._names.items()}
        self._flushed = dict(self._contents)
        self._keep()

    def before(self, name: str, arguments: tuple[Any, ...]) -> None:
        self._synced = None
        if name in ("fsync", "fdatasync"):
            self._synced = os.fstat(arguments[0]).st_ino

    def after(self, name: str, arguments: tuple[Any, ...]) -> None:
        names, contents = self._read()
        changes = self._changes(names)
        changed = bool(changes) or contents != self._contents
        self._pending += changes
        self._names, self._contents = names, contents
        if self._synced in self._objects:
            self._flush(self._objects[self._synced])
            changed = True
        if changed:
            self._keep()

    def _flush(self, key: int) -> None:
        if key in self._contents:
            self._flushed[key] = self._contents[key]
            return
        kept = []
        for operation in self._pending:
            if not any(folder == key for folder, _, _ in operation):
                kept.append(operation)
                continue
            _apply(operation, self._flushed_names)
        self._pending = kept

    def _keep(self) -> None:
        names = {k: dict(v) for k, v in self._flushed_names.items()}
        # Of everything ever seen: a file whose removal was lost is still there.
        before = self.moments[-1].contents if self.moments else {}
        self.moments.append(
            _Moment(
                self._root, names, list(self._pending), dict(self._flushed),
                {**before, **self._contents},
            )
        )  # fmt: skip

    def _changes(self, names: dict[int, dict[str, int]]) -> list[list[_Change]]:
        """The operations that lead from the entries before to `names`."""
        gone: list[_Change] = []
        new: list[_Change] = []
        for folder in self._names.keys() | names.keys():
            old, now = self._names.get(folder, {}), names.get(folder, {})
            if folder not in names:
                continue  # removed with its entries, whose removals came before
            gone += [(folder, n, old[n]) for n in sorted(old) if n not in now]
            new += [(folder, n, now[n]) for n in sorted(now) if old.get(n) != now[n]]
        operations = []
        for folder, name, found in new:
            operation: list[_Change] = []
            for removed in [r for r in gone if r[2] == found]:
                gone.remove(removed)
                operation.append((removed[0], removed[1], None))
            operations.append([*operation, (folder, name, found)])
        return operations + [[(folder, name, None)] for folder, name, _ in gone]

    def _read(self) -> tuple[dict[int, dict[str, int]], dict[int, bytes]]:
        """Entries and contents now; inodes that are gone may be used again for other objects."""
        names: dict[int, dict[str, int]] = {}
        contents: dict[int, bytes] = {}
        seen: set[int] = set()

        def walk(path: str, inode: int) -> int:
            key = self._key(inode, seen)
            names[key] = {}
            for name in os.listdir(path):
                inner = f"{path}/{name}"
                status = os.lstat(inner)
                if stat.S_ISDIR(status.st_mode):
                    names[key][name] = walk(inner, status.st_ino)
                    continue
                found = names[key][name] = self._key(status.st_ino, seen)
                stamp = (status.st_mtime_ns, status.st_size)
                if self._stamps.get(found) != stamp or found not in self._contents:
                    with open(inner, "rb") as file:
                        contents[found] = file.read()
                    self._stamps[found] = stamp
                else:
                    contents[found] = self._contents[found]
            return key

        walk(self._path, os.stat(self._path).st_ino)
        for inode in self._objects.keys() - seen:
            del self._objects[inode]
        return names, contents

    def _key(self, inode: int, seen: set[int]) -> int:
        seen.add(inode)
        if inode not in self._objects:
            self._objects[inode] = self._next
            self._next += 1
        return self._objects[inode]
