"""The loop with real engines: poses, newest frames, faults and their ends, the command itself.

Only the camera is emulated. Nothing here is timed: limits in seconds are for a test that fails.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from types import ModuleType

import cv2
import msgspec
import numpy as np
import pytest
from msgspec.structs import replace as struct_replace

from edgehp.artifact.open import OpenedNetwork, open_network
from edgehp.cli.main import main
from edgehp.crop import Box, Picture
from edgehp.engines.base import Prediction
from edgehp.engines.cuda import GpuLostError
from edgehp.errors import DataError, EnvironmentalError
from edgehp.pose import geodesic_degrees, matrix_from_euler
from edgehp.runtime.detection import DetectedFace, Detection, overlap
from edgehp.runtime.engine import EngineFaultError, EngineHost
from edgehp.runtime.loop import Runtime
from edgehp.runtime.output import Sink, Watchdog
from edgehp.runtime.records import STATES
from edgehp.runtime.settings import CaptureSettings, Settings
from edgehp.runtime.sources import Source, parse_source
from edgehp.runtime.tracking import FaceTracker, FixedBox
from tests.pose_graphs import pose_graph

SIZE = 96
BOX = Box(8, 8, 88, 88)
WAIT = 60.0


def frame(angles=(10, -20, 5), shift: int = 0) -> np.ndarray:
    """A BGR frame whose mean colour is the pose (see `tests.pose_graphs`), with some texture."""
    y, x = np.mgrid[0:SIZE, 0:SIZE]
    texture = 15 * np.sin(2 * np.pi * (x + y + shift) / 16)
    rgb = 128.0 + np.asarray(angles) + texture[..., None]
    return np.clip(np.rint(rgb), 0, 255).astype(np.uint8)[..., ::-1].copy()


class Camera:
    """Reads what `script(number)` returns: a frame, None for no frame; or it raises."""

    def __init__(self, script: Callable[[int], object], pause: float = 0.005):
        self.script, self.pause, self.count = script, pause, 0
        self.seconds = 0.0

    def read(self):
        time.sleep(self.pause)
        self.seconds = self.count / 30
        self.count += 1
        pixels = self.script(self.count)
        return pixels is not None, pixels

    def release(self):
        pass

    def shortfall(self):
        return None


def good(number: int) -> np.ndarray:
    return frame(shift=number)


def live(script: Callable[[int], object] = good, pause: float = 0.005) -> Source:
    return Source("camera:0", True, lambda: Camera(script, pause))


@dataclass
class Records(Sink):
    """Keeps the records and stops the run once `enough` says so."""

    enough: Callable[[list[dict]], bool] = lambda _: False
    records: list[dict] = field(default_factory=list)
    runtime: Runtime | None = None

    def write(self, line: bytes) -> None:
        assert line.endswith(b"\n")
        self.records.append(json.loads(line))
        if self.runtime is not None and self.enough(self.records):
            self.runtime.stop("enough")


@pytest.fixture
def opener(tmp_path, monkeypatch) -> Callable[[], OpenedNetwork]:
    monkeypatch.setattr("edgehp.runtime.engine._PAUSE_S", 0.0)
    path = pose_graph(tmp_path / "net.onnx")
    return partial(open_network, str(path), kind="onnxruntime", threads=1)


FAST = Settings(capture=CaptureSettings(retry_first=0.02, retry_longest=0.1, heartbeat=0.1))


def run(source, opener, enough=lambda _: False, settings=FAST, tracker=None, **options):
    """Run until enough; the records and the summary."""
    sink = Records(enough)
    host = EngineHost(opener)
    runtime = Runtime(source, host, tracker or FixedBox(BOX), [sink], settings, **options)
    sink.runtime = runtime
    late = threading.Timer(WAIT, runtime.stop, ("late",))
    late.start()
    try:
        summary = runtime.run()
    finally:
        late.cancel()
    assert summary.reason != "late", [r.get("state") for r in sink.records[-20:]]
    assert {r["state"] for r in sink.records if "state" in r} <= set(STATES)
    return sink.records, summary


def states(records: list[dict]) -> list[str]:
    return [r["state"] for r in records if "state" in r]


# --- poses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form",
    [lambda f: f, lambda f: np.dstack([f, f[..., 0]]), lambda f: f.astype(np.uint16) << 4],
    ids=["BGR", "BGRA", "12 bits"],
)
def test_every_frame_has_its_pose_raw_and_filtered(opener, form):
    settings = Settings(capture=CaptureSettings(bit_depth=12))
    records, summary = run(
        live(lambda n: form(good(n))), opener, lambda r: states(r).count("ok") >= 5, settings
    )
    *frames, end = [r for r in records if r.get("state") != "stale_frame"]
    for r in frames:
        assert list(r["raw"].values()) == pytest.approx([10, -20, 5], abs=0.8)
        assert list(r["filtered"].values()) == pytest.approx([10, -20, 5], abs=0.8)
        assert list(r["spread"].values()) == [2, 2, 2] and r["box"] == [8, 8, 88, 88]
        assert r["captured_ns"] < r["result_ns"] and r["captured"].endswith("Z")
    assert end["type"] == "end" and end["reason"] == "enough" == summary.reason
    assert end["processed"] == summary.totals["processed"] >= 5


@pytest.mark.parametrize(
    ("spread", "angles", "state"),
    [(30.0, (0, 0, 0), "low_confidence"), (2.0, (0, 97, 0), "out_of_range")],
)
def test_doubt_and_range_are_states(tmp_path, spread, angles, state):
    path = pose_graph(tmp_path / "net.onnx", constant=angles, spread=spread)

    opener = partial(open_network, str(path), kind="onnxruntime", threads=1)
    records, _ = run(live(), opener, lambda r: state in states(r))
    found = next(r for r in records if r.get("state") == state)
    assert found["raw"]["yaw"] == angles[1]
    # A guess is not filtered, lest it pull the good ones with it.
    assert (found["filtered"] is None) == (state == "low_confidence")


# --- newest frame ---------------------------------------------------------------------------------


def test_overload_drops_frames_counts_them_and_never_queues(opener):
    def slowed():
        opened = opener()
        infer = opened.engine.infer

        def slow(crops) -> Prediction:
            time.sleep(0.05)
            return infer(crops)

        opened.engine.infer = slow  # type: ignore[method-assign]
        return opened

    records, summary = run(live(), slowed, lambda r: len(r) >= 12)
    total, numbers = summary.totals, [r["frame"] for r in records if r["type"] == "frame"]
    assert numbers == sorted(set(numbers)) and numbers[-1] > 2 * len(numbers)
    waiting = total["captured"] - total["processed"] - total["dropped"]
    assert waiting in (0, 1) and total["dropped"] > total["processed"]
    last = [r for r in records if r["type"] == "frame"][-1]
    assert last["dropped"] <= total["dropped"]


def test_every_frame_of_a_file_is_processed_also_after_one_that_cannot_be_read(opener, tmp_path):
    for i in range(12):
        cv2.imwrite(str(tmp_path / f"{i:02d}.png"), good(i))
    (tmp_path / "05.png").write_bytes(b"no photo")
    records, summary = run(parse_source(str(tmp_path), 10.0), opener, every_frame=True)
    assert states(records) == [*["ok"] * 5, "unreadable", *["ok"] * 6]
    assert "05.png" in records[5]["reason"] and summary.reason == "end of source"
    assert summary.totals["dropped"] == 0 and [r["frame"] for r in records[:-1]] == [*range(1, 13)]
    assert [r["seconds"] for r in records[:-1]] == [i / 10 for i in range(12)]


def test_a_file_read_frame_by_frame_is_never_late(opener):
    slow = Camera(lambda n: good(n) if n < 4 else None, pause=0.1)
    settings = Settings(capture=CaptureSettings(stale=0.03))
    records, _ = run(Source("slow.mp4", False, lambda: slow, 100.0), opener, settings=settings,
                     every_frame=True)  # fmt: skip
    assert states(records) == ["ok"] * 3


# --- faults ---------------------------------------------------------------------------------------


def noise(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (lambda _: good(1), "frozen"),
        (lambda _: np.zeros((SIZE, SIZE, 3), np.uint8), "black"),
        (noise, "garbage"),
        (lambda _: b"\xff\xd8", "garbage"),
    ],
    ids=["frozen", "black", "noise", "bytes"],
)
def test_a_stuck_camera_is_told_and_its_end_too(opener, fault, reason):
    told = threading.Event()

    def script(number):
        return good(number) if number < 5 or told.is_set() else fault(number)

    def enough(records):
        if states(records)[-1:] == ["stuck_camera"]:
            told.set()
        return told.is_set() and states(records)[-1:] == ["ok"]

    records, _ = run(live(script), opener, enough)
    stuck = [r for r in records if r.get("state") == "stuck_camera"]
    assert stuck[0]["reason"].startswith(reason) and stuck[0]["raw"] is None
    assert stuck[0]["type"] == "frame" and stuck[0]["filtered"] is None


def test_a_camera_that_stays_frozen_is_opened_again(opener):
    opened: list[Camera] = []

    def open_camera():
        # The first one is stuck from its first frame on, the next is not.
        opened.append(Camera(good if opened else lambda _: good(1)))
        return opened[-1]

    settings = Settings(capture=struct_replace(FAST.capture, frozen=0.05, reopen=0.1))
    records, summary = run(
        Source("camera:0", True, open_camera),
        opener,
        lambda r: states(r)[-1:] == ["ok"] and "stuck_camera" in states(r),
        settings,
    )
    assert len(opened) == 2 and summary.totals["reconnects"] == 1
    assert states(records)[-1] == "ok"


@pytest.mark.parametrize("how", ["ends", "fails", "cv2 fails", "closing fails"])
def test_a_lost_camera_is_told_and_opened_again(opener, how):
    opened: list[int] = []

    class Faulty(Camera):
        def release(self):
            if how == "closing fails":
                raise RuntimeError("double free")

    def script(number):
        if number < 5 or len(opened) > 1:
            return good(number)
        if how == "fails":
            raise OSError(19, "No such device")
        if how == "cv2 fails":
            raise cv2.error("select() timeout")
        return None

    def open_camera():
        opened.append(len(opened))
        if 1 < len(opened) < 4:
            raise EnvironmentalError("camera:0 cannot be opened")
        return Faulty(script)

    def enough(records):
        found = states(records)
        return "camera_lost" in found and found[-1] == "ok"

    records, summary = run(Source("camera:0", True, open_camera), opener, enough)
    lost = [r for r in records if r.get("state") == "camera_lost"]
    assert lost[0]["type"] == "status" and lost[0]["reason"]
    assert len(opened) == 4 and summary.totals["reconnects"] == 1


@pytest.mark.parametrize("after", [0, 3])
def test_a_capture_thread_that_ends_all_the_same_ends_the_run_within_a_second(
    opener, monkeypatch, after
):
    ended: list[float] = []

    class Dead(BaseException):
        pass

    def script(number):
        if number > after:
            ended.append(time.monotonic())
            raise Dead
        return good(number)

    confirmed: list[None] = []
    with pytest.raises(EnvironmentalError, match="capture thread ended: Dead"):
        run(live(script), opener, confirm=lambda: confirmed.append(None))
    assert time.monotonic() - ended[0] < 1 and len(confirmed) == 1


def test_a_detector_that_fails_for_a_moment_is_told_and_asked_again(opener):
    count: list[None] = []

    class Faulty:
        def detect(self, photo):
            count.append(None)
            if len(count) in (2, 3):
                raise ValueError("not even OpenCV's own error")
            return [DetectedFace(BOX, 0.9)]

    # In the loop's own thread: on a busy machine the flow of this texture carries no box for long.
    tracker = FaceTracker(Detection(Faulty(), Faulty()), every=1)
    records, summary = run(
        live(), opener, lambda r: "detector_fault" in states(r) and states(r)[-1] == "ok",
        tracker=tracker,
    )  # fmt: skip
    assert summary.totals["detector_faults"] == 2
    reasons = [r["reason"] for r in records if r.get("state") == "detector_fault"]
    assert "not even OpenCV's" in reasons[0]
    assert summary.totals["engine_faults"] == 0


@pytest.mark.parametrize("pause", [0.01, 0.5], ids=["unseen", "told"])
def test_before_the_detector_has_looked_nobody_is_said_to_be_missing(opener, pause):
    """At the start, and again after the camera was lost, though too shortly for a line of its own:
    that is no empty seat."""
    hold, gone, opened = threading.Event(), threading.Event(), []

    class Nobody:
        def detect(self, photo):
            hold.wait(WAIT)
            return []

    def seen(records):
        return [s for s, _ in groupby(states(records)) if s in ("searching", "no_face")]

    def enough(records):
        if states(records)[-3:] == ["searching"] * 3:
            hold.set()
        if states(records)[-3:] == ["no_face"] * 3 and not gone.is_set():
            hold.clear()
            gone.set()
        return len(seen(records)) == 4

    def open_camera():
        opened.append(None)
        return Camera(lambda n: None if gone.is_set() and len(opened) == 1 else good(n))

    tracker = FaceTracker(Detection(Nobody(), Nobody(), beside=True), every=1)
    settings = struct_replace(
        FAST, capture=struct_replace(FAST.capture, retry_first=pause, retry_longest=pause)
    )
    source = Source("camera:0", True, open_camera)
    records, _ = run(source, opener, enough, settings, tracker)
    assert seen(records) == ["searching", "no_face", "searching", "no_face"]
    reasons = {r["reason"] for r in records if r.get("state") == "searching"}
    assert reasons == {"the face detector has not answered yet"}


def test_the_documentation_explains_every_state(repo):
    text = (repo / "docs" / "runtime.md").read_text(encoding="utf-8")
    assert all(f"| `{state}` |" in text for state in STATES)


def test_a_run_by_hand_does_not_wait_for_ever_for_a_camera_that_never_was(opener, monkeypatch):
    monkeypatch.setattr("edgehp.runtime.loop._BY_HAND_S", 0.3)

    def open_camera():
        raise EnvironmentalError("camera:0 cannot be opened")

    source = Source("camera:0", True, open_camera)
    confirmed: list[None] = []
    for limit in (3, None):
        with pytest.raises(EnvironmentalError, match=r"^camera:0 cannot be opened; given up"):
            run(source, opener, limit=limit, confirm=lambda: confirmed.append(None))
    assert len(confirmed) == 2  # the network is not to blame
    # In the car, where there is a service manager, it is waited for.
    watchdog = Watchdog({"NOTIFY_SOCKET": "@edgehp-test-nobody"})
    records, _ = run(source, opener, lambda r: len(r) >= 6, watchdog=watchdog)
    assert set(states(records)) == {"camera_lost"}


def test_a_run_by_hand_waits_for_a_camera_that_was_there(opener, monkeypatch):
    monkeypatch.setattr("edgehp.runtime.loop._BY_HAND_S", 0.0)
    opened: list[None] = []

    def open_camera():
        opened.append(None)
        if 1 < len(opened) < 5:
            raise EnvironmentalError("camera:0 cannot be opened")
        return Camera(lambda n: None if len(opened) == 1 and n > 3 else good(n))

    _, summary = run(Source("camera:0", True, open_camera), opener, limit=8)
    assert summary.reason == "limit" and summary.totals["reconnects"] == 1


def test_frames_that_stay_away_are_stale_then_lost_and_a_driver_that_hangs_ends_the_process(opener):
    forever = threading.Event()

    def script(number):
        if number >= 5:
            forever.wait(WAIT)
        return good(number)

    settings = Settings(capture=struct_replace(FAST.capture, stale=0.1, lost=0.3, hang=0.7))
    sink = Records()
    runtime = Runtime(live(script), EngineHost(opener), FixedBox(BOX), [sink], settings)
    threading.Timer(1.0, forever.set).start()
    with pytest.raises(EnvironmentalError, match="driver has not come back"):
        runtime.run()
    found = states(sink.records)
    first = {s: found.index(s) for s in ("ok", "stale_frame", "camera_lost")}
    assert sorted(first.values()) == list(first.values()), found
    assert sink.records[-1]["type"] == "end" and sink.records[-1]["reason"].startswith("failed: ")


@pytest.mark.parametrize("where", ["opening", "reading"])
def test_a_driver_that_hangs_when_a_lost_camera_comes_back_ends_the_process(opener, where):
    forever, opened, confirmed = threading.Event(), [], []

    def script(number):
        # A covered lens: the engine is never asked, and is not to blame.
        if len(opened) == 1:
            return np.zeros((SIZE, SIZE, 3), np.uint8) if number < 3 else None
        forever.wait(WAIT)
        return None

    def open_camera():
        opened.append(None)
        if len(opened) > 1 and where == "opening":
            forever.wait(WAIT)
        return Camera(script)

    def confirm():
        confirmed.append(None)
        forever.set()

    settings = Settings(capture=struct_replace(FAST.capture, hang=0.3))
    source = Source("camera:0", True, open_camera)
    with pytest.raises(EnvironmentalError, match="driver has not come back"):
        run(source, opener, settings=settings, confirm=confirm)
    # Three such ends must not take a good slot for a bad one.
    assert len(opened) == 2 and len(confirmed) == 1


def test_silence_is_told_within_a_second_by_default():
    limits = CaptureSettings()
    tick = importlib.import_module("edgehp.runtime.loop")._TICK
    assert limits.stale < limits.lost and limits.lost + tick < 1
    # One more frame of a camera with 10 frames a second shows that it is frozen.
    assert limits.frozen + 0.1 < 1


class Broken:
    """An engine that fails or raves for a while."""

    def __init__(self, engine, answers):
        self._engine, self._answers = engine, answers

    def infer(self, crops):
        self._answers.append(None)
        count = len(self._answers)
        if count == 3:
            raise RuntimeError("the GPU fell off the bus")
        if count == 4:
            return Prediction(np.full((1, 3), np.nan, np.float32), np.ones((1, 3), np.float32))
        return self._engine.infer(crops)

    def close(self):
        self._engine.close()


def test_an_engine_that_fails_is_told_and_opened_again(opener):
    answers: list[None] = []
    opened: list[OpenedNetwork] = []

    def failing():
        network = opener()
        opened.append(replace(network, engine=Broken(network.engine, answers)))
        return opened[-1]

    records, summary = run(live(), failing, lambda r: len(opened) == 3 and states(r)[-1:] == ["ok"])
    faults = [r for r in records if r.get("state") == "engine_fault"]
    assert "fell off the bus" in faults[0]["reason"] and faults[0]["raw"] is None
    assert any("than numbers" in r["reason"] for r in faults)
    assert summary.totals["engine_faults"] == 2


def test_a_lost_gpu_ends_the_process_at_once(opener):
    """Every further call of this process would fail: the service manager starts another one."""
    opened: list[None] = []

    class Lost(Broken):
        def infer(self, crops):
            raise GpuLostError("CUDA cuStreamSynchronize failed with 700")

    def losing():
        opened.append(None)
        network = opener()
        return replace(network, engine=Lost(network.engine, []))

    with pytest.raises(GpuLostError, match="700"):
        run(live(), losing)
    assert len(opened) == 1
    # The same where it is lost while an engine is opened again.
    calls = iter([None, GpuLostError("CUDA cuDevicePrimaryCtxRetain failed with 719")])

    def again():
        if (error := next(calls)) is not None:
            raise error
        network = opener()
        return replace(network, engine=Broken(network.engine, [None, None]))

    host = EngineHost(again)
    assert "fell off the bus" in fault_of(host)
    with pytest.raises(GpuLostError, match="719"):
        for _ in range(500):
            with contextlib.suppress(EngineFaultError):
                host.infer(WHOLE)
            time.sleep(0.01)
    host.close()


WHOLE = [(Picture(np.zeros((64, 64, 3), np.uint8)), None)]


def fault_of(host: EngineHost) -> str:
    with pytest.raises(EngineFaultError) as caught:
        host.infer(WHOLE)
    return str(caught.value)


def test_the_loop_lives_while_a_failed_engine_is_opened_again(opener):
    """Longer than the watchdog waits: frames are told as faults, and signs of life go on."""
    lived = threading.Event()
    opened: list[bool] = []

    def slowly():
        network = opener()
        if not opened:
            opened.append(True)
            return replace(network, engine=Broken(network.engine, [None, None]))
        # A loop that opened the engine itself would wait here for ever.
        opened.append(lived.wait(WAIT))
        return network

    class Dog(Watchdog):
        lives = 0

        def alive(self) -> None:
            self.lives += 1
            faults = states(records).count("engine_fault")
            if len(opened) == 1 and faults > 20 and self.lives > 20:
                lived.set()

    records: list[dict] = []

    def enough(found: list[dict]) -> bool:
        records[:] = found
        return states(found)[-1:] == ["ok"] and len(opened) == 2

    run(live(), slowly, enough, watchdog=Dog({}))
    assert opened == [True, True]


def test_an_engine_that_is_opened_too_late_is_closed(opener):
    asked, go, closed = threading.Event(), threading.Event(), threading.Event()

    def slowly():
        network = opener()
        if asked.is_set():
            go.wait(WAIT)
            network._closing.callback(closed.set)
            return network
        asked.set()
        return replace(network, engine=Broken(network.engine, [None, None]))

    host = EngineHost(slowly)
    for _ in range(2):
        fault_of(host)
    ending = threading.Thread(target=host.close)
    ending.start()
    go.set()
    ending.join(WAIT)
    assert closed.wait(WAIT)


def test_a_driver_that_hangs_while_the_engine_opens_ends_the_process(opener, monkeypatch):
    monkeypatch.setattr("edgehp.runtime.engine._HANGS_S", 0.1)
    monkeypatch.setattr("edgehp.runtime.engine._END_S", 0.0)
    go, opened = threading.Event(), []

    def hanging():
        if opened:
            go.wait(WAIT)
        opened.append(opener())
        return replace(opened[0], engine=Broken(opened[0].engine, [None, None]))

    with pytest.raises(EnvironmentalError, match="hangs"):
        run(live(), hanging)
    go.set()


def test_a_slow_disk_does_not_hold_the_frames_up(opener):
    """The start is confirmed beside the loop, and before the run is over."""
    flowing, confirmed = threading.Event(), []

    def confirm() -> None:
        # As fsync on a worn card; in the loop it would wait for frames that do not come.
        confirmed.append(flowing.wait(WAIT))

    def enough(records: list[dict]) -> bool:
        if len(records) == 10:
            flowing.set()
        return len(records) >= 12

    run(live(), opener, enough, confirm=confirm)
    assert confirmed == [True]


def test_crops_are_those_of_the_engine_that_is_open_now(opener):
    # An installation may replace the slot between an engine's failure and its next opening.
    first, second = opener(), opener()
    first = replace(first, engine=Broken(first.engine, [None, None]))
    seen: list[np.ndarray] = []

    class Seeing(Broken):
        def infer(self, crops):
            seen.append(crops)
            return Prediction(np.zeros((1, 3), np.float32), np.ones((1, 3), np.float32))

    second = replace(
        second,
        engine=Seeing(second.engine, []),
        preprocessing=msgspec.structs.replace(second.preprocessing, size=32),
    )
    host = EngineHost(iter([first, second]).__next__)
    assert "fell off the bus" in fault_of(host)
    # It is opened in another thread.
    while not seen:
        with contextlib.suppress(EngineFaultError):
            host.infer(WHOLE)
        time.sleep(0.01)
    assert seen[0].shape == (1, 32, 32, 3)
    host.close()


@pytest.mark.parametrize(
    ("error", "words", "innocent"),
    [(DataError("bad plan"), r"opened again.*bad plan", False),
     (EnvironmentalError("no GPU"), r"driver or device has been missing.*no GPU", True)],
    ids=["network", "driver"],
)  # fmt: skip
def test_an_engine_that_stays_broken_ends_the_process(opener, monkeypatch, error, words, innocent):
    """A driver that is gone is waited for, and is not the network's fault."""
    monkeypatch.setattr("edgehp.runtime.engine._PATIENCE_S", 0.2)
    calls: list[None] = []
    confirmed: list[None] = []

    def gone():
        calls.append(None)
        if len(calls) > 1:
            raise error
        network = opener()
        return replace(network, engine=Broken(network.engine, [None, None]))

    with pytest.raises(EnvironmentalError, match=words):
        run(live(), gone, confirm=lambda: confirmed.append(None))
    assert len(confirmed) == innocent


