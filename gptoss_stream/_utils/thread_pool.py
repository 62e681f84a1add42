"""Threads that take tasks in order and do them, each with a buffer of its own."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np

from ..errors import OptionError
from .buffers import aligned_buffer

__all__ = ["Buffer", "Step", "count_workers", "run_steps"]


_MOST = 256


Buffer: TypeAlias = np.ndarray[Any, Any]


Step: TypeAlias = Callable[[Buffer], None]


def count_workers(workers: int | None) -> int:
    """The number of threads: as asked, or one more than there are processors, at most 8, since one
    of them is always waiting for the disk. Raises `OptionError` for none or absurdly many."""
    if workers is None:
        affinity = getattr(os, "sched_getaffinity", None)
        processors = len(affinity(0)) if affinity else os.cpu_count() or 1
        return min(processors + 1, 8)
    if not 1 <= workers <= _MOST:
        raise OptionError(f"{workers} workers: there must be 1 to {_MOST}")
    return workers


def run_steps(
    tasks: Iterator[Step], workers: int, buffer_nbytes: int, stop: threading.Event
) -> None:
    """Do all tasks, which are taken in order, with a page-aligned buffer of `buffer_nbytes` for
    each thread.

    The first error ends the others after the task they are at, and is raised; so does an
    exception in the calling thread, such as `KeyboardInterrupt`. `stop` is set by then.
    """
    taking = threading.Lock()
    errors: list[BaseException] = []

    def work(end: threading.Event) -> None:
        try:
            buffer = aligned_buffer(buffer_nbytes)
            while not stop.is_set():
                with taking:
                    task = next(tasks, None)
                if task is None:
                    return
                task(buffer)
        except BaseException as error:
            errors.append(error)
            stop.set()
        finally:
            end.set()

    # Not Thread.join: one that a signal interrupts takes its thread for dead, before Python 3.13.
    ends: list[threading.Event] = []
    try:
        for _ in range(workers):
            end = threading.Event()
            threading.Thread(target=work, args=(end,), daemon=True).start()
            ends.append(end)
        for end in ends:
            while not end.wait(0.1):  # in short waits, so that signals are handled meanwhile
                pass
    finally:
        stop.set()
        for end in ends:
            end.wait()
    if errors:
        raise errors[0]
