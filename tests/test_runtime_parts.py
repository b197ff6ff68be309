"""The runtime's parts: filter, frames, sources, tracking, settings, outputs, watchdog."""

from __future__ import annotations

import json
import os
import re
import socket
import stat
import tempfile
import threading
import time
import urllib.request
import weakref
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest

from edgehp.crop import Box
from edgehp.datasets.faces import read_rendered
from edgehp.errors import DataError, EnvironmentalError, UsageError, without_password
from edgehp.pose import geodesic_degrees, matrix_from_euler
from edgehp.runtime.capture import CaptureThread, Complaints
from edgehp.runtime.detection import DetectedFace, Detection, network_box, overlap
from edgehp.runtime.filter import RotationFilter, lag_seconds, rotation_exp, rotation_log
from edgehp.runtime.frames import FrameHealth, as_rgb, nv12_picture
from edgehp.runtime.output import Metrics, PipeSink, SocketSink, Watchdog
from edgehp.runtime.settings import CaptureSettings, FilterSettings, Settings, load_settings
from edgehp.runtime.sources import Source, parse_source
from edgehp.runtime.tracking import FaceTracker, carry


def wait_for(condition, seconds: float = 20.0) -> None:
    """Return when the condition holds; the limit is for a test that fails, not a measurement."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)


# --- filter ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "speed"), [(15.0, 20.0), (30.0, 90.0), (60.0, 250.0)])
def test_the_lag_of_a_steady_turn_is_the_formula_s_at_any_frame_rate(rate, speed):
    axis = np.array([0.36, 0.8, 0.48])
    found = RotationFilter(FilterSettings(min_cutoff=1.3, beta=0.05))
    start = matrix_from_euler([10, -30, 5])
    for i in range(int(10 * rate)):
        true = start @ rotation_exp(axis * speed * i / rate)
        filtered = found.update(i / rate, true)
    lag = np.linalg.norm(rotation_log(filtered.T @ true)) / speed
    assert lag == pytest.approx(lag_seconds(1.3, 0.05, speed), rel=1e-3)


def test_a_resting_head_trembles_less_and_a_turning_one_is_followed(rng):
    def tremble(rotations):
        return np.mean([geodesic_degrees(a, b) for a, b in pairwise(rotations)])

    rest = [matrix_from_euler([5, 40, 0]) @ rotation_exp(rng.normal(0, 0.5, 3)) for _ in range(120)]
    calm = RotationFilter()
    filtered = [calm.update(i / 30, r) for i, r in enumerate(rest)]
    assert tremble(filtered[30:]) < 0.5 * tremble(rest[30:])
    # From rest to 60 degrees aside at once: there within half a second.
    for i in range(15):
        at = calm.update(4 + i / 30, matrix_from_euler([5, 100, 0]))
    assert geodesic_degrees(at, matrix_from_euler([5, 100, 0])) < 6


def test_the_filter_does_not_know_where_straight_ahead_is(rng):
    turn = matrix_from_euler([30, 80, -40])
    here, there = RotationFilter(), RotationFilter()
    for i in range(60):
        r = matrix_from_euler([10 * np.sin(i / 9), 85 + 20 * np.sin(i / 7), rng.normal()])
        a, b = here.update(i / 30, r), there.update(i / 30, turn @ r)
        assert geodesic_degrees(turn @ a, b) < 1e-6
    assert np.allclose(a @ a.T, np.eye(3), atol=1e-12) and np.linalg.det(a) > 0


def test_a_gap_forgets_and_a_clock_that_stands_still_changes_nothing():
    found = RotationFilter(FilterSettings(reset_after=0.5))
    first, second = matrix_from_euler([0, 0, 0]), matrix_from_euler([0, 50, 0])
    found.update(0.0, first)
    between = found.update(0.03, second)
    assert 0 < geodesic_degrees(between, first) < 45
    assert np.array_equal(found.update(0.03, first), between)
    assert np.array_equal(found.update(1.0, second), second) and found.speed == 0


# --- frames ---------------------------------------------------------------------------------------


def picture(seed: int = 0, height: int = 120, width: int = 160, noise: float = 2.0) -> np.ndarray:
    """A smooth picture with a sensor's noise, uint8 RGB."""
    rng = np.random.default_rng(seed)
    coarse = np.random.default_rng(7).uniform(40, 200, (6, 8, 3)).astype(np.float32)
    big = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(big + rng.normal(0, noise, big.shape), 0, 255).astype(np.uint8)


