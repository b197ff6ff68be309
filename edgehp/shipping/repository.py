"""A repository of bundles: static files that any web server or USB stick carries, signed with TUF.

A folder with::

    metadata/    N.root.json, N.targets.json, N.snapshot.json, timestamp.json
    targets/     the bundles, each named after its hash
    .staged/     what the next `publish` makes public: targets.json, root.json

Four keys, each a PEM file ``<role>.pem`` in a folder of keys: ``root`` says who the others are and
is used for nothing else, so that it can stay offline; ``targets`` lists bundles; ``snapshot`` and
``timestamp`` bind the lists to each other and to the present. None of them signs a bundle: that
takes the release key (`edgehp.shipping.bundle`).
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from msgspec import structs

from edgehp.errors import DataError, UsageError
from edgehp.files import sha256_file
from edgehp.shipping import disk
from edgehp.shipping.bundle import verify_bundle
from edgehp.shipping.offers import FIELD, Offer
from edgehp.shipping.signature import PublicKey, read_private_key, require

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner
    from tuf.api.metadata import Metadata, MetaFile, Root, Targets

ROLES = ("root", "targets", "snapshot", "timestamp")
# How long a signature of each role counts, in days. A car may stand for long and a repository may
# travel on a USB stick; the timestamp decides how long a withheld update stays unnoticed.
LIFETIMES = {"root": 1095, "targets": 365, "snapshot": 365, "timestamp": 30}
# Beside the list of targets, and signed with it: serials are never used twice.
_SERIAL = "edgehp-serial"
# Folder of what the next `publish` makes public.
STAGED = ".staged"


def init(folder: Path, keys: Path, *, password: str | None = None) -> Path:
    """Make an empty repository and its four keys.

    Args:
        folder: new or empty.
        keys: folder for the private keys; those that are there already are used.
        password: encrypts new keys, opens those that are there.

    Returns:
        The root metadata (``metadata/1.root.json``) that devices are given.

    Raises:
        UsageError: there is something already, the keys would be public, or one cannot be used.
        EnvironmentalError: the disk refuses, or a package is missing.
    """
    _require_tuf()
    from tuf.api.metadata import Metadata, Root, Targets

    if (folder / "metadata").exists():
        raise UsageError(f"{folder} holds a repository already; choose another folder")
    _check_apart(folder, keys)
    if folder.is_dir() and any(entry.name != STAGED for entry in folder.iterdir()):
        raise UsageError(f"{folder} is not empty, and all in it would be public; choose another")
    with _writing(folder):
        signers = {}
        for role in ROLES:
            path = keys / f"{role}.pem"
            if not path.exists():
                _new_key(path, password)
            signers[role] = _signer_of(path, password)
        root = Root(expires=_expiry("root"), consistent_snapshot=True)
        for role, signer in signers.items():
            root.add_key(signer.public_key, role)
        signed = Metadata(root)
        signed.sign(signers["root"])
        targets = Metadata(Targets(expires=_expiry("targets")))
        targets.signed.unrecognized_fields[_SERIAL] = 0
        for name in ("metadata", "targets", STAGED):
            disk.make_folder(folder / name)
        disk.replace_file(folder / STAGED / "targets.json", targets.to_bytes())
        disk.replace_file(folder / "metadata" / "1.root.json", signed.to_bytes())
    publish(folder, keys, password=password)
    return folder / "metadata" / "1.root.json"


def add(folder: Path, bundle: Path, trust: Sequence[PublicKey], *, share: int = 100) -> Offer:
    """Put a bundle into the repository, with the next serial; devices see it after `publish`.

    Args:
        folder: the repository.
        bundle: made by `make_bundle`.
        trust: the keys that devices trust; a bundle that they would refuse is refused here.
        share: percent of the devices that it is offered to at first, see `set_rollout`.

    Raises:
        DataError, CompatibilityError: as `verify_bundle`; or no repository.
        UsageError: its content is listed as the newest already.
        EnvironmentalError: the disk refuses, or a package is missing.
    """
    _require_tuf()
    from tuf.api.metadata import TargetFile

    verified = verify_bundle(bundle, trust)
    _newest_root(folder)
    with _writing(folder):
        targets = _staged_or_published(folder)
        serial = 1 + int(targets.signed.unrecognized_fields.get(_SERIAL, 0))
        offer = Offer.of(verified, serial, share)
        for path, listed in targets.signed.targets.items():
            known = (listed.custom or {}).get(FIELD, {})
            if known.get("content") == offer.content and known.get("serial") == serial - 1:
                raise UsageError(f"{folder} lists this bundle already, as its newest: {path}")
        copy = folder / STAGED / "copy"
        disk.remove_tree(copy)
        with bundle.open("rb") as source:
            disk.write_file(copy, iter(lambda: source.read(2**20), b""))
        # What was verified is what is listed, whatever happened to the file meanwhile.
        if verify_bundle(copy, trust) != replace(verified, path=copy):
            raise DataError(f"{bundle} changed while it was copied; add it again")
        digest = sha256_file(copy)
        public = folder / "targets" / f"{digest}.{offer.path}"
        target = TargetFile(copy.stat().st_size, {"sha256": digest}, offer.path)
        target.unrecognized_fields["custom"] = {FIELD: offer.to_dict()}
        disk.make_folder(public.parent)
        os.rename(copy, public)  # noqa: PTH104 - from one folder to another, both flushed
        disk.flush_folder(public.parent)
        targets.signed.targets[offer.path] = target
        targets.signed.unrecognized_fields[_SERIAL] = serial
        disk.replace_file(folder / STAGED / "targets.json", targets.to_bytes())
    return offer


def set_rollout(
    folder: Path,
    name: str,
    *,
    share: int | None = None,
    state: Literal["paused", "withdrawn"] | None = None,
) -> Offer:
    """Change whom a bundle is offered to; devices see it after `publish`.

    A bundle that was paused is offered again by giving it a share. One that was withdrawn stays so,
    and its file stays where devices may be fetching it; devices that have it keep it until
    something newer is published.

    Args:
        folder: the repository.
        name: of the bundle (`Offer.path`), or its serial.
        share: percent of the devices.
        state: instead of a share.

    Raises:
        DataError: no repository.
        UsageError: it lists no such bundle, or that one was withdrawn.
        EnvironmentalError: the disk refuses, or a package is missing.
    """
    _require_tuf()
    _newest_root(folder)
    with _writing(folder):
        targets = _staged_or_published(folder)
        listed = {
            path: Offer.from_dict(path, target.custom[FIELD])
            for path, target in targets.signed.targets.items()
            if FIELD in (target.custom or {})
        }
        found = next((o for o in listed.values() if name in (o.path, str(o.serial))), None)
        if found is None:
            raise UsageError(f"{folder} lists no bundle {name!r}; it lists: {', '.join(listed)}")
        if found.state == "withdrawn":
            raise UsageError(f"{found.path} was withdrawn; to offer it again, add it again")
        changed = structs.replace(found, state=state or "offered", share=share or found.share)
        custom = targets.signed.targets[found.path].unrecognized_fields["custom"]
        custom[FIELD] = changed.to_dict()
        disk.replace_file(folder / STAGED / "targets.json", targets.to_bytes())
    return changed


def publish(
    folder: Path,
    keys: Path,
    *,
    days: int | None = None,
    password: str | None = None,
) -> dict[str, int]:
    """Sign what was added or rotated and make it public; without news, renew the timestamp.

    Only the keys of what has to be signed are opened: a server that renews the timestamp every day
    needs no other. The timestamp is written last, so that a device sees the old lists or the new.

    Args:
        folder: the repository.
        keys: folder with ``<role>.pem``.
        days: how long the timestamp counts; 30 when omitted.
        password: of the keys.

    Returns:
        Role -> version of the metadata that was signed now; roles that stayed are left out.

    Raises:
        DataError: no repository.
        UsageError: a key is missing or is not the one that the root names.
        EnvironmentalError: the disk refuses, or a package is missing.
    """
    _require_tuf()
    from tuf.api.metadata import Metadata, Snapshot, Timestamp

    metadata, staged = folder / "metadata", folder / STAGED / "targets.json"
    rotated = folder / STAGED / "root.json"
    with _writing(folder):
        root = _read_metadata(rotated) if rotated.exists() else _newest_root(folder)
        # Everything is signed before anything is written: a missing key changes nothing.
        signing = _Signing(root, keys, password)
        targets, (last, lists) = _staged_or_published(folder), _newest(folder, "snapshot")
        new_targets = staged.exists() or not _lasts(root, "targets", targets)
        lists = lists or Metadata(Snapshot())
        if new_targets:
            version = 1 + _newest_version(folder, "targets")[0]
            lists.signed.meta = {"targets.json": signing.sign("targets", targets, version)}
        path = metadata / "timestamp.json"
        timestamp = _read_metadata(path) if path.exists() else Metadata(Timestamp())
        if new_targets or not _lasts(root, "snapshot", lists):
            timestamp.signed.snapshot_meta = signing.sign("snapshot", lists, last + 1)
        version = 1 + timestamp.signed.version if path.exists() else 1
        signing.sign("timestamp", timestamp, version, days)
        if rotated.exists():
            # Before the timestamp: what it names must be signed by keys that devices can learn of.
            signing.files.insert(-1, (f"{root.signed.version}.root.json", rotated.read_bytes()))
            signing.versions["root"] = root.signed.version
        for name, data in signing.files:
            disk.replace_file(metadata / name, data)
        disk.remove_tree(staged)
        disk.remove_tree(rotated)
    return signing.versions


@dataclass
class _Signing:
    """Signs lists with the keys that `root` names; writes nothing.

    Attributes:
        files: name in ``metadata/`` and content of what was signed, in this order.
        versions: role -> version of it.
    """

    root: Metadata[Root]
    keys: Path
    password: str | None
    files: list[tuple[str, bytes]] = field(default_factory=list)
    versions: dict[str, int] = field(default_factory=dict)

    def sign(
        self, role: str, item: Metadata[Any], version: int, days: int | None = None
    ) -> MetaFile:
        """Sign `item` as `version` and describe it for the list that names it."""
        from tuf.api.metadata import MetaFile

        key = self.keys / f"{role}.pem"
        signer = _signer_of(key, self.password)
        item.signed.version, item.signed.expires = version, _expiry(role, days)
        item.signatures.clear()
        item.sign(signer)
        if not _counts(self.root, role, item):
            raise UsageError(
                f"{key} is not the key that the root names for {role}\n"
                "hint: give the folder with the newest keys, or rotate: edgehp repo rotate-key"
            )
        data = item.to_bytes()
        name = f"{role}.json" if role == "timestamp" else f"{version}.{role}.json"
        self.files.append((name, data))
        self.versions[role] = version
        return MetaFile(version, len(data), {"sha256": hashlib.sha256(data).hexdigest()})


def rotate_key(
    folder: Path,
    role: str,
    keys: Path,
    *,
    password: str | None = None,
) -> Path:
    """Replace the key of a role by a new one; devices refuse the old one once `publish` has run.

    The new root is signed by the root key, and a new root key by the old one as well. The old key's
    file gets the suffix ``.revoked``.

    Args:
        folder: the repository.
        role: one of `ROLES`.
        keys: folder with ``root.pem``, where the new key is written.
        password: of the keys, old and new.

    Returns:
        The file of the new key.

    Raises:
        DataError: no repository.
        UsageError: no such role, the root key is missing or another, or a new one waits for
            `publish`.
        EnvironmentalError: the disk refuses, or a package is missing.
    """
    _require_tuf()
    if role not in ROLES:
        raise UsageError(f"no role {role!r}; expected one of {', '.join(ROLES)}")
    _check_apart(folder, keys)
    staged = folder / STAGED / "root.json"
    with _writing(folder):
        published = _newest_root(folder)
        root = _read_metadata(staged) if staged.exists() else _newest_root(folder)
        if set(root.signed.roles["root"].keyids) != set(published.signed.roles["root"].keyids):
            # Every root is signed by the key of the one before, which is put aside by now.
            raise UsageError(
                f"the new root key of {folder} is not public yet\n"
                "hint: publish it before another key is rotated: edgehp repo publish"
            )
        path = keys / f"{role}.pem"
        fresh = keys / f"{role}.pem.new"
        signers = [_signer_of(keys / "root.pem", password)]
        disk.remove_tree(fresh)
        _new_key(fresh, password)
        new = _signer_of(fresh, password)
        for keyid in list(root.signed.roles[role].keyids):
            root.signed.revoke_key(keyid, role)
        root.signed.add_key(new.public_key, role)
        root.signed.version = published.signed.version + 1
        root.signed.expires = _expiry("root")
        if role == "root":
            signers.append(new)
        root.signatures.clear()
        for signer in signers:
            root.sign(signer, append=True)
        if not (_counts(published, "root", root) and _counts(root, "root", root)):
            disk.remove_tree(fresh)
            raise UsageError(
                f"{keys / 'root.pem'} is not the root key of {folder}; give the folder that "
                "holds it"
            )
        if path.exists():
            old = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
            disk.move(path, keys / f"{role}.pem.{old}.revoked")
        disk.move(fresh, path)
        disk.make_folder(staged.parent)
        disk.replace_file(staged, root.to_bytes())
    return path


def _now() -> datetime:
    return datetime.now(timezone.utc).replace(microsecond=0)


def _expiry(role: str, days: int | None = None) -> datetime:
    return _now() + timedelta(days=LIFETIMES[role] if days is None else days)


def _lasts(root: Metadata[Root], role: str, item: Metadata[Any]) -> bool:
    """Whether it is rightly signed, and for half of its lifetime at least."""
    left: timedelta = item.signed.expires - _now()
    return _counts(root, role, item) and left > timedelta(days=LIFETIMES[role] / 2)


def _counts(root: Metadata[Root], role: str, item: Metadata[Any]) -> bool:
    """Whether the keys that `root` names for `role` have signed."""
    from tuf.api.exceptions import UnsignedMetadataError

    try:
        root.signed.verify_delegate(role, item.signed_bytes, item.signatures)
        return True
    except UnsignedMetadataError:
        return False


# --- the metadata files ---------------------------------------------------------------------------


def _newest_root(folder: Path) -> Metadata[Root]:
    """The root metadata that is public."""
    _, found = _newest(folder, "root")
    if found is None:
        raise DataError(f"{folder} is no repository; make one with: edgehp repo init {folder}")
    return found


def _staged_or_published(folder: Path) -> Metadata[Targets]:
    """The list of targets that the next `publish` signs."""
    staged = folder / STAGED / "targets.json"
    found = _read_metadata(staged) if staged.exists() else _newest(folder, "targets")[1]
    if found is None:
        raise DataError(f"{folder}: the list of targets is missing; restore it from a copy")
    return found


def _newest_version(folder: Path, role: str) -> tuple[int, Path | None]:
    """The largest version that is public, and its file; 0 and None where there is none."""
    found = [
        (int(path.name.partition(".")[0]), path)
        for path in (folder / "metadata").glob(f"*.{role}.json")
        if path.name.partition(".")[0].isdecimal()
    ]
    return max(found, default=(0, None))


def _newest(folder: Path, role: str) -> tuple[int, Metadata[Any] | None]:
    """The largest version that is public, and its list; 0 and None where there is none."""
    version, path = _newest_version(folder, role)
    return version, None if path is None else _read_metadata(path)


def _read_metadata(path: Path) -> Metadata[Any]:
    """The metadata in a file, whoever signed it."""
    from tuf.api.metadata import Metadata
    from tuf.api.serialization import DeserializationError

    try:
        return Metadata.from_bytes(path.read_bytes())
    except DeserializationError as e:
        raise DataError(f"{path} is no TUF metadata ({e}); restore it from a copy") from e


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """One publisher at a time; an `OSError` of the block is said as one about the repository."""
    with disk.writing(f"the repository {folder}", "check its owner and the disk"):
        if not (folder / "metadata").is_dir():
            yield
            return
        disk.make_folder(folder / STAGED)
        busy = f"somebody else is changing {folder}; wait for it"
        with disk.locked(folder / STAGED / "lock", busy):
            yield


# --- the keys -------------------------------------------------------------------------------------


def _require_tuf() -> None:
    """Say what to install where the packages are missing."""
    require("tuf.api.metadata", "sign")
    require("cryptography", "sign")


def _new_key(path: Path, password: str | None) -> None:
    """Make a P-256 key, in a file that only its owner reads."""
    ec = require("cryptography.hazmat.primitives.asymmetric.ec", "sign")
    serialization = require("cryptography.hazmat.primitives.serialization", "sign")
    encryption = (
        serialization.BestAvailableEncryption(password.encode())
        if password
        else serialization.NoEncryption()
    )
    data = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
    )
    if not path.parent.is_dir():
        disk.make_folder(path.parent)
        os.chmod(path.parent, 0o700)  # noqa: PTH101
    if path.exists():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    disk.replace_file(path, data, mode=0o600)


def _check_apart(folder: Path, keys: Path) -> None:
    """Refuse to keep private keys where a web server would hand them out."""
    public, private = folder.resolve(), keys.resolve()
    if private == public or public in private.parents:
        raise UsageError(
            f"the keys would be in {keys}, inside the repository, and public with it\n"
            "hint: choose a folder elsewhere with --keys"
        )


def _signer_of(path: Path, password: str | None) -> CryptoSigner:
    """A private key that signs."""
    from securesystemslib.signer import CryptoSigner

    key, _ = read_private_key(path, password)
    try:
        return CryptoSigner(key)
    except (ValueError, TypeError) as e:
        text = " ".join(str(e).split())[:120]
        raise UsageError(f"{path}: a key that signs no list ({text}); give another file") from e
