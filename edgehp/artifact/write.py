"""Write an artifact: whole under its final name, or not there at all.

Everything is made in a hidden directory beside the destination, flushed to disk and renamed when
complete. Killed at any moment, the destination is the old artifact, the new one, or (between two
renames) absent; the next writer of the same artifact puts the old one back and removes what was
left. A lock that dies with its process keeps two writers apart.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path

from edgehp.artifact.manifest import MANIFEST_NAME, FileRecord, Manifest
from edgehp.errors import EnvironmentalError, UsageError
from edgehp.files import sha256_file

logger = logging.getLogger(__name__)


class ArtifactWriter:
    """Makes one artifact directory.

    Use as a context manager: write files under `path` (intermediate ones under `scratch`), then
    `commit`. Leaving without a commit removes everything that was written.

    Attributes:
        destination: where the artifact will be.
        path: the directory to write the artifact's files into.
        scratch: a directory for files that do not belong to the artifact.
    """

    def __init__(self, destination: Path | str) -> None:
        """Name the artifact.

        Args:
            destination: its final directory; an artifact that is there is replaced at the commit.

        Raises:
            UsageError: something is there that is not an artifact.
        """
        self.destination = Path(os.path.abspath(destination))  # noqa: PTH100 - keeps links
        self._parent, self._name = self.destination.parent, self.destination.name
        _require_replaceable(self.destination)
        self._work = self._parent / f".{self._name}.building-{secrets.token_hex(4)}"
        self.path = self._work / "artifact"
        self.scratch = self._work / "scratch"
        self._lock: int | None = None

    def __enter__(self) -> ArtifactWriter:
        """Take the lock, tidy up after a killed writer and make the directories.

        Raises:
            EnvironmentalError: another process writes this artifact, or the disk refuses.
        """
        try:
            self._parent.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self._lock_path)
            self._recover()
            self.path.mkdir(parents=True)
            self.scratch.mkdir()
        except OSError as e:
            self._release()
            raise EnvironmentalError(
                f"cannot write to {self._parent} ({e.strerror or e}); choose another place with "
                "--output"
            ) from e
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._work, ignore_errors=True)
        self._release()

    def commit(self, manifest: Manifest, roles: Mapping[str, str]) -> Manifest:
        """Hash and flush the files, write the manifest and rename the directory.

        Args:
            manifest: everything but its `files`, which are filled in here.
            roles: role of every file written, by path relative to `path`.

        Returns:
            The manifest as written.

        Raises:
            DataError: the manifest breaks its schema.
            EnvironmentalError: the disk is full or refuses.
            UsageError: a file was written that has no role, or a role names no file.
        """
        found = sorted(p for p in self.path.rglob("*") if not p.is_dir())
        names = [p.relative_to(self.path).as_posix() for p in found]
        if set(names) != set(roles):
            odd = sorted(set(names) ^ set(roles))
            raise UsageError(f"files written and files named differ: {', '.join(odd)}")
        try:
            records = tuple(
                FileRecord(n, sha256_file(p), p.stat().st_size, roles[n])
                for n, p in zip(names, found, strict=True)
            )
            manifest = manifest.with_files(records)
            target = self.path / MANIFEST_NAME
            target.write_text(manifest.to_json(), encoding="utf-8")
            _flush(self.path)
            self._swap()
        except OSError as e:
            raise EnvironmentalError(
                f"cannot write {self.destination} ({e.strerror or e}); the previous state is kept"
            ) from e
        return manifest

    @property
    def _lock_path(self) -> Path:
        return self._parent / f".{self._name}.lock"

    @property
    def _old(self) -> Path:
        return self._parent / f".{self._name}.old"

    def _swap(self) -> None:
        _require_replaceable(self.destination)
        replaced = self.destination.exists()
        if replaced:
            self.destination.rename(self._old)
        try:
            self.path.rename(self.destination)
        except OSError:
            if replaced:
                self._old.rename(self.destination)
            raise
        _flush_directory(self._parent)
        shutil.rmtree(self._old, ignore_errors=True)

    def _recover(self) -> None:
        """Undo what a killed writer of this artifact left; the lock says that it is dead."""
        if self._old.exists():
            if self.destination.exists():
                shutil.rmtree(self._old)
            else:
                logger.warning("%s: put back after an interrupted build", self.destination)
                self._old.rename(self.destination)
        prefix = f".{self._name}.building-"
        for entry in self._parent.iterdir():
            # The exact form: the name of another artifact may begin with this one's.
            if entry.name.startswith(prefix) and len(entry.name) == len(prefix) + 8:
                shutil.rmtree(entry, ignore_errors=True)

    def _release(self) -> None:
        if self._lock is not None:
            # Removed while still held, so that nobody can have locked the same file meanwhile.
            self._lock_path.unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None


def _locked(path: Path) -> int:
    """A descriptor of `path` that holds its lock."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The former holder may have removed the file between our open and our lock.
            if os.fstat(descriptor).st_ino == path.stat().st_ino:
                return descriptor
        except BlockingIOError as e:
            os.close(descriptor)
            raise EnvironmentalError(
                f"another process is building {path.name[1:].removesuffix('.lock')!r} in "
                f"{path.parent}; wait for it or choose another --output"
            ) from e
        except FileNotFoundError:
            pass
        os.close(descriptor)


def _require_replaceable(destination: Path) -> None:
    """Refuse to replace what is not an artifact: a mistyped --output must not cost data."""
    if destination.is_symlink() or (destination.exists() and not destination.is_dir()):
        raise UsageError(f"{destination} is a file or a link; choose another --output")
    if not destination.exists() or (destination / MANIFEST_NAME).is_file():
        return
    if any(destination.iterdir()):
        raise UsageError(
            f"{destination} holds files but no {MANIFEST_NAME}, so it is not an artifact and is "
            "not replaced\nhint: move it away or choose another --output"
        )


def _flush(root: Path) -> None:
    for path in [root, *root.rglob("*")]:
        if path.is_dir():
            _flush_directory(path)
        else:
            with path.open("rb") as f:
                os.fsync(f.fileno())


def _flush_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