def test_grey_frames_become_three_equal_channels_whatever_their_form():
    grey = picture()[..., 0]
    for frame in (grey, grey[..., None], grey.astype(np.uint16) << 2, grey.astype(np.uint16) << 8):
        depth = 10 if frame.max() < 1024 else 16
        rgb = as_rgb(frame, bit_depth=depth)
        assert rgb.dtype == np.uint8 and rgb.shape == (*grey.shape, 3)
        assert all(np.array_equal(rgb[..., c], grey) for c in range(3))


def test_colour_is_turned_around_and_near_infrared_is_taken_as_grey():
    bgr = picture()
    assert np.array_equal(as_rgb(bgr), bgr[..., ::-1])
    rgb = as_rgb(np.dstack([bgr, bgr[..., 0]]), grey=True)
    assert np.array_equal(rgb[..., 0], rgb[..., 2]) and rgb.std() > 5


def test_frames_are_turned_clockwise_and_their_depth_must_be_known():
    bgr = picture()
    for turns, degrees in enumerate((0, 90, 180, 270)):
        assert np.array_equal(as_rgb(bgr, rotate=degrees), np.rot90(bgr[..., ::-1], -turns))
    with pytest.raises(DataError, match="16 bits a sample"):
        as_rgb(bgr[..., 0].astype(np.uint16) << 2)


def test_nv12_of_a_pipeline_is_taken_as_what_it_is(monkeypatch):
    monkeypatch.setattr(cv2, "getBuildInformation", lambda: "    GStreamer:  YES (1.20)")
    caps = "video/x-raw(memory:NVMM),format=NV12 ! nvvidconv ! video/x-raw, format=(string){} !"
    for form, nv12 in (("NV12", True), ("BGRx", False)):
        source = parse_source(f"gstreamer:nvarguscamerasrc ! {caps.format(form)} appsink")
        assert source.nv12 is nv12
    bgr = picture()
    height, width = bgr.shape[:2]
    planes = cv2.cvtColor(bgr, cv2.COLOR_BGR2YUV_I420)
    chroma = planes[height:].reshape(2, -1).T.reshape(height // 2, width)
    frame = np.vstack([planes[:height], chroma])
    rgb = as_rgb(frame[..., None], nv12=True)
    assert rgb.shape == bgr.shape and np.abs(rgb.astype(int) - bgr[..., ::-1]).mean() < 12
    assert np.ptp(as_rgb(frame, nv12=True, grey=True), axis=2).max() == 0
    # The engine takes the planes as they came.
    assert np.array_equal(nv12_picture(frame[..., None]).rgb(), rgb)
    with pytest.raises(DataError, match="a NV12 picture cannot be"):
        as_rgb(bgr, nv12=True)


@pytest.mark.parametrize(
    "pixels",
    [
        None,
        b"",
        np.zeros(0, np.uint8),
        np.zeros((0, 0, 3), np.uint8),
        np.zeros((100, 100, 2), np.uint8),
        np.zeros((100, 100, 3), np.float32),
        np.zeros((10, 9000, 3), np.uint8),
        np.zeros((2, 100, 100, 3), np.uint8),
        DataError("expected a photo"),
    ],
    ids=lambda p: type(p).__name__ if not isinstance(p, np.ndarray) else f"{p.dtype}{p.shape}",
)
def test_what_is_no_frame_is_refused(pixels):
    with pytest.raises(DataError, match="expected"):
        as_rgb(pixels)


def test_identical_frames_are_a_fault_after_a_while_and_noise_ends_it():
    health, frame = FrameHealth(frozen_after=0.4), picture()
    found = [health.check(frame, i / 30) for i in range(20)]
    kinds = [f.kind if f else None for f in found]
    assert kinds[:12] == [None] * 12 and kinds[13:] == ["frozen"] * 7
    assert health.check(picture(1), 21 / 30) is None
    # Two frames a second, one of them twice, are a slow camera and not a stuck one.
    slow = FrameHealth(frozen_after=0.4)
    assert [slow.check(frame, t) for t in (0, 0.5)] == [None, None]


@pytest.mark.parametrize(
    ("frame", "kind"),
    [
        (np.zeros((120, 160, 3), np.uint8), "black"),
        (np.full((120, 160, 3), 200, np.uint8), "featureless"),
        (np.random.default_rng(0).integers(0, 256, (120, 160, 3)).astype(np.uint8), "garbage"),
        (np.random.default_rng(0).integers(0, 12, (120, 160, 3)).astype(np.uint8), "featureless"),
    ],
    ids=["black", "white", "noise", "dark noise"],
)
def test_frames_without_a_picture(frame, kind):
    assert FrameHealth().check(frame, 0.0).kind == kind


def test_pictures_of_heads_also_near_infrared_ones_are_no_fault(repo):
    archive = repo / "calibration" / "rendered-validation.zip"
    samples = read_rendered(archive).samples[:60]
    health = FrameHealth()
    assert [s.name for i, s in enumerate(samples) if health.check(s.load(), i / 30)] == []


# --- sources --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("rtsp://driver:secret@10.0.0.5:554/s", "rtsp://driver:***@10.0.0.5:554/s"),
        ("http://driver:secret@10.0.0.5/v.mjpg", "http://driver:***@10.0.0.5/v.mjpg"),
        ("rtsp://driver:se@cret@10.0.0.5/s", "rtsp://driver:***@10.0.0.5/s"),
        ("rtspsrc user-id=a user-pw=secret ! appsink", "rtspsrc user-id=a user-pw=*** ! appsink"),
        ('rtspsrc user-pw="se cret" ! appsink', "rtspsrc user-pw=*** ! appsink"),
        ("http://10.0.0.5:8080/video.mjpg", "http://10.0.0.5:8080/video.mjpg"),
        ("rtsp://driver:se/cret@10.0.0.5/s", "rtsp://driver:***@10.0.0.5/s"),
        ("http://10.0.0.5/v?access_token=secret", "http://10.0.0.5/v?access_token=***"),
        ("http://10.0.0.5/v?u=a&PWD=secret", "http://10.0.0.5/v?u=a&PWD=***"),
    ],
)
def test_passwords_are_never_shown(text, shown):
    assert without_password(text) == shown == without_password(shown)
    assert without_password(f"{shown}: words") == f"{shown}: words"
    if "://" in text:
        with pytest.raises(UsageError, match="gstreamer") as caught:
            parse_source(text)
        assert "cret" not in str(caught.value) and shown in str(caught.value)


