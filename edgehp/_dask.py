"""Shards on a Dask cluster that the user runs.

The work and its files travel once to every worker, as a plugin of it: a worker that joins later or
starts anew gets them too, and when it is unregistered, what still runs ends.
"""

from __future__ import annotations

import ipaddress
import logging
import tempfile
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from edgehp import __version__
from edgehp._installed import install_extra
from edgehp.cluster import Lost, Pool, do_shard
from edgehp.errors import EdgehpError, EnvironmentalError, UsageError

try:
    from distributed import Client, KilledWorker, WorkerPlugin, get_worker
except ImportError as e:
    raise EnvironmentalError(
        f"--cluster needs Dask's distributed\nhint: {install_extra('cluster')}"
    ) from e

_log = logging.getLogger(__name__)

# To reach the scheduler, and for its first worker to be there.
_PATIENCE_S = 10


class _Cargo(WorkerPlugin):  # type: ignore[misc]
    """The work and its files on one worker."""

    def __init__(self, pickled: bytes, files: Mapping[str, Path]) -> None:
        self.version, self.pickled = __version__, pickled
        self._files = {name: path.read_bytes() for name, path in files.items()}

    def setup(self, worker: Any) -> None:
        """As Dask calls it, on the worker."""
        if self.version != __version__:
            raise EnvironmentalError(
                f"the worker {worker.address} has edgehp {__version__}, this machine "
                f"{self.version}\nhint: install the same version on all"
            )
        self.stop = threading.Event()
        self._folder = tempfile.TemporaryDirectory(prefix="edgehp-", dir=worker.local_directory)
        self.folder = Path(self._folder.name)
        for name, data in self._files.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        self._files = {}

    def teardown(self, worker: Any) -> None:
        """As Dask calls it, on the worker."""
        self.stop.set()
        self._folder.cleanup()


def _on_worker(token: str, threads: int, shard: Sequence[Any]) -> list[Any]:
    """A shard on a Dask worker."""
    cargo: Any = get_worker().plugins[token]
    return do_shard(cargo.pickled, cargo.folder, threads, shard, cargo.stop)


def _pool(client: Client, address: str, token: str, threads: int) -> Pool:
    """A connection to the scheduler as what works on shards."""
    executor = client.get_executor(pure=False)
    gone = EnvironmentalError(
        f"the Dask scheduler at {address} went away\n"
        "hint: start it again and repeat the command; what was done is kept"
    )

    def submit(shard: Sequence[Any]) -> Future[list[Any]]:
        answer: Future[list[Any]] = Future()

        def pass_on(done: Future[list[Any]]) -> None:
            # Dask takes back what a scheduler that is gone had promised.
            error = gone if done.cancelled() else done.exception()
            if error is None:
                answer.set_result(done.result())
            else:
                answer.set_exception(Lost() if isinstance(error, KilledWorker) else error)

        begun = executor.submit(_on_worker, token, threads, shard)
        begun.add_done_callback(pass_on)
        return answer

    def window() -> int:
        try:
            # Workers come and go.
            return 2 * max(1, sum(map(int, client.nthreads().values())))
        except OSError as e:
            raise gone from e

    def look() -> None:
        if client.status != "running":
            raise gone

    return Pool(submit, window, look)


@contextmanager
def connected(
    address: str, pickled: bytes, files: Mapping[str, Path], threads: int
) -> Iterator[Pool]:
    """Join the cluster of the scheduler at `address` for one piece of work.

    Raises:
        UsageError: not an address, or not encrypted and not on this machine.
        EnvironmentalError: no scheduler, no workers, or another edgehp there.
    """
    _check(address)
    token = f"edgehp-{uuid.uuid4().hex}"
    # What Dask says of a lost connection is said here, in one sentence.
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    try:
        client = Client(address, timeout=_PATIENCE_S, set_as_default=False)
    except (OSError, TimeoutError, TypeError, ValueError) as e:
        raise EnvironmentalError(
            f"no Dask scheduler can be reached at {address}: {e}\nhint: 'dask scheduler' starts "
            "one; certificates are named in Dask's configuration (distributed.comm.tls)"
        ) from e
    with _closing(client):
        try:
            client.wait_for_workers(1, timeout=_PATIENCE_S)
            client.register_plugin(_Cargo(pickled, files), name=token)
        except TimeoutError as e:
            raise EnvironmentalError(
                f"the Dask cluster at {address} has no workers\n"
                f"hint: 'dask worker {address}' starts one"
            ) from e
        except EdgehpError:
            raise
        except Exception as e:  # whatever a worker without edgehp makes of it
            raise EnvironmentalError(
                f"a worker of {address} cannot run edgehp: {e}\n"
                f"hint: install edgehp {__version__} there, in the environment of 'dask worker'"
            ) from e
        try:
            yield _pool(client, address, token, threads)
        finally:
            if client.status == "running":
                with suppress(OSError):  # it may go away now
                    client.unregister_worker_plugin(token)


@contextmanager
def _closing(client: Client) -> Iterator[None]:
    """Close the client at the end."""
    try:
        yield
    finally:
        try:
            client.close()
        # Closing ends Dask's attempts to reconnect, and raises whatever they met, such as a
        # ValueError of tornado's: no answer to the work, nor in place of what ended it.
        except Exception as e:
            _log.debug("closing the connection to the Dask scheduler: %s", e)


def _check(address: str) -> None:
    """Refuse an address over which others could send this process what it unpickles."""
    try:
        url = urlsplit(address)
        host, port = url.hostname, url.port
    except ValueError:
        host = port = None
    if host is None or port is None or url.scheme not in ("tls", "tcp"):
        raise UsageError(f"--cluster {address}: expected tls://HOST:PORT of a Dask scheduler")
    if url.scheme == "tls" or host == "localhost":
        return
    with suppress(ValueError):
        if ipaddress.ip_address(host).is_loopback:
            return
    raise UsageError(
        f"--cluster {address} is not encrypted: anybody on the network could run code here and on "
        "the workers\nhint: give the scheduler, the workers and this machine certificates and use "
        f"tls://{host}:{port} (docs/scale.md)"
    )
