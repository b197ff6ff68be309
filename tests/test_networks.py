"""Checkpoints: what loads, and what is refused with which words."""

from __future__ import annotations

import math
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from safetensors import numpy as safetensors

from edgehp.errors import CheckpointError, EnvironmentalError, UsageError
from edgehp.networks import bundled
from edgehp.networks.bundled import resolve_network
from edgehp.networks.checkpoint import (
    build_module,
    load_module,
    load_start,
    load_weights,
    save_weights,
)
from edgehp.networks.graph import build_graph, graph_bytes
from edgehp.networks.layout import Weights, expected_shapes, infer_spec
from edgehp.networks.spec import EHPNET, KD_RESNET, NetworkSpec

Network = tuple[Weights, NetworkSpec]


def some_weights(spec: NetworkSpec) -> Weights:
    rng = np.random.default_rng(0)
    shapes = expected_shapes(spec)
    return {k: rng.uniform(0.1, 1, shape).astype(np.float32) for k, shape in shapes.items()}


@pytest.fixture(scope="module")
def small() -> Network:
    return some_weights(KD_RESNET), KD_RESNET


def equal(a: Weights, b: Weights) -> bool:
    return list(a) == list(b) and all(np.array_equal(a[k], b[k]) for k in a)


def save_torch(path: Path, content: Any) -> None:
    torch = pytest.importorskip("torch")

    def tensors(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: tensors(v) for k, v in value.items()}
        return torch.from_numpy(value) if isinstance(value, np.ndarray) else value

    torch.save(tensors(content), path)


def test_parameter_counts() -> None:
    pytest.importorskip("torch")
    for spec, count in ((KD_RESNET, 11_481_234), (EHPNET, 11_266_170)):
        module = build_module(spec)
        assert sum(p.numel() for p in module.parameters()) == count
        names = [k for k in module.state_dict() if not k.endswith("num_batches_tracked")]
        assert names == list(expected_shapes(spec))


def test_safetensors_round_trip(small: Network, tmp_path: Path) -> None:
    weights, spec = small
    path = tmp_path / "net.safetensors"
    save_weights(path, weights, spec, np.float32)
    assert equal(load_weights(path)[0], weights)
    save_weights(path, weights, spec)
    first = path.read_bytes()
    assert len(first) < 25_000_000
    loaded, found = load_weights(path)
    assert found == spec
    assert all(np.allclose(loaded[k], v, atol=1e-3, rtol=1e-3) for k, v in weights.items())
    assert all(v.dtype == np.float32 for v in loaded.values())
    save_weights(path, weights, spec)
    assert path.read_bytes() == first
    assert [p.name for p in tmp_path.iterdir()] == ["net.safetensors"]