def test_a_camera_is_named_by_number_path_or_id(tmp_path, monkeypatch):
    opened = []

    class Device:
        def isOpened(self):  # noqa: N802
            return True

    monkeypatch.setattr(
        "edgehp.runtime.sources.cv2.VideoCapture", lambda *a: opened.append(a) or Device()
    )
    by_id = tmp_path / "usb-cam-video-index0"
    monkeypatch.setattr("edgehp.runtime.sources._CAMERA_LINKS", (tmp_path,))
    source = parse_source("camera:usb-cam-video-index0")
    with pytest.raises(EnvironmentalError, match=r"there is no .*index0\nhint: a camera is"):
        source.open()
    by_id.touch()  # it was plugged in
    source.open()
    parse_source(f"camera:{by_id}").open()
    parse_source("camera:2").open()
    assert opened == [(str(by_id), cv2.CAP_V4L2), (str(by_id), cv2.CAP_V4L2), (2,)]
    assert source.live and parse_source("/dev/video63").live
    with pytest.raises(UsageError, match="expected a camera"):
        parse_source("camera:")
    with pytest.raises(DataError, match="camera:0"):
        parse_source("0")


def test_a_film_whose_name_is_no_utf8_is_refused(tmp_path):
    """OpenCV would crash."""
    path = os.fsencode(tmp_path) + b"/f\xefm.avi"
    Path(os.fsdecode(path)).write_bytes(b"RIFF")
    with pytest.raises(DataError, match="UTF-8"):
        parse_source(os.fsdecode(path))


