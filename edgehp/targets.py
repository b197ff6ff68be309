"""Targets are data: what an artifact can be built for, one TOML file each under ``targets/``.

Adding a board is adding a file. This module reads the files strictly (an unknown or missing key is
an error that names file and key), and answers what the data says about a precision and about the
alias ``orin``.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from edgehp._installed import parse_version
from edgehp.device import SYSTEM_ROOT, find_jetson
from edgehp.errors import DataError, UsageError
from edgehp.files import Record, plain, read_toml, resource_dir, to_record

PRECISIONS = ("int8", "fp16", "fp32")
ORIN = "orin"
ORIN_DEFAULT = "orin-agx-64gb"
# Files whose name starts so hold tables that several targets share.
SHARED_PREFIX = "_"
JETPACK_FILE = "_jetpack.toml"
# Python that edgehp needs; JetPack 5's own is older.
MINIMUM_PYTHON = (3, 10)


Answer = Literal["yes", "warn", "no"]
Positive = Annotated[float, Meta(gt=0)]


def _require_versions(record: Any, *keys: str) -> None:
    for key in keys:
        text = getattr(record, key)
        try:
            parse_version(text or "0")
        except DataError as e:
            raise ValueError(f"key '{key}': {e}") from e


class Verdict(Record, frozen=True):
    """What the data says: ``"yes"``, ``"warn"`` or ``"no"``, and why."""

    supported: Answer
    reason: str = ""

    def __post_init__(self) -> None:
        """Refuse a doubt without a reason."""
        if self.supported != "yes" and not self.reason:
            raise ValueError(f"key 'reason' is needed where supported is {self.supported!r}")


class TensorRTRange(Record, frozen=True):
    """TensorRT versions that drive a target; both ends belong to it, None means no known end."""

    minimum: str
    maximum: str | None = None
    note: str = ""

    def __post_init__(self) -> None:
        """Refuse ends that are no versions."""
        _require_versions(self, "minimum", "maximum")

    @property
    def words(self) -> str:
        """For people: ``"8.6 to 10.4"`` or ``"8.6 or newer"``."""
        return f"{self.minimum} to {self.maximum}" if self.maximum else f"{self.minimum} or newer"

    def contains(self, version: str) -> bool:
        """Whether `version` (``"10.3.0.30"``) is in the range; ``10.4.0`` is within ``10.4``."""
        found, low = parse_version(version), parse_version(self.minimum)
        if found < low:
            return False
        high = parse_version(self.maximum) if self.maximum else ()
        return found[: len(high)] <= high


class JetPackRow(Record, frozen=True, kw_only=True):
    """One line of the JetPack table; not ``verified``: the source itself is in doubt."""

    name: str
    jetpack: str
    l4t_first: str
    l4t_last: str | None = None
    tensorrt: str
    cuda: str
    ubuntu: str
    python: str
    verified: bool

    def __post_init__(self) -> None:
        """Refuse what is no version."""
        _require_versions(self, "l4t_first", "l4t_last", "tensorrt", "python")

    @property
    def usable(self) -> bool:
        """Whether its own Python is new enough for edgehp."""
        return parse_version(self.python) >= MINIMUM_PYTHON

    def covers(self, l4t: str) -> bool:
        """Whether the L4T release `l4t` belongs to this row."""
        found = parse_version(l4t)
        last = parse_version(self.l4t_last) if self.l4t_last else ()
        return parse_version(self.l4t_first) <= found and found[: len(last)] <= last


class Peaks(Record, frozen=True, kw_only=True):
    """Peak figures of a power mode (Jetson) or a board (discrete GPU), for the roofline.

    Attributes:
        name: of the power mode or the board; modes have module-specific ids, hence names.
        int8_tops: dense INT8 operations, 10^12 a second.
        fp16_tflops: dense FP16 operations, 10^12 a second.
        bandwidth_gb_s: memory bandwidth, 10^9 bytes a second; the module's own peak where that of
            the power mode is not known, None where neither is.
        gpu_mhz: GPU clock; None if unknown.
        sms: active streaming multiprocessors; None if unknown.
        power_w: power limit in watts; None where there is none or it is unknown.
        default: a mode the module is delivered with; two where -super has its own.
        measured: whether anybody of this project has measured the figure.
        source: where the figure comes from.
    """

    name: str
    int8_tops: Positive
    fp16_tflops: Positive
    bandwidth_gb_s: Positive | None = None
    gpu_mhz: Positive | None = None
    sms: Annotated[int, Meta(gt=0)] | None = None
    power_w: Positive | None = None
    default: bool = False
    measured: bool
    source: str


class Precisions(Record, frozen=True):
    """A verdict for each of `PRECISIONS`."""

    int8: Verdict
    fp16: Verdict
    fp32: Verdict


class Target(Record, frozen=True, kw_only=True):
    """One target, as its file describes it.

    Attributes:
        name: of the file, and what ``--target`` takes.
        title: one line for people.
        engine: that runs its artifacts.
        flavor: of Q/DQ, ``"cpu"`` (uint8 activations) or ``"tensorrt"`` (symmetric int8).
        compute_capabilities: of the GPUs one artifact serves; empty for a CPU.
        precisions: verdicts.
        verified: what has been done for real.
        verified_note: how, in a sentence.
        dla_cores: deep-learning accelerator cores.
        dla: verdict on using them.
        tensorrt: version range, None where TensorRT is not used.
        jetpack: rows that apply, oldest first, which the file has by their names; empty off Jetson.
        power_modes: of a Jetson, else empty.
        boards: peaks of known boards of a discrete target, else empty.
        module_ids: device-tree part numbers of the Jetson module, without the vendor.
        module_family: word in the device tree's model, with `memory_gb` the fallback to find it.
        memory_gb: nominal memory of the Jetson module in GB.
        notes: what else a user should know.
    """

    name: str
    title: str
    engine: Literal["openvino", "tensorrt", "tensorrt-rtx"]
    flavor: Literal["cpu", "tensorrt"]
    compute_capabilities: tuple[str, ...]
    precisions: Precisions
    verified: Literal["run", "built", "not run"]
    verified_note: str
    dla_cores: Annotated[int, Meta(ge=0)] = 0
    dla: Verdict = Verdict("no", "this target has no DLA")
    tensorrt: TensorRTRange | None = None
    jetpack: tuple[JetPackRow, ...] = ()
    power_modes: tuple[Peaks, ...] = ()
    boards: tuple[Peaks, ...] = ()
    module_ids: tuple[str, ...] = ()
    module_family: str = ""
    memory_gb: Annotated[int, Meta(gt=0)] | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check what concerns several keys."""
        if (self.tensorrt is None) == (self.engine == "tensorrt"):
            raise ValueError("key 'tensorrt' must be there exactly where engine is 'tensorrt'")
        if (self.engine == "openvino") == bool(self.compute_capabilities):
            raise ValueError("key 'compute_capabilities' must be empty for a CPU, and only there")

    def to_dict(self) -> dict[str, Any]:
        """A dictionary for JSON."""
        values: dict[str, Any] = plain(self)
        return values

    def jetpack_for(self, l4t: str) -> JetPackRow | None:
        """The JetPack row of the L4T release `l4t` (``"36.4.3"``), the newest if several."""
        rows = [row for row in self.jetpack if row.covers(l4t)]
        return rows[-1] if rows else None


