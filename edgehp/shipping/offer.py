"""What a repository says about a bundle: enough for a board to know whether it fits, and no more.

It travels as the ``custom`` part of a TUF target, signed with the list of targets.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from edgehp.artifact.check import check_fit
from edgehp.artifact.device import DeviceProbe, Gpu
from edgehp.artifact.manifest import EngineRecord, TargetRecord
from edgehp.errors import CompatibilityError, EdgehpError, EnvironmentalError
from edgehp.shipping.bundle import SUFFIX, VerifiedBundle
from edgehp.targets import load_target

__all__ = ["FIELD", "Offer", "Remembered", "is_plain_name"]

# Under ``custom``, so that other tools may put their own beside it.
FIELD = "edgehp"
_SCHEMA = 1
_LARGEST_SERIAL = 2**53
_DIGEST = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


def is_plain_name(name: str) -> bool:
    """Whether a target's name is one file name, fit for any file system and URL."""
    return _NAME.fullmatch(name) is not None


@dataclass(frozen=True)
class Offer:
    """A bundle in a repository.

    Attributes:
        path: name of the target.
        serial: counts the bundles of a repository; the larger is the newer.
        content: `VerifiedBundle.digest`.
        name: of the artifact.
        network: digest of the network's specification, empty where the artifact has none.
        precision: asked for at the build.
        size: bytes of the unpacked files.
        target: where it may run.
        engine: what runs it; None for a deferred artifact, whose engine the board builds.
    """

    path: str
    serial: int
    content: str
    name: str
    network: str
    precision: str
    size: int
    target: TargetRecord
    engine: EngineRecord | None

    @classmethod
    def of(cls, bundle: VerifiedBundle, serial: int) -> Offer:
        """The offer of a verified bundle."""
        manifest = bundle.manifest
        plain = re.sub(r"[^A-Za-z0-9._-]", "-", manifest.name).lstrip("._-")[:150] or "bundle"
        return cls(
            path=f"{plain}-{serial}{SUFFIX}",
            serial=serial,
            content=bundle.digest,
            name=manifest.name,
            network=manifest.network.digest or "",
            precision=manifest.precision.asked,
            size=bundle.size,
            target=manifest.target,
            engine=manifest.engine,
        )

    def to_dict(self) -> dict[str, Any]:
        """A dictionary for JSON; `from_dict` reads it."""
        values = {k: v for k, v in asdict(self).items() if k != "path"}
        return {"schema": _SCHEMA, **values}

    @classmethod
    def from_dict(cls, path: str, values: Mapping[str, Any]) -> Offer:
        """An offer as somebody with the key of the targets wrote it.

        Raises:
            ValueError: it is not one.
        """
        try:
            if values["schema"] != _SCHEMA:
                raise ValueError(f"schema {values['schema']!r}, expected {_SCHEMA}")
            serial, content, size = values["serial"], values["content"], values["size"]
            for number in (serial, size):
                if type(number) is not int or not 0 <= number <= _LARGEST_SERIAL:
                    raise ValueError(f"a number is {number!r:.40}")
            if not is_plain_name(path) or _DIGEST.fullmatch(str(content)) is None:
                raise ValueError("its name or digest is none")
            target, engine = dict(values["target"]), values["engine"]
            target["compute_capabilities"] = tuple(map(str, target["compute_capabilities"]))
            if engine is not None:
                engine = dict(engine)
                engine["files"] = tuple(map(str, engine["files"]))
                engine["versions"] = {str(k): str(v) for k, v in dict(engine["versions"]).items()}
                engine = EngineRecord(**engine)
            texts = {k: str(values[k]) for k in ("name", "network", "precision")}
            return cls(
                path=path,
                serial=serial,
                content=content,
                size=size,
                target=TargetRecord(**target),
                engine=engine,
                **texts,
            )
        except (KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"{type(e).__name__}: {e}") from e

    def misfit(self, device: DeviceProbe) -> str | None:
        """Why it does not run on this device, None if it does."""
        if self.engine is None and (reason := self._other_board(device)) is not None:
            return reason
        try:
            check_fit(self.target, self.engine, self.precision, device, self.path)
        except (CompatibilityError, EnvironmentalError) as e:
            return str(e)
        except KeyError:
            # A kind of engine that this version knows nothing of.
            return f"{self.path} needs an engine that is not known here; install a newer edgehp"
        return None

    def _other_board(self, device: DeviceProbe) -> str | None:
        """Why a deferred artifact is not for this board: its manifest names a target, no more."""
        try:
            target = load_target(self.target.name)
            gpus = device.gpus() if target.compute_capabilities else ()
        except EdgehpError as e:
            return f"{self.path} is for {self.target.name}: {e}"
        found = gpus[0].compute_capability if gpus else "none"
        if target.compute_capabilities and found not in target.compute_capabilities:
            return f"{self.path} is for {target.title}; the GPU here has compute capability {found}"
        module = device.module() or "no Jetson"
        if target.module_ids and not any(part in module for part in target.module_ids):
            return f"{self.path} is for {target.title}; this is {module}"
        return None


class Remembered:
    """A device that is asked only once for what takes a process to find out."""

    def __init__(self, device: DeviceProbe) -> None:
        self._device = device
        self._gpus: tuple[Gpu, ...] | EnvironmentalError | None = None
        self._module: tuple[str | None] | None = None

    def gpus(self) -> tuple[Gpu, ...]:
        """See `DeviceProbe.gpus`.

        Raises:
            EnvironmentalError: as the device, each time.
        """
        if self._gpus is None:
            try:
                self._gpus = self._device.gpus()
            except EnvironmentalError as e:
                self._gpus = e
        if isinstance(self._gpus, EnvironmentalError):
            raise EnvironmentalError(str(self._gpus))
        return self._gpus

    def module(self) -> str | None:
        """See `DeviceProbe.module`."""
        if self._module is None:
            self._module = (self._device.module(),)
        return self._module[0]

    def version(self, kind: str) -> str | None:
        """See `DeviceProbe.version`."""
        return self._device.version(kind)
