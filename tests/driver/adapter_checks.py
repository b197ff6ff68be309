"""Uses the CUDA adapter and the engine on top of it, on whatever driver this process finds.

Run as ``python -m tests.driver.adapter_checks [package] [--nvrtc]``: with the driver double in the
library path, in environments of several CUDA packages; or with ``--nvrtc`` on a real GPU.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import threading
from pathlib import Path
from time import perf_counter

import numpy as np
import pytest

from edgehp.crop import Box, Picture, Preprocessing, crop_face
from edgehp.engines.cuda import Cuda, GpuLostError, open_cuda
from edgehp.engines.gpu_crop import CropKernel, Load, compile_kernel, kernel_path
from edgehp.engines.tensorrt import TensorRtEngine
from edgehp.errors import DataError, EnvironmentalError, UsageError
from tests.driver.double import Driver
from tests.driver.tensorrt import KERNEL, SIZE, TensorRtDouble, expected
from tests.test_gpu_crop import against_opencv, as_form, scene


def open_double(
    trt: TensorRtDouble, cuda: Cuda, batch: int | None = None, device: str | None = None
) -> TensorRtEngine:
    """The engine of edgehp with this module in TensorRT's place."""

    class Engine(TensorRtEngine):
        def _open_cuda(self, device: str | None, wait: str) -> Cuda:
            return cuda

        def _import(self) -> TensorRtDouble:
            return trt

    with tempfile.TemporaryDirectory() as folder:
        plan = Path(folder) / "plan"
        plan.write_bytes(b"plan")
        return Engine(plan, batch=batch, device=device)


def crops_of(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (count, SIZE, SIZE, 3), np.uint8)


def check_batches(trt: TensorRtDouble, cuda: Cuda) -> dict[str, float]:
    """8, 3, 8 and others, timed and not, give the answers of their own batch sizes."""
    times = {}
    with open_double(trt, cuda, batch=8) as engine:
        for turn, count in enumerate((8, 3, 8, 1, 8, 2, 4, 8)):
            crops = crops_of(count, turn)
            plain = engine.infer(crops)
            timed, stages = engine.infer_timed(crops)
            for found in (plain, timed):
                angles, spread = expected(crops, count)
                np.testing.assert_allclose(found.angles, angles, rtol=1e-5)
                np.testing.assert_allclose(found.spread, spread, rtol=1e-5)
            assert stages.inference > 0, stages
            times[f"batch {count}"] = stages.inference * 1e3
        graphs = engine.info.details["cuda_graph_batches"]
        assert graphs == ([1, 4, 8] if cuda.has_graphs else []), graphs
        larger = crops_of(19)
        np.testing.assert_allclose(engine.infer(larger).angles, expected(larger, 0)[0], rtol=1e-5)
        # Another thread than the opening one, which then ends.
        answers = []
        thread = threading.Thread(target=lambda: answers.append(engine.infer(larger[:3])))
        thread.start()
        thread.join()
        np.testing.assert_allclose(answers[0].spread, expected(larger[:3], 3)[1], rtol=1e-5)
    assert trt.violations == [], trt.violations
    return times


