"""Training on small faces whose pose is their colour: it learns, resumes, and splits exactly."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from click.testing import CliRunner
from msgspec.structs import replace as changed_spec

from edgehp import pose
from edgehp.crop import Box, Preprocessing, crop_face
from edgehp.datasets.base import Dataset, Skips
from edgehp.datasets.stores import Photo
from edgehp.errors import DataError, UsageError
from edgehp.networks.description import load_description
from edgehp.networks.spec import EHPNET, KD_RESNET
from edgehp.training.labelling import Teacher, ensemble_label
from tests.faces import write_faces

torch = pytest.importorskip("torch", reason="training needs torch")

from edgehp.cli.training import distill as distill_command  # noqa: E402
from edgehp.cli.training import student_spec  # noqa: E402
from edgehp.cli.training import train as train_command  # noqa: E402
from edgehp.networks.checkpoint import load_module, load_weights, save_weights  # noqa: E402
from edgehp.networks.modules import KDResNet, expectation  # noqa: E402
from edgehp.training.augment import Augmentation, cut, draw, photometric  # noqa: E402
from edgehp.training.data import BatchPlan, Faces, batches, split, with_labels  # noqa: E402
from edgehp.training.distributed import Place  # noqa: E402
from edgehp.training.loop import TrainConfig, Trainer, normalize  # noqa: E402
from edgehp.training.objectives import (  # noqa: E402
    OnlineDistillation,
    RvcObjective,
    distillation_kl,
    gaussian_labels,
    rvc_loss,
)
from edgehp.training.runs import Run, train_base, train_final  # noqa: E402

SPEC = changed_spec(KD_RESNET, name="tiny", preprocessing=Preprocessing(size=32, box_rule="square"))
# Colours carry the pose here, so nothing may change them.
STILL = Augmentation(
    rotate=0, flip=0, light=0, grey=0, dark=0, blur=0, sharpen=0, coarse=0, noise=0, occlude=0
)
CONFIG = TrainConfig(
    epochs=2, batch=8, precision="fp32", average=0.5, augmentation=STILL, workers=1, warm_up=0.2
)


@pytest.fixture
def faces(tmp_path: Path) -> Dataset:
    return write_faces(tmp_path / "faces", 40, np.random.default_rng(7))


def items_of(data: Dataset):
    return with_labels(data.samples)


def faces_of(data: Dataset) -> Faces:
    return Faces.load(items_of(data), SPEC.preprocessing, torch.device("cpu"))


def states_equal(a: dict, b: dict, tolerance: float) -> None:
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_allclose(a[key], b[key], atol=tolerance, err_msg=key)


class Tiny(torch.nn.Module):
    """A student whose step and checkpoint cost next to nothing, with batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[torch.nn.Module] = []
        for cin, cout in ((3, 8), (8, 16)):
            layers += [torch.nn.Conv2d(cin, cout, 3, 2, bias=False), torch.nn.BatchNorm2d(cout)]
            layers.append(torch.nn.ReLU())
        self.body = torch.nn.Sequential(*layers)
        self.head = torch.nn.Linear(16, 3 * SPEC.bins.count)

    def forward(self, images):
        return self.head(self.body(images).mean((2, 3))).view(len(images), 3, -1)


def trainer(
    data: Dataset, folder: Path, config: TrainConfig = CONFIG, place: Place | None = None
) -> Trainer:
    torch.manual_seed(0)
    objective = RvcObjective(SPEC.bins)
    return Trainer(Tiny(), SPEC, objective, faces_of(data), config, folder, place)


