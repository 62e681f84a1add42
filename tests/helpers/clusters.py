"""Real Dask schedulers and workers, as processes on the loopback interface."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import distributed
from runs import ROOT, convert_command, run

SIZE = "300KB"
SHORT_TIMEOUTS = {
    "DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "5s",
    "DASK_DISTRIBUTED__COMM__RETRY__COUNT": "0",
}


def _die_with_the_tests() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class Cluster:
    """A scheduler, and workers that can be added and ended."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder = folder
        self.file = folder / "scheduler.json"
        self._processes: list[subprocess.Popen[bytes]] = []
        command = ["scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard"]
        command += ["--scheduler-file", str(self.file)]
        self.scheduler = self._start(command, **environment)
        deadline = time.monotonic() + 30
        while not self.file.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        self.client = distributed.Client(scheduler_file=str(self.file), set_as_default=False)
        self.address = self.client.scheduler.address

    def _start(
        self, arguments: Sequence[str], prefix: Sequence[str] = (), **environment: str
    ) -> subprocess.Popen[bytes]:
        with open(self.folder / f"log-{len(self._processes)}", "wb") as log:
            process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "dask", *arguments],
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env={**os.environ, "PYTHONPATH": str(ROOT), **SHORT_TIMEOUTS, **environment},
                start_new_session=True,
                preexec_fn=_die_with_the_tests,
            )
        self._processes.append(process)
        return process

    def add(
        self, workers: int = 1, *options: str, prefix: Sequence[str] = (), **environment: str
    ) -> subprocess.Popen[bytes]:
        """Start worker processes with a nanny, which restarts them, and wait for them."""
        before = len(self.client.nthreads())
        command = ["worker", self.address, "--nworkers", str(workers), "--nthreads", "1"]
        local = ["--local-directory", str(self.folder / f"worker-{len(self._processes)}")]
        process = self._start([*command, *local, "--no-dashboard", *options], prefix, **environment)
        self.wait_for(before + workers)
        return process

    def wait_for(self, workers: int) -> None:
        """Wait until the scheduler has this number of workers."""
        deadline = time.monotonic() + 60
        while len(self.client.nthreads()) != workers:
            assert time.monotonic() < deadline, "the workers have not started, or have not ended"
            time.sleep(0.02)

    def pids(self) -> dict[str, int]:
        """Return the process ids of the workers, by address."""
        found = self.client.run(os.getpid, on_error="return")
        return {address: pid for address, pid in found.items() if isinstance(pid, int)}

    def end(self, process: subprocess.Popen[bytes]) -> None:
        """End a process that this cluster started, and its child processes."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
                break
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    def close(self) -> None:
        """End all workers and the scheduler."""
        with suppress(Exception):
            self.client.close(timeout=2)
        for process in reversed(self._processes):
            self.end(process)


@contextmanager
def cluster(folder: Path, workers: int = 0, *options: str, **environment: str) -> Iterator[Cluster]:
    """Start a cluster, and end it with the block."""
    folder.mkdir(parents=True, exist_ok=True)
    running = Cluster(folder, **environment)
    try:
        if workers:
            running.add(workers, *options)
        yield running
    finally:
        running.close()


def convert_on(address: object, source: Path, output: object, *options: str):
    """Convert on the workers of a scheduler, with the command line."""
    command = convert_command(source, output, "--checksums", "--scheduler", str(address), *options)
    return run(command)


def assert_done(done: subprocess.CompletedProcess[str]) -> None:
    assert (done.returncode, done.stderr) == (0, "")
