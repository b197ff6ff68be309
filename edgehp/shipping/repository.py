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

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgehp._hashing import sha256_file
from edgehp.errors import DataError, UsageError
from edgehp.shipping import disk
from edgehp.shipping.bundle import verify_bundle
from edgehp.shipping.keys import Trust
from edgehp.shipping.offer import FIELD, Offer
from edgehp.shipping.repository_files import (
    STAGED,
    newest,
    newest_root,
    read_metadata,
    staged_or_published,
    version_of,
    write_metadata,
    writing,
)
from edgehp.shipping.repository_keys import (
    check_apart,
    new_key,
    require_tuf,
    revoked_root,
    signer_of,
)

if TYPE_CHECKING:
    from tuf.api.metadata import Metadata, Root

__all__ = ["LIFETIMES", "ROLES", "Published", "add", "init", "publish", "rotate_key"]

ROLES = ("root", "targets", "snapshot", "timestamp")
# How long a signature of each role counts, in days. A car may stand for long and a repository may
# travel on a USB stick; the timestamp decides how long a withheld update stays unnoticed.
LIFETIMES = {"root": 1095, "targets": 365, "snapshot": 365, "timestamp": 30}
# Beside the list of targets, and signed with it: serials are never used twice.
_SERIAL = "edgehp-serial"


@dataclass(frozen=True)
class Published:
    """Role -> version of the metadata that was signed now; roles that stayed are left out."""

    versions: dict[str, int]


def init(
    folder: Path, keys: Path, *, password: str | None = None, now: datetime | None = None
) -> Path:
    """Make an empty repository and its four keys.

    Args:
        folder: new or empty.
        keys: folder for the private keys; those that are there already are used.
        password: encrypts new keys, opens those that are there.
        now: the time; the clock's when omitted.

    Returns:
        The root metadata (``metadata/1.root.json``) that devices are given.

    Raises:
        UsageError: there is something already, the keys would be public, or one cannot be used.
        EnvironmentalError: the disk refuses, or a package is missing.
    """
    require_tuf()
    from tuf.api.metadata import Metadata, Root, Targets

    if (folder / "metadata").exists():
        raise UsageError(f"{folder} holds a repository already; choose another folder")
    check_apart(folder, keys)
    if folder.is_dir() and any(entry.name != STAGED for entry in folder.iterdir()):
        raise UsageError(f"{folder} is not empty, and all in it would be public; choose another")
    with writing(folder):
        signers = {}
        for role in ROLES:
            path = keys / f"{role}.pem"
            if not path.exists():
                new_key(path, password)
            signers[role] = signer_of(path, password)
        root = Root(expires=_expiry("root", now), consistent_snapshot=True)
        for role, signer in signers.items():
            root.add_key(signer.public_key, role)
        signed = Metadata(root)
        signed.sign(signers["root"])
        targets = Metadata(Targets(expires=_expiry("targets", now)))
        targets.signed.unrecognized_fields[_SERIAL] = 0
        for name in ("metadata", "targets", STAGED):
            disk.make_folder(folder / name)
        write_metadata(folder / STAGED / "targets.json", targets)
        write_metadata(folder / "metadata" / "1.root.json", signed)
    publish(folder, keys, password=password, now=now)
    return folder / "metadata" / "1.root.json"


