"""Device memory, streams, events and graphs of one GPU, behind a small interface.

`Cuda` uses NVIDIA's `cuda-bindings`, `PyCuda` the package `pycuda` for those who have it already.
Both work in the primary context of the GPU, the one that TensorRT uses. The context is pushed
before a group of calls and popped after it (`current`), so that any thread may call, and no thread
ends with a context on its stack.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt

from edgehp._installed import install_extra
from edgehp.driver import DriverProbe, probe_driver
from edgehp.errors import EnvironmentalError, UsageError

# How the processor waits for the GPU -> the bits of CUctx_flags in cuda.h. Spinning answers
# soonest, blocking leaves the core to others.
WAITS = {"auto": 0, "spin": 1, "block": 4}
_SCHEDULING = {0: "as the driver chooses", 1: "spins", 2: "yields", 4: "blocks"}
# Errors after which every call of the process fails (CUDA driver API, "CUresult": the context or
# the process is corrupted and must be started again).
_STICKY = frozenset({214, 700, 702, 710, 714, 715, 716, 717, 718, 719, 720, 721})
# CU_DEVICE_ATTRIBUTE_INTEGRATED of cuda.h, and CU_MEMHOSTALLOC_DEVICEMAP.
_INTEGRATED, _DEVICE_MAP = 18, 2
# CU_STREAM_NON_BLOCKING, CU_EVENT_RECORD_EXTERNAL.
_NON_BLOCKING, _RECORD_EXTERNAL = 1, 1


class GpuLostError(EnvironmentalError):
    """The GPU is unusable for this process; only a new process can use it again."""


@dataclass(frozen=True, eq=False)
class Buffer:
    """Memory that both sides use: page-locked uint8 [size] and what the GPU reads and writes.

    Attributes:
        host: the processor's side.
        address: the GPU's side.
        mapped: both are the same memory (integrated GPUs), so that nothing need be copied.
        handles: what keeps the memory, for the adapter that made it.
    """

    host: npt.NDArray[np.uint8]
    address: int
    mapped: bool
    handles: tuple[Any, ...] = ()


class Cuda:
    """One GPU in its primary context, by `cuda-bindings`.

    Streams are integers; events and graphs are opaque. Every method may raise EnvironmentalError,
    and GpuLostError where the process must be started again. All but `close` need `current`.

    Args:
        index: of the GPU.
        driver: the module `cuda.bindings.driver`.
        wait: one of `WAITS`.

    Attributes:
        integrated: the GPU uses the processor's memory.
        waiting: how the processor waits for the GPU, for reports.
    """

    package = "cuda-bindings"
    has_graphs = True
    has_kernels = True
    name: str
    compute_capability: str
    integrated: bool
    waiting: str

    def __init__(self, index: int, driver: Any, wait: str = "auto") -> None:
        self._driver = driver
        self._open = False
        self._call("cuInit", 0)
        self._device = self._call("cuDeviceGet", index)
        name = self._call("cuDeviceGetName", 256, self._device)
        self.name = name.split(b"\0")[0].decode(errors="replace")
        major, minor, integrated = (
            int(self._call("cuDeviceGetAttribute", self._attribute(number), self._device))
            for number in (75, 76, _INTEGRATED)
        )
        self.compute_capability = f"{major}.{minor}"
        self.integrated = bool(integrated)
        if wait != "auto":
            self._call("cuDevicePrimaryCtxSetFlags", self._device, WAITS[wait])
        self._context = self._call("cuDevicePrimaryCtxRetain", self._device)
        self._open = True
        try:
            flags, _ = self._call("cuDevicePrimaryCtxGetState", self._device)
            self.waiting = _SCHEDULING.get(int(flags) & 7, "unknown")
        except EnvironmentalError:
            self.waiting = "unknown"

    def _attribute(self, number: int) -> Any:
        """A ``CUdevice_attribute`` by its number in cuda.h."""
        return self._driver.CUdevice_attribute(number)

    def _pop(self) -> None:
        self._driver.cuCtxPopCurrent()

    def _call(self, function: str, *arguments: Any) -> Any:
        try:
            status, *values = getattr(self._driver, function)(*arguments)
        except RuntimeError as e:  # the driver library is absent, or lacks the function
            raise EnvironmentalError(f"CUDA {function} cannot be called: {e}") from e
        if int(status) != 0:
            _, text = self._driver.cuGetErrorString(status)
            reason = text.decode() if text else "unknown error"
            raise _failure(function, int(status), f"{getattr(status, 'name', status)}: {reason}")
        return values[0] if len(values) == 1 else tuple(values)

    @contextmanager
    def current(self) -> Iterator[None]:
        """The primary context is current in the calling thread within the `with` block."""
        if not self._open:
            raise EnvironmentalError("the GPU's context is closed")
        self._call("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            # Without a check: the failure inside the block is the one to report.
            self._pop()

    def buffer(self, size: int) -> Buffer:
        """New memory of `size` bytes on both sides; one and the same on an integrated GPU."""
        pointer = int(self._call("cuMemHostAlloc", size, _DEVICE_MAP))
        host = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(pointer))
        try:
            if self.integrated:
                address = int(self._call("cuMemHostGetDevicePointer", pointer, 0))
            else:
                address = int(self._call("cuMemAlloc", size))
        except EnvironmentalError:
            self._driver.cuMemFreeHost(pointer)
            raise
        return Buffer(host, address, self.integrated, (pointer,))

    def free(self, buffer: Buffer) -> None:
        """Free a buffer; no view of its host side may be used afterwards."""
        if not buffer.mapped:
            self._call("cuMemFree", buffer.address)
        self._call("cuMemFreeHost", buffer.handles[0])

    def upload(self, buffer: Buffer, size: int, stream: int) -> None:
        """Copy the first `size` bytes to the GPU in the stream's order, unless they are there."""
        if not buffer.mapped:
            host = buffer.host.ctypes.data
            self._call("cuMemcpyHtoDAsync", buffer.address, host, size, stream)

    def download(self, buffer: Buffer, size: int, stream: int) -> None:
        """Copy the first `size` bytes from the GPU in the stream's order, unless they are here."""
        if not buffer.mapped:
            host = buffer.host.ctypes.data
            self._call("cuMemcpyDtoHAsync", host, buffer.address, size, stream)

    def fill(self, buffer: Buffer, value: int, stream: int) -> None:
        """Set every byte on the GPU's side to `value`, in the stream's order."""
        self._call("cuMemsetD8Async", buffer.address, value, buffer.host.nbytes, stream)

    def new_stream(self) -> int:
        """A new stream that does not wait for the default stream."""
        return int(self._call("cuStreamCreate", _NON_BLOCKING))

    def free_stream(self, stream: int) -> None:
        """Destroy a stream."""
        self._call("cuStreamDestroy", stream)

    def synchronize(self, stream: int) -> None:
        """Wait until the stream has done its work; reports what failed in it."""
        self._call("cuStreamSynchronize", stream)

    def new_event(self) -> Any:
        """A new event that takes times."""
        return self._call("cuEventCreate", 0)

    def record(self, event: Any, stream: int, captured: bool = False) -> None:
        """Mark the present end of the stream's work; within `capture`, at every launch."""
        if captured:
            # Only an external record has a time that cuEventElapsedTime reads after a launch.
            self._call("cuEventRecordWithFlags", event, stream, _RECORD_EXTERNAL)
        else:
            self._call("cuEventRecord", event, stream)

    def elapsed_ms(self, start: Any, end: Any) -> float:
        """Milliseconds between two recorded events, waiting for the second."""
        self._call("cuEventSynchronize", end)
        return float(self._call("cuEventElapsedTime", start, end))

    def free_event(self, event: Any) -> None:
        """Destroy an event."""
        self._call("cuEventDestroy", event)

    def capture(self, stream: int, work: Callable[[], None]) -> Any:
        """An executable graph of what `work` puts into the stream; nothing is executed."""
        mode = self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
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
            self._driver.cuGraphDestroy(graph)

    def launch(self, graph: Any, stream: int) -> None:
        """Put a graph of `capture` into the stream."""
        self._call("cuGraphLaunch", graph, stream)

    def free_graph(self, graph: Any) -> None:
        """Destroy a graph of `capture`."""
        self._call("cuGraphExecDestroy", graph)

    def load(self, image: bytes, name: bytes) -> tuple[Any, Any]:
        """A module from a cubin or PTX, and its function `name`."""
        module = self._call("cuModuleLoadData", image)
        try:
            return module, self._call("cuModuleGetFunction", module, name)
        except EnvironmentalError:
            self._driver.cuModuleUnload(module)
            raise

    def unload(self, module: Any) -> None:
        """Unload a module of `load`."""
        self._call("cuModuleUnload", module)

    def call_kernel(
        self,
        function: Any,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        values: tuple[Any, ...],
        types: tuple[Any, ...],
        stream: int,
    ) -> None:
        """Put a function of `load` into the stream, with the values of its arguments by type."""
        arguments = (values, types)
        self._call("cuLaunchKernel", function, *grid, *block, 0, stream, arguments, 0)

    def free_memory(self) -> tuple[int, int]:
        """Bytes of device memory that are free, and that there are."""
        free, total = self._call("cuMemGetInfo")
        return int(free), int(total)

    def close(self) -> None:
        """Release the primary context; calling it again does nothing."""
        if self._open:
            self._open = False
            self._call("cuDevicePrimaryCtxRelease", self._device)


