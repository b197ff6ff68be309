"""The metadata files of a repository: found, read and written, by one publisher at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgehp.errors import DataError, EnvironmentalError
from edgehp.shipping import disk

if TYPE_CHECKING:
    from tuf.api.metadata import Metadata, Root, Targets

__all__ = [
    "STAGED",
    "newest",
    "newest_root",
    "read_metadata",
    "staged_or_published",
    "version_of",
    "write_metadata",
    "writing",
]

# Folder of what the next `publish` makes public.
STAGED = ".staged"


def newest_root(folder: Path) -> Metadata[Root]:
    """The root metadata that is public.

    Raises:
        DataError: no repository.
    """
    path = newest(folder, "root")
    if path is None:
        raise DataError(f"{folder} is no repository; make one with: edgehp repo init {folder}")
    return read_metadata(path)


def staged_or_published(folder: Path) -> Metadata[Targets]:
    """The list of targets that the next `publish` signs.

    Raises:
        DataError: there is none.
    """
    staged = folder / STAGED / "targets.json"
    path = staged if staged.exists() else newest(folder, "targets")
    if path is None:
        raise DataError(f"{folder}: the list of targets is missing; restore it from a copy")
    return read_metadata(path)


def newest(folder: Path, role: str) -> Path | None:
    """The file with the largest version, None where there is none."""
    found = [
        (int(path.name.partition(".")[0]), path)
        for path in (folder / "metadata").glob(f"*.{role}.json")
        if path.name.partition(".")[0].isdecimal()
    ]
    return max(found)[1] if found else None


def version_of(path: Path | None) -> int:
    """The version in the name of a file; 0 where there is none."""
    return 0 if path is None else int(path.name.partition(".")[0])


def read_metadata(path: Path) -> Metadata[Any]:
    """The metadata in a file, whoever signed it.

    Raises:
        DataError: it is none.
        OSError: it cannot be read.
    """
    from tuf.api.metadata import Metadata
    from tuf.api.serialization import DeserializationError

    try:
        return Metadata.from_bytes(path.read_bytes())
    except DeserializationError as e:
        raise DataError(f"{path} is no TUF metadata ({e}); restore it from a copy") from e


def write_metadata(path: Path, item: Metadata[Any]) -> None:
    """Replace a file, whole or not at all.

    Raises:
        OSError: the disk refuses.
    """
    disk.replace_file(path, item.to_bytes())


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """One publisher at a time; an `OSError` of the block is said as one about the repository.

    Raises:
        EnvironmentalError: somebody else is at it, or the disk refuses.
    """
    try:
        with ExitStack() as held:
            if (folder / "metadata").is_dir():
                disk.make_folder(folder / STAGED)
                held.enter_context(disk.locked(folder / STAGED / "lock", wait=False))
            yield
    except BlockingIOError as e:
        raise EnvironmentalError(f"somebody else is changing {folder}; wait for it") from e
    except OSError as e:
        name = f"{e.filename}: " if e.filename else ""
        raise EnvironmentalError(
            f"cannot write the repository {folder} ({name}{e.strerror or e}); check its owner and "
            "the disk"
        ) from e
