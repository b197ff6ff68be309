"""The C++ example: the answers of edgehp, and its refusals word for word."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import cv2
import numpy as np
import pytest
from click.testing import CliRunner

from edgehp.artifact import golden_crops, load_artifact, verify_golden
from edgehp.artifact.check import read_manifest
from edgehp.artifact.manifest import sealed
from edgehp.artifact.open import open_artifact
from edgehp.crop import Box, crop_face
from edgehp.driver import Gpu
from edgehp.errors import EdgehpError
from edgehp.files import json_digest, sha256_bytes
from edgehp.targets import list_targets, load_target
from tests.bench_artifact import make_artifact
from tests.test_artifact import Device, mutated

EXAMPLE = "examples/cpp"
HEADERS = {
    "libopencv-core-dev": "/usr/include/opencv4/opencv2/core.hpp",
    "libopencv-imgproc-dev": "/usr/include/opencv4/opencv2/imgproc.hpp",
    "libopencv-imgcodecs-dev": "/usr/include/opencv4/opencv2/imgcodecs.hpp",
    "nlohmann-json3-dev": "/usr/include/nlohmann/json.hpp",
    "libssl-dev": "/usr/include/openssl/sha.h",
}
# OpenVINO keeps some memory until the process ends.
SANITIZED = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}


@pytest.fixture(scope="module")
def programs(repo: Path, pytestconfig: pytest.Config) -> Path:
    """The folder of the programs, built with warnings as errors and with sanitizers.

    It is kept from run to run in pytest's cache, so that only what has changed is compiled.
    """
    missing = [name for name, header in HEADERS.items() if not Path(header).exists()]
    missing += [name for name in ("cmake", "g++", "make") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"needs the Debian packages {', '.join(missing)}")
    found = importlib.util.find_spec("openvino")
    assert found is not None and found.origin is not None
    cmake = Path(found.origin).parent / "cmake"
    if not cmake.is_dir():
        pytest.skip("this wheel of OpenVINO has no CMake files")
    places = sha256_bytes(f"{repo} {cmake}".encode())
    build = pytestconfig.cache.mkdir(f"cpp-{places[:8]}")
    for command in (
        ["cmake", "-S", repo / "tests/cpp", "-B", build, "-DCMAKE_BUILD_TYPE=None",
         "-DEDGEHP_SANITIZE=ON", f"-DOpenVINO_DIR={cmake}"],
        ["cmake", "--build", build, "--parallel", "2"],
    ):  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return build


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small, so that a hundred of them are read in a second."""
    return make_artifact(tmp_path_factory.mktemp("artifact"), small=True)


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(tmp_path_factory.mktemp("resnet"))


@pytest.fixture(scope="module")
def photos(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """100 rendered heads."""
    folder = tmp_path_factory.mktemp("photos")
    with ZipFile(repo / "calibration/rendered-validation.zip") as archive:
        names = [n for n in archive.namelist() if n.endswith(".jpg")][:100]
        for name in names:
            (folder / Path(name).name).write_bytes(archive.read(name))
    return sorted(folder.iterdir())


def run(
    program: Path, *arguments: object, status: int = 0, said: bool = False, text: str = ""
) -> str:
    """What the program prints, or says on standard error."""
    done = subprocess.run(
        [program, *map(str, arguments)],
        input=text, capture_output=True, text=True, check=False, env=SANITIZED,
    )  # fmt: skip
    assert done.returncode == status, done.stdout + done.stderr
    return done.stderr if said else done.stdout


def listed(folder: Path, photo: Path, *boxes: object) -> Path:
    """A list of these boxes of a photo."""
    path = folder / "boxes.json"
    path.write_text(json.dumps({photo.name: [{"bbox": box} for box in boxes]}))
    return path


def test_the_modules_that_run_the_same_engines_are_those_of_the_targets(repo: Path) -> None:
    text = (repo / EXAMPLE / "artifact.cpp").read_text()
    for name in list_targets():
        parts = load_target(name).module_ids
        line = f'{{"{name}", {{' + ", ".join(f'"{p}"' for p in parts) + "}},"
        assert (line in text) == (len(parts) > 1), line


def assert_parity(programs: Path, artifact: Path, photos: list[Path], folder: Path) -> None:
    """The C interface gives edgehp's angles on the golden crops and the photos, to 1e-3 degrees."""
    expected, pictures = [], []
    with open_artifact(artifact) as network:
        assert network.artifact is not None
        crops = golden_crops(network.artifact)
        rgb = [cv2.imread(str(photo))[..., ::-1] for photo in photos]
        for i, picture in enumerate([*crops, *rgb]):
            pictures.append(folder / f"{i}.ppm")
            assert cv2.imwrite(str(pictures[-1]), picture[..., ::-1])
            crop = crop_face(np.ascontiguousarray(picture), None, network.preprocessing)
            expected.append(network.engine.infer(crop[None]).angles[0])
    lines = run(programs / "c_interface", artifact, *pictures).splitlines()
    found = [[float(line.split()[i]) for i in (1, 3, 5)] for line in lines]
    assert np.ptp(expected, axis=0).min() > 20  # the answers differ, or this proves nothing
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)


