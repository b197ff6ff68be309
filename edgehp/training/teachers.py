"""Any ONNX pose network as a teacher (`edgehp.networks.description`), on onnxruntime."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgehp import pose
from edgehp._installed import install_extra
from edgehp.crop import Box, crop_face
from edgehp.errors import DataError, EnvironmentalError
from edgehp.networks.described import deployed_graph
from edgehp.networks.description import Description
from edgehp.networks.export import load_graph
from edgehp.networks.graph import INPUT, OUTPUTS, graph_bytes

__all__ = ["Teacher"]

Array = npt.NDArray[np.float64]


class Teacher:
    """A teacher ready to label photos.

    Args:
        spec: what it is.
        threads: intra-op threads of each session.

    Raises:
        EnvironmentalError: onnxruntime is missing.
        CheckpointError: a file is no ONNX network, or has other inputs or outputs than described.
    """

    def __init__(self, spec: Description, threads: int = 1) -> None:
        try:
            import onnxruntime as ort
        except ImportError as e:
            raise EnvironmentalError(
                f"labelling needs onnxruntime: {install_extra('train')}"
            ) from e
        self.spec = spec
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # A quantized teacher is computed as written, so that labels are those of every machine:
        # integer kernels saturate on processors without VNNI (opentrack's lost 0.1 degrees).
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        self._sessions = []
        for file in spec.paths:
            model = (
                load_graph(file)[0]
                if spec.input.deployed
                else deployed_graph(spec.with_files([file]), simple=False)[0]
            )
            self._sessions.append(
                ort.InferenceSession(
                    graph_bytes(model), options, providers=["CPUExecutionProvider"]
                )
            )

    def views(self, photo: npt.NDArray[np.uint8], box: Box | None) -> list[npt.NDArray[np.uint8]]:
        """The crops of all grid positions, uint8 [S, S, 3] RGB; mirrored ones last."""
        if box is None:
            box = Box(0, 0, photo.shape[1], photo.shape[0])
        crops = [
            crop_face(photo, box.moved(dx, dy), self.spec.input.preprocessing)
            for dx, dy in self.spec.grid.offsets
        ]
        if self.spec.grid.flip:
            crops += [np.ascontiguousarray(c[:, ::-1]) for c in crops]
        return crops

    def rotations(self, photo: npt.NDArray[np.uint8], box: Box | None) -> Array:
        """Rotations [n, 3, 3], canonical, of all grid positions and network files.

        Mirrored views are mirrored back, so all of them estimate the same pose.
        """
        crops = self.views(photo, box)
        batch = np.stack(crops)
        out = []
        for session in self._sessions:
            (angles,) = session.run([OUTPUTS[0]], {INPUT: batch})
            if not np.isfinite(angles).all():
                raise DataError(f"{self.spec.name}: a crop gives angles that are not finite")
            matrices = pose.matrix_from_euler(angles)
            if self.spec.grid.flip:
                half = len(matrices) // 2
                matrices = np.concatenate([matrices[:half], pose.flip_matrix(matrices[half:])])
            out.append(matrices)
        return np.concatenate(out)
