"""Targets are data: what an artifact can be built for, one TOML file each under ``targets/``.

Adding a board is adding a file. This module reads the files strictly (an unknown or missing key is
an error that names file and key), and answers what the data says about a precision, about the
DLA and about the alias ``orin``.
"""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgehp._toml import load_toml
from edgehp._toml_fields import Fields
from edgehp.device import SYSTEM_ROOT, find_jetson
from edgehp.errors import DataError, UsageError
from edgehp.files import resource_dir

__all__ = [
    "ENGINES",
    "FLAVOURS",
    "PRECISIONS",
    "JetPackRow",
    "Peaks",
    "Resolution",
    "Target",
    "TensorRTRange",
    "Verdict",
    "check_dla",
    "check_precision",
    "list_targets",
    "load_target",
    "parse_version",
    "resolve_target",
]

ENGINES = ("openvino", "tensorrt", "tensorrt-rtx")
FLAVOURS = ("cpu", "tensorrt")
PRECISIONS = ("int8", "fp16", "fp32", "fp8")
ANSWERS = ("yes", "warn", "no")
# What has been done for real with a target: run on it, built for it elsewhere, or neither.
VERIFIED = ("run", "built", "not run")
ORIN = "orin"
ORIN_DEFAULT = "orin-agx-64gb"
# Files whose name starts so hold tables that several targets share.
SHARED_PREFIX = "_"
JETPACK_FILE = "_jetpack.toml"
# Python that edgehp needs; JetPack 5's own is older.
MINIMUM_PYTHON = (3, 10)


@dataclass(frozen=True)
class Verdict:
    """What the data says: ``"yes"``, ``"warn"`` or ``"no"``, and why."""

    supported: str
    reason: str


@dataclass(frozen=True)
class TensorRTRange:
    """TensorRT versions that drive a target; both ends belong to it, None means no known end."""

    minimum: str
    maximum: str | None
    note: str

    def contains(self, version: str) -> bool:
        """Whether `version` (``"10.3.0.30"``) is in the range; ``10.4.0`` is within ``10.4``."""
        found, low = parse_version(version), parse_version(self.minimum)
        if found < low:
            return False
        high = parse_version(self.maximum) if self.maximum else ()
        return found[: len(high)] <= high


@dataclass(frozen=True)
class JetPackRow:
    """One line of the JetPack table; not ``verified``: the source itself is in doubt."""

    name: str
    jetpack: str
    l4t_first: str
    l4t_last: str | None
    tensorrt: str
    cuda: str
    ubuntu: str
    python: str
    verified: bool

    @property
    def usable(self) -> bool:
        """Whether its own Python is new enough for edgehp."""
        return parse_version(self.python) >= MINIMUM_PYTHON

    def covers(self, l4t: str) -> bool:
        """Whether the L4T release `l4t` belongs to this row."""
        found = parse_version(l4t)
        last = parse_version(self.l4t_last) if self.l4t_last else ()
        return parse_version(self.l4t_first) <= found and found[: len(last)] <= last


