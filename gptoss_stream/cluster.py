"""Makes shards on the workers of a Dask cluster, one task for each shard.

Dask starts tasks, moves those of dead workers elsewhere and carries words to and fro; what it
carries are descriptions, never tensors. Each worker makes one shard at a time: it says so to Dask
as a resource, once it is known to run the same version of this tool and to have the memory.
"""

from __future__ import annotations

import functools
import json
import logging
import re
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from . import __version__
from .errors import (
    GptOssStreamError,
    MachineError,
    OptionError,
    OutputError,
    missing_package,
    sized,
)
from .executor import Watch, memory_nbytes
from .jobs import Job, Made, make_shard, open_job
from .planner import PlannedShard
from .run_state import fingerprint
from .share import cost
from .workers import count_workers

try:
    import dask
    import distributed
except ImportError as error:
    raise missing_package(error, "distributed") from None

__all__ = ["Cluster", "open_client"]

RESOURCE = "gptoss_stream"
"""What Dask knows of a worker: one for each shard that it can make at a time."""
_ADDRESS = re.compile(r"((tcp|tls|wss?|ucx)://)?[\w.-]+:\d+/?|(tcp|tls|ucx)://\[[0-9a-f:]+\]:\d+")
PATIENCE = 300.0  # seconds without a word of a shard, after which another worker makes it too
_SLOWEST_SENDING = 500_000  # bytes a second: while a shard is sent, nothing is heard of it
_TICK = 0.1  # seconds between looks at what was heard
_ROUND = 1.0  # seconds between looks for new workers
_WORD = 0.3  # seconds between words of a worker
_DASK_NBYTES = 40_000_000  # of code
_DEATHS = 3  # that a shard may cost, as in Dask
_ANSWER = 10.0  # seconds for a scheduler to be reached
_LOOKING = 20.0  # seconds for the other workers, when one has answered
_GONE = (OSError, TimeoutError, RuntimeError, ValueError)  # of Dask, when the scheduler is lost


@contextmanager
def open_client(scheduler: str) -> Iterator[distributed.Client]:
    """A client of the scheduler that a text means: an address (tcp://host:8786), the file that a
    scheduler has written, or local:N for N worker processes of this machine.

    Raises `OptionError` for what cannot be meant, `MachineError` where no scheduler answers.
    """
    for name in [*logging.root.manager.loggerDict]:
        if name.split(".")[0] == "distributed":  # errors are told once, by us
            logging.getLogger(name).setLevel(logging.CRITICAL)
    local = re.fullmatch(r"local:(\d+)", scheduler)
    with _local_cluster(int(local[1])) if local else nullcontext() as cluster:
        address = cluster or _reached(scheduler)
        try:
            client = distributed.Client(address, set_as_default=False)
        except (*_GONE, TypeError) as error:
            raise _unanswered(scheduler, error) from None
        try:
            yield client
        finally:
            with suppress(*_GONE):
                client.close(timeout=2)


def _reached(scheduler: str) -> str:
    """The address of a scheduler, at which something listens."""
    address = scheduler
    if not _ADDRESS.fullmatch(scheduler):
        try:
            address = json.loads(Path(scheduler).read_text())["address"]
        except FileNotFoundError:
            raise OptionError(
                f"{scheduler}: no such file; name a scheduler as tcp://host:8786, by the file that "
                "it has written, or local:4 for 4 workers here"
            ) from None
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise OptionError(
                f"{scheduler}: not the file of a scheduler ({_first_line(error)})"
            ) from None
    host, _, port = address.rpartition("://")[2].rstrip("/").rpartition(":")
    try:
        # Before a client is made: one that has failed complains once more when it is deleted.
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER).close()
    except (OSError, ValueError) as error:
        raise _unanswered(scheduler, error) from None
    return address


def _unanswered(scheduler: str, error: BaseException) -> MachineError:
    return MachineError(
        f"{scheduler}: no scheduler answers ({_first_line(error)}); check the address, and that it "
        "runs"
    )


@contextmanager
def _local_cluster(workers: int) -> Iterator[distributed.LocalCluster]:
    count_workers(workers)  # a number that can be meant
    # Its profiler can lock a worker up, before Python 3.11.9 and 3.12.3 (python/cpython#106883).
    with dask.config.set({"distributed.worker.profile.enabled": False}):
        cluster = distributed.LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            dashboard_address="127.0.0.1:0",
            silence_logs=logging.CRITICAL,
        )
    try:
        yield cluster
    finally:
        with suppress(*_GONE):
            cluster.close(timeout=5)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