def add(folder: Path, bundle: Path, trust: Trust) -> Offer:
    """Put a bundle into the repository, with the next serial; devices see it after `publish`.

    Args:
        folder: the repository.
        bundle: made by `make_bundle`.
        trust: whom devices believe; a bundle that they would refuse is refused here.

    Raises:
        DataError, CompatibilityError: as `verify_bundle`; or no repository.
        UsageError: its content is listed as the newest already.
        EnvironmentalError: the disk refuses, or a package is missing.
    """
    require_tuf()
    from tuf.api.metadata import TargetFile

    verified = verify_bundle(bundle, trust)
    newest_root(folder)
    with writing(folder):
        targets = staged_or_published(folder)
        serial = 1 + int(targets.signed.unrecognized_fields.get(_SERIAL, 0))
        offer = Offer.of(verified, serial)
        for path, listed in targets.signed.targets.items():
            known = (listed.custom or {}).get(FIELD, {})
            if known.get("content") == offer.content and known.get("serial") == serial - 1:
                raise UsageError(f"{folder} lists this bundle already, as its newest: {path}")
        digest = sha256_file(bundle)
        public = folder / "targets" / f"{digest}.{offer.path}"
        copy = folder / STAGED / "copy"
        disk.remove_tree(copy)
        with bundle.open("rb") as source:
            disk.write_file(copy, iter(lambda: source.read(2**20), b""))
        # What was verified is what is listed, whatever happened to the file meanwhile.
        if verify_bundle(copy, trust).digest != verified.digest or sha256_file(copy) != digest:
            raise DataError(f"{bundle} changed while it was copied; add it again")
        target = TargetFile(copy.stat().st_size, {"sha256": digest}, offer.path)
        target.unrecognized_fields["custom"] = {FIELD: offer.to_dict()}
        disk.make_folder(public.parent)
        os.rename(copy, public)  # noqa: PTH104 - from one folder to another, both flushed
        disk.flush_folder(public.parent)
        targets.signed.targets[offer.path] = target
        targets.signed.unrecognized_fields[_SERIAL] = serial
        write_metadata(folder / STAGED / "targets.json", targets)
    return offer


def publish(
    folder: Path,
    keys: Path,
    *,
    days: int | None = None,
    password: str | None = None,
    now: datetime | None = None,
) -> Published:
    """Sign what was added or rotated and make it public; without news, renew the timestamp.

    Only the keys of what has to be signed are opened: a server that renews the timestamp every day
    needs no other. The timestamp is written last, so that a device sees the old lists or the new.

    Args:
        folder: the repository.
        keys: folder with ``<role>.pem``.
        days: how long the timestamp counts; 30 when omitted.
        password: of the keys.
        now: the time; the clock's when omitted.

    Raises:
        DataError: no repository.
        UsageError: a key is missing or is not the one that the root names.
        EnvironmentalError: the disk refuses, or a package is missing.
    """
    require_tuf()
    from tuf.api.metadata import Metadata, MetaFile, Snapshot, Timestamp

    metadata = folder / "metadata"
    made: dict[str, int] = {}

    def signed(role: str, root: Metadata[Root], item: Metadata[Any]) -> bytes:
        signer = signer_of(keys / f"{role}.pem", password)
        item.signed.expires = _expiry(role, now, days if role == "timestamp" else None)
        item.signatures.clear()
        item.sign(signer)
        if not _counts(root, role, item):
            raise UsageError(
                f"{keys / f'{role}.pem'} is not the key that the root names for {role}; give the "
                "folder with the newest keys, or rotate: edgehp repo rotate-key"
            )
        made[role] = item.signed.version
        return item.to_bytes()

    with writing(folder):
        rotated = folder / STAGED / "root.json"
        root = read_metadata(rotated) if rotated.exists() else newest_root(folder)
        # Everything is signed before anything is written: a missing key changes nothing.
        files: list[tuple[str, bytes]] = []
        staged, public = folder / STAGED / "targets.json", newest(folder, "targets")
        targets = read_metadata(staged) if staged.exists() else read_metadata(public)  # type: ignore[arg-type]
        renew = staged.exists() or not _lasts(root, "targets", targets, now)
        if renew:
            targets.signed.version = 1 + version_of(public)
            files.append(
                (f"{targets.signed.version}.targets.json", signed("targets", root, targets))
            )
        path = newest(folder, "snapshot")
        snapshot = Metadata(Snapshot()) if path is None else read_metadata(path)
        if renew or not _lasts(root, "snapshot", snapshot, now):
            snapshot.signed.version = 1 + version_of(path)
            if renew:
                snapshot.signed.meta = {"targets.json": _described(MetaFile, targets, files[-1][1])}
            files.append(
                (f"{snapshot.signed.version}.snapshot.json", signed("snapshot", root, snapshot))
            )
            description = _described(MetaFile, snapshot, files[-1][1])
        else:
            description = read_metadata(metadata / "timestamp.json").signed.snapshot_meta
        path = metadata / "timestamp.json"
        timestamp = read_metadata(path) if path.exists() else Metadata(Timestamp())
        timestamp.signed.version = 1 + (timestamp.signed.version if path.exists() else 0)
        timestamp.signed.snapshot_meta = description
        files.append(("timestamp.json", signed("timestamp", root, timestamp)))
        if rotated.exists():
            name = f"{root.signed.version}.root.json"
            made["root"] = root.signed.version
            # Before the timestamp: what it names must be signed by keys that devices can learn of.
            files.insert(-1, (name, rotated.read_bytes()))
        for name, data in files:
            disk.replace_file(metadata / name, data)
        disk.remove_tree(staged)
        disk.remove_tree(rotated)
    return Published(made)


