"""Whether a slot may run, and how refusals of the disk are said."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from edgehp._hashing import sha256_file
from edgehp.artifact import load_artifact
from edgehp.artifact.manifest import MANIFEST_NAME
from edgehp.errors import CompatibilityError, DataError, EdgehpError, EnvironmentalError
from edgehp.shipping.records import Slot
from edgehp.shipping.selftest import SelfTestResult

__all__ = ["SelfTest", "examine", "is_root", "is_whole", "nothing_installed", "writing"]

logger = logging.getLogger(__name__)

# From an artifact directory to what its golden vectors gave. Checks hashes and device before it
# opens the engine, and raises an `EdgehpError` if anything is not right.
SelfTest = Callable[[Path], SelfTestResult]


def examine(slot: Slot, test: SelfTest) -> SelfTestResult:
    """The self-test of a slot whose manifest is the one that was written down.

    Raises:
        EdgehpError: it is another manifest, or the self-test failed.
    """
    _check_record(slot)
    return test(slot.artifact)


def _check_record(slot: Slot) -> None:
    manifest = slot.artifact / MANIFEST_NAME
    try:
        found = sha256_file(manifest)
    except OSError as e:
        raise CompatibilityError(
            f"{manifest} cannot be read ({e.strerror or e}); install the bundle again"
        ) from e
    if found != slot.manifest_sha256:
        raise CompatibilityError(
            f"{manifest} is not the one that was installed; install the bundle again"
        )


def is_whole(slot: Slot) -> bool:
    """Whether every byte of a slot is as recorded; the engine is not opened."""
    try:
        _check_record(slot)
        load_artifact(slot.artifact, bytes_only=True)
    except (EdgehpError, OSError) as e:
        logger.warning("slot %s: %s", slot.name, e)
        return False
    return True


@contextmanager
def writing(root: Path) -> Iterator[None]:
    """Say an `OSError` of the block as an `EnvironmentalError` about `root`."""
    try:
        yield
    except OSError as e:
        raise EnvironmentalError(
            f"cannot write to {root} ({e.strerror or e}); check its owner and the disk, or choose "
            "another --root"
        ) from e


def is_root(root: Path) -> bool:
    """Whether the directory is there.

    Raises:
        EnvironmentalError: this user may not look into it, where it would seem to be empty.
    """
    try:
        # The point at the end needs the permission to look into it.
        for inner in (".", "slots/."):
            os.stat(os.path.join(root, inner))  # noqa: PTH116, PTH118 - Path drops the point
    except (FileNotFoundError, NotADirectoryError):
        return root.is_dir()
    except PermissionError as e:
        raise EnvironmentalError(
            f"{root} cannot be read by this user; run this as its owner or as root"
        ) from e
    return True


def nothing_installed(root: Path) -> DataError:
    """The error for a root without a slot."""
    return DataError(f"{root}: nothing is installed; install a bundle with 'edgehp install FILE'")
