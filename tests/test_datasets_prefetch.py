"""Work ahead of the consumer: order, bound, errors, shutdown."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from edgehp.datasets.base import prefetch
from edgehp.errors import DataError


def threads() -> int:
    return sum(t.name.startswith("edgehp-prefetch") for t in threading.enumerate())


def test_order_is_kept_although_later_items_finish_first() -> None:
    second_done = threading.Event()

    def work(i: int) -> int:
        assert threading.current_thread() is not threading.main_thread()
        if i == 0:
            assert second_done.wait(10)
        if i == 1:
            second_done.set()
        return i * i

    assert list(prefetch(range(20), work)) == [i * i for i in range(20)]
    assert threads() == 0


def test_runs_ahead_but_not_without_bound() -> None:
    taken = 0

    def source() -> Iterator[int]:
        nonlocal taken
        for i in range(1000):
            taken += 1
            yield i

    results = prefetch(source(), lambda i: i, workers=2, ahead=5)
    assert taken == 0
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    assert 3 < taken <= 3 + 5
    results.close()  # type: ignore[attr-defined]
    assert threads() == 0


def test_error_surfaces_at_its_item() -> None:
    def work(i: int) -> int:
        if i == 3:
            raise DataError("the fourth is bad")
        return i

    results = prefetch(range(10), work, workers=3)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DataError, match="fourth"):
        next(results)
    assert threads() == 0


def test_bad_items_can_be_listed() -> None:
    def work(i: int) -> int:
        if i % 3 == 1:
            raise DataError(f"{i} is bad")
        return i

    bad: list[tuple[int, str]] = []
    good = list(prefetch(range(8), work, on_bad=lambda i, e: bad.append((i, str(e)))))
    assert good == [0, 2, 3, 5, 6]
    assert bad == [(1, "1 is bad"), (4, "4 is bad"), (7, "7 is bad")]


def test_other_errors_are_never_listed() -> None:
    def work(i: int) -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(prefetch(range(3), work, on_bad=lambda i, e: None))
