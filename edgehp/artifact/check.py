"""Load an artifact: everything is checked against the device and the bytes before any engine opens.

An engine file is executable code, and most runtimes notice neither a wrong device nor a changed
byte deep in the file. The order is: manifest, state, device, files; then, with the engine open,
`verify_golden`.
"""

from __future__ import annotations

import logging
import os
import stat
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from edgehp._installed import parse_version
from edgehp.artifact.manifest import (
    LARGEST_MANIFEST,
    MANIFEST_NAME,
    EngineRecord,
    Manifest,
    TargetRecord,
    parse_manifest,
)
from edgehp.crop import Box, Picture, crop_face
from edgehp.device import DeviceProbe, HostProbe, module_part
from edgehp.engines.base import Crops, Engine, FrameEngine, crops_frames
from edgehp.errors import CompatibilityError, DataError, EnvironmentalError, UsageError
from edgehp.files import sha256_file
from edgehp.pose import angle_errors
from edgehp.targets import load_target

logger = logging.getLogger(__name__)

# Written beside the listed files by later commands; never opened as part of the artifact.
REPORTS = "reports"
# Runtimes whose files newer releases go on reading; the others need the very same version.
_READS_OLDER = ("openvino", "onnxruntime")


@dataclass(frozen=True)
class Artifact:
    """An artifact whose manifest, device and bytes were checked.

    Attributes:
        path: its directory.
        manifest: what it says.
    """

    path: Path
    manifest: Manifest

    @property
    def engine(self) -> EngineRecord:
        """The engine's record.

        Raises:
            CompatibilityError: a deferred artifact, which has none.
        """
        if self.manifest.engine is None:
            raise _deferred(self.path, self.manifest)
        return self.manifest.engine

    @property
    def engine_path(self) -> Path:
        """The engine file to open."""
        return self.path / self.engine.files[0]

    @property
    def engine_device(self) -> str | None:
        """What the engine is to be opened on: a DLA core, or None for the first GPU or processor.

        An engine does not hold the number of its DLA core.
        """
        core = self.manifest.build.recipe.get("dla")
        return f"dla:{core}" if isinstance(core, int) else None

    @property
    def graph_path(self) -> Path:
        """The ONNX graph the engine was built from (Q/DQ for INT8)."""
        return self.path / self.manifest.graph


def load_artifact(
    path: Path | str,
    *,
    device: DeviceProbe | None = None,
    allow_deferred: bool = False,
    bytes_only: bool = False,
) -> Artifact:
    """Check an artifact directory and return it; nothing is deserialised.

    Args:
        path: the directory with ``manifest.json``.
        device: facts about the device; this machine's when omitted.
        allow_deferred: accept an artifact whose engine is not built yet, for finishing it; the
            device is then not checked.
        bytes_only: do not check the device: the engine will not be run, only files be read.

    Raises:
        DataError: no such directory.
        CompatibilityError: newer schema, deferred, wrong GPU, module or runtime version, a
            changed, missing or additional file, a path or link that leaves the artifact.
        EnvironmentalError: the driver or the runtime is missing or broken.
    """
    root = Path(path)
    manifest = read_manifest(root)
    if manifest.state != "complete" and not (allow_deferred or bytes_only):
        raise _deferred(root, manifest)
    if manifest.engine is not None and not bytes_only:
        check_device(manifest, device or HostProbe(), str(root))
    _check_files(root, manifest)
    return Artifact(root, manifest)


def read_manifest(root: Path) -> Manifest:
    """The manifest of the artifact directory `root`, parsed; no other file is looked at.

    Raises:
        DataError: no such directory.
        CompatibilityError: no manifest, or one that cannot be accepted.
    """
    if not root.is_dir():
        raise DataError(
            f"{root}: no such artifact directory\nhint: make one with 'edgehp build', or name one "
            f"that holds a {MANIFEST_NAME}"
        )
    path = root / MANIFEST_NAME
    _require_plain(root, MANIFEST_NAME)
    with path.open("rb") as f:
        return parse_manifest(f.read(LARGEST_MANIFEST + 1), str(path))


def check_device(manifest: Manifest, device: DeviceProbe, where: str) -> None:
    """Compare GPU, module and runtime version with those the engine was built for.

    Raises:
        CompatibilityError: they differ.
        EnvironmentalError: the runtime is not installed, or the driver is broken.
    """
    if manifest.engine is not None:
        check_fit(manifest.target, manifest.engine, manifest.precision.asked, device, where)


