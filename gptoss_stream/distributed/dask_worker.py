"""Functions that Dask runs on the scheduler and on its workers."""

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
    "RESOURCE",
    "check_access",
    "installed_version",
    "register_worker",
    "stuck_tasks",
    "write_shard_on_worker",
]

RESOURCE = "gptoss_stream"
"""The Dask resource of a worker: one for each shard that it can write at a time."""
_REPORT_INTERVAL = 0.3  # seconds between progress reports


def installed_version() -> str:
    """Return the version of this tool, on the scheduler."""
    return __version__


def stuck_tasks(keys: list[str], dask_scheduler: distributed.Scheduler) -> dict[str, int]:
    """Return the tasks that no worker can take, and how many workers died with each."""
    tasks = [task for key in keys if (task := dask_scheduler.tasks.get(key)) is not None]
    return {str(task.key): task.suspicious for task in tasks if task.state == "no-worker"}


async def register_worker(version: str, need: int, dask_worker: distributed.Worker) -> str | None:
    """Let this worker write one shard at a time.

    Args:
        version: The version of this tool that runs the conversion.
        need: Bytes of memory that writing a shard takes.
        dask_worker: The worker, which Dask passes.

    Returns:
        None, or why the worker cannot take part.
    """
    if version != __version__:
        return f"it has gptoss_stream {__version__}, not {version}; install the same version"
    limit = dask_worker.memory_manager.memory_limit
    if limit is not None and limit < need:
        return (
            f"it may use {sized(limit)} of memory and writing a shard takes {sized(need)}; raise "
            "its --memory-limit, or use fewer --workers"
        )
    await dask_worker.set_resources(**{RESOURCE: 1})
    return None


def check_access(spec: TaskSpec, test_file: str | None) -> None:
    """Check that this worker can open source and output.

    Args:
        spec: The conversion.
        test_file: A file in the output folder that the worker must see, if the output is local.
    """
    with _naming_worker(distributed.get_worker()):
        open_task(spec)
        if test_file is not None and not Path(test_file).exists():
            raise OutputError(
                f"{spec.output}: this folder does not exist, or it is another one; name a folder "
                "that all workers share, or an object store"
            )


def write_shard_on_worker(spec: TaskSpec, run: str, name: str, topic: str) -> ShardResult:
    """Write a shard on this worker (see `write_shard`), and report progress to a Dask topic."""
    worker = distributed.get_worker()
    reporter = _ProgressReporter(worker, topic, name)
    with _naming_worker(worker):
        staging = Path(spec.staging or worker.local_directory)
        return write_shard(spec, run, name, staging, reporter.on_progress, reporter.on_upload)


@contextmanager
def _naming_worker(worker: distributed.Worker) -> Iterator[None]:
    """Name the worker in errors of this tool."""
    where = f"worker {worker.address}"
    try:
        yield
    except GptOssStreamError as error:
        raise type(error)(f"{where}: {error}") from None
    except MemoryError:
        raise MachineError(f"{where}: not enough memory; give it more") from None


class _CancelledError(Exception):
    """The client no longer waits for this shard."""


class _ProgressReporter:
    """Reports the progress of a shard to the client, and stops when the task is cancelled."""

    def __init__(self, worker: distributed.Worker, topic: str, name: str) -> None:
        self._worker = worker
        self._key = worker.get_current_task()
        self._topic = topic
        self._name = name
        self._nbytes = 0
        self._next_report = 0.0
        self._lock = threading.Lock()
        self._report(is_uploading=False)

    def on_progress(self, nbytes: int) -> None:
        """Report bytes written since the last call, but not too often."""
        with self._lock:
            self._nbytes += nbytes
            if time.monotonic() < self._next_report:
                return
            self._next_report = time.monotonic() + _REPORT_INTERVAL
        task = self._worker.state.tasks.get(self._key)
        if task is None or task.state == "cancelled":
            raise _CancelledError
        self._report(is_uploading=False)

    def on_upload(self) -> None:
        """Report that the shard is written and its upload begins."""
        self._report(is_uploading=True)

    def _report(self, *, is_uploading: bool) -> None:
        event = {
            "shard": self._name,
            "worker": self._worker.address,
            "nbytes": self._nbytes,
            "is_uploading": is_uploading,
        }
        self._worker.log_event(self._topic, event)