def test_a_film_without_usable_times_is_counted_and_said(tmp_path, caplog):
    path = tmp_path / "a.avi"
    film = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 25, (64, 48))
    for i in range(5):
        film.write(np.full((48, 64, 3), 40 * i, np.uint8))
    film.release()
    data = bytearray(path.read_bytes())
    scale = data.index(b"strh") + 8 + 20
    data[scale : scale + 8] = (1).to_bytes(4, "little") + (10**9).to_bytes(4, "little")
    path.write_bytes(data)
    times = [frame.seconds for frame in parse_source(str(path)).frames()]
    assert times == pytest.approx([i / 30 for i in range(5)], abs=1e-6)
    (said,) = caplog.messages
    assert "counting on at 30 frames a second" in said
    path.write_bytes(b"")
    with pytest.raises(DataError, match="an empty file, expected a video"):
        parse_source(str(path))


def test_the_depth_that_is_told_is_that_of_a_cameras_frames_too():
    class Camera:
        def read(self):
            return True, np.full((48, 64), 512, np.uint16)

        def release(self):
            pass

    source = replace(parse_source("camera:0", bits=10), open=Camera)
    frame = next(source.frames())
    assert frame.photo is not None and np.all(frame.photo == 128)


def test_without_gstreamer_the_reason_is_said():
    if re.search(r"GStreamer: +YES", cv2.getBuildInformation()):
        pytest.skip("this OpenCV has GStreamer")
    with pytest.raises(EnvironmentalError, match="built without GStreamer"):
        parse_source("gstreamer:videotestsrc ! videoconvert ! appsink")


# --- a camera that is not there -------------------------------------------------------------------


def test_a_lasting_fault_is_said_at_growing_intervals_and_another_at_once():
    complaints = Complaints()
    said = [t for t in range(0, 20_000, 5) if complaints.due("gone", t)]
    assert said[:4] == [0, 60, 180, 420] and max(b - a for a, b in pairwise(said)) == 3600
    assert complaints.due("frozen", 20_000) and not complaints.due("gone", 20_000)
    # After a while without it, it is news.
    assert complaints.due("gone", 20_100)
    # Words that are new each time fill no memory.
    assert all(complaints.due(f"pts {n}", 20_100 + n) for n in range(100))
    assert len(complaints._said) < 20


@pytest.mark.parametrize("reason", ["camera:0 cannot be opened", "no such device"])
def test_a_camera_that_is_not_there_is_one_warning_with_its_name_once(caplog, reason):
    opened = []

    def open_camera():
        opened.append(None)
        raise EnvironmentalError(reason)

    source = Source("camera:0", True, open_camera)
    with CaptureThread(source, CaptureSettings(retry_first=0.001, retry_longest=0.01)):
        wait_for(lambda: len(opened) > 5)
    (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert warning.startswith("camera:0") and warning.count("camera:0") == 1
    assert reason in warning and "trying again" in warning and "0.01 s" in warning


# --- tracking -------------------------------------------------------------------------------------


def scene(shift=(0.0, 0.0), scale: float = 1.0) -> np.ndarray:
    """A textured picture 480 wide, moved and scaled about (200, 130)."""
    rng = np.random.default_rng(3)
    noise = rng.uniform(0, 255, (270, 480)).astype(np.float32)
    base = cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 3), None, 0, 255, cv2.NORM_MINMAX)
    m = np.array(
        [[scale, 0, 200 * (1 - scale) + shift[0]], [0, scale, 130 * (1 - scale) + shift[1]]]
    )
    return cv2.warpAffine(base, m, (480, 270)).astype(np.uint8)


def test_a_box_goes_with_the_picture_inside_it():
    box = Box(150, 80, 250, 180)
    moved = carry(box, scene(), scene((6, -4), 1.04), 1.0)
    assert vars(moved) == pytest.approx(
        {"x_min": 154, "y_min": 74, "x_max": 258, "y_max": 178}, abs=1.0
    )
    # The same at a quarter of the frame's size.
    large = carry(Box(600, 320, 1000, 720), scene(), scene((6, -4)), 0.25)
    assert (large.x_min, large.y_min) == pytest.approx((624, 304), abs=3)