def test_the_service_manager_is_told_by_the_loop_itself(opener):
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        server = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        server.bind(f"{folder}/n")
        server.settimeout(WAIT)
        told: list[bytes] = []

        def listen() -> None:
            # The kernel keeps a few datagrams only.
            while told[-1:] != [b"STOPPING=1"]:
                told.append(server.recv(300))

        listener = threading.Thread(target=listen)
        listener.start()
        dog = Watchdog({"NOTIFY_SOCKET": f"{folder}/n", "WATCHDOG_USEC": "20000"})
        ended = iter([False] * 4 + [True])
        run(
            live(lambda n: None if next(ended, False) else good(n)),
            opener,
            lambda r: "camera_lost" in states(r) and states(r)[-1] == "ok",
            Settings(capture=struct_replace(FAST.capture, retry_first=0.5, retry_longest=0.5)),
            watchdog=dog,
        )
        listener.join(WAIT)
        server.close()
    assert told[0].startswith(b"READY=1\n") and told[-1] == b"STOPPING=1" and b"WATCHDOG=1" in told
    status = [t for t in told if t.startswith(b"STATUS=")]
    assert status[0].startswith(b"STATUS=camera_lost") and status[-1] == b"STATUS=reading camera:0"


# --- the real detector, a real network, 1080p ---------------------------------------------------