class Cluster:
    """Makes the shards of an output on the workers of a Dask client (see `output.Maker`).

    `threads` work on each shard; by default one more than a worker has, at most 8. Raises what
    making a shard raises, with the name of the worker; `OptionError` for workers that cannot take
    part, `MachineError` where the scheduler or too many workers are lost.
    """

    is_here = False

    def __init__(
        self,
        client: distributed.Client,
        job: Job,
        *,
        threads: int | None,
    ) -> None:
        if client.asynchronous:
            raise OptionError("an asynchronous Dask client cannot be used; open one that waits")
        self._client = client
        self._job = job
        self._threads = threads
        self._asked: set[str] = set()
        self._seated: set[str] = set()
        self._refused: dict[str, str] = {}
        self._has_new = False
        self.peak_rss = 0
        """The most memory that a worker has had."""

    # --- who takes part -----------------------------------------------------------------------

    def meet(self, work: Path | None) -> None:
        """Wait for workers, and refuse those that cannot make what is wanted before any does."""
        with _scheduler_lost():
            try:
                there = self._client.run_on_scheduler(_version)
            except ImportError as error:
                there = f"cannot be imported ({_first_line(error)})"
            if there != __version__:
                raise OptionError(
                    f"scheduler {self._client.scheduler_info()['address']}: gptoss_stream {there} "
                    f"there, and {__version__} here; install the same everywhere"
                )
            while not (found := self._client.nthreads()):
                time.sleep(_TICK)
            threads = self._threads or min(*found.values(), 7) + 1
            self._job = replace(self._job, threads=count_workers(threads))
            while not self._seated and not self._refused:
                self._enlist(sorted(self._client.nthreads().keys() - self._asked))
                time.sleep(_TICK)
            waiting = time.monotonic() + _LOOKING
            while self._asked and not self._refused and time.monotonic() < waiting:
                time.sleep(_TICK)  # for the others, but not for those that hang
            if self._refused:
                raise OptionError("; ".join(self._refused.values()))
            with tempfile.NamedTemporaryFile(dir=work) if work else nullcontext() as file:
                seen = None if work is None or file is None else Path(file.name)
                self._look(sorted(self._seated), seen)

    def _enlist(self, addresses: Sequence[str]) -> None:
        """Have workers make a shard at a time, if they can. Each is asked by a thread of its own,
        since one that hangs does not answer."""
        self._asked |= {*addresses}
        for address in addresses:
            threading.Thread(target=self._ask, args=(address,), daemon=True).start()

    def _ask(self, address: str) -> None:
        is_local = "://" not in self._job.source
        need = memory_nbytes(self._job.threads, is_local=is_local) + _DASK_NBYTES
        try:
            answer = self._client.run(
                _enlist, __version__, need, workers=[address], on_error="return"
            )[address]
        except BaseException as error:  # it or this client is going; or it is asked again
            answer = OSError(str(error))
        if answer is None:
            self._seated.add(address)
            self._has_new = True
        elif not isinstance(answer, OSError):
            if isinstance(answer, Exception):
                answer = f"gptoss_stream cannot be imported there ({_first_line(answer)})"
            self._refused[address] = f"worker {address}: {answer}"
        self._asked.discard(address)

    def _look(self, addresses: Sequence[str], seen: Path | None) -> None:
        """Have every worker see source and output."""
        futures = [
            self._client.submit(
                _look, self._job, None if seen is None else str(seen),
                workers=[address], allow_other_workers=False, pure=False,
            )
            for address in addresses
        ]  # fmt: skip
        waiting = time.monotonic() + _LOOKING
        while (states := {f.status for f in futures}) >= {"pending"} and "error" not in states:
            if "finished" in states and time.monotonic() > waiting:
                break  # the rest are busy with something else, or hang
            time.sleep(_TICK)
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
        watch: Watch,
    ) -> None:
        """Have the shards made, those that cost most first.

        No more tasks are under way than there are workers: what Dask has given to a worker that
        hangs, it does not take back.
        """
        topic = f"gptoss_stream-{uuid.uuid4().hex}"
        heard: SimpleQueue[Any] = SimpleQueue()
        self._client.subscribe_topic(topic, lambda event: heard.put(event[1]))
        order = sorted(shards, key=cost, reverse=True)
        flights = {shard.name: _Flight(shard) for shard in order}
        submit = functools.partial(self._submit, heard, fingerprint(state), topic)
        try:
            looked = time.monotonic()
            while flights:
                under_way = [flight for flight in flights.values() if flight.futures]
                room = max(1, len(self._seated)) - len(under_way)
                waiting = (flight for flight in flights.values() if not flight.futures)
                for flight in list(islice(waiting, max(0, room))):
                    submit(flight, None)
                self._take(heard, flights, watch)
                for flight in list(flights.values()):
                    others = self._seated - {flight.worker or ""}
                    if flight.is_overdue(PATIENCE) and others:
                        submit(flight, sorted(others))
                if time.monotonic() > looked + _ROUND:
                    with _scheduler_lost():
                        self._meet_new(flights)
                    looked = time.monotonic()
        finally:
            left = [f for flight in flights.values() for f in flight.futures]
            with suppress(*_GONE):
                self._client.cancel(left, force=True)
                self._client.unsubscribe_topic(topic)

    def _submit(
        self,
        heard: SimpleQueue[Any],
        run: str,
        topic: str,
        flight: _Flight,
        workers: list[str] | None,
    ) -> None:
        flight.heard = time.monotonic()
        name = flight.shard.name
        with _scheduler_lost():
            future = self._client.submit(
                _make, self._job, run, name, topic,
                key=f"{name}-{uuid.uuid4().hex}", workers=workers, resources={RESOURCE: 1},
                pure=False,
            )  # fmt: skip
        flight.futures.append(future)
        future.add_done_callback(heard.put)

    def _take(self, heard: SimpleQueue[Any], flights: dict[str, _Flight], watch: Watch) -> None:
        """Take in what has been heard."""
        try:
            words = [heard.get(timeout=_TICK)]
        except Empty:
            return
        words += [heard.get_nowait() for _ in range(heard.qsize())]  # not what is put back below
        for word in words:
            if isinstance(word, Mapping):
                if (flight := flights.get(word["shard"])) is not None:
                    watch.on_bytes(flight.hear(**word))
            else:
                self._end(word, heard, flights, watch)

    def _end(
        self,
        future: distributed.Future[Made],
        heard: SimpleQueue[Any],
        flights: dict[str, _Flight],
        watch: Watch,
    ) -> None:
        """A task has ended; of a shard that others make too it may not be the last."""
        flight = next((f for f in flights.values() if future in f.futures), None)
        if flight is None:
            return
        if future.status == "finished":
            try:
                made: Made = future.result(timeout=5)
            except _GONE:
                heard.put(future)  # with its worker; Dask does it again
                return
            if made.sha256 is not None and watch.on_sum is not None:
                watch.on_sum(flight.shard.name, made.sha256)
            self.peak_rss = max(self.peak_rss, made.peak_rss)
            watch.on_bytes(flight.shard.nbytes - flight.done)
            del flights[flight.shard.name]
            self._client.cancel([f for f in flight.futures if f is not future], force=True)
        elif future.status == "error":
            failure = future.exception()
            is_killed = isinstance(failure, distributed.scheduler.KilledWorker)
            if is_killed and len(flight.futures) > 1:
                flight.futures.remove(future)
            elif is_killed:
                raise _deadly(flight.shard, failure.allowed_failures + 1)
            else:
                raise failure
        elif future.status in ("pending", "lost"):  # with its worker; Dask does it again
            heard.put(future)
            time.sleep(_TICK)
        else:
            raise _lost("it has dropped its tasks")

    def _meet_new(self, flights: Mapping[str, _Flight]) -> None:
        """Let workers that have come meanwhile take part."""
        found = set(self._client.nthreads())
        self._seated &= found
        if new := found - self._seated - self._refused.keys() - self._asked:
            self._enlist(sorted(new))
        if self._has_new:
            self._has_new = False
            self._free(flights)
        if found and not self._seated and self._refused.keys() >= found:
            raise OptionError("; ".join(self._refused[address] for address in sorted(found)))

    def _free(self, flights: Mapping[str, _Flight]) -> None:
        """Begin anew what waits for a worker since the last has died: Dask looks once, when a new
        one comes, and not again when that is enlisted."""
        of_key = {future.key: flight for flight in flights.values() for future in flight.futures}
        stuck = self._client.run_on_scheduler(_stuck, [*of_key])
        for key, deaths in stuck.items():
            flight = of_key[key]
            flight.deaths += deaths
            if flight.deaths > _DEATHS:
                raise _deadly(flight.shard, flight.deaths)
            self._client.cancel(flight.futures, force=True)
            flight.futures.clear()