def test_a_box_without_anything_to_follow_is_lost():
    other = np.random.default_rng(9).integers(0, 255, (270, 480)).astype(np.uint8)
    assert carry(Box(150, 80, 250, 180), scene(), other, 1.0) is None
    assert carry(Box(-300, -300, -200, -200), scene(), scene(), 1.0) is None


class Detector:
    """Finds the face where the test says, and counts."""

    def __init__(self, box: Box | None):
        self.box, self.sizes = box, []

    def detect(self, photo):
        self.sizes.append(photo.shape[1])
        return [] if self.box is None else [DetectedFace(self.box, 0.9)]


def test_the_detector_is_asked_now_and_then_and_near_the_face_only():
    whole, near = Detector(Box(150, 80, 250, 180)), Detector(Box(60, 60, 160, 160))
    tracker = FaceTracker(Detection(whole, near), every=5)
    photo = cv2.cvtColor(scene(), cv2.COLOR_GRAY2RGB)
    faces = [tracker.update(photo) for _ in range(12)]
    assert [f.detected for f in faces] == [True, *[False] * 4, True, *[False] * 4, True, False]
    assert whole.sizes == [480] and near.sizes == pytest.approx([220, 220], abs=2)
    # Near the face the detector sees a part that begins at (90, 20): the same place.
    assert overlap(faces[-1].box, network_box(Box(150, 80, 250, 180))) > 0.95
    tracker.doubt()
    assert tracker.update(photo).detected


def test_a_face_that_the_detector_no_longer_sees_is_given_up():
    whole, near = Detector(Box(150, 80, 250, 180)), Detector(None)
    tracker = FaceTracker(Detection(whole, near), every=3, patience=2)
    photo = cv2.cvtColor(scene(), cv2.COLOR_GRAY2RGB)
    there = [tracker.update(photo) is not None for _ in range(6)]
    assert there == [True, True, True, True, False, True] and len(near.sizes) == 2


def held_tracker():
    """(event, detection, tracker): the first detection answers only after the event is set."""
    hold = threading.Event()

    class Slow(Detector):
        def detect(self, photo):
            hold.wait(20)
            return super().detect(photo)

    detection = Detection(Slow(Box(150, 80, 250, 180)), Detector(None), beside=True)
    return hold, detection, FaceTracker(detection)


def test_no_frame_is_kept_once_the_detector_has_answered():
    """At 1080p each is 6 MB: the process seemed to grow by the frames that happened to be kept."""
    hold, detection, tracker = held_tracker()
    photos = [cv2.cvtColor(scene(), cv2.COLOR_GRAY2RGB) for _ in range(3)]
    kept = [weakref.ref(p) for p in photos]
    tracker.update(photos[0])
    hold.set()
    wait_for(lambda: detection._answer.done())
    tracker.update(photos[1])
    tracker.reset()
    tracker.update(photos[2])
    wait_for(lambda: detection._answer.done())
    del photos
    wait_for(lambda: not any(ref() is not None for ref in kept))
    tracker.close()


def test_a_detection_that_comes_late_is_carried_to_the_newest_frame():
    hold, detection, tracker = held_tracker()
    photos = [cv2.cvtColor(scene((2.0 * i, 0)), cv2.COLOR_GRAY2RGB) for i in range(6)]
    assert [tracker.update(p) for p in photos[:4]] == [None] * 4
    hold.set()
    wait_for(lambda: detection._answer.done())
    face = tracker.update(photos[4])
    tracker.close()
    assert face.detected and overlap(face.box, network_box(Box(158, 80, 258, 180))) > 0.95


def test_the_tracker_says_whether_anything_has_looked_for_a_face_yet():
    hold, detection, tracker = held_tracker()
    photo = cv2.cvtColor(scene(), cv2.COLOR_GRAY2RGB)
    assert tracker.update(photo) is None and not tracker.looked
    # The answer to a question from before a loss says nothing about the present. A camera that
    # stays stuck resets with every frame.
    tracker.reset()
    tracker.reset()
    hold.set()
    wait_for(lambda: detection._answer.done())
    assert tracker.update(photo) is None and not tracker.looked
    assert tracker.update(photo) is None and not tracker.looked  # it is asked now
    wait_for(lambda: detection._answer.done())
    assert tracker.update(photo) is not None and tracker.looked
    # A face that cannot be used was looked for all the same.
    tracker.lose()
    assert tracker.looked
    # A picture of another size is another camera's.
    hold.clear()
    tracker.update(photo)
    tracker.update(photo[:200, :300].copy())
    assert not tracker.looked
    hold.set()
    tracker.close()


