"""Device memory, streams, events and graphs behind one small interface.

JetPack images carry `pycuda`; elsewhere `cuda-bindings` installs as a wheel. Both work here in the
primary context of the GPU, the one TensorRT uses: a context of one's own (`pycuda.autoinit`) would
make pointers that TensorRT must not touch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt

from edgehp.driver import probe_driver
from edgehp.errors import EnvironmentalError, UsageError

__all__ = ["Cuda", "CudaBindings", "PyCuda", "open_cuda"]

HostBytes = npt.NDArray[np.uint8]


class Cuda(ABC):
    """One GPU in its primary context. Handles are plain integers or opaque objects.

    Every method raises EnvironmentalError when the driver reports a failure.
    """

    package: str
    name: str
    compute_capability: str
    has_graphs: bool
    # How the processor waits for the GPU, for reports.
    waiting: str

    @abstractmethod
    def activate(self) -> None:
        """Make the primary context current in the calling thread."""

    @abstractmethod
    def allocate(self, size: int) -> int:
        """The address of `size` new bytes of device memory."""

    @abstractmethod
    def free(self, address: int) -> None:
        """Give memory of `allocate` back."""

    @abstractmethod
    def pinned(self, size: int) -> HostBytes:
        """Page-locked host memory uint8 [size], which copies overlap with work."""

    @abstractmethod
    def free_pinned(self, memory: HostBytes) -> None:
        """Give memory of `pinned` back; no view of it may be used afterwards."""

    @abstractmethod
    def new_stream(self) -> int:
        """The handle of a new stream that does not wait for the default stream."""

    @abstractmethod
    def free_stream(self, stream: int) -> None:
        """Destroy a stream of `new_stream`."""

    @abstractmethod
    def upload(self, address: int, host: HostBytes, stream: int) -> None:
        """Copy host bytes to the device, in the stream's order."""

    @abstractmethod
    def download(self, host: HostBytes, address: int, stream: int) -> None:
        """Copy device bytes to the host, in the stream's order."""

    @abstractmethod
    def synchronise(self, stream: int) -> None:
        """Wait until the stream has done its work; reports what failed in it."""

    @abstractmethod
    def new_event(self) -> Any:
        """A new event that takes times."""

    @abstractmethod
    def record(self, event: Any, stream: int) -> None:
        """Mark the present end of the stream's work."""

    @abstractmethod
    def elapsed_ms(self, start: Any, end: Any) -> float:
        """Milliseconds between two recorded events, waiting for the second."""

    @abstractmethod
    def free_event(self, event: Any) -> None:
        """Destroy an event of `new_event`."""

    @abstractmethod
    def capture(self, stream: int, work: Callable[[], None]) -> Any:
        """An executable graph of what `work` puts into the stream; nothing is executed."""

    @abstractmethod
    def launch(self, graph: Any, stream: int) -> None:
        """Execute a graph of `capture`."""

    @abstractmethod
    def free_graph(self, graph: Any) -> None:
        """Destroy a graph of `capture`."""

    @abstractmethod
    def close(self) -> None:
        """Release the primary context; calling it again does nothing."""


