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

from .._utils.memory import peak_rss_nbytes
from .._utils.thread_pool import Buffer, Step, run_steps
from ..checkpoint.reader import ElementRange, Reader, ReadSchedule
from ..errors import OutputError
from ..planning.shards import PlannedShard
from ..tensors.dtypes import DType
from ..transforms.materialize import TargetRows, materialize, materialize_rows
from ..transforms.output_tensor import Segment, element_ranges
from .checksums import RunningChecksum
from .safetensors_check import find_problem
from .shard_file import ShardFile
from .spill_file import SpilledTranspose

__all__ = ["CHUNK_NBYTES", "Callbacks", "Threads", "execute", "memory_nbytes"]


CHUNK_NBYTES = 8 << 20


_INTERPRETER_NBYTES = 45_000_000  # Python with numpy, einops and tqdm


_THREAD_NBYTES = 6_000_000  # tiles, indices, a cut unit


_STREAMING_NBYTES = 200_000_000  # blocks that are needed at a time, and the clients' code


_T = TypeVar("_T")


_Step: TypeAlias = tuple[PlannedShard, int, "Segment | None"]
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
    nbytes = _INTERPRETER_NBYTES + workers * (CHUNK_NBYTES + _THREAD_NBYTES)
    return nbytes if is_local else nbytes + _STREAMING_NBYTES


@dataclass
class _ShardInProgress:
    """A shard that threads are working on: its file, its large transposes, what is left."""

    shard: PlannedShard
    spilled: dict[Segment, SpilledTranspose]
    segments_left: int
    sum: RunningChecksum | None
    file: ShardFile | None = None
    """From its first segment on; large transposes begin before."""
    counting: threading.Lock = field(default_factory=threading.Lock)

    def close(self) -> None:
        """Delete what is not finished."""
        for transpose in self.spilled.values():
            transpose.close()
        if self.file is not None:
            self.file.discard()


