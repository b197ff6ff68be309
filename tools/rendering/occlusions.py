"""Glasses, a face mask or a hand on a head: simple geometry in the head's frame.

Its place comes from the mesh (eyes, nose, chin, ears, the surface of the face), so it fits every
identity and turns with the head. Metres, x to the image's right, y down, z away from the camera.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import cv2
import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from .heads import Mesh

Array = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Part = tuple[Array, Ints]
Depth = Callable[[Array], Array]

KINDS = ("none", "glasses", "mask", "hand")
_MASKS = np.array([[0.30, 0.52, 0.62], [0.75, 0.75, 0.73], [0.02, 0.02, 0.022]])
# Of the average head: top of the ears' roots, below the ears, and the breadth of the face.
_EAR, _LOBE, _BREADTH = (0.074, -0.648, -0.035), (0.072, -0.605, -0.04), 0.1485


@dataclass(frozen=True, eq=False)
class Occlusion:
    """A mesh: vertices and unit normals [V, 3], linear RGB [V, 3], gloss [V], triangles [T, 3]."""

    vertices: Array
    normals: Array
    colours: Array
    gloss: Array
    triangles: Ints

    def moved(self, rotation: Array, translation: Array) -> Occlusion:
        """The same, turned and then shifted."""
        vertices = self.vertices @ rotation.T + translation
        return replace(self, vertices=vertices, normals=self.normals @ rotation.T)


def make_occlusion(
    kind: str, seed: int, mesh: Mesh, head: Array, skin: Array, nir: bool
) -> Occlusion:
    """One of `KINDS` but ``"none"`` on the vertices `head` [V, 3] of an upright head.

    Its random numbers are its own, so that the head's stay as they are without it.
    """
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    # Skin only: MakeHuman's hair has a fringe before the face.
    used = np.unique(mesh.corners[mesh.part == 0, 0])
    face = head[used[(mesh.template[used, 2] < -0.03) & (mesh.follow[used] > 0.9)]]

    def depth(xy: Array) -> Array:
        """The face's z before points [n, 2], within 6 mm."""
        d = np.linalg.norm(face[:, None, :2] - xy, axis=2)
        near = d <= np.maximum(0.006, d.min(0))
        return np.asarray(np.where(near, face[:, 2:], np.inf).min(0))

    parts = {"glasses": _glasses, "mask": _mask, "hand": _hand}[kind](rng, mesh, head, skin, depth)
    vertices, triangles, normals, colours, gloss = [], [], [], [], []
    first = 0
    for (v, t), colour, shine in parts:
        n = np.zeros_like(v)
        across = np.cross(v[t[:, 1]] - v[t[:, 0]], v[t[:, 2]] - v[t[:, 0]])
        for k in range(3):
            np.add.at(n, t[:, k], across)
        vertices.append(v)
        triangles.append(t + first)
        normals.append(n / np.maximum(np.linalg.norm(n, axis=1, keepdims=True), 1e-15))
        colours.append(np.tile(np.full(3, colour.mean()) if nir else colour, (len(v), 1)))
        gloss.append(np.full(len(v), shine))
        first += len(v)
    return Occlusion(np.vstack(vertices), np.vstack(normals), np.vstack(colours),
                     np.concatenate(gloss), np.vstack(triangles))  # fmt: skip


def _glasses(
    rng: np.random.Generator, mesh: Mesh, head: Array, skin: Array, depth: Depth
) -> list[tuple[Part, Array, float]]:
    """Sunglasses, or in two of five a frame whose clear lenses are not drawn."""
    scale, dark = _scale(mesh, head), rng.random() < 0.6
    half = np.array([rng.uniform(0.024, 0.029), rng.uniform(0.017, 0.024)]) * scale
    power, rim = rng.uniform(0.5, 1.0), rng.uniform(0.0008, 0.0022)
    black = rng.random() < 0.5
    frame = np.full(3, 0.012) if black else rng.uniform(0.01, 0.35) * rng.uniform(0.5, 1.0, 3)
    glass = np.full(3, rng.uniform(0.004, 0.02))
    a = np.linspace(0, 2 * np.pi, 33)
    ring = np.stack([np.cos(a), np.sin(a)], 1)
    ring = np.sign(ring) * np.abs(ring) ** power * half
    centres = [(head[e].max(0) + head[e].min(0)) / 2 for e in mesh.eyes]
    middle = (centres[0] + centres[1]) / 2
    front = min(head[e][:, 2].min() for e in mesh.eyes)
    bridge = depth(middle[None, :2])[0]
    z = min(front - 0.010, bridge - 0.003)
    out, inner = [], []
    for centre in centres:
        side = np.sign(centre[0] - middle[0])
        xy = ring + centre[:2] + [side * 0.003, 0.004 * scale]
        # The lenses follow the face round a little.
        rims = np.column_stack([xy, z + 2.0 * (xy[:, 0] - middle[0]) ** 2])
        ear = _beside_ear(mesh, head, side, _EAR)
        reach = max((side * xy[:, 0]).max(), 0.96 * side * ear[0])
        hinge = np.array([side * reach, centre[1] - 0.004, z + 0.012])
        edge = rims[np.argmax(side * rims[:, 0])]
        inner.append(rims[np.argmin(side * rims[:, 0])] - [0, 0.003, 0])
        out.append((_tube(rims, np.full(33, rim)), frame, 0.8))
        out.append((_tube(np.array([edge, hinge, ear]), np.full(3, max(rim, 0.0014))), frame, 0.8))
        if dark:
            fan = np.stack([np.full(32, 33), np.arange(32), np.arange(1, 33)], 1)
            out.append(((np.vstack([rims, rims[:-1].mean(0)]), fan), glass, 1.5))
    top = (inner[0] + inner[1]) / 2 - [0, 0.002, 0.001]
    out.append((_tube(np.array([inner[0], top, inner[1]]), np.full(3, rim)), frame, 0.8))
    return out


