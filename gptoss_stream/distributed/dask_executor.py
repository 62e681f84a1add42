"""Makes shards on the workers of a Dask cluster, one task for each shard.

Dask starts tasks, moves those of dead workers elsewhere and carries words to and fro; what it
carries are descriptions, never tensors. Each worker makes one shard at a time: it says so to Dask
as a resource, once it is known to run the same version of this tool and to have the memory.
"""

from __future__ import annotations

import functools
import tempfile
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from .. import __version__
from .._utils.failures import missing_package
from .._utils.thread_pool import count_workers
from ..errors import MachineError, OptionError
from ..planning.shards import PlannedShard, write_nbytes
from ..writing.executor import Callbacks, memory_nbytes
from ..writing.run_state import fingerprint
from .dask_client import CONNECTION_ERRORS, first_line, scheduler_errors, scheduler_lost
from .dask_worker import (
    RESOURCE,
    check_access,
    installed_version,
    register_worker,
    stuck_tasks,
    write_shard_on_worker,
)
from .task_spec import ShardResult, TaskSpec

try:
    import distributed
except ImportError as error:
    raise missing_package(error, "distributed") from None

__all__ = ["DaskExecutor"]


STALL_TIMEOUT = 300.0  # seconds without a word of a shard, after which another worker makes it too


_MIN_UPLOAD_SPEED = 500_000  # bytes a second: while a shard is sent, nothing is heard of it


_POLL_INTERVAL = 0.1  # seconds between looks at what was heard


_WORKER_CHECK_INTERVAL = 1.0  # seconds between looks for new workers


_DASK_NBYTES = 40_000_000  # of code


_MAX_WORKER_DEATHS = 3  # that a shard may cost, as in Dask


_SETUP_TIMEOUT = 20.0  # seconds for the other workers, when one has answered


