"""Uses the CUDA adapter and the engine on top of it, on whatever driver this process finds.

Run as ``python -m tests.driver.adapter_checks [package] [--nvrtc]``: with the driver double in the
library path, in environments of several CUDA packages; or with ``--nvrtc`` on a real GPU.
"""

from __future__ import annotations

import sys
import tempfile
import threading
from pathlib import Path

import numpy as np

from edgehp.engines.cuda import Cuda, open_cuda
from edgehp.engines.tensorrt import TensorRtEngine
from tests.driver.tensorrt import KERNEL, SIZE, TensorRtDouble, expected


def open_double(trt: TensorRtDouble, cuda: Cuda, batch: int | None = None) -> TensorRtEngine:
    """The engine of edgehp with this module in TensorRT's place."""

    class Engine(TensorRtEngine):
        def _open_cuda(self, device: str | None, wait: str) -> Cuda:
            return cuda

        def _import(self) -> TensorRtDouble:
            return trt

    with tempfile.TemporaryDirectory() as folder:
        plan = Path(folder) / "plan"
        plan.write_bytes(b"plan")
        return Engine(plan, batch=batch)


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


def check_threads(image: bytes) -> None:
    """Opened, used and closed in threads that end, again and again."""
    failures: list[BaseException] = []

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


def main(package: str, nvrtc: bool) -> None:
    cuda = open_cuda()
    assert cuda.package == package, cuda.package
    image = ptx(cuda.compute_capability) if nvrtc else b"double"
    trt = TensorRtDouble(image=image)
    print(f"{cuda.name} {cuda.compute_capability}, {package}, integrated {cuda.integrated}")
    print({name: round(ms, 4) for name, ms in check_batches(trt, cuda).items()})
    check_threads(image)
    if package != "pycuda":
        with open_double(TensorRtDouble(image=image), open_cuda(wait="block"), 1) as engine:
            assert engine.info.details["spin_wait"] == "blocks"
            engine.infer(crops_of(1))
    assert trt.driver.live == 0, f"{trt.driver.live} things are left"
    assert trt.driver.abandoned == 0, f"{trt.driver.abandoned} contexts were left on stacks"
    print("ok: batches, times, graphs, threads, waiting, closing")


def ptx(capability: str) -> bytes:
    """The kernel compiled for a GPU."""
    from cuda.bindings import nvrtc

    def call(status: object, *values: object) -> object:
        assert int(status) == 0, status  # type: ignore[call-overload]
        return values[0] if values else None

    program = call(*nvrtc.nvrtcCreateProgram(KERNEL, b"head.cu", 0, [], []))
    option = f"--gpu-architecture=compute_{capability.replace('.', '')}".encode()
    call(*nvrtc.nvrtcCompileProgram(program, 1, [option]))
    text = b" " * call(*nvrtc.nvrtcGetPTXSize(program))  # type: ignore[operator]
    call(*nvrtc.nvrtcGetPTX(program, text))
    return text + b"\0"


if __name__ == "__main__":
    main(next((a for a in sys.argv[1:] if a[0] != "-"), "cuda-bindings"), "--nvrtc" in sys.argv)
