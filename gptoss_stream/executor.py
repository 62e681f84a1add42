"""Runs a plan: makes shards, segment by segment, from any number of threads.

A segment is an aligned run of a shard's bytes, small enough to hold. Threads take segments in
order, make each in a buffer of their own and write it where it belongs, so that some convert
while others wait for the disk; the thread that completes a shard puts it in its place. Memory is
therefore set by the number of threads and the size of a segment, not by any tensor, shard or
layer. Bytes depend on the plan alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeAlias, TypeVar

import numpy as np

from .checkpoint import Extent
from .checksums import OrderedSum
from .dtypes import DType
from .operands import Reader
from .planner import PlannedShard
from .recipe import Part, Piece, extents, fill, make_pieces
from .scratch import StagedTranspose
from .shard_file import ShardFile
from .workers import Buffer, Task, run_tasks

__all__ = ["SEGMENT_NBYTES", "execute", "memory_nbytes"]

SEGMENT_NBYTES = 8 << 20
_INTERPRETER_NBYTES = 45_000_000  # Python with numpy, einops and tqdm
_WORKER_NBYTES = 6_000_000  # tiles, indices, a cut unit

_T = TypeVar("_T")
_Step: TypeAlias = tuple[PlannedShard, int, "Part | None"]
"""A segment of a shard by where it begins, or a block of a part that is transposed for it."""
_SPREAD = 4  # segments for each block of a large transpose, at most: what is staged waits on disk


def _spread(some: list[_T], others: list[_T], begin: int, end: int) -> list[_T]:
    """`others` with `some` spread evenly, in order, over its places `begin … end`."""
    merged = others[:begin]
    for number, item in enumerate(some):
        low, high = ((end - begin) * n // len(some) + begin for n in (number, number + 1))
        merged.append(item)
        merged += others[low:high]
    return merged + others[end:]


def memory_nbytes(workers: int) -> int:
    """An upper estimate of the process's peak resident memory."""
    return _INTERPRETER_NBYTES + workers * (SEGMENT_NBYTES + _WORKER_NBYTES)


@dataclass
class _ShardInProgress:
    """A shard that threads are working on: its file, its large transposes, what is left."""

    shard: PlannedShard
    file: ShardFile
    staged: dict[Part, StagedTranspose]
    segments_left: int
    sum: OrderedSum | None
    counting: threading.Lock = field(default_factory=threading.Lock)

    def close(self) -> None:
        """Delete what is not finished."""
        for transpose in self.staged.values():
            transpose.close()
        self.file.discard()


