"""Rendered heads: the shipped lists, and the renderer itself."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from edgehp.datasets.faces import read_rendered
from edgehp.datasets.lists import read_table
from edgehp.datasets.stores import open_store
from edgehp.errors import DataError
from edgehp.pose import geodesic_degrees, matrix_from_euler, require_rotation
from tests.dataset_trees import encoded, photo, write, zip_of

REPO = Path(__file__).resolve().parent.parent
CALIBRATION = REPO / "calibration" / "rendered-heads.zip"
VALIDATION = REPO / "calibration" / "rendered-validation.zip"
# Seeds of the training heads, which are not shipped: see calibration/README.md.
TRAINING_SEEDS = range(1_000_000, 2_000_000)


def origins_of(path: Path) -> dict[str, tuple[bool, int]]:
    """Whether each picture is near-infrared, and its seed."""
    name = f"{path.stem}/labels.csv"
    rows = read_table(open_store(path).read(name), name).rows
    return {f"{path.stem}/{r['image']}": (r["nir"] == "1", int(r["seed"])) for _, r in rows}


def _tool(name: str) -> ModuleType:
    folder = str(REPO / "tools")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(f"rendering.{name}")
    finally:
        sys.path.remove(folder)


@pytest.mark.parametrize(
    ("path", "count", "limits", "megabytes"),
    [(CALIBRATION, 1024, (50, 90, 40), 12), (VALIDATION, 500, (40, 60, 30), 6)],
    ids=["calibration", "validation"],
)
def test_shipped_list(path, count, limits, megabytes):
    data = read_rendered(path)
    assert len(data) == count
    assert path.stat().st_size <= megabytes * 1e6
    angles = np.array([s.angles for s in data.samples])
    matrices = np.array([s.matrix for s in data.samples])
    assert geodesic_degrees(matrices, matrix_from_euler(angles)).max() < 1e-4
    assert (np.abs(angles) <= limits).all()
    assert np.abs(angles[:, 1]).mean() > 0.4 * limits[1], "yaw covers its range"
    assert (np.abs(angles.mean(0)) < 8).all(), "no side is preferred"
    for s in data.samples:
        width, height = s.size
        assert 0.3 * width < s.box.width < 1.05 * width
        assert -0.1 * width < s.box.x_min and s.box.x_max < 1.1 * width
        assert -0.1 * height < s.box.y_min and s.box.y_max < 1.1 * height
    for s in data.samples[::50]:
        require_rotation(s.matrix, s.name, 1e-6)
        assert s.load().std() > 5


def test_shipped_seeds_are_disjoint_and_include_near_infrared():
    seen: set[int] = set()
    for path in (CALIBRATION, VALIDATION):
        origins = origins_of(path)
        seeds = {seed for _, seed in origins.values()}
        assert len(seeds) == len(origins)
        assert not seeds & seen and not any(s in TRAINING_SEEDS for s in seeds)
        seen |= seeds
        assert 0.12 < np.mean([nir for nir, _ in origins.values()]) < 0.28


def test_near_infrared_is_grey():
    data, origins = read_rendered(VALIDATION), origins_of(VALIDATION)
    colourful = {True: [], False: []}
    for s in data.samples[:60]:
        p = s.load().astype(float)
        colourful[origins[s.name][0]].append(np.abs(p[..., 0] - p[..., 2]).mean())
    assert max(colourful[True]) < 1 < np.median(colourful[False])


def test_skin_is_redder_than_blue():
    """Fails where the colour channels are swapped on the way."""
    data, origins = read_rendered(VALIDATION), origins_of(VALIDATION)
    warm = []
    for s in data.samples[:80]:
        if not origins[s.name][0] and np.abs(s.angles[1]) < 40:
            x, y = (s.box.x_min + s.box.x_max) / 2, s.box.y_min + 0.62 * s.box.height
            r = s.box.width * 0.12
            face = s.load()[int(y - r) : int(y + r), int(x - r) : int(x + r)].astype(float)
            warm.append(face[..., 0].mean() - face[..., 2].mean())
    assert np.mean(np.array(warm) > 0) > 0.9


def test_a_list_without_its_photo_is_refused(tmp_path):
    m = ",".join(str(v) for v in matrix_from_euler([10.0, 20.0, 5.0]).ravel())
    head = "image,width,height,x_min,y_min,x_max,y_max,pitch,yaw,roll," + ",".join(
        f"r{i}{j}" for i in range(3) for j in range(3)
    )
    row = f"a.jpg,64,48,10,5,50,45,10,20,5,{m},1,7"
    table = f"{head},nir,seed\n{row}\n"
    with pytest.raises(DataError, match=r"photo a\.jpg is not there"):
        files = {"x/labels.csv": table, "x/b.jpg": encoded(photo())}
        read_rendered(zip_of(tmp_path / "x.zip", files))
    with pytest.raises(DataError, match=r"expected heads with the labels\.csv"):
        read_rendered(zip_of(tmp_path / "y.zip", {"x/a.jpg": encoded(photo())}))
    write(tmp_path / "z" / "labels.csv", table)
    write(tmp_path / "z" / "a.jpg", encoded(photo()))
    data = read_rendered(tmp_path / "z")
    assert np.allclose(data.samples[0].angles, [10, 20, 5])


@pytest.fixture(scope="module")
def studio():
    for module in ("anny", "moderngl"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"the renderer needs {module}, which is not installed")
    from anny.paths import get_anny_cache_path

    if not any(get_anny_cache_path().rglob("build_compact_model_data_*")):
        pytest.skip("anny has not built its cache of shapes yet: render one head by hand first")
    heads, scene = _tool("heads"), _tool("scene")
    try:
        return scene.Studio(heads.HeadModel(), 128, 0.62)
    except Exception as e:  # moderngl raises Exception itself where there is no EGL
        pytest.skip(f"the renderer cannot start here: {e}")


# anny and torch warn about what they did not find or will change.
@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_same_seed_gives_the_same_pixels(studio):
    ranges = _tool("scene").Ranges()
    first, other, again = (studio.shoot(s, ranges) for s in (11, 12, 11))
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.matrix, again.matrix) and first.box == again.box
    assert not np.array_equal(first.image, other.image)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("seed", [21, 22])
def test_signs_in_the_picture(studio, seed):
    ranges = _tool("scene").Ranges(nir=0.0)

    def shot(pitch: float = 0, yaw: float = 0, roll: float = 0):
        r = studio.shoot(seed, ranges, np.array([pitch, yaw, roll]))
        return {k: np.array(v) for k, v in r.points.items()}

    def nose_from_line(p):
        """The nose's place relative to the middle of brow and chin."""
        return p["nose"] - (p["brow"] + p["chin"]) / 2

    calm = nose_from_line(shot())
    assert nose_from_line(shot(yaw=40))[0] < calm[0] - 2, "+yaw: to the image's left"
    assert nose_from_line(shot(yaw=-40))[0] > calm[0] + 2
    assert nose_from_line(shot(pitch=30))[1] < calm[1] - 1.5, "+pitch: up"
    assert nose_from_line(shot(pitch=-30))[1] > calm[1] + 1.5
    rolled = shot(roll=30)
    up = rolled["brow"] - rolled["chin"]
    assert np.degrees(np.arctan2(up[0], -up[1])) == pytest.approx(30, abs=4), "+roll: clockwise"


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", ["glasses", "mask", "hand"])
def test_an_occlusion_covers_its_part_of_the_same_head(studio, kind):
    """The label stays; what changed lies where the thing was put, and turned with the head."""
    ranges = _tool("scene").Ranges(nir=0.0)
    for yaw in (-40, 0, 40):
        bare, covered = (
            studio.shoot(31, ranges, np.array([0.0, yaw, 0.0]), occlusion=k) for k in ("none", kind)
        )
        assert np.array_equal(bare.matrix, covered.matrix) and bare.box == covered.box
        assert bare.points == covered.points
        changed = np.abs(bare.image.astype(float) - covered.image).max(2) > 40
        assert 0.005 < changed.mean() < 0.4
        if kind != "hand":
            middle = np.argwhere(changed).mean(0)
            (_, nose), (_, brow), (_, chin) = (bare.points[k] for k in ("nose", "brow", "chin"))
            low, high = (brow - 4, nose) if kind == "glasses" else (nose - 4, chin + 4)
            assert low < middle[0] < high
            # The nose of a head turned to the image's left is there, and so are they.
            assert yaw * (middle[1] - 64) <= 0 or abs(middle[1] - 64) < 8
    again = studio.shoot(31, ranges, np.array([0.0, 40, 0.0]), occlusion=kind)
    assert np.array_equal(again.image, covered.image)
