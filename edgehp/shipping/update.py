"""Updates: from a repository to the newest bundle that fits this board, installed.

Under the root directory of the slots::

    updates/lock          flock of the one update
    updates/memory.json   what was accepted of the repository (`edgehp.shipping.offers`)
    updates/<sha256>.part a bundle on its way
    updates/device-id     where the system has no id of its own

The signed lists say which bundle is the newest for this board, and guard against older or mixed
ones. What a bundle holds is believed only by its own signature: the keys of the repository alone
put nothing on a device.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from edgehp.device import HostProbe
from edgehp.errors import AccuracyError, CompatibilityError
from edgehp.files import sha256_file
from edgehp.progress import step
from edgehp.shipping import disk, slots
from edgehp.shipping.bundle import verify_bundle
from edgehp.shipping.fetch import Source, download
from edgehp.shipping.offers import (
    Decision,
    Listed,
    Lists,
    Memory,
    read_memory,
    refresh,
    write_memory,
)
from edgehp.shipping.signature import PublicKey

logger = logging.getLogger(__name__)

FOLDER = "updates"
_PART = ".part"
_SPARE_BYTES = 8 * 2**20
_DECISIONS_KEPT = 20
_MACHINE_ID = Path("/etc/machine-id")


@dataclass(frozen=True)
class Update:
    """The answer to `update`.

    Attributes:
        slot: what was installed; None where there is no update.
        name: of the bundle in the repository, None likewise.
        serial: of that bundle; where there is none, what this device has.
        passed_over: newer bundles that were not offered to it, the newest first.
    """

    slot: slots.Slot | None
    name: str | None
    serial: int
    passed_over: tuple[Decision, ...]

    def to_dict(self) -> dict[str, Any]:
        """A dictionary for JSON."""
        return {
            "installed": None if self.slot is None else self.slot.to_dict(),
            "bundle": self.name,
            "serial": self.serial,
            "passed_over": msgspec.to_builtins(self.passed_over),
        }


def update(
    source: Source,
    root_metadata: Path,
    trust: Sequence[PublicKey],
    root: Path,
    *,
    device_id: str | None = None,
) -> Update:
    """Install the newest bundle of a repository that fits this board and is newer than its own.

    Killed at any moment, the current slot is the old one or the new one, whole and tested, and the
    next update goes on from there. A bundle whose installation failed here is noted under
    `slots.status(root).failed` and not offered again.

    Args:
        source: see `edgehp.shipping.fetch.open_source`.
        root_metadata: TUF root metadata that came with the device.
        trust: keys, one of which must have signed the bundle.
        root: of the slots; made if it does not exist.
        device_id: tells this device from the others of the fleet in a staged rollout, and never
            leaves it; ``/etc/machine-id`` when omitted, else one that is drawn once.

    Raises:
        CompatibilityError: the repository or the bundle was refused, or the self-test failed. The
            slot in use is untouched.
        DataError: no repository, or no bundle.
        EnvironmentalError: the repository cannot be reached, too little disk space, another update
            or installer at work, a package missing, no slot can be spared.
        AccuracyError: an engine built here drops more than the gate allows.
        UsageError: `root_metadata` is not what it should be.
    """
    here = HostProbe()
    folder = root / FOLDER
    with disk.writing(str(root), "check its owner and the disk, or choose another --root"):
        disk.make_folder(folder)
        busy = f"another update is at work in {folder}; wait for it"
        with disk.locked(folder / "lock", busy):
            disk.sweep(folder, ".work-", ".memory.json.")
            with step("refresh"):
                lists = refresh(source, root_metadata, folder)
            memory, state = read_memory(folder), slots.read_state(root)
            have = _newest_here(root, state, lists, memory)
            identity = device_id or _device_id(folder)

            def misfit(one: Listed) -> str | None:
                if (failed := state.failed.get(one.offer.content)) is not None:
                    return f"it failed here: {failed}"
                return one.offer.withheld(identity) or one.offer.misfit(here)

            chosen, decisions = _newest(lists, have, misfit)
            memory = replace(memory, decisions=decisions[:_DECISIONS_KEPT])
            write_memory(folder, replace(memory, serial=have, keys=lists.keys))
            slot = None
            if chosen is not None:
                slots.require_spare(root)
                part = _fetched(source, chosen, folder)
                with step("verify"):
                    bundle = verify_bundle(part, trust)
                if bundle.digest != chosen.offer.content:
                    raise CompatibilityError(
                        f"{chosen.offer.path} holds content {bundle.digest[:16]}, listed is "
                        f"{chosen.offer.content[:16]}; publish the repository again"
                    )
                try:
                    slot = slots.install(bundle, root)
                except (CompatibilityError, AccuracyError):
                    disk.remove_tree(part)
                    raise
                have = chosen.offer.serial
                write_memory(folder, replace(memory, serial=have, keys=lists.keys))
            _forget_parts(folder, None)
    passed_over = tuple(d for d in decisions if d.reason is not None)
    return Update(slot, None if chosen is None else chosen.offer.path, have, passed_over)


def _newest_here(root: Path, state: slots.State, lists: Lists, memory: Memory) -> int:
    """Serial of the newest bundle that this device has or had; 0 where nothing is known.

    What is current tells it, by its digest; and what an update installed before is remembered, so
    that neither a rollback by hand nor a list that lost an entry brings an older one. The other
    slot does not count: it may be what an update left that was killed before the switch. The memory
    counts only while the same keys sign the list: whoever had a key that was rotated since may have
    made it as large as they liked.
    """
    current = slots.read_slot(root, state.current)
    serials = [
        one.offer.serial
        for one in lists.listed
        if current is not None and one.offer.content == current.digest
    ]
    return max([*serials, memory.serial if memory.keys == lists.keys else 0])


def _newest(
    lists: Lists, have: int, misfit: Callable[[Listed], str | None]
) -> tuple[Listed | None, tuple[Decision, ...]]:
    """The newest that fits and is newer than `have`; and what was decided on the way to it."""
    decisions: list[Decision] = []
    for one in lists.listed:
        offer = one.offer
        if offer.serial < have or (offer.serial == have and offer.state != "withdrawn"):
            break
        reason = misfit(one)
        decisions.append(Decision(offer.path, offer.serial, reason))
        if reason is None:
            return one, tuple(decisions)
        logger.info("%s is not for this device: %s", offer.path, reason)
    return None, tuple(decisions)


def _device_id(folder: Path) -> str:
    """What tells this device from others: the system's own id, else one that is drawn once."""
    own = folder / "device-id"
    for path in (_MACHINE_ID, own):
        try:
            text = path.read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            continue
        if text and text != "uninitialized":
            return text
    text = secrets.token_hex(16)
    disk.replace_file(own, text.encode())
    return text


def _fetched(source: Source, chosen: Listed, folder: Path) -> Path:
    """The bundle file, as listed; resumed if a part is there."""
    part, length = folder / f"{chosen.sha256}{_PART}", chosen.length
    _forget_parts(folder, part)
    while True:
        resumed = part.exists()
        missing = length - (part.stat().st_size if resumed else 0)
        disk.require_space(folder, missing + _SPARE_BYTES, "download")
        download(source, chosen.location, part, length)
        if sha256_file(part) == chosen.sha256:
            return part
        disk.remove_tree(part)
        if not resumed:
            raise CompatibilityError(
                f"{source.name}: {chosen.location} is not the bundle that is listed (another "
                "SHA-256)\nhint: copy or publish the repository again, whole"
            )
        # What a power cut left of a file need not be what was written.
        logger.info("%s: what was here of it is damaged: it is fetched anew", part.name)


def _forget_parts(folder: Path, but: Path | None) -> None:
    for entry in sorted(folder.glob(f"*{_PART}")):
        if entry != but:
            disk.remove_tree(entry)
