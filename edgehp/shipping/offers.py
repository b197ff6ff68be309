"""What a repository offers: signed lists, verified by python-tuf, remembered whole.

An `Offer` says as much about a bundle as a board needs to know whether it fits. It travels as the
``custom`` part of a TUF target, signed with the list of targets.

What a device has once accepted is what protects it from older lists later. It is kept in one file
that is replaced by one rename, ``updates/memory.json``; python-tuf works on a scratch copy of it,
because its own writes are not flushed.
"""

from __future__ import annotations

import hashlib
import logging
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from msgspec import Meta
from msgspec.structs import replace

from edgehp.artifact.check import check_fit
from edgehp.artifact.manifest import EngineRecord, Line, Sha256, TargetRecord
from edgehp.device import DeviceProbe
from edgehp.errors import (
    CompatibilityError,
    DataError,
    EdgehpError,
    EnvironmentalError,
    UsageError,
)
from edgehp.files import Record, read_bytes, stand_in
from edgehp.shipping import disk
from edgehp.shipping.bundle import MAX_BUNDLE_SIZE, SUFFIX, VerifiedBundle
from edgehp.shipping.fetch import MissingError, Source, read_bounded
from edgehp.shipping.signature import require
from edgehp.targets import load_target

if TYPE_CHECKING:
    from tuf.ngclient import FetcherInterface

logger = logging.getLogger(__name__)

# Under ``custom``, so that other tools may put their own beside it.
FIELD = "edgehp"
_SCHEMA = 1
_MEMORY = "memory.json"
_LARGEST_MEMORY = 64 * 2**20
_LARGEST_ROOT = 512_000
_HISTORY = "root_history"
_ANOTHER_LIST = 256 * 1024
# A list of 5,000 bundles is about 5 MB.
_LARGEST_LIST = 16 * 2**20
_LIST = re.compile(r"metadata/(timestamp|[1-9][0-9]{0,17}\.(root|snapshot|targets))\.json")

# Exact in every reader of JSON.
_Count = Annotated[int, Meta(ge=0, le=2**53)]
# One file name, fit for any file system and URL.
_Name = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,199}\Z")]


