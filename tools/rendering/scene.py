"""One seed -> one picture: identity, expression, pose, camera, light, style, background, sensor."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from edgehp.pose import matrix_from_euler, project_to_rotation

from .backgrounds import background, tile
from .heads import HeadModel
from .occlusions import make_occlusion
from .raster import Renderer, Surface

Array = npt.NDArray[np.float64]
Floats = npt.NDArray[np.float32] | npt.NDArray[np.float64]
Image = npt.NDArray[np.uint8]

# Degrees added to the neutral mesh's pitch so that zero means what it means in AFLW2000-3D; see
# docs/rendered-heads.md for how it was measured.
PITCH_OF_NEUTRAL = 2.7
# The published face boxes over the extent of the 68 landmarks, in shares of that extent: medians
# over AFLW2000-3D (left, top, right, bottom; MakeHuman's faces are narrower than 3DMM's, so the
# sides get more); a turn of the head moves the sides by the last.
_MARGINS, _MARGIN_TURN = (0.215, 0.31, 0.215, 0.10), 0.05
# The part of the head's turn that the shoulders never follow, degrees (pitch, yaw, roll).
_NECK_LIMIT = np.array([32.0, 62.0, 24.0])


@dataclass(frozen=True)
class Ranges:
    """Largest |pitch|, |yaw|, |roll| in degrees, and the share of near-infrared pictures."""

    pitch: float = 50.0
    yaw: float = 90.0
    roll: float = 40.0
    nir: float = 0.2


@dataclass(frozen=True, eq=False)
class Rendered:
    """A picture with exact labels.

    Attributes:
        image: uint8 [side, side, 3], RGB.
        box: x_min, y_min, x_max, y_max in pixels, by the definition of the published boxes.
        angles: (pitch, yaw, roll) degrees, convention ``"aflw2000"``.
        matrix: [3, 3], canonical form of `edgehp.pose`.
        points: [n, 2] pixels of the mesh's named points.
        nir: pseudo near-infrared.
    """

    image: Image
    box: tuple[float, float, float, float]
    angles: Array
    matrix: Array
    points: dict[str, tuple[float, float]]
    nir: bool


def draw_angles(rng: np.random.Generator, ranges: Ranges) -> Array:
    """Yaw uniform; pitch and roll triangular about zero, as cameras see people."""
    yaw = rng.uniform(-ranges.yaw, ranges.yaw)
    spread = np.array([0.42 * ranges.pitch, 0.40 * ranges.roll])
    limit = np.array([ranges.pitch, ranges.roll])
    while True:
        wide = rng.random(2) < 0.25
        pitch, roll = np.where(wide, rng.uniform(-limit, limit), rng.normal(0, spread))
        # With Euler angles, profile heads come with both large: pitch about the x axis then is a
        # roll in the picture. Keep what necks do.
        if abs(pitch) <= ranges.pitch and abs(roll) <= ranges.roll:
            return np.array([pitch, yaw, roll])


class Studio:
    """Draws `Rendered` pictures; one a process."""

    def __init__(self, model: HeadModel, side: int, box_share: float) -> None:
        """Pictures of `side` pixels in which the box's larger side is about `box_share` of it."""
        self.model, self.side, self.share = model, side, box_share
        self.renderer = Renderer(model.mesh, side)
        self._tiles = [tile(np.random.default_rng(k)) for k in range(8)]

    def tile(self, rng: np.random.Generator) -> Image:
        """One of a few noise tiles, rolled and turned; making a new one takes too long."""
        t = np.rot90(self._tiles[rng.integers(8)], int(rng.integers(4)))
        return np.ascontiguousarray(np.roll(t, rng.integers(0, 256, 2).tolist(), (0, 1)))

    def shoot(
        self, seed: int, ranges: Ranges, angles: Array | None = None, occlusion: str = "none"
    ) -> Rendered:
        """The picture of `seed`; `angles` replaces the drawn pose and changes nothing else.

        Nor does `occlusion` (`occlusions.KINDS`) change the head, its pose, label, box or light.
        """
        rng = np.random.default_rng(seed)
        drawn = draw_angles(rng, ranges)
        nir = bool(rng.random() < ranges.nir)
        angles = drawn if angles is None else np.asarray(angles, np.float64)
        matrix = matrix_from_euler(angles)
        head = self._identity(rng)
        head, eye_angle = self._gaze(rng, head)
        placed = self._turn(rng, head, angles, matrix)
        focal, placed = self._camera(rng, placed)
        surface = self._surface(rng, placed, eye_angle, focal, nir)
        if occlusion != "none":
            o = make_occlusion(
                occlusion, seed, self.model.mesh, head, surface.uniforms["skin"], nir
            )
            # The face follows the head whole, so this is the turn of `_turn` for its vertices.
            turn = matrix @ matrix_from_euler([PITCH_OF_NEUTRAL, 0.0, 0.0])
            nose = self.model.mesh.points["nose"]
            surface = replace(surface, occlusion=o.moved(turn, placed[nose] - turn @ head[nose]))
        linear, cover = self.renderer.draw(surface)
        back = background(rng, self.side, nir, self.tile)
        image = _develop(rng, linear, cover, back, nir)
        pixels = self._project(placed, focal)
        box = _box(pixels[self.model.mesh.outline], angles[1])
        points = {
            k: (float(pixels[i, 0]), float(pixels[i, 1])) for k, i in self.model.mesh.points.items()
        }
        return Rendered(image, box, angles, matrix, points, nir)

    def _identity(self, rng: np.random.Generator) -> Array:
        """A person with an expression, upright and facing us in the head frame of the labels."""
        model, mesh = self.model, self.model.mesh
        races = rng.dirichlet([0.6, 0.6, 0.6])
        phenotypes = dict.fromkeys(model.phenotypes, 0.5)
        phenotypes |= {
            "gender": float(np.clip(rng.normal(rng.integers(2), 0.2), 0, 1)),
            "age": float(rng.uniform(0.42, 0.98)),
            "muscle": float(rng.uniform(0.2, 0.8)),
            "weight": float(rng.uniform(0.15, 0.95)),
            "african": float(races[0]),
            "asian": float(races[1]),
            "caucasian": float(races[2]),
        }
        keep = ("head-", "forehead-", "nose-", "mouth-", "chin-", "eyebrows-", "l-eye", "l-cheek",
                "l-ear", "neck-")  # fmt: skip
        local = {}
        for name in model.local:
            if name.startswith(keep) and "trans-out" not in name and "angle-out" not in name:
                # Skulls add up from many shapes: much of each makes towers of them.
                spread = 0.1 if name.startswith(("head-", "forehead-", "neck-")) else 0.28
                value = float(np.clip(rng.normal(0, spread), -0.8, 0.8))
                local[name] = value
                if name.startswith("l-"):
                    twin = float(np.clip(value + rng.normal(0, 0.06), -1, 1))
                    local["r-" + name[2:]] = twin
        calm = model.vertices(model.coefficients(phenotypes, local))
        face = mesh.outline
        # The head frame is the average face's, laid onto this face: scale, rotation, shift.
        a = mesh.template[face] - mesh.template[face].mean(0)
        b = calm[face] - calm[face].mean(0)
        upright = project_to_rotation(a.T @ b)
        actions = _expression(rng, model.actions)
        moved = model.moved(calm, actions)
        turned: Array = (moved - calm[face].mean(0)) @ upright.T
        return turned

    def _gaze(self, rng: np.random.Generator, head: Array) -> tuple[Array, Array]:
        """Turn the eyeballs; returns the vertices and each one's angle from the eye's axis."""
        gaze = matrix_from_euler([rng.normal(0, 5), rng.normal(0, 11), 0.0])
        out, angle = head.copy(), np.zeros(len(head))
        for eye in self.model.mesh.eyes:
            ball = head[eye]
            centre = (ball.max(0) + ball.min(0)) / 2
            d = ball - centre
            d_unit = d / np.maximum(np.linalg.norm(d, axis=1, keepdims=True), 1e-9)
            angle[eye] = np.arccos(np.clip(-d_unit[:, 2], -1, 1))
            out[eye] = centre + d @ gaze.T
        return out, angle

    def _turn(self, rng: np.random.Generator, head: Array, angles: Array, matrix: Array) -> Array:
        """Turn the head by `matrix`, the shoulders by part of it, the neck in between."""
        mesh = self.model.mesh
        least = np.clip((np.abs(angles) - _NECK_LIMIT) / np.maximum(np.abs(angles), 1e-9), 0, 1)
        share = least + (1 - least) * rng.uniform(0.0, 0.6)
        body = matrix_from_euler(share * angles)
        neck = head[(mesh.follow > 0.3) & (mesh.follow < 0.7)].mean(0)
        zero = matrix_from_euler([PITCH_OF_NEUTRAL, 0.0, 0.0])
        relative = body.T @ matrix
        rotvec, theta = _rotation_vector(relative)
        d = (head - neck) @ zero.T
        f = mesh.follow[:, None] * theta
        # Rodrigues' formula with an angle of its own for every vertex.
        c, s = np.cos(f), np.sin(f)
        turned = d * c + np.cross(rotvec, d) * s + rotvec * (d @ rotvec)[:, None] * (1 - c)
        return np.asarray(turned @ body.T)

    def _camera(self, rng: np.random.Generator, placed: Array) -> tuple[float, Array]:
        """Distance, focal length for the wanted size of the box, the box near the centre."""
        outline = self.model.mesh.outline
        distance = float(np.exp(rng.uniform(np.log(0.55), np.log(3.0))))
        wanted = self.share * rng.uniform(0.94, 1.06)
        offset = rng.normal(0, 0.012, 2)
        placed = placed - placed[outline].mean(0) + np.array([0, 0, distance])
        focal = 1.0
        for _ in range(4):
            p = placed[outline]
            q = p[:, :2] / p[:, 2:]
            size = (q.max(0) - q.min(0)) * (1.43, 1.41)
            focal = wanted / float(size.max())
            middle = (q.max(0) + q.min(0)) / 2 - (0, 0.105 * float(np.ptp(q[:, 1])))
            shift = (offset / focal - middle) * distance
            placed = placed + np.array([*shift, 0.0])
        return focal, placed

    def _project(self, placed: Array, focal: float) -> Array:
        xy = placed[:, :2] / np.maximum(placed[:, 2:], 0.01)
        return np.asarray((xy * focal + 0.5) * self.side)

    def _surface(
        self, rng: np.random.Generator, placed: Array, eye_angle: Array, focal: float, nir: bool
    ) -> Surface:
        mesh = self.model.mesh
        style = rng.choice(
            ["bald", "short", "medium", "long", "cap"], p=[0.1, 0.4, 0.22, 0.2, 0.08]
        )
        knitted = style == "cap"
        thickness = {"bald": 0.0, "short": 0.008, "medium": 0.02, "long": 0.014, "cap": 0.012}[
            style
        ]
        thickness *= rng.uniform(0.7, 1.4)
        lumps = rng.normal(0, 1, (6, 3)) * 18
        phase = rng.uniform(0, 6.28, 6)
        wave = np.sin(mesh.template @ lumps.T + phase).mean(1)
        top = np.clip((-0.62 - mesh.template[:, 1]) / 0.1, 0.25, 1.0)
        shape = mesh.scalp * top * (1.0 + 0.9 * wave * (not knitted))
        colours = _palette(rng, nir)
        light = _lights(rng, nir)
        lowest = rng.uniform(-0.60, -0.36)
        uniforms: dict[str, Any] = {
            **colours,
            **light,
            "hairstyle": (
                float(rng.uniform(0.25, 0.7)) if not knitted else 0.35,
                0.0
                if knitted
                else float(rng.uniform(0.3, 0.9) if style != "bald" else rng.uniform(0, 0.3)),
                float(rng.uniform(0.2, 0.95) if rng.random() < 0.25 else 0.0),
                float(lowest),
            ),
            "look": (
                float(rng.uniform(0.1, 0.5)),
                float(rng.uniform(0.08, 0.35)),
                float(rng.uniform(0.4, 0.9)),
                float(rng.random() < 0.8),
            ),
            "brows": (
                float(rng.normal(0.0, 0.0015)),
                float(rng.uniform(0.35, 0.95)),
                float(rng.choice([0.0, 0.0, 20.0, 45.0])),
                float(rng.uniform(0.05, 0.5)),
            ),
            "smooth_cap": float(knitted),
        }
        return Surface(
            placed, thickness, shape, eye_angle, focal, uniforms, style == "long", self.tile(rng)
        )


