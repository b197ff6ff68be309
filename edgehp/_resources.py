"""Where the data directories are that travel with the package.

A wheel carries them as ``edgehp/_data/<name>``; in a checkout, which an editable install points
into, they are the top-level directories that people edit.
"""

from __future__ import annotations

from pathlib import Path

from edgehp.errors import EnvironmentalError

__all__ = ["resource_dir"]

PACKAGE = Path(__file__).resolve().parent


def resource_dir(name: str) -> Path:
    """The directory of packaged data called `name`.

    Args:
        name: ``"targets"`` or ``"calibration"``.

    Returns:
        An existing directory.

    Raises:
        EnvironmentalError: the installation lacks it.
    """
    candidates = (PACKAGE / "_data" / name, PACKAGE.parent / name)
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
    raise EnvironmentalError(
        f"the packaged directory {name!r} was not found in {candidates[0]} or {candidates[1]}; "
        "the installation is incomplete: install edgehp again"
    )