@dataclass(frozen=True)
class Peaks:
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
        default: the mode the module is delivered with.
        measured: whether anybody of this project has measured the figure.
        source: where the figure comes from.
    """

    name: str
    int8_tops: float
    fp16_tflops: float
    bandwidth_gb_s: float | None
    gpu_mhz: float | None
    sms: int | None
    power_w: float | None
    default: bool
    measured: bool
    source: str


@dataclass(frozen=True)
class Target:
    """One target, as its file describes it.

    Attributes:
        name: of the file, and what ``--target`` takes.
        title: one line for people.
        engine: ``"openvino"``, ``"tensorrt"`` or ``"tensorrt-rtx"``.
        flavour: Q/DQ flavour, ``"cpu"`` (uint8 activations) or ``"tensorrt"`` (symmetric int8).
        compute_capabilities: of the GPUs one artifact serves; empty for a CPU.
        precisions: verdict for each of `PRECISIONS`.
        dla_cores: deep-learning accelerator cores.
        dla: verdict on using them.
        tensorrt: version range, None where TensorRT is not used.
        jetpack: rows that apply, oldest first; empty off Jetson.
        power_modes: of a Jetson, else empty.
        boards: peaks of known boards of a discrete target, else empty.
        module_ids: device-tree part numbers of the Jetson module, without the vendor.
        module_family: word in the device tree's model, with `memory_gb` the fallback to find it.
        memory_gb: nominal memory of the Jetson module in GB.
        verified: what has been done for real: ``"run"``, ``"built"`` or ``"not run"``.
        verified_note: how, in a sentence.
        notes: what else a user should know.
    """

    name: str
    title: str
    engine: str
    flavour: str
    compute_capabilities: tuple[str, ...]
    precisions: dict[str, Verdict]
    dla_cores: int
    dla: Verdict
    tensorrt: TensorRTRange | None
    jetpack: tuple[JetPackRow, ...]
    power_modes: tuple[Peaks, ...]
    boards: tuple[Peaks, ...]
    module_ids: tuple[str, ...]
    module_family: str
    memory_gb: int | None
    verified: str
    verified_note: str
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """A dictionary for JSON."""
        return asdict(self)

    def jetpack_for(self, l4t: str) -> JetPackRow | None:
        """The JetPack row of the L4T release `l4t` (``"36.4.3"``), the newest if several."""
        rows = [row for row in self.jetpack if row.covers(l4t)]
        return rows[-1] if rows else None


@dataclass(frozen=True)
class Resolution:
    """A target, and what the user must be told about how its name was understood (or None)."""

    target: Target
    note: str | None


def parse_version(text: str) -> tuple[int, ...]:
    """``"10.3.0.30"`` as ``(10, 3, 0, 30)``.

    Raises:
        DataError: `text` is not numbers joined by dots.
    """
    parts = text.split(".")
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise DataError(f"version {text!r} is not numbers joined by dots, such as '10.3.0'")
    return tuple(int(part) for part in parts)


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
    path = directory / f"{name}.toml"
    return _target(name, Fields(str(path), load_toml(path)), directory)


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
    for target in orins:
        if module.part_numbers & set(target.module_ids):
            return Resolution(target, f"'{ORIN}' is {target.name}: this is a {module.model}")
    # The part number is unknown: the family, and the smallest memory that holds what Linux sees.
    sized = [
        (target.memory_gb, target)
        for target in orins
        if target.memory_gb is not None
        and target.module_family in module.model
        and module.memory_gib is not None
        and module.memory_gib <= target.memory_gb
    ]
    if not sized:
        raise UsageError(
            f"'{ORIN}': this Jetson calls itself {module.model!r}, which is no Orin module known "
            f"here; name the target: {', '.join(target.name for target in orins)}"
        )
    target = min(sized, key=lambda pair: pair[0])[1]
    note = f"'{ORIN}' is {target.name}, by the memory of this {module.model}"
    return Resolution(target, note)


def check_precision(target: Target, precision: str) -> Verdict:
    """What the target's data says about `precision`, one of `PRECISIONS`.

    Raises:
        UsageError: no such precision.
    """
    try:
        return target.precisions[precision]
    except KeyError:
        raise UsageError(
            f"no precision {precision!r}; expected one of {', '.join(PRECISIONS)}"
        ) from None


def check_dla(target: Target) -> Verdict:
    """What the target's data says about running on a DLA core."""
    return target.dla


def _verdict(fields: Fields) -> Verdict:
    verdict = Verdict(fields.choice("supported", ANSWERS), fields.text("reason", default=""))
    if verdict.supported != "yes" and not verdict.reason:
        raise fields.error("reason", f"is needed where supported is {verdict.supported!r}")
    fields.done()
    return verdict


