"""``edgehp train`` and ``edgehp distill``: the base network, and the student."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edgehp._installed import install_extra
from edgehp.cli._command import (
    json_option,
    note,
    open_photos,
    output_option,
    photo_depth_option,
    skip_bad_option,
    subcommand,
)
from edgehp.cli._output import print_json
from edgehp.errors import EnvironmentalError, UsageError
from edgehp.progress import step

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edgehp.networks.spec import NetworkSpec
    from edgehp.training.data import TrainingItem
    from edgehp.training.loop import Progress
    from edgehp.training.runs import Run, RunResult

F = TypeVar("F", bound=Callable[..., Any])

# Options of the last release.
_RENAMED = {"--out": "--output", "--size": "--input-size", "--workers": "--crop-threads"}

_OPTIONS = [
    click.option("--dataset", help="A named data set in place of folders and zips."),
    click.option(
        "--labels",
        multiple=True,
        type=click.Path(exists=True, file_okay=False, path_type=Path),
        help="Label folder of 'edgehp label'; may be given several times. "
        "Without it the data set's own labels are used.",
    ),
    click.option(
        "--extra",
        multiple=True,
        type=click.Path(exists=True, path_type=Path),
        help="Further photos with labels of their own, such as rendered heads.",
    ),
    click.option(
        "--start",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="Weights to begin with, of any input size; torchvision's ResNet gives the backbone.",
    ),
    output_option("The run folder.", required=True),
    click.option("--input-size", default=112, help="Input side in pixels."),
    click.option("--start-size", default=0, help="Input size of the first epoch, growing."),
    click.option("--epochs", default=10, help="Times that each photo is seen."),
    click.option(
        "--batch",
        default=128,
        help="Crops that go through the network at once, of all processes together.",
    ),
    click.option("--learning-rate", default=2e-3, help="At its highest."),
    click.option(
        "--precision",
        type=click.Choice(["bf16", "fp16", "fp32"]),
        default="bf16",
        help="Of the training, not of the artifact.",
    ),
    click.option(
        "--augmentation",
        type=click.Choice(["strong", "gentle", "sharp"]),
        default="strong",
        help="gentle: for the last epochs and fine-tunes; sharp: where the input is larger than "
        "the photos.",
    ),
    click.option("--flatten", default=0.5, help="0: |yaw| as it comes; 1: uniform."),
    click.option(
        "--device",
        type=click.Choice(["auto", "cpu", "cuda"]),
        default="auto",
        help="auto: a GPU where there is one.",
    ),
    click.option("--seed", default=0, help="Of everything random."),
    click.option(
        "--crop-threads",
        type=click.IntRange(1),
        default=2,
        help="Threads that read photos and crop faces.",
    ),
    click.option("--held-back", default=0.04, help="Share for validation."),
    photo_depth_option,
    skip_bad_option,
    click.option(
        "--licence",
        default="",
        show_default=False,
        help="Of the weights: kept in the file, said by build.",
    ),
    json_option,
]


def _training_options(function: F) -> F:
    """Add the shared options to a command."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def _require_torch() -> None:
    """Refuse with a remedy where torch is not installed.

    Raises:
        EnvironmentalError: no torch.
    """
    try:
        import torch  # noqa: F401
    except ImportError as e:
        raise EnvironmentalError(f"training needs torch: {install_extra('train')}") from e


def _device(name: str) -> str:
    """``"cuda"`` or ``"cpu"``; ``"auto"`` takes a GPU where there is one.

    Raises:
        EnvironmentalError: cuda was asked for and is not there.
    """
    import torch

    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        raise EnvironmentalError("--device cuda: torch finds no CUDA GPU here; use --device cpu")
    return "cuda" if found and name != "cpu" else "cpu"


def _run_of(photos: tuple[Path, ...], network: str, output: Path, options: dict[str, Any]) -> Run:
    """The run that the shared options describe."""
    from edgehp.training.augment import AUGMENTATIONS
    from edgehp.training.loop import TrainConfig
    from edgehp.training.runs import Run

    if not 0 < options["held_back"] < 0.5:
        raise UsageError(f"--held-back is {options['held_back']}, expected 0 to 0.5")
    names = ("epochs", "batch", "learning_rate", "precision", "seed", "start_size")
    settings = TrainConfig(
        **{n: options[n] for n in names},
        workers=options["crop_threads"],
        flatten=options["flatten"],
        augmentation=AUGMENTATIONS[options["augmentation"]],
    )
    found, extra = _items(photos, options)
    return Run(
        found,
        student_spec(network, options["input_size"], options["licence"]),
        settings,
        output,
        extra=extra,
        start=options["start"],
        device=_device(options["device"]),
        held_back=options["held_back"],
        skip_bad=options["skip_bad"],
    )


def _items(
    photos: tuple[Path, ...], options: dict[str, Any]
) -> tuple[list[TrainingItem], list[TrainingItem]]:
    """(items with labels, extra items) of the command line."""
    from edgehp.training.data import with_labels
    from edgehp.training.labelling import read_labels

    data = open_photos(photos, options["dataset"], options["skip_bad"], options["photo_depth"])
    labels = read_labels(options["labels"]) if options["labels"] else None
    found = with_labels(data.samples, labels)
    if left := len(data.samples) - len(found):
        note(f"{left} photos have no label or one beyond 99 degrees: left out")
    if labels and (unknown := len(labels.keys() - {s.name for s in data.samples})):
        note(f"{unknown} labels are of photos that are not here")
    extra: list[TrainingItem] = []
    if options["extra"]:
        extra = with_labels(
            open_photos(options["extra"], None, options["skip_bad"], options["photo_depth"]).samples
        )
    return found, extra


