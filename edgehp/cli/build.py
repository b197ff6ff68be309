"""``edgehp build``: from a network to a checked artifact."""

from __future__ import annotations

import logging
import shlex
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgehp.cli._command import (
    PATH,
    Positional,
    json_option,
    output_option,
    photo_depth_option,
    skip_bad_option,
    subcommand,
    threads_option,
    typed,
    weights_option,
    with_weights,
)
from edgehp.cli._output import conclude, print_json, print_table, say, styled
from edgehp.cli._remote import keep_artifact, over_ssh, sent_artifact
from edgehp.errors import EnvironmentalError, UsageError
from edgehp.progress import step

if TYPE_CHECKING:
    from edgehp.artifact.manifest import Manifest
    from edgehp.cli._remote import Changes
    from edgehp.pipeline.pipeline import BuildResult
    from edgehp.pipeline.plan import BuildRequest

logger = logging.getLogger(__name__)

# Where a context's `meta` holds the manifest that --recipe named.
_REPEATED = "edgehp.cli.repeated"


def _take_recipe(context: click.Context, _: click.Parameter, path: Path | None) -> None:
    """Make the recipe's values the defaults of this command line."""
    from edgehp.cli.project import read_recipe

    if path is not None:
        recipe, context.meta[_REPEATED] = read_recipe(path)
        known = {p.name for p in context.command.params}
        values = {k: v for k, v in recipe.items() if k in known}
        context.default_map = {**(context.default_map or {}), **values}


def _to_boards(given: Mapping[str, Any]) -> Callable[[str], Changes]:
    """On a board a deferred artifact is finished, made here where the engine needs its device."""
    from edgehp.artifact.check import read_manifest
    from edgehp.device import HostProbe
    from edgehp.pipeline.plan import find_place, make_plan, unfinished_artifact
    from edgehp.remote.errand import Parcel

    output = given["output"]
    deferred = unfinished = unfinished_artifact(given["artifact"], given["finish"], given["target"])
    if deferred is None:
        plan = make_plan(_request(given))
        try:
            if plan.kind == "tensorrt":
                find_place(plan, HostProbe())
        except EnvironmentalError:
            folder = click.get_current_context().with_resource(
                tempfile.TemporaryDirectory(prefix="edgehp-")
            )
            deferred = _build({**given, "defer": True, "output": Path(folder)}).path
    # What the artifact was made with is in it: these options alone are for its finish.
    changes = {n: () for n in given if n not in ("validate_on", "threads", "as_json")}

    def change(own: str) -> Changes:
        if deferred is None:

            def keep(found: Path) -> list[Path]:
                made = sorted(path.parent for path in found.glob("*/manifest.json"))
                return [kept for p in made for kept in keep_artifact(p, output / own / p.name)]

            return {"output": [Parcel(output / own, keep=keep)]}
        place = output / own / read_manifest(deferred).name
        if deferred == unfinished and not own:
            place = deferred
        artifact = sent_artifact(
            deferred, allow_deferred=True, here=place, keep=lambda p: keep_artifact(p, place)
        )
        return changes | {"finish": [artifact]}

    return change


