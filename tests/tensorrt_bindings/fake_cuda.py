"""A GPU made of numpy arrays: memory, streams and graphs as `edgehp.engines.cuda` offers them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from edgehp.engines.cuda import Cuda, HostBytes
from edgehp.errors import EnvironmentalError

__all__ = ["FakeCuda"]


class FakeCuda(Cuda):
    """Executes at synchronisation what was put into a stream, as a GPU does."""

    package = "fake"
    name = "Fake GPU"
    compute_capability = "8.7"
    has_graphs = True
    waiting = "spins"

    def __init__(self) -> None:
        self.memory: dict[int, HostBytes] = {}
        self.host: list[HostBytes] = []
        self.streams: dict[int, list[Callable[[], None]]] = {}
        self.graphs: list[Any] = []
        self.launches = 0
        # Milliseconds on the GPU, which moves by a step's cost when the step is executed.
        self.clock = 0.0
        self.costs = {"upload": 0.25, "download": 0.125}
        self.events: dict[int, float | None] = {}
        self.closed = False
        self.fail_capture = False
        self._next = 0x1000
        self._capturing: int | None = None

    def put(self, stream: int, work: Callable[[], None]) -> None:
        if stream not in self.streams:
            raise EnvironmentalError(f"stream {stream} does not exist")
        self.streams[stream].append(work)

    def _new(self) -> int:
        self._next += 0x1000
        return self._next

    def activate(self) -> None:
        if self.closed:
            raise EnvironmentalError("the context is gone")

    def allocate(self, size: int) -> int:
        address = self._new()
        self.memory[address] = np.full(size, 0xCD, np.uint8)
        return address

    def free(self, address: int) -> None:
        del self.memory[address]

    def pinned(self, size: int) -> HostBytes:
        self.host.append(np.zeros(size, np.uint8))
        return self.host[-1]

    def free_pinned(self, memory: HostBytes) -> None:
        self.host = [h for h in self.host if h is not memory]

    def new_stream(self) -> int:
        stream = self._new()
        self.streams[stream] = []
        return stream

    def free_stream(self, stream: int) -> None:
        del self.streams[stream]

    def upload(self, address: int, host: HostBytes, stream: int) -> None:
        def work() -> None:
            self.memory[address][: host.nbytes] = host
            self.clock += self.costs["upload"]

        self.put(stream, work)

    def download(self, host: HostBytes, address: int, stream: int) -> None:
        def work() -> None:
            host[:] = self.memory[address][: host.nbytes]
            self.clock += self.costs["download"]

        self.put(stream, work)

    def synchronise(self, stream: int) -> None:
        if self._capturing == stream:
            raise EnvironmentalError("a stream must not be waited for while it is captured")
        work, self.streams[stream] = self.streams[stream], []
        for step in work:
            step()

    def new_event(self) -> Any:
        event = self._new()
        self.events[event] = None
        return event

    def record(self, event: Any, stream: int) -> None:
        if self._capturing == stream:
            raise EnvironmentalError("an event recorded in a graph has no time of its own")
        self.put(stream, lambda: self.events.__setitem__(event, self.clock))

    def elapsed_ms(self, start: Any, end: Any) -> float:
        before, after = self.events[start], self.events[end]
        if before is None or after is None:
            raise EnvironmentalError("an event that was never reached has no time")
        return after - before

    def free_event(self, event: Any) -> None:
        del self.events[event]

    def capture(self, stream: int, work: Callable[[], None]) -> Any:
        if self.fail_capture:
            raise EnvironmentalError("capture is not permitted here")
        self._capturing = stream
        try:
            work()
        finally:
            self._capturing = None
        graph, self.streams[stream] = self.streams[stream], []
        self.graphs.append(graph)
        return graph

    def launch(self, graph: Any, stream: int) -> None:
        self.launches += 1
        for step in graph:
            self.put(stream, step)

    def free_graph(self, graph: Any) -> None:
        self.graphs = [g for g in self.graphs if g is not graph]

    def close(self) -> None:
        self.closed = True
