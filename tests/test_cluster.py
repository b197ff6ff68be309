"""Work in processes here and on a real Dask cluster with TLS: same results, deaths, refusals."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgehp.cli.main import main
from edgehp.cluster import ShardsLostError, Workers, run_shards
from edgehp.datasets.base import Dataset, Skips
from edgehp.errors import DataError, EnvironmentalError, UsageError
from edgehp.networks.description import load_description
from edgehp.training.labelling import label_samples
from tests.dask_cluster import (
    Cluster,
    Doubling,
    KillingPhoto,
    Sleeping,
    certificates,
    environment,
)
from tests.faces import teacher_toml, write_faces
from tests.processes import children, eventually, python
from tests.test_validation_run import artifact_of, biwi_tree

dask = pytest.importorskip("dask", reason="clusters need the extra 'cluster'")
pytest.importorskip("distributed", reason="clusters need the extra 'cluster'")


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    settings = certificates(tmp_path_factory.mktemp("tls"))
    with dask.config.set(settings):
        yield settings


@pytest.fixture(scope="module")
def cluster(tls: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    found = Cluster(tmp_path_factory.mktemp("dask"), tls)
    try:
        found.start(workers=2)
        yield found
    finally:
        found.stop()


@pytest.fixture(params=["processes", "cluster"])
def workers(request: pytest.FixtureRequest) -> Workers:
    if request.param == "processes":
        return Workers(2)
    return Workers(address=request.getfixturevalue("cluster").address)


@pytest.fixture
def faces(tmp_path: Path) -> Dataset:
    return write_faces(tmp_path / "faces", 40, np.random.default_rng(5))


def test_a_death_costs_its_shard_once_more(workers: Workers, tmp_path: Path) -> None:
    work = Doubling(tmp_path, kills={5: 1})
    found = dict(pair for shard in run_shards(work, range(20), workers, size=2) for pair in shard)
    assert isinstance(found.pop(13), DataError)
    assert found == {i: 2 * i for i in range(20) if i != 13}
    assert len(list(tmp_path.glob("5-*"))) == 1


def test_what_always_kills_fails_alone_and_is_named(workers: Workers, tmp_path: Path) -> None:
    found = {}
    with pytest.raises(ShardsLostError) as lost:
        for shard in run_shards(Doubling(tmp_path, {5: 99}), range(20), workers, size=2):
            found.update(shard)
    (shard,) = lost.value.shards
    assert 5 in shard and len(shard) <= 2
    assert found.keys() == set(range(20)) - set(shard)
    # Twice, and never a third time.
    assert len(list(tmp_path.glob("5-*"))) == 2


def test_labels_do_not_depend_on_who_computes_them(
    cluster: Cluster, tls: dict[str, str], tmp_path: Path, faces: Dataset
) -> None:
    toml = teacher_toml(tmp_path / "t", more="[grid]\nsize = 3\nstep = 0.1")
    here, there = tmp_path / "faces", tmp_path / "there"
    damaged = here / "00017.png"
    damaged.write_bytes(damaged.read_bytes()[:40])
    # The workers have the photos elsewhere, or get them sent.
    shutil.copytree(here, there)

    def run(name: str, **where: Any) -> list[str]:
        skips = Skips(True)
        out = tmp_path / name
        list(label_samples(faces.samples, [load_description(toml)], out, skips=skips, **where))
        return [s.name for s in skips.found]

    skipped = run("one")
    assert len(skipped) == 1
    at = Workers(address=cluster.address)
    assert run("there", workers=at, places=(here, there)) == skipped
    assert run("two", workers=Workers(2)) == skipped
    words = ["label", here, "--teacher", toml, "--output", tmp_path / "sent", "--skip-bad"]
    done = subprocess.run(
        [sys.executable, "-m", "edgehp", *words, "--cluster", at.address],
        env=environment(tls),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "39 photos labelled" in done.stdout
    assert done.stderr.count("00017.png") >= 1
    assert "distributed" not in done.stderr
    one, *others = (
        (tmp_path / name / "labels.csv").read_bytes() for name in ("one", "there", "two", "sent")
    )
    assert len(one.splitlines()) == 40
    assert others == [one] * 3
    assert not list(cluster.folder.rglob("edgehp-*"))


def test_a_photo_that_kills_is_named(tmp_path: Path, faces: Dataset) -> None:
    spec = load_description(teacher_toml(tmp_path / "t"))
    samples = [
        replace(s, source=KillingPhoto(s.source.path)) if s.name.endswith("00030.png") else s
        for s in faces.samples
    ]
    out = tmp_path / "labels"
    with pytest.raises(EnvironmentalError, match=r"00030\.png to .*00039\.png") as error:
        list(label_samples(samples, [spec], out, workers=Workers(1)))
    assert "\nhint: " in str(error.value)
    done = len((out / "labels.csv").read_text().splitlines()) - 1
    assert done == 30
    # Once it kills no more, the file is as it had never been.
    list(label_samples(faces.samples, [spec], out))
    list(label_samples(faces.samples, [spec], tmp_path / "whole"))
    assert (out / "labels.csv").read_bytes() == (tmp_path / "whole" / "labels.csv").read_bytes()


def test_many_validations_are_one_table(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifacts = [
        artifact_of(tmp_path / "dist" / name, {"offset": (off, 1, 1)}, {"offset": (1, 1, 1)})
        for name, off in (("near", 1.05), ("far", 1.6), ("altered", 1.05))
    ]
    (artifacts[2] / "engine.onnx").write_bytes(b"altered")
    biwi_tree(tmp_path / "data" / "biwi", frames=2)
    heads = tmp_path / "data" / "rendered"
    write_faces(heads / "rendered", 6, np.random.default_rng(1))
    (heads / "rendered" / "boxes.csv").rename(heads / "labels.csv")
    at = ["--data-root", tmp_path / "data"]
    there = ["--cluster", cluster.address, "--remote-data-root", tmp_path / "data"]

    def run(*words: object) -> tuple[int, str, str]:
        sets = ["--dataset", "biwi", "--dataset", "rendered", "--no-robustness", "--threads", 1]
        with pytest.raises(SystemExit) as caught:
            main(["validate", *map(str, [*words, *sets])])
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    code, table, err = run(*artifacts, *at, "--output", tmp_path / "reports")
    assert code == 4
    rows = [line.split() for line in table.splitlines()[2:]]
    assert [r[:2] for r in rows] == [
        [name, data] for name in ("near", "far", "altered") for data in ("biwi", "rendered")
    ]
    assert [r[-1] for r in rows[:3]] == ["PASS", "PASS", "FAIL"]
    assert [r[-1] for r in rows[-2:]] == ["ERROR", "ERROR"]
    assert err.count("altered on ") == err.count("found 7 bytes") == 2
    reports = sorted(p.name for p in (tmp_path / "reports").iterdir())
    assert reports == [f"{a}-{d}.json" for a in ("far", "near") for d in ("biwi", "rendered")]
    one = run(*artifacts, *at, "--json")
    assert run(*artifacts, *at, "--json", "--workers", 2)[:2] == one[:2]
    # The artifacts travel: there is nothing of them at the workers.
    sent = run(*artifacts, *there, "--json")
    assert [r["report"] for r in json.loads(sent[1])] == [r["report"] for r in json.loads(one[1])]
    assert run(*artifacts[:2], *at)[0] == 3
    assert run(artifacts[0], *there[:2])[0] == 2


# A cluster finishes the shards of a client that is killed: nobody can tell it not to.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "number"),
    [
        ("processes", signal.SIGINT),
        ("processes", signal.SIGKILL),
        ("cluster", signal.SIGINT),
    ],
)
def test_an_end_here_leaves_nothing_running(
    way: str, number: signal.Signals, cluster: Cluster, tls: dict[str, str], tmp_path: Path
) -> None:
    script = f"""