def test_photos_are_left_out_where_they_are_damaged_and_held_back_by_name(
    faces: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    items = items_of(faces)
    bad = replace(
        items[3], sample=replace(items[3].sample, source=Photo(Path("here"), data=b"no photo"))
    )
    items[3] = bad
    device = torch.device("cpu")
    with pytest.raises(DataError, match="here: expected a JPEG"):
        Faces.load(items, SPEC.preprocessing, device)
    found = Faces.load(items, SPEC.preprocessing, device, skips=Skips(skip_bad=True))
    whole = faces_of(faces)
    assert len(found) == len(whole) - 1 and torch.equal(found.crops[3], whole.crops[4])
    assert np.array_equal(found.matrices[3], whole.matrices[4])
    assert f"skipped {bad.sample.name}" in caplog.text
    # What is held back depends on names alone.
    held = {i.sample.name for i in split(items, 0.3)[1]}
    assert 0 < len(held) < 40
    assert {i.sample.name for i in split(items[::-1][:30], 0.3)[1]} <= held


def test_a_killed_run_ends_where_an_undisturbed_one_does(tmp_path: Path, faces: Dataset) -> None:
    always = replace(CONFIG, epochs=1, checkpoint_seconds=0)
    whole = trainer(faces, tmp_path / "whole", replace(CONFIG, epochs=1))
    for _ in whole.run():
        pass
    first = trainer(faces, tmp_path / "cut", always)
    run = first.run()
    for _ in range(3):
        next(run)  # killed after the third step's checkpoint was due
    run.close()
    second = trainer(faces, tmp_path / "cut", always)
    assert (second.epoch, second.batch_number, second.step) == (0, 2, 2)
    for _ in second.run():
        pass
    states_equal(second.averaged_state(), whole.averaged_state(), 1e-6)


def test_what_cannot_go_on_is_refused(tmp_path: Path, faces: Dataset) -> None:
    first = trainer(faces, tmp_path / "run")
    run = first.run()
    next(run)
    first.save()
    with pytest.raises(DataError, match="other settings"):
        trainer(faces, tmp_path / "run", replace(CONFIG, learning_rate=1e-4))
    path = tmp_path / "run" / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match="damaged checkpoint"):
        trainer(faces, tmp_path / "run")
    # A run that diverged ends with a remedy.
    with torch.no_grad():
        first.network.head.bias.fill_(float("nan"))
    with pytest.raises(DataError, match=r"diverged at step 2.*\nhint: lower --learning-rate"):
        next(run)


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


# What each process does: two steps, or all of them with a harm on the way.
PROCESS = """
import os, signal, sys
from pathlib import Path
import numpy as np, torch
torch.set_num_threads(1)
from edgehp.datasets.faces import read_faces
from edgehp.errors import EdgehpError
from edgehp.training.distributed import distributed
from tests.test_training import CONFIG, replace, trainer
folder, what = Path(sys.argv[1]), sys.argv[2]
config = CONFIG if what == "two steps" else replace(CONFIG, epochs=1, checkpoint_seconds=0)
with distributed("cpu") as place:
    run = folder / f"run{place.world}"
    t = trainer(read_faces(folder / "faces"), run, config, place)
    (folder / f"began-{place.rank}").open("a").write(f"{t.step} ")
    if what == "two steps":
        steps = t.run()
        next(steps)
        state = {k: p.grad.numpy().copy() for k, p in t.network.named_parameters()}
        state |= {k: b.numpy().copy() for k, b in t.network.named_buffers()}
        next(steps)
        steps.close()
        weights = t.network.head.weight.detach().numpy()
        np.savez(folder / f"state{place.world}-{place.rank}.npz", **state, weights=weights)
        sys.exit()
    if what == "nan" and place.rank == 1:
        with torch.no_grad():
            t.network.head.bias.fill_(float("nan"))
    try:
        for p in t.run():
            if what == "kill" and place.rank == 1 and p.step == 3 and t.step == 3:
                if not (folder / "killed").exists():
                    (folder / "killed").touch()
                    os.kill(os.getpid(), signal.SIGKILL)
    except EdgehpError as e:
        sys.exit(f"edgehp: error: {e}")
    (folder / f"ended-{place.rank}").write_text(str(t.step))
"""


def script(repo: Path, folder: Path, what: str, *command: str):
    """Do `what` on the folder, by Python alone or by torchrun."""
    (folder / "run.py").write_text(PROCESS)
    environment = {**os.environ, "PYTHONPATH": str(repo), "OMP_NUM_THREADS": "1"}
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(variable, None)
    words = [sys.executable, *command, str(folder / "run.py"), str(folder), what]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(tmp_path: Path, faces: Dataset, repo: Path) -> None:
    for command in ((), TORCHRUN):
        done = script(repo, tmp_path, "two steps", *command)
        assert done.returncode == 0, done.stderr[-3000:]
    one = dict(np.load(tmp_path / "state1-0.npz"))
    first, second = (dict(np.load(tmp_path / f"state2-{r}.npz")) for r in (0, 1))
    states_equal(first, second, 0)
    # The first step's gradients and batch statistics; later steps differ by what AdamW, which
    # takes the sign of a gradient near zero, makes of the last bits.
    for key in one.keys() - {"weights"}:
        size = max(float(np.linalg.norm(one[key])), 1e-3)
        assert np.linalg.norm(one[key] - first[key]) < 2e-3 * size, key