@dataclass
class _Flight:
    """A shard that is being made."""

    shard: PlannedShard
    futures: list[distributed.Future[Made]] = field(default_factory=list)
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
            patience += self.shard.nbytes / _SLOWEST_SENDING
        return bool(self.futures) and time.monotonic() > self.heard + patience


def _deadly(shard: PlannedShard, deaths: int) -> MachineError:
    return MachineError(
        f"{shard.name}: {deaths} workers died while they made it; look into what they have "
        "printed, and whether they had the memory"
    )


def _lost(why: str) -> MachineError:
    return MachineError(
        f"the scheduler is lost ({why}); run the same command again: what is finished stays"
    )


@contextmanager
def _scheduler_lost() -> Iterator[None]:
    try:
        yield
    except GptOssStreamError:
        raise
    except _GONE as error:
        raise _lost(_first_line(error)) from None


# --- on scheduler and workers -------------------------------------------------------------


def _version() -> str:
    return __version__


def _stuck(keys: list[str], dask_scheduler: distributed.Scheduler) -> dict[str, int]:
    """The tasks that no worker can be found for, and how many workers have died of each."""
    tasks = [task for key in keys if (task := dask_scheduler.tasks.get(key)) is not None]
    return {str(task.key): task.suspicious for task in tasks if task.state == "no-worker"}


