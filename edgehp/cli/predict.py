"""``edgehp predict``: head poses of photos, folders, videos and cameras."""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgehp.cli._command import (
    PATH,
    json_option,
    note,
    output_option,
    photo_depth_option,
    subcommand,
    threads_option,
    weights_option,
    with_weights,
)
from edgehp.cli._output import styled
from edgehp.errors import DataError, UsageError

if TYPE_CHECKING:
    from collections import Counter

    from edgehp.artifact.open import OpenedNetwork
    from edgehp.runtime.predict import FaceFinder
    from edgehp.runtime.sources import Frame, Source

logger = logging.getLogger(__name__)


@subcommand(
    "predict",
    "edgehp predict *.jpg",
    "edgehp predict drive.mp4 --output drawn/ --json > poses.jsonl",
    "edgehp predict camera:0 --artifact dist/kd-resnet18-112-cpu-int8",
    renamed={"--save": "--output"},
)
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option(
    "--artifact",
    type=PATH,
    help="Default: the newest one in dist/, else the bundled network in floating point.",
)
@click.option("--network", help="A float network (bundled name or file) in place of an artifact.")
@weights_option
@click.option(
    "--boxes",
    help="Face boxes, used as they are: x_min,y_min,x_max,y_max for all, or a file: CSV with these "
    'columns and image, or {"file": [{"bbox": [x_min, y_min, x_max, y_max]}]}.',
)
@output_option("Draw the poses: a folder; or a photo for a photo, a video for a video or camera.")
@threads_option
@photo_depth_option
@click.option("--limit", type=click.IntRange(1), help="Stop after this many frames.")
@json_option
def command(
    sources: tuple[str, ...],
    artifact: Path | None,
    network: str | None,
    weights: str | None,
    boxes: str | None,
    output: Path | None,
    photo_depth: int | None,
    threads: int | None,
    limit: int | None,
    as_json: bool,
) -> None:
    """Predict the head poses in photos, folders, video files or a camera (camera:0).

    On a terminal a line a face, with pitch, yaw, roll in degrees (+pitch nose up, +yaw nose to the
    image's left, +roll clockwise). Piped, or with --json, a JSON object a face and line, with its
    box, angles, spread, confidence and state: ok, out_of_range, low_confidence; a frame without a
    face has the state no_face, a photo that cannot be read the state unreadable.

    In drawn pictures red points to the image's right for a frontal face, green down, blue where the
    nose points. Box white: ok; orange: out of range; grey: low confidence.
    """
    from collections import Counter

    from edgehp.runtime.predict import predict
    from edgehp.runtime.records import DEFAULT_BINS, StateRules, json_line
    from edgehp.runtime.sources import parse_source

    sources, artifact = _without_artifact(sources, artifact)
    network = with_weights(network, weights)
    if artifact is not None and network is not None:
        raise UsageError("give --artifact or --network, not both")
    # Box lists refer to the pixels as they are stored.
    found = [parse_source(source, upright=boxes is None, bits=photo_depth) for source in sources]
    plain = as_json or not sys.stdout.isatty()
    counts: Counter[str] = Counter()
    with ExitStack() as stack:
        savers = _savers(output, found, stack)
        faces = _faces(boxes, found)
        opened = stack.enter_context(_opened(artifact, network, threads))
        logger.info("predicting with %s", opened.name)
        rules = StateRules(opened.bins or DEFAULT_BINS)
        frames = itertools.chain.from_iterable(_frames(s, len(found) > 1) for s in found)
        results = predict(
            itertools.islice(frames, limit), opened.engine, opened.preprocessing, faces, rules
        )
        for result in results:
            for record in result.records():
                # A line at a time, also into a pipe: a camera's reader waits for it.
                if plain:
                    click.echo(json_line(record), nl=False)
                else:
                    click.echo(_line(record))
            counts.update(result.states)
            if (saver := savers.get(result.frame.source)) is not None:
                saver.add(result)
    _summarize(counts)
    if output is not None:
        note(f"drawn in {output}")
    if counts["unreadable"]:
        raise DataError(
            f"{counts['unreadable']} photo(s) could not be used; the lines with the state "
            "unreadable say why"
        )