def clip_module(repo: Path) -> ModuleType:
    sys.path.insert(0, str(repo / "tools"))
    try:
        return importlib.import_module("runtime_clip")
    finally:
        sys.path.remove(str(repo / "tools"))


@pytest.mark.slow
def test_a_moving_head_in_a_1080p_video_is_followed(repo, tmp_path):
    from edgehp.cli.run import _tracker
    from edgehp.runtime.detection import find_weights

    try:
        find_weights()
    except EnvironmentalError as e:
        pytest.skip(str(e))
    tool = clip_module(repo)
    head = tool.packaged_head(repo / "calibration" / "rendered-validation.zip")
    truth = tool.Clip([head], seed=5).write(tmp_path / "v.mp4", 20)
    sink = Records()
    host = EngineHost(lambda: open_network("kd-resnet18-112", threads=1))
    tracker = _tracker(None, Settings(), True)
    source = parse_source(str(tmp_path / "v.mp4"))
    Runtime(source, host, tracker, [sink], every_frame=True).run()
    frames = [r for r in sink.records if r["type"] == "frame"]
    assert states(sink.records) == ["ok"] * 20
    assert sum(r["detected"] for r in frames) == 2

    def errors(key):
        found = matrix_from_euler([list(r[key].values()) for r in frames])
        return geodesic_degrees(found, np.stack([t.rotation for t in truth]))

    # Measured over 120 frames: raw 2.7, filtered 2.8 degrees on average, box overlap 0.78.
    assert errors("raw").mean() < 6 and errors("filtered").mean() < 7
    boxes = [overlap(Box(*r["box"]), t.box) for r, t in zip(frames, truth, strict=True)]
    assert min(boxes) > 0.6


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(40):
        cv2.imwrite(str(folder / f"{i:03d}.png"), good(i))
    return folder


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "edgehp", "run", *map(str, arguments)]