class CudaBindings(Cuda):
    """The driver API through `cuda-bindings`.

    Args:
        index: of the GPU.
        driver: the module `cuda.bindings.driver`.
    """

    package = "cuda-bindings"
    has_graphs = True

    def __init__(self, index: int, driver: Any) -> None:
        self._driver = driver
        self._pinned: dict[int, Any] = {}
        self._retained = False
        self._call("cuInit", 0)
        self._device = self._call("cuDeviceGet", index)
        name = self._call("cuDeviceGetName", 256, self._device)
        self.name = name.split(b"\0")[0].decode(errors="replace")
        attributes = driver.CUdevice_attribute
        major, minor = (
            self._call("cuDeviceGetAttribute", a, self._device)
            for a in (
                attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        )
        self.compute_capability = f"{major}.{minor}"
        self._context = self._call("cuDevicePrimaryCtxRetain", self._device)
        self._retained = True
        self.activate()
        self.waiting = self._scheduling()

    def _scheduling(self) -> str:
        # Bits of CUctx_flags.
        ways = {0: "as the driver chooses", 1: "spins", 2: "yields", 4: "blocks"}
        status, flags, _ = self._driver.cuDevicePrimaryCtxGetState(self._device)
        return ways.get(int(flags) & 7, "unknown") if int(status) == 0 else "unknown"

    def _call(self, function: str, *arguments: Any) -> Any:
        try:
            status, *values = getattr(self._driver, function)(*arguments)
        except RuntimeError as e:  # what cuda-bindings raises where the driver library is absent
            raise EnvironmentalError(f"CUDA {function} cannot be called: {e}") from e
        if int(status) != 0:
            _, text = self._driver.cuGetErrorString(status)
            reason = text.decode() if text else "unknown error"
            raise EnvironmentalError(
                f"CUDA {function} failed with {getattr(status, 'name', status)}: {reason}"
            )
        return values[0] if values else None

    def activate(self) -> None:
        """See `Cuda.activate`."""
        self._call("cuCtxSetCurrent", self._context)

    def allocate(self, size: int) -> int:
        """See `Cuda.allocate`."""
        return int(self._call("cuMemAlloc", size))

    def free(self, address: int) -> None:
        """See `Cuda.free`."""
        self._call("cuMemFree", address)

    def pinned(self, size: int) -> HostBytes:
        """See `Cuda.pinned`."""
        import ctypes

        address = int(self._call("cuMemAllocHost", size))
        block = (ctypes.c_uint8 * size).from_address(address)
        memory: HostBytes = np.ctypeslib.as_array(block)
        self._pinned[address] = block
        return memory

    def free_pinned(self, memory: HostBytes) -> None:
        """See `Cuda.free_pinned`."""
        address = memory.ctypes.data
        if self._pinned.pop(address, None) is not None:
            self._call("cuMemFreeHost", address)

    def new_stream(self) -> int:
        """See `Cuda.new_stream`."""
        flags = self._driver.CUstream_flags.CU_STREAM_NON_BLOCKING
        return int(self._call("cuStreamCreate", int(flags)))

    def free_stream(self, stream: int) -> None:
        """See `Cuda.free_stream`."""
        self._call("cuStreamDestroy", stream)

    def upload(self, address: int, host: HostBytes, stream: int) -> None:
        """See `Cuda.upload`."""
        self._call("cuMemcpyHtoDAsync", address, host.ctypes.data, host.nbytes, stream)

    def download(self, host: HostBytes, address: int, stream: int) -> None:
        """See `Cuda.download`."""
        self._call("cuMemcpyDtoHAsync", host.ctypes.data, address, host.nbytes, stream)

    def synchronise(self, stream: int) -> None:
        """See `Cuda.synchronise`."""
        self._call("cuStreamSynchronize", stream)

    def new_event(self) -> Any:
        """See `Cuda.new_event`."""
        return self._call("cuEventCreate", 0)

    def record(self, event: Any, stream: int) -> None:
        """See `Cuda.record`."""
        self._call("cuEventRecord", event, stream)

    def elapsed_ms(self, start: Any, end: Any) -> float:
        """See `Cuda.elapsed_ms`."""
        self._call("cuEventSynchronize", end)
        return float(self._call("cuEventElapsedTime", start, end))

    def free_event(self, event: Any) -> None:
        """See `Cuda.free_event`."""
        self._call("cuEventDestroy", event)

    def capture(self, stream: int, work: Callable[[], None]) -> Any:
        """See `Cuda.capture`."""
        modes = self._driver.CUstreamCaptureMode
        mode = modes.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("cuStreamBeginCapture", stream, mode)
        try:
            work()
        except BaseException:
            # The capture must end or the stream stays unusable; the first failure is the one told.
            status, graph = self._driver.cuStreamEndCapture(stream)
            if int(status) == 0:
                self._driver.cuGraphDestroy(graph)
            raise
        graph = self._call("cuStreamEndCapture", stream)
        try:
            return self._call("cuGraphInstantiate", graph, 0)
        finally:
            self._call("cuGraphDestroy", graph)

    def launch(self, graph: Any, stream: int) -> None:
        """See `Cuda.launch`."""
        self._call("cuGraphLaunch", graph, stream)

    def free_graph(self, graph: Any) -> None:
        """See `Cuda.free_graph`."""
        self._call("cuGraphExecDestroy", graph)

    def close(self) -> None:
        """See `Cuda.close`."""
        if self._retained:
            self._retained = False
            self._call("cuDevicePrimaryCtxRelease", self._device)


class PyCuda(Cuda):
    """The driver API through `pycuda`, without CUDA graphs, which it does not offer.

    Args:
        index: of the GPU.
        driver: the module `pycuda.driver`.
    """

    package = "pycuda"
    has_graphs = False
    waiting = "unknown"

    def __init__(self, index: int, driver: Any) -> None:
        self._driver = driver
        self._streams: dict[int, Any] = {}
        self._memory: dict[int, Any] = {}
        self._retained = False
        self._call(driver.init)
        device = self._call(driver.Device, index)
        self.name = str(device.name())
        major, minor = device.compute_capability()
        self.compute_capability = f"{major}.{minor}"
        self._context = self._call(device.retain_primary_context)
        self._call(self._context.push)
        self._retained = True

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except self._driver.Error as e:
            name = getattr(function, "__name__", str(function))
            raise EnvironmentalError(f"CUDA {name} failed: {e}") from e

    def activate(self) -> None:
        """See `Cuda.activate`: the context was pushed when this was opened."""

    def allocate(self, size: int) -> int:
        """See `Cuda.allocate`."""
        block = self._call(self._driver.mem_alloc, size)
        self._memory[int(block)] = block
        return int(block)

    def free(self, address: int) -> None:
        """See `Cuda.free`."""
        self._call(self._memory.pop(address).free)

    def pinned(self, size: int) -> HostBytes:
        """See `Cuda.pinned`."""
        memory: HostBytes = self._call(self._driver.pagelocked_empty, size, np.uint8)
        return memory

    def free_pinned(self, memory: HostBytes) -> None:
        """See `Cuda.free_pinned`: pycuda frees it with the array's last reference."""

    def new_stream(self) -> int:
        """See `Cuda.new_stream`."""
        stream = self._call(self._driver.Stream)
        self._streams[int(stream.handle)] = stream
        return int(stream.handle)

    def free_stream(self, stream: int) -> None:
        """See `Cuda.free_stream`."""
        del self._streams[stream]

    def upload(self, address: int, host: HostBytes, stream: int) -> None:
        """See `Cuda.upload`."""
        self._call(self._driver.memcpy_htod_async, address, host, self._streams[stream])

    def download(self, host: HostBytes, address: int, stream: int) -> None:
        """See `Cuda.download`."""
        self._call(self._driver.memcpy_dtoh_async, host, address, self._streams[stream])

    def synchronise(self, stream: int) -> None:
        """See `Cuda.synchronise`."""
        self._call(self._streams[stream].synchronize)

    def new_event(self) -> Any:
        """See `Cuda.new_event`."""
        return self._call(self._driver.Event)

    def record(self, event: Any, stream: int) -> None:
        """See `Cuda.record`."""
        self._call(event.record, self._streams[stream])

    def elapsed_ms(self, start: Any, end: Any) -> float:
        """See `Cuda.elapsed_ms`."""
        self._call(end.synchronize)
        return float(self._call(start.time_till, end))

    def free_event(self, event: Any) -> None:
        """See `Cuda.free_event`: pycuda frees it with its last reference."""

    def capture(self, stream: int, work: Callable[[], None]) -> Any:
        """Not offered by pycuda: look at `has_graphs` first."""
        raise EnvironmentalError("pycuda has no CUDA graphs; install cuda-bindings for them")

    def launch(self, graph: Any, stream: int) -> None:
        """Not offered by pycuda."""
        raise EnvironmentalError("pycuda has no CUDA graphs; install cuda-bindings for them")

    def free_graph(self, graph: Any) -> None:
        """Not offered by pycuda."""

    def close(self) -> None:
        """See `Cuda.close`."""
        if self._retained:
            self._retained = False
            self._streams.clear()
            self._memory.clear()
            self._call(self._context.pop)


def open_cuda(device: str | None = None) -> Cuda:
    """The GPU called `device`, after a probe of the driver in a subprocess.

    Args:
        device: its number in the driver's order, such as ``"0"`` or ``"cuda:0"``; None is the
            first.

    Raises:
        UsageError: there is no such GPU.
        EnvironmentalError: no driver, no GPU, or neither `pycuda` nor `cuda-bindings`.
    """
    text = (device or "0").removeprefix("cuda:")
    probe = probe_driver()
    if not text.isdigit() or int(text) >= len(probe.gpus):
        names = ", ".join(f"{i}: {g.name}" for i, g in enumerate(probe.gpus))
        raise UsageError(f"there is no GPU {device!r}; there are {names}")
    try:
        if _installed("pycuda"):
            from pycuda import driver as pycuda_driver

            return PyCuda(int(text), pycuda_driver)
        if _installed("cuda.bindings"):
            from cuda.bindings import driver

            return CudaBindings(int(text), driver)
    except ImportError as e:
        raise EnvironmentalError(f"the CUDA package is installed but broken: {e}") from e
    raise EnvironmentalError(
        "neither pycuda nor cuda-bindings is installed; install one with: pip install cuda-bindings"
    )


def _installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False
