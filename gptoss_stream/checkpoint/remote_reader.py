"""Reads the tensor data of a remote checkpoint by a schedule: each block once, in bounded memory.

The blocks (`read_ahead`) are fetched before they are needed, in the order in which they are needed,
several at a time, as long as the memory budget allows. A block that is needed now is fetched even
if it exceeds the budget. The reader thus uses the budget, or more only where the schedule needs
more at the same time.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import TYPE_CHECKING, Any

from .._utils.buffers import releasable_memory
from ..storage.location import NEVER_STOP
from ..tensors.raw_tensor import RawTensor
from .metadata import CheckpointInfo
from .open_files import OpenFiles
from .read_ahead import FETCH_NBYTES, FetchBlock, plan_fetches
from .reader import ReadSchedule, StoppedError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["BUDGET_NBYTES", "RemoteReader"]

BUDGET_NBYTES = 64 << 20
"""Memory for blocks by default, in bytes."""
_MAX_REQUESTS = 4  # at the same time
_POLL_SECONDS = 0.1  # how often waiting threads look at the stop event


class _Fetch:
    """The state of a block: not fetched yet, in memory, or dropped."""

    def __init__(self, block: FetchBlock) -> None:
        self.block = block
        self.first = block.first
        self.steps_left = len(block.steps)
        self.has_arrived = threading.Event()
        self.memory: np.ndarray[Any, Any] | None = None


class RemoteReader:
    """A `Reader` of a remote checkpoint, from any thread; a context manager.

    Methods raise `CheckpointError` if a file has changed since its header was read, and
    `MachineError` if reading fails.

    Args:
        info: The checkpoint.
        budget_nbytes: Memory for blocks, in bytes.
        block_nbytes: The most bytes of a block.
    """

    def __init__(
        self,
        info: CheckpointInfo,
        budget_nbytes: int = BUDGET_NBYTES,
        block_nbytes: int = FETCH_NBYTES,
    ) -> None:
        self.info = info
        self._files = OpenFiles(info)
        self._budget_nbytes = budget_nbytes
        self._block_nbytes = block_nbytes
        self._stop = NEVER_STOP
        self._fetches: list[_Fetch] = []
        self._position = 0
        self._used_nbytes = 0
        self._step = -1
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._by_step: dict[int, list[_Fetch]] = {}
        self._by_shard: dict[str, tuple[list[int], list[_Fetch]]] = {}
        self._threads_finished: list[threading.Event] = []

    def __enter__(self) -> RemoteReader:
        return self

    def __exit__(self, *exception: object) -> None:
        # A request that waits for its server is abandoned, together with its file.
        if all(finished.wait(1) for finished in self._threads_finished):
            self._files.close()

    def set_schedule(self, schedule: ReadSchedule, stop: threading.Event) -> None:
        """Plan all fetches and start to fetch (see `Reader.set_schedule`)."""
        self._stop = stop
        for block in plan_fetches(schedule, self._block_nbytes):
            fetch = _Fetch(block)
            self._fetches.append(fetch)
            for step in block.steps:
                self._by_step.setdefault(step, []).append(fetch)
            self._by_shard.setdefault(block.shard, ([], []))[1].append(fetch)
            block.steps.clear()  # no longer needed
        for begins, fetches in self._by_shard.values():
            fetches.sort(key=lambda fetch: fetch.block.begin)
            begins += [fetch.block.begin for fetch in fetches]
        self.info.location.download(sorted(self._by_shard))
        for _ in range(min(_MAX_REQUESTS, len(self._fetches))):
            finished = threading.Event()
            self._threads_finished.append(finished)
            threading.Thread(target=self._fetch_all, args=(finished,), daemon=True).start()

    def begin_step(self, step: int) -> None:
        """Fetch what this step reads now, even beyond the budget."""
        with self._changed:
            self._step = max(self._step, step)
            self._changed.notify_all()

    def end_step(self, step: int) -> None:
        """Drop the blocks that no other step reads."""
        with self._changed:
            for fetch in self._by_step.pop(step, ()):
                fetch.steps_left -= 1
                if fetch.steps_left == 0:
                    fetch.memory = None
                    self._used_nbytes -= fetch.block.nbytes
            self._changed.notify_all()

    @contextmanager
    def read(
        self, tensor: RawTensor, first: int, shape: tuple[int, ...]
    ) -> Iterator[np.ndarray[Any, Any]]:
        """Read elements of a tensor (see `Reader.read`); the array is valid until the step ends."""
        import numpy as np

        from ..tensors.cast import STORAGE

        begin = tensor.offset + first * tensor.dtype.itemsize
        end = begin + prod(shape) * tensor.dtype.itemsize
        ranges = list(self._wait_for(tensor.shard, begin, end))
        whole = ranges[0] if len(ranges) == 1 else np.concatenate(ranges)
        array = whole.view(STORAGE[tensor.dtype]).reshape(shape)
        array.flags.writeable = False
        yield array

    def _wait_for(self, shard: str, begin: int, end: int) -> Iterator[np.ndarray[Any, Any]]:
        """Yield the memory of bytes `begin` to `end` of a shard; wait for their blocks."""
        begins, fetches = self._by_shard[shard]
        while begin < end:
            fetch = fetches[bisect_right(begins, begin) - 1]
            block = fetch.block
            while not fetch.has_arrived.wait(_POLL_SECONDS):
                if self._error is not None:
                    raise self._error
                if self._stop.is_set():
                    raise StoppedError
            memory, until = fetch.memory, min(end, block.end)
            if memory is None or not block.begin <= begin < until:
                raise RuntimeError(f"{shard}: bytes {begin} to {end} are not in the schedule")
            yield memory[begin - block.begin : until - block.begin]
            begin = until

    def _fetch_all(self, finished: threading.Event) -> None:
        """Fetch one block after another; run by each of the threads."""
        try:
            while (fetch := self._next_fetch()) is not None:
                memory = releasable_memory(fetch.block.nbytes)
                file = self._files.file(fetch.block.shard)
                file.read_into(memory.data, fetch.block.begin, self._stop)
                fetch.memory = memory
                fetch.has_arrived.set()
        except BaseException as error:
            self._error = self._error or error
        finally:
            finished.set()

    def _next_fetch(self) -> _Fetch | None:
        """Wait until the next block may be fetched, and return it; None after the last."""
        with self._changed:
            while (
                not self._stop.is_set()
                and self._error is None
                and self._position < len(self._fetches)
            ):
                fetch = self._fetches[self._position]
                is_needed_now = fetch.first <= self._step
                if is_needed_now or self._used_nbytes + fetch.block.nbytes <= self._budget_nbytes:
                    self._position += 1
                    self._used_nbytes += fetch.block.nbytes
                    return fetch
                self._changed.wait(_POLL_SECONDS)
        return None

    def check_unchanged(self) -> None:
        """Check that no file has changed since it was opened (see `Reader.check_unchanged`)."""
        self._files.check_unchanged()
