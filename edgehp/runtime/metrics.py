"""Counters for Prometheus on the loopback interface; needs the package ``prometheus-client``."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Protocol

from edgehp._installed import install_extra
from edgehp.errors import EnvironmentalError

__all__ = ["Metrics", "NoMetrics", "PrometheusMetrics"]

# Never another interface: the numbers say when somebody drives.
_LOOPBACK = "127.0.0.1"
_BUCKETS = (0.005, 0.01, 0.02, 0.033, 0.05, 0.067, 0.1, 0.2, 0.3, 0.5, 1.0)


class Metrics(Protocol):
    """Takes what the loop counts."""

    def result(self, state: str, latency: float | None) -> None:
        """One record with its state; for a frame also its latency in seconds."""

    def event(self, event: str) -> None:
        """One distraction event."""

    def totals(self, values: Mapping[str, int]) -> None:
        """Counts since the start, by name."""

    def close(self) -> None:
        """Stop serving."""


class NoMetrics:
    """Counts nothing."""

    def result(self, state: str, latency: float | None) -> None:
        """Nothing."""

    def event(self, event: str) -> None:
        """Nothing."""

    def totals(self, values: Mapping[str, int]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class PrometheusMetrics:
    """Serves http://127.0.0.1:PORT/metrics."""

    def __init__(self, port: int) -> None:
        """Start serving.

        Args:
            port: 1..65535; 0 takes a free one (see `port`).

        Raises:
            EnvironmentalError: the package is missing or the port is taken.
        """
        try:
            client = importlib.import_module("prometheus_client")
        except ImportError as e:
            raise EnvironmentalError(
                "--metrics needs the package prometheus-client; install it with "
                f"{install_extra('runtime')}"
            ) from e
        # A registry of its own: the default one is the whole process's.
        registry = client.CollectorRegistry()
        self._records: Any = client.Counter(
            "edgehp_records", "Records by state", ["state"], registry=registry
        )
        self._events: Any = client.Counter(
            "edgehp_events", "Distraction events", ["event"], registry=registry
        )
        self._latency: Any = client.Histogram(
            "edgehp_latency_seconds",
            "From the end of reading a frame to its result",
            buckets=_BUCKETS,
            registry=registry,
        )
        self._totals: Any = client.Gauge(
            "edgehp_total", "Counts since the start", ["name"], registry=registry
        )
        try:
            self._server, self._thread = client.start_http_server(
                port, addr=_LOOPBACK, registry=registry
            )
        except OSError as e:
            raise EnvironmentalError(
                f"--metrics {port}: cannot listen on {_LOOPBACK}:{port} ({e.strerror or e}); "
                "give another port"
            ) from e
        self.port: int = self._server.server_port

    def result(self, state: str, latency: float | None) -> None:
        """Count the record."""
        self._records.labels(state).inc()
        if latency is not None:
            self._latency.observe(latency)

    def event(self, event: str) -> None:
        """Count the event."""
        self._events.labels(event).inc()

    def totals(self, values: Mapping[str, int]) -> None:
        """Set the counts."""
        for name, value in values.items():
            self._totals.labels(name).set(value)

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(2.0)
