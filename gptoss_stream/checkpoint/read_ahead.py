"""What a run reads of files that are far away, cut into blocks that are each fetched once.

A block is a run of a file's bytes, large enough that requests are few and small enough that the
blocks which are needed at the same time fit into memory. It is known beforehand which steps of
the run read a block: it is fetched before the first of them and given up after the last.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from .metadata import RawTensor
from .reader import ReadSchedule

__all__ = ["FETCH_NBYTES", "FetchBlock", "plan_fetches"]


FETCH_NBYTES = 16 << 20
"""The Hub gives anonymous users 3,000 requests in five minutes: so few blocks suffice for 48 GB."""


_GAP_NBYTES = (
    4096  # that nobody needs, between blocks that are made one: fewer than a request costs
)


_APART = 32
"""Steps. Blocks that are made one are all held for as long as any of them is needed: so neighbours
whose times are further apart than this stay apart."""


@dataclass(slots=True, eq=False)
class FetchBlock:
    """Bytes `begin … end` of a shard, and the steps that read some of them."""

    shard: str
    begin: int
    end: int
    steps: set[int] = field(repr=False)

    @property
    def nbytes(self) -> int:
        """How many."""
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
    """The blocks of all that a schedule reads, in the order of their first steps.

    Every byte that is read lies in one of them, and no byte in two.
    """
    by_shard: dict[str, list[FetchBlock]] = {}
    for raw, reads in _reads(schedule).items():
        pieces = by_shard.setdefault(raw.shard, [])
        for run in _runs(reads):
            pieces += _cut_run(raw.shard, run, block_nbytes)
    blocks = [b for pieces in by_shard.values() for b in _joined(pieces, block_nbytes)]
    return sorted(blocks, key=lambda block: block.first)


_Read = tuple[int, int, int]  # begin, end, step


def _reads(schedule: ReadSchedule) -> dict[RawTensor, list[_Read]]:
    reads: dict[RawTensor, list[_Read]] = {}
    for step in range(schedule.count):
        for element_range in schedule.element_ranges(step):
            begin, nbytes = element_range.span
            reads.setdefault(element_range.raw, []).append((begin, begin + nbytes, step))
    return reads


def _runs(reads: list[_Read]) -> Iterator[list[_Read]]:
    """Reads that overlap or touch, together, in the order of their bytes."""
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


def _cut_run(shard: str, run: list[_Read], block_nbytes: int) -> list[FetchBlock]:
    """A run in even pieces."""
    begin, end = run[0][0], max(read[1] for read in run)
    count = -(-(end - begin) // block_nbytes)
    cuts = [begin + (end - begin) * i // count for i in range(count + 1)]
    pieces = [FetchBlock(shard, a, b, set()) for a, b in pairwise(cuts)]
    size = -(-(end - begin) // count)
    for low, high, step in run:
        # Even cuts differ from multiples of the size by less than a piece.
        for i in range(max(0, (low - begin) // size - 1), count):
            if pieces[i].begin >= high:
                break
            if pieces[i].end > low:
                pieces[i].steps.add(step)
    return pieces


def _joined(pieces: list[FetchBlock], block_nbytes: int) -> list[FetchBlock]:
    """Neighbours in a shard that are needed at about the same time, made one."""
    joined: list[FetchBlock] = []
    for piece in sorted(pieces, key=lambda block: block.begin):
        before = joined[-1] if joined else None
        if before is not None and _belong_together(before, piece, block_nbytes):
            before.end = piece.end
            before.steps |= piece.steps
        else:
            joined.append(piece)
    return joined


def _belong_together(one: FetchBlock, other: FetchBlock, block_nbytes: int) -> bool:
    if other.begin - one.end > _GAP_NBYTES or other.end - one.begin > block_nbytes:
        return False
    together = max(one.last, other.last) - min(one.first, other.first)
    return together <= max(one.last - one.first, other.last - other.first) + _APART
