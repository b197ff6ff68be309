"""One CUDA stream of an engine: its memory, contexts and graphs, and what is put into it.

Everything of a batch goes through the stream in order: the crops to the GPU (or the parts of frames
and the crop kernel), the engine, the answers back. On an integrated GPU the pinned memory is what
the engine reads and writes, and nothing is copied.

For the batch sizes in use the whole of it is captured once as a CUDA graph, which saves the
processor most of the launching. An execution context must not change after its work was captured
(https://docs.nvidia.com/deeplearning/tensorrt/latest/performance/best-practices.html, "CUDA
Graphs"), so each graph has a context of its own, and other batch sizes go through one more, which
captures nothing. Parts of frames differ in size from call to call: they are sent before the graph.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgehp.engines.base import INPUT_NAME, OUTPUT_NAMES, Crops, StageTimes
from edgehp.engines.cuda import Buffer, Cuda, GpuLostError
from edgehp.engines.gpu_crop import CropKernel, Load
from edgehp.engines.trt import need
from edgehp.errors import EnvironmentalError

if TYPE_CHECKING:
    # Checked where the package tensorrt-stubs is installed.
    from tensorrt import IExecutionContext

_log = logging.getLogger(__name__)
_ROW_BYTES = 3 * 4
# Marks in the stream: begin, after the upload, the crop kernel, the engine, the download.
_BEGIN, _UPLOADED, _CROPPED, _INFERRED, _DOWNLOADED = range(5)


@dataclass(frozen=True)
class Shapes:
    """What the engine takes.

    Attributes:
        side: of the crops in pixels.
        smallest: batch size.
        best: batch size.
        largest: batch size.
        answers: outputs, of `OUTPUT_NAMES`.
    """

    side: int
    smallest: int
    best: int
    largest: int
    answers: tuple[str, ...] = OUTPUT_NAMES

    @property
    def crop_bytes(self) -> int:
        """Of one crop."""
        return self.side * self.side * 3


@dataclass(eq=False)
class _Lane:
    """One execution context, the batch size it is set to, and the graph captured of it if any."""

    context: IExecutionContext
    batch: int = 0
    graph: Any = None


class GpuStream:
    """Takes one batch at a time: `put`, then `take`.

    Every method needs `Cuda.current`.

    Args:
        cuda: the GPU.
        shapes: of the engine.
        new_context: makes an execution context.
        logger: TensorRT's, for the reason of a failure.
        batch: the batch size to prepare for; None for the largest, without graphs.
        captures: whether CUDA graphs are to be captured.

    Attributes:
        graph_batches: batch sizes that run as CUDA graphs.
    """

    def __init__(
        self,
        cuda: Cuda,
        shapes: Shapes,
        new_context: Callable[[], IExecutionContext],
        logger: Any,
        *,
        batch: int | None,
        captures: bool,
    ) -> None:
        self._cuda, self._shapes, self._logger = cuda, shapes, logger
        self._new_context = new_context
        self._buffers: dict[str, Buffer] = {}
        self._frames: Buffer | None = None
        self._events: list[Any] = []
        self._captured: dict[tuple[int, bool, bool], _Lane] = {}
        self._plain: _Lane | None = None
        self._count, self._cropped = 0, False
        self._stream: int | None = None
        self.graph_batches: set[int] = set()
        try:
            self._prepare(batch, captures)
        except BaseException:
            self.release()
            self.close()
            raise

    def _prepare(self, batch: int | None, captures: bool) -> None:
        cuda, shapes = self._cuda, self._shapes
        self._stream = cuda.new_stream()
        sizes = {INPUT_NAME: shapes.largest * shapes.crop_bytes}
        sizes.update(dict.fromkeys(shapes.answers, shapes.largest * _ROW_BYTES))
        for name, size in sizes.items():
            self._buffers[name] = cuda.buffer(size)
        for _ in range(_DOWNLOADED + 1):
            self._events.append(cuda.new_event())
        self._plain = self._new_lane(batch or shapes.largest)
        if batch is not None and captures and cuda.has_graphs:
            wanted = (1, shapes.best, batch)
            self.graph_batches = {n for n in wanted if shapes.smallest <= n <= shapes.largest}
            for n in sorted(self.graph_batches):
                self._lane(n, False, None)

    @property
    def context(self) -> IExecutionContext:
        """The one that is never captured, for TensorRT's inspector."""
        return self._open_lane().context

    def _open_lane(self) -> _Lane:
        if self._plain is None:
            raise EnvironmentalError("the engine is closed; open it again")
        return self._plain

    def put(
        self, given: Crops | Load, kernel: CropKernel | None = None, timed: bool = False
    ) -> None:
        """Put a batch into the stream.

        Args:
            given: uint8 [N, S, S, 3], at most the engine's largest batch; or faces for the GPU to
                cut, with at least as many rows as the engine's smallest batch.
            kernel: that cuts faces.
            timed: mark its stages for `times`.
        """
        if isinstance(given, Load):
            frames = self._room(given.size)
            lane = self._lane(given.count, timed, kernel)
            given.write(frames.host)
            self._count, self._cropped = given.faces, True
            if timed:
                self._cuda.record(self._events[_BEGIN], self._handle())
            self._cuda.upload(frames, given.size, self._handle())
        else:
            # An engine built for larger batches gets whatever its memory holds as the rest.
            lane = self._lane(max(len(given), self._shapes.smallest), timed, kernel)
            self._buffers[INPUT_NAME].host[: given.nbytes] = given.reshape(-1)
            self._count, self._cropped = len(given), False
        if lane.graph is not None:
            self._cuda.launch(lane.graph, self._handle())
        else:
            self._put(lane, timed, kernel)

    def take(self) -> tuple[npt.NDArray[np.float32], ...]:
        """Wait for what was put: angles and, of bins, spreads, float32 [N, 3]."""
        self._cuda.synchronize(self._handle())
        size = self._count * _ROW_BYTES
        # Copied: the next batch overwrites the memory.
        return tuple(
            self._buffers[name].host[:size].view(np.float32).reshape(-1, 3).copy()
            for name in self._shapes.answers
        )

    def times(self) -> StageTimes:
        """What the stages of the last batch took, after `take`."""

        def between(start: int, end: int) -> float:
            return self._cuda.elapsed_ms(self._events[start], self._events[end]) / 1e3

        return StageTimes(
            between(_CROPPED if self._cropped else _UPLOADED, _INFERRED),
            between(_BEGIN, _UPLOADED),
            between(_INFERRED, _DOWNLOADED),
            between(_UPLOADED, _CROPPED) if self._cropped else None,
        )

    def release(self) -> None:
        """Destroy graphs and contexts, which must go before TensorRT's engine."""
        for lane in self._captured.values():
            self._cuda.free_graph(lane.graph)
        self._captured, self._plain = {}, None

    def close(self) -> None:
        """Free the memory, after `release`."""
        for buffer in (*self._buffers.values(), *([self._frames] if self._frames else ())):
            self._cuda.free(buffer)
        for event in self._events:
            self._cuda.free_event(event)
        if self._stream is not None:
            self._cuda.free_stream(self._stream)
        self._buffers, self._frames, self._events, self._stream = {}, None, [], None

    def _handle(self) -> int:
        if self._stream is None:
            raise EnvironmentalError("the engine is closed; open it again")
        return self._stream

    def _room(self, size: int) -> Buffer:
        """Memory for frames; when it moves, the graphs that read it are captured again."""
        if self._frames is None or self._frames.host.nbytes < size:
            for key in [k for k in self._captured if k[2]]:
                self._cuda.free_graph(self._captured.pop(key).graph)
            if self._frames is not None:
                self._cuda.free(self._frames)
                self._frames = None
            self._frames = self._cuda.buffer(max(2 * size, 1 << 20))
        return self._frames

    def _new_lane(self, batch: int) -> _Lane:
        lane = _Lane(self._new_context())
        for name, buffer in self._buffers.items():
            given = lane.context.set_tensor_address(name, buffer.address)
            need(given, f"use the memory for {name!r}", self._logger)
        self._set_batch(lane, batch)
        return lane

    def _set_batch(self, lane: _Lane, batch: int) -> None:
        if batch != lane.batch:
            side = self._shapes.side
            given = lane.context.set_input_shape(INPUT_NAME, (batch, side, side, 3))
            need(given, f"take a batch of {batch}", self._logger)
            lane.batch = batch

    def _lane(self, batch: int, timed: bool, kernel: CropKernel | None) -> _Lane:
        """What runs a batch of this size: a captured graph, or the context without one."""
        if batch in self.graph_batches:
            key = (batch, timed, kernel is not None)
            if key in self._captured:
                return self._captured[key]
            lane = self._new_lane(batch)
            # TensorRT allocates and chooses at the first run, which a capture must not contain.
            self._put(lane, False, None)
            self._cuda.synchronize(self._handle())
            try:
                lane.graph = self._cuda.capture(
                    self._handle(), lambda: self._put(lane, timed, kernel, captured=True)
                )
            except GpuLostError:
                raise
            except EnvironmentalError as e:
                # Slower and equally right; the engine's `info` says which of the two runs.
                _log.warning("no CUDA graph for batches of %d: %s", batch, e)
                self.graph_batches.discard(batch)
            else:
                self._captured[key] = lane
                return lane
        lane = self._open_lane()
        self._set_batch(lane, batch)
        return lane

    def _put(
        self, lane: _Lane, timed: bool, kernel: CropKernel | None, captured: bool = False
    ) -> None:
        """Put one batch into the stream; frames for the kernel are there already."""
        cuda, stream, crops = self._cuda, self._handle(), self._buffers[INPUT_NAME]

        def mark(which: int) -> None:
            if timed:
                cuda.record(self._events[which], stream, captured)

        if kernel is None:
            mark(_BEGIN)
            cuda.upload(crops, lane.batch * self._shapes.crop_bytes, stream)
            mark(_UPLOADED)
        elif self._frames is not None:
            mark(_UPLOADED)
            side = self._shapes.side
            kernel.launch(self._frames.address, crops.address, side, lane.batch, stream)
            mark(_CROPPED)
        self._logger.forget()
        need(lane.context.execute_async_v3(stream), "run the engine", self._logger)
        mark(_INFERRED)
        for name in self._shapes.answers:
            cuda.download(self._buffers[name], lane.batch * _ROW_BYTES, stream)
        mark(_DOWNLOADED)
