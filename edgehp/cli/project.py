"""``edgehp init`` and the project file ``edgehp.toml``, which gives every command its defaults.

And what a shell needs to complete command lines (``edgehp completion``).
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgehp.cli._command import json_option, note, subcommand
from edgehp.cli._output import answer
from edgehp.errors import CompatibilityError, EnvironmentalError, UsageError

if TYPE_CHECKING:
    from edgehp.artifact.manifest import Manifest

logger = logging.getLogger(__name__)

PROJECT = "edgehp.toml"
_TARGETS = "targets"
# Keys outside tables: options that several commands have, and which ones take them from there.
SHARED = {
    "network": ("build",),
    "calibration": ("build",),
    "validate-on": ("build", "install"),
    "max-drop": ("build", "validate"),
    "dataset": ("validate",),
    "data-root": ("validate",),
    "boxes": ("validate",),
    "key": ("bundle",),
    "public-key": ("verify", "install", "update", "repo add"),
    "photo-depth": ("build", "validate", "bench", "predict", "label"),
    "threads": ("build", "validate", "bench", "sensitivity", "predict", "run"),
}
_TEMPLATE = """\
# A project of edgehp. Every command that is called in this folder takes from here what its command
# line leaves out. A release:
#
#   edgehp build --all && edgehp validate && edgehp bench

network = "{network}"  # a bundled name, a checkpoint, or a deployed ONNX graph
targets = [{targets}]  # of 'edgehp build --all'; 'edgehp targets' lists them
max-drop = 0.1  # the gate: degrees of MAE that INT8 may lose against FP32

# Faces of the camera that will be used, in a folder or a zip, 64 at least; without them the
# rendered heads that edgehp ships. Those to validate on must be others.
# calibration = "faces/calibration"
# validate-on = "faces/held-out"

# Photos with labels for 'edgehp validate'; several data sets lie under their names in data-root.
# dataset = ["aflw2000"]
# data-root = "data/AFLW2000"
# boxes = "data/AFLW2000.json"

# Keys: of 'edgehp bundle'; and of 'verify', 'install', 'update' and 'repo add'.
# key = "keys/release.pem"
# public-key = ["keys/release.pub"]

# Any other option of a command, in a table of the command's name.
[build]
# batch-sizes = "1,1,8"
# mixed = true  # keep layers in floating point where INT8 drops more than max-drop

[validate]
# robustness = false

