"""What every test file may use: the research data where it exists, and seeds that are shown."""

from __future__ import annotations

import gc
import os
import random
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from edgehp.pipeline.pipeline import BuildResult
    from edgehp.pipeline.plan import BuildRequest

REPO = Path(__file__).resolve().parent.parent


def find_shared() -> Path | None:
    """The directory of research data: ``$EDGEHP_SHARED``, else ``shared`` beside the checkout."""
    given = os.environ.get("EDGEHP_SHARED")
    candidate = Path(given) if given else REPO.parent / "shared"
    return candidate.resolve() if (candidate / "data").is_dir() else None


@pytest.fixture(scope="module", autouse=True)
def _garbage_of_the_module_alone() -> None:
    # The code under test collects garbage dozens of times a build: not through every module that
    # was imported and all that other tests left, which takes up to half a second each time.
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of the checkout."""
    return REPO


@pytest.fixture(scope="session")
def shared() -> Path:
    """The directory of research data; the test is skipped where there is none."""
    found = find_shared()
    if found is None:
        pytest.skip("research data not found: set EDGEHP_SHARED to the directory that holds data/")
    return found


@pytest.fixture(scope="session")
def shared_data(shared: Path) -> Path:
    """The data sets (AFLW2000, boxes, faces)."""
    return shared / "data"


@pytest.fixture(scope="session")
def shared_teachers(shared: Path) -> Path:
    """The teacher networks; the test is skipped where there are none."""
    teachers = shared / "teachers"
    if not teachers.is_dir():
        pytest.skip(f"no teachers/ in {shared.name}: the teacher networks are not here")
    return teachers


@pytest.fixture(scope="session")
def small_request(tmp_path_factory: pytest.TempPathFactory) -> BuildRequest:
    """An INT8 build of a small network, as of `tests.build_parts.small_request`."""
    from tests import build_parts

    return build_parts.small_request(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def small(small_request: BuildRequest) -> Path:
    """The folder with the files of `small_request`."""
    return small_request.output.parent


@pytest.fixture(scope="session")
def small_int8(small_request: BuildRequest) -> BuildResult:
    """What the build of `small_request` made; not to be changed."""
    from edgehp.pipeline.pipeline import build

    return build(small_request)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--seed", type=int, default=None, help="seed of the random tests (default: a new one)"
    )


def pytest_configure(config: pytest.Config) -> None:
    # With xdist the workers must agree: they inherit the number through the environment.
    given = config.getoption("--seed")
    if given is None:
        given = int(os.environ.get("EDGEHP_TEST_SEED", random.SystemRandom().randrange(2**31)))
    os.environ["EDGEHP_TEST_SEED"] = str(given)


def pytest_report_header() -> str:
    return f"edgehp seed: {os.environ['EDGEHP_TEST_SEED']} (repeat with --seed)"


@pytest.fixture(scope="session")
def seed() -> int:
    """The seed of this run, printed in the header."""
    return int(os.environ["EDGEHP_TEST_SEED"])


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    """A random generator, the same for every test of a run."""
    return np.random.default_rng(seed)
