"""Writes shards on the workers of a Dask cluster, one Dask task for each shard.

Dask starts tasks, moves those of dead workers to others and delivers events. Only task
specifications are sent, never tensors. Each worker writes one shard at a time: it has a Dask
resource for that, once it is known to run the same version of this tool and to have the memory.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from .._utils.failures import missing_package
from ..errors import MachineError, OptionError
from ..planning.shards import PlannedShard, write_nbytes
from ..writing.executor import Callbacks
from .dask_client import CONNECTION_ERRORS, scheduler_errors, scheduler_lost
from .dask_worker import RESOURCE, stuck_tasks, write_shard_on_worker
from .task_spec import ShardResult, TaskSpec
from .worker_pool import POLL_INTERVAL, WorkerPool

try:
    import distributed
except ImportError as error:
    raise missing_package(error, "distributed") from None

__all__ = ["DaskExecutor"]

STALL_TIMEOUT = 300.0  # seconds without a report, after which another worker writes the shard too
_MIN_UPLOAD_SPEED = 500_000  # bytes a second: there are no reports during an upload
_REFRESH_INTERVAL = 1.0  # seconds between looks for new workers
_MAX_WORKER_DEATHS = 3  # with one shard, as in Dask


class DaskExecutor:
    """An `Executor` that writes the shards on the workers of a Dask client.

    `write_shards` raises what writing a shard raises, with the address of the worker, and
    `MachineError` if the scheduler or too many workers are lost.

    Args:
        client: A client of the cluster.
        spec: The conversion.
        threads: Threads that work on a shard; None for one more than a worker has, at most 8.

    Raises:
        OptionError: For an asynchronous client.
    """

    in_process = False

    def __init__(self, client: distributed.Client, spec: TaskSpec, *, threads: int | None) -> None:
        if client.asynchronous:
            raise OptionError("an asynchronous Dask client cannot be used; open a synchronous one")
        self._client = client
        self._pool = WorkerPool(client, spec, threads)
        self._events: SimpleQueue[Any] = SimpleQueue()
        self._topic = ""
        self._run = ""
        self.peak_rss = 0
        """The peak resident memory, in bytes, of the worker that used most."""

    def find_written(self, shards: Sequence[PlannedShard], partial_folder: Path, run: str) -> int:
        """Return 0: a shard that a worker has begun is made again."""
        return 0

    def setup(self, work: Path | None) -> None:
        """Wait for workers and check that they can take part (see `WorkerPool.setup`)."""
        self._pool.setup(work)

    def write_shards(
        self,
        shards: Sequence[PlannedShard],
        folder: Path,
        partial_folder: Path,
        callbacks: Callbacks,
        *,
        run: str,
        checksums: bool,
    ) -> None:
        """Have the shards written, the largest first (see `Executor.write_shards`).

        There are never more tasks than workers: a task that Dask has assigned to a worker that
        hangs is not moved to another.
        """
        self._topic, self._run = f"gptoss_stream-{uuid.uuid4().hex}", run
        events: SimpleQueue[Any] = SimpleQueue()
        self._events = events
        self._client.subscribe_topic(self._topic, lambda event: events.put(event[1]))
        order = sorted(shards, key=write_nbytes, reverse=True)
        in_flight = {shard.name: _InFlightShard(shard) for shard in order}
        try:
            refreshed = time.monotonic()
            while in_flight:
                self._submit_waiting(in_flight)
                self._process_events(in_flight, callbacks)
                self._resubmit_stalled(in_flight)
                if time.monotonic() > refreshed + _REFRESH_INTERVAL:
                    with scheduler_errors():
                        if self._pool.refresh():
                            self._restart_stuck(in_flight)
                    refreshed = time.monotonic()
        finally:
            left = [future for shard in in_flight.values() for future in shard.futures]
            with suppress(*CONNECTION_ERRORS):
                self._client.cancel(left, force=True)
                self._client.unsubscribe_topic(self._topic)

    def _submit_waiting(self, in_flight: Mapping[str, _InFlightShard]) -> None:
        """Submit as many shards as there are free workers."""
        num_running = sum(bool(shard.futures) for shard in in_flight.values())
        free = max(1, len(self._pool.registered)) - num_running
        waiting = (shard for shard in in_flight.values() if not shard.futures)
        for shard in list(islice(waiting, max(0, free))):
            self._submit(shard, None)

    def _resubmit_stalled(self, in_flight: Mapping[str, _InFlightShard]) -> None:
        """Have other workers write the shards of workers that no longer report."""
        for shard in list(in_flight.values()):
            others = self._pool.registered - {shard.worker or ""}
            if shard.is_stalled(STALL_TIMEOUT) and others:
                self._submit(shard, sorted(others))

    def _submit(self, in_flight: _InFlightShard, workers: list[str] | None) -> None:
        in_flight.last_report = time.monotonic()
        name = in_flight.shard.name
        with scheduler_errors():
            future = self._client.submit(
                write_shard_on_worker, self._pool.spec, self._run, name, self._topic,
                key=f"{name}-{uuid.uuid4().hex}", workers=workers, resources={RESOURCE: 1},
                pure=False,
            )  # fmt: skip
        in_flight.futures.append(future)
        future.add_done_callback(self._events.put)

    def _process_events(self, in_flight: dict[str, _InFlightShard], callbacks: Callbacks) -> None:
        """Process progress reports and futures that are done."""
        try:
            events = [self._events.get(timeout=POLL_INTERVAL)]
        except Empty:
            return
        # Not more than there are now: `_end` puts some back.
        events += [self._events.get_nowait() for _ in range(self._events.qsize())]
        for event in events:
            if isinstance(event, Mapping):
                if (shard := in_flight.get(event["shard"])) is not None:
                    callbacks.on_progress(shard.update(**event))
            else:
                self._end(event, in_flight, callbacks)

    def _end(
        self,
        future: distributed.Future[ShardResult],
        in_flight: dict[str, _InFlightShard],
        callbacks: Callbacks,
    ) -> None:
        """Process a future that is done; other workers may be writing the same shard."""
        shard = next((s for s in in_flight.values() if future in s.futures), None)
        if shard is None:
            return
        if future.status == "finished":
            self._finish(future, shard, in_flight, callbacks)
        elif future.status == "error":
            failure = future.exception()
            if failure is None:  # it was dropped meanwhile
                raise scheduler_lost("it has dropped its tasks")
            is_killed = isinstance(failure, distributed.scheduler.KilledWorker)
            if is_killed and len(shard.futures) > 1:
                shard.futures.remove(future)
            elif is_killed:
                raise _workers_died(shard.shard, failure.allowed_failures + 1)
            else:
                raise failure
        elif future.status in ("pending", "lost"):  # its worker died; Dask runs the task again
            self._events.put(future)
            time.sleep(POLL_INTERVAL)
        else:
            raise scheduler_lost("it has dropped its tasks")

    def _finish(
        self,
        future: distributed.Future[ShardResult],
        shard: _InFlightShard,
        in_flight: dict[str, _InFlightShard],
        callbacks: Callbacks,
    ) -> None:
        """Take the result of a shard that is written."""
        try:
            result: ShardResult = future.result(timeout=5)
        except CONNECTION_ERRORS:
            # Its worker died, and Dask runs the task again; or the scheduler did.
            self._events.put(future)
            return
        callbacks.before_commit(shard.shard.name, result.summary)
        if result.receipt is not None:
            callbacks.on_upload(shard.shard.name, result.receipt)
        self.peak_rss = max(self.peak_rss, result.peak_rss)
        callbacks.on_progress(shard.shard.nbytes - shard.nbytes_done)
        del in_flight[shard.shard.name]
        callbacks.on_shard_finished(shard.shard.name)
        others = [other for other in shard.futures if other is not future]
        with suppress(*CONNECTION_ERRORS):
            self._client.cancel(others, force=True)

    def _restart_stuck(self, in_flight: Mapping[str, _InFlightShard]) -> None:
        """Submit again the tasks that wait for a worker since the last one died.

        Dask looks for one when a worker joins, and not again when that worker is registered.
        """
        by_key = {future.key: s for s in in_flight.values() for future in s.futures}
        stuck = self._client.run_on_scheduler(stuck_tasks, [*by_key])
        for key, deaths in stuck.items():
            shard = by_key[key]
            shard.deaths += deaths
            if shard.deaths > _MAX_WORKER_DEATHS:
                raise _workers_died(shard.shard, shard.deaths)
            self._client.cancel(shard.futures, force=True)
            shard.futures.clear()


@dataclass
class _InFlightShard:
    """A shard that is not finished, and the Dask tasks that write it."""

    shard: PlannedShard
    futures: list[distributed.Future[ShardResult]] = field(default_factory=list)
    nbytes_done: int = 0
    """Bytes written, as reported to the callbacks."""
    worker: str | None = None
    """The worker that reported last."""
    last_report: float = 0.0
    """When it did, or when the shard was submitted."""
    is_uploading: bool = False
    deaths: int = 0
    """Workers that died while they wrote it and no other worker was left."""

    def update(self, shard: str, worker: str, nbytes: int, is_uploading: bool) -> int:
        """Take a progress report; returns the bytes written since the last one."""
        self.worker, self.last_report = worker, time.monotonic()
        self.is_uploading = is_uploading
        more = max(0, nbytes - self.nbytes_done)
        self.nbytes_done += more
        return more

    def is_stalled(self, timeout: float) -> bool:
        """Return whether there was no report for too long."""
        if self.is_uploading:
            timeout += self.shard.nbytes / _MIN_UPLOAD_SPEED
        return bool(self.futures) and time.monotonic() > self.last_report + timeout


def _workers_died(shard: PlannedShard, deaths: int) -> MachineError:
    return MachineError(
        f"{shard.name}: {deaths} workers died while they wrote it; look at what they have "
        "printed, and whether they had enough memory"
    )
