"""What can be said of an unknown ONNX pose network: the beginning of its description.

`read_off` says what the file and one run on noise tell. `try_all` runs the network on photos of
known pose by a few usual inputs, decodes its raw outputs in every way that a description can say,
and orders these by their error.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from msgspec.structs import replace

from edgehp import pose
from edgehp._installed import import_package
from edgehp.crop import IMAGENET_MEAN, IMAGENET_STD
from edgehp.errors import CheckpointError
from edgehp.networks.described import GREY_WEIGHTS
from edgehp.networks.description import ANGLES, QUATERNION, Description, InputSpec, OutputSpec
from edgehp.networks.foreign import free_batch, read_network, shape_of
from edgehp.networks.graph import graph_bytes, spec_of_graph
from edgehp.progress import step

if TYPE_CHECKING:
    import onnx

Array = npt.NDArray[np.float64]
# A share of the error of one constant answer. The best of thousands of ways to read noise is a
# little better than a constant too, by chance.
_CLEARLY = 0.7
_USUAL_SIZE = 224
_LEAST_BINS = 30
_BATCH = 8
_KINDS = {4: "quaternion", 6: "sixd", 9: "matrix", 3: "euler"}
# S M S is the same for S and -S.
_SIGNS = ((1, 1, 1), (1, -1, -1), (-1, 1, -1), (-1, -1, 1))


@dataclass(frozen=True)
class Network:
    """What was read off a file.

    Attributes:
        description: complete, the rest of it usual values; its output is the first of `outputs`.
        outputs: what could be a pose, the likeliest kind first.
        shapes: of all outputs of one crop, by their names.
        fixed_size: whether the file itself says the input's size.
    """

    description: Description
    outputs: tuple[OutputSpec, ...]
    shapes: Mapping[str, tuple[int, ...]]
    fixed_size: bool

    @property
    def shown_outputs(self) -> str:
        """All outputs with their shapes, for people."""
        return _shown(self.shapes)


@dataclass(frozen=True)
class Trial:
    """One way to feed and to read a network; `error` is its MAE in degrees."""

    input: InputSpec
    output: OutputSpec
    error: float


@dataclass(frozen=True)
class Trials:
    """All ways, best first.

    Attributes:
        found: the ways.
        photos: how many photos they were tried on.
        constant: MAE in degrees of the best constant answer, the median of the labels.
    """

    found: tuple[Trial, ...]
    photos: int
    constant: float

    @property
    def clear(self) -> bool:
        """Whether the best is clearly better than one constant answer."""
        return self.found[0].error < _CLEARLY * self.constant

    @property
    def other_decoding(self) -> Trial | None:
        """The best that reads the outputs in another way than the best of all."""
        return next((t for t in self.found if t.output != self.found[0].output), None)


def read_off(path: Path, size: int | None = None) -> Network:
    """Say what an ONNX file tells of itself.

    Args:
        path: the file.
        size: of the input in pixels, where the file does not say it; else 224 is tried.

    Raises:
        CheckpointError: it cannot be read, is edgehp's own, takes no picture, does not run, or has
            no output that could be a pose.
        EnvironmentalError: onnx or onnxruntime is missing.
    """
    model = read_network(path, as_written=True)
    if spec_of_graph(model) is not None:
        raise CheckpointError(f"{path} is a graph of edgehp's own, which needs no description")
    given = {i.name: shape_of(i) for i in model.graph.input}
    name, shape = next(iter(given.items()), ("", []))
    shown = ", ".join(f"{n} {[d or '?' for d in s]}" for n, s in given.items()) or "none"
    if len(given) != 1 or len(shape) != 4:
        raise CheckpointError(f"{path}: its inputs are {shown}, expected one picture [N, C, H, W]")
    nhwc = shape[3] in (1, 3) and shape[1] not in (1, 3)
    channels = (shape[3] if nhwc else shape[1]) or 3
    sides = {d for d in (shape[1:3] if nhwc else shape[2:]) if d is not None}
    if channels not in (1, 3) or len(sides) > 1 or (size and sides - {size}):
        wanted = "a square" if size is None else f"{size} x {size} pixels"
        raise CheckpointError(f"{path}: its input is {shown}, expected {wanted} of 1 or 3 channels")
    side = next(iter(sides), None) or size or _USUAL_SIZE
    plain = InputSpec(
        size=side,
        name=name,
        layout="NHWC" if nhwc else "NCHW",
        colour="GREY" if channels == 1 else "RGB",
        mean=(127.5,) if channels == 1 else IMAGENET_MEAN,
        std=(127.5,) if channels == 1 else IMAGENET_STD,
    )
    noise = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), np.uint8)
    runner = _Runner(path, model, plain)
    shapes = {n: a.shape[1:] for n, a in runner(noise, plain).items()}
    outputs = tuple(_outputs(shapes))
    if not outputs:
        raise CheckpointError(
            f"{path}: its outputs are {_shown(shapes)}; expected 3 (angles), 4 (quaternion), 6 "
            f"or 9 values (matrix), or three times {_LEAST_BINS} bins or more\n"
            "hint: export the network with its pose as an output"
        )
    description = Description(path.stem[:100], plain, outputs[0], files=(path.name,))
    return Network(description, outputs, shapes, bool(sides))


def _shown(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{n} [{', '.join(map(str, ('N', *s)))}]" for n, s in shapes.items())


def _outputs(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[OutputSpec]:
    """What could be a pose: bins, then quaternion, 6D, matrix, angles."""
    widths = {n: int(np.prod(s)) for n, s in shapes.items()}
    for width in dict.fromkeys(widths.values()):
        names = tuple(n for n, w in widths.items() if w == width)
        if width >= _LEAST_BINS and len(names) == 3:
            yield OutputSpec("bins", names=names)
    for name, shape in shapes.items():
        if len(shape) == 2 and shape[0] == 3 and shape[1] >= _LEAST_BINS:
            yield OutputSpec("bins", names=(name,))
    for wanted, kind in _KINDS.items():
        for name, width in widths.items():
            if width == wanted:
                yield OutputSpec(kind, names=(name,))  # type: ignore[arg-type]
    single = tuple(n for n, w in widths.items() if w == 1)
    if len(single) == 3:
        yield OutputSpec("euler", names=single)


class _Runner:
    """Runs a network's file on uint8 RGB crops by any input of its size and layout."""

    def __init__(self, path: Path, model: onnx.ModelProto, spec: InputSpec) -> None:
        onnxruntime = import_package("onnxruntime", "running a network needs")
        self._path, self._names = path, [o.name for o in model.graph.output]
        channels = len(spec.mean)
        pixels = (spec.size, spec.size)
        sides = (*pixels, channels) if spec.layout == "NHWC" else (channels, *pixels)
        data = graph_bytes(free_batch(model, spec.name, sides, self._names))
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        try:
            self._session = onnxruntime.InferenceSession(
                data, options, providers=["CPUExecutionProvider"]
            )
        except Exception as e:  # onnxruntime's errors share no public base class
            raise self._failed(e, spec.size) from e

    def _failed(self, why: Exception, size: int) -> CheckpointError:
        return CheckpointError(
            f"{self._path}: onnxruntime cannot run the network on {size} x {size} pixels: "
            f"{' '.join(str(why).split())[:300]}\n"
            "hint: export it with a dynamic batch; --input-size says its size"
        )

    def __call__(self, crops: npt.NDArray[np.uint8], spec: InputSpec) -> dict[str, Array]:
        """Raw outputs [N, ...] of crops [N, S, S, 3] as `spec` feeds them."""
        parts = []
        for start in range(0, len(crops), _BATCH):
            x = crops[start : start + _BATCH].astype(np.float64)
            if spec.colour == "GREY":
                x = x @ np.array(GREY_WEIGHTS)[:, None]
            elif spec.colour == "BGR":
                x = x[..., ::-1]
            x = (x - spec.mean) / spec.std
            x = x if spec.layout == "NHWC" else x.transpose(0, 3, 1, 2)
            given = {spec.name: np.ascontiguousarray(x, np.float32)}
            try:
                answers = self._session.run(self._names, given)
            except Exception as e:  # as above
                raise self._failed(e, spec.size) from e
            if any(np.shape(a)[:1] != (len(x),) for a in answers):
                raise self._failed(ValueError("the outputs are not one a crop"), spec.size)
            parts.append([np.asarray(a, np.float64) for a in answers])
        joined = map(np.concatenate, zip(*parts, strict=True))
        return dict(zip(self._names, joined, strict=True))


