"""Work on samples ahead of their consumer, in threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from edgehp.errors import DataError, UsageError

__all__ = ["prefetch"]

S = TypeVar("S")
R = TypeVar("R")


def prefetch(
    samples: Iterable[S],
    work: Callable[[S], R],
    *,
    workers: int = 2,
    ahead: int | None = None,
    on_bad: Callable[[S, DataError], None] | None = None,
) -> Iterator[R]:
    """Yield ``work(sample)`` for every sample, in order, computed ahead in threads.

    Threads are enough: OpenCV's decoding and resizing release the interpreter lock. Abandoning the
    iterator (``break``, ``close``) stops the threads after the items they are working on.

    Args:
        samples: what to work on; taken one at a time, it may be endless.
        work: called in a worker thread, e.g. loads a `Sample` and crops its face.
        workers: number of threads.
        ahead: how many results may wait or be in work, a bound on memory; 4 a worker when None.
        on_bad: called, in order, in the consumer's thread, with a sample whose work raised a
            `DataError`; the sample is then left out. Without it the error is raised. To count and
            list them: ``on_bad=lambda sample, error: skips.add(sample.name, error)``.

    Yields:
        The results, in the order of the samples.

    Raises:
        UsageError: `workers` or `ahead` is less than 1.
        Exception: what `work` raised, when the consumer reaches that item and not before.
    """
    if workers < 1 or (ahead is not None and ahead < 1):
        raise UsageError(f"prefetch needs at least 1 worker and 1 item, got {workers} and {ahead}")
    return _run(samples, work, workers, 4 * workers if ahead is None else ahead, on_bad)


def _run(
    samples: Iterable[S],
    work: Callable[[S], R],
    workers: int,
    ahead: int,
    on_bad: Callable[[S, DataError], None] | None,
) -> Iterator[R]:
    waiting: deque[tuple[S, Future[R]]] = deque()

    def results(sample: S, future: Future[R]) -> Iterator[R]:
        try:
            result = future.result()
        except DataError as e:
            if on_bad is None:
                raise
            on_bad(sample, e)
            return
        yield result

    pool = ThreadPoolExecutor(workers, thread_name_prefix="edgehp-prefetch")
    try:
        for sample in samples:
            waiting.append((sample, pool.submit(work, sample)))
            if len(waiting) >= ahead:
                yield from results(*waiting.popleft())
        while waiting:
            yield from results(*waiting.popleft())
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