def test_the_angles_are_those_of_edgehp(
    programs: Path, resnet: Path, photos: list[Path], tmp_path: Path
) -> None:
    assert_parity(programs, resnet, photos, tmp_path)


@pytest.mark.slow
def test_the_angles_of_the_int8_artifact_of_make_run_are_those_of_edgehp(
    programs: Path, photos: list[Path], tmp_path: Path
) -> None:
    from edgehp.cli.build import command

    options = ("--target", "cpu", "--precision", "int8", "--output", str(tmp_path))
    done = CliRunner().invoke(command, ["--network", "kd-resnet18-112", *options])
    assert done.exit_code == 0, (done.output, done.exception)
    assert_parity(programs, tmp_path / "kd-resnet18-112-cpu-int8", photos, tmp_path)


def altered(artifact: Path, folder: Path, files: dict[str, bytes], **changes: Any) -> Path:
    """A copy with other files under these names, and with changes in the manifest that names it."""
    path = folder / "altered"
    shutil.copytree(artifact, path)
    values = json.loads((path / "manifest.json").read_text())
    for name, data in files.items():
        (path / name).write_bytes(data)
        values["files"] = [f for f in values["files"] if f["path"] != name]
        values["files"].append(
            {"path": name, "sha256": sha256_bytes(data), "size": len(data), "role": "engine"}
        )
    for key, change in changes.items():
        values[key] = {**values[key], **change}
    (path / "manifest.json").write_bytes(sealed(values))
    return path


def test_a_network_without_bins_has_no_spread(
    programs: Path, artifact: Path, photos: list[Path], tmp_path: Path
) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load(artifact / "engine.onnx")
    del model.graph.output[[o.name for o in model.graph.output].index("spread")]
    path = altered(
        artifact, tmp_path, {"engine.onnx": model.SerializeToString()},
        golden={"spread": None}, network={"spec": None, "digest": None},
    )  # fmt: skip
    from edgehp.cli.predict import command

    box = "3,4,90,95"
    python = CliRunner().invoke(command, [str(photos[0]), "--artifact", str(path), "--boxes", box])
    boxes = listed(tmp_path, photos[0], [float(x) for x in box.split(",")])
    ours = json.loads(run(programs / "example/edgehp-pose", path, "--boxes", boxes, photos[0]))
    theirs = json.loads(python.stdout)
    for name in ("pitch", "yaw", "roll"):
        assert abs(ours["angles"][name] - theirs["angles"].pop(name)) <= 0.0101
    assert ours == {**theirs, "angles": ours["angles"], "source": ours["source"]}
    assert ours["spread"] is None and ours["confidence"] is None and ours["state"] == "ok"