@dataclass(frozen=True)
class Resolution:
    """A target, and what the user must be told about how its name was understood (or None)."""

    target: Target
    note: str | None


def list_targets(directory: Path | None = None) -> tuple[str, ...]:
    """The names of all targets, sorted; `directory` defaults to the packaged one."""
    directory = directory or resource_dir("targets")
    names = (path.stem for path in directory.glob("*.toml"))
    return tuple(sorted(name for name in names if not name.startswith(SHARED_PREFIX)))


def load_target(name: str, directory: Path | None = None) -> Target:
    """Read the target called `name`; aliases are the business of `resolve_target`.

    Args:
        name: a name of `list_targets`.
        directory: of the TOML files; the packaged one by default.

    Raises:
        UsageError: there is no such target; the message suggests the near name.
        DataError: its file is malformed; the message gives file, key and reason.
    """
    directory = directory or resource_dir("targets")
    known = list_targets(directory)
    if name not in known:
        near = difflib.get_close_matches(name, (*known, ORIN), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join((*known, ORIN))}"
        raise UsageError(f"no target {name!r}; {hint}")
    return _read(directory / f"{name}.toml")


def resolve_target(
    name: str, directory: Path | None = None, root: Path = SYSTEM_ROOT
) -> Resolution:
    """As `load_target`, but ``orin`` is the module this runs on, elsewhere `ORIN_DEFAULT`.

    Args:
        name: a target or ``orin``.
        directory: of the TOML files; the packaged one by default.
        root: of the file system whose device tree is read.

    Raises:
        UsageError: no such target, or this is a Jetson that is no known Orin module.
        DataError: a file is malformed.
    """
    if name != ORIN:
        return Resolution(load_target(name, directory), None)
    module = find_jetson(root)
    names = [each for each in list_targets(directory) if each.startswith(f"{ORIN}-")]
    if module is None:
        others = ", ".join(each for each in names if each != ORIN_DEFAULT)
        note = (
            f"'{ORIN}' means {ORIN_DEFAULT} here, because this machine is not a Jetson; on one it "
            f"means the module found there. For another module name it: {others}"
        )
        return Resolution(load_target(ORIN_DEFAULT, directory), note)
    orins = [load_target(each, directory) for each in names]
    found = next((t for t in orins if module.part_number in t.module_ids), None)
    if found is not None:
        return Resolution(found, f"'{ORIN}' is {found.name}: this is a {module.description}")
    # Without a part number: the family, and the smallest memory that holds what Linux sees. A part
    # that no target names is another module: p3701-0008 has an AGX Orin's memory, not its clocks.
    sized = [
        (target.memory_gb, target)
        for target in orins
        if module.part_number is None
        and target.memory_gb is not None
        and target.module_family in module.model
        and module.memory_gib is not None
        and module.memory_gib <= target.memory_gb
    ]
    if not sized:
        other = target_of_part(module.part_number, directory)
        fitting = [other] if other is not None else orins
        raise UsageError(
            f"'{ORIN}': this Jetson calls itself {module.description!r}, which is no Orin module "
            f"known here\nhint: name the target: {', '.join(target.name for target in fitting)}"
        )
    target = min(sized, key=lambda pair: pair[0])[1]
    note = f"'{ORIN}' is {target.name}, by the memory of this {module.description}"
    return Resolution(target, note)