def _rotation_vector(rotation: Array) -> tuple[Array, float]:
    """Axis (unit) and angle (radians) of a rotation [3, 3]."""
    vector, _ = cv2.Rodrigues(rotation)
    v = np.asarray(vector, np.float64).ravel()
    theta = float(np.linalg.norm(v))
    return (v / theta if theta > 1e-9 else np.array([1.0, 0, 0])), theta


def _expression(rng: np.random.Generator, names: list[str]) -> dict[str, float]:
    """Nothing, a smile, speech, a yawn, closing eyes, or a little of several actions."""
    out: dict[str, float] = {}

    def both(name: str, value: float) -> dict[str, float]:
        return {f"{name}Left": value, f"{name}Right": value}

    kind = rng.random()
    if kind < 0.3:
        out |= both("mouthSmile", rng.uniform(0.2, 0.9))
    elif kind < 0.5:
        out |= {"jawOpen": rng.uniform(0.1, 0.5), "mouthFunnel": rng.uniform(0, 0.4)}
    elif kind < 0.56:
        out |= {"jawOpen": rng.uniform(0.6, 1.0)}
    if rng.random() < 0.18:
        out |= both("eyeBlink", rng.uniform(0.4, 1.0))
    if rng.random() < 0.5:
        for name in rng.choice(names, 4, replace=False):
            if name not in ("tongueOut", "jawForward", "jawLeft", "jawRight", "mouthClose"):
                out.setdefault(str(name), rng.uniform(0.0, 0.5))
    return {k: float(v) for k, v in out.items() if k in names}


