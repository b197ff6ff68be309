"""What the device writes down: which slot is current, and what is in a slot.

Both files are JSON with a digest of their own, so that a torn one is noticed and not believed.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgehp._json import strict_json
from edgehp.artifact.manifest import canonical_digest
from edgehp.shipping import disk
from edgehp.shipping.selftest import SelfTestResult

__all__ = ["SLOT_NAMES", "Slot", "State", "other_than", "read_slot", "read_state", "write_state"]

logger = logging.getLogger(__name__)

SLOT_NAMES = ("a", "b")
_STATE = "state.json"
_RECORD = "record.json"
_LARGEST = 256 * 1024
_SCHEMA = 1
# Reasons are kept for people; eight are more than two slots can hold.
_FAILURES_KEPT = 8


@dataclass(frozen=True)
class Slot:
    """An installed slot.

    Attributes:
        name: ``"a"`` or ``"b"``.
        artifact: the artifact directory, for `edgehp.artifact.load_artifact`.
        digest: of the bundle it came from (`VerifiedBundle.digest`).
        signer: who signed that bundle.
        artifact_name: of the manifest.
        sequence: counts installations on this device; the larger is the newer.
        manifest_sha256: of the manifest in the slot; differs from the signed one where the engine
            was built here.
        built_here: the engine was built on this device from a deferred bundle.
        selftest: what the golden vectors gave at installation.
    """

    name: str
    artifact: Path
    digest: str
    signer: str
    artifact_name: str
    sequence: int
    manifest_sha256: str
    built_here: bool
    selftest: SelfTestResult

    def to_dict(self) -> dict[str, Any]:
        """A dictionary for JSON."""
        return {
            "name": self.name,
            "artifact": str(self.artifact),
            **_record_values(self),
        }


@dataclass(frozen=True)
class State:
    """Which slot is current. `starts` counts those of the current slot that nobody confirmed."""

    current: str | None = None
    sequence: int = 0
    starts: int = 0
    failed: dict[str, str] = field(default_factory=dict)

    def with_failure(self, digest: str, reason: str) -> dict[str, str]:
        """`failed` and one more; the oldest are forgotten."""
        kept = {k: v for k, v in self.failed.items() if k != digest}
        kept[digest] = reason[:500]
        return dict(list(kept.items())[-_FAILURES_KEPT:])

    def without_failure(self, digest: str) -> dict[str, str]:
        """`failed` without the one of `digest`."""
        return {k: v for k, v in self.failed.items() if k != digest}


def other_than(name: str | None) -> str:
    """The slot that is not `name`; the first one where none is current."""
    return SLOT_NAMES[1] if name == SLOT_NAMES[0] else SLOT_NAMES[0]


def slot_folder(root: Path, name: str) -> Path:
    """Where the slot `name` is."""
    return root / "slots" / name


def read_state(root: Path) -> State:
    """The state under `root`; rebuilt from the slots where the file is missing or damaged."""
    path = root / _STATE
    try:
        values = _read(path)
        state = State(
            current=None if values["current"] is None else str(values["current"]),
            sequence=int(values["sequence"]),
            starts=int(values["starts"]),
            failed={str(k): str(v) for k, v in dict(values["failed"]).items()},
        )
        if state.current not in (None, *SLOT_NAMES):
            raise ValueError(f"no slot is called {state.current!r}")
        return state
    except FileNotFoundError:
        found = _rebuilt(root)
        if found.current is not None:
            logger.warning("%s is missing: slot %s taken as current", path, found.current)
        return found
    except (OSError, ValueError, KeyError, TypeError) as e:
        found = _rebuilt(root)
        logger.warning("%s is damaged (%s): slot %s taken as current", path, e, found.current)
        return found


def write_state(root: Path, state: State) -> None:
    """Replace the state under `root`; when this returns it is on disk.

    Raises:
        OSError: the disk is full or refuses.
    """
    values = {
        "current": state.current,
        "sequence": state.sequence,
        "starts": state.starts,
        "failed": state.failed,
    }
    disk.replace_file(root / _STATE, _text(values))


def read_slot(root: Path, name: str) -> Slot | None:
    """The record of a slot, None where it is empty or its record is damaged."""
    folder = slot_folder(root, name)
    try:
        values = _read(folder / _RECORD)
        return Slot(
            name=name,
            artifact=folder / "artifact",
            digest=str(values["digest_of_bundle"]),
            signer=str(values["signer"]),
            artifact_name=str(values["artifact_name"]),
            sequence=int(values["sequence"]),
            manifest_sha256=str(values["manifest_sha256"]),
            built_here=values["built_here"] is True,
            selftest=SelfTestResult.from_dict(values["selftest"]),
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as e:
        logger.warning("%s is damaged (%s): the slot counts as empty", folder / _RECORD, e)
        return None


def write_record(folder: Path, slot: Slot) -> None:
    """Write the record of a slot that is being made in `folder`.

    Raises:
        OSError: the disk is full or refuses.
    """
    disk.write_file(folder / _RECORD, [_text(_record_values(slot))])


def _record_values(slot: Slot) -> dict[str, Any]:
    return {
        "digest_of_bundle": slot.digest,
        "signer": slot.signer,
        "artifact_name": slot.artifact_name,
        "sequence": slot.sequence,
        "manifest_sha256": slot.manifest_sha256,
        "built_here": slot.built_here,
        "selftest": slot.selftest.to_dict(),
    }


def _rebuilt(root: Path) -> State:
    """The newest slot as the current one."""
    slots = [s for name in SLOT_NAMES if (s := read_slot(root, name)) is not None]
    if not slots:
        return State()
    newest = max(slots, key=lambda s: s.sequence)
    return State(current=newest.name, sequence=newest.sequence)


def _text(values: dict[str, Any]) -> bytes:
    values = {"schema": _SCHEMA, **values}
    values["digest"] = canonical_digest(values)
    return (json.dumps(values, indent=1) + "\n").encode()


def _read(path: Path) -> dict[str, Any]:
    with path.open("rb") as f:
        values = strict_json(f.read(_LARGEST))
    if not isinstance(values, dict) or values.get("digest") != canonical_digest(values):
        raise ValueError("its digest does not fit")
    if values["schema"] != _SCHEMA:
        raise ValueError(f"schema {values['schema']}, expected {_SCHEMA}")
    return values