class _Run:
    """One call of `execute`."""

    def __init__(
        self,
        shards: Sequence[PlannedShard],
        reader: Reader,
        folder: Path,
        partials: Path,
        workers: int,
        on_bytes: Callable[[int], None],
        on_sum: Callable[[str, str], None] | None,
        segment_nbytes: int,
        scarce: bool,
        stop: threading.Event,
    ) -> None:
        self.reader = reader
        self.folder = folder
        self.partials = partials
        self.workers = workers
        self.on_bytes = on_bytes
        self.on_sum = on_sum
        self.segment_nbytes = segment_nbytes
        self.scarce = scarce
        self.stop = stop
        self.shards = shards
        self._in_progress: dict[str, _ShardInProgress] = {}

    def tasks(self) -> Iterator[Task]:
        """Every segment, shard by shard, and among those before it the blocks of each large
        transpose: reading these ahead goes well with writing."""
        steps: list[_Step] = []
        for shard in self.shards:
            segments: list[_Step] = [
                (shard, at, None) for at in range(0, shard.nbytes, self.segment_nbytes)
            ]
            steps += segments
            for part, offset in shard.staged():
                # All blocks come before the first segment that waits for them.
                needed = steps.index(segments[offset // self.segment_nbytes])
                count = StagedTranspose.count_blocks(part, self.segment_nbytes)
                blocks: list[_Step] = [(shard, block, part) for block in range(count)]
                steps = _spread(blocks, steps, max(0, needed - _SPREAD * count), needed)
        for shard, at, staged in steps:
            progress = self._in_progress.get(shard.name) or self._begin(shard)
            if staged is None:
                yield partial(self._make_segment, progress, at)
            else:
                yield partial(self._stage, progress.staged[staged], at)

    def _begin(self, shard: PlannedShard) -> _ShardInProgress:
        file = ShardFile(self.partials / shard.name, self.folder / shard.name, shard.nbytes)
        segments = -(-shard.nbytes // self.segment_nbytes)
        running_sum = OrderedSum() if self.on_sum else None
        progress = _ShardInProgress(shard, file, {}, segments, running_sum)
        self._in_progress[shard.name] = progress
        for number, (part, _) in enumerate(shard.staged()):
            scratch = self.partials / f"{shard.name}.scratch-{number}"
            progress.staged[part] = StagedTranspose(part, scratch, self.segment_nbytes)
        return progress

    def _make_segment(self, progress: _ShardInProgress, begin: int, buffer: Buffer) -> None:
        shard = progress.shard
        end = min(begin + self.segment_nbytes, shard.nbytes)
        if not self.scarce:
            for extent in self._extents(progress, begin + self.workers * self.segment_nbytes):
                self.reader.prefetch(extent)
        if begin < len(shard.header):
            header = shard.header[begin:end]
            buffer[: len(header)] = np.frombuffer(header, np.uint8)
        for tensor, low, high, at in shard.overlapping(begin, end):
            out = buffer[at - begin : at - begin + high - low]
            fill(tensor, low, high, out, partial(self._make, progress))
        if self.stop.is_set():
            return
        length = end - begin
        padded = min(-(-length // 4096) * 4096, len(buffer))
        buffer[length:padded] = 0
        progress.file.write(buffer[:padded], begin)
        if progress.sum is not None:
            progress.sum.add(begin, buffer[:length], self.stop)
        self.on_bytes(length)
        with progress.counting:
            progress.segments_left -= 1
            last = progress.segments_left == 0
        if last:
            self._commit(progress)

    def _make(
        self, progress: _ShardInProgress, part: Part, pieces: list[Piece], dtype: DType
    ) -> None:
        staged = progress.staged.get(part) if progress.staged else None
        if staged is not None:
            staged.make(pieces, dtype, self.stop, ahead=self.workers)
        else:
            make_pieces(part, pieces, dtype, self.reader)

    def _stage(self, transpose: StagedTranspose, block: int, buffer: Buffer) -> None:
        if not self.scarce:
            transpose.prefetch(block + self.workers, self.reader)
        transpose.stage(block, self.reader, buffer, release=self.scarce)

    def _extents(self, progress: _ShardInProgress, begin: int) -> Iterator[Extent]:
        """What making the segment at `begin` reads."""
        if begin >= 0:
            end = begin + self.segment_nbytes
            for tensor, low, high, _ in progress.shard.overlapping(begin, end):
                yield from extents(tensor, low, high, without=progress.staged)

    def _commit(self, progress: _ShardInProgress) -> None:
        if self.stop.is_set():
            return  # some segment may have been left out
        self.reader.check_unchanged()
        if self.on_sum is not None and progress.sum is not None:
            self.on_sum(progress.shard.name, progress.sum.hexdigest())
        progress.file.commit()
        for transpose in progress.staged.values():
            transpose.close()
        del self._in_progress[progress.shard.name]

    def discard(self) -> None:
        """Delete every partial file."""
        for progress in list(self._in_progress.values()):
            progress.close()


def execute(
    shards: Sequence[PlannedShard],
    reader: Reader,
    folder: Path,
    *,
    partials: Path,
    workers: int,
    on_bytes: Callable[[int], None] = lambda nbytes: None,
    on_sum: Callable[[str, str], None] | None = None,
    segment_nbytes: int = SEGMENT_NBYTES,
    scarce: bool = False,
) -> None:
    """Make `shards` in `folder`; their partial and scratch files lie in `partials` meanwhile.

    Both folders are on one file system. `on_bytes` is told, from any thread, how many bytes have
    been written; `on_sum`, of each shard, right before it gets its name, the SHA-256, which is
    taken of the bytes as they are made. With `scarce` memory nothing is read
    ahead but of scratch files, whose pages are given up as soon as they are written: measured,
    both together take a tenth to a third off the time of a run under a limit.

    When this returns every shard is complete, under its name and on the disk. When it raises
    (`OSError` of writing, `TensorError` for values that cannot be converted, what the reader
    raises, `KeyboardInterrupt`) those that were complete stay and no partial file does.
    """
    stop = threading.Event()
    run = _Run(
        shards, reader, folder, partials, workers, on_bytes, on_sum, segment_nbytes, scarce, stop
    )
    try:
        run_tasks(run.tasks(), workers, segment_nbytes, stop)
    finally:
        run.discard()
