"""The same work in this process, in processes of this machine, or on the user's own Dask cluster.

Work is one function for many items. Items go out in shards and come back shard by shard, in the
order in which they are done; what an item gives does not depend on where or beside what it was
computed. A worker that dies costs its shard once more: the shard is done again when all others
are, alone, so that the one that kills its worker twice is known for certain and fails by itself.
"""

from __future__ import annotations

import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol, TypeVar

from edgehp.datasets.base import prefetch
from edgehp.errors import EdgehpError, EnvironmentalError, UsageError

Item = TypeVar("Item")
Taken = TypeVar("Taken", contravariant=True)
Given = TypeVar("Given", covariant=True)
# How often a silent cluster is looked at.
_LOOK_S = 1.0


class Work(Protocol[Taken, Given]):
    """What is done to every item; it travels to the workers by pickle."""

    @property
    def files(self) -> Mapping[str, Path]:
        """The files it needs, by the names they get in the folder that `open` is given."""

    def open(self, folder: Path | None) -> Callable[[Taken], Given]:
        """The function, made once a process.

        Args:
            folder: where `files` are; None where they are in their own places.
        """


@dataclass(frozen=True)
class Workers:
    """Where work is done.

    Attributes:
        processes: of this machine; 0 for this process itself.
        address: of a Dask scheduler, such as ``tls://head:8786``, in place of processes here.
    """

    processes: int = 0
    address: str | None = None

    def __post_init__(self) -> None:
        """Refuse both at once."""
        if self.processes and self.address is not None:
            raise UsageError("give --workers for this machine or --cluster for others, not both")

    @property
    def elsewhere(self) -> bool:
        """Whether work leaves this process."""
        return self.processes > 0 or self.address is not None


class ShardsLostError(EnvironmentalError):
    """Shards that killed their workers twice.

    Attributes:
        shards: the indices of their items.
    """

    def __init__(self, shards: Sequence[range]) -> None:
        """Of these shards."""
        self.shards = tuple(shards)
        super().__init__(f"{len(self.shards)} shards killed their workers twice")


class Lost(Exception):  # noqa: N818 - an answer of a pool, not a fault
    """The worker died while it worked on the shard."""


@dataclass(frozen=True)
class Pool:
    """Something that works on shards.

    Attributes:
        submit: begins a shard; its future may raise `Lost`.
        window: says how many shards may be begun at a time.
        look: raises `EnvironmentalError` where nothing will ever answer.
    """

    submit: Callable[[Sequence[Any]], Future[list[Any]]]
    window: Callable[[], int]
    look: Callable[[], None] = lambda: None