def student_spec(network: str, size: int, licence: str = "") -> NetworkSpec:
    """The specification of a network to train: ``kd-resnet18`` ... ``kd-resnet152`` or ``ehpnet``.

    edgehp's own networks keep the face's aspect ratio (box rule ``square``), unlike the published
    KD-ResNet, which stretches the box.
    """
    from msgspec.structs import replace as changed

    from edgehp.networks.spec import EHPNET, KD_RESNET

    if network == "ehpnet":
        preprocessing = changed(EHPNET.preprocessing, size=size)
        return changed(EHPNET, preprocessing=preprocessing, licence=licence)
    depth = network.removeprefix("kd-resnet")
    if not depth.isdecimal():
        raise UsageError(f"network {network!r} is neither ehpnet nor kd-resnet18 ... 152")
    suffix = "" if size == KD_RESNET.preprocessing.size else f"-{size}"
    return changed(
        KD_RESNET,
        name=f"kd-resnet{depth}{suffix}",
        depth=int(depth),
        preprocessing=changed(KD_RESNET.preprocessing, size=size, box_rule="square"),
        licence=licence,
    )


@contextmanager
def _progress_bar(epochs: int) -> Iterator[Callable[[Progress], None]]:
    """Show step, loss and speed of a training."""
    with step("train", unit="steps") as going:

        def report(p: Progress) -> None:
            text = f"epoch {p.epoch + 1}/{epochs}  loss {p.loss:.3f}"
            going.update(p.step, p.steps, f"{text}  {p.images_per_second:.0f} images/s")

        yield report


def _print_result(result: RunResult, as_json: bool) -> None:
    """The figures of every epoch, and where the weights are."""
    if as_json:
        print_json(
            {
                "weights": result.weights,
                "trained": result.trained,
                "held_back": result.held_back,
                "epochs": list(result.history),
            }
        )
        return
    for row in result.history:
        pitch, yaw, roll = row["mae"]
        click.echo(
            f"epoch {row['epoch']:>3}  MAE {row['mean']:.3f}  pitch {pitch:.2f}  yaw {yaw:.2f}  "
            f"roll {roll:.2f}  geodesic {row['geodesic']:.2f}"
        )
    click.echo(f"{result.trained} photos trained on, {result.held_back} held back (figures above)")
    click.echo(f"weights: {result.weights}")


@subcommand("train", "edgehp train faces.zip --labels labels --output runs/base", renamed=_RENAMED)
@click.argument("photos", nargs=-1, type=click.Path(exists=True, path_type=Path))
@click.option(
    "--network",
    default="base",
    help="base (one regression and four RvC heads), kd-resnet18 ... kd-resnet152, or ehpnet.",
)
@click.option("--depth", default=18, help="ResNet depth of the base network.")
@_training_options
def train(photos: tuple[Path, ...], network: str, depth: int, output: Path, **options: Any) -> None:
    """Train on PHOTOS (folders or zips of faces) with labels; an interrupted run is resumed.

    Start it with torchrun to use several GPUs or machines. The base network is the teacher of the
    next stage: 'edgehp label --teacher RUN/base.toml --grid 5', then 'edgehp distill'.
    """
    _require_torch()
    from edgehp.training.runs import train_base, train_final

    base = network == "base"
    run = _run_of(photos, f"kd-resnet{depth}" if base else network, output, options)
    with _progress_bar(run.config.epochs) as report:
        run = replace(run, report=report)
        result = train_base(run) if base else train_final(run)
    _print_result(result, options["as_json"])


@subcommand(
    "distill",
    "edgehp distill faces.zip --labels labels-base --output runs/student",
    "edgehp distill faces.zip --teacher a.safetensors --teacher b.safetensors --output runs/kd",
    renamed=_RENAMED,
)
@click.argument("photos", nargs=-1, type=click.Path(exists=True, path_type=Path))
@click.option("--network", default="kd-resnet18", help="kd-resnet18 ... 152, or ehpnet.")
@click.option(
    "--teacher",
    "teachers",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A teacher checkpoint of the student's bins: learn the mean of the teachers' soft labels.",
)
@_training_options
def distill(
    photos: tuple[Path, ...],
    network: str,
    teachers: tuple[Path, ...],
    output: Path,
    **options: Any,
) -> None:
    """Distil on PHOTOS (folders or zips of faces); an interrupted run is resumed.

    With --labels the student learns an ensemble of offsets ('edgehp label'); with --teacher, once
    or more, it learns the mean of the teachers' soft labels on the same augmented crops.
    """
    _require_torch()
    if not teachers and not options["labels"]:
        raise UsageError("distil from what? Give --labels of 'edgehp label', or --teacher")
    from edgehp.training.runs import train_final

    run = _run_of(photos, network, output, options)
    with _progress_bar(run.config.epochs) as report:
        result = train_final(replace(run, report=report), teachers)
    _print_result(result, options["as_json"])
