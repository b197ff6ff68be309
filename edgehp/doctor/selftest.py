"""``edgehp doctor --test``: uses every part of this machine once, briefly, and says what failed.

Each check ends as ok, failed or not tested, with one line for people. A check never raises: what
went wrong is its result. The driver is probed in a process of its own before anything here loads
it.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgehp.benchmark.host import read_host
from edgehp.benchmark.power import METERS
from edgehp.benchmark.power.base import TOTAL, Meter, PowerRecorder, energy_over
from edgehp.benchmark.power.nvml import open_gpu_state
from edgehp.crop import Box, Picture, Preprocessing, crop_face
from edgehp.device import find_jetson
from edgehp.doctor.report import FAILED, NOT_TESTED, OK
from edgehp.doctor.system import Probe, find_jetson_state
from edgehp.driver import NoDriverError, probe_driver
from edgehp.engines import (
    ENGINE_KINDS,
    PROCESSOR_ENGINES,
    engine_available,
    open_engine,
    tensorrt_build,
    tensorrt_rtx,
)
from edgehp.engines.build import BuildOptions
from edgehp.engines.cuda import Buffer, Cuda, GpuLostError, check_cuda_package, open_cuda
from edgehp.engines.gpu_crop import CropKernel, Load
from edgehp.engines.tensorrt import import_tensorrt
from edgehp.errors import CompatibilityError, EdgehpError, EnvironmentalError, MeasurementError

GRAPH = Path(__file__).with_name("selftest.onnx")
# Answers of onnxruntime 1.32 on the processor for `_crops()`: angles, then spreads, in degrees.
_EXPECTED = (-44.806, -15.061, -8.273, -1.403, -23.409, -56.559)
# One step of the quantized network changes an answer by about 0.3.
_TOLERANCE = 1.5
_BUFFER = 64 << 20
_POWER_S = 2.0
_LAUNCHES = 20
# What a Jetson needs for TensorRT's builder and a ResNet18.
_FREE_MEMORY = 1 << 30


@dataclass(frozen=True)
class Check:
    """How one check ended.

    Attributes:
        name: what was checked.
        state: `OK`, `FAILED` or `NOT_TESTED`.
        detail: what was measured, what failed, or why it was not tested.
        hint: what to do about a failure.
    """

    name: str
    state: str
    detail: str
    hint: str = ""


class _NotTestedError(Exception):
    """The machine lacks what this check is for; the text says so."""


def run_checks(camera: str | None = None) -> Iterator[Check]:
    """Use this machine, for about half a minute, giving each result as it is known.

    Args:
        camera: a source as ``edgehp run`` takes it, opened for one frame; None tries none.
    """
    probe = Probe()
    with ExitStack() as stack:
        cuda: Cuda | None = None

        def context() -> str:
            nonlocal cuda
            cuda = _open()
            stack.callback(cuda.close)
            kind = "integrated, shares the processor's memory" if cuda.integrated else "discrete"
            return f"{cuda.name}, {kind}, waiting {cuda.waiting}, opened again after a thread ended"

        for name, work in (
            ("NVIDIA driver", partial(_driver, probe)),
            ("CUDA package", lambda: check_cuda_package(probe_driver())),
            ("CUDA context", context),
        ):
            # Each needs the one before.
            check = _check(name, work)
            yield check
            if check.state != OK:
                break
        if cuda is None:
            reason = "without a working NVIDIA driver and CUDA package"
            yield Check("copies, streams, events and graphs of the GPU", NOT_TESTED, reason)
        else:
            yield from _gpu_checks(cuda)
        for kind in ENGINE_KINDS:
            yield _check(f"INT8 engine, {kind}", partial(_engine, kind, cuda))
        for name, opener in METERS.items():
            yield _check(f"power meter {name}", partial(_meter, name, opener, cuda))
    yield _check("clocks and temperatures", lambda: _clocks(probe))
    yield _check("power mode", lambda: _power_mode(probe))
    yield _check("free memory", lambda: _free_memory(probe))
    yield _check("camera", lambda: _camera(camera))


def _check(name: str, work: Callable[[], str]) -> Check:
    try:
        return Check(name, OK, work())
    except _NotTestedError as e:
        return Check(name, NOT_TESTED, str(e))
    except EdgehpError as e:
        text, _, hint = str(e).partition("\nhint: ")
        return Check(name, FAILED, text, hint)
    except Exception as e:
        # A library's own error is a result here, as are edgehp's.
        return Check(name, FAILED, f"{type(e).__name__}: {e}")


def _driver(probe: Probe) -> str:
    try:
        found = probe_driver()
    except NoDriverError as e:
        if find_jetson(probe.root) or (probe.root / "proc/driver/nvidia/version").exists():
            raise
        raise _NotTestedError(str(e)) from e
    gpus = ", ".join(f"{g.name} ({g.compute_capability})" for g in found.gpus)
    return f"CUDA {found.cuda_version}, {gpus}"


def _open() -> Cuda:
    """Opened and closed in a thread that ends first: services do so, and some drivers crash."""

    def briefly() -> None:
        cuda = open_cuda()
        with cuda.current():
            cuda.free_stream(cuda.new_stream())
        cuda.close()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(briefly).result()
    return open_cuda()


def _gpu_checks(cuda: Cuda) -> Iterator[Check]:
    with cuda.current():
        yield _check("GPU memory", lambda: _gpu_memory(cuda))
        yield _check("copies", lambda: _copies(cuda))
        yield _check("streams and events", lambda: _events(cuda))
        yield _check("CUDA graph", lambda: _graph(cuda))
        yield _check("crop kernel", lambda: _crop_kernel(cuda))


def _gpu_memory(cuda: Cuda) -> str:
    free, total = cuda.free_memory()
    text = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    if free < _FREE_MEMORY:
        raise EnvironmentalError(f"{text}\nhint: end other programs that use the GPU")
    return text


@contextmanager
def _scratch(cuda: Cuda, *sizes: int) -> Iterator[tuple[int, list[Buffer]]]:
    """A stream, and a buffer of each of these bytes."""
    with ExitStack() as stack:
        stream = cuda.new_stream()
        stack.callback(cuda.free_stream, stream)
        buffers = []
        for size in sizes:
            buffers.append(cuda.buffer(size))
            stack.callback(cuda.free, buffers[-1])
        yield stream, buffers


def _timed(cuda: Cuda, stream: int, work: Callable[[], None]) -> float:
    """Milliseconds of `work` on `stream` by CUDA events."""
    start, end = cuda.new_event(), cuda.new_event()
    try:
        cuda.record(start, stream)
        work()
        cuda.record(end, stream)
        return cuda.elapsed_ms(start, end)
    finally:
        cuda.free_event(start)
        cuda.free_event(end)


def _copies(cuda: Cuda) -> str:
    def seconds(copy: Callable[[Buffer, int, int], None]) -> float:
        start = time.perf_counter()
        copy(buffer, _BUFFER, stream)
        cuda.synchronize(stream)
        return time.perf_counter() - start

    with _scratch(cuda, _BUFFER) as (stream, (buffer,)):
        pattern = np.arange(_BUFFER, dtype=np.uint32).astype(np.uint8)
        buffer.host[:] = pattern
        up = seconds(cuda.upload)
        if not buffer.mapped:
            buffer.host[:] = 0
        down = seconds(cuda.download)
        if not np.array_equal(buffer.host, pattern):
            raise EnvironmentalError("what came back from the GPU differs from what was sent")
        cuda.fill(buffer, 7, stream)
        seconds(cuda.download)
        if not (buffer.host == 7).all():
            raise EnvironmentalError("the processor does not see what the GPU wrote")
    if buffer.mapped:
        return "one memory for both, nothing is copied"
    gb = _BUFFER / 1e9
    return f"pinned memory, {gb / up:.1f} GB/s to the GPU, {gb / down:.1f} GB/s back"


def _events(cuda: Cuda) -> str:
    def fill() -> None:
        for _ in range(10):
            cuda.fill(buffer, 1, stream)

    with _scratch(cuda, _BUFFER) as (stream, (buffer,)):
        cuda.fill(buffer, 0, stream)
        milliseconds = _timed(cuda, stream, fill)
    if not 0 < milliseconds < 10_000:
        raise EnvironmentalError(f"ten fills took {milliseconds} ms by CUDA events")
    rate = 10 * _BUFFER / milliseconds / 1e6
    return f"ten fills of 64 MiB in {milliseconds:.2f} ms ({rate:.0f} GB/s)"


def _graph(cuda: Cuda) -> str:
    if not cuda.has_graphs:
        raise _NotTestedError(f"{cuda.package} has none; install cuda-bindings for them")

    def work() -> None:
        cuda.fill(buffer, 9, stream)
        cuda.download(buffer, 1 << 20, stream)

    with _scratch(cuda, 1 << 20) as (stream, (buffer,)):
        buffer.host[:] = 0
        graph = cuda.capture(stream, work)
        cuda.synchronize(stream)
        if buffer.host.any():
            raise EnvironmentalError("capturing a graph executed it")
        for _ in range(2):
            buffer.host[:] = 0
            cuda.launch(graph, stream)
            cuda.synchronize(stream)
            if not (buffer.host == 9).all():
                raise EnvironmentalError("a launched graph did not do what was captured")
        cuda.free_graph(graph)
    return "captured once, launched twice"


def _crops() -> npt.NDArray[np.uint8]:
    y, x, channel = np.mgrid[:32, :32, :3]
    crops: npt.NDArray[np.uint8] = ((x * 8 * (channel + 1) + y * 21) % 256).astype(np.uint8)
    return crops[None]


def _engine(kind: str, cuda: Cuda | None) -> str:
    reason = engine_available(kind)
    if reason is not None:
        raise _NotTestedError(reason.partition("\n")[0])
    with tempfile.TemporaryDirectory() as folder:
        path = GRAPH
        if kind not in PROCESSOR_ENGINES:
            if cuda is None:
                raise _NotTestedError("without a working NVIDIA driver and CUDA package")
            path = Path(folder) / "selftest.plan"
            path.write_bytes(_plan(kind, cuda.compute_capability))
        with open_engine(kind, path, threads=1) as engine:
            answer = engine.infer(_crops())
            device = engine.info.device
    found = np.concatenate([a for a in (answer.angles, answer.spread) if a is not None], axis=1)
    worst = float(np.abs(found - np.array(_EXPECTED)).max())
    if not worst <= _TOLERANCE:
        raise EnvironmentalError(
            f"answers on {device} differ by {worst:.2f} degrees, expected at most {_TOLERANCE}\n"
            "hint: install another release of this runtime"
        )
    return f"on {device}, largest difference {worst:.3f} degrees"


def _plan(kind: str, capability: str) -> bytes:
    """An INT8 engine of the small graph for the GPU here."""
    options = BuildOptions(batch=(1, 1, 1), compute_capabilities=(capability,))
    if kind == "tensorrt-rtx":
        try:
            return tensorrt_rtx.build_plan(tensorrt_rtx.import_tensorrt_rtx(), GRAPH, options, 2)[0]
        except CompatibilityError as e:
            raise _NotTestedError(str(e)) from e
    trt = import_tensorrt()
    tensorrt_build.check_support(str(trt.__version__), capability, options)
    try:
        return tensorrt_build.build_plan(trt, GRAPH, options, 2)[0]
    except EnvironmentalError as e:
        if capability == "7.0" and tensorrt_build.NO_KERNEL in str(e):
            raise _NotTestedError("Volta has no INT8 tensor cores") from e
        raise


def _crop_kernel(cuda: Cuda) -> str:
    """The GPU's crops against the processor's, and what both take for faces of a 1080p frame."""
    try:
        kernel = CropKernel(cuda)
    except GpuLostError:
        raise
    except EnvironmentalError as e:
        reason = str(e).partition("\n")[0]
        raise _NotTestedError(f"{reason}; the processor crops") from e
    y, x = np.mgrid[:1080, :1920]
    pixels = np.stack([(x * y) >> 8, x * 3 + y, x ^ y], axis=-1).astype(np.uint8)
    picture, spec = Picture(pixels), Preprocessing(112)
    # At the border and inside, down to the smallest and up to the largest that cameras give.
    boxes = [Box(210.3 * i - 40, 90.7 * i - 30, 210.3 * i + 360, 90.7 * i + 370) for i in range(8)]
    times, worst = [], 0
    try:
        for count in (1, 4, 8):
            faces = [(picture, box) for box in boxes[:count]]
            expected = np.stack([crop_face(pixels, box, spec) for box in boxes[:count]])
            found = kernel.crop(faces, spec).astype(int)
            worst = max(worst, int(np.abs(found - expected).max()))
            load = Load(faces, spec)
            with _scratch(cuda, load.size, expected.nbytes) as (stream, (source, crops)):
                load.write(source.host)
                cuda.upload(source, load.size, stream)
                where = source.address, crops.address, spec.size, count, stream

                def cut(where: tuple[int, int, int, int, int] = where) -> None:
                    for _ in range(_LAUNCHES):
                        kernel.launch(*where)

                times.append(_timed(cuda, stream, cut) / _LAUNCHES * 1e3)
        began = time.perf_counter()
        for _ in range(_LAUNCHES):
            crop_face(pixels, boxes[2], spec)
        processor = (time.perf_counter() - began) / _LAUNCHES * 1e6
    finally:
        kernel.close()
    if worst > 1:
        raise EnvironmentalError(
            f"crops differ by {worst} levels from the processor's, expected at most 1\n"
            "hint: update the NVIDIA driver and NVRTC"
        )
    shown = ", ".join(f"{t:.0f}" for t in times)
    return (
        f"{shown} us for 1, 4, 8 faces, {processor:.0f} us for one on the processor; largest "
        f"difference {worst} level"
    )


@contextmanager
def _load(cuda: Cuda | None) -> Iterator[None]:
    """Keep the processor's cores and the GPU's memory busy."""
    end = threading.Event()

    def gpu() -> None:
        if cuda is None:
            return
        with cuda.current(), _scratch(cuda, _BUFFER) as (stream, (buffer,)):
            while not end.is_set():
                for value in range(100):
                    cuda.fill(buffer, value, stream)
                cuda.synchronize(stream)

    def processor() -> None:
        square = np.ones((512, 512), np.float32)
        while not end.is_set():
            square @ square

    threads = [threading.Thread(target=work) for work in (gpu, processor)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        end.set()
        for thread in threads:
            thread.join()


def _watts(meter: Meter, seconds: float) -> float:
    """Mean power in W over a time, of the meter's total or its first rail."""
    recorder = PowerRecorder(meter)
    recorder.start()
    time.sleep(seconds)
    recorder.stop()
    samples = recorder.samples
    if recorder.failure is not None or len(samples) < 2:
        found = recorder.failure or f"{len(samples)} readings in {seconds:g} s"
        raise MeasurementError(found)
    energy = energy_over(meter.info, samples, [(samples[0].time, samples[-1].time)])
    rail = TOTAL if meter.info.total else next(iter(meter.info.rails))
    watts = energy.watts[rail]
    if watts is None:
        raise MeasurementError(energy.reasons[rail])
    return watts