from pathlib import Path
from edgehp.cluster import Workers, run_shards
from tests.dask_cluster import Sleeping
if __name__ == "__main__":
    workers = Workers(2) if {way!r} == "processes" else Workers(address={cluster.address!r})
    list(run_shards(Sleeping(Path({str(tmp_path)!r})), range(100), workers, size=50))
"""
    (tmp_path / "run.py").write_text(script)
    process = python(tmp_path / "run.py", env=environment(tls))
    assert eventually(lambda: len(list(tmp_path.glob("pid-*"))) >= 2)
    running = children(process.pid)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert eventually(lambda: not any(alive(pid) for pid in running))
    time.sleep(0.3)
    count = len(list(tmp_path.glob("pid-*")))
    time.sleep(0.5)
    assert len(list(tmp_path.glob("pid-*"))) == count
    assert not list(cluster.folder.rglob("edgehp-*"))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_a_scheduler_that_goes_away(tls: dict[str, str], tmp_path: Path) -> None:
    own = Cluster(tmp_path / "dask", tls)
    try:
        own.start(workers=1)
        shards = run_shards(Sleeping(tmp_path), range(100), Workers(address=own.address), size=1)
        next(shards)
        own.processes[0].kill()
        with pytest.raises(EnvironmentalError, match="went away\nhint: start it"):
            list(shards)
    finally:
        own.stop()


def test_clusters_that_cannot_be_used(
    tls: dict[str, str], cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(address: str) -> str:
        with pytest.raises((EnvironmentalError, UsageError)) as error:
            list(run_shards(Sleeping(tmp_path), range(2), Workers(address=address), size=1))
        return str(error.value)

    assert "is not encrypted" in refused("tcp://10.0.0.1:8786")
    assert "use tls://head.lab:8786" in refused("tcp://head.lab:8786")
    for address in ("head:8786", "inproc://x", "tls://head", "tls://head:port"):
        assert "expected tls://HOST:PORT" in refused(address)
    monkeypatch.setattr("edgehp._dask._PATIENCE_S", 2)
    assert "no Dask scheduler can be reached" in refused("tcp://127.0.0.1:1")
    with dask.config.set({"distributed.comm.tls.ca-file": None}):
        assert "no Dask scheduler can be reached" in refused(cluster.address)
    monkeypatch.setattr("edgehp._dask.__version__", "0.0.7")
    assert "this machine 0.0.7\nhint: install the same version" in refused(cluster.address)
    with pytest.raises(UsageError, match="not both"):
        Workers(2, cluster.address)
