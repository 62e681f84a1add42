"""The workers of a Dask cluster that take part in a conversion."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from .. import __version__
from .._utils.failures import missing_package
from .._utils.thread_pool import count_workers
from ..errors import MachineError, OptionError
from ..storage.open_location import upload_nbytes
from ..writing.executor import memory_nbytes
from .dask_client import first_line, scheduler_errors
from .dask_worker import check_access, installed_version, register_worker
from .task_spec import TaskSpec

try:
    import distributed
except ImportError as error:
    raise missing_package(error, "distributed") from None

__all__ = ["POLL_INTERVAL", "WorkerPool"]

POLL_INTERVAL = 0.1  # seconds
SETUP_TIMEOUT = 20.0  # seconds for the other workers, once one has answered
_DASK_NBYTES = 40_000_000  # of code


class WorkerPool:
    """Registers workers, and refuses those that cannot write a shard.

    Args:
        client: A client of the cluster.
        spec: The conversion.
        threads: Threads that work on a shard; None for one more than a worker has, at most 8.
    """

    def __init__(self, client: distributed.Client, spec: TaskSpec, threads: int | None) -> None:
        self.spec = spec
        """The conversion, with the number of threads once `setup` has returned."""
        self.registered: set[str] = set()
        """The addresses of workers that take part."""
        self._client = client
        self._threads = threads
        self._asked: set[str] = set()
        self._refused: dict[str, str] = {}
        self._has_new = False

    def setup(self, work: Path | None) -> None:
        """Wait for workers and check that they can take part.

        Args:
            work: The run's work folder, which all workers must see, if the output is local.

        Raises:
            OptionError: If a worker cannot take part, or has another version of this tool.
            MachineError: If no worker answers.
        """
        with scheduler_errors():
            self._check_scheduler()
            while not (found := self._client.nthreads()):
                time.sleep(POLL_INTERVAL)
            threads = self._threads or min(*found.values(), 7) + 1
            self.spec = replace(self.spec, threads=count_workers(threads))
            while not self.registered and not self._refused:
                self._register(sorted(self._client.nthreads().keys() - self._asked))
                time.sleep(POLL_INTERVAL)
            deadline = time.monotonic() + SETUP_TIMEOUT
            while self._asked and not self._refused and time.monotonic() < deadline:
                time.sleep(POLL_INTERVAL)  # for the others, but not for workers that hang
            if self._refused:
                raise OptionError("; ".join(self._refused.values()))
            with tempfile.NamedTemporaryFile(dir=work) if work else nullcontext() as file:
                test_file = None if work is None or file is None else Path(file.name)
                self._check_access(sorted(self.registered), test_file)

    def _check_scheduler(self) -> None:
        """Check that the scheduler has the same version of this tool."""
        try:
            version = self._client.run_on_scheduler(installed_version)
        except ImportError as error:
            version = f"that cannot be imported ({first_line(error)})"
        if version != __version__:
            address = self._client.scheduler_info()["address"]
            raise OptionError(
                f"scheduler {address}: it has gptoss_stream {version}, and {__version__} runs the "
                "conversion; install the same version everywhere"
            )

    def _register(self, addresses: Sequence[str]) -> None:
        """Register workers, each in a thread of its own, since one that hangs never answers."""
        self._asked |= {*addresses}
        for address in addresses:
            threading.Thread(target=self._register_one, args=(address,), daemon=True).start()

    def _register_one(self, address: str) -> None:
        is_local = not any("://" in name for name in (self.spec.source, self.spec.output))
        need = (
            memory_nbytes(
                self.spec.threads,
                is_local=is_local,
                upload_nbytes=upload_nbytes(self.spec.output),
                has_adapters=bool(self.spec.options.adapters),
            )
            + _DASK_NBYTES
        )
        try:
            answer = self._client.run(
                register_worker, __version__, need, workers=[address], on_error="return"
            )[address]
        except BaseException as error:  # the worker or this client ends; it may be asked again
            answer = OSError(str(error))
        if answer is None:
            self.registered.add(address)
            self._has_new = True
        elif not isinstance(answer, OSError):
            if isinstance(answer, Exception):
                answer = f"it cannot import gptoss_stream ({first_line(answer)})"
            self._refused[address] = f"worker {address}: {answer}"
        self._asked.discard(address)

    def _check_access(self, addresses: Sequence[str], test_file: Path | None) -> None:
        """Have every worker open source and output."""
        futures = [
            self._client.submit(
                check_access, self.spec, None if test_file is None else str(test_file),
                workers=[address], allow_other_workers=False, pure=False,
            )
            for address in addresses
        ]  # fmt: skip
        deadline = time.monotonic() + SETUP_TIMEOUT
        while (states := {f.status for f in futures}) >= {"pending"} and "error" not in states:
            if "finished" in states and time.monotonic() > deadline:
                break  # the others are busy with something else, or hang
            time.sleep(POLL_INTERVAL)
        failed = [f.exception() for f in futures if f.status == "error"]
        errors = [e for e in failed if not isinstance(e, distributed.scheduler.KilledWorker)]
        if errors:
            raise errors[0]
        if not any(f.status == "finished" for f in futures):
            raise MachineError("no worker answers; look at what the workers have printed")

    def refresh(self) -> bool:
        """Register workers that have joined, and forget those that have left.

        Returns:
            Whether a worker was registered since the last call.

        Raises:
            OptionError: If no worker is left that can take part.
        """
        found = set(self._client.nthreads())
        self.registered &= found
        if new := found - self.registered - self._refused.keys() - self._asked:
            self._register(sorted(new))
        has_new, self._has_new = self._has_new, False
        if found and not self.registered and self._refused.keys() >= found:
            raise OptionError("; ".join(self._refused[address] for address in sorted(found)))
        return has_new
