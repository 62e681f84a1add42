"""Runs a plan: makes shards, segment by segment, from any number of threads.

A segment is an aligned run of a shard's bytes, small enough to hold. Threads take segments in
order, make each in a buffer of their own and write it where it belongs, so that some convert
while others wait for the disk; the thread that completes a shard puts it in its place. Memory is
therefore set by the number of threads and the size of a segment, not by any tensor, shard or
layer. Bytes depend on the plan alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np

from .checkpoint import Extent, Schedule
from .checksums import OrderedSum
from .dtypes import DType
from .errors import OutputError
from .memory import peak_rss_nbytes
from .operands import Reader
from .planner import PlannedShard
from .recipe import Part, Piece, extents, fill, make_pieces
from .scratch import StagedTranspose
from .second_reader import objection
from .shard_file import ShardFile
from .workers import Buffer, Task, run_tasks

__all__ = ["SEGMENT_NBYTES", "Threads", "Watch", "execute", "memory_nbytes"]

SEGMENT_NBYTES = 8 << 20
_INTERPRETER_NBYTES = 45_000_000  # Python with numpy, einops and tqdm
_WORKER_NBYTES = 6_000_000  # tiles, indices, a cut unit
_STREAMING_NBYTES = 200_000_000  # blocks that are needed at a time, and the clients' code

_T = TypeVar("_T")
_Step: TypeAlias = tuple[PlannedShard, int, "Part | None"]
"""A segment of a shard by where it begins, or a block of a part that is transposed for it."""
_SPREAD = 3
"""Segments for each block of a large transpose, at most: what is staged waits on disk, and further
ahead lie embeddings, which read as much as they write, where experts read a quarter of it."""


def _spread(some: list[_T], others: list[_T], begin: int, end: int) -> list[_T]:
    """`others` with `some` spread evenly, in order, over its places `begin … end`."""
    merged = others[:begin]
    for number, item in enumerate(some):
        low, high = ((end - begin) * n // len(some) + begin for n in (number, number + 1))
        merged.append(item)
        merged += others[low:high]
    return merged + others[end:]


def memory_nbytes(workers: int, *, is_local: bool = True) -> int:
    """An upper estimate of the process's peak resident memory, for a source that is of this
    machine or is streamed."""
    nbytes = _INTERPRETER_NBYTES + workers * (SEGMENT_NBYTES + _WORKER_NBYTES)
    return nbytes if is_local else nbytes + _STREAMING_NBYTES


@dataclass
class _ShardInProgress:
    """A shard that threads are working on: its file, its large transposes, what is left."""

    shard: PlannedShard
    staged: dict[Part, StagedTranspose]
    segments_left: int
    sum: OrderedSum | None
    file: ShardFile | None = None
    """From its first segment on; large transposes begin before."""
    counting: threading.Lock = field(default_factory=threading.Lock)

    def close(self) -> None:
        """Delete what is not finished."""
        for transpose in self.staged.values():
            transpose.close()
        if self.file is not None:
            self.file.discard()


@dataclass(frozen=True, slots=True)
class Watch:
    """Who is told how a run goes, from any of its threads; what they raise ends the run."""

    on_bytes: Callable[[int], None] = lambda nbytes: None
    """So many bytes have been written."""
    on_sum: Callable[[str, str], None] | None = None
    """The SHA-256 of a shard, right before it gets its name."""
    on_begin: Callable[[str, threading.Event], None] = lambda shard, stop: None
    """A shard's file is about to be made; it is not before this returns, which it does when the
    event is set."""
    on_whole: Callable[[str], None] = lambda shard: None
    """All of a shard is written; it gets its name when this returns."""
    on_shard: Callable[[str], None] = lambda shard: None
    """A shard is finished."""


class _Run:
    """One call of `execute`."""

    def __init__(
        self,
        shards: Sequence[PlannedShard],
        reader: Reader,
        folder: Path,
        partials: Path,
        workers: int,
        watch: Watch,
        segment_nbytes: int,
        scarce: bool,
        stop: threading.Event,
    ) -> None:
        self.reader = reader
        self.folder = folder
        self.partials = partials
        self.workers = workers
        self.watch = watch
        self.segment_nbytes = segment_nbytes
        self.scarce = scarce
        self.stop = stop
        self._in_progress: dict[str, _ShardInProgress] = {}
        self._staged = {s.name: {part for part, _ in s.staged()} for s in shards}
        self._steps = self._order(shards)
        reader.schedule(Schedule(len(self._steps), self._extents), stop)

    def _order(self, shards: Sequence[PlannedShard]) -> list[_Step]:
        """Every segment, shard by shard, and among those before it the blocks of each large
        transpose: reading these ahead goes well with writing."""
        steps: list[_Step] = []
        for shard in shards:
            segments: list[_Step] = [
                (shard, at, None) for at in range(0, shard.nbytes, self.segment_nbytes)
            ]
            steps += segments
            for part, offset in shard.staged():
                # All blocks come before the first segment that waits for them.
                needed = steps.index(segments[offset // self.segment_nbytes])
                count = len(StagedTranspose.blocks_of(part, self.segment_nbytes))
                blocks: list[_Step] = [(shard, block, part) for block in range(count)]
                steps = _spread(blocks, steps, max(0, needed - _SPREAD * count), needed)
        return steps

    def _extents(self, step: int) -> Iterator[Extent]:
        """What a step reads."""
        shard, at, part = self._steps[step]
        if part is not None:
            block = StagedTranspose.blocks_of(part, self.segment_nbytes)[at]
            yield from part.operand.extents(block)
            return
        for tensor, low, high, _ in shard.overlapping(at, at + self.segment_nbytes):
            yield from extents(tensor, low, high, without=self._staged[shard.name])

    def tasks(self) -> Iterator[Task]:
        """Every step, as a task."""
        for number, (shard, at, part) in enumerate(self._steps):
            progress = self._in_progress.get(shard.name) or self._begin(shard)
            if part is not None:
                yield partial(self._do, number, partial(self._stage, progress.staged[part], at))
                continue
            if progress.file is None:
                self.watch.on_begin(shard.name, self.stop)
                if self.stop.is_set():
                    return
                progress.file = ShardFile(
                    self.partials / shard.name,
                    self.folder / shard.name,
                    shard.nbytes,
                    partial(_check_header, shard),
                )
            yield partial(self._do, number, partial(self._make_segment, progress, at))

    def _do(self, number: int, task: Task, buffer: Buffer) -> None:
        self.reader.begin(number)
        task(buffer)
        self.reader.end(number)

    def _begin(self, shard: PlannedShard) -> _ShardInProgress:
        segments = -(-shard.nbytes // self.segment_nbytes)
        running_sum = OrderedSum() if self.watch.on_sum else None
        progress = _ShardInProgress(shard, {}, segments, running_sum)
        self._in_progress[shard.name] = progress
        for number, (part, _) in enumerate(shard.staged()):
            scratch = self.partials / f"{shard.name}.scratch-{number}"
            progress.staged[part] = StagedTranspose(part, scratch, self.segment_nbytes)
        return progress

    def _make_segment(self, progress: _ShardInProgress, begin: int, buffer: Buffer) -> None:
        shard, file = progress.shard, progress.file
        assert file is not None
        end = min(begin + self.segment_nbytes, shard.nbytes)
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
        file.write(buffer[:padded], begin)
        if progress.sum is not None:
            progress.sum.add(begin, buffer[:length], self.stop)
        self.watch.on_bytes(length)
        with progress.counting:
            progress.segments_left -= 1
            last = progress.segments_left == 0
        if last:
            self._commit(progress, file)

    def _make(
        self, progress: _ShardInProgress, part: Part, pieces: list[Piece], dtype: DType
    ) -> None:
        staged = progress.staged.get(part) if progress.staged else None
        if staged is not None:
            staged.make(pieces, dtype, self.stop, ahead=self.workers)
        else:
            make_pieces(part, pieces, dtype, self.reader)

    def _stage(self, transpose: StagedTranspose, block: int, buffer: Buffer) -> None:
        transpose.stage(block, self.reader, buffer, release=self.scarce)

    def _commit(self, progress: _ShardInProgress, file: ShardFile) -> None:
        if self.stop.is_set():
            return  # some segment may have been left out
        name = progress.shard.name
        self.reader.check_unchanged()
        self.watch.on_whole(name)
        if self.watch.on_sum is not None and progress.sum is not None:
            self.watch.on_sum(name, progress.sum.hexdigest())
        file.commit()
        for transpose in progress.staged.values():
            transpose.close()
        del self._in_progress[name]
        self.watch.on_shard(name)

    def discard(self) -> None:
        """Delete every partial file."""
        for progress in list(self._in_progress.values()):
            progress.close()


def _check_header(shard: PlannedShard, file: Path) -> None:
    seen = objection(file, ((t.name, t.dtype, t.shape) for t in shard.tensors))
    if seen is not None:
        raise OutputError(
            f"{file}: safetensors cannot read what was written: {seen}; check the disk, then run "
            "the same command again"
        )


def execute(
    shards: Sequence[PlannedShard],
    reader: Reader,
    folder: Path,
    *,
    partials: Path,
    workers: int,
    watch: Watch,
    segment_nbytes: int = SEGMENT_NBYTES,
    scarce: bool = False,
) -> None:
    """Make `shards` in `folder`; their partial and scratch files lie in `partials` meanwhile.

    Both folders are on one file system. With `scarce` memory the pages of scratch files are given
    up as soon as they are written, instead of leaving that to the system.

    When this returns every shard is complete, under its name and on the disk. When it raises
    (`OSError` of writing, `TensorError` for values that cannot be converted, what the reader
    raises, `KeyboardInterrupt`) those that were complete stay and no partial file does.
    """
    stop = threading.Event()
    run = _Run(shards, reader, folder, partials, workers, watch, segment_nbytes, scarce, stop)
    try:
        run_tasks(run.tasks(), workers, segment_nbytes, stop)
    finally:
        run.discard()


@dataclass(frozen=True, slots=True)
class Threads:
    """Makes the shards of an output in threads of this process (see `output.Maker`)."""

    reader: Reader
    workers: int
    scarce: bool = False
    is_here = True

    @property
    def peak_rss(self) -> int:
        """The most memory that this process has had, in bytes."""
        return peak_rss_nbytes()

    def meet(self, work: Path | None) -> None:
        """Nothing to do."""

    def make(
        self,
        shards: Sequence[PlannedShard],
        state: Mapping[str, Any],
        folder: Path,
        partials: Path,
        watch: Watch,
    ) -> None:
        """See `execute`."""
        execute(
            shards,
            self.reader,
            folder,
            partials=partials,
            workers=self.workers,
            watch=watch,
            scarce=self.scarce,
        )