async def _enlist(version: str, need: int, dask_worker: distributed.Worker) -> str | None:
    """Let this worker make a shard at a time; or say why it cannot."""
    if version != __version__:
        return f"it has gptoss_stream {__version__}, not {version}; install the same everywhere"
    limit = dask_worker.memory_manager.memory_limit
    if limit is not None and limit < need:
        return (
            f"it may use {sized(limit)} and making a shard takes {sized(need)}; raise its"
            " --memory-limit, or use fewer --workers"
        )
    await dask_worker.set_resources(**{RESOURCE: 1})
    return None


def _look(job: Job, seen: str | None) -> None:
    """See source and output from this worker."""
    with _named_worker(distributed.get_worker()):
        open_job(job)
        if seen is not None and not Path(seen).exists():
            raise OutputError(
                f"{job.output}: the folder is not there, or another one; name one that all workers "
                "share, or a bucket"
            )


def _make(job: Job, run: str, name: str, topic: str) -> Made:
    """Make a shard on this worker."""
    worker = distributed.get_worker()
    teller = _Teller(worker, topic, name)
    with _named_worker(worker):
        staging = Path(job.staging or worker.local_directory)
        return make_shard(job, run, name, staging, teller.on_bytes, teller.on_sending)


@contextmanager
def _named_worker(worker: distributed.Worker) -> Iterator[None]:
    """Errors of this tool with the name of the worker that they struck."""
    where = f"worker {worker.address}"
    try:
        yield
    except GptOssStreamError as error:
        raise type(error)(f"{where}: {error}") from None
    except MemoryError:
        raise MachineError(f"{where}: not enough memory; give it more") from None


class _UnwantedError(Exception):
    """Nobody waits for this shard any more."""


class _Teller:
    """Tells the client how far a shard is, and ends the task when nobody wants it."""

    def __init__(self, worker: distributed.Worker, topic: str, name: str) -> None:
        self._worker = worker
        self._key = worker.get_current_task()
        self._topic = topic
        self._name = name
        self._nbytes = 0
        self._next = 0.0
        self._telling = threading.Lock()
        self._tell(is_sent=False)

    def on_bytes(self, nbytes: int) -> None:
        """So many bytes more are written."""
        with self._telling:
            self._nbytes += nbytes
            if time.monotonic() < self._next:
                return
            self._next = time.monotonic() + _WORD
        task = self._worker.state.tasks.get(self._key)
        if task is None or task.state == "cancelled":
            raise _UnwantedError
        self._tell(is_sent=False)

    def on_sending(self) -> None:
        """All are, and now it is sent."""
        self._tell(is_sent=True)

    def _tell(self, *, is_sent: bool) -> None:
        word = {
            "shard": self._name,
            "worker": self._worker.address,
            "nbytes": self._nbytes,
            "is_sent": is_sent,
        }
        self._worker.log_event(self._topic, word)