def test_bfloat16_is_read(small: Network, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    path = tmp_path / "net.safetensors"
    save_file({k: torch.from_numpy(v).bfloat16() for k, v in small[0].items()}, path)
    loaded, spec = load_weights(path)
    assert spec == KD_RESNET
    assert all(np.allclose(loaded[k], v, rtol=1 / 128) for k, v in small[0].items())


# As published, and as trainers write them, under all names that files have.
@pytest.mark.parametrize(
    ("suffix", "layout"),
    [
        (".pth", lambda s: s | {"encoder_net.model.bn1.num_batches_tracked": np.array(7)}),
        (".pt", lambda s: {"state_dict": s, "epoch": 3}),
        (".pth.tar", lambda s: {"model": s, "epoch": 3}),
        (".pkl", lambda s: {f"module.{k}": v for k, v in s.items()}),
        (".pth", lambda s: {f"_orig_mod.{k}": v for k, v in s.items()}),
        (".pth", lambda s: {f"module._orig_mod.{k}": v for k, v in s.items()}),
        (".ckpt", lambda s: {"state_dict": {f"model.{k}": v for k, v in s.items()}, "epoch": 3}),
        (".tar", lambda s: {"model_state_dict": s, "optimizer_state_dict": {"state": {}}}),
        (
            ".pth",
            lambda s: {"n_averaged": np.array(7)} | {f"module.{k}": v for k, v in s.items()},
        ),
        (".pth", lambda s: {"ema": {"module": s}}),
    ],
    ids=[
        *("bare", "state_dict", "6drepnet-model", "module", "compiled", "ddp-compiled"),
        *("lightning", "6drepnet", "swa", "nested"),
    ],
)
def test_checkpoints_load_unchanged(
    small: Network, tmp_path: Path, suffix: str, layout: Any
) -> None:
    path = tmp_path / f"net{suffix}"
    save_torch(path, layout(small[0]))
    weights, spec = load_weights(path)
    assert spec == KD_RESNET
    assert equal(weights, small[0])


def test_a_checkpoint_becomes_a_module(small: Network, tmp_path: Path) -> None:
    save_torch(tmp_path / "net.pth", small[0])
    module, _ = load_module(tmp_path / "net.pth")
    assert not module.training
    state = module.state_dict()
    assert all(np.array_equal(state[k].numpy(), v) for k, v in small[0].items())


def test_the_flat_layout_of_ehpnet_loads(tmp_path: Path) -> None:
    weights = some_weights(EHPNET)
    flat = {
        re.sub(r"^heads\.", "fc_", k).replace("neck.0.", "linear.").removeprefix("backbone."): v
        for k, v in weights.items()
    }
    assert "fc_yaw.weight" in flat and "linear.bias" in flat and "conv1.weight" in flat
    save_torch(tmp_path / "net.pth", flat)
    loaded, found = load_weights(tmp_path / "net.pth")
    assert found == EHPNET
    assert equal(loaded, weights)


# The parameters are torchvision's without the classifier.
@pytest.mark.parametrize(
    ("depth", "parameters"),
    [
        (34, 21_797_672 - 513_000),
        (50, 25_557_032 - 2_049_000),
        (101, 44_549_160 - 2_049_000),
        (152, 60_192_808 - 2_049_000),
    ],
)
def test_the_depth_is_told_by_the_names(depth: int, parameters: int) -> None:
    shapes = expected_shapes(replace(KD_RESNET, depth=depth))
    spec = infer_spec(shapes, "x")
    assert (spec.depth, spec.name) == (depth, f"kd-resnet{depth}")
    learnt = [k for k in shapes if k.startswith("encoder_net.") and ".running_" not in k]
    assert sum(math.prod(shapes[k]) for k in learnt) == parameters


def test_a_wrong_file_names_the_keys(small: Network, tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    weights = dict(small[0])
    del weights["head_net.yaw.bias"], weights["encoder_net.model.layer2.0.conv1.weight"]
    weights["head_net.gaze.weight"] = np.zeros((2, 2), np.float32)
    weights["encoder_net.model.conv1.weight"] = np.zeros((64, 1, 7, 7), np.float32)
    save_torch(path, weights)
    with pytest.raises(CheckpointError) as e:
        load_weights(path)
    for part in (
        "2 missing (encoder_net.model.layer2.0.conv1.weight, head_net.yaw.bias)",
        "1 unexpected (head_net.gaze.weight)",
        "encoder_net.model.conv1.weight is [64, 1, 7, 7], expected [64, 3, 7, 7]",
    ):
        assert part in str(e.value)
    save_torch(path, {"fc.weight": np.zeros((3, 3), np.float32)})
    with pytest.raises(CheckpointError, match=r"no network known here.*fc\.weight"):
        load_weights(path)
    save_torch(path, small[0])
    with pytest.raises(CheckpointError, match=r"does not fit ehpnet.*missing.*unexpected"):
        load_weights(path, EHPNET)


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("evil-was-here"),))


def test_a_pickle_that_runs_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "net.pth"
    torch.save({"state_dict": _Evil()}, path)
    with pytest.raises(CheckpointError, match="could run code"):
        load_weights(path)
    path.write_bytes(pickle.dumps(_Evil()))
    with pytest.raises(CheckpointError, match=r"net\.pth"):
        load_weights(path)
    assert not Path("evil-was-here").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"\n<!DOCTYPE html><html></html>", "web page"),
        (b"\x00" * 100, "safetensors file|not a file that torch.save wrote"),
        (b"PK\x03\x04" + b"\x00" * 100, "torch checkpoint|truncated or corrupted"),
        (b"\xff" * 8 + b"{}", "safetensors file|not a file that torch.save wrote"),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_files_that_are_no_checkpoints(
    tmp_path: Path, suffix: str, content: bytes, message: str
) -> None:
    pytest.importorskip("torch")
    path = tmp_path / f"net{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_weights(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_truncated_files_are_refused(small: Network, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"net{suffix}"
    if suffix == ".pth":
        save_torch(path, small[0])
    else:
        save_weights(path, *small)
    data = path.read_bytes()
    for size in (20, 1000, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match="truncated"):
            load_weights(path)


