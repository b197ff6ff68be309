"""The car's own updater over edgehp: the states of Mender's and RAUC's protocols in order."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from edgehp.shipping import slots
from tests import ship_parts as parts
from tests.update_parts import name_here


@dataclass(frozen=True)
class Car:
    """A device with an updater: commands by name in a folder of their own."""

    folder: Path
    repo: Path
    signer: parts.Signer

    @property
    def root(self) -> Path:
        return self.folder / "root"

    def bundle(self, name: str, **options: float) -> Path:
        return parts.bundle(self.folder, name, self.signer, **options)

    def call(self, script: str, *arguments: object, **environment: str) -> tuple[int, str]:
        done = subprocess.run(
            [self.repo / "examples" / script, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            cwd=self.folder,
            env={
                **os.environ,
                "PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
                "PYTHONPATH": str(self.repo),
                "EDGEHP_UPDATER_CONF": str(self.folder / "updater.conf"),
                **environment,
            },
        )
        return done.returncode, done.stdout + done.stderr

    def restarts(self) -> int:
        log = self.folder / "restarts"
        return len(log.read_text().splitlines()) if log.exists() else 0


@pytest.fixture
def car(tmp_path: Path, repo: Path) -> Car:
    binaries = tmp_path / "bin"
    binaries.mkdir()
    programs = {
        "edgehp": f'exec {sys.executable} -m edgehp "$@"',
        "python3": f'exec {sys.executable} "$@"',
        # A service that is active unless the file "broken" says otherwise.
        "systemctl": f'case $1 in restart) echo "$2" >>{tmp_path}/restarts;; '
        f"is-active) [ ! -e {tmp_path}/broken ];; esac",
    }
    for name, text in programs.items():
        (binaries / name).write_text(f"#!/bin/sh\n{text}\n")
        (binaries / name).chmod(0o755)
    signer = parts.new_signer(tmp_path)
    (tmp_path / "updater.conf").write_text(
        (repo / "examples" / "updater.conf")
        .read_text()
        .replace("/etc/edgehp/release.pub", str(signer.public))
        .replace("/var/lib/edgehp", str(tmp_path / "root"))
    )
    return Car(tmp_path, repo, signer)


def mender(car: Car, bundle: Path, fail: str | None = None) -> list[str]:
    """Drive the update module as Mender's client does; the states that were run."""
    tree = car.folder / f"payload-{bundle.stem}"
    for name in ("files", "header", "tmp"):
        (tree / name).mkdir(parents=True)
    (tree / "files" / bundle.name).write_bytes(bundle.read_bytes())
    ran: list[str] = []

    def state(name: str) -> bool:
        ran.append(name)
        if name == fail:
            (car.folder / "broken").touch()
        return car.call("mender/edgehp", name, tree)[0] == 0

    assert car.call("mender/edgehp", "SupportsRollback", tree) == (0, "Yes\n")
    assert state("Download")
    done = state("ArtifactInstall")
    if done:
        assert car.call("mender/edgehp", "NeedsArtifactReboot", tree) == (0, "No\n")
        done = state("ArtifactCommit")
    if not done:
        assert state("ArtifactRollback")
        assert state("ArtifactFailure")
    assert state("Cleanup")
    return ran


def test_mender(car: Car) -> None:
    good = ["Download", "ArtifactInstall", "ArtifactCommit", "Cleanup"]
    assert mender(car, car.bundle("one")) == good
    assert name_here(car.root) == "one" and slots.status(car.root).confirmed
    assert car.restarts() == 1
    # What fails its self-test switches nothing, and nothing is rolled back.
    bad = ["Download", "ArtifactInstall", "ArtifactRollback", "ArtifactFailure", "Cleanup"]
    assert mender(car, car.bundle("skewed", offset=20.0)) == bad
    assert name_here(car.root) == "one" and car.restarts() == 1
    # What is installed and does not run goes back.
    ran = mender(car, car.bundle("two"), fail="ArtifactCommit")
    assert ran == [*good[:3], "ArtifactRollback", "ArtifactFailure", "Cleanup"]
    assert name_here(car.root) == "one" and car.restarts() == 3
    assert slots.status(car.root).confirmed
    # A payload of something else.
    other = car.folder / "other.txt"
    other.write_text("no bundle")
    assert mender(car, other) == bad


def test_rauc(car: Car) -> None:
    def install(bundle: Path, kind: str = "headpose") -> int:
        environment = {"RAUC_SLOT_CLASS": kind, "RAUC_IMAGE_NAME": str(bundle)}
        code, _ = car.call("rauc/hook", "slot-install", **environment)
        return code or car.call("rauc/hook", "slot-post-install", **environment)[0]

    one = car.bundle("one")
    assert install(one, "rootfs") == 1
    assert install(one) == 0
    assert car.call("rauc/hook", "good")[0] == 0
    assert slots.status(car.root).confirmed and car.restarts() == 1
    assert install(car.bundle("skewed", offset=20.0)) == 4
    assert install(car.bundle("two")) == 0
    assert name_here(car.root) == "two"
    # The last one that was confirmed stays until this one is.
    assert install(car.bundle("three")) == 5
    assert car.call("rauc/hook", "bad")[0] == 0
    assert name_here(car.root) == "one" and car.restarts() == 3
    assert car.call("rauc/hook", "nonesuch")[0] == 1