def check_fit(
    target: TargetRecord, engine: EngineRecord | None, asked: str, device: DeviceProbe, where: str
) -> None:
    """As `check_device`, from these records of a manifest alone; without an engine only the board.

    Args:
        target: where the engine may run, or shall be built.
        engine: None before a deferred build is finished.
        asked: the precision, for the advice in messages.
        device: facts about the device.
        where: what is checked, for messages.

    Raises:
        CompatibilityError: they differ.
        EnvironmentalError: the runtime is not installed, or the driver is broken.
    """
    rebuild = f"build it here: edgehp build --target {target.name} --precision {asked}"
    if target.compute_capabilities:
        wanted = " or ".join(target.compute_capabilities)
        try:
            gpus = device.gpus()
        except EnvironmentalError as e:
            raise EnvironmentalError(
                f"{where} needs a GPU of compute capability {wanted} (target {target.name}): {e}"
            ) from e
        # The first GPU is the one a runtime takes unless told otherwise.
        found = (
            f"{gpus[0].name} (compute capability {gpus[0].compute_capability})" if gpus else None
        )
        if found is None or gpus[0].compute_capability not in target.compute_capabilities:
            raise CompatibilityError(
                f"{where} was built for a GPU of compute capability {wanted} (target "
                f"{target.name}); this machine has {found or 'no NVIDIA GPU'}: use it on "
                "the right device, or build one for this one with 'edgehp build --target ...' "
                "(see 'edgehp targets')"
            )
    if target.module is not None and not _same_module(target, module := device.module()):
        raise CompatibilityError(
            f"{where} was built on {target.module!r}; this is {module or 'no Jetson'!r}, whose "
            f"clocks, memory and number of SMs differ; {rebuild}"
        )
    if engine is not None:
        _check_version(engine, device, where, rebuild)


def _same_module(target: TargetRecord, here: str | None) -> bool:
    """Whether an engine built on the target's module runs as well on the module `here`.

    The part number counts, not the carrier; a target's parts differ in nothing an engine sees,
    such as the developer kit's Orin Nano and the one in production.
    """
    built, found = module_part(target.module or ""), module_part(here or "")
    if built is None or found is None:
        return here == target.module
    try:
        parts = load_target(target.name).module_ids
    except UsageError:  # a target of the build machine's own
        parts = ()
    return built == found or (built in parts and found in parts)


def _check_version(engine: EngineRecord, device: DeviceProbe, where: str, rebuild: str) -> None:
    built = engine.versions.get(engine.kind)
    if built is None:
        raise CompatibilityError(
            f"{where}: the manifest does not say which {engine.kind} built the engine; {rebuild}"
        )
    here = device.version(engine.kind)
    if here is None:
        raise EnvironmentalError(
            f"{where} needs {engine.kind} {built}, which is not installed; run 'edgehp doctor'"
        )
    if engine.kind in _READS_OLDER:
        if parse_version(here) >= parse_version(built):
            return
        raise CompatibilityError(
            f"{where} was built with {engine.kind} {built}; found the older {here}: install "
            f"{built} or newer, or {rebuild}"
        )
    # Of TensorRT's version-compatible engines: read by later releases of this major version.
    if (major := engine.versions.get("tensorrt_major")) is not None:
        if str(parse_version(here)[0]) == major and parse_version(here) >= parse_version(built):
            return
        raise CompatibilityError(
            f"{where} was built with {engine.kind} {built}; found {here}: install {built} or a "
            f"later {major}.x, or {rebuild}"
        )
    if parse_version(here) != parse_version(built):
        raise CompatibilityError(
            f"{where} was built with {engine.kind} {built}; found {here}, and its engines need "
            f"exactly the same version: install it, or {rebuild}"
        )


def _check_files(root: Path, manifest: Manifest) -> None:
    for record in manifest.files:
        status = _require_plain(root, record.path)
        if status.st_size != record.size:
            raise CompatibilityError(
                f"{root / record.path}: found {status.st_size} bytes, the manifest says "
                f"{record.size}\nhint: copy the artifact again or build it again"
            )
    for record in manifest.files:
        found = sha256_file(root / record.path)
        if found != record.sha256:
            raise CompatibilityError(
                f"{root / record.path} was changed: found SHA-256 {found[:16]}..., the manifest "
                f"says {record.sha256[:16]}...\nhint: copy the artifact again or build it again"
            )
    listed = {record.path for record in manifest.files} | {MANIFEST_NAME}
    for found_path in sorted(root.rglob("*")):
        name = found_path.relative_to(root).as_posix()
        if name.split("/")[0] == REPORTS or name in listed:
            continue
        if found_path.is_dir() and not found_path.is_symlink():
            continue
        raise CompatibilityError(
            f"{root / name}: a file that the manifest does not list; remove it, or build the "
            "artifact again"
        )


def _require_plain(root: Path, name: str) -> os.stat_result:
    """The status of a regular file that is reached over no symbolic link inside the artifact."""
    step = root
    for part in name.split("/"):
        step = step / part
        try:
            status = step.lstat()
        except OSError as e:
            raise CompatibilityError(
                f"{step}: missing ({e.strerror}), expected the artifact's file\n"
                "hint: copy the artifact again or build it again"
            ) from e
        if stat.S_ISLNK(status.st_mode):
            raise CompatibilityError(
                f"{step}: found a symbolic link, expected a file inside the artifact\n"
                "hint: copy the artifact again, following links"
            )
    if not stat.S_ISREG(status.st_mode):
        raise CompatibilityError(f"{step}: expected a regular file; build the artifact again")
    return status


