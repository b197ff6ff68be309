"""``edgehp describe``: the beginning of the description of any ONNX pose network."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgehp.cli._command import DATASETS, PATH, output_option, photo_depth_option, subcommand
from edgehp.cli._output import say
from edgehp.errors import DataError, UsageError
from edgehp.networks import FILL_IN

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edgehp.datasets.base import Dataset
    from edgehp.networks.describe import Network, Trial, Trials
    from edgehp.networks.description import InputSpec, OutputSpec

logger = logging.getLogger(__name__)

_PHOTOS = 64
_SHOWN = 5
_FILL_IN = f"  {FILL_IN}"
_SEAL = "# SHA-256 of the lines above, as 'edgehp describe' wrote them: "


@subcommand(
    "describe",
    "edgehp describe net.onnx",
    "edgehp describe net.onnx --photos AFLW2000 --boxes AFLW2000.json --output net.toml",
    "edgehp describe net.onnx --dataset biwi --data-root BIWI --output net.toml",
)
@click.argument("network", type=PATH)
@click.option("--input-size", type=click.IntRange(16, 1024), help="Where the file does not say it.")
@click.option("--dataset", type=click.Choice(DATASETS), help="Of the photos. Default: aflw2000.")
@click.option(
    "--photos",
    "--data-root",
    "photos",
    type=PATH,
    help=f"A data set of known poses; up to {_PHOTOS} photos of it are used, spread evenly.",
)
@click.option("--boxes", help="A box list (JSON or CSV) or 'landmarks'. Default: as validate.")
@photo_depth_option
@output_option("Write the description here. Default: print it.")
def command(
    network: Path,
    input_size: int | None,
    dataset: str | None,
    photos: Path | None,
    boxes: str | None,
    photo_depth: int | None,
    output: Path | None,
) -> None:
    """Print what can be read off NETWORK, an ONNX file, as a description for 'edgehp build'.

    With --photos the network is run on faces of known pose by the usual colours and
    normalisations, and its outputs are read by all orders, signs and conventions; the best is
    written into the description, which names the five best with their errors.
    """
    from edgehp.files import write_output
    from edgehp.networks.describe import read_off, try_all
    from edgehp.progress import step

    if photos is None and (dataset is not None or boxes is not None):
        raise UsageError("--dataset and --boxes say what the photos are; --photos where they are")
    if output is not None and output.exists() and not _is_unchanged(output):
        raise UsageError(
            f"{output} exists and is not as 'edgehp describe' wrote it: it may hold corrections\n"
            "hint: give another file with --output, or remove this one"
        )
    with step("open"):
        found = read_off(network, input_size)
    trials = None
    if photos is not None:
        from edgehp.datasets import open_dataset

        data = open_dataset(dataset or "aflw2000", photos, boxes=boxes).with_depth(photo_depth)
        crops, truth = _faces(data, found)
        trials = try_all(found, network, crops, truth)
    text = _toml(found, trials)
    if output is None:
        click.echo(text, nl=False)
    else:
        write_output(output, _sealed(text))
        say("\n".join(line[2:] for line in _best(trials)) if trials else "not tried on photos")
        click.echo(f"written to {output}")
    if trials is not None and not trials.clear:
        logger.warning("%s", _unclear(trials))


def _sealed(text: str) -> str:
    """A description with a last line that tells whether anybody changed it since."""
    return f"{text}{_SEAL}{hashlib.sha256(text.encode()).hexdigest()}\n"


def _is_unchanged(path: Path) -> bool:
    # A pipe would wait for a writer.
    if not path.is_file():
        return False
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    return text == _sealed(text.rpartition(_SEAL)[0])


def _faces(
    data: Dataset, network: Network
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float64]]:
    """Crops uint8 [N, S, S, 3] and angles [N, 3] of photos that are spread evenly."""
    import numpy as np

    from edgehp.crop import crop_face
    from edgehp.datasets.base import prefetch, spaced
    from edgehp.progress import step

    labelled = [(s, s.angles) for s in data.samples if s.angles is not None]
    if len(labelled) < 8:
        raise DataError(f"{data.name}: {len(labelled)} photos of known pose, expected 8 or more")
    some = [labelled[i] for i in spaced(len(labelled), _PHOTOS)]
    spec = network.description.input.preprocessing
    crops = []
    with step("photos", len(some), "photos") as going:
        for crop in prefetch(some, lambda s: crop_face(s[0].load(), s[0].box, spec)):
            crops.append(crop)
            going.advance()
    return np.stack(crops), np.stack([angles for _, angles in some])


def _unclear(trials: Trials) -> str:
    return (
        f"the best ({trials.found[0].error:.1f} degrees) is not clearly better than one constant "
        f"answer for all ({trials.constant:.1f}): the network, its boxes or its output are not as "
        "tried"
    )


def _best(trials: Trials) -> list[str]:
    """Comments that say which ways fit best."""
    lines = [f"# MAE in degrees on {trials.photos} photos, best first:"]
    lines += [f"#   {_way(t)}" for t in trials.found[:_SHOWN]]
    if trials.other_decoding is not None:
        lines += ["# The best that reads the output in another way:"]
        lines += [f"#   {_way(trials.other_decoding)}"]
    return [*lines, f"# One constant answer for all has {trials.constant:.2f}."]


def _way(trial: Trial) -> str:
    p, output = trial.input, trial.output
    scale = f"mean {p.mean[0]:g} std {p.std[0]:g}" + (" .." if len(set(p.mean)) > 1 else "")
    words = [f"{trial.error:6.2f}  {p.colour} {scale}: {' + '.join(output.names)}", output.kind]
    if output.kind in ("euler", "bins", "quaternion"):
        words.append("-".join(output.order))
    if output.kind in ("euler", "bins"):
        words.append(output.convention)
    if output.kind == "bins":
        words.append(f"{output.first:g}..{output.last:g}")
    words.append("signs " + " ".join(f"{s:+d}" for s in output.signs or ()))
    return " ".join([*words, *(["transposed"] if output.transposed else [])])


def _toml(network: Network, trials: Trials | None) -> str:
    """The description; it can be read as it is, however little of it is right."""
    found = network.description
    p, output = found.input, found.output
    lines = [f"# Outputs of the network: {_comment(network.shown_outputs)}"]
    if trials is not None:
        p, output = trials.found[0].input, trials.found[0].output
        lines += map(_comment, _best(trials))
        if not trials.clear:
            lines.append(f"# Beware: {_unclear(trials)}.")
    elif len(network.outputs) > 1:
        others = ", ".join(f"{' + '.join(o.names)} ({o.kind})" for o in network.outputs[1:])
        lines.append(f"# Could be the pose too: {_comment(others)}")
    return "\n".join(
        [
            *lines,
            f"name = {_text(found.name)}",
            f"files = {_text(list(found.files))}",
            f'licence = ""{_FILL_IN}: of the weights',
            "",
            *_input_lines(network, p, trials is not None),
            "",
            *_output_lines(output, trials is not None),
            "",
        ]
    )


def _input_lines(network: Network, p: InputSpec, tried: bool) -> list[str]:
    mark = "  # the best of those tried" if tried else _FILL_IN
    colour = "" if p.colour == "GREY" else mark if tried else f"{mark}: RGB or BGR"
    size = "" if network.fixed_size else f"{_FILL_IN}: the file takes any"
    return [
        "[input]",
        f"name = {_text(p.name)}",
        f"size = {p.size}{size}",
        f"layout = {_text(p.layout)}",
        f"colour = {_text(p.colour)}{colour}",
        f"mean = {_text(list(p.mean))}{mark}, in 0..255",
        f"std = {_text(list(p.std))}{mark}, in 0..255",
        f"resize = {_text(p.resize)}",
        f"box_rule = {_text(p.box_rule)}{_FILL_IN}: square or stretch",
        f"box_scale = {p.box_scale:.1f}{_FILL_IN}: how much of the head it was trained with",
    ]


def _output_lines(output: OutputSpec, tried: bool) -> list[str]:
    mark = "" if tried else f"{_FILL_IN}, or try with --photos"
    names = f"name = {_text(output.names[0])}"
    if len(output.names) > 1:
        names = f"names = {_text(list(output.names))}"
    lines = ["[output]", f"kind = {_text(output.kind)}{mark}", names]
    if output.kind in ("euler", "bins", "quaternion"):
        lines.append(f"order = {_text(list(output.order))}{mark}")
    if output.kind in ("euler", "bins"):
        lines.append(f"convention = {_text(output.convention)}{mark}")
    lines.append(f"signs = {_text(list(output.signs or ()))}{mark}")
    if output.kind == "bins":
        lines += [f"first = {output.first:.1f}{mark}", f"last = {output.last:.1f}{mark}"]
    if output.transposed is not None:
        lines.append(f"transposed = {_text(output.transposed)}{mark}")
    return lines


def _text(value: object) -> str:
    """A value as TOML, whose texts, numbers and lists are JSON's but for the delete character."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _comment(text: str) -> str:
    """A line that nothing in a file's names can end."""
    return "".join(c if c.isprintable() else "?" for c in text)
