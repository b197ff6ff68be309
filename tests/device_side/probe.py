"""Run by an interpreter that has edgehp and its own dependencies only; prints what it saw as JSON.

python -I probe.py imports          every module of the device side
python -I probe.py artifact PATH    loading, and refusing, that artifact
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# The rooms a board needs, and the command line that leads to them.
ROOMS = (
    "edgehp.artifact",
    "edgehp.benchmark",
    "edgehp.cli",
    "edgehp.crop",
    "edgehp.datasets",
    "edgehp.device",
    "edgehp.doctor",
    "edgehp.engines",
    "edgehp.pose",
    "edgehp.runtime",
    "edgehp.shipping",
    "edgehp.targets",
    "edgehp.validation",
)


@dataclass
class Device:
    """A device as `edgehp.device.DeviceProbe` sees one; the tests say what is there."""

    versions: dict[str, str] = field(default_factory=dict)
    found: tuple[Any, ...] = ()

    def gpus(self) -> tuple[Any, ...]:
        return self.found

    def module(self) -> str | None:
        return None

    def version(self, kind: str) -> str | None:
        return self.versions.get(kind)


def imports() -> dict[str, Any]:
    """Import the rooms with all their modules."""
    names = []
    for room in ROOMS:
        module = importlib.import_module(room)
        names.append(room)
        for found in pkgutil.walk_packages(getattr(module, "__path__", ()), f"{room}."):
            importlib.import_module(found.name)
            names.append(found.name)
    return {"imported": names}


def artifact(path: Path) -> dict[str, Any]:
    """Load a complete artifact as its device would, then damaged copies of it."""
    from edgehp.artifact.check import golden_crops, load_artifact
    from edgehp.artifact.manifest import MANIFEST_NAME, sealed

    manifest = json.loads((path / MANIFEST_NAME).read_text(encoding="utf-8"))
    kind = manifest["engine"]["kind"]
    built = manifest["engine"]["versions"][kind]
    right = Device({kind: built})
    loaded = load_artifact(path, device=right)

    def refused(damage: Any, device: Device = right) -> list[Any]:
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / path.name
            shutil.copytree(path, copy)
            damage(copy)
            try:
                load_artifact(copy, device=device)
            except Exception as e:  # the class is part of the answer
                return [type(e).__name__, getattr(e, "exit_code", None), str(e)]
        return ["accepted", 0, ""]

    def nothing(copy: Path) -> None:
        pass

    def flip(copy: Path) -> None:
        engine = copy / manifest["engine"]["files"][0]
        data = bytearray(engine.read_bytes())
        data[len(data) // 2] ^= 1
        engine.write_bytes(data)

    def remove(copy: Path) -> None:
        (copy / manifest["golden"]["file"]).unlink()

    def rewrite(copy: Path, changes: dict[str, Any]) -> None:
        (copy / MANIFEST_NAME).write_bytes(sealed({**manifest, **changes}))

    def newer(copy: Path) -> None:
        rewrite(copy, {"schema_version": manifest["schema_version"] + 1})

    def other_gpu(copy: Path) -> None:
        rewrite(copy, {"target": {**manifest["target"], "compute_capabilities": ["8.7"]}})

    return {
        "name": loaded.manifest.name,
        "crops": list(golden_crops(loaded).shape),
        "refused": {
            "changed byte": refused(flip),
            "missing file": refused(remove),
            "newer schema": refused(newer),
            "wrong GPU": refused(other_gpu),
            "older runtime": refused(nothing, Device({kind: "0.1"})),
            "no runtime": refused(nothing, Device()),
        },
    }


def main() -> None:
    import edgehp

    answer = imports() if sys.argv[1] == "imports" else artifact(Path(sys.argv[2]))
    answer["edgehp"] = edgehp.__file__
    answer["modules"] = sorted({name.partition(".")[0] for name in sys.modules})
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