class Offer(Record, frozen=True):
    """A bundle in a repository.

    Attributes:
        path: name of the target.
        serial: counts the bundles of a repository; the larger is the newer.
        content: `VerifiedBundle.digest`.
        name: of the artifact.
        network: digest of the network's specification, empty where the artifact has none.
        precision: asked for at the build.
        size: bytes of the unpacked files.
        target: where it may run.
        engine: what runs it; None for a deferred artifact, whose engine the board builds.
        share: percent of the devices that it is offered to.
        state: ``"paused"`` and ``"withdrawn"`` bundles are offered to none.
    """

    path: _Name
    serial: _Count
    content: Sha256
    name: Line
    network: Line
    precision: Line
    size: _Count
    target: TargetRecord
    engine: EngineRecord | None
    share: Annotated[int, Meta(ge=1, le=100)] = 100
    state: Literal["offered", "paused", "withdrawn"] = "offered"

    @classmethod
    def of(cls, bundle: VerifiedBundle, serial: int, share: int = 100) -> Offer:
        """The offer of a verified bundle to `share` percent of the devices."""
        manifest = bundle.manifest
        plain = re.sub(r"[^A-Za-z0-9._-]", "-", manifest.name).lstrip("._-")[:150] or "bundle"
        return cls(
            path=f"{plain}-{serial}{SUFFIX}",
            serial=serial,
            content=bundle.digest,
            name=manifest.name,
            network=manifest.network.digest or "",
            precision=manifest.precision.asked,
            size=bundle.size,
            target=manifest.target,
            engine=manifest.engine,
            share=share,
        )

    def to_dict(self) -> dict[str, Any]:
        """A dictionary for JSON; `from_dict` reads it."""
        values = {k: v for k, v in msgspec.to_builtins(self).items() if k != "path"}
        return {"schema": _SCHEMA, **values}

    @classmethod
    def from_dict(cls, path: str, values: Mapping[str, Any]) -> Offer:
        """An offer as somebody with the key of the targets wrote it.

        Raises:
            ValueError: it is not one.
        """
        rest = dict(values)
        if (schema := rest.pop("schema", None)) != _SCHEMA:
            raise ValueError(f"schema {schema!r:.40}, expected {_SCHEMA}")
        return msgspec.convert({**rest, "path": path}, cls)

    def withheld(self, device_id: str) -> str | None:
        """Why it is not for the device of this id at this stage of its rollout, None if it is.

        Which devices are among the first is another draw for every bundle, and the same each time:
        a larger share takes in those of the smaller one.
        """
        if self.state == "withdrawn":
            return "it was withdrawn by its publisher"
        if self.state == "paused":
            return "its rollout is paused"
        drawn = hashlib.sha256(f"{self.content}\n{device_id}".encode()).digest()
        place = int.from_bytes(drawn[:8], "big") / 2**64 * 100
        if place >= self.share:
            return f"it is offered to {self.share} % of the devices yet, this one is at {place:.1f}"
        return None

    def misfit(self, device: DeviceProbe) -> str | None:
        """Why it does not run on this device, None if it does."""
        if self.engine is None and (reason := self._other_board(device)) is not None:
            return reason
        try:
            check_fit(self.target, self.engine, self.precision, device, self.path)
        except (CompatibilityError, EnvironmentalError) as e:
            return str(e)
        return None

    def _other_board(self, device: DeviceProbe) -> str | None:
        """Why a deferred artifact is not for this board: its manifest names a target, no more."""
        try:
            target = load_target(self.target.name)
            gpus = device.gpus() if target.compute_capabilities else ()
        except EdgehpError as e:
            return f"{self.path} is for {self.target.name}: {e}"
        found = gpus[0].compute_capability if gpus else "none"
        if target.compute_capabilities and found not in target.compute_capabilities:
            return f"{self.path} is for {target.title}; the GPU here has compute capability {found}"
        module = device.module() or "no Jetson"
        if target.module_ids and not any(part in module for part in target.module_ids):
            return f"{self.path} is for {target.title}; this is {module}"
        return None


class Decision(Record, frozen=True):
    """What a device made of a bundle in the repository.

    Attributes:
        name: of the bundle.
        serial: of the bundle.
        reason: why it was not for this device, None where it was.
    """

    name: str
    serial: int
    reason: str | None = None


class Memory(Record, frozen=True):
    """What a device remembers of its repository.

    Attributes:
        files: name -> text of the accepted TUF metadata.
        serial: the newest that an update installed here.
        keys: identifiers of the keys that signed the list with that serial.
        decisions: on the bundles that were newer at the last update, the newest first.
    """

    files: dict[str, str] = msgspec.field(default_factory=dict)
    serial: _Count = 0
    keys: tuple[str, ...] = ()
    decisions: tuple[Decision, ...] = ()


class Listed(msgspec.Struct, frozen=True):
    """An offer and the file in the repository that it stands for.

    Attributes:
        offer: what is in it.
        sha256: of the file, hex.
        length: of the file, in bytes.
    """

    offer: Offer
    sha256: Sha256
    length: Annotated[int, Meta(ge=1, le=MAX_BUNDLE_SIZE)]

    @property
    def location(self) -> str:
        """Path of the file in the repository."""
        return f"targets/{self.sha256}.{self.offer.path}"


@dataclass(frozen=True)
class Lists:
    """What a repository offers now.

    Attributes:
        listed: every bundle, the newest first.
        keys: identifiers of the keys that may sign this list.
    """

    listed: tuple[Listed, ...]
    keys: tuple[str, ...]


def read_memory(folder: Path) -> Memory:
    """What is remembered in `folder`; nothing where the file is missing or damaged."""
    path = folder / _MEMORY
    try:
        with path.open("rb") as f:
            return msgspec.convert(disk.unsealed(f.read(_LARGEST_MEMORY)), Memory)
    except FileNotFoundError:
        return Memory()
    except (OSError, ValueError) as e:
        logger.warning("%s is damaged (%s): what was seen before is forgotten", path, e)
        return Memory()