def run_shards(
    work: Work[Item, Any],
    items: Sequence[Item],
    workers: Workers,
    *,
    size: int,
    threads: int = 1,
    send: Callable[[Item], Item] | None = None,
) -> Iterator[list[tuple[int, Any]]]:
    """Do `work` for every item.

    Args:
        work: what to do.
        items: what to do it to.
        workers: where.
        size: largest number of items in a shard; fewer where not every worker would get some.
        threads: items worked on at a time in a shard.
        send: makes of an item what travels to another process, just before it does.

    Yields:
        For each shard that is done, in the order in which they are: (index of an item, and its
        result or the `EdgehpError` that it raised).

    Raises:
        EnvironmentalError: there are no workers, or the cluster went away.
        ShardsLostError: some killed their workers twice; raised when all others are done.
    """
    if workers.elsewhere:
        # The size of a cluster may change: it is taken for a small one.
        size = max(1, min(size, len(items) // (4 * (workers.processes or 8))))
    shards = iter([range(i, min(i + size, len(items))) for i in range(0, len(items), size)])
    waiting: dict[Future[list[Any]], tuple[range, dict[int, EdgehpError]]] = {}
    again: list[range] = []
    dead: list[range] = []
    lost: set[range] = set()
    with _pool(work, workers, threads) as pool:

        def begin(shard: range) -> None:
            ready: list[Item] = []
            refused: dict[int, EdgehpError] = {}
            for i in shard:
                try:
                    ready.append(send(items[i]) if send and workers.elsewhere else items[i])
                except EdgehpError as e:
                    refused[i] = e
            waiting[pool.submit(ready)] = shard, refused

        while True:
            while len(waiting) < pool.window() and (shard := next(shards, None)) is not None:
                begin(shard)
            if not waiting and again:
                begin(again.pop(0))
            if not waiting:
                break
            for future in wait(waiting, _LOOK_S, FIRST_COMPLETED).done:
                shard, refused = waiting.pop(future)
                try:
                    found = iter(future.result())
                except Lost:
                    (dead if shard in lost else again).append(shard)
                    lost.add(shard)
                else:
                    yield [(i, refused[i] if i in refused else next(found)) for i in shard]
            pool.look()
    if dead:
        raise ShardsLostError(dead)


def do_shard(
    pickled: bytes,
    folder: Path | None,
    threads: int,
    shard: Sequence[Any],
    stop: threading.Event | None = None,
) -> list[Any]:
    """Work on a shard in this process: for each item its result, or the `EdgehpError` it raised.

    Args:
        pickled: the `Work`.
        folder: where its files are, None for their own places.
        threads: items worked on at a time.
        shard: the items.
        stop: ends it between two items.
    """
    do = _opened(pickled, folder)

    def attempt(item: Any) -> Any:
        if stop is not None and stop.is_set():
            raise CancelledError
        try:
            return do(item)
        except EdgehpError as e:
            return e

    # One at a time in this thread: whoever listens here hears of its steps.
    return list(prefetch(shard, attempt, workers=threads) if threads > 1 else map(attempt, shard))


@lru_cache(maxsize=1)
def _opened(pickled: bytes, folder: Path | None) -> Callable[[Any], Any]:
    function: Callable[[Any], Any] = pickle.loads(pickled).open(folder)
    return function


def _pool(work: Work[Any, Any], workers: Workers, threads: int) -> AbstractContextManager[Pool]:
    pickled = pickle.dumps(work)
    if workers.address is not None:
        from edgehp._dask import connected

        return connected(workers.address, pickled, work.files, threads)
    if workers.processes:
        return _processes(workers.processes, pickled, threads)

    def do(shard: Sequence[Any]) -> Future[list[Any]]:
        future: Future[list[Any]] = Future()
        future.set_result(do_shard(pickled, None, threads, shard))
        return future

    return nullcontext(Pool(do, lambda: 1))


@contextmanager
def _processes(count: int, pickled: bytes, threads: int) -> Iterator[Pool]:
    """Processes of this machine, all of which end with the block, whatever they are doing.

    Each is in a pool of its own: in one of them all, a process that is killed would take the shards
    of the others with it.
    """
    # Threads of the engines do not survive a fork.
    context, own = get_context("spawn"), threading.local()
    leash, held = context.Pipe(duplex=False)
    pools: list[ProcessPoolExecutor] = []

    def do(shard: Sequence[Any]) -> list[Any]:
        if getattr(own, "pool", None) is None:
            own.pool = ProcessPoolExecutor(1, context, initializer=_held_by, initargs=(leash,))
            pools.append(own.pool)
        try:
            found: list[Any] = own.pool.submit(do_shard, pickled, None, threads, shard).result()
        except BrokenProcessPool as e:
            own.pool = None
            raise Lost from e
        return found

    hands = ThreadPoolExecutor(count, "edgehp-worker")
    try:
        yield Pool(lambda shard: hands.submit(do, shard), lambda: 2 * count)
    finally:
        held.close()
        hands.shutdown(cancel_futures=True)
        for pool in pools:
            pool.shutdown()
        leash.close()


def _held_by(leash: Connection) -> None:
    """Tie this process to its parent: it ends when the other end is closed or its holder dies."""
    # Ctrl-C in a terminal reaches every process; the parent ends this one in its own time.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait_for_the_end() -> None:
        try:
            leash.recv_bytes()
        except (EOFError, OSError):
            os._exit(1)

    threading.Thread(target=wait_for_the_end, daemon=True).start()
