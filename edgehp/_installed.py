"""How this copy of edgehp was installed, and so how to install more of it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

_NAME = "edgehp"
_NETWORKS = "edgehp-networks"


def install_extra(extra: str) -> str:
    """The command that adds an extra to this copy, such as ``pip install '.[train]'``."""
    return install_command(extra, _folder(), _origin())


def install_networks() -> str:
    """The command that adds the bundled networks, such as ``pip install ./networks``."""
    return networks_command(_folder(), _origin())


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
    sources = _sources(folder, found)
    if sources is not None:
        place = "." if sources == Path.cwd() else str(sources)
        editable = "-e " if found.get("dir_info", {}).get("editable") is True else ""
        return f"pip install {editable}{shlex.quote(f'{place}[{extra}]')}"
    url = _repository(found) or found.get("url", "")
    return f"pip install {shlex.quote(f'{_NAME}[{extra}]' + (f' @ {url}' if url else ''))}"


def networks_command(folder: Path, origin: str | None) -> str:
    """What adds the distribution of networks; arguments as `install_command`."""
    found = _read(origin)
    sources = _sources(folder, found)
    if sources is not None and (sources / "networks").is_dir():
        place = "./networks" if sources == Path.cwd() else str(sources / "networks")
        return f"pip install {shlex.quote(place)}"
    url = _repository(found)
    name = f"{_NETWORKS} @ {url}#subdirectory=networks" if url else _NETWORKS
    return f"pip install {shlex.quote(name)}"


def _folder() -> Path:
    return Path(__file__).resolve().parent.parent


def _origin() -> str | None:
    # Imported here: only a remedy pays for it.
    from importlib import metadata

    try:
        return metadata.distribution(_NAME).read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return None


def _sources(folder: Path, found: dict[str, Any]) -> Path | None:
    """The checkout that this copy is or came from, if it is still there."""
    if (folder / "pyproject.toml").is_file():
        return folder
    if found.get("dir_info") is None:
        return None
    sources = Path(unquote(urlsplit(found["url"]).path))
    return sources if sources.is_dir() else None


def _repository(found: dict[str, Any]) -> str | None:
    vcs = found.get("vcs_info")
    return f"{vcs.get('vcs')}+{found['url']}@{vcs.get('commit_id')}" if vcs is not None else None


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
