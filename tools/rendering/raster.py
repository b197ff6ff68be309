"""Rasterise a posed head with OpenGL (moderngl on EGL; Mesa's software renderer will do)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from .heads import PARTS, Mesh
from .occlusions import Occlusion

Array = npt.NDArray[np.float64]

_VERTEX = """
#version 330
uniform mat4 projection; uniform mat4 light_view;
in vec3 position; in vec3 normal; in vec3 rest; in vec2 uv; in vec4 aux;
out vec3 P; out vec3 N; out vec3 T; out vec2 U; out vec4 A; out vec4 L;
void main() {
  P = position; N = normal; T = rest; U = uv; A = aux;
  L = light_view * vec4(position, 1.0);
  gl_Position = projection * vec4(position, 1.0);
}
"""

_DEPTH_VERTEX = """
#version 330
uniform mat4 light_view;
in vec3 position;
void main() { gl_Position = light_view * vec4(position, 1.0); }
"""

_DEPTH_FRAGMENT = """
#version 330
void main() {}
"""

# aux: x part, y angle from the eyeball's axis, z scalp, w share of the head's turn.
_FRAGMENT = """
#version 330
%s
uniform sampler2D masks; uniform sampler2D noise; uniform sampler2D shadow;
uniform vec3 skin; uniform vec3 lips; uniform vec3 hair; uniform vec3 iris; uniform vec3 cloth;
uniform vec3 cloth2; uniform vec3 brow;
uniform vec3 light_dir; uniform vec3 light_colour; uniform vec3 sky; uniform vec3 ground;
uniform vec3 fill_dir; uniform vec3 fill_colour;
uniform vec4 hairstyle;  // crop edge, tint of the scalp, beard, long hair's lowest y
uniform vec4 look;       // gloss, noise of the skin, shadow strength, lashes
uniform vec4 brows;      // slope, strength, stripe frequency, neckline
uniform float smooth_cap;  // 1: a knitted cap instead of hair
in vec3 P; in vec3 N; in vec3 T; in vec2 U; in vec4 A; in vec4 L;
out vec4 colour;