def test_the_command_runs_stops_on_a_signal_and_leaves_nothing(tmp_path, photos):
    network = pose_graph(tmp_path / "net.onnx")
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        path = Path(folder) / "s"
        process = subprocess.Popen(
            command("--network", network, photos, "--fps", 2, "--boxes", "8,8,88,88",
                    "--socket", path, "--threads", 1),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        first = json.loads(process.stdout.readline())
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        client.connect(str(path))
        client.settimeout(WAIT)
        told = client.recv(65536)
        client.close()
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=WAIT)
        assert process.returncode == 0 and not path.exists()
    assert first["frame"] >= 1 and json.loads(told.splitlines()[0])["state"] in STATES
    last = json.loads(out.splitlines()[-1])
    assert last["type"] == "end" and last["reason"] == "SIGTERM"
    assert b"SIGTERM" in err and b"Traceback" not in err


def two_slots(tmp_path: Path, offset: float = 0.0) -> Path:
    """A root with the artifacts ``first`` and, current and off by `offset` degrees, ``second``."""
    from tests import ship_parts

    signer, root = ship_parts.new_signer(tmp_path), tmp_path / "root"
    for name, off in (("first", 0.0), ("second", offset)):
        bundle = ship_parts.bundle(tmp_path, name, signer, offset=off)
        ship_parts.install(bundle, signer, root)
    return root


