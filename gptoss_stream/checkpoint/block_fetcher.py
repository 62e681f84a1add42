"""Fetches blocks of remote files when they are wanted, and keeps those that were used last.

Neighbouring blocks that are missing are fetched together, and blocks that are about to be read can
be prefetched: then few requests are needed.
Threads are started when there is something to fetch, and end when there is nothing more.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from itertools import pairwise
from typing import TypeAlias

from ..errors import MachineError
from ..storage.block_cache import BlockCache
from .block_source import Block, BlockSource
from .metadata import CheckpointInfo
from .read_ahead import FETCH_NBYTES

__all__ = ["BlockFetcher"]

_MAX_REQUESTS = 4  # at the same time
_CLOSING_SECONDS = 1.0

_Key: TypeAlias = "tuple[str, int]"  # a shard, and the number of a block in it


class _Fetch:
    """Neighbouring blocks of a shard that are fetched together, and what has become of it."""

    def __init__(self, shard: str, numbers: range, nbytes: int, is_prefetch: bool) -> None:
        self.shard = shard
        self.numbers = numbers
        self.keys = [(shard, number) for number in numbers]
        self.nbytes = nbytes
        self.is_prefetch = is_prefetch
        self.is_urgent = False
        """Whether a prefetch is needed now."""
        self.has_ended = threading.Event()
        self.blocks: Mapping[int, Block] = {}
        self.error: BaseException | None = None


class BlockFetcher:
    """Blocks of a checkpoint's shards, from any thread of one process.

    The memory holds blocks that have been read, blocks that have been prefetched, and those that
    are being fetched. Prefetching leaves a quarter of it for the first kind, since a block is
    usually read in several pieces. Beyond that quarter, those that were read least recently are
    dropped, and then the prefetched blocks that are needed last.

    Args:
        info: The checkpoint.
        budget_nbytes: Memory for blocks. What is needed now is fetched even if it takes more.
        block_nbytes: The size of a block.
        cache: Blocks on disk, if there is such a cache.
    """

    def __init__(
        self, info: CheckpointInfo, budget_nbytes: int, block_nbytes: int, cache: BlockCache | None
    ) -> None:
        self._info = info
        self._cache = cache
        self._budget_nbytes = budget_nbytes
        self._block_nbytes = block_nbytes
        self._max_blocks = max(1, min(FETCH_NBYTES, budget_nbytes // 4) // block_nbytes)
        self.begin_again()

    def begin_again(self) -> None:
        """Forget all blocks, files, threads and locks: a forked child must not use its parent's."""
        self._source = BlockSource(self._info, self._block_nbytes, self._cache)
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread_ended = threading.Condition(self._lock)
        # All that follows is changed with the lock only.
        self._read: OrderedDict[_Key, Block] = OrderedDict()
        self._unread: OrderedDict[_Key, Block] = OrderedDict()
        self._fetches: dict[_Key, _Fetch] = {}  # those that have not ended
        self._urgent: deque[_Fetch] = deque()
        self._ahead: deque[_Fetch] = deque()
        self._running: set[_Fetch] = set()
        self._num_threads = 0

    def close(self) -> None:
        """End all reads with an error, and wait for a second at most for requests.

        A request that waits for its server longer is abandoned, together with its file.
        """
        self._stop.set()
        with self._lock:
            for fetch in {*self._fetches.values()}:
                self._end(fetch, MachineError(f"{self._info.location}: closed while it was read"))
            self._urgent.clear()
            self._ahead.clear()
            if self._thread_ended.wait_for(lambda: not self._num_threads, _CLOSING_SECONDS):
                self._source.close()
            self._read.clear()
            self._unread.clear()

    def check_unchanged(self) -> None:
        """Check that no file has changed since it was opened (see `Reader.check_unchanged`)."""
        self._source.check_unchanged()

    # --- what callers want ---------------------------------------------------------------------

    def read_into(self, out: memoryview, shard: str, begin: int) -> None:
        """Fill memory with bytes of a shard, from byte `begin` on.

        Raises:
            CheckpointError: If the file has changed since its header was read.
            MachineError: If reading fails.
        """
        end, size = begin + len(out), self._block_nbytes
        numbers = self._numbers(begin, len(out))
        with self.prefetch([(shard, begin, len(out))] if len(numbers) > self._max_blocks else []):
            for first in range(numbers.start, numbers.stop, self._max_blocks):
                wanted = range(first, min(first + self._max_blocks, numbers.stop))
                for number, memory in self._wait_for(shard, wanted):
                    low, high = max(begin, number * size), min(end, (number + 1) * size)
                    piece = memory[low - number * size : high - number * size]
                    out[low - begin : high - begin] = piece.data

    def prefetch(self, ranges: Iterable[tuple[str, int, int]]) -> AbstractContextManager[object]:
        """Begin to fetch what will be read soon.

        Args:
            ranges: Shards, first bytes and numbers of bytes, in the order in which they are read.

        Returns:
            A context manager, at whose end what has not been fetched yet is given up. It need not
            be used as one.
        """
        keys: dict[_Key, None] = {}  # in order, each once
        for shard, begin, nbytes in ranges:
            keys |= dict.fromkeys((shard, number) for number in self._numbers(begin, nbytes))
        with self._lock:
            fetches = self._begin_fetches(keys, self._ahead)
            self._start_threads()
        stack, begun = ExitStack(), [key for fetch in fetches for key in fetch.keys]
        # Weakly: a fetch that has ended would keep the memory of its blocks.
        stack.callback(self._give_up, begun, weakref.WeakSet(fetches))
        return stack

    def _numbers(self, begin: int, nbytes: int) -> range:
        """Return the numbers of the blocks that hold some bytes."""
        size = self._block_nbytes
        return range(begin // size, -(-(begin + nbytes) // size) if nbytes else begin // size)

    def _give_up(self, keys: list[_Key], fetches: weakref.WeakSet[_Fetch]) -> None:
        """End a prefetch: drop fetches that have not begun, and count its blocks as read."""
        with self._lock:
            for fetch in fetches:
                fetch.is_prefetch = False
                if fetch in self._ahead:
                    self._ahead.remove(fetch)
                    self._forget(fetch)
            for key in keys:
                self._touch(key)
            self._start_threads()

    def _wait_for(self, shard: str, numbers: range) -> Iterator[tuple[int, Block]]:
        """Yield some blocks of a shard with their numbers; fetch those that are missing."""
        keys = [(shard, number) for number in numbers]
        with self._lock:
            if self._stop.is_set():
                raise MachineError(f"{self._info.location}: closed; open it again")
            found = {key: memory for key in keys if (memory := self._touch(key)) is not None}
            self._begin_fetches([key for key in keys if key not in found], self._urgent)
            pending = {key: self._fetches[key] for key in keys if key not in found}
            for fetch in pending.values():
                if fetch in self._ahead:  # needed now
                    self._ahead.remove(fetch)
                    self._urgent.append(fetch)
                    fetch.is_urgent = True
            self._start_threads()
        for key in keys:
            if key in found:
                yield key[1], found.pop(key)
                continue
            fetch = pending.pop(key)
            fetch.has_ended.wait()
            if fetch.error is not None:
                raise fetch.error
            with self._lock:
                self._touch(key)
                self._start_threads()  # there may be room to prefetch more
            yield key[1], fetch.blocks[key[1]]

    def _touch(self, key: _Key) -> Block | None:
        """Return a block that is in memory, which then is the one that was read last."""
        memory = self._unread.pop(key, None)
        if memory is None:
            memory = self._read.pop(key, None)
        if memory is not None:
            self._read[key] = memory
        return memory

    # --- what is fetched -----------------------------------------------------------------------

    def _begin_fetches(self, keys: Iterable[_Key], queue: deque[_Fetch]) -> list[_Fetch]:
        """Queue fetches of missing blocks, neighbours together, in the order of the keys."""
        turns = {key: turn for turn, key in enumerate(keys) if self._is_missing(key)}
        ordered, cuts = sorted(turns), [0]
        for i, ((shard, number), (next_shard, next_number)) in enumerate(pairwise(ordered), 1):
            is_next = (shard, number + 1) == (next_shard, next_number)
            if not is_next or i - cuts[-1] == self._max_blocks:
                cuts.append(i)
        groups = [ordered[low:high] for low, high in pairwise([*cuts, len(ordered)])]
        fetches = []
        for group in sorted(filter(None, groups), key=lambda group: min(turns[k] for k in group)):
            shard, numbers = group[0][0], range(group[0][1], group[-1][1] + 1)
            nbytes = self._source.nbytes(shard, numbers)
            fetch = _Fetch(shard, numbers, nbytes, queue is self._ahead)
            self._fetches |= dict.fromkeys(group, fetch)
            fetches.append(fetch)
        queue += fetches
        return fetches

    def _is_missing(self, key: _Key) -> bool:
        """Return whether a block is neither in memory nor going to be fetched."""
        return not (key in self._read or key in self._unread or key in self._fetches)

    def _start_threads(self) -> None:
        """Start as many threads as there is something to fetch for."""
        while self._num_threads < _MAX_REQUESTS and (fetch := self._next_fetch()) is not None:
            self._num_threads += 1
            try:
                threading.Thread(target=self._fetch_all, args=(fetch,), daemon=True).start()
            except RuntimeError as error:  # too many threads, or the interpreter is ending
                self._num_threads -= 1
                self._running.remove(fetch)
                self._end(fetch, MachineError(f"reading {self._info.location}: {error}"))

    def _next_fetch(self) -> _Fetch | None:
        """Take the next fetch for which there is memory, or None."""
        if self._stop.is_set() or not (self._urgent or self._ahead):
            return None
        used = sum(fetch.nbytes for fetch in self._running)
        if self._urgent:
            queue, most = self._urgent, self._budget_nbytes if used else None
        else:
            used += sum(block.nbytes for block in self._unread.values())
            queue, most = self._ahead, self._budget_nbytes - self._budget_nbytes // 4
        if most is not None and used + queue[0].nbytes > most:
            return None
        fetch = queue.popleft()
        self._running.add(fetch)
        self._make_room()
        return fetch

    def _make_room(self) -> None:
        """Drop blocks from memory until it is within its budget."""
        read, unread = (sum(b.nbytes for b in kept.values()) for kept in (self._read, self._unread))
        running = sum(fetch.nbytes for fetch in self._running)
        while read + unread + running > self._budget_nbytes and read + unread:
            if unread and read <= self._budget_nbytes // 4:
                unread -= self._unread.popitem()[1].nbytes
            else:
                read -= self._read.popitem(last=False)[1].nbytes

    def _forget(self, fetch: _Fetch) -> None:
        """Let the next read of its blocks begin another fetch."""
        for key in fetch.keys:
            self._fetches.pop(key, None)  # a closed reader has already forgotten it

    def _end(
        self, fetch: _Fetch, error: BaseException | None, blocks: Mapping[int, Block] = {}
    ) -> None:
        """Give the blocks of a fetch, or its error, to those who wait for it."""
        self._forget(fetch)
        if not fetch.has_ended.is_set():
            fetch.error, fetch.blocks = error, blocks
            fetch.has_ended.set()

    def _keep(self, fetch: _Fetch, blocks: Mapping[int, Block]) -> None:
        """Keep blocks in memory, as far as there is room."""
        found = {(fetch.shard, number): blocks[number] for number in sorted(blocks)}
        if fetch.is_prefetch:
            self._unread |= found
            for key in reversed(found) if fetch.is_urgent else ():
                self._unread.move_to_end(key, last=False)  # among the first that are needed
        else:
            self._read |= found
        self._make_room()

    def _fetch_all(self, fetch: _Fetch | None) -> None:
        """Fetch one group of blocks after another; run by each of the threads."""
        while fetch is not None:
            error: BaseException | None = None
            new: list[int] = []
            try:
                blocks, new = self._source.get(fetch.shard, fetch.numbers, self._stop)
            except BaseException as raised:
                error, blocks = raised, {}
            with self._lock:
                self._running.remove(fetch)
                if not self._stop.is_set():
                    self._keep(fetch, blocks)
                self._end(fetch, error, blocks)
            self._source.put_in_cache(fetch.shard, {number: blocks[number] for number in new})
            del blocks
            with self._lock:
                fetch = self._next_fetch()
                if fetch is None:
                    self._num_threads -= 1
                    self._thread_ended.notify_all()