def _version(fields: Fields, key: str) -> str:
    text = fields.text(key)
    try:
        parse_version(text)
    except DataError as e:
        raise fields.error(key, str(e)) from e
    return text


def _peaks(fields: Fields) -> Peaks:
    peaks = Peaks(
        name=fields.text("name"),
        int8_tops=fields.number("int8_tops"),
        fp16_tflops=fields.number("fp16_tflops"),
        bandwidth_gb_s=fields.optional_number("bandwidth_gb_s"),
        gpu_mhz=fields.optional_number("gpu_mhz"),
        sms=fields.optional_integer("sms"),
        power_w=fields.optional_number("power_w"),
        default=fields.boolean("default", default=False),
        measured=fields.boolean("measured"),
        source=fields.text("source"),
    )
    fields.done()
    return peaks


def _jetpack_rows(directory: Path, fields: Fields, wanted: tuple[str, ...]) -> list[JetPackRow]:
    path = directory / JETPACK_FILE
    table = Fields(str(path), load_toml(path))
    rows = []
    for row in table.tables("row"):
        optional_last = _version(row, "l4t_last") if row.has("l4t_last") else None
        rows.append(
            JetPackRow(
                name=row.text("name"),
                jetpack=row.text("jetpack"),
                l4t_first=_version(row, "l4t_first"),
                l4t_last=optional_last,
                tensorrt=_version(row, "tensorrt"),
                cuda=row.text("cuda"),
                ubuntu=row.text("ubuntu"),
                python=_version(row, "python"),
                verified=row.boolean("verified"),
            )
        )
        row.done()
    table.done()
    unknown = set(wanted) - {row.name for row in rows}
    if unknown:
        raise fields.error("jetpack", f"names rows that {path.name} lacks: {sorted(unknown)}")
    return [row for row in rows if row.name in wanted]


def _target(name: str, fields: Fields, directory: Path) -> Target:
    precisions = fields.table("precisions")
    verdicts = {precision: _verdict(precisions.table(precision)) for precision in PRECISIONS}
    precisions.done()
    dla_cores, dla = 0, Verdict("no", "this target has no DLA")
    if fields.has("dla"):
        table = fields.table("dla")
        dla_cores = table.integer("cores")
        dla = _verdict(table)
    tensorrt = None
    if fields.has("tensorrt"):
        table = fields.table("tensorrt")
        maximum = _version(table, "maximum") if table.has("maximum") else None
        tensorrt = TensorRTRange(
            _version(table, "minimum"), maximum, table.text("note", default="")
        )
        table.done()
    wanted = fields.texts("jetpack", default=())
    verified = fields.table("verified")
    target = Target(
        name=name,
        title=fields.text("title"),
        engine=fields.choice("engine", ENGINES),
        flavour=fields.choice("flavour", FLAVOURS),
        compute_capabilities=fields.texts("compute_capabilities"),
        precisions=verdicts,
        dla_cores=dla_cores,
        dla=dla,
        tensorrt=tensorrt,
        jetpack=tuple(_jetpack_rows(directory, fields, wanted)) if wanted else (),
        power_modes=tuple(_peaks(each) for each in fields.tables("power_mode")),
        boards=tuple(_peaks(each) for each in fields.tables("board")),
        module_ids=fields.texts("module_ids", default=()),
        module_family=fields.text("module_family", default=""),
        memory_gb=fields.optional_integer("memory_gb"),
        verified=verified.choice("status", VERIFIED),
        verified_note=verified.text("note"),
        notes=fields.texts("notes", default=()),
    )
    verified.done()
    if (tensorrt is None) == (target.engine == "tensorrt"):
        raise fields.error("tensorrt", "must be there exactly where engine is 'tensorrt'")
    if (target.engine == "openvino") == bool(target.compute_capabilities):
        raise fields.error("compute_capabilities", "must be empty for a CPU, and only there")
    fields.done()
    return target
