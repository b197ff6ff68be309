"""Artifacts: the manifest is strict, and nothing altered or out of place is accepted."""

from __future__ import annotations

import copy
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
import pytest

from edgehp.artifact import golden_crops, load_artifact, newest_artifact, verify_golden
from edgehp.artifact.check import check_device
from edgehp.artifact.manifest import (
    Accuracy,
    BuildRecord,
    EngineRecord,
    Golden,
    Manifest,
    PrecisionRecord,
    StepTime,
    TargetRecord,
    manifest_schema,
    parse_manifest,
    sealed,
)
from edgehp.artifact.write import ArtifactWriter
from edgehp.driver import Gpu
from edgehp.engines.audit import LayerPrecision
from edgehp.engines.base import EngineInfo, Prediction
from edgehp.engines.tensorrt_build import AMPERE_AND_LATER
from edgehp.errors import CompatibilityError, DataError, EnvironmentalError, UsageError
from edgehp.networks.spec import KD_RESNET
from tests import helpers

SIZE = 32
SPEC = KD_RESNET.with_size(SIZE)
# The picture of two golden crops, BGR.
STORED = (np.arange(2 * SIZE * SIZE * 3) % 251).astype(np.uint8).reshape(2 * SIZE, SIZE, 3)


@dataclass
class Device:
    """A device in a test's words."""

    found: tuple[Gpu, ...] = (Gpu("Orin", "8.7"),)
    model: str | None = "NVIDIA Jetson AGX Orin"
    versions: tuple[tuple[str, str], ...] = (("tensorrt", "10.3.0"), ("openvino", "2026.4.1"))

    def gpus(self) -> tuple[Gpu, ...]:
        return self.found

    def module(self) -> str | None:
        return self.model

    def version(self, kind: str) -> str | None:
        return dict(self.versions).get(kind)


def a_manifest(created: str = "2026-01-02T03:04:05Z") -> Manifest:
    return helpers.a_manifest(
        SPEC,
        Golden("golden.png", ((1.0, 2.0, 3.0),) * 2, ((1.0, 1.0, 1.0),) * 2, 0.5),
        name="kd-resnet18-orin-int8",
        created=created,
        target=TargetRecord("orin-agx-64gb", ("8.7",), "NVIDIA Jetson AGX Orin", "Orin"),
        precision=PrecisionRecord(
            "int8", "int8", "engine", {"int8": 1}, (LayerPrecision("c", "Convolution", "int8"),)
        ),
        engine=EngineRecord("tensorrt", ("e.plan",), {"tensorrt": "10.3.0"}, 1, 1, 8, "aarch64"),
        graph="g.onnx",
        accuracy=Accuracy("heads", 99, "mae-drop", 4.0, 4.01, 0.01, (0.0, 0.02), 0.1, "engine"),
        build=BuildRecord({"target": "orin"}, (StepTime("engine", 1.5),), ("a warning",)),
    )


ROLES = {"e.plan": "engine", "g.onnx": "graph", "golden.png": "golden"}


def write(destination: Path, manifest: Manifest | None = None) -> Path:
    with ArtifactWriter(destination) as writer:
        (writer.path / "e.plan").write_bytes(b"engine" * 100)
        (writer.path / "g.onnx").write_bytes(b"graph")
        cv2.imwrite(str(writer.path / "golden.png"), STORED)
        writer.commit(manifest or a_manifest(), ROLES)
    return destination


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return write(tmp_path / "dist" / "kd-resnet18-orin-int8")


def edited(path: Path, change: Any) -> None:
    """Change the manifest's JSON in place, with a digest that fits."""
    file = path / "manifest.json"
    values = json.loads(file.read_text())
    change(values)
    file.write_bytes(sealed(values))


def refused(artifact: Path, words: str, device: Device | None = None) -> None:
    with pytest.raises(CompatibilityError, match=words):
        load_artifact(artifact, device=device or Device())


def test_what_is_written_is_what_is_read(artifact: Path) -> None:
    found = load_artifact(artifact, device=Device())
    assert found.manifest.with_files(()) == a_manifest()
    assert [f.path for f in found.manifest.files] == sorted(ROLES)
    assert found.engine_path.read_bytes() == b"engine" * 100
    assert [p.name for p in artifact.parent.iterdir()] == [artifact.name]