def check_frames(trt: TensorRtDouble, cuda: Cuda) -> dict[str, float]:
    """Faces cut out of frames by the GPU: the same crops to one level, and their answers."""
    rng = np.random.default_rng(0)
    spec, times = Preprocessing(SIZE), {}
    with open_double(trt, cuda, batch=8) as engine:
        assert engine.crops_frames, engine.info.details["cropping"]
        for turn, count in enumerate((8, 3, 8, 1, 19, 2)):
            # Frames that grow, so that their memory on the GPU has to move.
            side = 200 + 150 * turn
            frames = [
                Picture(rng.integers(0, 256, (side, side + 64, 3), np.uint8)),
                Picture(rng.integers(0, 256, (side * 3 // 2 // 3 * 3, 320), np.uint8), "NV12"),
            ]
            faces = []
            for i in range(count):
                at = 9 * i - 20
                faces.append((frames[i % 2], Box(at, at + 5, at + 60 + i, at + 70)))
            crops = np.stack([crop_face(p.rgb(), box, spec) for p, box in faces])
            cut = engine.crop_frames(faces, spec)
            assert np.abs(cut.astype(int) - crops).max() <= 1
            plain = engine.infer_frames(faces, spec)
            timed, stages = engine.infer_frames_timed(faces, spec)
            last = count % 8 or 8
            for found in (plain, timed):
                np.testing.assert_allclose(found.angles, expected(cut, 0)[0], rtol=1e-5)
                spread = expected(cut[-last:], last)[1]
                np.testing.assert_allclose(found.spread[-last:], spread, rtol=1e-5)
            assert stages.cropping is not None and stages.cropping > 0, stages
            times[f"crop {count}"] = stages.cropping * 1e3
        with pytest.raises(DataError, match="expected at least one and 16 pixels"):
            engine.infer_frames(faces, Preprocessing(32))
        groups = [faces[:2], faces[:1], faces]
        for group, answer in zip(groups, engine.stream_frames(groups, spec), strict=True):
            wanted = expected(engine.crop_frames(group, spec), len(group))
            np.testing.assert_allclose(answer.spread, wanted[1], rtol=1e-5)
        assert engine.info.details["cropping"] == "on the GPU"
    assert trt.violations == [], trt.violations
    return times


def check_kernel(cuda: Cuda) -> list[str]:
    """The crop kernel on a real GPU: against OpenCV, and its times in a captured graph."""
    rng = np.random.default_rng(0)
    with cuda.current():
        kernel = CropKernel(cuda)
        rows = [against_opencv(kernel.crop, rng)]
        photo = scene(rng, 1920, 1080)
        stream, start, end = cuda.new_stream(), cuda.new_event(), cuda.new_event()
        for form, size, count in itertools.product(("RGB", "NV12"), (112, 224), (1, 4, 8)):
            picture, spec = as_form(photo, form), Preprocessing(size)
            corners = [(20 + 200 * i, 20 + 90 * i) for i in range(count)]
            faces = [(picture, Box(x, y, x + 350, y + 350)) for x, y in corners]
            load = Load(faces, spec)
            source, crops = cuda.buffer(load.size), cuda.buffer(count * size * size * 3)

            def cut(source=source, crops=crops, size=size, count=count) -> None:
                kernel.launch(source.address, crops.address, size, count, stream)

            def upload_and_cut(source=source, load=load, cut=cut) -> None:
                cuda.upload(source, load.size, stream)
                cut()

            load.write(source.host)
            times = []
            for work in (upload_and_cut, cut):
                graph = cuda.capture(stream, work)
                for _ in range(200):
                    cuda.record(start, stream)
                    cuda.launch(graph, stream)
                    cuda.record(end, stream)
                    times.append(cuda.elapsed_ms(start, end) * 1e3)
                cuda.free_graph(graph)
            began = perf_counter()
            for _ in range(20):
                for _, box in faces:
                    crop_face(picture.rgb(), box, spec)
            processor = (perf_counter() - began) / 20 * 1e6
            rows.append(
                f"{form} {size} px, {count} faces: {np.median(times[200:]):.1f} us in a graph, "
                f"{np.median(times[:200]):.1f} with the upload of {load.size / 1e6:.2f} MB, "
                f"{processor:.0f} on the processor"
            )
            cuda.free(source)
            cuda.free(crops)
        kernel.close()
    return rows


def check_stream(trt: TensorRtDouble, cuda: Cuda) -> None:
    """Batches in flight on two streams answer in order, and beside plain calls."""
    batches = [crops_of(n, seed) for seed, n in enumerate((8, 3, 8, 1, 5))]
    with open_double(trt, cuda, batch=8) as engine:
        found = list(engine.stream(iter(batches)))
        assert len(found) == len(batches)
        for crops, answer in zip(batches, found, strict=True):
            angles, spread = expected(crops, len(crops))
            np.testing.assert_allclose(answer.angles, angles, rtol=1e-5)
            np.testing.assert_allclose(answer.spread, spread, rtol=1e-5)
        angles = engine.infer(batches[0]).angles
        np.testing.assert_allclose(angles, expected(batches[0], 0)[0], rtol=1e-5)
        with pytest.raises(DataError, match="a batch of 9, expected at most 8"):
            list(engine.stream([crops_of(9)]))
    assert trt.violations == [], trt.violations


def check_threads(image: bytes) -> None:
    """Opened, used and closed in threads that end, again and again, and closed by another one."""
    failures: list[BaseException] = []
    live = Driver().live
    engine = open_double(TensorRtDouble(image=image), open_cuda())
    engine.infer(crops_of(2))
    thread = threading.Thread(target=engine.close)
    thread.start()
    thread.join()
    assert Driver().live == live, "a thread that did not open the engine could not close it"

    def work() -> None:
        try:
            check_batches(TensorRtDouble(image=image), open_cuda())
        except BaseException as e:
            failures.append(e)

    for _ in range(3):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    if failures:
        raise failures[0]


def check_waiting(cuda: Cuda, image: bytes) -> None:
    """The way to wait is chosen and said; pycuda cannot choose, which is an error."""
    if cuda.package == "pycuda":
        with pytest.raises(UsageError, match="pycuda cannot choose how the processor waits"):
            open_cuda(wait="block")
        return
    with open_double(TensorRtDouble(image=image), open_cuda(wait="block"), 1) as engine:
        assert engine.info.details["spin_wait"] == "blocks"
        engine.infer(crops_of(1))


def check_pycuda(trt: TensorRtDouble, cuda: Cuda) -> None:
    """Without graphs and kernels it says so; contexts and failures are as of the other package."""
    with open_double(trt, cuda, batch=8) as engine:
        said = engine.info.details
        assert (said["cuda_package"], said["cuda_graph_batches"]) == ("pycuda", [])
        assert said["cuda_graph"] == "none: pycuda has no CUDA graphs, cuda-bindings has"
        assert said["cropping"] == "on the processor: pycuda runs no kernels, cuda-bindings does"
        with pytest.raises(EnvironmentalError, match="pycuda has no CUDA graphs"):
            cuda.capture(0, lambda: None)
        for status, kind in ((1, EnvironmentalError), (700, GpuLostError)):
            trt.driver.fail("cuStreamSynchronize", status)
            with pytest.raises(
                EnvironmentalError, match="CUDA cuStreamSynchronize failed"
            ) as caught:
                engine.infer(crops_of(1))
            assert type(caught.value) is kind
            # Its frames hold pycuda's stream.
            del caught
        assert trt.driver.abandoned == 0, "a context is left on the stack after a failure"
        engine.infer(crops_of(1))
    with pytest.raises(EnvironmentalError, match="the GPU's context is closed"), cuda.current():
        pass


def main(package: str, nvrtc: bool) -> None:
    cuda = open_cuda()
    assert cuda.package == package, cuda.package
    image = compile_kernel(KERNEL, cuda.compute_capability) if nvrtc else b"double"
    trt = TensorRtDouble(image=image)
    print(f"{cuda.name} {cuda.compute_capability}, {package}, integrated {cuda.integrated}")
    print({name: round(ms, 4) for name, ms in check_batches(trt, cuda).items()})
    check_stream(TensorRtDouble(image=image), open_cuda())
    if package == "pycuda":
        check_pycuda(TensorRtDouble(image=image), open_cuda())
    else:
        if not nvrtc:
            # The double runs the C itself, whatever the image is.
            kept = kernel_path(cuda.compute_capability)
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_bytes(b"double")
        found = check_frames(TensorRtDouble(image=image), open_cuda())
        print({name: round(ms, 4) for name, ms in found.items()})
        if nvrtc:
            print("\n".join(check_kernel(cuda)))
    check_threads(image)
    check_waiting(cuda, image)
    assert trt.driver.live == 0, f"{trt.driver.live} things are left"
    assert trt.driver.abandoned == 0, f"{trt.driver.abandoned} contexts were left on stacks"
    print("ok: batches, times, graphs, streams, frames, threads, waiting, closing")


if __name__ == "__main__":
    main(next((a for a in sys.argv[1:] if a[0] != "-"), "cuda-bindings"), "--nvrtc" in sys.argv)