@pytest.mark.slow
@pytest.mark.parametrize("harm", ["nan", "kill"])
def test_a_process_that_is_hurt_hangs_no_other(
    tmp_path: Path, faces: Dataset, repo: Path, harm: str
) -> None:
    restarts = f"--max-restarts={int(harm == 'kill')}"
    done = script(repo, tmp_path, harm, *TORCHRUN, restarts)
    if harm == "nan":
        assert done.returncode != 0
        assert done.stderr.count("edgehp: error: ") == 1, done.stderr
        assert re.search(r"diverged at step 1: the loss here is [\d.]+, nan\n", done.stderr)
        return
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        first, again = map(int, (tmp_path / f"began-{rank}").read_text().split())
        assert first == 0 and again >= 2
        assert (tmp_path / f"ended-{rank}").read_text() == "5"


@pytest.mark.slow
def test_the_network_learns_signs_and_order(tmp_path: Path, faces: Dataset) -> None:
    config = replace(CONFIG, epochs=30, learning_rate=3e-3, average=0.8)
    result = train_final(Run(items_of(faces), SPEC, config, tmp_path / "run", held_back=0.15))
    assert result.history[-1]["mean"] < 15  # a constant answer has 30 degrees
    module, spec = load_module(result.weights)
    sample = faces.samples[0]
    crop = torch.from_numpy(sample.load()[8:40, 8:40].copy())[None].permute(0, 3, 1, 2).float()
    angles, _ = expectation(module(normalize(crop, spec)), spec.bins)
    found = pose.to_aflw2000(angles.detach().numpy()[0], spec.convention)
    np.testing.assert_allclose(found, sample.angles, atol=25)
    assert json.loads((tmp_path / "run" / "history.json").read_text())[-1]["epoch"] == 30


def test_a_base_network_becomes_a_teacher(tmp_path: Path, faces: Dataset) -> None:
    items = items_of(faces)
    result = train_base(
        Run(items, SPEC, replace(CONFIG, epochs=1), tmp_path / "base", held_back=0.15)
    )
    assert result.weights.name == "base.toml"
    # What the exported teacher says of all photos is what the trainer's validation measured.
    teacher = Teacher(load_description(result.weights))
    _, held = split(items, 0.15)
    errors = [
        pose.angle_errors(ensemble_label(i.sample, [teacher]).angles, i.sample.angles) for i in held
    ]
    assert np.mean(errors) == pytest.approx(result.history[-1]["mean"], abs=0.2)


def test_a_teacher_of_other_crops_is_refused() -> None:
    stretched = changed_spec(SPEC.preprocessing, box_rule="stretch")
    student = changed_spec(SPEC, preprocessing=stretched)
    with pytest.raises(DataError, match="box_rule 'square', the student by 'stretch'"):
        OnlineDistillation([(torch.nn.Identity(), SPEC)], student)


def test_kl_is_zero_at_the_mean_of_the_teachers_and_positive_elsewhere() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(4, 3, 198), torch.randn(4, 3, 198)
    mean = (a.softmax(-1) + b.softmax(-1)) / 2
    zero = torch.zeros(4)
    torch.testing.assert_close(distillation_kl(mean.log(), mean), zero, atol=1e-5, rtol=0)
    assert torch.all(distillation_kl(a, mean) > 0.01)
    # Two teachers that answer the same, through the objective itself.
    same = [(torch.nn.Identity(), SPEC)] * 2
    objective = OnlineDistillation(same, SPEC)
    loss = objective.loss(torch.nn.Identity(), a, a[..., 0])
    torch.testing.assert_close(loss, zero, atol=1e-4, rtol=0)