def _inputs(plain: InputSpec) -> Iterator[InputSpec]:
    """Usual normalisations and colours."""
    scales: list[tuple[Sequence[float], Sequence[float]]] = [
        ((0.0,), (255.0,)),
        ((127.5,), (127.5,)),
        ((127.5,), (255.0,)),
        ((0.0,), (1.0,)),
    ]
    grey = len(plain.mean) == 1
    if not grey:
        scales.insert(0, (IMAGENET_MEAN, IMAGENET_STD))
    for (mean, std), colour in itertools.product(scales, ("GREY",) if grey else ("RGB", "BGR")):
        count = 1 if grey else 3
        mean, std = (tuple(np.resize(v, count).tolist()) for v in (mean, std))
        if colour == "BGR":
            mean, std = mean[::-1], std[::-1]
        yield replace(plain, colour=colour, mean=mean, std=std)


def _decodings(plain: OutputSpec, width: int) -> Iterator[OutputSpec]:
    """Every way that a description can say to read one output; `width` is the number of bins."""
    if plain.kind in ("euler", "bins"):
        ranges = [(plain.first, plain.last)]
        if plain.kind == "bins":  # 3 degrees a bin from -99 on is Hopenet's, then the whole circle
            ranges += [(-99.0, 3.0 * width - 102), (1.5 - 1.5 * width, 1.5 * width - 1.5)]
            ranges += [(-180.0, 180.0 - 360 / width), (-180.0, 180.0)]
        for order in itertools.permutations(ANGLES):
            for signs in itertools.product((1, -1), repeat=3):
                for radians in (False, True) if plain.kind == "euler" else (False,):
                    known = [c for c in pose.CONVENTIONS.values() if c.radians == radians]
                    named = next((c for c in known if c.signs == signs), known[0])
                    for first, last in dict.fromkeys(ranges):
                        yield replace(
                            plain,
                            order=order,
                            convention=named.name,
                            signs=signs,
                            first=first,
                            last=last,
                        )
        return
    orders = itertools.permutations(QUATERNION) if plain.kind == "quaternion" else [plain.order]
    for order, signs, transposed in itertools.product(orders, _SIGNS, (False, True)):
        yield replace(plain, order=order, signs=signs, transposed=transposed)


