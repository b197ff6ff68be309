"""Targets: the shipped files, strict reading, what they say about precisions, and the alias."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from edgehp.cli.build import command as build
from edgehp.cli.main import cli
from edgehp.device import find_jetson
from edgehp.errors import DataError, UsageError
from edgehp.files import resource_dir
from edgehp.targets import (
    PRECISIONS,
    Target,
    check_precision,
    list_targets,
    load_target,
    resolve_target,
)

EXPECTED = {
    "orin-agx-64gb", "orin-agx-32gb", "orin-nx-16gb", "orin-nx-8gb", "orin-nano-8gb",
    "orin-nano-4gb", "thor", "v100", "rtx-20", "rtx-30", "rtx-40", "rtx-50", "rtx", "t4", "l4",
    "l40s", "a10", "a100", "h100", "cpu",
}  # fmt: skip


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A copy of the shipped files that a test may spoil."""
    return Path(shutil.copytree(resource_dir("targets"), tmp_path / "targets"))


def every() -> list[Target]:
    return [load_target(name) for name in list_targets()]


def jetson(root: Path, compatible: str, model: str, kib: int) -> Path:
    tree = root / "proc/device-tree"
    tree.mkdir(parents=True)
    (tree / "compatible").write_bytes(compatible.encode())
    (tree / "model").write_bytes(model.encode() + b"\0")
    (root / "proc/meminfo").write_text(f"MemTotal:       {kib} kB\n")
    return root


def test_all_of_the_mission_are_there() -> None:
    assert set(list_targets()) == EXPECTED
    assert {target.name for target in every()} == EXPECTED


def test_orin_peaks_follow_the_formula() -> None:
    # Dense INT8 = SMs x 4096 x clock, stated in whole TOPS.
    modes = [m for t in every() for m in t.power_modes if m.sms and m.gpu_mhz]
    assert len(modes) > 15
    for mode in modes:
        assert mode.sms is not None and mode.gpu_mhz is not None
        tops = mode.sms * 4096 * mode.gpu_mhz * 1e6 / 1e12
        assert abs(tops - mode.int8_tops) <= 0.7, (mode, tops)
        assert mode.fp16_tflops == mode.int8_tops / 2


def test_no_figure_claims_to_be_measured() -> None:
    for target in every():
        for row in (*target.power_modes, *target.boards):
            assert not row.measured
            assert row.source
        if target.boards:
            assert all("not verified" in board.source for board in target.boards)


def test_only_cpu_and_rtx_have_been_touched() -> None:
    verified = {target.name: target.verified for target in every()}
    assert {name for name, how in verified.items() if how == "run"} == {"cpu"}
    assert {name for name, how in verified.items() if how == "built"} == {
        "rtx", "rtx-20", "rtx-30", "rtx-40", "rtx-50",
    }  # fmt: skip


def test_precisions() -> None:
    for name, precision, answer in (
        ("v100", "int8", "warn"),
        ("v100", "fp16", "yes"),
        ("rtx-20", "fp32", "no"),
    ):
        verdict = check_precision(load_target(name), precision)
        assert verdict.supported == answer
        assert verdict.reason or answer == "yes"


def test_no_target_promises_what_the_command_line_cannot_ask_for() -> None:
    asked = next(p for p in build.params if p.name == "precision")
    assert isinstance(asked.type, click.Choice)
    assert set(PRECISIONS) == set(asked.type.choices)


def test_tensorrt_range_of_v100_ends_with_10_4() -> None:
    versions = load_target("v100").tensorrt
    assert versions is not None
    assert versions.contains("8.6.1") and versions.contains("10.4.0.26")
    assert versions.contains("10.3.0.post1") and not versions.contains("10.14.1.48.post1")
    assert not versions.contains("10.5.0") and not versions.contains("8.5.2")
    with pytest.raises(DataError, match="dots"):
        versions.contains("ten")


def test_jetpack_by_l4t() -> None:
    agx, nx = load_target("orin-agx-64gb"), load_target("orin-nx-16gb")
    row = nx.jetpack_for("36.4.3")
    assert row is not None and row.tensorrt == "10.3.0.30" and row.usable
    newest = agx.jetpack_for("39.2.2")
    assert newest is not None and newest.tensorrt == "10.16" and not newest.verified
    assert nx.jetpack_for("39.2.2") is None  # not for this module
    old = nx.jetpack_for("35.4.1")
    assert old is not None and not old.usable
    assert nx.jetpack_for("38.2") is None
    thor = load_target("thor").jetpack_for("38.4")
    assert thor is not None and thor.tensorrt == "10.13.3.9"


def test_typo_suggests_the_near_name() -> None:
    with pytest.raises(UsageError, match="did you mean 'orin-nx-16gb'"):
        load_target("orin-nx-16g")
    # Hostile names are unknown as well.
    for name in ("zzzz", "../pyproject", "", "cpu\0"):
        with pytest.raises(UsageError, match="no target"):
            load_target(name)
    with pytest.raises(UsageError, match="known: a10, a100, cpu"):
        load_target("zzzz")
    with pytest.raises(UsageError):
        load_target("_jetpack")


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ('engine = "tensorrt"', 'engine = "tensorflow"', "engine"),
        ('title = "', 'tilte = "', "tilte"),
        ("int8_tops = 63.0", "int8_tops = -1", "boards[0].int8_tops"),
        ('minimum = "8.6"', 'minimum = "8.x"', "tensorrt.minimum"),
        (
            'supported = "warn", reason = ',
            'supported = "warn", raeson = ',
            "precisions.int8.raeson",
        ),
        ('compute_capabilities = ["7.0"]', "compute_capabilities = []", "compute_capabilities"),
        ('compute_capabilities = ["7.0"]', "compute_capabilities = [7]", "compute_capabilities[0]"),
    ],
)
def test_malformed_file_names_file_and_key(directory: Path, old: str, new: str, key: str) -> None:
    path = directory / "v100.toml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(DataError) as caught:
        load_target("v100", directory)
    assert str(path) in str(caught.value)
    assert f"'{key}'" in str(caught.value)


