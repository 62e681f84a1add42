"""Reading a checkpoint that is far away: each block once, ahead of its use, in bounded memory.

The blocks (`blocks`) are fetched in the order in which they are needed, several at a time, as long
as there is room; what is needed at once is fetched even where there is none. Memory is thus the
room, or what the plan needs at the same time where that is more.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import TYPE_CHECKING, Any

from ..storage.location import NEVER
from .metadata import CheckpointInfo, RawTensor
from .read_ahead import FETCH_NBYTES, FetchBlock, plan_fetches
from .reader import OpenFiles, ReadSchedule

if TYPE_CHECKING:
    import numpy as np

__all__ = ["ROOM_NBYTES", "RemoteReader"]


ROOM_NBYTES = 64 << 20


_REQUESTS = 4  # at a time


_TICK = 0.1  # seconds: how soon a stop is seen


class _StoppedError(Exception):
    """The run is over, by an error or a signal that somebody else tells of."""


class _Fetch:
    """A block on its way to memory, there, or given up again."""

    def __init__(self, block: FetchBlock) -> None:
        self.block = block
        self.first = block.first
        self.left = len(block.steps)
        self.is_there = threading.Event()
        self.memory: np.ndarray[Any, Any] | None = None


class RemoteReader:
    """A described checkpoint that is far away, for reading by a schedule from any thread.

    A context manager, and a `operands.Reader`. Raises `CheckpointError` where a file is no longer
    what was described, `MachineError` where reading fails.
    """

    def __init__(
        self,
        info: CheckpointInfo,
        room_nbytes: int = ROOM_NBYTES,
        block_nbytes: int = FETCH_NBYTES,
    ) -> None:
        self.info = info
        self._files = OpenFiles(info)
        self._room = room_nbytes
        self._block_nbytes = block_nbytes
        self._stop = NEVER
        self._order: list[_Fetch] = []
        self._next = 0
        self._held = 0
        self._begun = -1
        self._turn = threading.Condition()
        self._error: BaseException | None = None
        self._by_step: dict[int, list[_Fetch]] = {}
        self._by_shard: dict[str, tuple[list[int], list[_Fetch]]] = {}
        self._ends: list[threading.Event] = []

    def __enter__(self) -> RemoteReader:
        return self

    def __exit__(self, *exception: object) -> None:
        # A request that waits for its server is left behind, and its file with it.
        if all(end.wait(1) for end in self._ends):
            self._files.close()

    def set_schedule(self, schedule: ReadSchedule, stop: threading.Event) -> None:
        """Told before reading what each step will read; fetching begins."""
        self._stop = stop
        self._order = [_Fetch(block) for block in plan_fetches(schedule, self._block_nbytes)]
        for fetched in self._order:
            for step in fetched.block.steps:
                self._by_step.setdefault(step, []).append(fetched)
            self._by_shard.setdefault(fetched.block.shard, ([], []))[1].append(fetched)
            fetched.block.steps.clear()  # counted and filed by now
        for begins, shard in self._by_shard.values():
            shard.sort(key=lambda fetched: fetched.block.begin)
            begins += [fetched.block.begin for fetched in shard]
        self.info.location.prepare(sorted(self._by_shard))
        for _ in range(min(_REQUESTS, len(self._order))):
            end = threading.Event()
            self._ends.append(end)
            threading.Thread(target=self._fetch_all, args=(end,), daemon=True).start()

    def begin_step(self, step: int) -> None:
        """What this step reads is fetched now, room or not."""
        with self._turn:
            self._begun = max(self._begun, step)
            self._turn.notify_all()

    def end_step(self, step: int) -> None:
        """Give up the blocks that no other step reads."""
        with self._turn:
            for fetched in self._by_step.pop(step, ()):
                fetched.left -= 1
                if fetched.left == 0:
                    fetched.memory = None
                    self._held -= fetched.block.nbytes
            self._turn.notify_all()

    @contextmanager
    def read(
        self, tensor: RawTensor, first: int, shape: tuple[int, ...]
    ) -> Iterator[np.ndarray[Any, Any]]:
        """`prod(shape)` elements of a tensor from element `first` on, as an array of that shape.

        BF16 comes as its bits (uint16). The array is only good until the step ends.
        """
        import numpy as np

        from ..tensors.cast import STORAGE

        begin = tensor.offset + first * tensor.dtype.itemsize
        end = begin + prod(shape) * tensor.dtype.itemsize
        parts = list(self._parts(tensor.shard, begin, end))
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
        yield whole.view(STORAGE[tensor.dtype]).reshape(shape)

    def _parts(self, shard: str, begin: int, end: int) -> Iterator[np.ndarray[Any, Any]]:
        """The memory that holds some bytes of a shard."""
        begins, blocks = self._by_shard[shard]
        while begin < end:
            fetched = blocks[bisect_right(begins, begin) - 1]
            block = fetched.block
            while not fetched.is_there.wait(_TICK):
                if self._error is not None:
                    raise self._error
                if self._stop.is_set():
                    raise _StoppedError
            memory, until = fetched.memory, min(end, block.end)
            if memory is None or not block.begin <= begin < until:
                raise RuntimeError(f"{shard}: bytes {begin} to {end} are not in the schedule")
            yield memory[begin - block.begin : until - block.begin]
            begin = until

    def _fetch_all(self, end: threading.Event) -> None:
        try:
            while (fetched := self._take()) is not None:
                memory = _anonymous(fetched.block.nbytes)
                file = self._files.file(fetched.block.shard)
                file.read_into(memory.data, fetched.block.begin, self._stop)
                fetched.memory = memory
                fetched.is_there.set()
        except BaseException as error:
            self._error = self._error or error
        finally:
            end.set()

    def _take(self) -> _Fetch | None:
        """The next block to fetch, when its time has come."""
        with self._turn:
            while not self._stop.is_set() and self._error is None and self._next < len(self._order):
                fetched = self._order[self._next]
                needed = fetched.first <= self._begun
                if needed or self._held + fetched.block.nbytes <= self._room:
                    self._next += 1
                    self._held += fetched.block.nbytes
                    return fetched
                self._turn.wait(_TICK)
        return None

    def check_unchanged(self) -> None:
        """Raise `CheckpointError` if a file is no longer what was described."""
        self._files.check_unchanged()


def _anonymous(nbytes: int) -> np.ndarray[Any, Any]:
    """Memory that goes back to the system when it is given up."""
    from .._utils.buffers import aligned_buffer

    return aligned_buffer(nbytes)[:nbytes]