@pytest.mark.parametrize("error", [cv2.error("broken"), EnvironmentalError("broken")])
def test_a_detector_that_fails_is_an_error_and_not_an_empty_car(error):
    class Failing(Detector):
        def detect(self, photo):
            raise error

    failing = Failing(None), Failing(None)
    photo = cv2.cvtColor(scene(), cv2.COLOR_GRAY2RGB)
    with pytest.raises(EnvironmentalError):
        FaceTracker(Detection(*failing)).update(photo)
    tracker = FaceTracker(Detection(*failing, beside=True))

    def fails() -> bool:
        try:
            return tracker.update(photo) is not None
        except EnvironmentalError:
            return True

    wait_for(fails)
    tracker.close()


# --- settings -------------------------------------------------------------------------------------


def test_the_settings_shown_in_the_documentation_are_the_defaults(repo, tmp_path):
    text = (repo / "docs" / "runtime.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "run.toml").write_text(block)
    assert load_settings(tmp_path / "run.toml") == Settings()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[filter]\nmin_cutof = 1", "min_cutof"),
        ("[filter]\nmin_cutoff = 0", "min_cutoff"),
        ("[filter]\nbeta = -1", "beta"),
        ("[capture]\ngrey = 1", "bool"),
        ("[capture]\nrotate = 45", "rotate"),
        ("[capture]\nstale = 900", "stale.*900"),
        ("[capture]\nstale = 5", "stale is 5 s; expected at most lost"),
        ("[tracking]\nevery = 2.5", "int"),
        ("capture = 3", "capture"),
        ("[distraction]\nback = 1", "distraction"),
        ("[capture", "TOML"),
    ],
)
def test_a_mistake_in_the_settings_is_named(tmp_path, text, words):
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(DataError, match=words) as caught:
        load_settings(tmp_path / "run.toml")
    assert "run.toml" in str(caught.value)


# --- output ---------------------------------------------------------------------------------------


@pytest.fixture
def folder():
    # A socket's path has room for 107 bytes only; pytest's own folders are too deep.
    with tempfile.TemporaryDirectory(dir="/tmp") as path:
        yield Path(path)