def _meter(name: str, opener: Callable[[], Meter], cuda: Cuda | None) -> str:
    try:
        meter = opener()
    except (EnvironmentalError, MeasurementError) as e:
        raise _NotTestedError(str(e).partition("\n")[0]) from e
    try:
        idle = _watts(meter, _POWER_S)
        with _load(cuda):
            time.sleep(0.5)
            loaded = _watts(meter, _POWER_S)
    finally:
        meter.close()
    text = f"{idle:.1f} W idle, {loaded:.1f} W under load"
    if not 0 < idle < loaded < 5000:
        raise MeasurementError(f"{text}, expected more under load\nhint: do not use --power {name}")
    return text


def _clocks(probe: Probe) -> str:
    state = read_host(probe.root)
    gpu = open_gpu_state()
    if gpu is not None:
        state = gpu.fill(state)
    parts = [f"{name} {degrees:.0f} °C" for name, degrees in state.temperatures.items()][:4]
    if state.gpu_mhz is not None:
        parts.append(f"GPU {state.gpu_mhz:.0f} MHz")
    if state.reasons:
        raise EnvironmentalError(
            f"{', '.join((*parts, *state.reasons))}\nhint: cool the board before you measure"
        )
    if not parts:
        raise _NotTestedError("this machine tells none")
    return ", ".join(parts)