float n2(vec2 p) { return texture(noise, p).r; }
float solid(vec3 p, float s) {
  return (n2(p.xy * s) + n2(p.zy * s + 0.37) + n2(p.xz * s + 0.71)) / 3.0;
}
float lit() {
  vec3 l = L.xyz * 0.5 + 0.5; float sum = 0.0;
  for (int i = -1; i <= 1; i += 2) for (int j = -1; j <= 1; j += 2)
    sum += (l.z - 0.006 > texture(shadow, l.xy + vec2(i, j) / 640.0).r) ? 0.0 : 1.0;
  return mix(1.0, sum / 4.0, look.z);
}
void main() {
  int part = int(A.x + 0.5);
  vec3 n = normalize(N); vec3 v = normalize(-P);
  // Thin sheets (hair, lashes, clothes) are seen from both sides; a head is not.
  if (dot(n, v) < 0.0 && (part == 4 || part == 5 || part == 7)) n = -n;
  vec4 m = texture(masks, vec2(U.x, 1.0 - U.y));
  vec3 base = skin; float gloss = look.x; float power = 18.0; float wrap = 0.25;
  float strands = 0.6 * n2(vec2(atan(T.x, T.z + 0.02) * 2.6, T.y * 2.0))
                + 0.4 * n2(vec2(atan(T.x, T.z + 0.02) * 9.0, T.y * 5.0));
  if (part == 0) {
    float k = solid(T, 6.0) - 0.5, fine = solid(T, 40.0) - 0.5;
    base = skin * (1.0 + look.y * (0.9 * k + 0.7 * fine));
    float red = smoothstep(0.075, 0.0, length(T - vec3(0.0, -0.607, -0.145)))
              + smoothstep(0.035, 0.0, length(vec3(abs(T.x), T.yz) - vec3(0.042, -0.602, -0.11)));
    base *= mix(vec3(1.0), vec3(1.06, 0.93, 0.92), clamp(red, 0.0, 1.0) * 0.7);
    base = mix(base, base * vec3(0.80, 0.72, 0.74), m.g * 0.5);
    base = mix(base, base * vec3(1.06, 0.9, 0.88), m.b * 0.6);
    float beard = smoothstep(-0.588, -0.572, T.y + 0.35 * max(0.0, abs(T.x) - 0.02)
                  + 0.012 * k) * smoothstep(-0.02, -0.05, T.z) * step(0.95, A.w)
                  * smoothstep(-0.515, -0.53, T.y);
    float lip = smoothstep(-0.600, -0.594, T.y) * smoothstep(0.032, 0.024, abs(T.x))
                * smoothstep(-0.12, -0.125, T.z);
    base = mix(base, hair * (0.7 + 0.6 * fine),
               clamp(max(beard, lip) * hairstyle.z * (0.8 + 0.8 * fine), 0.0, 0.95));
    base = mix(base, lips * (1.0 + 0.5 * fine), m.r * 0.9);
    float bx = (abs(T.x) - 0.032) / 0.021;
    float by = T.y - (-0.6725 + 0.006 * bx * bx + brows.x * bx);
    float hairs = smoothstep(1.0, 0.75, abs(bx)) * smoothstep(0.0062, 0.003, abs(by) + 0.003 * fine
                  + 0.0012 * max(0.0, bx)) * step(T.z, -0.08);
    base = mix(base, brow * (0.6 + 0.8 * n2(T.xy * vec2(70.0, 14.0))), hairs * brows.y);
    base = mix(base, mix(skin, hair, 0.75), A.z * hairstyle.y * (0.85 + 0.5 * fine));
    base = mix(base, vec3(0.13, 0.03, 0.03), smoothstep(0.4, 0.9, m.a) * step(T.y, -0.52)
               * step(abs(T.x), 0.025) * step(-0.6, T.y));
    float c = smoothstep(brows.w + 0.004, brows.w - 0.004,
                         A.w + 1.2 * max(0.0, abs(T.x) - 0.055) * -1.0 + 0.02 * k);
    if (c > 0.5) {
      float s = smoothstep(0.45, 0.55, fract(T.y * brows.z + 0.15 * k));
      base = mix(cloth, cloth2, s) * (0.8 + 0.5 * solid(T, 25.0)); gloss *= 0.1;
    }
  } else if (part == 1) {
    float edge = smoothstep(0.36, 0.46, A.y);
    vec3 inner = mix(vec3(0.015), iris * (0.7 + 0.7 * n2(U * 40.0)),
                     smoothstep(0.15, 0.19, A.y));
    base = mix(inner, vec3(0.78, 0.74, 0.72) * (1.0 - 0.35 * smoothstep(0.5, 1.1, A.y)), edge);
    gloss = 1.2; power = 90.0;
  } else if (part == 2) { base = vec3(0.75, 0.72, 0.65); gloss = 0.5;
  } else if (part == 3) { base = vec3(0.55, 0.24, 0.23);
  } else if (part == 7) { base = T; gloss = U.x; power = 40.0;
  }
#ifdef SHEETS
  else if (part == 4) {
    if (look.w < 0.5 || n2(U * 60.0) < 0.5) discard;
    base = brow * 0.5; gloss = 0.0;
  } else if (part == 5) {
    // The proxy has a fringe over the whole face; what hangs before it is cut.
    if (T.y > hairstyle.w + 0.04 * (strands - 0.5) || (T.z < -0.055 && T.y > -0.715)) discard;
    base = hair * (0.45 + 1.1 * strands); power = 12.0; gloss *= 1.2;
  } else {
    float edge = hairstyle.x + 0.9 * (1.0 - smooth_cap) * (strands - 0.5);
    if (A.z < edge) discard;
    base = mix(hair * (0.45 + 1.1 * strands),
               cloth2 * (0.75 + 0.5 * n2(vec2(atan(T.x, T.z) * 6.0, T.y * 2.0))), smooth_cap);
    power = 12.0; gloss *= 1.2 * (1.0 - smooth_cap);
  }
#endif
  float s = lit();
  float d = max(0.0, (dot(n, light_dir) + wrap) / (1.0 + wrap));
  float f = max(0.0, (dot(n, fill_dir) + 0.4) / 1.4);
  vec3 ambient = mix(ground, sky, 0.5 - 0.5 * n.y);
  // Crevices: the nearer to the neck and eye sockets, the less sky reaches them.
  float open = part == 0 ? 1.0 - 0.35 * m.g - 0.3 * smoothstep(0.95, 0.6, A.w) * step(brows.w, A.w)
             : (part == 1 ? 0.8 : (part == 2 || part == 3 ? 0.35 : 1.0));
  vec3 h = normalize(light_dir + v);
  float spec = pow(max(dot(n, h), 0.0), power) * gloss * s * step(0.0, dot(n, light_dir));
  float rim = pow(1.0 - max(dot(n, v), 0.0), 4.0) * 0.15;
  vec3 c = base * (ambient * open + light_colour * d * s * mix(1.0, open, 0.5)
                   + fill_colour * f * open)
         + light_colour * spec * 0.35 + sky * rim * gloss;
  colour = vec4(c, 1.0);
}
"""


@dataclass(frozen=True, eq=False)
class Surface:
    """What `scene` gives to be drawn: posed geometry and the values of the shader.

    Attributes:
        vertices: [V, 3] metres in the camera frame, y down, z forward.
        cap_thickness: metres by which the scalp's shell stands off.
        cap_shape: [V] factor on the thickness.
        eye_angle: [V] radians from the axis of the eyeball (0 elsewhere).
        focal: focal length in units of the picture's side.
        uniforms: colours, lights and style, by the shader's names.
        long_hair: whether MakeHuman's hair proxy is drawn.
        noise: uint8 [256, 256], tileable.
        occlusion: what stands before the face, in the camera frame, or None.
    """

    vertices: Array
    cap_thickness: float
    cap_shape: Array
    eye_angle: Array
    focal: float
    uniforms: dict[str, Any]
    long_hair: bool
    noise: npt.NDArray[np.uint8]
    occlusion: Occlusion | None = None


class Renderer:
    """An OpenGL context with the head's fixed data; one a process."""

    def __init__(self, mesh: Mesh, side: int, supersampling: int = 2) -> None:
        """Prepare pictures of `side` pixels."""
        import moderngl

        self.mesh, self.side, self.factor = mesh, side, supersampling
        # Its types say that every keyword is a dictionary; each is passed on as it is.
        self.gl: Any = moderngl
        self.context = self.gl.create_standalone_context(backend="egl")
        # Each occlusion's buffers go when nothing refers to them any more.
        self.context.gc_mode = "auto"
        ctx, n = self.context, side * supersampling
        # A shader that may discard loses the early depth test: skin gets one without.
        self.programs = {
            name: ctx.program(vertex_shader=_VERTEX, fragment_shader=_FRAGMENT % define)
            for name, define in (("skin", ""), ("sheets", "#define SHEETS"))
        }
        self.depth_program = ctx.program(
            vertex_shader=_DEPTH_VERTEX, fragment_shader=_DEPTH_FRAGMENT
        )
        self.target = ctx.framebuffer(
            [ctx.texture((n, n), 4, dtype="f2")], ctx.depth_texture((n, n))
        )
        self.shadow = ctx.depth_texture((512, 512))
        self.shadow.compare_func = ""
        self.shadow.filter = (moderngl.NEAREST, moderngl.NEAREST)
        self.shadow.repeat_x = self.shadow.repeat_y = False
        self.shadow_target = ctx.framebuffer(depth_attachment=self.shadow)
        self.masks = ctx.texture(mesh.masks.shape[1::-1], 4, mesh.masks.tobytes())
        self.noise = ctx.texture((256, 256), 1)
        k = len(mesh.corners)
        self.cap_corners = np.unique(mesh.cap)
        renumber = np.full(k, -1)
        renumber[self.cap_corners] = k + np.arange(len(self.cap_corners))
        part = mesh.part[mesh.triangles[:, 0]]
        sheet = np.isin(part, (PARTS["longhair"], PARTS["lashes"]))
        plain, lashes = mesh.triangles[~sheet], mesh.triangles[part == PARTS["lashes"]]
        longhair = mesh.triangles[part == PARTS["longhair"]]
        cap = renumber[mesh.cap]
        self.corner = np.concatenate([mesh.corners[:, 0], mesh.corners[self.cap_corners, 0]])
        self.uv = np.vstack([mesh.uv, mesh.uv[self.cap_corners]])
        self.part = np.concatenate([mesh.part, np.full(len(self.cap_corners), PARTS["cap"])])
        self.buffer = ctx.buffer(reserve=len(self.corner) * 15 * 4)
        self.arrays = {}
        for name, t in (("plain", plain), ("lashes", lashes), ("cap", cap), ("longhair", longhair)):
            program = self.programs["skin" if name == "plain" else "sheets"]
            self.arrays[name] = self._arrays(program, self.buffer, t)

    def _arrays(self, program: Any, buffer: Any, triangles: npt.NDArray[Any]) -> tuple[Any, Any]:
        """Triangles of a buffer for the picture and for the shadow."""
        index = self.context.buffer(np.ascontiguousarray(triangles, np.int32).tobytes())
        layout = [(buffer, "3f 3f 3f 2f 4f", "position", "normal", "rest", "uv", "aux")]
        only_position = [(buffer, "3f 48x", "position")]
        return (
            self.context.vertex_array(program, layout, index, skip_errors=True),
            self.context.vertex_array(self.depth_program, only_position, index),
        )

    def _occlude(self, o: Occlusion) -> tuple[Any, Any]:
        """The occlusion's arrays; its colours travel as the rest position, its gloss as u."""
        aux = np.tile([float(PARTS["occlusion"]), 0, 0, 1], (len(o.vertices), 1))
        gloss = np.stack([o.gloss, np.zeros_like(o.gloss)], 1)
        rows = np.hstack([o.vertices, o.normals, o.colours, gloss, aux])
        buffer = self.context.buffer(np.ascontiguousarray(rows, np.float32).tobytes())
        return self._arrays(self.programs["skin"], buffer, o.triangles)

    def draw(self, s: Surface) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """The picture, linear RGB [side, side, 3], and how much of each pixel the head covers."""
        mesh, ctx = self.mesh, self.context
        normals = mesh.normals(s.vertices)
        position = s.vertices[self.corner]
        normal = normals[self.corner]
        is_cap = self.part == PARTS["cap"]
        lift = s.cap_thickness * s.cap_shape[self.corner] * is_cap
        position = position + normal * lift[:, None]
        second = s.eye_angle[self.corner]
        aux = np.stack([self.part, second, mesh.scalp[self.corner], mesh.follow[self.corner]], 1)
        rows = np.hstack([position, normal, mesh.template[self.corner], self.uv, aux])
        self.buffer.write(np.ascontiguousarray(rows, np.float32).tobytes())
        self.noise.write(s.noise.tobytes())
        names = ["plain", "lashes", *(["cap"] if s.cap_thickness > 0 else [])]
        names += ["longhair"] if s.long_hair else []
        arrays = self.arrays
        if s.occlusion is not None:
            arrays = arrays | {"occlusion": self._occlude(s.occlusion)}
            names.append("occlusion")
        light = _light_view(s.vertices[mesh.outline].mean(0), np.asarray(s.uniforms["light_dir"]))
        ctx.enable(self.gl.DEPTH_TEST)
        self.shadow_target.use()
        self.shadow_target.clear(depth=1.0)
        _set(self.depth_program, {"light_view": light})
        for name in names:
            # The proxy's fringe is cut away in the picture, so it must not throw a shadow either.
            if name != "longhair":
                arrays[name][1].render()
        self.target.use()
        self.target.clear(0.0, 0.0, 0.0, 0.0, depth=1.0)
        for unit, texture in enumerate((self.masks, self.noise, self.shadow)):
            texture.use(unit)
        values = {"masks": 0, "noise": 1, "shadow": 2, "light_view": light,
                  "projection": _projection(s.focal), **s.uniforms}  # fmt: skip
        for program in self.programs.values():
            _set(program, values)
        for name in names:
            arrays[name][0].render()
        n = self.side * self.factor
        raw = np.frombuffer(self.target.read(components=4, dtype="f2"), np.float16)
        # OpenGL's first row is the lowest.
        full = raw.reshape(n, n, 4)[::-1].astype(np.float32)
        small = np.asarray(
            cv2.resize(full, (self.side, self.side), interpolation=cv2.INTER_AREA), np.float32
        )
        return small[..., :3], small[..., 3]


