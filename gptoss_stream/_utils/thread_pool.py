"""Threads that take steps in order and run them, each with a buffer.

A step can leave something to be done with its buffer, such as writing it. A few further threads do
that, so that the others go on with the next step.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any, TypeAlias

import numpy as np

from ..errors import OptionError
from .arguments import whole_number
from .buffers import aligned_buffer
from .parallel import num_processors

__all__ = ["Buffer", "Rest", "Step", "count_workers", "run_steps"]

_MAX_WORKERS = 256

Buffer: TypeAlias = np.ndarray[Any, Any]
Rest: TypeAlias = Callable[[], None]
"""What is left to do with a buffer."""
Step: TypeAlias = "Callable[[Buffer], Rest | None]"
"""A piece of work, called with a buffer of its own until what it returns is done."""


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
    steps: Iterator[Step],
    workers: int,
    buffer_nbytes: int,
    stop: threading.Event,
    finishers: int = 0,
) -> None:
    """Run all steps in threads.

    The first error stops the other threads after what they are doing, and is raised. An exception
    in the calling thread, such as `KeyboardInterrupt`, does the same.

    Args:
        steps: The steps, which threads take in order.
        workers: The number of threads that take steps.
        buffer_nbytes: The size of a page-aligned buffer; there is one for each thread.
        stop: Stops the threads when it is set. It is always set on return.
        finishers: The number of threads that do what steps leave to do. If all of them are busy,
            the thread that ran the step does it itself.
    """
    pool = _Pool(steps, workers + finishers, buffer_nbytes, stop, finishers)
    # Not Thread.join: if a signal interrupts it, Python before 3.13 considers the thread finished.
    working: list[threading.Event] = []
    finishing: list[threading.Event] = []
    try:
        for _ in range(workers):
            pool.start(pool.take_steps, working)
        for _ in range(finishers):
            pool.start(pool.finish_steps, finishing)
        _wait(working)
        pool.end_finishers()
        _wait(finishing)
    finally:
        stop.set()
        for finished in working:
            finished.wait()
        pool.end_finishers()
        for finished in finishing:
            finished.wait()
    if pool.errors:
        raise pool.errors[0]


def _wait(threads: list[threading.Event]) -> None:
    """Wait for threads that have finished when their events are set."""
    for finished in threads:
        while not finished.wait(0.1):  # short waits, so that signals are handled in between
            pass


class _Pool:
    """What the threads of `run_steps` share.

    Each thread has at most one buffer at a time, so that one is free whenever a thread needs it.
    """

    def __init__(
        self,
        steps: Iterator[Step],
        buffers: int,
        buffer_nbytes: int,
        stop: threading.Event,
        finishers: int,
    ) -> None:
        self.errors: list[BaseException] = []
        self._steps = steps
        self._taking = threading.Lock()
        self._stop = stop
        self._buffers: SimpleQueue[Buffer] = SimpleQueue()
        for _ in range(buffers):
            self._buffers.put(aligned_buffer(buffer_nbytes))
        self._rests: SimpleQueue[tuple[Rest, Buffer] | None] = SimpleQueue()
        self._finishers = finishers
        self._idle_finishers = threading.Semaphore(finishers)

    def start(self, work: Callable[[], None], threads: list[threading.Event]) -> None:
        """Start a thread, and add an event that is set when it has finished."""
        finished = threading.Event()

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self.errors.append(error)
                self._stop.set()
            finally:
                finished.set()

        threading.Thread(target=run, daemon=True).start()
        threads.append(finished)

    def take_steps(self) -> None:
        """Run steps until there are no more."""
        while not self._stop.is_set():
            with self._taking:
                step = next(self._steps, None)
            if step is None:
                return
            buffer = self._buffers.get()
            rest = step(buffer)
            if rest is not None and self._idle_finishers.acquire(blocking=False):
                self._rests.put((rest, buffer))
                continue
            if rest is not None:
                rest()
            self._buffers.put(buffer)

    def finish_steps(self) -> None:
        """Do what is left of steps, until `end_finishers`."""
        while (item := self._rests.get()) is not None:
            rest, buffer = item
            if not self._stop.is_set():
                rest()
            self._buffers.put(buffer)
            self._idle_finishers.release()

    def end_finishers(self) -> None:
        """End the threads that run `finish_steps` when they have done what is there."""
        for _ in range(self._finishers):
            self._rests.put(None)