def write_memory(folder: Path, memory: Memory) -> None:
    """Replace what is remembered, if it is news; when this returns it is on disk.

    Raises:
        OSError: the disk is full or refuses.
    """
    if memory != read_memory(folder):
        disk.replace_file(folder / _MEMORY, disk.sealed(msgspec.to_builtins(memory)))


def refresh(source: Source, root_metadata: Path, folder: Path) -> Lists:
    """Fetch and verify the lists of a repository; what was accepted is remembered in `folder`.

    Args:
        source: the repository.
        root_metadata: file with a root of trust (any version) that came with the device.
        folder: where to remember; exists.

    Raises:
        CompatibilityError: the repository is older than what was seen, out of date, mixed, endless,
            or not signed by its keys.
        DataError: it is no repository.
        EnvironmentalError: it cannot be reached, the disk refuses, or a package is missing.
        UsageError: `root_metadata` is not what it should be.
    """
    require("tuf.ngclient", "ship")
    require("cryptography", "ship")
    from tuf.api.exceptions import DownloadError, RepositoryError
    from tuf.api.metadata import Metadata, Root, Targets
    from tuf.ngclient import Updater

    what = "TUF root metadata ('1.root.json' of the repository, from a trusted place)"
    bootstrap = read_bytes(root_metadata, what, limit=_LARGEST_ROOT, error=UsageError)
    memory = read_memory(folder)
    asked: list[str] = []
    with _scratch(folder, memory) as scratch:
        try:
            updater = Updater(
                metadata_dir=str(scratch),
                # Joined to the name of a file: paths in the repository, not URLs.
                metadata_base_url="metadata/",
                fetcher=_fetcher(source, asked),
                bootstrap=bootstrap,
            )
        except (RepositoryError, ValueError) as e:
            raise UsageError(
                f"{root_metadata} is no TUF root metadata ({_short(e)})\nhint: give the file "
                "'1.root.json' of the repository, brought here by a way that is trusted"
            ) from e
        try:
            updater.refresh()
        except (RepositoryError, DownloadError, ValueError) as e:
            raise _refusal(source.name, asked[-1] if asked else "metadata", e) from e
        finally:
            # New keys are kept even if what they signed is refused: old ones are worth nothing now.
            write_memory(folder, replace(memory, files=_accepted(scratch)))
        root = Metadata[Root].from_bytes((scratch / "root.json").read_bytes()).signed
        targets = Metadata[Targets].from_bytes((scratch / "targets.json").read_bytes()).signed
    listed = []
    for path, target in targets.targets.items():
        try:
            values = {"sha256": target.hashes["sha256"], "length": target.length}
            values["offer"] = Offer.from_dict(path, target.custom[FIELD])
            listed.append(msgspec.convert(values, Listed))
        except (ValueError, KeyError, TypeError) as e:
            logger.info("%s: passed over, it is no bundle (%s)", path, _short(e))
    listed.sort(key=lambda one: (one.offer.serial, one.offer.path), reverse=True)
    return Lists(tuple(listed), tuple(sorted(root.roles[Targets.type].keyids)))