def test_the_current_slot_runs_is_confirmed_and_gives_way_to_the_other_when_damaged(
    tmp_path, photos, capfd
):
    from edgehp.shipping.slots import status

    root = two_slots(tmp_path, offset=0.1)

    def pitch() -> tuple[float, str]:
        with pytest.raises(SystemExit) as caught:
            main(["run", "--root", str(root), str(photos), "--boxes", "8,8,88,88",
                  "--every-frame", "--limit", "2"])  # fmt: skip
        out, err = capfd.readouterr()
        assert not caught.value.code, err
        return json.loads(out.splitlines()[0])["raw"]["pitch"], err

    second, _ = pitch()
    found = status(root)
    assert found.current.artifact_name == "second" and found.unconfirmed_starts == 0
    with (found.current.artifact / "engine.onnx").open("ab") as file:
        file.write(b"x")
    first, err = pitch()
    assert first == pytest.approx(second - 0.1, abs=0.03) and "engine.onnx" in err
    assert status(root).current.artifact_name == "first"
    # A socket that cannot be had is no fault of the network: such starts do not lead away from it.
    before = status(root)
    with pytest.raises(SystemExit) as caught:
        main(["run", "--root", str(root), str(photos), "--boxes", "8,8,88,88",
              "--socket", str(tmp_path / "none" / "pose.sock")])  # fmt: skip
    assert caught.value.code == 5 and status(root) == before