def _deferred(root: Path, manifest: Manifest) -> CompatibilityError:
    return CompatibilityError(
        f"{root} is deferred: its engine is not built yet\nhint: finish it on the device "
        f"({manifest.target.name}) with: edgehp build --finish {root}"
    )


def golden_crops(artifact: Artifact) -> Crops:
    """The golden crops uint8 [n, S, S, 3], RGB.

    Raises:
        CompatibilityError: the picture does not hold what the manifest says.
    """
    golden, size = artifact.manifest.golden, artifact.manifest.preprocessing.size
    count = len(golden.angles)
    data = np.fromfile(artifact.path / golden.file, np.uint8)
    picture = cv2.imdecode(data, cv2.IMREAD_COLOR) if data.size else None
    if picture is None or picture.shape != (count * size, size, 3):
        found = "no picture" if picture is None else f"{list(picture.shape)}"
        raise CompatibilityError(
            f"{artifact.path / golden.file}: found {found}, expected {count} crops of "
            f"{size}x{size} pixels\nhint: build the artifact again"
        )
    rgb = np.ascontiguousarray(picture[..., ::-1]).astype(np.uint8, copy=False)
    return rgb.reshape(count, size, size, 3)


def verify_golden(artifact: Artifact, engine: Engine) -> float:
    """Run the golden vectors and return the largest difference of an angle from FP32, degrees.

    Raises:
        CompatibilityError: it is above the manifest's tolerance, or not a number.
    """
    crops = golden_crops(artifact)
    step = artifact.manifest.engine.max_batch if artifact.manifest.engine else len(crops)
    angles: list[npt.NDArray[np.float32]] = [
        engine.infer(crops[i : i + step]).angles for i in range(0, len(crops), step)
    ]
    golden = artifact.manifest.golden
    errors = angle_errors(np.concatenate(angles), np.asarray(golden.angles))
    worst = float(errors.max())
    # Written so that NaN fails too.
    if not worst <= golden.tolerance_degrees:
        crop, angle = np.unravel_index(int(np.argmax(errors)), errors.shape)
        name = ("pitch", "yaw", "roll")[angle]
        raise CompatibilityError(
            f"{artifact.path}: golden crop {crop} gives a {name} that is {worst:.2f} degrees off, "
            f"at most {golden.tolerance_degrees:.2f} allowed: this device "
            "does not compute what was validated\nhint: build the artifact here again"
        )
    if (able := crops_frames(engine)) is not None:
        _verify_cropping(artifact, able, crops)
    logger.debug("%s: golden vectors within %.3f degrees", artifact.path, worst)
    return worst


def _verify_cropping(artifact: Artifact, engine: FrameEngine, crops: Crops) -> None:
    """Compare the engine's own crops with those of `edgehp.crop`, of frames made of golden crops.

    Raises:
        CompatibilityError: they differ by more than one level.
    """
    spec = artifact.manifest.preprocessing
    frames = np.concatenate(crops)
    # Larger and smaller than the network's input, inside and across the border.
    for factor in (1.7, 0.6):
        picture = Picture(
            np.asarray(cv2.resize(frames, None, fx=factor, fy=factor), np.uint8), form="RGB"
        )
        side = picture.width
        boxes = [Box(0, i * side, side, (i + 1) * side).moved(0.1, 0) for i in range(len(crops))]
        found = engine.crop_frames([(picture, box) for box in boxes], spec)
        expected = np.stack([crop_face(picture.pixels, box, spec) for box in boxes])
        worst = int(np.abs(found.astype(int) - expected).max())
        if worst > 1:
            raise CompatibilityError(
                f"{artifact.path}: the GPU cuts crops that differ by {worst} of 255 levels from "
                "those that were validated, at most 1 allowed\n"
                "hint: update the NVIDIA driver and NVRTC"
            )


def newest_artifact(dist: Path | str = "dist") -> Path:
    """The newest complete artifact directly under `dist`.

    Directories whose manifest cannot be read are passed over with a warning: one broken artifact
    should not hide the others, and loading the chosen one is strict.

    Raises:
        DataError: there is none.
    """
    root = Path(dist)
    found: list[tuple[str, float, Path]] = []
    for path in sorted(root.glob(f"*/{MANIFEST_NAME}")):
        if path.parent.name.startswith("."):
            continue
        try:
            manifest = read_manifest(path.parent)
        except (CompatibilityError, OSError) as e:
            logger.warning("passed over: %s", e)
            continue
        if manifest.state == "complete":
            found.append((manifest.created, path.stat().st_mtime, path.parent))
    if not found:
        raise DataError(
            f"no complete artifact under {root}\nhint: make one with: edgehp build --target cpu"
        )
    return max(found)[2]