@pytest.mark.parametrize(
    ("device", "error", "words"),
    [
        (Device(found=(Gpu("V100", "7.0"),)), CompatibilityError, ["8.7", "V100", "7.0"]),
        (Device(found=()), CompatibilityError, ["8.7", "no NVIDIA GPU"]),
        (Device(model="NVIDIA Jetson Orin Nano"), CompatibilityError, ["AGX", "Nano", "build"]),
        (Device(model=None), CompatibilityError, ["AGX", "no Jetson"]),
        (Device(versions=(("tensorrt", "10.13.3"),)), CompatibilityError, ["10.3.0", "10.13.3"]),
        (Device(versions=(("tensorrt", "10.3.1"),)), CompatibilityError, ["10.3.0", "10.3.1"]),
        (Device(versions=()), EnvironmentalError, ["tensorrt", "not installed"]),
    ],
)
def test_a_wrong_device_is_refused(
    artifact: Path, device: Device, error: type[Exception], words: list[str]
) -> None:
    with pytest.raises(error) as e:
        load_artifact(artifact, device=device)
    assert all(w in str(e.value) for w in words), e.value


NANO_KIT = "NVIDIA Jetson Orin Nano Developer Kit (p3767-0005)"


@pytest.mark.parametrize(
    ("built", "here", "accepted"),
    [
        # One target's parts, whatever the carrier calls itself, and as older manifests word it.
        (NANO_KIT, "Acme Vision Box (p3767-0003)", True),
        ("Kit Super (p3768-0000+p3767-0005-super)", "Acme Vision Box (p3767-0003)", True),
        (NANO_KIT, "Acme Vision Box (p3767-0004)", False),
        (NANO_KIT, "Acme Vision Box", False),
        (NANO_KIT, None, False),
    ],
)
def test_the_module_counts_and_not_the_carrier(
    built: str, here: str | None, accepted: bool
) -> None:
    target = TargetRecord("orin-nano-8gb", ("8.7",), built, "Orin")
    manifest = msgspec.structs.replace(a_manifest(), target=target)
    if accepted:
        check_device(manifest, Device(model=here), "a")
        return
    with pytest.raises(CompatibilityError, match="was built on"):
        check_device(manifest, Device(model=here), "a")


@pytest.mark.parametrize(
    ("kind", "versions", "here", "words"),
    [
        ("openvino", {}, "2026.4.1", None),
        ("openvino", {}, "2026.5", None),
        ("openvino", {}, "2027.0.0", None),
        ("openvino", {}, "2026.4.0", r"found the older 2026\.4\.0"),
        ("openvino", {}, "2025.9", r"found the older 2025\.9"),
        # Of a version-compatible engine.
        ("tensorrt", {"tensorrt_major": "10"}, "10.3.0", None),
        ("tensorrt", {"tensorrt_major": "10"}, "10.16.2", None),
        ("tensorrt", {"tensorrt_major": "10"}, "10.2.0", r"install 10\.3\.0 or a later 10\.x"),
        ("tensorrt", {"tensorrt_major": "10"}, "11.0.0", r"install 10\.3\.0 or a later 10\.x"),
    ],
)
def test_which_other_versions_of_a_runtime_read_an_engine(
    kind: str, versions: dict[str, str], here: str, words: str | None
) -> None:
    built = {"openvino": "2026.4.1-22982-0a1b2c-releases/2026/4", "tensorrt": "10.3.0"}[kind]
    engine = EngineRecord(kind, ("e.plan",), {kind: built, **versions}, 1, 1, 8, "x")
    target = TargetRecord("x", AMPERE_AND_LATER if kind == "tensorrt" else ())
    manifest = msgspec.structs.replace(a_manifest(), engine=engine, target=target)
    device = Device(found=(Gpu("NVIDIA L4", "8.9"),), model=None, versions=((kind, here),))
    if words is None:
        check_device(manifest, device, "a")
        return
    with pytest.raises(CompatibilityError, match=words):
        check_device(manifest, device, "a")


@pytest.mark.parametrize("name", sorted(ROLES))
def test_a_changed_byte_a_cut_and_a_missing_file_are_refused(artifact: Path, name: str) -> None:
    file = artifact / name
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    refused(artifact, "was changed")
    file.write_bytes(data[:-1])
    refused(artifact, "the manifest says")
    file.unlink()
    refused(artifact, "missing")
    refused(artifact, "compute capability", Device(found=()))  # the device is checked first


def test_links_and_unlisted_files_are_refused(artifact: Path, tmp_path: Path) -> None:
    plan = artifact / "e.plan"
    outside = tmp_path / "outside"
    plan.rename(outside)
    plan.symlink_to(outside)
    refused(artifact, "symbolic link")
    plan.unlink()
    outside.rename(plan)
    (artifact / "reports").mkdir()
    (artifact / "reports" / "bench.json").write_text("{}")
    load_artifact(artifact, device=Device())
    (artifact / "e.plan.data").write_text("x")
    refused(artifact, r"e\.plan\.data: a file that the manifest")