def _fetcher(source: Source, asked: list[str]) -> FetcherInterface:
    """What python-tuf reads through; notes what was asked for."""
    from tuf.api.exceptions import DownloadHTTPError
    from tuf.ngclient import FetcherInterface

    class Fetcher(FetcherInterface):
        def _fetch(self, url: str) -> Iterator[bytes]:
            raise NotImplementedError("only whole, bounded files are read")

        def download_bytes(self, url: str, max_length: int) -> bytes:
            asked.append(url)
            # Versions and lengths in a list become the names and sizes of the next ones.
            if _LIST.fullmatch(url) is None or not 0 < max_length <= _LARGEST_LIST:
                raise CompatibilityError(
                    f"{source.name}: the lists name a file {url[:80]!r} of {max_length} bytes, "
                    f"expected metadata/VERSION.ROLE.json of at most {_LARGEST_LIST}\n"
                    "hint: get the repository from its publisher"
                )
            # These have their length signed, and python-tuf checks it: what is a little longer is
            # another list, and is told as that.
            exact = url.endswith((".snapshot.json", ".targets.json"))
            try:
                data = read_bounded(source, url, max_length + (_ANOTHER_LIST if exact else 0))
            except MissingError as e:
                # How it notices that there is no newer root.
                raise DownloadHTTPError(str(e), 404) from e
            if (other := stand_in(data[:512])) is None:
                return data
            what = other.partition("\n")[0].partition(",")[0]
            if url.endswith(".root.json"):
                # Many servers answer a file that they lack with a page; the newest root is always
                # followed by one. Behind a log-in page the next list is a page too.
                logger.info("%s: %s is %s: taken as missing", source.name, url, what)
                raise DownloadHTTPError(f"{url} is {what}", 404)
            raise EnvironmentalError(
                f"{source.name}: {url} is {what}, expected a list of the repository: a log-in page "
                "of the network, or a server that answers a missing file with a page\n"
                "hint: open the address in a browser; log in, or publish the repository again"
            )

    return Fetcher()


@contextmanager
def _scratch(folder: Path, memory: Memory) -> Iterator[Path]:
    """A folder with the remembered files, as python-tuf lays them out; removed afterwards."""
    scratch = folder / f".work-{secrets.token_hex(4)}"
    try:
        (scratch / _HISTORY).mkdir(parents=True)
        for name, text in memory.files.items():
            if Path(name).name == name and name.endswith(".json"):
                inside = _HISTORY if name.endswith(".root.json") else "."
                (scratch / inside / name).write_bytes(text.encode())
        yield scratch
    except OSError as e:
        raise EnvironmentalError(
            f"cannot write to {folder} ({e.strerror or e}); check its owner and the disk"
        ) from e
    finally:
        disk.remove_tree(scratch)


def _accepted(scratch: Path) -> dict[str, str]:
    """Name -> text of the files that python-tuf accepted."""
    found = sorted((scratch / _HISTORY).glob("*.root.json"))
    found += [
        p for n in ("timestamp", "snapshot", "targets") if (p := scratch / f"{n}.json").exists()
    ]
    return {path.name: path.read_bytes().decode() for path in found}


def _refusal(name: str, asked: str, error: Exception) -> CompatibilityError | DataError:
    """The sentence for what python-tuf found at the file `asked`."""
    from tuf.api import exceptions as tuf

    file = Path(asked).name
    where = f"{name}: {file}"
    said = _short(error)
    if isinstance(error, tuf.ExpiredMetadataError):
        now = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
        return CompatibilityError(
            f"{name} is out of date (freeze): {said}, and it is {now} UTC here; somebody holds "
            "newer lists back, or nobody published: run 'edgehp repo publish', or set the clock"
        )
    if isinstance(error, tuf.UnsignedMetadataError):
        return CompatibilityError(
            f"{where} is not signed by a key that counts (wrong or revoked key): forged, or "
            "published with a key that was rotated\nhint: get the repository from its publisher"
        )
    if isinstance(error, tuf.LengthOrHashMismatchError) or (
        isinstance(error, tuf.BadVersionNumberError) and file.endswith("targets.json")
    ):
        return CompatibilityError(
            f"{where} does not belong to the other lists (mix and match): {said}\n"
            "hint: copy or publish the repository again, whole"
        )
    if isinstance(error, tuf.BadVersionNumberError):
        return CompatibilityError(
            f"{where} is older than what this device has seen (rollback): {said}\n"
            "hint: get the newest copy of the repository"
        )
    if isinstance(error, tuf.DownloadHTTPError):
        return DataError(f"{said}; it is no complete repository: publish or copy it again")
    return CompatibilityError(f"{where} is no TUF metadata ({said}); publish or copy it again")


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