def _mask(
    rng: np.random.Generator, mesh: Mesh, head: Array, skin: Array, depth: Depth
) -> list[tuple[Part, Array, float]]:
    """A sheet stretched from the bridge of the nose to below the chin, with loops to the ears."""
    scale = _scale(mesh, head)
    nose, chin = head[mesh.points["nose"]], head[mesh.points["chin"]]
    eyes = np.mean([head[e].mean(0) for e in mesh.eyes], 0)
    top = nose[1] + rng.uniform(0.35, 0.7) * (eyes[1] - nose[1])
    u, v = np.meshgrid(np.linspace(-1, 1, 25), np.linspace(0, 1, 17))
    upper, lower = top + 0.016 * np.abs(u) ** 1.5, chin[1] + 0.010 - 0.034 * u**2
    x, y = nose[0] + u * (0.058 - 0.004 * v) * scale, upper + v * (lower - upper)
    z = depth(np.stack([x.ravel(), y.ravel()], 1)).reshape(x.shape) - 0.005
    z = np.asarray(cv2.GaussianBlur(z, (5, 5), 1.2, borderType=cv2.BORDER_REPLICATE), np.float64)
    for _ in range(60):
        # Cloth under tension: no hollow of the face shows, what stands out holds it off.
        mean = (z[:-2, 1:-1] + z[2:, 1:-1] + z[1:-1, :-2] + z[1:-1, 2:]) / 4
        z[1:-1, 1:-1] = np.minimum(z[1:-1, 1:-1], mean)
    z += 0.0012 * np.sin(v * rng.uniform(12, 20)) * (1 - u**2)
    grid = np.stack([x, y, z], 2)
    colour = _MASKS[rng.integers(3)] * rng.uniform(0.85, 1.1, 3)
    out = [((grid.reshape(-1, 3), _lattice(17, 25)), colour, 0.05)]
    for column, side in ((0, -1), (-1, 1)):
        for row, place in ((0, _EAR), (-1, _LOBE)):
            ear = _beside_ear(mesh, head, side, place)
            out.append((_tube(np.array([grid[row, column], ear]), np.full(2, 0.0013)), colour, 0.0))
    return out


