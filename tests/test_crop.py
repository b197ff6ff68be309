"""The one preprocessing: geometry, colours, borders and refusals."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
from msgspec.structs import replace

from edgehp.crop import Box, Preprocessing, crop_face
from edgehp.errors import DataError, UsageError

SQUARE = Preprocessing(size=32)
STRETCH = Preprocessing(size=32, box_rule="stretch")


def ramp(width: int = 100, height: int = 80) -> np.ndarray:
    """x in the red channel, y in the green one, nothing in blue."""
    photo = np.zeros((height, width, 3), np.uint8)
    photo[..., 0] = np.arange(width)
    photo[..., 1] = np.arange(height)[:, None]
    return photo


def test_square_keeps_the_aspect_about_the_centre_of_the_box() -> None:
    crop = crop_face(ramp(), Box(30, 20, 62, 36), SQUARE)
    # The larger side is 32 pixels: x from 30, y from 12, one to one.
    assert crop[0, 0].tolist() == [30, 12, 0]
    assert crop[-1, -1].tolist() == [61, 43, 0]
    wider = crop_face(ramp(), Box(40, 30, 56, 46), replace(SQUARE, box_scale=2.0))
    assert wider[0, 0].tolist() == [32, 22, 0]
    # Without a box the whole photo is the face.
    assert crop_face(ramp(32, 32), None, SQUARE)[-1, -1].tolist() == [31, 31, 0]


def test_stretch_takes_the_box_as_it_is() -> None:
    crop = crop_face(ramp(), Box(30, 20, 62, 36), STRETCH)
    assert crop[0, 0, 0] == 30
    assert crop[0, 0, 1] == pytest.approx(20, abs=1)
    assert crop[-1, -1, 1] == pytest.approx(35, abs=1)


def test_square_repeats_the_border_outside_the_photo() -> None:
    crop = crop_face(ramp(), Box(-16, 20, 16, 52), SQUARE)
    assert set(crop[:, :17, 0].ravel()) == {0}
    assert crop[0, -1, 0] == 15


def test_stretch_is_cut_at_the_edge_of_the_photo() -> None:
    crop = crop_face(ramp(), Box(-32, 20, 32, 52), STRETCH)
    assert crop[0, 0, 0] == 0
    assert crop[0, 16, 0] == pytest.approx(16, abs=1)


def test_colours_keep_their_places_whatever_the_network_wants() -> None:
    for colour in ("RGB", "BGR"):
        crop = crop_face(ramp(), Box(60, 10, 92, 42), replace(SQUARE, colour=colour))
        assert crop[0, 0].tolist() == [60, 10, 0]


def test_shrinking_averages_areas() -> None:
    photo = np.zeros((64, 64, 3), np.uint8)
    photo[::2] = 200
    assert np.all(crop_face(photo, None, SQUARE) == 100)
    assert set(np.unique(crop_face(photo, None, replace(SQUARE, resize="linear")))) == {100}


@pytest.mark.parametrize(("size", "kernel"), [(112, cv2.INTER_AREA), (400, cv2.INTER_LINEAR)])
def test_the_pixels_are_those_of_opencv(size: int, kernel: int, rng: np.random.Generator) -> None:
    """A C++ program that calls cv::resize gets the same crop, to the last bit."""
    photo = rng.integers(0, 256, (350, 360, 3), np.uint8)
    face = photo[3 : 3 + 321, 5 : 5 + 300]
    found = crop_face(photo, Box(5, 3, 305, 324), Preprocessing(size, box_rule="stretch"))
    assert np.array_equal(found, cv2.resize(face, (size, size), interpolation=kernel))


@pytest.mark.parametrize(
    ("box", "message"),
    [
        (Box(200, 200, 250, 250), "0% of the face box .* is inside the photo of 100x80"),
        (Box(50, 50, 50, 60), "empty"),
        (Box(0.2, 0.3, 0.6, 0.9), "0.4 x 0.6 pixels, expected 6 at least"),
        (Box(float("nan"), 0, 10, 10), "not finite"),
        (Box(-200, -200, 300, 300), "3% of the face box .* is inside the photo of 100x80"),
        (Box(0, 0, 1e9, 1e9), "beyond any photo"),
    ],
)
def test_boxes_that_hold_no_face_are_refused(box: Box, message: str) -> None:
    with pytest.raises(DataError, match=message):
        crop_face(ramp(), box, SQUARE)


@pytest.mark.parametrize(
    "photo", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8, 3))]
)
def test_what_is_no_rgb_photo_is_refused(photo: np.ndarray) -> None:
    with pytest.raises(DataError, match="uint8 RGB"):
        crop_face(photo, None, SQUARE)


def test_every_field_changes_the_digest() -> None:
    changes = [
        {"size": 64},
        {"colour": "BGR"},
        {"mean": (0.0, 0.0, 0.0)},
        {"std": (1.0, 1.0, 1.0)},
        {"resize": "linear"},
        {"box_rule": "stretch"},
        {"box_scale": 1.1},
    ]
    digests = {replace(SQUARE, **change).digest for change in changes} | {SQUARE.digest}
    assert len(digests) == len(changes) + 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 4}, "16..1024"),
        ({"colour": "HSV"}, "HSV"),
        ({"mean": (1.0,)}, "3 values"),
        ({"std": (0.0, 1.0, 1.0)}, "positive"),
        ({"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}, "multiply .* by 255"),
        ({"resize": "lanczos"}, "lanczos"),
        ({"box_rule": "tight"}, "tight"),
        ({"box_scale": 0.0}, "0.1"),
        ({"box_scale": float("nan")}, "finite"),
        ({"mean": ("1", "2", "3")}, "mean"),
        ({"std": (1.0, 1.0, float("nan"))}, "std"),
    ],
)
def test_specifications_that_make_no_sense_are_refused(change: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(SQUARE, **change)


def test_a_moved_box_moves_by_its_larger_side() -> None:
    box = Box(10, 10, 30, 20).moved(0.5, -0.5, 2.0)
    assert (box.x_min, box.y_min, box.x_max, box.y_max) == (10, -5, 50, 15)


def test_equal_specifications_have_equal_digests() -> None:
    whole = Preprocessing(size=32, mean=(1, 2, 3), std=(4, 5, 6), box_scale=1)
    assert whole == Preprocessing(size=32, mean=(1.0, 2.0, 3.0), std=(4.0, 5.0, 6.0))
    assert whole.digest == Preprocessing.from_dict(whole.to_dict()).digest
    assert '"box_scale": 1.0' in json.dumps(whole.to_dict())
    with pytest.raises(DataError, match="gamma"):
        Preprocessing.from_dict({**SQUARE.to_dict(), "gamma": 2})