def test_no_artifact_at_all(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="edgehp build"):
        load_artifact(tmp_path / "nothing")
    with pytest.raises(CompatibilityError, match=r"manifest\.json: missing"):
        load_artifact(tmp_path)


def test_another_schema_is_named_as_such(artifact: Path) -> None:
    edited(artifact, lambda v: v.update(schema_version=4, edgehp_version="9.9", new=1))
    refused(artifact, r"schema 4, this edgehp reads up to 3.*9\.9")
    edited(artifact, lambda v: v.update(schema_version=1))
    refused(artifact, "older edgehp: build it again")


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.pop("golden"),
        lambda v: v.update(extra=1),
        lambda v: v.update(state="broken"),
        lambda v: v.update(schema_version=0),
        lambda v: v.update(schema_version="1"),
        lambda v: v.update(engine=None),
        lambda v: v["files"].clear(),
        lambda v: v["files"].append(dict(v["files"][0])),
        lambda v: v["files"][0].update(size=-1),
        lambda v: v["files"][0].update(size=2**40),
        lambda v: v.update(graph="other.onnx"),
        lambda v: v["engine"].update(max_batch=0),
        lambda v: v["engine"].update(min_batch=9),
        lambda v: v["golden"]["angles"].pop(),
        lambda v: v["golden"].update(tolerance_degrees=-1),
        lambda v: v["preprocessing"]["spec"].update(size=64),
        lambda v: v["preprocessing"].update(spec={"size": 7}),
        lambda v: v["network"]["spec"].update(depth=34),
    ],
)
def test_a_malformed_manifest_is_refused(artifact: Path, change: Any) -> None:
    edited(artifact, change)
    refused(artifact, ".")


def test_paths_cannot_leave_the_artifact(artifact: Path) -> None:
    listed = [f["path"] for f in json.loads((artifact / "manifest.json").read_text())["files"]]
    for path in (
        "../e.plan", "/etc/passwd", "a/../../b", ".hidden", "a//b", "", "a\\b", "c:x", "e.plan\n",
        "~",
    ):  # fmt: skip

        def change(values: dict[str, Any], path: str = path) -> None:
            values["files"][listed.index("e.plan")]["path"] = path
            values["engine"]["files"] = [path]

        edited(artifact, change)
        refused(artifact, "expected the form")


def test_an_edited_manifest_is_noticed(artifact: Path) -> None:
    file = artifact / "manifest.json"
    text = file.read_text()
    assert '"tolerance_degrees": 0.5' in text
    file.write_text(text.replace('"tolerance_degrees": 0.5', '"tolerance_degrees": 9.5'))
    refused(artifact, "altered")


def test_bytes_that_are_no_manifest() -> None:
    almost = sealed({"schema_version": 3, "a": 1})
    for data in (
        b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b" " * (5 * 2**20),
        almost[:-2], almost + b"\n", almost.replace(b"\n", b"\r\n"),
    ):  # fmt: skip
        with pytest.raises(CompatibilityError):
            parse_manifest(data, "manifest.json")


def mutated(values: Any, rng: random.Random) -> Any:
    """One random change somewhere in a JSON value."""
    values = copy.deepcopy(values)
    node, steps = values, rng.randrange(1, 5)
    for _ in range(steps):
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            break
        key = rng.choice(keys)
        if isinstance(node[key], (dict, list)) and rng.random() < 0.8:
            node = node[key]
            continue
        junk = [None, True, -1, 0, 1, 2.5, 1e30, "", "x", "../y", "0" * 600, [], {}, [1, 2, 3]]
        action = rng.randrange(3)
        if action == 0:
            node[key] = rng.choice(junk)
        elif action == 1:
            node.pop(key)
        elif isinstance(node, dict):
            node["unknown"] = rng.choice(junk)
        else:
            node.append(rng.choice(junk))
        break
    return values


def test_what_is_accepted_fits_the_published_schema(artifact: Path, seed: int) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    rng = random.Random(seed)
    schema = manifest_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    values = json.loads((artifact / "manifest.json").read_text())
    assert validator.is_valid(values)
    verdicts = {True: 0, False: 0}
    for _ in range(200):
        mutant = mutated(values, rng)
        mutant["schema_version"] = values["schema_version"]
        mutant = json.loads(sealed(mutant))
        try:
            parse_manifest(sealed(mutant), "m.json")
        except CompatibilityError:
            verdicts[False] += 1
        else:
            # The schema cannot say what concerns several keys, so it may accept more than we do.
            assert validator.is_valid(mutant), (seed, list(validator.iter_errors(mutant)))
            verdicts[True] += 1
    assert min(verdicts.values()) > 10, verdicts