def try_all(network: Network, path: Path, crops: npt.NDArray[np.uint8], truth: Array) -> Trials:
    """Feed and read a network in all ways, and order them by their error.

    Args:
        network: as `read_off` gave it.
        path: the file.
        crops: uint8 RGB [N, S, S, 3].
        truth: (pitch, yaw, roll) [N, 3], degrees.

    Raises:
        CheckpointError: it does not run, or no output of it is finite.
    """
    plain = network.description.input
    runner, found = _Runner(path, read_network(path, as_written=True), plain), list[Trial]()
    inputs = list(_inputs(plain))
    with step("try", len(inputs), "inputs") as going:
        for spec in inputs:
            answers = runner(crops, spec)
            for output in network.outputs:
                raw = [answers[n] for n in output.names]
                lengths = np.concatenate([np.abs(r).reshape(len(r), -1).sum(1) for r in raw])
                if not np.isfinite(lengths).all() or (output.kind == "quaternion" and 0 in lengths):
                    continue
                for way in _decodings(output, sum(r[0].size for r in raw) // 3):
                    error = float(pose.angle_errors(way.decode(raw), truth).mean())
                    found.append(Trial(spec, way, error))
            going.advance()
    if not found:
        raise CheckpointError(f"{path}: its outputs are not finite on any of {len(crops)} photos")
    found.sort(key=lambda t: t.error)
    constant = float(pose.angle_errors(np.median(truth, axis=0), truth).mean())
    return Trials(tuple(found), len(crops), constant)
