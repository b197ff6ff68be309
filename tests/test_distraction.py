"""The example on top of the runtime's lines: when looking away is a distraction."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time

import pytest

from edgehp.crop import Box
from edgehp.pose import matrix_from_euler
from edgehp.runtime.capture import CapturedFrame
from edgehp.runtime.records import Pose, frame_record, json_line, status_record

DOWN, AHEAD = (-35.0, 0.0, 0.0), (0.0, 0.0, 0.0)


@pytest.fixture(scope="module")
def example(repo):
    spec = importlib.util.spec_from_file_location("distraction", repo / "examples/distraction.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["distraction"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["distraction"]


def lines(poses, step: float = 0.04) -> list[bytes]:
    """The runtime's lines of (angles, seconds) one after the other; angles None: no face."""
    found, now = [], 0.0
    for angles, seconds in poses:
        for _ in range(round(seconds / step)):
            now += step
            at = int(now * 1e9)
            frame = CapturedFrame(len(found) + 1, None, at, at, now)
            state = "no_face" if angles is None else "ok"
            pose = Pose() if angles is None else Pose(Box(0, 0, 9, 9), False, angles, angles)
            found.append(json_line(frame_record(frame, at, state, None, pose, 0)))
    return found


def drive(example, speed, poses, rules=None):
    monitor = example.Monitor(rules or example.Rules())
    return list(example.events(lines(poses), monitor, example.Speed(speed)))


@pytest.mark.parametrize(
    ("speed", "after"),
    [("120", 3.5), ("50", 3.5), ("49.9", 6.0), ("20", 6.0), ("19.9", None), (None, None)],
)
def test_looking_down_is_a_distraction_after_the_time_for_the_speed(example, speed, after):
    found = drive(example, speed, [(AHEAD, 1.0), (DOWN, 8.0), (AHEAD, 1.0)])
    if after is None:
        assert found == []
        return
    start, end = found
    # Events are at most 50 ms late at 25 frames a second.
    assert start["captured_ns"] / 1e9 - 1.04 == pytest.approx(after, abs=0.05)
    assert start["event"] == "distraction_start" and start["area"] == "down"
    assert end["event"] == "distraction_end" and end["seconds"] == pytest.approx(8.2, abs=0.1)


def test_a_glance_shorter_than_back_does_not_start_anew_and_a_longer_one_does(example):
    (start,) = drive(example, "60", [(DOWN, 2.0), (AHEAD, 0.1), (DOWN, 2.0)])
    assert start["event"] == "distraction_start"
    assert drive(example, "60", [(DOWN, 2.0), (AHEAD, 0.4), (DOWN, 2.0)]) == []


def test_a_lost_face_holds_its_area_for_a_while(example):
    start, end = drive(example, "60", [(DOWN, 3.0), (None, 2.0)])
    assert start["event"] == "distraction_start" and end["reason"] == "the head pose is unknown"
    assert drive(example, "60", [(DOWN, 2.0), (None, 3.0)]) == []


def test_a_lost_camera_ends_looking_away(example):
    lost = [
        json_line(status_record("camera_lost", "gone", 0, int(t * 1e9), 0)) for t in (4.5, 5.5, 6.5)
    ]
    monitor, speed = example.Monitor(example.Rules()), example.Speed("60")
    start, end = example.events([*lines([(DOWN, 4.0)]), *lost], monitor, speed)
    assert (start["event"], end["event"]) == ("distraction_start", "distraction_end")


def test_areas_are_relative_to_straight_ahead_of_this_camera(example):
    rules = example.Rules((example.Area("left", yaw=(30, 180)),), straight_ahead=(-15, 20, 0))
    monitor, ahead = example.Monitor(rules), matrix_from_euler((-15, 20, 0))
    assert monitor.area_of(ahead) == "road"
    assert monitor.area_of(ahead @ matrix_from_euler((0, 35, 0))) == "left"
    assert monitor.area_of(matrix_from_euler((0, 35, 0))) == "road"


def test_a_speed_that_is_old_or_no_number_is_not_known(example, tmp_path):
    path = tmp_path / "speed"
    speed = example.Speed(f"file:{path}", 5.0)
    assert speed.read() is None
    path.write_text("33\n")
    assert speed.read() == 33
    # Old; and of the future, where the clock was set back since.
    for shift in (-60, 60):
        os.utime(path, (time.time() + shift, time.time() + shift))
        assert speed.read() is None
    path.write_text("fast")
    assert speed.read() is None
    path.unlink()
    os.mkfifo(path)
    assert speed.read() is None  # and does not wait for a writer
    for text in ("fast", "-3", "nan", "1e9", ""):
        with pytest.raises(ValueError, match="km/h"):
            example.Speed(text)


def test_the_script_reads_the_runtime_s_lines(repo):
    done = subprocess.run(
        [sys.executable, repo / "examples" / "distraction.py", "--speed", "60"],
        input=b"".join([*lines([(DOWN, 4.0)]), b'{"type":"end","reason":"limit"}\n']),
        capture_output=True, timeout=60, check=True,
    )  # fmt: skip
    (event,) = [json.loads(line) for line in done.stdout.splitlines()]
    assert event["event"] == "distraction_start" and event["captured"].startswith("1970-01-01T")