def _palette(rng: np.random.Generator, nir: bool) -> dict[str, Array]:
    """Linear RGB albedos. Near-infrared flattens skin and lips and lightens many dyes and hairs."""
    # Skin between a dark and a light end, both linear; melanin darkens blue most.
    t = rng.beta(1.2, 1.0)
    dark, fair = np.array([0.075, 0.036, 0.022]), np.array([0.62, 0.40, 0.30])
    skin = np.exp((1 - t) * np.log(dark) + t * np.log(fair)) * rng.uniform(0.9, 1.1, 3)
    lips = skin * rng.uniform([0.75, 0.42, 0.42], [1.05, 0.75, 0.8])
    hairs = np.array([[0.012, 0.010, 0.009], [0.045, 0.025, 0.016], [0.12, 0.065, 0.035],
                      [0.36, 0.24, 0.12], [0.40, 0.39, 0.38], [0.20, 0.06, 0.025]])  # fmt: skip
    hair = hairs[rng.choice(6, p=[0.34, 0.26, 0.16, 0.1, 0.1, 0.04])] * rng.uniform(0.7, 1.3)
    irises = np.array(
        [[0.05, 0.025, 0.012], [0.10, 0.06, 0.02], [0.10, 0.16, 0.25], [0.08, 0.13, 0.07]]
    )
    iris = irises[rng.choice(4, p=[0.5, 0.2, 0.2, 0.1])]
    cloth, cloth2 = rng.uniform(0.01, 0.7, (2, 3)) * rng.uniform(0.2, 1.0)
    brow = np.minimum(hair, 0.10) * 0.8
    out = {"skin": skin, "lips": lips, "hair": hair, "iris": iris, "cloth": cloth, "cloth2": cloth2,
           "brow": brow}  # fmt: skip
    if nir:
        grey = {k: np.full(3, v.mean()) for k, v in out.items()}
        bright = rng.uniform(0.42, 0.62)
        grey["skin"] = np.full(3, bright)
        grey["lips"] = np.full(3, bright * rng.uniform(0.82, 1.0))
        grey["hair"] = np.full(3, rng.uniform(0.05, 0.35))
        grey["brow"] = grey["skin"] * rng.uniform(0.35, 0.75)
        grey["iris"] = np.full(3, rng.uniform(0.12, 0.3))
        return grey
    return out


