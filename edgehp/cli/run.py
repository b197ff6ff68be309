"""``edgehp run``: the loop in the car."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgehp._memory import keep_little
from edgehp.cli._command import (
    PATH,
    note,
    photo_depth_option,
    subcommand,
    threads_option,
    weights_option,
    with_weights,
)
from edgehp.errors import DataError, UsageError

if TYPE_CHECKING:
    from edgehp.artifact.open import OpenedNetwork
    from edgehp.runtime.engine import EngineHost
    from edgehp.runtime.loop import Runtime
    from edgehp.runtime.output import Sink
    from edgehp.runtime.settings import Settings
    from edgehp.runtime.tracking import Tracker

logger = logging.getLogger(__name__)

_UNIT = "edgehp-run.service"
_WHOLE, _REGION = 480, 160


@subcommand(
    "run",
    "edgehp run camera:0",
    "edgehp run camera:0 --root /var/lib/edgehp --quiet --socket /run/edgehp/pose.sock",
    "edgehp run drive.mp4 --every-frame --artifact dist/kd-resnet18-112-cpu-int8",
    renamed={"--slots": "--root", "--box": "--boxes"},
)
@click.argument("source", required=False)
@click.option("--source", "former_source", hidden=True)
@click.option(
    "--artifact",
    type=PATH,
    help="Default: the current slot of $EDGEHP_ROOT where that is set, else the newest in dist/.",
)
@click.option("--root", type=PATH, help="Run the current slot of this root.")
@click.option("--network", help="A float network (bundled name or file) in place of an artifact.")
@weights_option
@click.option("--boxes", help="The face: x_min,y_min,x_max,y_max in pixels; no detector then.")
@click.option("--config", type=PATH, help="Settings in TOML; see docs/runtime.md.")
@click.option("--socket", type=PATH, help="Lines to readers of this socket.")
@click.option("-q", "--quiet", is_flag=True, help="No lines on stdout, no notes.")
@click.option("--metrics", type=click.IntRange(0, 65535), help="Prometheus on 127.0.0.1:PORT.")
@click.option("--fps", type=click.FloatRange(0.1, 1000), help="Play a file at this rate.")
@click.option("--every-frame", is_flag=True, help="Of a file: process every frame, at any speed.")
@click.option("--nir", is_flag=True, help="Near-infrared: take the frames as grey.")
@threads_option
@photo_depth_option
@click.option("--limit", type=click.IntRange(1), help="Stop after this many frames.")
@click.option("--print-unit", is_flag=True, help="Print a systemd unit and stop.")
def command(
    source: str | None,
    former_source: str | None,
    artifact: Path | None,
    root: Path | None,
    network: str | None,
    weights: str | None,
    boxes: str | None,
    config: Path | None,
    socket: Path | None,
    quiet: bool,
    metrics: int | None,
    fps: float | None,
    every_frame: bool,
    nir: bool,
    photo_depth: int | None,
    threads: int | None,
    limit: int | None,
    print_unit: bool,
) -> None:
    """Follow a driver's head until SIGTERM or Ctrl-C: one JSON line a frame.

    SOURCE is camera:N, /dev/v4l/by-id/NAME, gstreamer:PIPELINE, a video or a folder of photos.
    Always the newest frame is taken; frames that come while one is in work are dropped and counted.
    Angles are pitch, yaw, roll in degrees (+pitch nose up, +yaw nose to the image's left, +roll
    clockwise), raw and filtered.

    States: ok, searching, no_face, low_confidence, out_of_range, stale_frame, stuck_camera,
    unreadable (a photo), camera_lost, detector_fault, engine_fault.
    """
    if print_unit:
        unit = Path(__file__).parent.parent / "runtime" / _UNIT
        click.echo(unit.read_text(encoding="utf-8"), nl=False)
        return
    if former_source is not None:
        note("'run ARTIFACT --source SOURCE' is 'run SOURCE --artifact ARTIFACT' now")
        source, artifact = former_source, Path(source) if source else artifact
    if source is None:
        raise UsageError(
            "SOURCE is missing\nhint: edgehp run camera:0; or gstreamer:PIPELINE, a video, a folder"
        )
    network = with_weights(network, weights)
    if sum(given is not None for given in (artifact, root, network)) > 1:
        raise UsageError("give --artifact, --root or --network, one of them")
    if artifact is None and network is None and root is None and os.environ.get("EDGEHP_ROOT"):
        root = Path(os.environ["EDGEHP_ROOT"])
    keep_little()  # before the runtimes that are imported below make their threads
    from msgspec.structs import replace

    from edgehp.runtime.loop import Runtime
    from edgehp.runtime.output import Metrics, Watchdog
    from edgehp.runtime.settings import Settings, load_settings
    from edgehp.runtime.sources import parse_source

    settings = Settings() if config is None else load_settings(config)
    if nir:
        settings = replace(settings, capture=replace(settings.capture, grey=True))
    if photo_depth is not None:
        settings = replace(settings, capture=replace(settings.capture, bit_depth=photo_depth))
    frames = parse_source(source, fps, bits=settings.capture.bit_depth)
    if frames.kind == "photo":
        raise UsageError(
            f"{source}: one photo is no source of frames\nhint: use 'edgehp predict', or give a "
            "folder of photos, a video or a camera"
        )
    if every_frame and frames.live:
        raise UsageError("--every-frame is for files: a camera does not wait")
    with ExitStack() as stack:
        # The engine last: with --root a start is counted, and what is wrong with the other parts
        # must not look like a network that fails.
        tracker = _tracker(boxes, settings, every_frame)
        stack.callback(tracker.close)
        counters = None if metrics is None else Metrics(metrics)
        if counters is not None:
            stack.callback(counters.close)
        sinks = _sinks(socket, quiet, every_frame)
        for sink in sinks:
            stack.callback(sink.close)
        host, confirm = _engine(artifact, root, network, threads)
        stack.callback(host.close)
        runtime = Runtime(
            frames,
            host,
            tracker,
            sinks,
            settings,
            Watchdog(),
            counters,
            every_frame,
            limit,
            confirm,
        )
        logger.info("running %s on %s", host.network.name, frames.name)
        with _signals(runtime):
            summary = runtime.run()
    counts = ", ".join(f"{n} {state}" for state, n in sorted(summary.states.items()))
    note(
        f"{summary.reason}: {summary.totals['processed']} of {summary.totals['captured']} frames, "
        f"{summary.totals['dropped']} dropped ({counts or 'no records'})"
    )
    if unreadable := summary.states.get("unreadable", 0):
        raise DataError(
            f"{unreadable} photo(s) could not be used; the lines with the state unreadable say why"
        )


def _engine(
    artifact: Path | None, root: Path | None, network: str | None, threads: int | None
) -> tuple[EngineHost, Callable[[], None] | None]:
    """The engine, and what to call once it is seen to work."""
    from edgehp.artifact.open import open_network
    from edgehp.runtime.engine import EngineHost

    if network is not None:
        return EngineHost(lambda: open_network(network, threads=threads)), None
    if root is None:
        return EngineHost(lambda: _tested(artifact, threads)), None
    from edgehp.errors import EdgehpError
    from edgehp.shipping import slots as device

    # It says itself where it falls back to the other slot. Tested here and not in a process of its
    # own: a crash ends a start that was counted, and what was opened and verified is run.
    booted = device.boot(root, lambda path: _tested(path, threads), discard=_close)
    opened, path = [booted.tested], booted.slot.artifact

    def confirm() -> None:
        try:
            device.confirm(root, booted.slot)
        except EdgehpError as e:
            # A full disk must not stop a network that works.
            logger.warning("%s", e)

    return EngineHost(lambda: opened.pop() if opened else _tested(path, threads)), confirm


def _close(network: OpenedNetwork) -> None:
    network.__exit__(None, None, None)


def _tested(artifact: Path | None, threads: int | None) -> OpenedNetwork:
    """Open an artifact and run its golden vectors."""
    from edgehp.artifact import verify_golden
    from edgehp.artifact.open import open_artifact
    from edgehp.errors import EdgehpError

    opened = open_artifact(artifact, threads=threads)
    if opened.artifact is not None:
        try:
            worst = verify_golden(opened.artifact, opened.engine)
        except EdgehpError:
            opened.__exit__(None, None, None)
            raise
        logger.info("golden vectors within %.2f degrees", worst)
    return opened


def _tracker(boxes: str | None, settings: Settings, inline: bool) -> Tracker:
    from edgehp.runtime.detection import CenterFace, Detection, find_weights
    from edgehp.runtime.tracking import FaceTracker, FixedBox

    if boxes is not None:
        from edgehp.datasets.lists import parse_box

        return FixedBox(parse_box(boxes))
    weights = find_weights()
    score = settings.tracking.min_face_score
    detection = Detection(
        CenterFace(weights, threshold=score, side=_WHOLE),
        CenterFace(weights, threshold=score, side=_REGION),
        beside=not inline,
    )
    return FaceTracker(detection, settings.tracking.every, settings.tracking.patience)


def _sinks(socket: Path | None, quiet: bool, lossless: bool) -> list[Sink]:
    from edgehp.runtime.output import PipeSink, SocketSink

    if quiet and socket is None:
        raise UsageError("--quiet needs --socket: without either, nobody would get the lines")
    # The socket first: it may be refused, the thread of the other then need not be stopped.
    sinks: list[Sink] = [] if socket is None else [SocketSink(socket)]
    if not quiet:
        sinks.append(PipeSink(sys.stdout.fileno(), lossless=lossless))
    return sinks


@contextmanager
def _signals(runtime: Runtime) -> Iterator[None]:
    """Stop cleanly at the first SIGTERM or Ctrl-C, at once at the second."""
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}

    def stop(number: int, _: object) -> None:
        runtime.stop(signal.Signals(number).name)
        signal.signal(number, signal.SIG_DFL)

    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