@subcommand(
    "build",
    "edgehp build --target cpu",
    "edgehp build --target orin --network net.safetensors --calibration faces/ --defer",
    "edgehp build --finish dist/kd-resnet18-112-orin-nano-8gb-int8",
    "edgehp build --recipe dist/kd-resnet18-112-cpu-int8/manifest.json --output again",
    renamed={"--batch": "--batch-sizes"},
)
@click.argument("artifact", cls=Positional, required=False, type=PATH)
@click.option("--target", help="What to build for; 'edgehp targets' lists them.")
@click.option(
    "--all",
    "all_targets",
    is_flag=True,
    help="Build for every target of edgehp.toml; engines that other devices build are deferred. "
    "With --lab: on every such board.",
)
@click.option(
    "--recipe",
    type=click.Path(exists=True, path_type=Path),
    is_eager=True,
    expose_value=False,
    callback=_take_recipe,
    help="Repeat a build: an artifact, its manifest.json, or the recipe of it alone. Options that "
    "are typed come first; another network or other calibration crops are said.",
)
@click.option(
    "--precision",
    type=click.Choice(("int8", "fp16", "fp32")),
    default="int8",
    help="What the convolutions must run in; less is an error.",
)
@click.option(
    "--network",
    default="kd-resnet18-112",
    help="A bundled network, a checkpoint, a deployed ONNX graph, or the description (.toml) or, "
    "with --describe, the ONNX file of any other.",
)
@weights_option
@click.option(
    "--describe",
    type=PATH,
    metavar="TOML",
    help="Description of --network, an ONNX file of any exporter or the folder of several.",
)
@click.option(
    "--calibration",
    type=PATH,
    help="Folder or zip of faces to calibrate on, 64 at least. Default: the shipped crops.",
)
@click.option(
    "--calibration-method",
    type=click.Choice(("auto", "minmax", "percentile", "entropy", "mse")),
    default="auto",
    help="How activation ranges are chosen; auto tries them.",
)
@click.option(
    "--validate-on",
    type=PATH,
    help="Folder or zip of held-out faces for the accuracy gate. Default: the shipped ones.",
)
@photo_depth_option
@skip_bad_option
@click.option(
    "--max-drop",
    type=click.FloatRange(0),
    default=0.1,
    help="Largest drop against FP32 in degrees; more ends with exit code 3 and no artifact.",
)
@click.option(
    "--mixed/--no-mixed",
    default=None,
    help="Where INT8 throughout drops more than --max-drop, search which layers to keep in "
    "floating point so that it does not. Default: only where --max-drop is given.",
)
@click.option(
    "--defer",
    is_flag=True,
    help="Where the engine cannot be built here: make everything else, to be finished there.",
)
@click.option(
    "--finish",
    type=PATH,
    metavar="DIR",
    help="Build the engine of a deferred artifact on this device.",
)
@output_option("Directory that artifacts are made in.", default=Path("dist"))
@click.option("--input-size", type=click.IntRange(16, 1024), help="Other input side in pixels.")
@click.option(
    "--batch-sizes",
    "batch",
    default="1,1,8",
    metavar="MIN,BEST,MAX",
    help="Batch sizes of the engine; one number means just that.",
)
@threads_option
@click.option(
    "--dla", type=click.IntRange(0, 15), help="Jetson: run on this deep-learning accelerator core."
)
@click.option(
    "--workspace",
    type=click.IntRange(1),
    metavar="MIB",
    help="Memory TensorRT may plan with. Default: a quarter of a Jetson's, else TensorRT's own.",
)
@click.option(
    "--optimization-level",
    type=click.IntRange(0, 5),
    help="TensorRT: 5 tries most and builds slowest. Default: TensorRT's own.",
)
@click.option(
    "--version-compatible",
    is_flag=True,
    help="TensorRT: later releases of the same major version read the engine too.",
)
@click.option(
    "--hardware-compatible",
    is_flag=True,
    help="TensorRT: for every discrete GPU from Ampere on, at some cost in speed.",
)
@json_option
@over_ssh(
    "network", "describe", "calibration", "validate_on", plan=_to_boards, own_all="all_targets"
)
def command(**given: Any) -> None:
    """Build dist/NETWORK-TARGET-PRECISION, or --finish a deferred artifact on its device.

    Network, deployed graph, Q/DQ from calibration crops, lint, engine, precision audit, accuracy
    against FP32, artifact. Nothing is written unless every step succeeds.

    With --max-drop, layers go back to floating point where INT8 throughout drops more: as few
    predicted milliseconds as the search finds, named in the output and in the manifest.
    """
    from edgehp.pipeline.finish import finish as finish_artifact
    from edgehp.pipeline.plan import unfinished_artifact

    threads, validate_on = given["threads"], given["validate_on"]
    unfinished = unfinished_artifact(given["artifact"], given["finish"], given["target"])
    if given["all_targets"]:
        if unfinished is not None or given["target"] is not None:
            raise UsageError(
                "--all builds the targets of edgehp.toml: leave --target and --finish out"
            )
        _build_all(given)
        return
    if unfinished is not None:
        with step("finish"):
            result = finish_artifact(
                unfinished,
                validate_on=validate_on,
                photo_depth=given["photo_depth"],
                skip_bad=given["skip_bad"],
                threads=threads,
            )
    else:
        result = _build(given)
    if given["as_json"]:
        print_json({"path": str(result.path), "manifest": result.manifest.to_dict()})
    else:
        _print(result, validate_on, threads)


def _request(given: Mapping[str, Any]) -> BuildRequest:
    """What the options ask for."""
    from edgehp.pipeline.plan import BuildRequest

    network = with_weights(given["network"], given["weights"])
    options = {**given, "network": network}
    return BuildRequest.from_options(options, max_drop_typed=typed("max_drop"))