def _power_mode(probe: Probe) -> str:
    jetson = find_jetson_state(probe)
    if jetson is None:
        raise _NotTestedError("this is no Jetson")
    if jetson.power_mode is None:
        raise EnvironmentalError("nvpmodel gave none\nhint: sudo nvpmodel -q")
    return f"{jetson.power_mode}, {jetson.model}"


def _free_memory(probe: Probe) -> str:
    text = (probe.root / "proc/meminfo").read_text()
    free = next(int(s.split()[1]) for s in text.splitlines() if s.startswith("MemAvailable"))
    shown = f"{free / 2**20:.1f} GiB available"
    if free * 1024 < _FREE_MEMORY:
        raise EnvironmentalError(f"{shown}\nhint: end other programs, a desktop for example")
    return shown


def _camera(source: str | None) -> str:
    if source is None:
        raise _NotTestedError("none was named: --camera camera:0 or gstreamer:PIPELINE")
    from edgehp.runtime.sources import parse_source

    capture = parse_source(source).open()
    try:
        for _ in range(30):
            read, frame = capture.read()
            if read and isinstance(frame, np.ndarray):
                return f"{source}: frames of {frame.shape[1]}x{frame.shape[0]}"
    finally:
        capture.release()
    raise EnvironmentalError(f"{source} was opened and gave no frame\nhint: check its cable")
