"""Threads that take steps in order and run them, each with its own buffer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np

from ..errors import OptionError
from .arguments import whole_number
from .buffers import aligned_buffer
from .parallel import num_processors

__all__ = ["Buffer", "Step", "count_workers", "run_steps"]

_MAX_WORKERS = 256

Buffer: TypeAlias = np.ndarray[Any, Any]
Step: TypeAlias = Callable[[Buffer], None]
"""A piece of work, called with the buffer of the thread that runs it."""


def count_workers(workers: int | None) -> int:
    """Return the number of threads to use, checked.

    Args:
        workers: The number that the user gave. None means one more than there are processors,
            since one thread is usually waiting for the disk, and at most 8.

    Raises:
        OptionError: If the number is less than 1 or absurdly large.
    """
    if workers is None:
        return min(num_processors() + 1, 8)
    number = whole_number(workers, "workers")
    if not 1 <= number <= _MAX_WORKERS:
        raise OptionError(f"{number} workers: there must be 1 to {_MAX_WORKERS}")
    return number


def run_steps(
    steps: Iterator[Step], workers: int, buffer_nbytes: int, stop: threading.Event
) -> None:
    """Run all steps in threads.

    The first error stops the other threads after their current step, and is raised. An exception
    in the calling thread, such as `KeyboardInterrupt`, does the same.

    Args:
        steps: The steps, which threads take in order.
        workers: The number of threads.
        buffer_nbytes: The size of each thread's page-aligned buffer.
        stop: Stops the threads when it is set. It is always set on return.
    """
    taking = threading.Lock()
    errors: list[BaseException] = []

    def work(finished: threading.Event) -> None:
        try:
            buffer = aligned_buffer(buffer_nbytes)
            while not stop.is_set():
                with taking:
                    step = next(steps, None)
                if step is None:
                    return
                step(buffer)
        except BaseException as error:
            errors.append(error)
            stop.set()
        finally:
            finished.set()

    # Not Thread.join: if a signal interrupts it, Python before 3.13 considers the thread finished.
    threads_finished: list[threading.Event] = []
    try:
        for _ in range(workers):
            finished = threading.Event()
            threading.Thread(target=work, args=(finished,), daemon=True).start()
            threads_finished.append(finished)
        for finished in threads_finished:
            while not finished.wait(0.1):  # short waits, so that signals are handled in between
                pass
    finally:
        stop.set()
        for finished in threads_finished:
            finished.wait()
    if errors:
        raise errors[0]