def _lights(rng: np.random.Generator, nir: bool) -> dict[str, Array]:
    """A main light, a fill light, and light from the sky and the ground, linear RGB."""
    if nir:
        side = rng.normal(0, 0.18, 2)
        d = np.array([side[0], side[1], -1.0])
        weak = rng.uniform(0.01, 0.08)
        power = rng.uniform(0.7, 1.3)
        return {
            "light_dir": d / np.linalg.norm(d),
            "light_colour": np.full(3, power),
            "sky": np.full(3, weak),
            "ground": np.full(3, weak * 0.6),
            "fill_dir": np.array([0.0, -1.0, 0.0]),
            "fill_colour": np.full(3, weak),
        }
    azimuth, height = rng.normal(0, 60), rng.uniform(-15, 70)
    a, h = np.radians(azimuth), np.radians(height)
    d = np.array([np.sin(a) * np.cos(h), -np.sin(h), -np.cos(a) * np.cos(h)])
    warmth = rng.normal(0, 0.12)
    tint = np.array([1 + warmth, 1.0, 1 - warmth])
    power, ambient = rng.uniform(0.3, 1.5), rng.uniform(0.15, 0.6)
    fill = rng.normal(0, 1, 3)
    fill[2] = -abs(fill[2])
    return {
        "light_dir": d,
        "light_colour": power * tint,
        "sky": ambient * rng.uniform(0.85, 1.1, 3),
        "ground": ambient * rng.uniform(0.35, 0.9) * rng.uniform(0.85, 1.1, 3),
        "fill_dir": fill / np.linalg.norm(fill),
        "fill_colour": rng.uniform(0.0, 0.4) * rng.uniform(0.7, 1.2, 3),
    }