class DaskExecutor:
    """Makes the shards of an output on the workers of a Dask client (see `output.Maker`).

    `threads` work on each shard; by default one more than a worker has, at most 8. Raises what
    making a shard raises, with the name of the worker; `OptionError` for workers that cannot take
    part, `MachineError` where the scheduler or too many workers are lost.
    """

    in_process = False

    def __init__(
        self,
        client: distributed.Client,
        spec: TaskSpec,
        *,
        threads: int | None,
    ) -> None:
        if client.asynchronous:
            raise OptionError("an asynchronous Dask client cannot be used; open one that waits")
        self._client = client
        self._spec = spec
        self._threads = threads
        self._asked: set[str] = set()
        self._seated: set[str] = set()
        self._refused: dict[str, str] = {}
        self._has_new = False
        self.peak_rss = 0
        """The most memory that a worker has had."""

    # --- who takes part -----------------------------------------------------------------------

    def setup(self, work: Path | None) -> None:
        """Wait for workers, and refuse those that cannot make what is wanted before any does."""
        with scheduler_errors():
            try:
                there = self._client.run_on_scheduler(installed_version)
            except ImportError as error:
                there = f"cannot be imported ({first_line(error)})"
            if there != __version__:
                raise OptionError(
                    f"scheduler {self._client.scheduler_info()['address']}: gptoss_stream {there} "
                    f"there, and {__version__} here; install the same everywhere"
                )
            while not (found := self._client.nthreads()):
                time.sleep(_POLL_INTERVAL)
            threads = self._threads or min(*found.values(), 7) + 1
            self._spec = replace(self._spec, threads=count_workers(threads))
            while not self._seated and not self._refused:
                self.register_worker(sorted(self._client.nthreads().keys() - self._asked))
                time.sleep(_POLL_INTERVAL)
            waiting = time.monotonic() + _SETUP_TIMEOUT
            while self._asked and not self._refused and time.monotonic() < waiting:
                time.sleep(_POLL_INTERVAL)  # for the others, but not for those that hang
            if self._refused:
                raise OptionError("; ".join(self._refused.values()))
            with tempfile.NamedTemporaryFile(dir=work) if work else nullcontext() as file:
                seen = None if work is None or file is None else Path(file.name)
                self.check_access(sorted(self._seated), seen)

    def register_worker(self, addresses: Sequence[str]) -> None:
        """Have workers make a shard at a time, if they can. Each is asked by a thread of its own,
        since one that hangs does not answer."""
        self._asked |= {*addresses}
        for address in addresses:
            threading.Thread(target=self._ask, args=(address,), daemon=True).start()

    def _ask(self, address: str) -> None:
        is_local = "://" not in self._spec.source
        need = memory_nbytes(self._spec.threads, is_local=is_local) + _DASK_NBYTES
        try:
            answer = self._client.run(
                register_worker, __version__, need, workers=[address], on_error="return"
            )[address]
        except BaseException as error:  # it or this client is going; or it is asked again
            answer = OSError(str(error))
        if answer is None:
            self._seated.add(address)
            self._has_new = True
        elif not isinstance(answer, OSError):
            if isinstance(answer, Exception):
                answer = f"gptoss_stream cannot be imported there ({first_line(answer)})"
            self._refused[address] = f"worker {address}: {answer}"
        self._asked.discard(address)

    def check_access(self, addresses: Sequence[str], seen: Path | None) -> None:
        """Have every worker see source and output."""
        futures = [
            self._client.submit(
                check_access, self._spec, None if seen is None else str(seen),
                workers=[address], allow_other_workers=False, pure=False,
            )
            for address in addresses
        ]  # fmt: skip
        waiting = time.monotonic() + _SETUP_TIMEOUT
        while (states := {f.status for f in futures}) >= {"pending"} and "error" not in states:
            if "finished" in states and time.monotonic() > waiting:
                break  # the rest are busy with something else, or hang
            time.sleep(_POLL_INTERVAL)
        failed = [f.exception() for f in futures if f.status == "error"]
        errors = [e for e in failed if not isinstance(e, distributed.scheduler.KilledWorker)]
        if errors:
            raise errors[0]
        if not any(f.status == "finished" for f in futures):
            raise MachineError("no worker answers; look into what the workers have printed")

    # --- shards -------------------------------------------------------------------------------

    def make(
        self,
        shards: Sequence[PlannedShard],
        state: Mapping[str, Any],
        folder: Path,
        partials: Path,
        callbacks: Callbacks,
    ) -> None:
        """Have the shards made, those that cost most first.

        No more tasks are under way than there are workers: what Dask has given to a worker that
        hangs, it does not take back.
        """
        topic = f"gptoss_stream-{uuid.uuid4().hex}"
        heard: SimpleQueue[Any] = SimpleQueue()
        self._client.subscribe_topic(topic, lambda event: heard.put(event[1]))
        order = sorted(shards, key=write_nbytes, reverse=True)
        flights = {shard.name: _InFlightShard(shard) for shard in order}
        submit = functools.partial(self._submit, heard, fingerprint(state), topic)
        try:
            looked = time.monotonic()
            while flights:
                under_way = [flight for flight in flights.values() if flight.futures]
                room = max(1, len(self._seated)) - len(under_way)
                waiting = (flight for flight in flights.values() if not flight.futures)
                for flight in list(islice(waiting, max(0, room))):
                    submit(flight, None)
                self._take(heard, flights, callbacks)
                for flight in list(flights.values()):
                    others = self._seated - {flight.worker or ""}
                    if flight.is_overdue(STALL_TIMEOUT) and others:
                        submit(flight, sorted(others))
                if time.monotonic() > looked + _WORKER_CHECK_INTERVAL:
                    with scheduler_errors():
                        self._meet_new(flights)
                    looked = time.monotonic()
        finally:
            left = [f for flight in flights.values() for f in flight.futures]
            with suppress(*CONNECTION_ERRORS):
                self._client.cancel(left, force=True)
                self._client.unsubscribe_topic(topic)

    def _submit(
        self,
        heard: SimpleQueue[Any],
        run: str,
        topic: str,
        flight: _InFlightShard,
        workers: list[str] | None,
    ) -> None:
        flight.heard = time.monotonic()
        name = flight.shard.name
        with scheduler_errors():
            future = self._client.submit(
                write_shard_on_worker, self._spec, run, name, topic,
                key=f"{name}-{uuid.uuid4().hex}", workers=workers, resources={RESOURCE: 1},
                pure=False,
            )  # fmt: skip
        flight.futures.append(future)
        future.add_done_callback(heard.put)

    def _take(
        self, heard: SimpleQueue[Any], flights: dict[str, _InFlightShard], callbacks: Callbacks
    ) -> None:
        """Take in what has been heard."""
        try:
            words = [heard.get(timeout=_POLL_INTERVAL)]
        except Empty:
            return
        words += [heard.get_nowait() for _ in range(heard.qsize())]  # not what is put back below
        for word in words:
            if isinstance(word, Mapping):
                if (flight := flights.get(word["shard"])) is not None:
                    callbacks.on_bytes(flight.hear(**word))
            else:
                self._end(word, heard, flights, callbacks)

    def _end(
        self,
        future: distributed.Future[ShardResult],
        heard: SimpleQueue[Any],
        flights: dict[str, _InFlightShard],
        callbacks: Callbacks,
    ) -> None:
        """A task has ended; of a shard that others make too it may not be the last."""
        flight = next((f for f in flights.values() if future in f.futures), None)
        if flight is None:
            return
        if future.status == "finished":
            try:
                made: ShardResult = future.result(timeout=5)
            except CONNECTION_ERRORS:
                heard.put(future)  # with its worker; Dask does it again
                return
            if made.sha256 is not None and callbacks.on_sum is not None:
                callbacks.on_sum(flight.shard.name, made.sha256)
            self.peak_rss = max(self.peak_rss, made.peak_rss)
            callbacks.on_bytes(flight.shard.nbytes - flight.done)
            del flights[flight.shard.name]
            self._client.cancel([f for f in flight.futures if f is not future], force=True)
        elif future.status == "error":
            failure = future.exception()
            is_killed = isinstance(failure, distributed.scheduler.KilledWorker)
            if is_killed and len(flight.futures) > 1:
                flight.futures.remove(future)
            elif is_killed:
                raise _workers_died(flight.shard, failure.allowed_failures + 1)
            else:
                raise failure
        elif future.status in ("pending", "lost"):  # with its worker; Dask does it again
            heard.put(future)
            time.sleep(_POLL_INTERVAL)
        else:
            raise scheduler_lost("it has dropped its tasks")

    def _meet_new(self, flights: Mapping[str, _InFlightShard]) -> None:
        """Let workers that have come meanwhile take part."""
        found = set(self._client.nthreads())
        self._seated &= found
        if new := found - self._seated - self._refused.keys() - self._asked:
            self.register_worker(sorted(new))
        if self._has_new:
            self._has_new = False
            self._free(flights)
        if found and not self._seated and self._refused.keys() >= found:
            raise OptionError("; ".join(self._refused[address] for address in sorted(found)))

    def _free(self, flights: Mapping[str, _InFlightShard]) -> None:
        """Begin anew what waits for a worker since the last has died: Dask looks once, when a new
        one comes, and not again when that is enlisted."""
        of_key = {future.key: flight for flight in flights.values() for future in flight.futures}
        stuck = self._client.run_on_scheduler(stuck_tasks, [*of_key])
        for key, deaths in stuck.items():
            flight = of_key[key]
            flight.deaths += deaths
            if flight.deaths > _MAX_WORKER_DEATHS:
                raise _workers_died(flight.shard, flight.deaths)
            self._client.cancel(flight.futures, force=True)
            flight.futures.clear()


@dataclass
class _InFlightShard:
    """A shard that is being made."""

    shard: PlannedShard
    futures: list[distributed.Future[ShardResult]] = field(default_factory=list)
    done: int = 0
    """Bytes written of it, told to whoever watches."""
    worker: str | None = None
    """The last that was heard of."""
    heard: float = 0.0
    """When something was, or it was given away."""
    is_sent: bool = False
    deaths: int = 0
    """Of workers that were making it, where no other was there."""

    def hear(self, shard: str, worker: str, nbytes: int, is_sent: bool) -> int:
        """A worker has written so many bytes of it: how many more that are than before."""
        self.worker, self.heard, self.is_sent = worker, time.monotonic(), is_sent
        more = max(0, nbytes - self.done)
        self.done += more
        return more

    def is_overdue(self, patience: float) -> bool:
        """Whether nothing has been heard for too long."""
        if self.is_sent:
            patience += self.shard.nbytes / _MIN_UPLOAD_SPEED
        return bool(self.futures) and time.monotonic() > self.heard + patience


def _workers_died(shard: PlannedShard, deaths: int) -> MachineError:
    return MachineError(
        f"{shard.name}: {deaths} workers died while they made it; look into what they have "
        "printed, and whether they had the memory"
    )