def target_of_part(part: str | None, directory: Path | None = None) -> Target | None:
    """The target of a Jetson module, or None where no target names it.

    Args:
        part: the module's part number, such as ``"p3767-0005"``.
        directory: of the TOML files; the packaged one by default.

    Raises:
        DataError: a file is malformed.
    """
    targets = (load_target(name, directory) for name in list_targets(directory))
    return next((target for target in targets if part in target.module_ids), None)


def check_precision(target: Target, precision: str) -> Verdict:
    """What the target's data says about `precision`, one of `PRECISIONS`.

    Raises:
        UsageError: no such precision.
    """
    if precision not in PRECISIONS:
        raise UsageError(f"no precision {precision!r}; expected one of {', '.join(PRECISIONS)}")
    verdict: Verdict = getattr(target.precisions, precision)
    return verdict


def _read(path: Path) -> Target:
    values = read_toml(path, dict[str, Any])
    rows = {r["name"]: r for r in plain(read_toml(path.with_name(JETPACK_FILE), _JetPackFile).row)}
    wanted = to_record(values.get("jetpack", []), tuple[str, ...], f"{path}: key 'jetpack'")
    if unknown := set(wanted) - rows.keys():
        raise DataError(
            f"{path}: key 'jetpack' names rows that {JETPACK_FILE} lacks: {sorted(unknown)}"
        )
    values["jetpack"] = [row for name, row in rows.items() if name in wanted]
    return to_record(values | {"name": path.stem}, Target, str(path))


class _JetPackFile(Record, frozen=True):
    row: tuple[JetPackRow, ...]
