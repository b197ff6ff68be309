"""``edgehp run``: the loop in the car."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgehp._memory import keep_little
from edgehp.errors import UsageError

if TYPE_CHECKING:
    from edgehp.artifact.open import OpenedNetwork
    from edgehp.crop import Box
    from edgehp.runtime.engine import EngineHost
    from edgehp.runtime.loop import Runtime
    from edgehp.runtime.output import Sink
    from edgehp.runtime.settings import Settings
    from edgehp.runtime.tracking import Tracker

__all__ = ["command"]

logger = logging.getLogger(__name__)

_UNIT = "edgehp-run.service"
_WHOLE, _REGION = 480, 160


@click.command("run", short_help="Follow a driver's head: camera to JSON lines, without end.")
@click.argument("artifact", required=False, type=click.Path(path_type=Path))
@click.option(
    "--source",
    help="camera:N, /dev/v4l/by-id/NAME, gstreamer:PIPELINE, a video or a folder of photos.",
)
@click.option("--slots", type=click.Path(path_type=Path), help="Run the current slot of this root.")
@click.option("--network", help="A float network (bundled name or file) in place of an artifact.")
@click.option("--box", help="The face: x_min,y_min,x_max,y_max in pixels; no detector then.")
@click.option(
    "--config", type=click.Path(path_type=Path), help="Settings in TOML; see docs/runtime.md."
)
@click.option("--socket", type=click.Path(path_type=Path), help="Lines to readers of this socket.")
@click.option("--quiet", is_flag=True, help="No lines on stdout.")
@click.option("--metrics", type=click.IntRange(0, 65535), help="Prometheus on 127.0.0.1:PORT.")
@click.option("--fps", type=click.FloatRange(0.1, 1000), help="Play a file at this rate.")
@click.option("--every-frame", is_flag=True, help="Of a file: process every frame, at any speed.")
@click.option("--nir", is_flag=True, help="Near-infrared: take the frames as grey.")
@click.option("--threads", type=click.IntRange(1), help="Processor threads for inference.")
@click.option("--limit", type=click.IntRange(1), help="Stop after this many frames.")
@click.option("--print-unit", is_flag=True, help="Print a systemd unit and stop.")
def command(
    artifact: Path | None,
    source: str | None,
    slots: Path | None,
    network: str | None,
    box: str | None,
    config: Path | None,
    socket: Path | None,
    quiet: bool,
    metrics: int | None,
    fps: float | None,
    every_frame: bool,
    nir: bool,
    threads: int | None,
    limit: int | None,
    print_unit: bool,
) -> None:
    r"""Follow a driver's head until SIGTERM or Ctrl-C: one JSON line a frame.

    With ARTIFACT, else the newest one under dist/, or the current slot with --slots. Always the
    newest frame is taken; frames that come while one is in work are dropped and counted. Angles are
    pitch, yaw, roll in degrees (+pitch nose up, +yaw nose to the image's left, +roll clockwise),
    raw and filtered.

    \b
    States: ok, searching, no_face, low_confidence, out_of_range, stale_frame,
    stuck_camera, camera_lost, detector_fault, engine_fault.
    """
    if print_unit:
        unit = Path(__file__).parent.parent / "runtime" / _UNIT
        click.echo(unit.read_text(encoding="utf-8"), nl=False)
        return
    if source is None:
        raise UsageError("--source is missing: camera:0, gstreamer:PIPELINE, a video or a folder")
    if sum(given is not None for given in (artifact, slots, network)) > 1:
        raise UsageError("give an artifact, --slots or --network, one of them")
    keep_little()  # before the runtimes that are imported below make their threads
    # Imported here: `edgehp --help` must not pay for OpenCV.
    from msgspec.structs import replace

    from edgehp.runtime.loop import Runtime
    from edgehp.runtime.output import Metrics, Watchdog
    from edgehp.runtime.settings import Settings, load_settings
    from edgehp.runtime.sources import parse_source

    settings = Settings() if config is None else load_settings(config)
    if nir:
        settings = replace(settings, capture=replace(settings.capture, grey=True))
    frames = parse_source(source, fps, bits=settings.capture.bit_depth)
    if frames.kind == "photo":
        raise UsageError(
            f"{source}: one photo is no source of frames\nhint: use 'edgehp predict', or give a "
            "folder of photos, a video or a camera"
        )
    if every_frame and frames.live:
        raise UsageError("--every-frame is for files: a camera does not wait")
    with ExitStack() as stack:
        # The engine last: with --slots a start is counted, and what is wrong with the other parts
        # must not look like a network that fails.
        tracker = _tracker(box, settings, every_frame)
        stack.callback(tracker.close)
        counters = None if metrics is None else Metrics(metrics)
        if counters is not None:
            stack.callback(counters.close)
        sinks = _sinks(socket, quiet, every_frame)
        for sink in sinks:
            stack.callback(sink.close)
        host, confirm = _engine(artifact, slots, network, threads)
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
    click.echo(
        f"edgehp: {summary.reason}: {summary.totals['processed']} of "
        f"{summary.totals['captured']} frames, {summary.totals['dropped']} dropped "
        f"({counts or 'no records'})",
        err=True,
    )


def _engine(
    artifact: Path | None, slots: Path | None, network: str | None, threads: int | None
) -> tuple[EngineHost, Callable[[], None] | None]:
    """The engine, and what to call once it is seen to work."""
    from edgehp.artifact.open import open_network
    from edgehp.runtime.engine import EngineHost

    if network is not None:
        return EngineHost(lambda: open_network(network, threads=threads)), None
    if slots is None:
        return EngineHost(lambda: _tested(artifact, threads)), None
    from edgehp.errors import EdgehpError
    from edgehp.shipping import slots as device

    # It says itself where it falls back to the other slot. Tested here and not in a process of its
    # own: a crash ends a start that was counted, and what was opened and verified is run.
    booted = device.boot(slots, lambda path: _tested(path, threads), discard=_close)
    opened, path = [booted.tested], booted.slot.artifact

    def confirm() -> None:
        try:
            device.confirm(slots, booted.slot)
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


def _tracker(box: str | None, settings: Settings, inline: bool) -> Tracker:
    from edgehp.errors import EnvironmentalError
    from edgehp.runtime.detection import (
        BackgroundDetection,
        CenterFace,
        InlineDetection,
        find_weights,
    )
    from edgehp.runtime.tracking import FaceTracker, FixedBox

    if box is not None:
        return FixedBox(_box(box))

    try:
        weights = find_weights()
    except EnvironmentalError as e:
        raise EnvironmentalError(str(e).replace("--boxes", "--box")) from e
    score = settings.tracking.min_face_score
    detectors = InlineDetection(
        CenterFace(weights, threshold=score, side=_WHOLE),
        CenterFace(weights, threshold=score, side=_REGION),
    )
    return FaceTracker(
        detectors if inline else BackgroundDetection(detectors),
        settings.tracking.every,
        settings.tracking.patience,
    )


def _box(text: str) -> Box:
    from edgehp.crop import Box

    try:
        values = [float(part) for part in text.split(",")]
        x0, y0, x1, y1 = values
    except ValueError:
        raise UsageError(f"--box {text!r}: expected x_min,y_min,x_max,y_max in pixels") from None
    if not (all(abs(v) < 1e5 for v in values) and x0 < x1 and y0 < y1):
        raise UsageError(f"--box {text!r}: expected x_min < x_max and y_min < y_max, in pixels")
    return Box(x0, y0, x1, y1)


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
