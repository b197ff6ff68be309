"""What to install is named by where this copy came from."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from edgehp._installed import install_command, install_extra, install_networks, networks_command

WHEEL = {"url": "file:///w/edgehp-1.whl", "archive_info": {}}
GIT = {"url": "https://host/e.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}}


@pytest.mark.parametrize(
    ("origin", "wanted"),
    [
        (None, "pip install 'edgehp[train]'"),
        (json.dumps(WHEEL), "pip install 'edgehp[train] @ file:///w/edgehp-1.whl'"),
        (json.dumps(GIT), "pip install 'edgehp[train] @ git+https://host/e.git@abc'"),
        ("{", "pip install 'edgehp[train]'"),
        ("[1]", "pip install 'edgehp[train]'"),
        ('{"url": 3}', "pip install 'edgehp[train]'"),
        ('{"url": "file:///w", "dir_info": 1}', "pip install 'edgehp[train]'"),
    ],
)
def test_without_sources_the_origin_is_named(
    tmp_path: Path, origin: str | None, wanted: str
) -> None:
    assert install_command("train", tmp_path, origin) == wanted


@pytest.mark.parametrize("editable", [False, True])
def test_installed_from_a_folder_that_folder_is_named(tmp_path: Path, editable: bool) -> None:
    sources = tmp_path / "my sources"
    sources.mkdir()
    origin = json.dumps({"url": sources.as_uri(), "dir_info": {"editable": editable}})
    wanted = f"pip install {'-e ' * editable}'{sources}[cpu]'"
    assert install_command("cpu", tmp_path / "site-packages", origin) == wanted
    sources.rmdir()
    # It has gone: its address still says which edgehp is meant.
    assert sources.as_uri() in install_command("cpu", tmp_path / "site-packages", origin)


def test_in_a_checkout_it_is_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repo: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert install_command("cpu", repo, None) == f"pip install {shlex.quote(f'{repo}[cpu]')}"
    monkeypatch.chdir(repo)
    assert install_command("cpu", Path.cwd(), json.dumps(WHEEL)) == "pip install '.[cpu]'"
    assert "[cpu]" in install_extra("cpu")


def test_the_networks_come_from_where_edgehp_came_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repo: Path
) -> None:
    assert networks_command(tmp_path, None) == "pip install edgehp-networks"
    assert networks_command(tmp_path, json.dumps(WHEEL)) == "pip install edgehp-networks"
    wanted = "'edgehp-networks @ git+https://host/e.git@abc#subdirectory=networks'"
    assert networks_command(tmp_path, json.dumps(GIT)) == f"pip install {wanted}"
    monkeypatch.chdir(repo)
    assert install_networks() == "pip install ./networks"
    monkeypatch.chdir(tmp_path)
    assert install_networks() == f"pip install {shlex.quote(str(repo / 'networks'))}"


def test_no_remedy_names_an_extra_by_itself(repo: Path) -> None:
    """It would install whatever has the name on the index."""
    named = [
        f"{path.name}: {match}"
        for path in (repo / "edgehp").rglob("*.py")
        if path.name != "_installed.py"
        for match in re.findall(r"edgehp\[[^\]\n]*\]", path.read_text(encoding="utf-8"))
    ]
    assert named == []
