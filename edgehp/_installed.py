"""How this copy of edgehp was installed, and so how to install more of it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

__all__ = ["install_command", "install_extra"]

_NAME = "edgehp"


def install_extra(extra: str) -> str:
    """The command that adds an extra to this copy, such as ``pip install '.[train]'``."""
    # Imported here: only a remedy pays for it.
    from importlib import metadata

    try:
        origin = metadata.distribution(_NAME).read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        origin = None
    return install_command(extra, Path(__file__).resolve().parent.parent, origin)


def install_command(extra: str, folder: Path, origin: str | None) -> str:
    """What adds an extra: from the sources, the wheel or the index that this copy came from.

    By its place wherever there is one, since the name alone may be a stranger's on an index.

    Args:
        extra: of edgehp.
        folder: the one that holds the package.
        origin: text of ``direct_url.json``, which pip leaves beside what it installed from
            anything but an index (Python Packaging User Guide, "Recording the Direct URL Origin of
            installed distributions"); None where it left none.
    """
    found = _read(origin)
    url = found.get("url", "")
    directory = found.get("dir_info")
    sources = folder if (folder / "pyproject.toml").is_file() else None
    if sources is None and directory is not None:
        sources = Path(unquote(urlsplit(url).path))
    if sources is not None and sources.is_dir():
        place = "." if sources == Path.cwd() else str(sources)
        editable = "-e " if directory is not None and directory.get("editable") is True else ""
        return f"pip install {editable}{shlex.quote(f'{place}[{extra}]')}"
    if (vcs := found.get("vcs_info")) is not None:
        url = f"{vcs.get('vcs')}+{url}@{vcs.get('commit_id')}"
    return f"pip install {shlex.quote(f'{_NAME}[{extra}]' + (f' @ {url}' if url else ''))}"


def _read(origin: str | None) -> dict[str, Any]:
    """The values of ``direct_url.json``; none where they are not as they should be."""
    try:
        found = json.loads(origin or "{}")
    except ValueError:
        return {}
    if not isinstance(found, dict) or not isinstance(found.get("url"), str):
        return {}
    parts = (found.get("dir_info", {}), found.get("vcs_info", {}))
    return found if all(isinstance(part, dict) for part in parts) else {}