def test_a_broken_detector_is_not_charged_to_the_network(tmp_path, photos, monkeypatch, capfd):
    from edgehp.runtime.detection import CenterFace
    from edgehp.shipping.slots import MAX_FAILED_STARTS, status

    def broken(self, photo):
        raise EnvironmentalError("the face detector failed")

    root = two_slots(tmp_path)
    monkeypatch.setattr(CenterFace, "detect", broken)
    # At the end of what there is to see, and before it where it has failed for long.
    for patience, words in [(5.0, "until the end"), (0.0, r"2 times")] * MAX_FAILED_STARTS:
        monkeypatch.setattr("edgehp.runtime.loop._DETECTOR_S", patience)
        with pytest.raises(SystemExit) as caught:
            main(["run", "--root", str(root), str(photos), "--every-frame"])
        err = capfd.readouterr().err
        assert caught.value.code == 5 and "face detector has failed" in err and words in err
    found = status(root)
    assert found.current.artifact_name == "second" and not found.failed


def test_a_reader_of_stdout_that_has_enough_ends_the_command(tmp_path, photos):
    network = pose_graph(tmp_path / "net.onnx")
    process = subprocess.Popen(
        command("--network", network, photos, "--fps", 20, "--boxes", "8,8,88,88"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert json.loads(process.stdout.readline())
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(WAIT) == 0 and b"reader went away" in err and b"Traceback" not in err
    process.stderr.close()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--network", "x"], 2, "SOURCE is missing"),
        (["--artifact", "a", "--network", "x", "camera:0"], 2, "one of them"),
        (["--network", "NET", "PHOTOS", "--boxes", "1,2,3"], 2, "x_min,y_min"),
        (["--network", "NET", "PHOTOS", "--boxes", "9,9,3,3"], 2, "x_min < x_max"),
        (["--network", "NET", "PHOTOS", "--quiet", "--boxes", "1,2,3,4"], 2, "--socket"),
        (["--network", "NET", "camera:0", "--every-frame"], 2, "for files"),
        (["--network", "NET", "PHOTOS/000.png", "--boxes", "1,2,3,4"], 2, "predict"),
        (["--network", "NET", "PHOTOS", "--config", "none.toml"], 1, "none.toml"),
        (["--artifact", "nothing-there", "PHOTOS", "--boxes", "1,2,3,4"], 1, "nothing-there"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_sentence(tmp_path, photos, capfd, arguments, code, words):
    network = pose_graph(tmp_path / "net.onnx")
    given = [a.replace("NET", str(network)).replace("PHOTOS", str(photos)) for a in arguments]
    with pytest.raises(SystemExit) as caught:
        main(["run", *given])
    err = capfd.readouterr().err
    assert caught.value.code == code and words in err and "Traceback" not in err


def test_the_unit_is_printed_and_names_options_that_exist(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["run", "--print-unit"])
    unit = capsys.readouterr().out
    assert caught.value.code in (0, None)
    assert "StartLimitIntervalSec=0" in unit  # or systemd would give up for good
    # Argus, which CSI cameras come from, listens in /tmp.
    assert "PrivateTmp=" not in unit and "ReadWritePaths=/tmp\n" in unit
    assert "Type=notify" in unit and "WatchdogSec=" in unit and "Restart=always" in unit
    from edgehp.cli.run import command as run_command

    known = {o for p in run_command.params for o in p.opts}
    used = {w for w in unit.split("ExecStart=")[1].split("\n# ")[0].split() if w.startswith("--")}
    assert used and used <= known