def rotate_key(
    folder: Path,
    role: str,
    keys: Path,
    *,
    password: str | None = None,
    now: datetime | None = None,
) -> Path:
    """Replace the key of a role by a new one; devices refuse the old one once `publish` has run.

    The new root is signed by the root key, and a new root key by the old one as well. The old key's
    file gets the suffix ``.revoked``.

    Args:
        folder: the repository.
        role: one of `ROLES`.
        keys: folder with ``root.pem``, where the new key is written.
        password: of the keys, old and new.
        now: the time; the clock's when omitted.

    Returns:
        The file of the new key.

    Raises:
        DataError: no repository.
        UsageError: no such role, or the root key is missing or another.
        EnvironmentalError: the disk refuses, or a package is missing.
    """
    require_tuf()
    if role not in ROLES:
        raise UsageError(f"no role {role!r}; expected one of {', '.join(ROLES)}")
    check_apart(folder, keys)
    staged = folder / STAGED / "root.json"
    with writing(folder):
        published = newest_root(folder)
        root = read_metadata(staged) if staged.exists() else newest_root(folder)
        path = keys / f"{role}.pem"
        fresh = keys / f"{role}.pem.new"
        signers = [signer_of(keys / "root.pem", password)]
        disk.remove_tree(fresh)
        new_key(fresh, password)
        new = signer_of(fresh, password)
        for keyid in list(root.signed.roles[role].keyids):
            root.signed.revoke_key(keyid, role)
        root.signed.add_key(new.public_key, role)
        root.signed.version = published.signed.version + 1
        root.signed.expires = _expiry("root", now)
        if role == "root":
            signers.append(new)
        signers += revoked_root(published, keys, password, signers)
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
        write_metadata(staged, root)
    return path


def _expiry(role: str, now: datetime | None, days: int | None = None) -> datetime:
    at = (now or datetime.now(timezone.utc)).astimezone(timezone.utc).replace(microsecond=0)
    return at + timedelta(days=LIFETIMES[role] if days is None else days)


def _lasts(root: Metadata[Root], role: str, item: Metadata[Any], now: datetime | None) -> bool:
    """Whether it is rightly signed, and for half of its lifetime at least."""
    at = (now or datetime.now(timezone.utc)).astimezone(timezone.utc)
    half = timedelta(days=LIFETIMES[role] / 2)
    expires: datetime = item.signed.expires
    return _counts(root, role, item) and expires - at > half


def _counts(root: Metadata[Root], role: str, item: Metadata[Any]) -> bool:
    """Whether the keys that `root` names for `role` have signed."""
    from tuf.api.exceptions import UnsignedMetadataError

    try:
        root.signed.verify_delegate(role, item.signed_bytes, item.signatures)
        return True
    except UnsignedMetadataError:
        return False


def _described(kind: Callable[..., Any], item: Metadata[Any], data: bytes) -> Any:
    digest = hashlib.sha256(data).hexdigest()
    return kind(item.signed.version, len(data), {"sha256": digest})