def _set(program: Any, values: dict[str, Any]) -> None:
    for name, value in values.items():
        if name not in program:
            continue
        if isinstance(value, np.ndarray) and value.ndim == 2:
            program[name].write(np.ascontiguousarray(value.T, np.float32).tobytes())
        else:
            program[name].value = tuple(value) if isinstance(value, np.ndarray) else value


def _projection(focal: float, near: float = 0.05, far: float = 20.0) -> Array:
    """Camera of OpenCV's axes to clip space; `focal` in units of the picture's side."""
    p = np.zeros((4, 4))
    p[0, 0], p[1, 1] = 2 * focal, -2 * focal
    p[2, 2], p[2, 3] = (far + near) / (far - near), -2 * far * near / (far - near)
    p[3, 2] = 1.0
    return p


def _light_view(centre: Array, direction: Array, radius: float = 0.24) -> Array:
    """Orthographic view from the light onto a sphere about the face."""
    z = -direction / np.linalg.norm(direction)
    x = np.cross([0.0, 1.0, 0.0] if abs(z[1]) < 0.9 else [1.0, 0.0, 0.0], z)
    x /= np.linalg.norm(x)
    rot = np.stack([x, np.cross(z, x), z])
    m = np.eye(4)
    m[:3, :3] = rot / radius
    m[:3, 3] = -rot @ centre / radius
    m[2] *= 0.5
    m[2, 3] = -0.5 * rot[2] @ centre / radius
    return m