def test_teachers_of_other_bins_and_signs_keep_their_mean() -> None:
    student = changed_spec(EHPNET, preprocessing=SPEC.preprocessing)
    logits = gaussian_labels(torch.tensor([[-30.3, 10.0, 41.7]]), SPEC.bins, 3.0).log()
    objective = OnlineDistillation([(torch.nn.Identity(), SPEC)], student)
    labels = objective.soft_labels(logits.clamp_min(-60))
    assert labels.sum(-1).tolist()[0] == pytest.approx([1, 1, 1], abs=1e-5)
    mean = labels @ torch.from_numpy(student.bins.values).float()
    # The teacher's convention counts pitch the other way round.
    assert mean.tolist()[0] == pytest.approx([30.3, 10.0, 41.7], abs=0.05)


class _Seen(torch.nn.Module):
    """A teacher that remembers its input."""

    def forward(self, images):
        self.images = images
        return torch.zeros(len(images), 3, 198)


def test_teachers_see_the_crop_as_they_were_trained() -> None:
    crops = torch.randint(0, 256, (2, 3, 32, 32)).float()
    wanted = changed_spec(
        SPEC,
        preprocessing=changed_spec(
            SPEC.preprocessing, colour="BGR", mean=(127.5,) * 3, std=(128.0,) * 3
        ),
    )
    teacher = _Seen()
    OnlineDistillation([(teacher, wanted)], SPEC).soft_labels(normalize(crops, SPEC))
    torch.testing.assert_close(teacher.images, normalize(crops, wanted), atol=1e-5, rtol=1e-4)
    smaller = changed_spec(SPEC, preprocessing=changed_spec(SPEC.preprocessing, size=16))
    OnlineDistillation([(teacher, smaller)], SPEC).soft_labels(normalize(crops, SPEC))
    assert teacher.images.shape == (2, 3, 16, 16)


def test_soft_labels_have_their_mean_at_the_angle() -> None:
    angles = torch.tensor([[-30.3, 0.0, 41.7]])
    labels = gaussian_labels(angles, SPEC.bins, 2.0)
    mean, spread = expectation(labels.clamp_min(1e-30).log(), SPEC.bins)
    torch.testing.assert_close(mean, angles, atol=1e-2, rtol=0)
    torch.testing.assert_close(spread, torch.full((1, 3), 2.0), atol=1e-2, rtol=0)
    right = labels.clamp_min(1e-30).log()
    wrong = gaussian_labels(angles.flip(1), SPEC.bins, 2.0).clamp_min(1e-30).log()
    assert rvc_loss(right, angles, SPEC.bins, 2.0, 0.3) < rvc_loss(
        wrong, angles, SPEC.bins, 2.0, 0.3
    )


def test_a_turned_photo_turns_its_label(rng: np.random.Generator) -> None:
    # A bright line from the centre up marks the crown of a head with roll 0.
    photo = torch.zeros(101, 101, 3, dtype=torch.uint8)
    photo[5:50, 49:52] = 255
    turning = replace(STILL, rotate=40, rotate_probability=1.0, scale=(1, 1), shift=0)
    draws = draw(10, turning, rng)
    crops = cut(photo.repeat(10, 1, 1, 1), draws, 101, 1.0)
    labels = draws.turned(np.repeat(np.eye(3)[None], 10, 0))
    for crop, matrix in zip(crops, labels, strict=True):
        y, x = np.nonzero(crop[0].numpy() > 128)
        clockwise = np.degrees(np.arctan2(x.mean() - 50, 50 - y.mean()))
        assert pose.euler_from_matrix(matrix) == pytest.approx([0, 0, clockwise], abs=1.5)
    assert np.ptp(draws.angle) > 5


def test_a_mirrored_photo_mirrors_its_label(rng: np.random.Generator) -> None:
    photo = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
    photo[:, :, :16] = 200
    draws = draw(1, replace(STILL, flip=1.0, scale=(1, 1), shift=0), rng)
    assert cut(photo, draws, 32, 1.0)[0, 0, 0, -1] == 200
    mirrored = draws.turned(pose.matrix_from_euler([[10, 20, 30]]))
    assert pose.euler_from_matrix(mirrored[0]) == pytest.approx([10, -20, -30])


def test_an_unmoved_cut_is_the_deployed_crop(rng: np.random.Generator) -> None:
    # The margin, the shrinking by samples and the centre: the network must see in training what
    # `crop_face` gives it in the car.
    photo = cv2.resize(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8), (180, 180))
    box = Box(50, 40, 140, 130)
    still = draw(1, replace(STILL, scale=(1, 1), shift=0, flip=0), rng)
    for size in (64, 45):
        wide = Preprocessing(size=126, box_scale=1.4)
        kept = torch.from_numpy(crop_face(photo, box, wide))[None]
        found = cut(kept, still, size, 1.4)[0].permute(1, 2, 0).numpy()
        expected = crop_face(photo, box, Preprocessing(size=size)).astype(float)
        assert np.abs(found - expected).mean() < 1.5