@dataclass(frozen=True, slots=True)
class Callbacks:
    """Who is told how a run goes, from any of its threads; what they raise ends the run."""

    on_bytes: Callable[[int], None] = lambda nbytes: None
    """So many bytes have been written."""
    on_sum: Callable[[str, str], None] | None = None
    """The SHA-256 of a shard, right before it gets its name."""
    on_shard_start: Callable[[str, threading.Event], None] = lambda shard, stop: None
    """A shard's file is about to be made; it is not before this returns, which it does when the
    event is set."""
    before_commit: Callable[[str], None] = lambda shard: None
    """All of a shard is written; it gets its name when this returns."""
    on_shard_finished: Callable[[str], None] = lambda shard: None
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
        callbacks: Callbacks,
        chunk_nbytes: int,
        low_memory: bool,
        stop: threading.Event,
    ) -> None:
        self.reader = reader
        self.folder = folder
        self.partials = partials
        self.workers = workers
        self.callbacks = callbacks
        self.chunk_nbytes = chunk_nbytes
        self.low_memory = low_memory
        self.stop = stop
        self._in_progress: dict[str, _ShardInProgress] = {}
        self._spilled = {s.name: {segment for segment, _ in s.spilled()} for s in shards}
        self._steps = self._order(shards)
        reader.schedule(ReadSchedule(len(self._steps), self._extents), stop)

    def _order(self, shards: Sequence[PlannedShard]) -> list[_Step]:
        """Every segment, shard by shard, and among those before it the blocks of each large
        transpose: reading these ahead goes well with writing."""
        steps: list[_Step] = []
        for shard in shards:
            segments: list[_Step] = [
                (shard, at, None) for at in range(0, shard.nbytes, self.chunk_nbytes)
            ]
            steps += segments
            for segment, offset in shard.spilled():
                # All blocks come before the first segment that waits for them.
                needed = steps.index(segments[offset // self.chunk_nbytes])
                count = len(SpilledTranspose.blocks_of(segment, self.chunk_nbytes))
                blocks: list[_Step] = [(shard, block, segment) for block in range(count)]
                steps = _spread(blocks, steps, max(0, needed - _SPREAD * count), needed)
        return steps

    def _extents(self, step: int) -> Iterator[ElementRange]:
        """What a step reads."""
        shard, at, segment = self._steps[step]
        if segment is not None:
            block = SpilledTranspose.blocks_of(segment, self.chunk_nbytes)[at]
            yield from segment.operand.element_ranges(block)
            return
        for tensor, low, high, _ in shard.overlapping(at, at + self.chunk_nbytes):
            yield from element_ranges(tensor, low, high, without=self._spilled[shard.name])

    def tasks(self) -> Iterator[Step]:
        """Every step, as a task."""
        for number, (shard, at, segment) in enumerate(self._steps):
            progress = self._in_progress.get(shard.name) or self._begin(shard)
            if segment is not None:
                yield partial(self._do, number, partial(self._stage, progress.spilled[segment], at))
                continue
            if progress.file is None:
                self.callbacks.on_shard_start(shard.name, self.stop)
                if self.stop.is_set():
                    return
                progress.file = ShardFile(
                    self.partials / shard.name,
                    self.folder / shard.name,
                    shard.nbytes,
                    partial(_check_header, shard),
                )
            yield partial(self._do, number, partial(self._make_segment, progress, at))

    def _do(self, number: int, task: Step, buffer: Buffer) -> None:
        self.reader.begin(number)
        task(buffer)
        self.reader.end(number)

    def _begin(self, shard: PlannedShard) -> _ShardInProgress:
        segments = -(-shard.nbytes // self.chunk_nbytes)
        running_sum = RunningChecksum() if self.callbacks.on_sum else None
        progress = _ShardInProgress(shard, {}, segments, running_sum)
        self._in_progress[shard.name] = progress
        for number, (segment, _) in enumerate(shard.spilled()):
            scratch = self.partials / f"{shard.name}.scratch-{number}"
            progress.spilled[segment] = SpilledTranspose(segment, scratch, self.chunk_nbytes)
        return progress

    def _make_segment(self, progress: _ShardInProgress, begin: int, buffer: Buffer) -> None:
        shard, file = progress.shard, progress.file
        assert file is not None
        end = min(begin + self.chunk_nbytes, shard.nbytes)
        if begin < len(shard.header):
            header = shard.header[begin:end]
            buffer[: len(header)] = np.frombuffer(header, np.uint8)
        for tensor, low, high, at in shard.overlapping(begin, end):
            out = buffer[at - begin : at - begin + high - low]
            materialize(tensor, low, high, out, partial(self._make, progress))
        if self.stop.is_set():
            return
        length = end - begin
        padded = min(-(-length // 4096) * 4096, len(buffer))
        buffer[length:padded] = 0
        file.write(buffer[:padded], begin)
        if progress.sum is not None:
            progress.sum.add(begin, buffer[:length], self.stop)
        self.callbacks.on_bytes(length)
        with progress.counting:
            progress.segments_left -= 1
            last = progress.segments_left == 0
        if last:
            self._commit(progress, file)

    def _make(
        self, progress: _ShardInProgress, segment: Segment, targets: list[TargetRows], dtype: DType
    ) -> None:
        spilled = progress.spilled.get(segment) if progress.spilled else None
        if spilled is not None:
            spilled.make(targets, dtype, self.stop, ahead=self.workers)
        else:
            materialize_rows(segment, targets, dtype, self.reader)

    def _stage(self, transpose: SpilledTranspose, block: int, buffer: Buffer) -> None:
        transpose.stage(block, self.reader, buffer, release=self.low_memory)

    def _commit(self, progress: _ShardInProgress, file: ShardFile) -> None:
        if self.stop.is_set():
            return  # some segment may have been left out
        name = progress.shard.name
        self.reader.check_unchanged()
        self.callbacks.before_commit(name)
        if self.callbacks.on_sum is not None and progress.sum is not None:
            self.callbacks.on_sum(name, progress.sum.hexdigest())
        file.commit()
        for transpose in progress.spilled.values():
            transpose.close()
        del self._in_progress[name]
        self.callbacks.on_shard_finished(name)

    def discard(self) -> None:
        """Delete every partial file."""
        for progress in list(self._in_progress.values()):
            progress.close()


def _check_header(shard: PlannedShard, file: Path) -> None:
    seen = find_problem(file, ((t.name, t.dtype, t.shape) for t in shard.tensors))
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
    callbacks: Callbacks,
    chunk_nbytes: int = CHUNK_NBYTES,
    low_memory: bool = False,
) -> None:
    """Make `shards` in `folder`; their partial and scratch files lie in `partials` meanwhile.

    Both folders are on one file system. With `scarce` memory the pages of scratch files are given
    up as soon as they are written, instead of leaving that to the system.

    When this returns every shard is complete, under its name and on the disk. When it raises
    (`OSError` of writing, `TensorError` for values that cannot be converted, what the reader
    raises, `KeyboardInterrupt`) those that were complete stay and no partial file does.
    """
    stop = threading.Event()
    run = _Run(shards, reader, folder, partials, workers, callbacks, chunk_nbytes, low_memory, stop)
    try:
        run_steps(run.tasks(), workers, chunk_nbytes, stop)
    finally:
        run.discard()


@dataclass(frozen=True, slots=True)
class Threads:
    """Makes the shards of an output in threads of this process (see `output.Maker`)."""

    reader: Reader
    workers: int
    low_memory: bool = False
    in_process = True

    @property
    def peak_rss(self) -> int:
        """The most memory that this process has had, in bytes."""
        return peak_rss_nbytes()

    def setup(self, work: Path | None) -> None:
        """Nothing to do."""

    def make(
        self,
        shards: Sequence[PlannedShard],
        state: Mapping[str, Any],
        folder: Path,
        partials: Path,
        callbacks: Callbacks,
    ) -> None:
        """See `execute`."""
        execute(
            shards,
            self.reader,
            folder,
            partials=partials,
            workers=self.workers,
            callbacks=callbacks,
            low_memory=self.low_memory,
        )