def _frames(source: Source, several: bool) -> Iterator[Frame]:
    """The frames of a source; one of several that cannot be read must not cost the others."""
    from edgehp.runtime.sources import Frame

    try:
        yield from source.frames()
    except DataError as e:
        if not several:
            raise
        yield Frame(source.name, Path(source.name).name, problem=str(e))


def _without_artifact(
    sources: tuple[str, ...], artifact: Path | None
) -> tuple[tuple[str, ...], Path | None]:
    """The sources, and the artifact where it is the second word, as in the last release."""
    if len(sources) == 2 and artifact is None and (Path(sources[1]) / "manifest.json").is_file():
        note("'predict SOURCE ARTIFACT' is 'predict SOURCE --artifact ARTIFACT' now")
        return sources[:1], Path(sources[1])
    return sources, artifact


def _opened(artifact: Path | None, network: str | None, threads: int | None) -> OpenedNetwork:
    from edgehp.artifact import newest_artifact
    from edgehp.artifact.open import open_artifact, open_network
    from edgehp.networks.bundled import DEFAULT_NETWORK

    if network is not None:
        return open_network(network, threads=threads)
    if artifact is None:
        try:
            artifact = newest_artifact()
            note(f"with {artifact}, the newest")
        except DataError:
            note(f"no artifact in dist/: predicting with {DEFAULT_NETWORK} in floating point")
            return open_network(DEFAULT_NETWORK, threads=threads)
    return open_artifact(artifact, threads=threads)


def _savers(output: Path | None, sources: Sequence[Source], stack: ExitStack) -> dict[str, Any]:
    """What draws the frames of each source."""
    from edgehp.images import PHOTO_SUFFIXES
    from edgehp.runtime.drawing import open_saver

    if output is None:
        return {}
    if len(sources) > 1:
        if output.suffix.lower() in PHOTO_SUFFIXES:
            raise UsageError(f"--output {output}: several sources need a folder")
        names = [Path(s.name).name for s in sources]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise UsageError(
                f"--output {output}: several sources are called {twice[0]}\n"
                "hint: give the folder that holds them, or predict them one by one"
            )
    return {s.name: stack.enter_context(open_saver(output, s)) for s in sources}


def _faces(boxes: str | None, sources: Sequence[Source]) -> FaceFinder:
    from edgehp.datasets.lists import load_boxes, parse_box
    from edgehp.runtime.predict import detected

    if boxes is None:
        from edgehp.runtime.detection import open_detector

        return detected(open_detector())
    if "," in boxes and not Path(boxes).exists():
        box = parse_box(boxes)
        return lambda name, photo: [(box, None)]
    if any(s.kind not in ("photo", "folder") for s in sources):
        raise UsageError(
            "a list of --boxes names photos; a video or camera needs the face detector\n"
            "hint: --boxes x_min,y_min,x_max,y_max takes one box for all frames"
        )
    listed = load_boxes(Path(boxes))
    return lambda name, photo: [(e.box, None) for e in listed.of(name)]


def _line(record: dict[str, Any]) -> str:
    """One face for people."""
    where = record["file"] or record["source"]
    if record["seconds"] is not None:
        where += f" {record['seconds']:.2f} s"
    state = styled(record["state"], "green" if record["state"] == "ok" else "yellow")
    if record["angles"] is None:
        problem = record["problem"]
        return f"{where}  {state}" + ("" if problem is None else f": {problem}")
    values = "  ".join(f"{n} {v:+6.1f}" for n, v in record["angles"].items() if v is not None)
    # A network without a spread has no confidence.
    sure = record["confidence"]
    return f"{where}  {values}  {state}" + ("" if sure is None else f", confidence {sure:.2f}")


def _summarize(counts: Counter[str]) -> None:
    faces = sum(n for state, n in counts.items() if state not in ("no_face", "unreadable"))
    parts = ", ".join(f"{n} {state}" for state, n in sorted(counts.items())) or "no frames"
    note(f"{faces} face{'' if faces == 1 else 's'} ({parts})")
