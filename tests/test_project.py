"""The project file: what commands take from it, what is refused, a release by three commands."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import onnx
import pytest
from click.testing import CliRunner, Result

from edgehp.cli.main import cli, main
from edgehp.cli.project import SHARED, differences, read_project, read_recipe
from edgehp.errors import CompatibilityError, UsageError
from tests import build_parts


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def edgehp(*words: str) -> Result:
    return CliRunner().invoke(cli, [*map(str, words)], catch_exceptions=False)


def parsed(*words: str) -> dict[str, object]:
    """The parameters of a command as it would run."""
    seen: dict[str, object] = {}

    def take(self: click.Command, context: click.Context) -> None:
        seen.update(context.params)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgehp.cli._command.Command.invoke", take)
        assert edgehp(*words).exit_code == 0
    return seen


def test_init_writes_a_file_that_every_command_takes(tmp_path: Path) -> None:
    assert edgehp("init", "--target", "cpu", "--target", "orin-nano-8gb").exit_code == 0
    project = read_project(tmp_path / "edgehp.toml")
    assert project.targets == ("cpu", "orin-nano-8gb")
    # What is commented out is right as well.
    lines = (tmp_path / "edgehp.toml").read_text().splitlines()
    whole = "\n".join(x.removeprefix("# ") if " = " in x else x for x in lines)
    (tmp_path / "edgehp.toml").write_text(whole)
    for name in read_project(tmp_path / "edgehp.toml").defaults:
        if name != "repo":
            needed = {"bundle": ["a"], "verify": ["b"], "install": ["b"], "predict": ["x.jpg"]}
            more = ["--repository", "r", "--root-metadata", "m"] if name == "update" else []
            more += ["x", "--teacher", __file__, "--output", "y"] if name == "label" else []
            words = [w if name != "label" else __file__ for w in needed.get(name, [])]
            parsed(name, *words, *[__file__ if w == "x" else w for w in more])
    with pytest.raises(UsageError, match="is there already"):
        edgehp("init")


def test_the_page_on_the_project_file_has_every_key_and_the_file(tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent / "docs" / "project-file.md").read_text("utf-8")
    rows = re.findall(r"^\| `([a-z-]+)` \| (.*?) \|", page, re.M)
    told = {key: tuple(re.findall(r"`([a-z -]+)`", commands)) for key, commands in rows}
    assert told == {"targets": ("build --all", "validate", "bench"), **SHARED}
    assert edgehp("init").exit_code == 0
    assert f"```toml\n{(tmp_path / 'edgehp.toml').read_text()}```" in page


def test_what_is_typed_comes_before_the_file(tmp_path: Path) -> None:
    (tmp_path / "edgehp.toml").write_text(
        'max-drop = 0.25\nthreads = 2\npublic-key = "a.pub"\n[validate]\nmax-drop = 0.5\n'
        "robustness = false\n[bench]\nscenario = ['offline']\n"
    )
    assert parsed("build", "--target", "cpu")["max_drop"] == 0.25
    found = parsed("validate", "--threads", "3")
    assert (found["max_drop"], found["threads"], found["robustness"]) == (0.5, 3, False)
    assert parsed("bench")["scenarios"] == ("offline",)
    assert parsed("verify", "x.edgehp")["public_keys"] == (Path("a.pub"),)
    assert parsed("repo", "add", "r", "x.edgehp")["public_keys"] == (Path("a.pub"),)


@pytest.mark.parametrize(
    ("text", "words", "said"),
    [
        ("max-dorp = 1", ["build"], "'max-drop'"),
        ("[biuld]", ["build"], "'build'"),
        ("[build]\nmax-dorp = 1", ["build"], "[build] has 'max-dorp'"),
        ("targets = 'cpu'", ["build"], "hint: targets = "),
        ("max-drop = 'much'", ["build", "--target", "cpu"], "edgehp.toml"),
        ("not toml", ["status"], "not valid TOML"),
        ("", ["build", "--all"], "hint: edgehp init"),
    ],
)
def test_what_no_command_takes_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, words: list[str], said: str
) -> None:
    (tmp_path / "edgehp.toml").write_text(text)
    with pytest.raises(SystemExit) as stopped:
        main(words)
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and said in err and "hint: " in err


def test_three_commands_are_a_release_and_a_recipe_repeats_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build_parts.small_request(tmp_path)
    assert edgehp("init", "--network", "small.onnx").exit_code == 0
    text = (tmp_path / "edgehp.toml").read_text().replace("max-drop = 0.1", "max-drop = 90.0")
    text = text.replace('targets = ["cpu"]', 'targets = ["cpu", "orin-nano-8gb"]')
    text = text.replace("[build]\n", "[build]\nprecision = 'fp32'\n")
    more = "validate-on = 'val.zip'\nthreads = 1\n"
    bench = "[bench]\nduration = 0.3\nwarm-up = 0\nidle = 0\npower = 'none'\nallow-invalid = true\n"
    text = more + text.replace("[bench]\n", bench)
    text = text.replace("[validate]\n", "[validate]\nlimit = 8\nrobustness = false\n")
    (tmp_path / "edgehp.toml").write_text(text)
    run = edgehp("build", "--all")
    assert run.exit_code == 0, run.output
    artifacts = {p.parent.name: p for p in tmp_path.glob("dist/*/manifest.json")}
    assert len(artifacts) == 2
    built = next(p for name, p in artifacts.items() if "-cpu-" in name)
    assert f"built {built.parent.relative_to(tmp_path)}" in run.output
    assert "deferred dist/" in run.output and "edgehp build --finish dist/" in run.output
    for command in ("validate", "bench"):
        run = edgehp(command)
        assert run.exit_code == 0, run.output
    assert list(built.parent.glob("reports/bench-*.json"))
    # The file of the network has changed since: the build is no repetition, and says so.
    with (tmp_path / "small.onnx").open("ab") as network:
        network.write(onnx.ModelProto(doc_string="another").SerializeToString())
    run = edgehp("build", "--recipe", built, "--output", "again", "--threads", "1")
    assert run.exit_code == 0, run.output
    again = json.loads(next(tmp_path.glob("again/*/manifest.json")).read_text())
    first = json.loads(built.read_text())
    assert again["build"]["recipe"] == first["build"]["recipe"]
    assert again["network"]["spec"] == first["network"]["spec"]
    assert f"the network's weights are not those of {first['name']}" in caplog.text
    options, manifest = read_recipe(built.parent)
    assert options["target"] == "cpu" and manifest is not None
    assert differences(manifest, manifest) == ()


def test_no_recipe(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(UsageError, match="holds no recipe"):
        edgehp("build", "--recipe", "x.json")
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(CompatibilityError, match="manifest"):
        edgehp("build", "--recipe", "manifest.json")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    script = edgehp("completion", shell).output
    assert "_EDGEHP_COMPLETE" in script and "edgehp" in script
    environment = {
        "COMP_WORDS": "edgehp va",
        "COMP_CWORD": "va" if shell == "fish" else "1",
        "_EDGEHP_COMPLETE": f"{shell}_complete",
    }
    done = subprocess.run(
        [sys.executable, "-m", "edgehp"],
        capture_output=True,
        text=True,
        env={**os.environ, **environment, "PYTHONPATH": str(Path(__file__).parent.parent)},
        check=False,
    )
    assert "validate" in done.stdout and not done.stderr
