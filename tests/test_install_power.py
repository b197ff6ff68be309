"""Whatever the moment of a power cut, one slot is whole and passes its self-test."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from edgehp.errors import DataError
from edgehp.shipping import slots
from tests import ship_parts as parts
from tests.faults import calls_of, killed, no_flush, recorded

# All together; by default every n-th of them.
POINTS = 200
THIN = 6


@dataclass(frozen=True)
class Scene:
    """Bundles, and a root in which the first two are installed."""

    signer: parts.Signer
    bundles: dict[str, Path]
    root: Path

    def install(self, name: str, root: Path) -> slots.Slot:
        return parts.install(self.bundles[name], self.signer, root)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    folder = tmp_path_factory.mktemp("power")
    signer = parts.new_signer(folder)
    bundles = {}
    for name in ("one", "two", "three", "late"):
        artifact = parts.tiny_artifact(folder / name, deferred=name == "late")
        bundles[name] = parts.quick_bundle(folder / f"{name}.edgehp", artifact, signer)
    made = Scene(signer, bundles, folder / "root")
    with no_flush():
        made.install("one", made.root)
        made.install("two", made.root)
    return made


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    with no_flush():
        yield


def swept(scene: Scene, root: Path) -> None:
    """The next installer succeeds and leaves nothing lying about."""
    assert scene.install("one", root).artifact_name == "one"
    assert {p.name for p in root.iterdir()} == {"lock", "state.lock", "state.json", "slots"}
    assert {p.name for p in (root / "slots").iterdir()} <= set(slots.SLOT_NAMES)


Action = Callable[[Scene, Path], object]


@dataclass(frozen=True)
class Case:
    """What is interrupted, every how many calls, and which artifacts may start afterwards."""

    action: Action
    allowed: frozenset[str]
    every: int = 1


CASES = {
    "install": Case(lambda s, root: s.install("three", root), frozenset({"two", "three"})),
    # Nearly twice as many calls, most of them of the writer that `edgehp build` uses too.
    "install deferred": Case(
        lambda s, root: s.install("late", root), frozenset({"two", "late"}), every=3
    ),
    "rollback": Case(
        lambda s, root: slots.rollback(root, selftest=parts.here), frozenset({"one", "two"})
    ),
    "boot": Case(lambda s, root: slots.boot(root, parts.here), frozenset({"two"})),
}


@pytest.mark.parametrize("thin", [THIN, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_every_call(scene: Scene, tmp_path: Path, seed: int, thin: int) -> None:
    points = sum(_killed_points(scene, case, tmp_path, seed, thin) for case in CASES.values())
    assert points >= POINTS // thin


def _killed_points(scene: Scene, case: Case, folder: Path, seed: int, thin: int) -> int:
    counted = _copy(scene, folder / "counted")
    count = calls_of(lambda: case.action(scene, counted))
    shutil.rmtree(counted)
    seen = set()
    every = case.every * thin
    points = [*range(seed % every, count - 1, every), count - 1]
    for point in points:
        root = _copy(scene, folder / "root")
        # The copy is made here, so that every call of the child belongs to the action.
        assert killed(lambda: case.action(scene, root), point).killed  # noqa: B023
        seen.add(name := parts.started_whole(root))
        assert name in case.allowed, (point, seed)
        if point % 8 == 0:
            swept(scene, root)
        shutil.rmtree(root)
    # Some points are before the switch, some behind it.
    assert seen == case.allowed
    return len(points)


@pytest.mark.parametrize("name", CASES)
def test_what_was_not_flushed_is_lost_or_torn(
    scene: Scene, tmp_path: Path, seed: int, name: str
) -> None:
    rng = random.Random(seed)
    case = CASES[name]
    root = _copy(scene, tmp_path / "root")
    recording = recorded(lambda: case.action(scene, root), root)
    states: set[str] = set()
    seen = set()
    for moment in range(len(recording)):
        for how in ("nothing", "names", "everything", "random", "random"):
            found = tmp_path / "found"
            state = recording.after_cut(moment, found, how, rng)
            if state not in states:
                states.add(state)
                seen.add(begun := parts.started_whole(found))
                assert begun in case.allowed, (moment, how, seed)
                if len(states) % 16 == 0:
                    swept(scene, found)
            shutil.rmtree(found)
    assert seen == case.allowed
    # A layer that always found the same state would prove nothing. A flush ends in a state that was
    # possible before it, so that a short action has fewer states than calls.
    assert 2 * len(states) > len(recording)


def _copy(scene: Scene, target: Path) -> Path:
    shutil.copytree(scene.root, target)
    return target


def test_the_first_installation(scene: Scene, tmp_path: Path, seed: int) -> None:
    """There is nothing to return to yet: nothing is installed, or a whole slot is."""
    rng = random.Random(seed)
    root = tmp_path / "root"
    root.mkdir()
    recording = recorded(lambda: scene.install("one", root), root)
    seen = set()
    for moment in range(len(recording)):
        for how in ("nothing", "names", "random"):
            found = tmp_path / "found"
            recording.after_cut(moment, found, how, rng)
            try:
                seen.add(parts.started_whole(found))
            except DataError:
                seen.add("nothing")
            if moment % 8 == 0:
                swept(scene, found)
            shutil.rmtree(found)
    assert seen == {"nothing", "one"}
