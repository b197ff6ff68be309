"""What to install is named by where this copy came from."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from edgehp import _installed
from edgehp._installed import install_extra, install_networks, parse_version

WHEEL = json.dumps({"url": "file:///w/edgehp-1.whl", "archive_info": {}})
GIT = json.dumps({"url": "https://host/e.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}})


@pytest.fixture
def came(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Let this copy have come from what ``direct_url.json`` says, or be the one in a folder."""

    def set_to(origin: str | None, folder: Path = tmp_path) -> None:
        monkeypatch.setattr(_installed, "_origin_text", lambda: origin)
        monkeypatch.setattr(_installed, "_folder", lambda: folder)

    return set_to


@pytest.mark.parametrize(
    ("origin", "extra", "networks"),
    [
        (None, "edgehp[train]", "edgehp-networks"),
        (WHEEL, "edgehp[train] @ file:///w/edgehp-1.whl", "edgehp-networks"),
        (
            GIT,
            "edgehp[train] @ git+https://host/e.git@abc",
            "edgehp-networks @ git+https://host/e.git@abc#subdirectory=networks",
        ),
        ("{", "edgehp[train]", "edgehp-networks"),
        ("[1]", "edgehp[train]", "edgehp-networks"),
        ('{"url": 3}', "edgehp[train]", "edgehp-networks"),
        ('{"url": "file:///w", "dir_info": 1}', "edgehp[train]", "edgehp-networks"),
    ],
)
def test_without_sources_the_origin_is_named(
    came: Callable[..., None], origin: str | None, extra: str, networks: str
) -> None:
    came(origin)
    assert install_extra("train") == f"pip install {shlex.quote(extra)}"
    assert install_networks() == f"pip install {shlex.quote(networks)}"


@pytest.mark.parametrize("editable", [False, True])
def test_installed_from_a_folder_that_folder_is_named(
    came: Callable[..., None], tmp_path: Path, editable: bool
) -> None:
    sources = tmp_path / "my sources"
    sources.mkdir()
    came(json.dumps({"url": sources.as_uri(), "dir_info": {"editable": editable}}))
    assert install_extra("cpu") == f"pip install {'-e ' * editable}'{sources}[cpu]'"
    sources.rmdir()
    # It has gone: its address still says which edgehp is meant.
    assert sources.as_uri() in install_extra("cpu")


def test_in_a_checkout_it_is_this_one(
    came: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repo: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "[cpu]" in install_extra("cpu")
    assert install_networks() == f"pip install {shlex.quote(str(repo / 'networks'))}"
    came(None, repo)
    assert install_extra("cpu") == f"pip install {shlex.quote(f'{repo}[cpu]')}"
    monkeypatch.chdir(repo)
    came(WHEEL, Path.cwd())
    assert install_extra("cpu") == "pip install '.[cpu]'"
    assert install_networks() == "pip install ./networks"


def test_no_remedy_names_an_extra_by_itself(repo: Path) -> None:
    """It would install whatever has the name on the index."""
    named = [
        f"{path.name}: {match}"
        for path in (repo / "edgehp").rglob("*.py")
        if path.name != "_installed.py"
        for match in re.findall(r"edgehp\[[^\]\n]*\]", path.read_text(encoding="utf-8"))
    ]
    assert named == []


def test_versions_of_every_source_are_read_by_one_parser() -> None:
    for text, release in (
        ("10.3.0.30", (10, 3, 0, 30)),
        ("10.14.1.48.post1", (10, 14, 1, 48)),
        ("8.6.1.post1", (8, 6, 1)),
        ("2026.4.0-21-abc", (2026, 4)),
        ("10.0", (10,)),
    ):
        assert parse_version(text) == release
