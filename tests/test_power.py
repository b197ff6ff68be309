"""Whatever the moment of a power cut, one slot is whole and passes its self-test.

And what a device remembers of its repository is whole, and never older than it was.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from edgehp.errors import DataError
from edgehp.shipping import slots
from edgehp.shipping.offers import Memory, read_memory
from tests import ship_parts as parts
from tests.faults import cuts, deaths, no_flush
from tests.update_parts import new_fleet

# Of all calls together, which are tried thinned out by default.
POINTS = 200


@dataclass(frozen=True)
class Scene:
    """A root, what is done in it, what may start afterwards, and what is checked besides.

    Attributes:
        root: the state before.
        action: what is interrupted.
        allowed: names of the artifacts that may start afterwards, and do.
        check: of every state.
        again: does it once more; it succeeds, and leaves nothing lying about.
        every: of the calls, how many are one that is tried.
    """

    root: Path
    action: Callable[[Path], object]
    allowed: frozenset[str]
    check: Callable[[Path], None]
    again: Callable[[Path], None]
    every: int = 1


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    with no_flush():
        yield


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scene]:
    with no_flush():
        folder = tmp_path_factory.mktemp("power")
        return {**slot_scenes(folder), "update": update_scene(folder)}


def slot_scenes(folder: Path) -> dict[str, Scene]:
    """Two slots in use, and a third bundle."""
    signer, root = parts.new_signer(folder), folder / "root"
    bundles = {
        name: parts.bundle(folder, name, signer, deferred=name == "late")
        for name in ("one", "two", "three", "late")
    }

    def install(name: str, root: Path) -> slots.Slot:
        return parts.install(bundles[name], signer, root)

    def again(root: Path) -> None:
        assert install("one", root).artifact_name == "one"
        assert {p.name for p in root.iterdir()} == {"lock", "state.lock", "state.json", "slots"}
        assert {p.name for p in (root / "slots").iterdir()} <= set(slots.SLOT_NAMES)

    def scene(action: Callable[[Path], object], *allowed: str, every: int = 12) -> Scene:
        return Scene(root, action, frozenset(allowed), lambda root: None, again, every)

    (folder / "empty").mkdir()
    install("one", root)
    install("two", root)
    return {
        "install": scene(lambda root: install("three", root), "two", "three"),
        # Nearly twice as many calls, most of them of the writer that `edgehp build` uses too.
        "install deferred": scene(lambda root: install("late", root), "two", "late", every=24),
        "rollback": scene(parts.rollback, "one", "two"),
        "boot": scene(lambda root: slots.boot(root, parts.here), "two"),
        # There is nothing to return to yet: nothing is installed, or a whole slot is.
        "first": Scene(folder / "empty", lambda root: install("one", root),
                       frozenset({"one", "nothing"}), lambda root: None, again, 12),
    }  # fmt: skip


def update_scene(folder: Path) -> Scene:
    """A new bundle and new root keys, and a device that had an update before."""
    fleet, root = new_fleet(folder / "fleet", "first"), folder / "updated"
    fleet.update(root)
    for role in ("root", "timestamp"):
        fleet.rotate(role)
        fleet.publish()
    fleet.release("second")

    def version(memory: Memory) -> int:
        return int(json.loads(memory.files["timestamp.json"])["signed"]["version"])

    before = read_memory(root / "updates")
    needed = {"1.root.json", "timestamp.json", "snapshot.json", "targets.json"}

    def check(root: Path) -> None:
        # Never less than before the update: this is what refuses older lists.
        memory = read_memory(root / "updates")
        assert memory.serial in (1, 2) and version(memory) >= version(before)
        assert needed <= set(memory.files)

    def again(root: Path) -> None:
        fleet.update(root)
        assert slots.current(root).artifact_name == "second"
        assert read_memory(root / "updates").serial == 2
        assert {p.name for p in (root / "updates").iterdir()} <= {
            "lock", "memory.json", "device-id",
        }  # fmt: skip
        assert {p.name for p in (root / "slots").iterdir()} <= set(slots.SLOT_NAMES)

    return Scene(root, fleet.update, frozenset({"first", "second"}), check, again, 12)


def look(scene: Scene, states: Iterator[tuple[object, Path]], seed: int) -> int:
    """Check every state, and every eighth by doing it once more; how many there were."""
    seen, number = set(), 0
    for number, (where, root) in enumerate(states, 1):
        try:
            started = parts.started_whole(root)
        except DataError:
            started = "nothing"
        assert started in scene.allowed, (where, seed)
        seen.add(started)
        scene.check(root)
        if number % 8 == 0:
            scene.again(root)
    # Some states are before the switch, some behind it.
    assert seen == scene.allowed
    return number


@pytest.mark.parametrize("thin", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_killed_at_every_call(scenes: dict[str, Scene], seed: int, thin: bool) -> None:
    every = {name: scene.every if thin else 1 for name, scene in scenes.items()}
    points = [
        look(scene, deaths(scene.action, scene.root, every[name], seed), seed) * every[name]
        for name, scene in scenes.items()
    ]
    # Python 3.10 makes about 700 calls, 3.11 more.
    assert sum(points) > 3 * POINTS


@pytest.mark.parametrize(
    "name", ["install", "install deferred", "rollback", "boot", "first", "update"]
)
def test_what_was_not_flushed_is_lost_or_torn(
    scenes: dict[str, Scene], seed: int, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    scene, rng = scenes[name], random.Random(seed)
    how = ("nothing", "names", "everything", "random", "random")
    look(scene, cuts(scene.action, scene.root, how, rng), seed)
    assert "memory.json is damaged" not in caplog.text
