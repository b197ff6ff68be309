"""The state of one build: what the steps share and what they add to the artifact."""

from __future__ import annotations

import logging

from edgehp.artifact.device import DeviceProbe
from edgehp.artifact.write import ArtifactWriter
from edgehp.pipeline.plan import Place, Plan
from edgehp.pipeline.request import BuildRequest

__all__ = ["Work"]

logger = logging.getLogger(__name__)


class Work:
    """The state of one build: what the steps share and what they add to the artifact."""

    def __init__(
        self,
        request: BuildRequest,
        plan: Plan,
        place: Place | None,
        writer: ArtifactWriter,
        device: DeviceProbe,
    ) -> None:
        """Start with what the plan warns of."""
        self.request = request
        self.plan = plan
        self.place = place
        self.writer = writer
        self.device = device
        self.warnings: list[str] = list(plan.warnings)
        self.roles: dict[str, str] = {}

    @property
    def half(self) -> bool:
        """Whether the graph's body is FP16; TensorRT 8.6 sets precisions by flags instead."""
        return self.plan.half and (self.place is None or self.place.knows_half_scales)

    def add(self, name: str, data: bytes, role: str) -> str:
        """Write a file of the artifact."""
        path = self.writer.path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        self.roles[name] = role
        return name

    def warn(self, *sentences: str | None) -> None:
        """Tell the user now and in the manifest."""
        for sentence in sentences:
            if sentence:
                logger.warning("%s", sentence)
                self.warnings.append(sentence)
