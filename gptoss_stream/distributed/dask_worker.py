"""Makes shards on the workers of a Dask cluster, one task for each shard.

Dask starts tasks, moves those of dead workers elsewhere and carries words to and fro; what it
carries are descriptions, never tensors. Each worker makes one shard at a time: it says so to Dask
as a resource, once it is known to run the same version of this tool and to have the memory.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .. import __version__
from .._utils.failures import missing_package
from .._utils.messages import sized
from ..errors import GptOssStreamError, MachineError, OutputError
from .task_spec import ShardResult, TaskSpec
from .write_shard import open_task, write_shard

try:
    import distributed
except ImportError as error:
    raise missing_package(error, "distributed") from None

__all__ = [
    "REPORT_INTERVAL",
    "check_access",
    "installed_version",
    "register_worker",
    "stuck_tasks",
    "write_shard_on_worker",
]


RESOURCE = "gptoss_stream"
"""What Dask knows of a worker: one for each shard that it can make at a time."""


REPORT_INTERVAL = 0.3  # seconds between words of a worker


# --- on scheduler and workers -------------------------------------------------------------


def installed_version() -> str:
    return __version__


def stuck_tasks(keys: list[str], dask_scheduler: distributed.Scheduler) -> dict[str, int]:
    """The tasks that no worker can be found for, and how many workers have died of each."""
    tasks = [task for key in keys if (task := dask_scheduler.tasks.get(key)) is not None]
    return {str(task.key): task.suspicious for task in tasks if task.state == "no-worker"}


async def register_worker(version: str, need: int, dask_worker: distributed.Worker) -> str | None:
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


def check_access(spec: TaskSpec, seen: str | None) -> None:
    """See source and output from this worker."""
    with _naming_worker(distributed.get_worker()):
        open_task(spec)
        if seen is not None and not Path(seen).exists():
            raise OutputError(
                f"{spec.output}: the folder is not there, or another one; name one that all workers "
                "share, or a bucket"
            )


def write_shard_on_worker(spec: TaskSpec, run: str, name: str, topic: str) -> ShardResult:
    """Make a shard on this worker."""
    worker = distributed.get_worker()
    teller = _ProgressReporter(worker, topic, name)
    with _naming_worker(worker):
        staging = Path(spec.staging or worker.local_directory)
        return write_shard(spec, run, name, staging, teller.on_bytes, teller.on_sending)


@contextmanager
def _naming_worker(worker: distributed.Worker) -> Iterator[None]:
    """Errors of this tool with the name of the worker that they struck."""
    where = f"worker {worker.address}"
    try:
        yield
    except GptOssStreamError as error:
        raise type(error)(f"{where}: {error}") from None
    except MemoryError:
        raise MachineError(f"{where}: not enough memory; give it more") from None


class _CancelledError(Exception):
    """Nobody waits for this shard any more."""


class _ProgressReporter:
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
            self._next = time.monotonic() + REPORT_INTERVAL
        task = self._worker.state.tasks.get(self._key)
        if task is None or task.state == "cancelled":
            raise _CancelledError
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
