"""What is installed here: this copy of edgehp, packages that may be missing, and versions."""

from __future__ import annotations

import json
import shlex
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from edgehp.errors import DataError, EnvironmentalError

_NAME = "edgehp"
_NETWORKS = "edgehp-networks"


def import_package(name: str, need: str) -> Any:
    """A package that edgehp does without until something needs it.

    Args:
        name: of the module, whose package has the same name on the index.
        need: what needs it, for the message: ``"reading an ONNX graph needs"``.

    Raises:
        EnvironmentalError: it is missing, or cannot load its libraries.
    """
    try:
        return import_module(name)
    except (ImportError, OSError) as e:
        package = name.partition(".")[0]
        raise EnvironmentalError(
            f"{need} the package {package} ({e})\nhint: install it with: pip install {package}"
        ) from e


def parse_version(text: str) -> tuple[int, ...]:
    """The release of a version: ``"10.14.1.48.post1"`` gives (10, 14, 1, 48).

    The one reader of versions: of packages, runtimes, JetPack and L4T. Suffixes do not count, nor
    do trailing zeros: package metadata and libraries do not agree on them. OpenVINO's own
    ``"2026.4.0-21-abc"`` is read up to the first hyphen.

    Raises:
        DataError: it is no version.
    """
    # Not above: `edgehp doctor` says what is missing, this package included.
    from packaging.version import InvalidVersion, Version

    try:
        release = Version(text.partition("-")[0].strip()).release
    except InvalidVersion as e:
        raise DataError(f"version {text!r} is not numbers joined by dots, such as '10.3.0'") from e
    while release and release[-1] == 0:
        release = release[:-1]
    return release


def install_extra(extra: str) -> str:
    """The command that adds an extra to this copy, such as ``pip install '.[train]'``.

    From the sources, the wheel or the repository that this copy came from, wherever there is one:
    the name alone may be a stranger's on an index.
    """
    found = _origin()
    if (sources := _sources(found)) is not None:
        place = "." if sources == Path.cwd() else str(sources)
        editable = "-e " if found.get("dir_info", {}).get("editable") is True else ""
        return f"pip install {editable}{shlex.quote(f'{place}[{extra}]')}"
    url = _repository(found) or found.get("url", "")
    return f"pip install {shlex.quote(f'{_NAME}[{extra}]' + (f' @ {url}' if url else ''))}"


def install_networks() -> str:
    """The command that adds the bundled networks, such as ``pip install ./networks``."""
    found = _origin()
    sources = _sources(found)
    if sources is not None and (sources / "networks").is_dir():
        place = "./networks" if sources == Path.cwd() else str(sources / "networks")
        return f"pip install {shlex.quote(place)}"
    url = _repository(found)
    name = f"{_NETWORKS} @ {url}#subdirectory=networks" if url else _NETWORKS
    return f"pip install {shlex.quote(name)}"


def _folder() -> Path:
    """The folder that holds the package."""
    return Path(__file__).resolve().parent.parent


def _origin_text() -> str | None:
    """``direct_url.json``, which pip leaves beside what it installed from anything but an index.

    See the Python Packaging User Guide, "Recording the Direct URL Origin of installed
    distributions".
    """
    # Imported here: only a remedy pays for it.
    from importlib import metadata

    try:
        return metadata.distribution(_NAME).read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return None


def _origin() -> dict[str, Any]:
    """The values of ``direct_url.json``; none where they are not as they should be."""
    try:
        found = json.loads(_origin_text() or "{}")
    except ValueError:
        return {}
    if not isinstance(found, dict) or not isinstance(found.get("url"), str):
        return {}
    parts = (found.get("dir_info", {}), found.get("vcs_info", {}))
    return found if all(isinstance(part, dict) for part in parts) else {}


def _sources(found: dict[str, Any]) -> Path | None:
    """The checkout that this copy is or came from, if it is still there."""
    if (folder := _folder()).joinpath("pyproject.toml").is_file():
        return folder
    if found.get("dir_info") is None:
        return None
    sources = Path(unquote(urlsplit(found["url"]).path))
    return sources if sources.is_dir() else None


def _repository(found: dict[str, Any]) -> str | None:
    vcs = found.get("vcs_info")
    return f"{vcs.get('vcs')}+{found['url']}@{vcs.get('commit_id')}" if vcs is not None else None
