"""Divides what a run reads of remote files into blocks that are each fetched once.

A block is a range of a file's bytes: large enough that few requests are needed, and small enough
that the blocks which are needed at the same time fit into memory. The steps that read a block are
known beforehand: it is fetched before the first of them and dropped after the last.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from ..tensors.raw_tensor import RawTensor
from .reader import ReadSchedule

__all__ = ["FETCH_NBYTES", "FetchBlock", "plan_fetches"]

FETCH_NBYTES = 16 << 20
"""The most bytes of a block. The Hub gives anonymous users 3,000 requests in five minutes, which is
enough for 48 GB in blocks of this size."""
_MAX_GAP_NBYTES = 4096
"""Unneeded bytes between two blocks that are merged, at most: they cost less than a request."""
_MAX_STEPS_APART = 32
"""A merged block stays in memory as long as any of it is needed. So neighbors whose steps are
further apart than this are not merged."""


@dataclass(slots=True, eq=False)
class FetchBlock:
    """Bytes `begin … end` of a shard, and the steps that read some of them."""

    shard: str
    begin: int
    end: int
    steps: set[int] = field(repr=False)

    @property
    def nbytes(self) -> int:
        """The size of the block in bytes."""
        return self.end - self.begin

    @property
    def first(self) -> int:
        """The first step that reads it."""
        return min(self.steps)

    @property
    def last(self) -> int:
        """The last step that reads it."""
        return max(self.steps)


def plan_fetches(schedule: ReadSchedule, block_nbytes: int = FETCH_NBYTES) -> list[FetchBlock]:
    """Return the blocks of everything that a schedule reads.

    Args:
        schedule: What each step reads.
        block_nbytes: The most bytes of a block.

    Returns:
        The blocks, in the order of their first steps. Every byte that is read is in exactly one.
    """
    by_shard: dict[str, list[FetchBlock]] = {}
    for raw, reads in _reads_by_tensor(schedule).items():
        blocks = by_shard.setdefault(raw.shard, [])
        for run in _contiguous_runs(reads):
            blocks += _divide(raw.shard, run, block_nbytes)
    merged = [block for blocks in by_shard.values() for block in _merge(blocks, block_nbytes)]
    return sorted(merged, key=lambda block: block.first)


_Read = tuple[int, int, int]  # begin, end, step


def _reads_by_tensor(schedule: ReadSchedule) -> dict[RawTensor, list[_Read]]:
    """Return all reads of each tensor, in the order of their steps."""
    reads: dict[RawTensor, list[_Read]] = {}
    for step in range(schedule.num_steps):
        for element_range in schedule.element_ranges(step):
            begin, nbytes = element_range.byte_range
            reads.setdefault(element_range.raw, []).append((begin, begin + nbytes, step))
    return reads


def _contiguous_runs(reads: list[_Read]) -> Iterator[list[_Read]]:
    """Yield groups of reads that overlap or touch, in the order of their bytes."""
    run: list[_Read] = []
    end = 0
    for read in sorted(reads):
        if run and read[0] > end:
            yield run
            run = []
        end = max(end, read[1]) if run else read[1]
        run.append(read)
    if run:
        yield run


def _divide(shard: str, run: list[_Read], block_nbytes: int) -> list[FetchBlock]:
    """Divide the bytes of a run into blocks of about the same size."""
    begin, end = run[0][0], max(read[1] for read in run)
    count = -(-(end - begin) // block_nbytes)
    bounds = [begin + (end - begin) * i // count for i in range(count + 1)]
    blocks = [FetchBlock(shard, low, high, set()) for low, high in pairwise(bounds)]
    size = -(-(end - begin) // count)
    for low, high, step in run:
        # Bounds differ from multiples of the size by less than a block.
        for i in range(max(0, (low - begin) // size - 1), count):
            if blocks[i].begin >= high:
                break
            if blocks[i].end > low:
                blocks[i].steps.add(step)
    return blocks


def _merge(blocks: list[FetchBlock], block_nbytes: int) -> list[FetchBlock]:
    """Merge neighbors in a shard that are needed at about the same time."""
    merged: list[FetchBlock] = []
    for block in sorted(blocks, key=lambda block: block.begin):
        before = merged[-1] if merged else None
        if before is not None and _can_merge(before, block, block_nbytes):
            before.end = block.end
            before.steps |= block.steps
        else:
            merged.append(block)
    return merged


def _can_merge(one: FetchBlock, other: FetchBlock, block_nbytes: int) -> bool:
    """Return whether a block and the next one are close enough, in bytes and in steps."""
    if other.begin - one.end > _MAX_GAP_NBYTES or other.end - one.begin > block_nbytes:
        return False
    together = max(one.last, other.last) - min(one.first, other.first)
    return together <= max(one.last - one.first, other.last - other.first) + _MAX_STEPS_APART
