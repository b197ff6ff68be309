"""Open what is to be measured: an artifact, a float network, and the reference of an artifact."""

from __future__ import annotations

import logging
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from edgehp.artifact.check import Artifact, load_artifact, newest_artifact
from edgehp.crop import Preprocessing
from edgehp.engines import PROCESSOR_ENGINES, Engine, open_engine, processor_engine
from edgehp.errors import CompatibilityError, EdgehpError, EnvironmentalError, UsageError

logger = logging.getLogger(__name__)

# An artifact may carry the FP32 graph it was made from under this name.
_REFERENCE = "reference.onnx"


@dataclass(frozen=True)
class OpenedNetwork:
    """A network in an opened engine; a context manager that closes it.

    Attributes:
        engine: opened.
        name: for people.
        digest: SHA-256 (hex) of the weights file the network was read from.
        preprocessing: from photo and box to the engine's crops.
        bins: first and last bin value of the heads in degrees; None where nobody knows.
        artifact: where it came from; None for a float network.
    """

    engine: Engine
    name: str
    digest: str | None
    preprocessing: Preprocessing
    bins: tuple[float, float] | None = None
    artifact: Artifact | None = None
    _closing: ExitStack = field(default_factory=ExitStack, repr=False, compare=False)

    def __enter__(self) -> OpenedNetwork:
        """The network itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the engine and remove temporary files."""
        self._closing.close()


def open_artifact(
    path: Path | str | None = None,
    *,
    threads: int | None = None,
    batch: int | None = None,
    wait: str = "auto",
) -> OpenedNetwork:
    """Check an artifact and open its engine.

    Args:
        path: its directory; None takes the newest complete one under ``dist``.
        threads: processor threads for inference; None leaves it to the runtime.
        batch: the batch size to prepare for; one the engine was not built for is reduced to it.
        wait: how the processor waits for a GPU, see `edgehp.engines.open_engine`.

    Raises:
        DataError: no such artifact.
        CompatibilityError: it does not belong on this device, or was altered.
        EnvironmentalError: the runtime is missing or failed.
    """
    artifact = load_artifact(newest_artifact() if path is None else path)
    return open_loaded(artifact, threads=threads, batch=batch, wait=wait)


def open_loaded(
    artifact: Artifact,
    *,
    threads: int | None = None,
    batch: int | None = None,
    wait: str = "auto",
) -> OpenedNetwork:
    """Open the engine of an artifact that `load_artifact` has checked; as `open_artifact`."""
    manifest, record = artifact.manifest, artifact.engine
    engine = open_engine(
        record.kind,
        artifact.engine_path,
        threads=threads,
        device=artifact.engine_device,
        batch=None if batch is None else max(record.min_batch, min(batch, record.max_batch)),
        wait=wait,
    )
    reached = manifest.precision.reached or "unknown"
    return _opened(artifact, engine, f"{manifest.target.name}, {reached}")


def open_emulation(
    path: Path | str | None = None, *, threads: int | None = None, batch: int | None = None
) -> OpenedNetwork:
    """Open the graph an artifact's engine is made from, on this processor.

    For an artifact of another device, or a deferred one: its INT8 rounding is that of the graph's
    Q/DQ nodes, but kernels and FP16 arithmetic of the device are not reproduced.

    Arguments and errors as in `open_artifact`, but the device is not checked.
    """
    found = newest_artifact() if path is None else Path(path)
    artifact = load_artifact(found, bytes_only=True)
    kind = processor_engine()
    engine = open_engine(kind, artifact.graph_path, threads=threads, batch=batch)
    return _opened(artifact, engine, f"emulated: its graph on {kind}")


