"""Connects to the scheduler of a Dask cluster, or starts a cluster on this machine."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import warnings
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from .._utils.failures import missing_package
from .._utils.thread_pool import count_workers
from ..errors import GptOssStreamError, MachineError, OptionError

try:
    import dask
    import distributed
except ImportError as error:
    raise missing_package(error, "distributed") from None

__all__ = ["CONNECTION_ERRORS", "first_line", "open_client", "scheduler_errors", "scheduler_lost"]

_ADDRESS = re.compile(r"((tcp|tls|wss?|ucx)://)?[\w.-]+:\d+/?|(tcp|tls|ucx)://\[[0-9a-f:]+\]:\d+")
_CONNECT_TIMEOUT = 10.0  # seconds
_SLOW_SCRATCH = "Creating scratch directories"
"""The first words of a warning that Dask gives if its scratch folders are created slowly, as on a
busy disk. This tool keeps nothing in them."""
CONNECTION_ERRORS = (OSError, TimeoutError, RuntimeError, ValueError, CancelledError)
"""What Dask raises when the scheduler is lost; the last one for tasks that it has dropped."""


@contextmanager
def open_client(scheduler: str) -> Iterator[distributed.Client]:
    """Open a client of a scheduler.

    Args:
        scheduler: An address (tcp://host:8786), the file that a scheduler has written, or local:N
            for N worker processes on this machine.

    Yields:
        The client.

    Raises:
        OptionError: For a text that is none of these.
        MachineError: If no scheduler answers.
    """
    for name in [*logging.root.manager.loggerDict]:
        # Errors are reported once, by this tool. tornado is Dask's event loop, which complains when
        # a signal interrupts a call.
        if name.split(".")[0] in ("distributed", "tornado"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    local = re.fullmatch(r"local:(\d+)", scheduler)
    with _local_cluster(int(local[1])) if local else nullcontext() as cluster:
        address = cluster or _reachable_address(scheduler)
        try:
            client = distributed.Client(address, set_as_default=False)
        except (*CONNECTION_ERRORS, TypeError) as error:
            raise _no_answer(scheduler, error) from None
        try:
            yield client
        finally:
            with suppress(*CONNECTION_ERRORS):
                client.close(timeout=2)


def _reachable_address(scheduler: str) -> str:
    """Return the address of a scheduler, after a test connection."""
    address = scheduler
    if not _ADDRESS.fullmatch(scheduler):
        try:
            address = json.loads(Path(scheduler).read_text())["address"]
        except FileNotFoundError:
            raise OptionError(
                f"{scheduler}: no such file; name a scheduler as tcp://host:8786, by the file that "
                "it has written, or local:4 for 4 workers on this machine"
            ) from None
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise OptionError(f"{scheduler}: not a scheduler file ({first_line(error)})") from None
    host, _, port = address.rpartition("://")[2].rstrip("/").rpartition(":")
    try:
        # Before a client is created: one that failed prints another error when it is deleted.
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT).close()
    except (OSError, ValueError) as error:
        raise _no_answer(scheduler, error) from None
    return address


def _no_answer(scheduler: str, error: BaseException) -> MachineError:
    return MachineError(
        f"{scheduler}: no scheduler answers ({first_line(error)}); check the address, and that it "
        "is running"
    )


@contextmanager
def _local_cluster(workers: int) -> Iterator[distributed.LocalCluster]:
    count_workers(workers)  # refuses absurd numbers
    filters = filter(None, [os.environ.get("PYTHONWARNINGS"), f"ignore:{_SLOW_SCRATCH}"])
    settings = {
        # Dask's profiler can deadlock a worker before Python 3.11.9, 3.12.3 (python/cpython#106883)
        "distributed.worker.profile.enabled": False,
        "distributed.nanny.pre-spawn-environ.PYTHONWARNINGS": ",".join(filters),  # for the workers
    }
    with dask.config.set(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", _SLOW_SCRATCH)
        cluster = distributed.LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            dashboard_address="127.0.0.1:0",
            silence_logs=logging.CRITICAL,
        )
    try:
        yield cluster
    finally:
        with suppress(*CONNECTION_ERRORS):
            cluster.close(timeout=5)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type without any."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def scheduler_lost(why: str) -> MachineError:
    """Return the error for a scheduler that is lost."""
    return MachineError(
        f"the scheduler is lost ({why}); run the same command again: finished shards are kept"
    )


@contextmanager
def scheduler_errors() -> Iterator[None]:
    """Turn Dask's errors into a `MachineError` that says that the scheduler is lost."""
    try:
        yield
    except GptOssStreamError:
        raise
    except CONNECTION_ERRORS as error:
        raise scheduler_lost(first_line(error)) from None
