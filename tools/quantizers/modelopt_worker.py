"""NVIDIA ModelOpt on a float core; run by an interpreter that has nvidia-modelopt[onnx].

    python modelopt_worker.py CORE.onnx CROPS.npy max|entropy OUT.onnx REPORT.json

Needs nothing of edgehp: that interpreter may have other versions of everything.
"""

from __future__ import annotations

import json
import re
import sys
import time
from importlib import import_module
from pathlib import Path

import numpy as np


def main() -> None:
    core, crops, method, out, report = sys.argv[1:]
    quantize = import_module("modelopt.onnx.quantization").quantize
    data = np.load(crops)
    begin = time.perf_counter()
    quantize(
        onnx_path=core,
        quantize_mode="int8",
        calibration_data=data,
        calibration_method=method,
        calibration_eps=["cpu"],
        output_path=out,
    )
    seconds = time.perf_counter() - begin
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(r"VmHWM:\s*(\d+) kB", status)
    peak = int(found[1]) / 1024 if found else 0.0
    values = {"seconds": seconds, "peak_mib": peak}
    Path(report).write_text(json.dumps(values), encoding="utf-8")


if __name__ == "__main__":
    main()
