"""Whatever the moment an update dies, one slot is whole, and what is remembered is too."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from edgehp.shipping import slots
from edgehp.shipping.offers import Memory, read_memory
from tests import ship_parts as parts
from tests.faults import calls_of, killed, no_flush, recorded
from tests.update_parts import Fleet, new_fleet

# All together; by default every n-th of them.
POINTS = 200
THIN = 12


@dataclass(frozen=True)
class Scene:
    """A fleet with a new bundle and a new root key, and a device that had an update before."""

    fleet: Fleet
    root: Path

    def update(self, root: Path) -> object:
        return self.fleet.update(root)

    def copy(self, target: Path) -> Path:
        shutil.copytree(self.root, target)
        return target


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    folder = tmp_path_factory.mktemp("update-power")
    with no_flush():
        fleet = new_fleet(folder / "fleet", "one")
        made = Scene(fleet, folder / "root")
        made.update(made.root)
        for role in ("root", "timestamp"):
            fleet.rotate(role)
            fleet.publish()
        fleet.release("two")
    return made


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    with no_flush():
        yield


def version(memory: Memory) -> int:
    return int(json.loads(memory.files["timestamp.json"])["signed"]["version"])


def checked(scene: Scene, root: Path, caplog: pytest.LogCaptureFixture) -> str:
    """What starts; everything in both slots is whole, and so is what is remembered."""
    caplog.clear()
    started = parts.started_whole(root)
    memory = read_memory(root / "updates")
    assert "damaged" not in caplog.text
    # Never less than before the update: this is what refuses older lists.
    assert memory.serial in (1, 2)
    assert version(memory) >= version(read_memory(scene.root / "updates"))
    assert {"1.root.json", "timestamp.json", "snapshot.json", "targets.json"} <= set(memory.files)
    return started


def finished(scene: Scene, root: Path) -> None:
    """The next update succeeds, or finds all done, and leaves nothing lying about."""
    scene.update(root)
    current = slots.current(root)
    assert current.artifact_name == "two"
    assert {p.name for p in (root / "updates").iterdir()} <= {"lock", "memory.json", "device-id"}
    assert {p.name for p in (root / "slots").iterdir()} <= set(slots.SLOT_NAMES)
    assert read_memory(root / "updates").serial == 2


@pytest.mark.parametrize("thin", [THIN, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_every_call(
    scene: Scene, tmp_path: Path, seed: int, caplog: pytest.LogCaptureFixture, thin: int
) -> None:
    counted = scene.copy(tmp_path / "counted")
    count = calls_of(lambda: scene.update(counted))
    assert count >= POINTS
    seen = set()
    for point in [*range(seed % thin, count - 1, thin), count - 1]:
        root = scene.copy(tmp_path / "root")
        assert killed(lambda: scene.update(root), point).killed  # noqa: B023
        seen.add(checked(scene, root, caplog))
        if point % 8 == 0:
            finished(scene, root)
        shutil.rmtree(root)
    assert seen == {"one", "two"}


def test_what_was_not_flushed_is_lost_or_torn(
    scene: Scene, tmp_path: Path, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    rng = random.Random(seed)
    root = scene.copy(tmp_path / "root")
    recording = recorded(lambda: scene.update(root), root)
    states: set[str] = set()
    seen = set()
    for moment in range(len(recording)):
        for how in ("nothing", "names", "random"):
            found = tmp_path / "found"
            state = recording.after_cut(moment, found, how, rng)
            if state not in states:
                states.add(state)
                seen.add(checked(scene, found, caplog))
                if len(states) % 16 == 0:
                    finished(scene, found)
            shutil.rmtree(found)
    assert seen == {"one", "two"}
    assert len(states) >= len(recording)