def test_missing_file_suffix_and_torch(
    small: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_weights(tmp_path / "none.safetensors")
    with pytest.raises(UsageError, match=r"\.h5"):
        load_weights(tmp_path / "net.h5")
    save_torch(tmp_path / "net.pth", small[0])
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(EnvironmentalError, match="pip install torch"):
        load_weights(tmp_path / "net.pth")


def test_values_that_are_not_finite_are_refused(small: Network, tmp_path: Path) -> None:
    weights, spec = small
    name = "head_net.roll.weight"
    bad = {**weights, name: np.full_like(weights[name], np.nan)}
    with pytest.raises(CheckpointError, match=r"1 tensors hold NaN.*head_net\.roll\.weight"):
        save_weights(tmp_path / "net.safetensors", bad, spec)
    save_torch(tmp_path / "net.pth", bad)
    with pytest.raises(CheckpointError, match="NaN"):
        load_weights(tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match="float16 cannot hold"):
        save_weights(tmp_path / "net.safetensors", {**weights, name: weights[name] * 0 + 1e6}, spec)
    assert not list(tmp_path.glob("*.safetensors*"))


def test_networks_are_found_by_name_and_path(
    small: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundled, "PACKAGE", tmp_path / "edgehp")
    monkeypatch.setattr(bundled, "_MODULE", "edgehp_networks_elsewhere")
    with pytest.raises(
        EnvironmentalError, match=r"(?s)not installed.*hint: pip install .*networks"
    ):
        resolve_network("kd-resnet18")
    package = tmp_path / "edgehp_networks_elsewhere"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    save_weights(package / "kd-resnet18.safetensors", *small)
    named = resolve_network("kd-resnet18")
    by_path = resolve_network(str(package / "kd-resnet18.safetensors"))
    assert named.spec == by_path.spec == small[1]
    assert named.weights is not None
    (tmp_path / "net.onnx").write_bytes(graph_bytes(build_graph(named.weights, named.spec)))
    from_graph = resolve_network(str(tmp_path / "net.onnx"))
    assert from_graph.spec == small[1] and from_graph.weights is None
    assert graph_bytes(from_graph.graph()) == graph_bytes(build_graph(named.weights, named.spec))
    with pytest.raises(UsageError, match=r"did you mean 'kd-resnet18'"):
        resolve_network("kd-resnet81")


def test_averaged_weights_are_taken_aloud_and_raw_ones_by_key(
    small: Network, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.pth"
    averaged, spec = small
    raw = {k: v + 1 for k, v in averaged.items()}
    save_torch(path, {"state_dict": raw, "state_dict_ema": averaged})
    assert equal(load_weights(path, spec)[0], averaged)
    assert "state_dict_ema is taken" in caplog.text and "--weights state_dict takes" in caplog.text
    assert equal(load_weights(path, spec, key="state_dict")[0], raw)
    chosen = resolve_network(f"{path}#state_dict").weights
    assert chosen is not None and equal(chosen, raw)
    with pytest.raises(CheckpointError, match="has no weights 'swa'"):
        load_weights(path, spec, key="swa")


def test_a_pointer_in_place_of_a_graph_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(CheckpointError, match="Git LFS pointer"):
        resolve_network(str(tmp_path / "a.onnx"))


def test_torchscript_and_zips_of_checkpoints_are_named(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    script = tmp_path / "a.pt"
    with zipfile.ZipFile(script, "w") as archive:
        for name in ("a/data.pkl", "a/constants.pkl", "a/code/b.py"):
            archive.writestr(name, b"x")
    with pytest.raises(CheckpointError, match="TorchScript"):
        load_weights(script)
    with zipfile.ZipFile(tmp_path / "b.pth", "w") as archive:
        archive.writestr("net.pth", b"x")
    with pytest.raises(CheckpointError, match=r"a zip that holds net\.pth"):
        load_weights(tmp_path / "b.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("spec", [KD_RESNET, EHPNET], ids=["kd-resnet", "ehpnet"])
def test_a_training_may_start_from_torchvisions_resnet(
    tmp_path: Path, spec: NetworkSpec, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / f"resnet18{suffix}"
    torch = pytest.importorskip("torch")
    prefix = "encoder_net.model."
    state = {
        k.removeprefix(prefix): np.full(shape, 0.5, np.float32)
        for k, shape in expected_shapes(KD_RESNET).items()
        if k.startswith(prefix)
    }
    state |= {"fc.weight": np.zeros((1000, 512), np.float32), "fc.bias": np.zeros(1000, "f4")}
    if suffix == ".pth":
        save_torch(path, state)
    else:
        safetensors.save_file(state, path)
    weights, backbone_alone = load_start(path, spec)
    module = build_module(spec)
    missing = module.load_state_dict(
        {k: torch.from_numpy(v) for k, v in weights.items()}, strict=False
    ).missing_keys
    assert backbone_alone and "the heads begin at random" in caplog.text
    assert {k for k in missing if "num_batches" not in k} == {
        k for k, _ in module.named_parameters() if "head" in k or "neck" in k
    }
    with pytest.raises(CheckpointError, match="ResNet34"):
        load_start(path, replace(KD_RESNET, depth=34))