[bench]
# scenario = ["single-stream", "offline"]
# duration = 60
"""


@dataclass(frozen=True)
class Project:
    """What a project file says.

    Attributes:
        targets: to build for.
        defaults: command -> option without dashes -> value; those of ``repo`` are tables of tables.
    """

    targets: tuple[str, ...]
    defaults: Mapping[str, Mapping[str, Any]]


def read_project(path: Path) -> Project:
    """Read a project file; whether the options exist is checked by the command that takes them.

    Raises:
        UsageError: it is no TOML, or has a key or table that no command takes.
    """
    from edgehp.cli.main import COMMANDS
    from edgehp.files import read_toml

    values = read_toml(path, dict[str, Any], error=UsageError)
    defaults: dict[str, dict[str, Any]] = {}
    targets: tuple[str, ...] = ()
    tables = {k: v for k, v in values.items() if isinstance(v, dict)}
    for key, value in values.items():
        if key == _TARGETS:
            if not isinstance(value, list) or not all(isinstance(t, str) for t in value):
                raise UsageError(f'{path}: targets is {value!r}\nhint: targets = ["cpu", "orin"]')
            targets = tuple(value)
        elif key not in tables:
            if key not in SHARED:
                raise _unknown(path, key, [*SHARED, _TARGETS], "key outside tables")
            for name in SHARED[key]:
                group, _, part = name.partition(" ")
                place = defaults.setdefault(group, {})
                (place.setdefault(part, {}) if part else place)[key] = value
    for name, table in tables.items():
        if name not in COMMANDS:
            raise _unknown(path, name, list(COMMANDS), "table")
        defaults.setdefault(name, {}).update(table)
    return Project(targets, defaults)


def _unknown(path: Path, name: str, known: list[str], what: str) -> UsageError:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
    return UsageError(f"{path}: no {what} is called {name!r}\nhint: {hint}")


def read_recipe(path: Path) -> tuple[dict[str, Any], Manifest | None]:
    """The options of ``edgehp build`` that repeat a build, and the manifest that they are from.

    Args:
        path: an artifact, its manifest.json, or the recipe alone (JSON), which has no manifest.

    Raises:
        UsageError: the file is neither a recipe nor a manifest.
        CompatibilityError: a manifest that was altered or is of another version.
        DataError: the file is missing.
    """
    from edgehp.artifact.check import read_manifest
    from edgehp.artifact.manifest import MANIFEST_NAME
    from edgehp.files import read_json

    manifest = None
    if path.is_dir() or path.name == MANIFEST_NAME:
        manifest = read_manifest(path if path.is_dir() else path.parent)
        recipe = manifest.build.recipe
    else:
        recipe = read_json(path, dict[str, Any], error=UsageError)
    if not {"target", "network"} <= set(recipe):
        raise UsageError(f"{path} holds no recipe\nhint: give the manifest.json of an artifact")
    found = {k: v for k, v in recipe.items() if v is not None}
    if isinstance(batch := found.pop("batch", None), list):
        found["batch"] = ",".join(map(str, batch))
    return found, manifest


def differences(before: Manifest, now: Manifest) -> tuple[str, ...]:
    """What a build that repeats another was made of that is not the same, in a sentence each."""

    def listed(manifest: Manifest) -> str | None:
        return None if manifest.calibration is None else manifest.calibration.list_sha256

    pairs = (
        ("the network's weights", before.network.weights_sha256, now.network.weights_sha256),
        ("the calibration crops", listed(before), listed(now)),
    )
    return tuple(
        f"{what} are not those of {before.name}: SHA-256 {str(new)[:16]}..., the recipe's "
        f"{str(old)[:16]}..."
        for what, old, new in pairs
        if old != new
    )


def artifacts_here(folder: Path = Path("dist")) -> tuple[Path, ...]:
    """What a command works on that names no artifact.

    The complete artifacts of the project's targets that run on this machine, by name; where there
    is no project or none of its artifacts runs here, the newest artifact.

    Raises:
        DataError: there is none.
    """
    from edgehp.artifact import load_artifact, newest_artifact
    from edgehp.artifact.check import read_manifest
    from edgehp.targets import resolve_target

    project = click.get_current_context().find_root().obj
    if not isinstance(project, Project):
        return (newest_artifact(folder),)
    names = {resolve_target(target).target.name for target in project.targets}
    found = []
    for file in sorted(folder.glob("[!.]*/manifest.json")):
        try:
            manifest = read_manifest(file.parent)
            if manifest.target.name not in names:
                continue
            load_artifact(file.parent)
        except (CompatibilityError, EnvironmentalError) as e:
            note(f"{file.parent} does not run here: {str(e).splitlines()[0]}")
            continue
        found.append(file.parent)
    return tuple(found) or (newest_artifact(folder),)


@subcommand(
    "init",
    "edgehp init",
    "edgehp init --network net.safetensors --target cpu --target orin-nano-8gb",
)
@click.option(
    "--network",
    default="kd-resnet18-112",
    help="A bundled network, a checkpoint, or a deployed ONNX graph.",
)
@click.option(
    "--target",
    "targets",
    multiple=True,
    default=("cpu",),
    help="What to build for; may be given several times.",
)
@json_option
def init(network: str, targets: tuple[str, ...], as_json: bool) -> None:
    """Write a commented edgehp.toml into this folder.

    It names network, targets, calibration, data sets, gate and keys. Commands that are called in
    this folder take from it what their command line leaves out, so that 'edgehp build --all &&
    edgehp validate && edgehp bench' is a release.
    """
    import json

    from edgehp.files import write_whole
    from edgehp.targets import resolve_target

    path = Path(PROJECT)
    if path.exists():
        raise UsageError(f"{path} is there already\nhint: edit it, or move it away")
    for target in targets:
        resolve_target(target)
    # A TOML string is a JSON string, but for what paths do not have.
    words = ", ".join(json.dumps(t) for t in targets)
    write_whole(path, _TEMPLATE.format(network=json.dumps(network)[1:-1], targets=words))
    answer(as_json, {"path": path}, f"{path}  edit it, then: edgehp build --all")


@subcommand(
    "completion",
    "edgehp completion bash >> ~/.bashrc",
    "edgehp completion zsh >> ~/.zshrc",
    "edgehp completion fish > ~/.config/fish/completions/edgehp.fish",
)
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")))
def completion(shell: str) -> None:
    """Print the completion of commands, options and files for SHELL, to be read at its start."""
    from click.shell_completion import BashComplete, get_completion_class

    from edgehp.cli.main import cli

    kind = get_completion_class(shell)
    if kind is None:
        raise click.UsageError(f"no completion for {shell}")
    if issubclass(kind, BashComplete):
        # click starts a bash to ask for its version; any that completes files is new enough.
        kind = type("Complete", (kind,), {"_check_version": staticmethod(lambda: None)})
    click.echo(kind(cli, {}, "edgehp", "_EDGEHP_COMPLETE").source())
