"""Runs short pieces of work in threads that stay."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

__all__ = ["num_processors", "run_parallel"]

_executor: ThreadPoolExecutor | None = None


def num_processors() -> int:
    """Return the number of processors that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def run_parallel(calls: Sequence[Callable[[], None]]) -> None:
    """Run calls at the same time, the first of them in this thread, and wait for all.

    Args:
        calls: What to run. No call may use this function itself.

    Raises:
        BaseException: The first exception that a call raised.
    """
    if not calls:
        return
    others: list[Future[None]] = []
    if len(calls) > 1:
        executor = _started()
        others = [executor.submit(call) for call in calls[1:]]
    try:
        calls[0]()
    finally:
        wait(others)  # they write to memory of the caller
    for other in others:
        other.result()


def _started() -> ThreadPoolExecutor:
    """Return the threads of this process, one less than it has processors."""
    global _executor
    if _executor is None:
        _executor = ThreadPoolExecutor(max(1, num_processors() - 1), "gptoss_stream")
    return _executor


def _forget_threads() -> None:
    """Forget the threads of the parent process, which a child does not have."""
    global _executor
    _executor = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)