def test_deferred_artifacts_say_how_to_finish(tmp_path: Path) -> None:
    manifest = msgspec.structs.replace(a_manifest(), state="deferred", engine=None, accuracy=None)
    path = write(tmp_path / "a", manifest)
    with pytest.raises(CompatibilityError, match="edgehp build --finish"):
        load_artifact(path, device=Device())
    found = load_artifact(path, device=Device(found=()), allow_deferred=True)
    with pytest.raises(CompatibilityError, match="deferred"):
        _ = found.engine_path


class Fixed:
    """An engine that answers golden crops with numbers of the test's choice."""

    info = EngineInfo("openvino", "1", "CPU", 1, "int8")
    input_size = SIZE

    def __init__(self, angles: list[list[float]]) -> None:
        self.angles = np.array(angles, np.float32)
        self.seen: list[np.ndarray[Any, Any]] = []

    def infer(self, crops: Any) -> Prediction:
        self.seen.append(crops)
        return Prediction(self.angles, np.ones_like(self.angles))

    def close(self) -> None: ...

    def __enter__(self) -> Fixed:
        return self

    def __exit__(self, *rest: object) -> None: ...


def test_golden_vectors(artifact: Path) -> None:
    found = load_artifact(artifact, device=Device())
    engine = Fixed([[1.0, 2.0, 3.4], [1.0, 1.8, 3.0]])
    assert verify_golden(found, engine) == pytest.approx(0.4, abs=1e-5)
    # The crops are RGB.
    assert (engine.seen[0][..., ::-1].ravel() == STORED.ravel()).all()
    assert golden_crops(found).shape == (2, SIZE, SIZE, 3)
    with pytest.raises(CompatibilityError, match=r"golden crop 1 gives a yaw that is 0\.60"):
        verify_golden(found, Fixed([[1.0, 2.0, 3.0], [1.0, 1.4, 3.0]]))
    with pytest.raises(CompatibilityError, match="golden crop"):
        verify_golden(found, Fixed([[1.0, 2.0, 3.0], [float("nan"), 2.0, 3.0]]))


def test_the_newest_complete_artifact(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dist = tmp_path / "dist"
    with pytest.raises(DataError, match="edgehp build"):
        newest_artifact(dist)
    write(dist / "b", a_manifest("2026-01-02T00:00:00Z"))
    write(dist / "a", a_manifest("2026-01-03T00:00:00Z"))
    later = a_manifest("2026-01-04T00:00:00Z")
    write(dist / "c", msgspec.structs.replace(later, state="deferred", engine=None))
    write(dist / "d", a_manifest("2026-01-05T00:00:00Z"))
    (dist / "d" / "manifest.json").write_text("{")
    assert newest_artifact(dist) == dist / "a"
    assert "passed over" in caplog.text


def test_an_aborted_write_leaves_the_old_artifact(artifact: Path) -> None:
    before = {p.name: p.read_bytes() for p in artifact.iterdir()}
    with pytest.raises(ZeroDivisionError), ArtifactWriter(artifact) as writer:
        (writer.path / "e.plan").write_bytes(b"new")
        raise ZeroDivisionError
    assert {p.name: p.read_bytes() for p in artifact.iterdir()} == before
    assert [p.name for p in artifact.parent.iterdir()] == [artifact.name]


def test_a_commit_needs_a_role_for_every_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"stray\.txt"), ArtifactWriter(tmp_path / "a") as writer:
        (writer.path / "stray.txt").write_bytes(b"")
        writer.commit(a_manifest(), {})
    assert list(tmp_path.iterdir()) == []


def test_killed_between_the_renames_the_old_one_comes_back(artifact: Path) -> None:
    dist = artifact.parent
    artifact.rename(dist / f".{artifact.name}.old")
    left = dist / f".{artifact.name}.building-0a1b2c3d"
    (left / "artifact").mkdir(parents=True)
    other = dist / f".{artifact.name}.building-tool.building-0a1b2c3d"
    other.mkdir()
    with ArtifactWriter(artifact):
        assert load_artifact(artifact, device=Device())
    assert sorted(p.name for p in dist.iterdir()) == sorted([other.name, artifact.name])


def test_two_writers_of_one_artifact(tmp_path: Path) -> None:
    with (
        ArtifactWriter(tmp_path / "a"),
        ArtifactWriter(tmp_path / "b"),
        pytest.raises(EnvironmentalError, match="another process"),
        ArtifactWriter(tmp_path / "a"),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_an_artifact_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="not replaced"):
        ArtifactWriter(tmp_path / "home")
    with pytest.raises(UsageError, match="file or a link"):
        ArtifactWriter(tmp_path / "home" / "thesis.tex")