def test_unknown_jetpack_row(directory: Path) -> None:
    path = directory / "orin-nx-8gb.toml"
    path.write_text(path.read_text().replace('"7.2"', '"9.9"'))
    with pytest.raises(DataError, match=r"jetpack.*9\.9"):
        load_target("orin-nx-8gb", directory)


def test_orin_off_jetson_is_said_aloud(tmp_path: Path) -> None:
    found = resolve_target("orin", root=tmp_path)
    assert found.target.name == "orin-agx-64gb"
    assert found.note is not None and "not a Jetson" in found.note
    assert "the module found there" in found.note
    others = {name for name in EXPECTED if name.startswith("orin-")} - {"orin-agx-64gb"}
    assert len(others) == 5 and all(name in found.note for name in others)
    assert resolve_target("cpu", root=tmp_path).note is None


# Each module, on boards that name it in one way or another.
@pytest.mark.parametrize(
    ("part", "name", "style"),
    [
        ("p3701-0005", "orin-agx-64gb", "nvidia,p3737-0000+{}\0"),
        ("p3701-0000", "orin-agx-64gb", "nvidia,p3737-0000+{}\0nvidia,{}\0"),
        ("p3701-0004", "orin-agx-32gb", "acme,box\0nvidia,{}\0"),
        ("p3767-0000", "orin-nx-16gb", "nvidia,p3509-0000+{}-super\0"),
        ("p3767-0001", "orin-nx-8gb", "nvidia,p3509-0000+{}\0"),
        ("p3767-0003", "orin-nano-8gb", "nvidia,p3768-0000+{}\0nvidia,{}\0"),
        ("p3767-0005", "orin-nano-8gb", "nvidia,p3768-0000+{}-super\0nvidia,{}\0"),
        ("p3767-0004", "orin-nano-4gb", "acme,box\0nvidia,{}\0"),
    ],
)
def test_orin_on_jetson_is_the_module(tmp_path: Path, part: str, name: str, style: str) -> None:
    compatible = style.format(part, part) + "nvidia,tegra234\0"
    root = jetson(tmp_path, compatible, "some carrier", 8_000_000)
    assert resolve_target("orin", root=root).target.name == name
    found = find_jetson(root)
    assert found is not None and found.description == f"some carrier ({part})"


@pytest.mark.parametrize(
    ("model", "kib", "name"),
    [
        ("NVIDIA Jetson Orin NX Engineering Reference Developer Kit", 15_800_000, "orin-nx-16gb"),
        ("NVIDIA Jetson Orin NX Engineering Reference Developer Kit", 7_600_000, "orin-nx-8gb"),
        ("NVIDIA Jetson Orin Nano Developer Kit", 7_600_000, "orin-nano-8gb"),
        ("NVIDIA Jetson AGX Orin Developer Kit", 64_000_000, "orin-agx-64gb"),
    ],
)
def test_unknown_part_is_found_by_memory(tmp_path: Path, model: str, kib: int, name: str) -> None:
    root = jetson(tmp_path, "acme,board\0nvidia,tegra234\0", model, kib)
    found = resolve_target("orin", root=root)
    assert found.target.name == name
    assert found.note is not None and "memory" in found.note


@pytest.mark.parametrize(
    ("compatible", "model", "kib", "says"),
    [
        ("nvidia,p2972-0000\0nvidia,tegra194\0", "Jetson-AGX", 32_000_000, "'Jetson-AGX'"),
        # The industrial module has the memory of an AGX Orin, not its clocks.
        (
            "nvidia,p3737-0000+p3701-0008\0nvidia,p3701-0008\0nvidia,tegra234\0",
            "NVIDIA Jetson AGX Orin Developer Kit",
            64_000_000,
            "p3701-0008",
        ),
        ("nvidia,p3834-0008\0nvidia,tegra264\0", "Thor", 128_000_000, "name the target: thor"),
    ],
)
def test_jetson_that_is_no_orin_is_refused(
    tmp_path: Path, compatible: str, model: str, kib: int, says: str
) -> None:
    root = jetson(tmp_path, compatible, model, kib)
    with pytest.raises(UsageError, match=says):
        resolve_target("orin", root=root)


def command(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["targets", *arguments], catch_exceptions=False)


def test_commands_list_and_show() -> None:
    listed = command("--json")
    assert {row["name"] for row in json.loads(listed.stdout)} == EXPECTED
    shown = json.loads(command("show", "v100", "--json").stdout)
    assert shown["precisions"]["int8"]["supported"] == "warn"
    text = command("show", "orin-nx-8gb").stdout
    assert "MAXN_SUPER" in text and "10.3.0.30" in text
    # Who asks for the family learns how it is understood, in the list and with the one shown.
    for said in (command().stdout, command("show", "orin").stderr):
        assert "'orin'" in said
