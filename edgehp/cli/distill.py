"""``edgehp distill``: the student, from labels or teachers; or its INT8 version, from itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from edgehp.cli import _training
from edgehp.errors import UsageError

if TYPE_CHECKING:
    from edgehp.training.data import TrainingItem
    from edgehp.training.runs import RunResult

__all__ = ["command"]

# What a quantisation-aware run takes where the user says nothing: it begins near its end. The rate
# is in rounding steps of the weights.
_AWARE: dict[str, Any] = {
    "epochs": 4,
    "batch": 64,
    "learning_rate": 0.005,
    "augmentation": "gentle",
    "flatten": 0.3,
}
_AWARE_ONLY = ("target", "flavour", "label_weight", "calibration_method")


@click.command("distill", short_help="Distil teachers into the student network.")
@click.argument("photos", nargs=-1, type=click.Path(exists=True, path_type=Path))
@click.option(
    "--network", default="kd-resnet18", show_default=True, help="kd-resnet18 ... 152, or ehpnet."
)
@click.option(
    "--teacher",
    "teachers",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A teacher checkpoint of the student's bins: learn the mean of the teachers' soft labels.",
)
@click.option(
    "--start",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Weights to begin with, of any input size.",
)
@click.option(
    "--quantization-aware",
    "aware",
    is_flag=True,
    help="Train the INT8 version of --start, which teaches it; 'edgehp build' takes the result.",
)
@click.option("--target", help="Quantization-aware: what the INT8 version is for.")
@click.option(
    "--flavour",
    type=click.Choice(["cpu", "tensorrt"]),
    help="Quantization-aware: the Q/DQ flavour, in place of --target.",
)
@click.option(
    "--label-weight",
    type=click.FloatRange(0),
    default=0.0,
    help="Quantization-aware: weight of the labels beside the float network. Default: 0.",
)
@click.option(
    "--limit",
    type=click.IntRange(0),
    default=0,
    help="Photos at most, evenly spread: of a short fine-tune, or of an epoch of a "
    "quantization-aware run. Default: all.",
)
@click.option(
    "--calibration-method",
    type=click.Choice(["auto", "minmax", "percentile", "entropy", "mse"]),
    default="auto",
    show_default=True,
    help="Quantization-aware: of the post-training quantisation that the run begins with.",
)
@_training.training_options
def command(
    photos: tuple[Path, ...],
    network: str,
    teachers: tuple[Path, ...],
    start: Path | None,
    out: Path,
    aware: bool,
    target: str | None,
    flavour: str | None,
    **options: Any,
) -> None:
    """Distil on PHOTOS (folders or zips of faces); an interrupted run is resumed.

    With --labels the student learns an ensemble of offsets ('edgehp label'); with --teacher, once
    or more, it learns the mean of the teachers' soft labels on the same augmented crops.

    With --quantization-aware the network of --start teaches its own INT8 version. Labels are not
    needed: they only add the errors against them to the figures, unless --label-weight is given.
    """
    _training.require_torch()
    context = click.get_current_context()
    if aware:
        given = {k for k in context.params if _given(context, k)}
        result = _aware(photos, teachers, start, out, _flavour(target, flavour), given, options)
        _training.print_result(result)
        return
    if only := [k for k in _AWARE_ONLY if _given(context, k)]:
        name = only[0].replace("_", "-")
        raise UsageError(f"--{name} is for --quantization-aware: add that, or leave --{name} out")
    if not teachers and not options["labels"]:
        raise UsageError("distil from what? Give --labels of 'edgehp label', or --teacher")
    from edgehp.training.runs import train_final

    settings = _training.config(options)
    found, extra = _training.items(photos, options)
    if 0 < options["limit"] < len(found):
        count = options["limit"]
        found = [found[i * len(found) // count] for i in range(count)]
    with _training.progress_bar(settings.epochs) as report:
        result = train_final(
            found,
            _training.student_spec(network, options["size"], options["licence"]),
            settings,
            out,
            extra=extra,
            start=start,
            teachers=teachers,
            device=_training.pick_device(options["device"]),
            held_back=options["held_back"],
            report=report,
        )
    _training.print_result(result)


def _given(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) is ParameterSource.COMMANDLINE


def _flavour(target: str | None, flavour: str | None) -> str:
    from edgehp.targets import resolve_target

    if (target is None) == (flavour is None):
        raise UsageError(
            "--quantization-aware trains for one Q/DQ flavour: give --target, or --flavour cpu or "
            "tensorrt, and not both"
        )
    return flavour or resolve_target(str(target)).target.flavour


def _aware(
    photos: tuple[Path, ...],
    teachers: tuple[Path, ...],
    start: Path | None,
    out: Path,
    flavour: str,
    given: set[str],
    options: dict[str, Any],
) -> RunResult:
    from edgehp.training.quantization_aware import train_quantised

    if start is None:
        raise UsageError(
            "--quantization-aware trains the INT8 version of a float network: give its checkpoint "
            "with --start"
        )
    if teachers:
        raise UsageError("the float network of --start is the teacher here: leave --teacher out")
    if fixed := [f"--{n}" for n in ("network", "size", "start_size", "licence") if n in given]:
        raise UsageError(f"the network is that of --start: leave {fixed[0].replace('_', '-')} out")
    options = {**options, **{k: v for k, v in _AWARE.items() if k not in given}}
    settings = _training.config(options)
    found, extra, labelled = _items(photos, options)
    with _training.progress_bar(settings.epochs) as report:
        return train_quantised(
            found,
            settings,
            out,
            start=start,
            flavour=flavour,
            labelled=labelled,
            label_weight=options["label_weight"],
            extra=extra,
            limit=options["limit"],
            method=options["calibration_method"],
            device=_training.pick_device(options["device"]),
            held_back=options["held_back"],
            report=report,
        )


def _items(
    photos: tuple[Path, ...], options: dict[str, Any]
) -> tuple[list[TrainingItem], list[TrainingItem], bool]:
    """Photos, further ones, and whether they have labels: they need none."""
    from edgehp.cli._photos import open_photos
    from edgehp.training.quantization_aware import unlabelled_items

    if not options["labels"]:
        data = open_photos(photos, options["dataset"], options["skip_bad"])
        if not data.labelled:
            if options["label_weight"] or options["extra"]:
                raise UsageError(
                    "--label-weight and --extra need photos with labels: give --labels"
                )
            for skip in data.skipped:
                click.echo(f"skipped {skip.name}: {skip.reason}", err=True)
            return unlabelled_items(data.samples), [], False
    return *_training.items(photos, options), True