def open_network(
    text: str,
    *,
    kind: str | None = None,
    threads: int | None = None,
    batch: int | None = None,
) -> OpenedNetwork:
    """Open a network in floating point on the processor.

    Args:
        text: a bundled name, a checkpoint, or a deployed graph (``.onnx``).
        kind: the engine; None takes OpenVINO, else onnxruntime.
        threads: processor threads for inference.
        batch: the batch size to prepare for.

    Raises:
        UsageError: neither a bundled name nor a file of a known kind.
        CheckpointError: the file is missing, damaged, or not such a network.
        EnvironmentalError: no engine, or a package that reads the file, is installed.
    """
    from edgehp.networks.bundled import resolve_network
    from edgehp.networks.graph import graph_bytes

    network = resolve_network(text)
    engine_kind = kind or processor_engine()
    with ExitStack() as opening:
        path = network.path
        if not network.is_one_file:
            folder = opening.enter_context(tempfile.TemporaryDirectory(prefix="edgehp-"))
            path = Path(folder) / "network.onnx"
            path.write_bytes(graph_bytes(network.graph()))
        engine = open_engine(engine_kind, path, threads=threads, batch=batch)
        opening.callback(engine.close)
        bins, file = network.spec.bins, Path(text).name
        return OpenedNetwork(
            engine,
            f"{network.spec.name} ({'' if file == network.spec.name else f'{file}, '}FP32)",
            network.digest,
            network.spec.preprocessing,
            None if bins is None else (bins.first, bins.last),
            None,
            opening.pop_all(),
        )


def open_reference(
    artifact: OpenedNetwork,
    text: str | None = None,
    *,
    threads: int | None = None,
    batch: int | None = None,
) -> OpenedNetwork:
    """Open the FP32 network that an artifact was made from.

    Args:
        artifact: what `open_artifact` gave.
        text: the reference as for `open_network`; None takes the FP32 graph inside the artifact if
            it has one, else the network its manifest names.
        threads: processor threads for inference.
        batch: the batch size to prepare for.

    Raises:
        CompatibilityError: the network found is not the one the artifact was made from.
        UsageError: the reference was not found and must be given.
        EnvironmentalError: no engine for it is installed.
    """
    found = artifact.artifact
    if found is None:
        raise UsageError(f"{artifact.name} is a float network: it is its own reference")
    record = found.manifest.network
    built = found.manifest.engine
    kind = built.kind if built and built.kind in PROCESSOR_ENGINES else processor_engine()
    if text is None and (found.path / _REFERENCE).is_file():
        engine = open_engine(kind, found.path / _REFERENCE, threads=threads, batch=batch)
        closing = ExitStack()
        closing.callback(engine.close)
        return OpenedNetwork(
            engine,
            f"{_REFERENCE} of the artifact (FP32)",
            record.weights_sha256,
            artifact.preprocessing,
            artifact.bins,
            None,
            closing,
        )
    source = text or record.source
    try:
        reference = open_network(source, kind=kind, threads=threads, batch=batch)
    except EdgehpError as e:
        if text is not None or isinstance(e, EnvironmentalError):
            raise
        raise UsageError(
            f"{found.path} was made from {source!r}, which was not found ({e.sentence})\n"
            "hint: give its FP32 reference with --reference"
        ) from e
    if reference.digest != record.weights_sha256:
        reference.__exit__(None, None, None)
        raise CompatibilityError(
            f"{source} is not the network that {found.path} was made from: found SHA-256 "
            f"{str(reference.digest)[:16]}..., the manifest says {record.weights_sha256[:16]}...\n"
            "hint: give the right one with --reference, or build the artifact again"
        )
    return reference


def _opened(artifact: Artifact, engine: Engine, how: str) -> OpenedNetwork:
    manifest = artifact.manifest
    bins = (manifest.network.spec or {}).get("bins")
    closing = ExitStack()
    closing.callback(engine.close)
    return OpenedNetwork(
        engine,
        f"{manifest.name} ({how})",
        manifest.network.weights_sha256,
        manifest.preprocessing,
        None if bins is None else (float(bins["first"]), float(bins["last"])),
        artifact,
        closing,
    )