def _develop(
    rng: np.random.Generator, linear: Floats, cover: Floats, back: Floats, nir: bool
) -> Image:
    """Linear light -> an exposed, slightly soft and noisy 8-bit picture."""
    on = cover > 0.5
    level = float(np.percentile(linear[on].mean(1), 70)) if on.any() else 0.5
    # Automatic exposure reaches for the middle and misses.
    gain = rng.uniform(0.22, 0.55) / max(level, 1e-3)
    picture: npt.NDArray[Any] = linear * gain + back * (1 - cover[..., None])
    picture = np.clip(picture / (1 + 0.25 * picture), 0, 1)
    picture = picture ** (1 / 2.2)
    if nir:
        picture = np.repeat(picture.mean(2, keepdims=True), 3, 2)
    soft = rng.uniform(0.0, 0.7)
    if soft > 0.3:
        picture = cv2.GaussianBlur(picture, (0, 0), soft)
    contrast, lift = rng.uniform(0.88, 1.12), rng.normal(0, 0.025)
    picture = (picture - 0.5) * contrast + 0.5 + lift
    sigma = rng.gamma(1.5, 0.004) * (1.6 if nir else 1.0)
    grain = rng.normal(0, sigma, picture.shape if not nir else (*picture.shape[:2], 1))
    return np.clip((picture + grain) * 255 + 0.5, 0, 255).astype(np.uint8)


def _box(pixels: Array, yaw: float) -> tuple[float, float, float, float]:
    """The published face box: the landmarks' extent with its usual margins."""
    low, high = pixels.min(0), pixels.max(0)
    w, h = high - low
    turn = _MARGIN_TURN * np.sin(np.radians(yaw))
    left, top, right, bottom = _MARGINS
    return (
        float(low[0] - (left + turn) * w),
        float(low[1] - top * h),
        float(high[0] + (right - turn) * w),
        float(high[1] + bottom * h),
    )