def _build(given: Mapping[str, Any], name: str = "build") -> BuildResult:
    """Build what the options ask for, and say what is another where they repeat a build."""
    from edgehp.cli.project import differences
    from edgehp.pipeline.pipeline import build

    request = _request(given)
    with step(name):
        result = build(request)
    repeated = click.get_current_context().meta.get(_REPEATED)
    for text in () if repeated is None else differences(repeated, result.manifest):
        logger.warning("%s", text)
    return result


def _build_all(given: dict[str, Any]) -> None:
    """Build every target of the project; engines that need their own device are deferred."""
    from edgehp.cli.project import Project

    project = click.get_current_context().find_root().obj
    if not isinstance(project, Project) or not project.targets:
        raise UsageError(
            "--all builds the targets of edgehp.toml: none are here\nhint: edgehp init"
        )
    results = []
    for target in project.targets:
        options = {**given, "target": target, "defer": True}
        results.append(_build(options, f"build for {target}"))
        if not given["as_json"]:
            _verdict(results[-1], given["validate_on"], given["threads"])
    if given["as_json"]:
        print_json([{"path": r.path, "manifest": r.manifest.to_dict()} for r in results])


def _network(manifest: Manifest) -> str:
    text = f"{manifest.network.source}, {manifest.preprocessing.size} pixels"
    own = manifest.build.recipe.get("own_size")
    return text if own is None else f"{text} (trained at {own})"


def _print(result: BuildResult, validate_on: Path | None, threads: int | None) -> None:
    from edgehp.report.figures import PARTS, gate_rows, mixed_text

    manifest = result.manifest
    precision, engine, accuracy = manifest.precision, manifest.engine, manifest.accuracy
    counts = ", ".join(f"{n} {p}" for p, n in precision.counts.items())
    rows: list[tuple[str, object]] = [
        ("network", _network(manifest)),
        ("target", manifest.target.name),
        ("precision", f"{precision.asked} asked, {precision.reached or 'none yet'} reached"),
        ("convolutions", f"{counts or '-'} ({precision.audited})"),
    ]
    if engine is not None:
        # Without the commit that OpenVINO has in its version.
        versions = ", ".join(f"{k} {v.partition('-')[0]}" for k, v in engine.versions.items())
        size = sum(manifest.file(name).size for name in engine.files)
        rows.append(("engine", f"{versions}; {size / 1e6:.1f} MB"))
    if (calibration := manifest.calibration) is not None:
        crops = f"{calibration.count} crops of {calibration.source}"
        rows.append(("calibration", f"{crops}, {calibration.method}"))
    if accuracy is not None:
        if accuracy.reference is not None and accuracy.artifact is not None:
            means = (
                f"{accuracy.reference:.3f} FP32, {accuracy.artifact:.3f} {precision.asked.upper()}"
            )
            rows.append(("MAE, degrees", means))
        rows.append(("measured on", f"{accuracy.count} crops of {accuracy.dataset}"))
        rows.append(("measured with", accuracy.measured_with))
    print_table(("what", "result"), rows)
    if (mixed := mixed_text(manifest)) is not None:
        click.echo("")
        say(mixed)
    if subsets := gate_rows(manifest):
        click.echo("")
        print_table(PARTS, subsets, range(1, 5))
    _verdict(result, validate_on, threads)


def _verdict(result: BuildResult, validate_on: Path | None, threads: int | None) -> None:
    """The last lines: what was made, what it loses, where it is, what comes next."""
    from edgehp.pipeline.plan import finish_command

    manifest, path = result.manifest, result.path
    if path.is_absolute() and path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    size = sum(f.size for f in manifest.files) / 1e6
    seconds = sum(s.seconds for s in manifest.build.steps)
    if (accuracy := manifest.accuracy) is not None:
        low, high = accuracy.interval
        interval = f"(95 %: {low:+.4f} to {high:+.4f})"
        text = f"drop {accuracy.drop:+.4f} degrees {interval}, {accuracy.max_drop:g} allowed"
        conclude("PASS", "green", text)
    deferred = manifest.state == "deferred"
    word, colour = ("deferred", "yellow") if deferred else ("built", "green")
    click.echo(f"{styled(word, colour, bold=True)} {path}  {size:.1f} MB in {seconds:.0f} s")
    if deferred:
        click.echo(f"next, on the device:\n  {finish_command(str(path), validate_on, threads)}")
    else:
        click.echo(f"next: {shlex.join(['edgehp', 'validate', str(path)])}")
