"""Which pages of a checkpoint's files the steps of a run need soon, and the memory for them.

A block has neighbouring pages within one cell of a grid that the next steps read: few reads are
needed, and a small tensor does not bring its neighbours. What steps need is looked at some steps
ahead. So a block that several steps in a row need, such as those that transpose an expert, is read
once, and one that is needed again much later does not stay in memory.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from .._utils.buffers import ALIGNMENT, aligned_buffer
from .reader import ElementRange, ReadSchedule

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Block", "NeededBlocks", "Piece"]

_STEPS_AHEAD = 8
"""Steps that are looked at before they begin: an expert is transposed in four or five.
Neighbouring pages that these steps read are one block."""

_Cell: TypeAlias = "tuple[str, int]"  # a shard, and the number of a cell in it


class Piece(NamedTuple):
    """Bytes [begin, end) of a shard within one cell."""

    cell: _Cell
    begin: int
    end: int


class Block:
    """Pages [begin, end) of a shard within one cell."""

    __slots__ = (
        "begin",
        "cell",
        "end",
        "first",
        "has_arrived",
        "memory",
        "readers",
        "steps_left",
        "unread_nbytes",
    )

    def __init__(self, cell: _Cell, begin: int, end: int, first: int) -> None:
        self.cell = cell
        self.begin = begin
        self.end = end
        self.first = first
        """The first step that needs it."""
        self.steps_left = 0
        self.unread_nbytes = 0
        """What steps have yet to read of it; what several read is counted for each."""
        self.readers = 0
        """How often its memory is in use."""
        self.memory: np.ndarray[Any, Any] | None = None
        """Memory for its pages; None before it is read, and when it has been dropped."""
        self.has_arrived = False

    def bytes_of(self, piece: Piece) -> np.ndarray[Any, Any]:
        """Return the memory of a piece; the block has arrived."""
        assert self.memory is not None
        return self.memory[piece.begin - self.begin : piece.end - self.begin]


class NeededBlocks:
    """The blocks that steps need, in the order in which they are to be read. It does not lock.

    Args:
        schedule: What each step reads.
        budget_nbytes: Memory for blocks. Beyond it the earliest step that is running gets what it
            needs.
        cell_nbytes: The bytes of a cell, a multiple of 4096.
    """

    def __init__(self, schedule: ReadSchedule, budget_nbytes: int, cell_nbytes: int) -> None:
        self._schedule = schedule
        self._budget_nbytes = budget_nbytes
        self._cell_nbytes = cell_nbytes
        self._blocks: dict[_Cell, list[Block]] = {}
        self._to_read: deque[Block] = deque()
        self._by_step: dict[int, set[Block]] = {}
        self._next_step = 0
        self._running: dict[int, int] = {}
        """The step of each thread."""
        self._used_nbytes = 0
        self._read: deque[Block] = deque()
        """Blocks of which all has been read. They are dropped when memory is needed, and not at
        once, since a step may read a row twice."""
        self._free: dict[int, list[np.ndarray[Any, Any]]] = {}
        """Memory by its size, a power of 2, to be used again: new pages cost more than reading."""
        self._look_ahead(0)

    def begin_step(self, step: int) -> None:
        """Note that the calling thread begins a step."""
        self._running[threading.get_ident()] = step
        self._look_ahead(step)

    def end_step(self, step: int) -> None:
        """Drop the blocks that no other step needs."""
        self._running.pop(threading.get_ident(), None)
        for block in self._by_step.pop(step, ()):
            block.steps_left -= 1
            self._drop_unneeded(block)

    def pieces(self, one: ElementRange) -> Iterator[Piece]:
        """Yield the bytes of elements, cell by cell."""
        begin, nbytes = one.byte_range
        end, size = begin + nbytes, self._cell_nbytes
        for number in range(begin // size, -(-end // size)):
            low, high = max(begin, number * size), min(end, (number + 1) * size)
            yield Piece((one.raw.shard, number), low, high)

    def hold(self, piece: Piece) -> Block | None:
        """Return the block with a piece that the thread's step needs, or None.

        It is not dropped before `release`. What the step reads beyond the schedule is in no block
        of its own: that of a later step may have to wait until this one has ended.
        """
        needed = self._by_step.get(self._running.get(threading.get_ident(), -1), ())
        for block in self._blocks.get(piece.cell, ()):
            if block in needed and block.begin <= piece.begin and piece.end <= block.end:
                block.readers += 1
                return block
        return None

    def release(self, piece: Piece, block: Block) -> None:
        """Note that a piece has been read."""
        block.readers -= 1
        block.unread_nbytes -= piece.end - piece.begin
        self._drop_unneeded(block)

    def next_to_read(self) -> Block | None:
        """Return the next block to be read, with memory; None if there is none, or no memory."""
        while self._to_read and not self._to_read[0].steps_left:
            self._to_read.popleft()  # its steps have ended without it
        if not self._to_read:
            return None
        block = self._to_read[0]
        nbytes = block.end - block.begin
        while self._used_nbytes + nbytes > self._budget_nbytes and self._read:
            read = self._read.popleft()
            if read.unread_nbytes <= 0 and not read.readers:
                self._drop(read)
        is_needed_now = block.first <= min(self._running.values(), default=-1)
        if not is_needed_now and self._used_nbytes + nbytes > self._budget_nbytes:
            return None
        self._to_read.popleft()
        size = 1 << (nbytes - 1).bit_length()
        free = self._free.setdefault(size, [])
        block.memory = free.pop() if free else aligned_buffer(size)
        self._used_nbytes += len(block.memory)
        return block

    def arrived(self, block: Block) -> None:
        """Note that a block has been read."""
        block.has_arrived = True
        self._drop_unneeded(block)

    def _look_ahead(self, step: int) -> None:
        """Note which blocks the steps up to some steps after this one need."""
        end = min(step + 1 + _STEPS_AHEAD, self._schedule.num_steps)
        for later in range(self._next_step, end):
            needed: set[Block] = set()
            for one in self._schedule.element_ranges(later):
                for piece in self.pieces(one):
                    block = self._block_for(piece, later)
                    block.unread_nbytes += piece.end - piece.begin
                    needed.add(block)
            for block in needed:
                block.steps_left += 1
            self._by_step[later] = needed
        self._next_step = max(self._next_step, end)

    def _block_for(self, piece: Piece, step: int) -> Block:
        """Return the block with the pages of a piece; a new or larger one is going to be read."""
        begin, end = piece.begin // ALIGNMENT * ALIGNMENT, -(-piece.end // ALIGNMENT) * ALIGNMENT
        blocks = self._blocks.setdefault(piece.cell, [])
        for block in blocks:
            if block.begin <= begin and end <= block.end:
                return block
            if block.memory is None and block.begin <= end and begin <= block.end:
                block.begin, block.end = min(block.begin, begin), max(block.end, end)
                return block
        block = Block(piece.cell, begin, end, step)
        blocks.append(block)
        self._to_read.append(block)
        return block

    def _drop_unneeded(self, block: Block) -> None:
        """Drop a block that no step needs any more; note one that is read, to be dropped soon."""
        if not block.readers and not block.steps_left:
            self._drop(block)
        elif block.unread_nbytes <= 0:
            self._read.append(block)

    def _drop(self, block: Block) -> None:
        """Drop a block, and its memory unless that is being read into."""
        blocks = self._blocks.get(block.cell, [])
        if block in blocks:
            blocks.remove(block)
        if not blocks:
            self._blocks.pop(block.cell, None)
        if block.memory is not None and block.has_arrived:
            self._used_nbytes -= len(block.memory)
            self._free[len(block.memory)].append(block.memory)
            block.memory = None