class PyCuda(Cuda):
    """One GPU in its primary context, by `pycuda`, which has no CUDA graphs.

    Args:
        index: of the GPU.
        driver: the module `pycuda.driver`.
        wait: ``"auto"``: pycuda cannot set it.
    """

    package = "pycuda"
    has_graphs = False
    has_kernels = False

    def __init__(self, index: int, driver: Any, wait: str = "auto") -> None:
        if wait != "auto":
            raise UsageError(
                f"pycuda cannot choose how the processor waits, {wait!r} was asked for\n"
                "hint: install cuda-bindings"
            )
        # pycuda destroys streams and events with their last reference.
        self._streams: dict[int, Any] = {}
        self._functions = self._driver_functions(driver)
        super().__init__(index, driver)

    def _attribute(self, number: int) -> Any:
        return self._driver.device_attribute.values[number]

    def _pop(self) -> None:
        self._driver.Context.pop()

    def _driver_functions(self, cuda: Any) -> dict[str, Callable[..., Any]]:
        """The driver's functions that `Cuda` calls, in pycuda's words."""
        streams = self._streams

        def new_stream(flags: int) -> int:
            stream = cuda.Stream(flags)
            return int(streams.setdefault(int(stream.handle), stream).handle)

        def memory(address: int, size: int) -> Any:
            return (ctypes.c_uint8 * size).from_address(address)

        return {
            "cuInit": cuda.init,
            "cuDeviceGet": cuda.Device,
            "cuDeviceGetName": lambda size, device: str(device.name()).encode(),
            "cuDeviceGetAttribute": lambda attribute, device: device.get_attribute(attribute),
            "cuDevicePrimaryCtxGetState": lambda device: (0, 1),
            "cuDevicePrimaryCtxRetain": lambda device: device.retain_primary_context(),
            "cuCtxPushCurrent": lambda context: context.push(),
            "cuMemHostAlloc": lambda size, flags: cuda.pagelocked_empty(size, "u1", "C", flags),
            "cuMemAlloc": cuda.mem_alloc,
            "cuMemFree": lambda handle: handle.free(),
            "cuMemGetInfo": cuda.mem_get_info,
            "cuMemcpyHtoDAsync": lambda to, host, size, stream: cuda.memcpy_htod_async(
                to, memory(host, size), streams[stream]
            ),
            "cuMemcpyDtoHAsync": lambda host, source, size, stream: cuda.memcpy_dtoh_async(
                memory(host, size), source, streams[stream]
            ),
            "cuMemsetD8Async": lambda to, value, size, stream: cuda.memset_d8_async(
                to, value, size, streams[stream]
            ),
            "cuStreamCreate": new_stream,
            "cuStreamDestroy": streams.pop,
            "cuStreamSynchronize": lambda stream: streams[stream].synchronize(),
            "cuEventCreate": cuda.Event,
            "cuEventRecord": lambda event, stream: event.record(streams[stream]),
            "cuEventSynchronize": lambda event: event.synchronize(),
            "cuEventElapsedTime": lambda start, end: start.time_till(end),
            "cuEventDestroy": lambda event: None,
        }

    def _call(self, function: str, *arguments: Any) -> Any:
        try:
            return self._functions[function](*arguments)
        except self._driver.Error as e:
            # pycuda tells the error by its text alone.
            sticky = any(word in str(e) for word in ("illegal", "launch", "misaligned"))
            raise _failure(function, 719 if sticky else 1, str(e)) from e

    def buffer(self, size: int) -> Buffer:
        """Pinned memory of `size` bytes: mapped on an integrated GPU, else beside device memory."""
        host = self._call("cuMemHostAlloc", size, self._driver.host_alloc_flags.DEVICEMAP)
        if self.integrated:
            return Buffer(host, int(host.base.get_device_pointer()), True, (host.base,))
        memory = self._call("cuMemAlloc", size)
        return Buffer(host, int(memory), False, (host.base, memory))

    def free(self, buffer: Buffer) -> None:
        """Free what `buffer` allocated."""
        for handle in reversed(buffer.handles):
            self._call("cuMemFree", handle)

    def capture(self, stream: int, work: Callable[[], None]) -> Any:
        """Not offered by pycuda: look at `has_graphs` first."""
        raise EnvironmentalError("pycuda has no CUDA graphs\nhint: install cuda-bindings")

    def close(self) -> None:
        """Release the primary context; calling it again does nothing."""
        if not self._open:
            return
        self._open = False
        # Where it is current any thread may release it; elsewhere pycuda leaks it without a word.
        self._call("cuCtxPushCurrent", self._context)
        self._streams.clear()
        self._context.detach()
        # pycuda's cuda.hpp believes that this popped it, which is true of other contexts only.
        ctypes.CDLL("libcuda.so.1").cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))


