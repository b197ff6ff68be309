"""edgehp on a board whose TensorRT is played by OpenVINO: everything around it is real."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from edgehp.cli.main import main
from edgehp.driver import Gpu
from edgehp.engines.build import BuildOptions, BuildReport, build_engine
from edgehp.pipeline import engine, finish
from edgehp.pipeline.plan import BuildRequest, Place, Plan, make_plan

MODULE = "Jetson Orin Nano (p3767-0003)"


def place_here(plan: Plan, device: object) -> Place:
    del plan, device
    return Place(Gpu("Orin", "8.7"), MODULE, "10.3.0")


def plan_here(request: BuildRequest) -> Plan:
    return replace(make_plan(request), kind="openvino")


def build_here(kind: str, graph: Path, out: Path, options: BuildOptions) -> BuildReport:
    return build_engine(kind, graph, out, replace(options, compute_capabilities=()))


if __name__ == "__main__":
    finish.find_place = place_here
    finish.make_plan = plan_here
    engine.build_engine = build_here
    main()