def connect(path: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.connect(str(path))
    client.settimeout(20)
    return client


def read_all(client: socket.socket) -> list[dict]:
    data = bytearray()
    while part := client.recv(65536):
        data += part
    return [json.loads(text) for text in data.decode().splitlines()]


def test_a_reader_that_never_reads_costs_the_others_nothing(folder):
    sink = SocketSink(folder / "s")
    fast, slow = connect(folder / "s"), connect(folder / "s")
    sink.pump()
    got: list[dict] = []
    reader = threading.Thread(target=lambda: got.extend(read_all(fast)))
    reader.start()
    count, padding = 4000, "x" * 400
    for i in range(count):
        sink.write(json.dumps({"type": "frame", "i": i, "p": padding}).encode() + b"\n")
        # The fast reader is given time; nothing gives any to the slow one.
        if i % 50 == 0:
            wait_for(lambda: sink.pump() or not sink._readers[0].waiting)
    wait_for(lambda: sink.pump() or not sink._readers[0].waiting)
    assert sink.dropped > 0 and len(sink._readers) == 2
    late: list[dict] = []
    catching_up = threading.Thread(target=lambda: late.extend(read_all(slow)))
    catching_up.start()
    wait_for(lambda: sink.pump() or not sink._readers[1].waiting)
    sink.write(b'{"type":"frame","i":-1}\n')
    wait_for(lambda: sink.pump() or not any(r.waiting for r in sink._readers))
    sink.close()
    reader.join(20)
    catching_up.join(20)
    fast.close()
    slow.close()
    assert [r["i"] for r in got] == [*range(count), -1]
    missed = sum(r["lines"] for r in late if r["type"] == "missed")
    assert missed == sink.dropped and len(late) - 1 + missed == count + 1
    assert late[-1]["i"] == -1 and not (folder / "s").exists()


def test_the_socket_is_the_owner_s_and_replaces_only_what_nobody_uses(folder):
    path = folder / "s"
    sink = SocketSink(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(EnvironmentalError, match="another process"):
        SocketSink(path)
    assert path.exists()
    sink.close()
    dead = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    dead.bind(str(path))
    dead.close()
    SocketSink(path).close()
    path.write_text("mine")
    with pytest.raises(EnvironmentalError, match="no socket"):
        SocketSink(path)
    assert path.read_text() == "mine"
    with pytest.raises(EnvironmentalError, match="107"):
        SocketSink(folder / ("s" * 200))


def test_a_reader_that_leaves_is_forgotten(folder):
    sink = SocketSink(folder / "s")
    client = connect(folder / "s")
    sink.pump()
    assert len(sink._readers) == 1
    client.close()
    for _ in range(3):
        sink.write(b"{}\n")
    assert len(sink._readers) == 0
    sink.close()


def test_a_pipe_that_nobody_reads_drops_the_oldest_and_never_waits():
    read, write = os.pipe()
    sink = PipeSink(write)
    for i in range(20_000):
        sink.write(b'{"i":%d}\n' % i)
    assert sink.dropped > 0 and not sink.broken
    os.close(read)
    wait_for(lambda: sink.write(b"{}\n") or sink.broken)
    sink.close()
    os.close(write)


def test_a_lossless_pipe_waits_for_its_reader():
    read, write = os.pipe()
    sink = PipeSink(write, lossless=True)
    lines: list[bytes] = []

    def run() -> None:
        with os.fdopen(read, "rb") as file:
            lines.extend(file)

    reader = threading.Thread(target=run)
    reader.start()
    for i in range(20_000):
        sink.write(b"%d\n" % i)
    sink.close()
    os.close(write)
    reader.join(20)
    assert lines == [b"%d\n" % i for i in range(20_000)] and sink.dropped == 0


# --- watchdog and counters ------------------------------------------------------------------------


@pytest.mark.parametrize("abstract", [False, True], ids=["file", "abstract"])
def test_the_service_manager_hears_ready_life_and_stop(folder, abstract):
    name = f"@{folder.name}" if abstract else str(folder / "n")
    server = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    server.bind("\0" + name[1:] if abstract else name)
    server.settimeout(20)
    dog = Watchdog({"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "20000"})
    assert dog.enabled and dog.interval == pytest.approx(0.01)
    dog.ready("reading\nMAINPID=1")
    dog.alive()
    dog.alive()  # too soon for another
    dog.stopping()
    assert [server.recv(100) for _ in range(3)] == [
        b"READY=1\nSTATUS=reading MAINPID=1",
        b"WATCHDOG=1",
        b"STOPPING=1",
    ]
    server.close()
    dog.stopping()  # nobody listens any more: no exception
    dog.close()


def test_without_a_service_manager_or_for_another_process_nothing_is_sent():
    assert not Watchdog({}).enabled and Watchdog({"WATCHDOG_USEC": "x"}).interval is None
    other = {"WATCHDOG_USEC": "1000000", "WATCHDOG_PID": str(os.getpid() + 1)}
    assert Watchdog(other).interval is None


def test_counters_are_served_on_loopback_only():
    pytest.importorskip("prometheus_client")
    metrics = Metrics(0)
    try:
        metrics.result("ok", 0.02)
        metrics.result("camera_lost", None)
        metrics.totals({"dropped": 4})
        metrics.totals({"dropped": 7})
        assert metrics._server.server_address[0] == "127.0.0.1"
        with urllib.request.urlopen(f"http://127.0.0.1:{metrics.port}/metrics", timeout=20) as page:
            text = page.read().decode()
        with pytest.raises(EnvironmentalError, match="another port"):
            Metrics(metrics.port)
    finally:
        metrics.close()
    assert 'edgehp_records_total{state="camera_lost"} 1.0' in text
    assert "edgehp_dropped_total 7.0" in text
    assert "edgehp_latency_seconds_count 1.0" in text


def test_without_the_package_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "prometheus_client", None)
    with pytest.raises(EnvironmentalError, match=r"\[runtime\]'"):
        Metrics(0)