def test_every_effect_gives_a_picture_and_grey_ones_are_grey(rng: np.random.Generator) -> None:
    crops = torch.from_numpy(rng.integers(0, 256, (8, 3, 64, 64)).astype(np.float32))
    generator = torch.Generator().manual_seed(0)
    for name in ("light", "grey", "dark", "blur", "sharpen", "coarse", "noise", "occlude"):
        changed = photometric(crops, draw(8, replace(STILL, **{name: 1.0}), rng), generator)
        assert changed.shape == crops.shape
        assert changed.min() >= 0
        assert changed.max() <= 255
        assert torch.equal(changed, changed.round())
        assert (changed != crops).flatten(1).any(1).all(), name
    assert torch.equal(photometric(crops, draw(8, STILL, rng), generator), crops)
    grey = photometric(crops, draw(8, replace(STILL, grey=1.0), rng), generator)
    assert torch.equal(grey[:, 0], grey[:, 2])


def test_batches_repeat_from_their_seed_and_share_out_over_processes(faces: Dataset) -> None:
    loaded = faces_of(faces)
    plan = BatchPlan(32, replace(Augmentation(), coarse=0), seed=1, epoch=2, batch=8)
    whole = list(batches(loaded, plan))
    again = list(batches(loaded, plan, start=3))
    assert len(whole) == 5
    assert torch.equal(whole[3].images, again[0].images)
    other = next(iter(batches(loaded, replace(plan, epoch=3))))
    assert not torch.equal(other.images, whole[0].images)
    # The grain of noise and patches is each process's own.
    plan = replace(plan, augmentation=replace(plan.augmentation, noise=0, dark=0, occlude=0))
    whole = list(batches(loaded, plan))
    shares = [next(iter(batches(loaded, replace(plan, rank=r, world=2)))) for r in (0, 1)]
    torch.testing.assert_close(torch.cat([s.images for s in shares]), whole[0].images)
    assert torch.equal(torch.cat([s.angles for s in shares]), whole[0].angles)
    assert {s.total_weight for s in shares} == {whole[0].total_weight}


def test_a_start_of_another_head_gives_its_backbone(tmp_path: Path) -> None:
    from edgehp.networks.modules import EHPNet
    from edgehp.training.runs import begin_with

    source, student = KDResNet(SPEC), EHPNet()
    save_weights(tmp_path / "start.safetensors", source.state_dict(), SPEC)
    begin_with(student, student.spec, tmp_path / "start.safetensors")
    found = student.backbone.layer3[0].conv1.weight
    torch.testing.assert_close(
        found, source.encoder_net.model.layer3[0].conv1.weight, atol=1e-3, rtol=1e-3
    )


def test_commands_train_distil_and_refuse(tmp_path: Path, faces: Dataset) -> None:
    folder = str(tmp_path / "faces")
    small = ["--input-size", "32", "--epochs", "1", "--batch", "8", "--held-back", "0.15"]
    run = ["--output", str(tmp_path / "run"), "--precision", "fp32", "--device", "cpu"]
    result = CliRunner().invoke(train_command, [folder, "--network", "kd-resnet18", *small, *run])
    assert result.exit_code == 0, result.output
    weights = tmp_path / "run" / "kd-resnet18-32.safetensors"
    assert weights.is_file()
    assert "epoch   1  MAE" in result.stdout
    nothing = CliRunner().invoke(distill_command, [folder, *small, *run])
    assert isinstance(nothing.exception, UsageError)
    start = ["--teacher", str(weights), "--start", str(weights)]
    out = ["--output", str(tmp_path / "student"), "--precision", "bf16", "--device", "cpu"]
    distilled = CliRunner().invoke(distill_command, [folder, *start, *small, *out])
    assert distilled.exit_code == 0, distilled.output
    _, spec = load_weights(tmp_path / "student" / "kd-resnet18-32.safetensors")
    assert spec == student_spec("kd-resnet18", 32)
