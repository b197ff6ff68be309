"""What a child process is asked and what it answers, in files of JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

__all__ = ["Job", "Made"]


@dataclass(frozen=True)
class Job:
    """One row to quantise.

    Attributes:
        row: key of `quantizers.rows.ROWS`.
        work: folder with ``fp32.onnx``, ``core.onnx``, ``calibration.npy`` and ``control.npy``.
        out: folder for the result.
        threads: processor threads, where a tool lets itself be told.
        budget: degrees of mean |angle difference| to FP32 that controlled precision may reach.
        given: the interpreter of a row that needs its own.
    """

    row: str
    work: str
    out: str
    threads: int
    budget: float
    given: str = ""

    def path(self, name: str) -> Path:
        """A file of the comparison."""
        return Path(self.work) / name

    def result(self, name: str) -> Path:
        """A file of this row."""
        return Path(self.out) / name

    def to_json(self) -> str:
        """JSON text."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def load(cls, path: Path) -> Job:
        """Read what `to_json` wrote."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Made:
    """A quantised network.

    Attributes:
        file: what OpenVINO reads.
        files: all files that have to be shipped.
        seconds: of quantising, without loading packages and crops.
        peak_mib: most memory the process held, packages and crops included.
        note: what is worth knowing of the settings or the result.
    """

    file: str
    files: tuple[str, ...]
    seconds: float = 0.0
    peak_mib: float = 0.0
    note: str = ""

    def measured(self, seconds: float, peak_mib: float) -> Made:
        """The same with its cost."""
        return replace(self, seconds=seconds, peak_mib=peak_mib)

    @property
    def size_mb(self) -> float:
        """Megabytes of all files."""
        return sum(Path(f).stat().st_size for f in self.files) / 1e6

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def load(cls, path: Path) -> Made:
        """Read a file with `to_dict` in it."""
        values = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**values, "files": tuple(values["files"])})
