"""The settings of `edgehp run`, and the TOML file they are read from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta

from edgehp.files import Record, read_toml

Positive = Annotated[float, Meta(gt=0)]
# Seconds. More is a time in milliseconds: a camera would never be called late or lost.
Seconds = Annotated[float, Meta(gt=0, le=600)]
NotNegative = Annotated[float, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, le=1)]
Count = Annotated[int, Meta(ge=1)]


class CaptureSettings(Record, frozen=True):
    """When frames are late, stuck or lost (seconds), and how they are taken.

    Attributes:
        stale: the newest frame is older than this: ``stale_frame``. Also a result that took longer.
        lost: no frame for so long: ``camera_lost``.
        hang: opening or reading has not come back for so long: the process ends, as nothing else
            frees a driver; the service manager starts it again.
        frozen: identical frames over so long: ``stuck_camera``.
        reopen: a camera stuck for so long is closed and opened again.
        retry_first: pause before a lost camera is opened again; doubled each time.
        retry_longest: the longest such pause.
        heartbeat: a state that lasts is told again so often.
        bit_depth: significant bits of frames with 16 bits a pixel; None: 16 where a pixel uses the
            highest bit, else such frames are refused until it is told.
        grey: turn color into grey: a near-infrared sensor behind a color driver.
        rotate: degrees clockwise by which frames are turned, for a camera that is mounted so.
    """

    stale: Seconds = 0.3
    lost: Seconds = 0.8
    hang: Seconds = 15.0
    frozen: Seconds = 0.4
    reopen: Seconds = 5.0
    retry_first: Seconds = 0.2
    retry_longest: Seconds = 5.0
    heartbeat: Seconds = 1.0
    bit_depth: Annotated[int, Meta(ge=8, le=16)] | None = None
    grey: bool = False
    rotate: Literal[0, 90, 180, 270] = 0

    def __post_init__(self) -> None:
        """Refuse times that contradict each other."""
        for first, second in (("stale", "lost"), ("retry_first", "retry_longest")):
            if getattr(self, first) > getattr(self, second):
                raise ValueError(
                    f"{first} is {getattr(self, first):g} s; expected at most {second}, which is "
                    f"{getattr(self, second):g} s"
                )


class TrackingSettings(Record, frozen=True):
    """How the face is found.

    Attributes:
        every: frames between detections.
        patience: detections in a row that may miss a tracked face.
        min_face_score: least score of a detected face.
        min_confidence: less is ``low_confidence``.
    """

    every: Count = 15
    patience: Count = 2
    min_face_score: Share = 0.5
    min_confidence: Share = 0.5


class FilterSettings(Record, frozen=True):
    """Of `edgehp.runtime.filter.RotationFilter`.

    Attributes:
        min_cutoff: cut-off of a resting head, Hz; less is calmer and slower.
        beta: rise of the cut-off with speed, Hz per degree per second; more trails less.
        speed_cutoff: cut-off of the speed's own low-pass, Hz.
        reset_after: seconds without a sample after which the history is forgotten.
    """

    min_cutoff: Positive = 1.0
    beta: NotNegative = 0.1
    speed_cutoff: Positive = 1.0
    reset_after: Seconds = 0.5


class Settings(Record, frozen=True):
    """Everything that may be set in the file."""

    capture: CaptureSettings = CaptureSettings()
    tracking: TrackingSettings = TrackingSettings()
    filter: FilterSettings = FilterSettings()


def load_settings(path: Path) -> Settings:
    """Read a settings file; what it does not say keeps its default.

    Raises:
        DataError: it is missing, is no TOML, or has a key or value that is not known.
    """
    return read_toml(path, Settings)