def _failure(function: str, status: int, reason: str) -> EnvironmentalError:
    text = f"CUDA {function} failed with {reason}"
    if status in _STICKY:
        return GpuLostError(
            f"{text}; this process cannot use the GPU any more\nhint: start the command again; "
            "look at dmesg for Xid messages if it happens again"
        )
    return EnvironmentalError(text)


def check_cuda_package(probe: DriverProbe) -> str:
    """The package that will be used: ``"cuda-bindings"``, or ``"pycuda"`` where there is no other.

    Args:
        probe: the driver's answer: its version decides which cuda-bindings works.

    Raises:
        EnvironmentalError: there is none, or one that asks for a newer driver.
    """
    # cuda-bindings 13 calls functions that drivers of CUDA 12 lack (cuEventElapsedTime_v2);
    # cuda-bindings 12.9 works with drivers of CUDA 12 and of CUDA 13.
    major = int(probe.cuda_version.partition(".")[0])
    hint = f"hint: {install_extra('cuda13' if major >= 13 else 'cuda12')}"
    if _installed("cuda.bindings"):
        version = metadata.version("cuda-bindings")
        if int(version.partition(".")[0]) > major:
            raise EnvironmentalError(
                f"cuda-bindings {version} needs a driver of CUDA {version.partition('.')[0]}, the "
                f"driver here is of CUDA {probe.cuda_version}\n{hint}"
            )
        return "cuda-bindings"
    if _installed("pycuda"):
        return "pycuda"
    raise EnvironmentalError(
        f"no CUDA package for Python is installed; the driver is of CUDA {probe.cuda_version}\n"
        f"{hint}"
    )


