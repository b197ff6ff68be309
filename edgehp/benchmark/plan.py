"""What a user asks a benchmark for, in plain data that also goes into the report."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from edgehp.errors import UsageError

__all__ = ["DEFAULT_DURATION_S", "HEADLINE", "OFFICIAL_DURATION_S", "SCENARIOS", "Plan"]

# The headline percentile of a scenario, after MLPerf Inference; None: throughput alone.
HEADLINE = {"single-stream": 90.0, "offline": None, "multi-camera": 99.0}
SCENARIOS = tuple(HEADLINE)
DEFAULT_DURATION_S = 60.0
OFFICIAL_DURATION_S = 600.0


@dataclass(frozen=True)
class Plan:
    """One benchmark.

    Attributes:
        scenario: one of `SCENARIOS`.
        duration_s: measured seconds of each network.
        official: the long run, and no setting that shortens it.
        batch: crops a call; None lets ``offline`` look for the best and means 1 elsewhere.
        threads: processor threads of the engine; None leaves it to the runtime.
        wait: how the processor waits for a GPU, see `edgehp.engines.open_engine`.
        cameras: of ``multi-camera``.
        fps: frames a second of each camera.
        workers: threads that crop and resize in ``offline``.
        warm_up_s: the longest a network may take to become stable.
        idle_s: seconds over which idle power is measured.
        slice_s: networks take turns after this many seconds.
    """

    scenario: str = "single-stream"
    duration_s: float = DEFAULT_DURATION_S
    official: bool = False
    batch: int | None = None
    threads: int | None = None
    wait: str = "auto"
    cameras: int = 4
    fps: float = 30.0
    workers: int = 1
    warm_up_s: float = 30.0
    idle_s: float = 10.0
    slice_s: float = 2.0

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        if self.scenario not in SCENARIOS:
            raise UsageError(
                f"found the scenario {self.scenario!r}, expected one of {', '.join(SCENARIOS)}"
            )
        for words, value, low, high in (
            ("--duration", self.duration_s, 0.1, 86_400.0),
            ("--fps", self.fps, 0.1, 1000.0),
            ("--warm-up", self.warm_up_s, 0.0, 3600.0),
            ("--idle", self.idle_s, 0.0, 3600.0),
            ("a turn", self.slice_s, 0.05, 600.0),
            ("--batch", self.batch, 1, 4096),
            ("--cameras", self.cameras, 1, 256),
            ("--workers", self.workers, 1, 64),
        ):
            # NaN is in no range.
            if value is not None and not low <= value <= high:
                raise UsageError(f"{words}: found {value:g}, expected {low:g} to {high:g}")
        if self.official and self.duration_s < OFFICIAL_DURATION_S:
            raise UsageError(
                f"an official run takes at least {OFFICIAL_DURATION_S:g} s, "
                f"{self.duration_s:g} s asked for: leave out --duration or --official"
            )

    @property
    def headline(self) -> float | None:
        """The headline percentile of the scenario."""
        return HEADLINE[self.scenario]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        values = asdict(self)
        if self.scenario != "multi-camera":
            values["cameras"] = values["fps"] = None
        return {**values, "headline_percentile": self.headline}


def slice_seconds(duration_s: float, scenario: str, meter_period_s: float | None) -> float:
    """How long a network runs before the other takes its turn.

    Short enough that both see the same heat and the same neighbours, long enough for many
    inferences, and for twenty samples of the power meter, so that what it smears over the edge of
    a slice is small.
    """
    shortest = 1.0 if scenario == "offline" else 0.5
    if meter_period_s is not None:
        shortest = max(shortest, 20 * meter_period_s)
    return min(max(duration_s / 20, shortest), 5.0, duration_s)