@pytest.fixture
def plan(artifact: Path, tmp_path: Path) -> Callable[..., Path]:
    """Makes an artifact whose engine the double of TensorRT runs: its angles are channel means."""
    with open_artifact(artifact) as network:
        assert network.artifact is not None
        means = golden_crops(network.artifact).mean((1, 2)) / 3

    def make(recipe: dict[str, Any] | None = None, **how: int) -> Path:
        how = {"size": 32, "min": 1, "max": 4, "spread": 1, "dla": -1, **how}
        data = "double-engine " + " ".join(f"{k}={v}" for k, v in how.items())
        kind = {"kind": "tensorrt", "files": ["engine.plan"], "versions": {"tensorrt": "10.3.0"}}
        return altered(
            artifact, tmp_path, {"engine.plan": data.encode()},
            golden={"angles": means.tolist(), "tolerance_degrees": 1e-3},
            engine=kind, target={"compute_capabilities": ["8.7"]}, build={"recipe": recipe or {}},
        )  # fmt: skip

    return make


@pytest.mark.parametrize(
    "how", [{}, {"spread": 0}, {"min": 1, "max": 1}, {"min": 2}, {"min": 3, "max": 3}, {"dla": 1}]
)
def test_tensorrt_answers_batches_of_any_size(
    programs: Path, plan: Callable[..., Path], photos: list[Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, how: dict[str, int],
) -> None:  # fmt: skip
    monkeypatch.setitem(SANITIZED, "DOUBLE_GPU", "Orin;8;7")
    path = plan({"dla": how["dla"]} if "dla" in how else {}, **how)
    picture = cv2.imread(str(photos[0]))
    boxes = [[10 + 7 * i, 20, 60 + 7 * i, 80] for i in range(7)]
    pose, names = programs / "example/edgehp-pose", listed(tmp_path, photos[0], *boxes)
    lines = run(pose, path, "--boxes", names, photos[0]).splitlines()
    assert len(lines) == len(boxes)
    how_cut = read_manifest(path).preprocessing
    for line, box in zip(map(json.loads, lines), boxes, strict=True):
        crop = crop_face(np.ascontiguousarray(picture[..., ::-1]), Box(*box), how_cut)
        expected = crop.mean((0, 1)) / 3
        np.testing.assert_allclose(list(line["angles"].values()), expected, atol=0.2)
        assert (line["spread"] is None) == (how.get("spread") == 0)


@pytest.mark.parametrize(
    ("gpu", "recipe", "how", "status", "words"),
    [
        ("", {}, {}, 5, "needs a GPU of compute capability 8.7 (target cpu): CUDA failed to find"),
        ("V100;7;0", {}, {}, 4, "this machine has V100 (compute capability 7.0)"),
        ("Orin;8;7", {}, {"dla": 0}, 4, "TensorRT refuses the engine: the engine is of another"),
        ("Orin;8;7", {"dla": 7}, {"dla": 7}, 5, "failed to use DLA core 7, which this device lac"),
        ("Orin;8;7", {}, {"size": 64}, 1, "one uint8 input 'crops' [N, 32, 32, 3]"),
    ],
)
def test_tensorrt_engines_that_do_not_fit_are_refused(
    programs: Path, plan: Callable[..., Path], monkeypatch: pytest.MonkeyPatch,
    gpu: str, recipe: dict[str, Any], how: dict[str, int], status: int, words: str,
) -> None:  # fmt: skip
    if gpu:
        monkeypatch.setitem(SANITIZED, "DOUBLE_GPU", gpu)
    said = run(programs / "example/edgehp-pose", plan(recipe, **how), status=status, said=True)
    assert words in said, said


@pytest.mark.parametrize("kind", ["onnxruntime", "tensorrt-rtx"])
def test_engines_of_other_runtimes_are_refused_with_a_hint(
    programs: Path, artifact: Path, tmp_path: Path, kind: str
) -> None:
    path = altered(artifact, tmp_path, {}, engine={"kind": kind, "versions": {kind: "1.7"}})
    said = run(programs / "example/edgehp-pose", path, status=5, said=True)
    assert f"is for {kind}, which is not built into this program" in said
    assert "hint: build the artifact for OpenVINO or TensorRT" in said


def test_the_program_prints_the_lines_of_predict(
    programs: Path, resnet: Path, photos: list[Path], tmp_path: Path, rng: np.random.Generator
) -> None:
    from edgehp.cli.predict import command

    boxes: dict[str, Any] = {}
    folder = tmp_path / "some"
    folder.mkdir()
    photos = [Path(shutil.copy(photo, folder)) for photo in photos[:30]]
    for photo in photos[:-1]:
        # Larger and smaller than the input, and beyond the photo's edges.
        at, size = rng.uniform(-50, 200, (3, 2)), rng.uniform(7, 200, (3, 2))
        corners = np.concatenate([at, at + size], axis=1)
        corners = corners[corners[:, 2:].min(axis=1) > 2]
        boxes[photo.name] = [{"bbox": c} for c in [[1, 2, 30.5, 40.25], *corners.round(2).tolist()]]
    names = tmp_path / "boxes.json"
    names.write_text(json.dumps(boxes))
    arguments = [folder, "--artifact", resnet, "--boxes", names]
    theirs = CliRunner().invoke(command, list(map(str, arguments))).stdout.splitlines()
    # The last photo is not in the list.
    pose = programs / "example/edgehp-pose"
    ours = run(pose, resnet, "--boxes", names, *photos, status=1).splitlines()
    assert len(ours) == len(theirs)
    for a, b in zip(map(json.loads, ours), map(json.loads, theirs), strict=True):
        for key in ("angles", "spread"):
            left, right = a.pop(key), b.pop(key)
            assert (left is None) == (right is None)
            for name in left or ():
                # Rounded to hundredths on either side of a half.
                assert abs(left[name] - right[name]) <= 0.0101, (a, left, right)
        for key in ("source", "problem"):
            a.pop(key), b.pop(key)
        if a["confidence"] is not None:
            assert abs(a.pop("confidence") - b.pop("confidence")) <= 1.01e-4
        assert a == b


def fault_apart(sentence: str) -> tuple[str, str]:
    """A refusal without what is wrong inside a manifest whose digest fits."""
    first, known, fault = sentence.partition(" is not a manifest of this version of edgehp: ")
    return first + known, fault[fault.rfind("; build") :] if known else ""


class Refusals:
    """Artifacts that are wrong in some way, each with the sentence that edgehp says."""

    def __init__(self, source: Path, folder: Path) -> None:
        self.source, self.folder = source, folder
        self.cases: list[dict[str, Any]] = []
        self.expected: list[tuple[int, str]] = []

    def copy(self) -> Path:
        """A copy whose large files are links: to change one, replace it."""
        path = self.folder / str(len(self.cases))
        shutil.copytree(self.source, path, copy_function=os.link)
        return path

    def add(self, path: Path, device: Device | None = None, *, opened: bool = False) -> None:
        try:
            loaded = load_artifact(path, device=device)
            if opened:
                with open_artifact(path, threads=1) as network:
                    verify_golden(loaded, network.engine)
        except EdgehpError as e:
            self.expected.append((e.exit_code, str(e)))
        else:
            self.expected.append((0, ""))
        told = None if device is None else {
            "gpus": [(gpu.name, gpu.compute_capability) for gpu in device.found],
            "module": device.model, "versions": dict(device.versions),
        }  # fmt: skip
        self.cases.append({"path": str(path), "device": told, "open": opened})

    def changed(
        self, change: Callable[[Any], Any], device: Device | None = None, **how: Any
    ) -> None:
        """The manifest changed, with a digest that fits again."""
        path = self.copy()
        values = json.loads((path / "manifest.json").read_text())
        values = change(values) or values
        self.replaced(path, sealed(values), device, **how)

    def replaced(self, path: Path, data: bytes, device: Device | None = None, **how: Any) -> None:
        (path / "manifest.json").unlink()
        (path / "manifest.json").write_bytes(data)
        self.add(path, device, **how)

    def run(self, programs: Path) -> list[tuple[int, str]]:
        """What the C++ library says of all of them."""
        lines = "".join(json.dumps(case) + "\n" for case in self.cases)
        said = run(programs / "check_artifacts", text=lines)
        found = [json.loads(line) for line in said.splitlines()]
        return [(f["status"], f["error"]) for f in found]

    def compare(self, programs: Path) -> None:
        """The C++ library says the same of all of them.

        But of a manifest whose digest fits, so that only its maker can have got it wrong, either
        names the fault in its own words.
        """
        for case, ours, theirs in zip(self.cases, self.run(programs), self.expected, strict=True):
            assert ours[0] == theirs[0] and fault_apart(ours[1]) == fault_apart(theirs[1]), case


@pytest.fixture
def refusals(artifact: Path, tmp_path: Path) -> Refusals:
    return Refusals(artifact, tmp_path)


@pytest.mark.parametrize("count", [60, pytest.param(500, marks=pytest.mark.slow)])
def test_mutated_artifacts_are_refused_in_the_same_words(
    programs: Path, refusals: Refusals, seed: int, count: int
) -> None:
    rng = random.Random(seed)
    manifest = (refusals.source / "manifest.json").read_text()
    for i in range(count):
        path = refusals.copy()
        if i % 2:  # another value in the manifest, which still says its old digest
            values = mutated(json.loads(manifest), rng)
            refusals.replaced(path, json.dumps(values, indent=1).encode())
            continue
        # A byte of the manifest or of a file, a cut, an insertion.
        name = rng.choice(["manifest.json", "golden.png", "engine.onnx", "reference.onnx"])
        data = bytearray((path / name).read_bytes())
        at = rng.randrange(len(data))
        action = rng.randrange(3)
        if action == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif action == 1:
            del data[at:]
        else:
            data[at:at] = bytes(rng.choices(b'"\\,:{}[]0.eN\x00\xff\n', k=rng.randrange(1, 4)))
        (path / name).unlink()
        (path / name).write_bytes(data)
        refusals.add(path)
    refused = sum(status != 0 for status, _ in refusals.expected)
    assert refused > 0.8 * count, refused
    refusals.compare(programs)


def test_no_manifest_with_a_digest_that_fits_ends_the_process(
    programs: Path, refusals: Refusals, seed: int
) -> None:
    """C++ checks the values that it reads; a manifest that is wrong elsewhere it may accept."""
    rng = random.Random(seed)
    manifest = json.loads((refusals.source / "manifest.json").read_text())
    for _ in range(100):
        values = mutated(manifest, rng)
        values["schema_version"] = manifest["schema_version"]
        refusals.replaced(refusals.copy(), sealed(values))
    pairs = list(zip(refusals.run(programs), refusals.expected, strict=True))
    for case, (ours, theirs) in zip(refusals.cases, pairs, strict=True):
        accepted, refused = ours == (0, ""), theirs != (0, "")
        assert (accepted or refused) and (accepted or ours[0] == theirs[0]), (case, ours, theirs)
    assert 0 < sum(ours[0] != 0 for ours, _ in pairs) < len(pairs)


def test_what_is_wrong_is_said_in_the_same_words(programs: Path, refusals: Refusals) -> None:
    r = refusals
    manifest = (r.source / "manifest.json").read_bytes()
    for data in (
        b"", b"{", b"[]", b"\xff\xfe", b"\xef\xbb\xbf" + manifest, b"[" * 100_000,
        manifest.replace(b"\n", b"\r\n"), manifest.replace(b" ", b""), manifest + b"\0",
        manifest[:-2], manifest.replace(b'"complete"', b'"deferred"'), b" " * (5 * 2**20),
        manifest.replace(b'"schema_version": 3', b'"schema_version": 03'),
        manifest.replace(b'"schema_version": 3', b'"schema_version": 2'),
        manifest.replace(b'"schema_version": 3', b'"schema_version": 41'),
        b'{\n "schema_version": 4,\n "digest": "' + b"0" * 64 + b'",\n',
    ):  # fmt: skip
        r.replaced(r.copy(), data)

    def put(*keys: Any, **new: Any) -> Callable[[Any], None]:
        """Gives what is at these keys the new value; without one it is removed."""

        def change(values: Any) -> None:
            for key in keys[:-1]:
                values = values[key]
            if new:
                values[keys[-1]] = new["value"]
            else:
                del values[keys[-1]]

        return change

    def respecified(**changes: Any) -> Callable[[Any], None]:
        def change(values: Any) -> None:
            spec = values["preprocessing"]["spec"]
            spec.update(changes)
            values["preprocessing"]["digest"] = json_digest(spec)

        return change

    for change in (
        put("golden"), put("golden", "file"), put("engine", "files"),
        put("files", 0, "sha256"), put("state", value="complete\n"),
        put("state", value="broken"),
        put("engine", value=None), put("engine", value=[]), put("files", value=[]),
        put("files", value={"a": 1}), put("files", 0, value=None),
        put("files", 0, "size", value=-1), put("files", 0, "size", value=2**70),
        put("files", 0, "size", value=2**40), put("files", 0, "path", value="../x"),
        put("files", 0, "path", value="a" * 300), put("golden", "file", value="other.png"),
        put("golden", "angles", value=[[1.0, 2.0]]), put("golden", "angles", value=[]),
        put("golden", "angles", 0, 1, value="2"), put("engine", "versions", value={}),
        put("engine", "kind", value="tflite"), put("engine", "versions", "openvino", value=20),
        put("engine", "versions", value={"openvino": "9999.1"}),
        put("engine", "versions", value={"openvino": "new"}),
        put("engine", "versions", value={"openvino": "2024.6.0-1-x"}),
        put("target", "module", value=3), put("target", "compute_capabilities", value="8.7"),
        put("target", "compute_capabilities", value=["8.7", "89"]),
        respecified(size=7), respecified(size=2000), respecified(size="32"),
        respecified(resize="cubic"), respecified(box_rule="round"), respecified(box_scale=0.01),
        respecified(box_scale=2.5), respecified(box_scale="1"),
        lambda v: v.update(state="deferred", engine=None),
        lambda v: v.update(edgehp_version="9" * 60, schema_version=12),
        lambda v: v.update(edgehp_version="1.2", schema_version=12),
    ):  # fmt: skip
        r.changed(change)

    path = r.copy()
    (path / "extra").write_bytes(b"")
    r.add(path)
    path = r.copy()
    (path / "reports").mkdir()
    (path / "reports" / "validation.json").write_bytes(b"{}")
    r.add(path)
    path = r.copy()
    (path / "folder").mkdir()
    (path / "folder" / "b").symlink_to("/dev/null")
    (path / "a").symlink_to("folder")
    r.add(path)
    for name in ("manifest.json", "golden.png"):
        for kind in ("nothing", "link", "folder"):
            path = r.copy()
            (path / name).rename(path / "away")
            if kind == "link":
                (path / name).symlink_to("away")
            elif kind == "folder":
                (path / name).mkdir()
            r.add(path)
    r.add(r.folder / "nowhere")
    r.add(Path(f"{r.copy()}/./"))
    r.compare(programs)


def test_the_device_is_held_against_the_manifest_in_the_same_words(
    programs: Path, refusals: Refusals
) -> None:
    orin = (Gpu("Orin", "8.7"),)
    nano, kit = "NVIDIA Orin Nano (p3767-0003)", "NVIDIA Orin Nano Kit (p3767-0005)"

    def built(
        version: str = "10.3.0", module: str | None = None, kind: str = "tensorrt",
        target: str = "orin-nano-8gb",
    ) -> Callable[[Any], None]:  # fmt: skip
        def change(values: Any) -> None:
            values["engine"].update(kind=kind, versions={kind: version})
            values["target"].update(
                name=target, module=module, compute_capabilities=["8.7"] * (kind != "openvino")
            )

        return change

    trt = (("tensorrt", "10.3.0"),)
    for change, device in (
        (built(), Device(orin, None, trt)),
        (built(), Device((), None, ())),
        (built(), Device((Gpu("RTX", "8.9"), *orin), None, trt)),
        (built("10.3.0.post1"), Device(orin, None, trt)),
        (built("10.14.1.48.post1"), Device(orin, None, (("tensorrt", "10.14.1.48"),))),
        (built("10.14.1"), Device(orin, None, trt)),
        (built("ten"), Device(orin, None, trt)),
        (built(), Device(orin, None, (("tensorrt", "8.6.1rc1"),))),
        (built("2026.1", kind="openvino"), Device((), None, ())),
        (built(module=nano), Device(orin, kit, trt)),
        (built(module=nano, target="orin-nx-8gb"), Device(orin, kit, trt)),
        (built(module=nano), Device(orin, None, trt)),
        (built(module="one"), Device(orin, "another", trt)),
        (built("2026.1", kind="openvino"), Device((), None, (("openvino", "2026.1.0"),))),
        (built("2026.1", kind="openvino"), Device((), None, (("openvino", "2025.4.1"),))),
    ):
        refusals.changed(change, device)
    statuses = [status for status, _ in refusals.expected]
    assert statuses.count(0) == 5, refusals.expected
    refusals.compare(programs)


def test_an_engine_that_is_no_such_engine_is_refused_in_the_same_words(
    programs: Path, refusals: Refusals
) -> None:
    r = refusals

    def swap(name: str, data: bytes) -> None:
        path = r.copy()
        (path / name).unlink()
        (path / name).write_bytes(data)
        values = json.loads((path / "manifest.json").read_text())
        record = next(f for f in values["files"] if f["path"] == name)
        record.update(size=len(data), sha256=sha256_bytes(data))
        r.replaced(path, sealed(values), opened=True)

    r.add(r.source, opened=True)
    golden, engine = (r.source / "golden.png").read_bytes(), (r.source / "engine.onnx").read_bytes()
    swap("golden.png", b"")
    swap("golden.png", golden[:100])
    swap("golden.png", b"GIF89a" + golden)
    swap("golden.png", cv2.imencode(".png", np.zeros((64, 32, 3), np.uint8))[1].tobytes())
    swap("engine.onnx", engine[: len(engine) // 2])
    swap("engine.onnx", b"\0" * 100)
    r.changed(lambda v: v["golden"]["angles"][2].__setitem__(1, 170.0), opened=True)
    r.changed(lambda v: v["golden"].update(tolerance_degrees=0), opened=True)
    assert all(status for status, _ in r.expected[1:-1]), r.expected
    r.compare(programs)


def test_boxes_that_cannot_be_right_are_refused_in_the_same_words(
    programs: Path, artifact: Path, photos: list[Path], tmp_path: Path
) -> None:
    with open_artifact(artifact) as network:
        how = network.preprocessing
    boxes = [
        [1e7, 0, 2e7, 10], [300, 300, 400, 400], [-9e4, -9e4, 9e4, 9e4], [-50, -50, -10.5, -10],
    ]  # fmt: skip
    wrong = dict(zip(photos, boxes, strict=False))
    names = tmp_path / "boxes.json"
    names.write_text(json.dumps({p.name: [{"bbox": box}] for p, box in wrong.items()}))
    pose = programs / "example/edgehp-pose"
    lines = run(pose, artifact, "--boxes", names, *wrong, status=1).splitlines()
    for line, (photo, box) in zip(lines, wrong.items(), strict=True):
        with pytest.raises(EdgehpError) as refused:
            crop_face(cv2.imread(str(photo)), Box(*box), how)
        assert json.loads(line)["problem"] == str(refused.value)