def open_cuda(device: str | None = None, wait: str = "auto") -> Cuda:
    """The GPU called `device`, after a probe of the driver in a subprocess.

    Args:
        device: its number in the driver's order, such as ``"0"`` or ``"cuda:0"``; None is the
            first.
        wait: how the processor waits for the GPU, one of `WAITS`.

    Raises:
        UsageError: there is no such GPU, or `wait` cannot be had.
        EnvironmentalError: no driver, no GPU, or no package that works with the driver.
    """
    text = (device or "0").removeprefix("cuda:")
    probe = probe_driver()
    if not text.isdigit() or int(text) >= len(probe.gpus):
        names = ", ".join(f"{i}: {g.name}" for i, g in enumerate(probe.gpus))
        raise UsageError(f"there is no GPU {device!r}; there are {names}")
    if wait not in WAITS:
        raise UsageError(f"no way to wait {wait!r}; expected {', '.join(WAITS)}")
    package = check_cuda_package(probe)
    try:
        if package == "pycuda":
            from pycuda import driver as pycuda_driver

            return PyCuda(int(text), pycuda_driver, wait)
        from cuda.bindings import driver
    except ImportError as e:
        raise EnvironmentalError(f"{package} is installed but broken: {e}") from e
    return Cuda(int(text), driver, wait)


def _installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False