def _hand(
    rng: np.random.Generator, mesh: Mesh, head: Array, skin: Array, depth: Depth
) -> list[tuple[Part, Array, float]]:
    """A flat hand or a fist on mouth, chin, cheek or eye: an ellipsoid, capsules and a forearm."""
    side, fist = float(rng.choice([-1, 1])), rng.random() < 0.35
    nose, chin = head[mesh.points["nose"]], head[mesh.points["chin"]]
    eye = head[mesh.eyes[0 if side > 0 else 1]].mean(0)
    mouth = nose + 0.45 * (chin - nose)
    cheek = np.array([eye[0] + side * 0.015, mouth[1] - 0.01, 0])
    places = np.array([mouth, chin, cheek, eye])
    centre = places[rng.choice(4, p=[0.4, 0.2, 0.2, 0.2])] + rng.normal(0, 0.006, 3)
    lean = side * np.radians(rng.uniform(15, 70))
    along, across = (
        np.array([-np.sin(lean), -np.cos(lean)]),
        np.array([np.cos(lean), -np.sin(lean)]),
    )
    # The palm lies below what it covers; the fingers reach over it.
    middle = centre[:2] - along * (0.0 if fist else rng.uniform(0.02, 0.05))
    size = np.array([0.037, 0.032, 0.026] if fist else [0.039, 0.045, 0.014])
    spots = middle + np.array([i * across + j * along for i in (-0.02, 0, 0.02)
                               for j in (-0.02, 0, 0.02)])  # fmt: skip
    z = float(depth(spots).min()) - 0.6 * size[2]
    frame = np.array([[*across, 0], [*along, 0], [0, 0, 1]])

    def place(points: Array) -> Array:
        """(across, along, towards the face) from the palm's centre -> head frame."""
        return np.asarray(points @ frame + [*middle, z])

    a, b = np.meshgrid(np.linspace(0, 2 * np.pi, 25), np.linspace(0, np.pi, 13))
    ball = np.stack([np.cos(a) * np.sin(b), np.cos(b), np.sin(a) * np.sin(b)], 2).reshape(-1, 3)
    out = [((place(ball * size), _lattice(13, 25)), skin, 0.2)]
    taper = np.sqrt(1 - np.linspace(-1, 1, 11) ** 8)
    for i, length in enumerate((0.066, 0.074, 0.070, 0.054)):
        at = (i - 1.5) * (0.0165 if fist else 0.0185)
        if fist:
            bow = np.linspace(-1.2, 1.4, 11)
            finger = place(np.stack([np.full(11, at), 0.022 * np.cos(bow) + 0.012,
                                     0.020 * np.sin(bow) - 0.008], 1))  # fmt: skip
        else:
            t = np.linspace(-0.02, length, 11)
            finger = place(np.stack([at * (1 + 2.5 * t), 0.036 + t, np.zeros(11)], 1))
            below = depth(finger[:, :2]) - 0.009
            # Fingers lie on the face, without following every hollow, and do not bend far back.
            finger[:, 2] = np.minimum.accumulate(np.clip(below, z - 0.02, z + 0.02)[::-1])[::-1]
            finger[:, 2] = np.convolve(np.pad(finger[:, 2], 2, "edge"), np.full(5, 0.2), "valid")
        out.append((_tube(finger, 0.0088 * np.maximum(taper, 0.05)), skin, 0.2))
    thumb = np.linspace(
        [side * 0.025, -0.02, 0], [side * (0.03 if fist else 0.062), 0.025, -0.004], 11
    )
    out.append((_tube(place(thumb), 0.0105 * np.maximum(taper, 0.05)), skin, 0.2))
    wrist = np.linspace([0, -0.03, 0], [0, -0.45, -0.06], 5)
    cut, cloth = int(rng.integers(1, 4)), rng.uniform(0.01, 0.5) * rng.uniform(0.4, 1, 3)
    arm = place(wrist)
    out.append((_tube(arm[: cut + 1], np.linspace(0.024, 0.032, cut + 1)), skin, 0.2))
    out.append((_tube(arm[cut:], np.full(5 - cut, 0.040)), cloth, 0.0))
    return out


def _scale(mesh: Mesh, head: Array) -> float:
    return float(np.ptp(head[mesh.outline, 0])) / _BREADTH


def _beside_ear(mesh: Mesh, head: Array, side: float, place: tuple[float, ...]) -> Array:
    """4 mm beside the skin of `head` that is nearest to `place` on the average one's right."""
    skin = mesh.corners[mesh.part == 0, 0]
    x, y, z = place
    nearest = np.linalg.norm(mesh.template[skin] - [side * x, y, z], axis=1).argmin()
    beside: Array = head[skin[nearest]].copy()
    beside[0] += side * 0.004
    return beside


def _lattice(rows: int, columns: int) -> Ints:
    """Triangles over `rows` times `columns` vertices."""
    k = np.arange(rows * columns).reshape(rows, columns)
    a, b, c, d = (q.ravel() for q in (k[:-1, :-1], k[:-1, 1:], k[1:, :-1], k[1:, 1:]))
    return np.vstack([np.stack([a, b, c], 1), np.stack([b, d, c], 1)])


def _tube(path: Array, radius: Array) -> Part:
    """Circles of `radius` [n] about the points of `path` [n, 3], joined."""
    along = np.gradient(path, axis=0)
    along /= np.linalg.norm(along, axis=1, keepdims=True)
    first = np.cross(along, [0.31, 0.17, 0.94])
    first /= np.linalg.norm(first, axis=1, keepdims=True)
    second = np.cross(along, first)
    a = np.linspace(0, 2 * np.pi, 11)[None, :, None]
    circle = np.cos(a) * first[:, None] + np.sin(a) * second[:, None]
    points = path[:, None] + radius[:, None, None] * circle
    return points.reshape(-1, 3), _lattice(len(path), 11)
