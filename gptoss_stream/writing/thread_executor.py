"""Writes shards in threads of this process, chunk by chunk.

A chunk is an aligned run of a shard's bytes, small enough for memory. Threads take chunks in
order, make each in a buffer and hand it to a few others, which write it at its offset, so that some
convert while others wait for the disk. The thread that completes a shard gives it its final name.
Memory is set by the number of threads and the size of a chunk, not by any tensor, shard or layer.
The bytes written depend on the plan alone.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from .._utils.memory import peak_rss_nbytes
from .._utils.thread_pool import Buffer, Rest, Step, run_steps
from ..checkpoint.reader import ElementRange, Reader, ReadSchedule
from ..errors import OutputError
from ..planning.shards import PlannedShard, compiled_nbytes
from ..tensors import compiled
from ..transforms.materialize import materialize
from ..transforms.output_tensor import Segment, element_ranges
from . import executor
from .executor import Callbacks
from .safetensors_check import find_problem
from .shard_file import ShardFile
from .shard_in_progress import ShardInProgress, spilled_segments
from .shard_journal import ShardJournal, WrittenPart
from .spill_file import SpilledTranspose

__all__ = ["ThreadExecutor"]

_T = TypeVar("_T")
_MAX_SPREAD = 3
"""Chunks between two blocks of a spilled transposition, at most. Spilled bytes wait on the disk,
and further ahead are the embeddings, which read as much as they write where experts read a quarter
of it."""


class _PlannedStep(NamedTuple):
    """A chunk of a shard, or a block of a segment that is transposed through a spill file."""

    shard: PlannedShard
    start: int
    """The first byte of the chunk, or the number of the block to spill."""
    spilled: Segment | None = None


class ThreadExecutor:
    """An `Executor` that writes the shards in threads of this process.

    Args:
        reader: Reads the source.
        threads: The number of threads.
        low_memory: Whether to drop pages of spill files from the page cache as soon as they are
            written, instead of leaving that to the system.
        chunk_nbytes: The size of a chunk in bytes, a multiple of 4096.
    """

    in_process = True

    def __init__(
        self,
        reader: Reader,
        threads: int,
        *,
        low_memory: bool = False,
        chunk_nbytes: int | None = None,
    ) -> None:
        self._reader = reader
        self._threads = threads
        self._low_memory = low_memory
        self._chunk_nbytes = chunk_nbytes or executor.CHUNK_NBYTES
        self._journals: dict[str, ShardJournal] = {}
        self._written: defaultdict[str, WrittenPart] = defaultdict(WrittenPart)
        """What an interrupted run has written, by the shards' names."""

    @property
    def peak_rss(self) -> int:
        """The peak resident memory of this process, in bytes."""
        return peak_rss_nbytes()

    def setup(self, work: Path | None) -> None:
        """Do nothing: this process is ready."""

    def find_written(self, shards: Sequence[PlannedShard], partial_folder: Path, run: str) -> int:
        """Find what an interrupted run has written (see `Executor.find_written`)."""
        for shard in shards:
            journal = ShardJournal(partial_folder, shard, run, self._chunk_nbytes)
            self._journals[shard.name] = journal
            self._written[shard.name] = journal.read()
            if not self._written[shard.name].nbytes:
                journal.clear()
        return sum(part.nbytes for part in self._written.values())

    def write_shards(
        self,
        shards: Sequence[PlannedShard],
        folder: Path,
        partial_folder: Path,
        callbacks: Callbacks,
        *,
        run: str = "",
        checksums: bool = False,
    ) -> None:
        """Write shards (see `Executor.write_shards`).

        After an error, shards that were finished stay, and partial files that have a journal.
        """
        self._folder, self._partial_folder = folder, partial_folder
        self._callbacks, self._checksums = callbacks, checksums
        self._stop = threading.Event()
        self._in_progress: dict[str, ShardInProgress] = {}
        if not self._low_memory:
            compiled.enable_for(compiled_nbytes(shards))
        self._spilled = {shard.name: spilled_segments(shard) for shard in shards}
        self._order = self._ordered_steps(shards)
        self._reader.set_schedule(ReadSchedule(len(self._order), self._ranges_read), self._stop)
        try:
            writers = executor.num_writers(self._threads)
            run_steps(self._steps(), self._threads, self._chunk_nbytes, self._stop, writers)
        finally:
            for progress in list(self._in_progress.values()):
                progress.close()

    # --- the order of the steps --------------------------------------------------------------

    def _ordered_steps(self, shards: Sequence[PlannedShard]) -> list[_PlannedStep]:
        """Return the chunks of all shards, and spread among them the blocks to be spilled.

        All blocks of a segment come before the first chunk that needs them. Reading them ahead of
        that overlaps with writing.
        """
        steps: list[_PlannedStep] = []
        for shard in shards:
            written = self._written[shard.name].nbytes
            # What is written is read again for its checksum alone.
            starts = range(0 if self._checksums else written, shard.nbytes, self._chunk_nbytes)
            chunks = [_PlannedStep(shard, start) for start in starts]
            steps += chunks
            for segment, offset in shard.spilled(written):
                first = max(offset, written) // self._chunk_nbytes * self._chunk_nbytes
                needed = steps.index(_PlannedStep(shard, first))
                count = len(SpilledTranspose.blocks_of(segment, self._chunk_nbytes))
                blocks = [_PlannedStep(shard, block, segment) for block in range(count)]
                steps = _spread(blocks, steps, max(0, needed - _MAX_SPREAD * count), needed)
        return steps

    def _ranges_read(self, number: int) -> Iterator[ElementRange]:
        """Yield what a step reads of the source."""
        shard, start, segment = self._order[number]
        if segment is None and start < self._written[shard.name].nbytes:
            return
        if segment is not None:
            block = SpilledTranspose.blocks_of(segment, self._chunk_nbytes)[start]
            yield from segment.operand.element_ranges(block)
            return
        for tensor, low, high, _ in shard.overlapping(start, start + self._chunk_nbytes):
            yield from element_ranges(tensor, low, high, without=self._spilled[shard.name])

    def _steps(self) -> Iterator[Step]:
        """Yield every step as a function, and create the files that it needs."""
        for number, (shard, start, segment) in enumerate(self._order):
            progress = self._in_progress.get(shard.name) or self._begin(shard)
            if segment is not None:
                transpose = progress.transposes[segment]
                yield partial(self._run_step, number, partial(self._spill, transpose, start))
                continue
            if progress.file is None:
                self._callbacks.on_shard_start(shard.name, self._stop)
                if self._stop.is_set():
                    return
                progress.file = ShardFile(
                    self._partial_folder / shard.name,
                    self._folder / shard.name,
                    shard.nbytes,
                    partial(self._check_file, shard),
                    existing=self._written[shard.name].nbytes > 0,
                )
            make = (
                self._make_chunk if start >= self._written[shard.name].nbytes else self._read_chunk
            )
            yield partial(self._run_step, number, partial(make, progress, progress.file, start))

    def _begin(self, shard: PlannedShard) -> ShardInProgress:
        progress = ShardInProgress(
            shard,
            self._chunk_nbytes,
            self._partial_folder,
            checksum=self._checksums,
            written=self._written[shard.name],
            journal=self._journals.get(shard.name),
        )
        self._in_progress[shard.name] = progress
        return progress

    # --- in the threads ----------------------------------------------------------------------

    def _run_step(self, number: int, step: Step, buffer: Buffer) -> Rest | None:
        self._reader.begin_step(number)
        rest = step(buffer)
        self._reader.end_step(number)
        return rest

    def _spill(self, transpose: SpilledTranspose, block: int, buffer: Buffer) -> None:
        transpose.spill(block, self._reader, buffer, drop_cache=self._low_memory)

    def _read_chunk(
        self, progress: ShardInProgress, file: ShardFile, begin: int, buffer: Buffer
    ) -> None:
        """Add a chunk that is written to the checksum."""
        file.read(buffer[: self._chunk_nbytes], begin)
        assert progress.checksum is not None
        progress.checksum.add(begin, buffer[: self._chunk_nbytes], self._stop)

    def _make_chunk(
        self, progress: ShardInProgress, file: ShardFile, begin: int, buffer: Buffer
    ) -> Rest:
        """Make the bytes of a shard from `begin` on; returns a function that writes them."""
        shard = progress.shard
        end = min(begin + self._chunk_nbytes, shard.nbytes)
        if begin < len(shard.header):
            header = shard.header[begin:end]
            buffer[: len(header)] = np.frombuffer(header, np.uint8)
        for tensor, low, high, offset in shard.overlapping(begin, end):
            out = buffer[offset - begin : offset - begin + high - low]
            materialize(
                tensor,
                low,
                high,
                out,
                partial(progress.make_rows, begin, tensor, self._reader, self._stop, self._threads),
            )
            progress.end_tensor(tensor)
        return partial(self._write_chunk, progress, file, begin, buffer, end - begin)

    def _write_chunk(
        self, progress: ShardInProgress, file: ShardFile, begin: int, buffer: Buffer, length: int
    ) -> None:
        """Write the bytes of a shard from `begin` on, and commit a complete shard."""
        if self._stop.is_set():
            return
        padded = min(-(-length // 4096) * 4096, len(buffer))
        buffer[length:padded] = 0
        file.write(buffer[:padded], begin)
        if progress.checksum is not None:
            progress.checksum.add(begin, buffer[:length], self._stop)
        self._callbacks.on_progress(length)
        if progress.end_chunk(begin):
            self._commit(progress, file)
        else:
            progress.save(self._check)

    def _check(self) -> None:
        """Raise an error if the source has changed, or the run is to end."""
        self._reader.check_unchanged()
        self._callbacks.on_progress(0)

    def _check_file(self, shard: PlannedShard, file: Path) -> None:
        """Check that a file can be read, and that the folder is still this run's."""
        _check_header(shard, file)
        self._callbacks.on_progress(0)  # raises if it is not

    def _commit(self, progress: ShardInProgress, file: ShardFile) -> None:
        if self._stop.is_set():
            return  # a chunk may have been skipped
        name = progress.shard.name
        progress.stop_saving()
        self._reader.check_unchanged()
        self._callbacks.before_commit(name, progress.summary)
        file.commit()
        progress.finish()
        del self._in_progress[name]
        self._callbacks.on_shard_finished(name)


def _spread(some: list[_T], others: list[_T], begin: int, end: int) -> list[_T]:
    """Return `others` with `some` spread evenly, in order, over the positions `begin … end`."""
    merged = others[:begin]
    for number, item in enumerate(some):
        low, high = ((end - begin) * n // len(some) + begin for n in (number, number + 1))
        merged.append(item)
        merged += others[low:high]
    return merged + others[end:]


def _check_header(shard: PlannedShard, file: Path) -> None:
    """Check that the safetensors package reads the header that was written."""
    problem = find_problem(file, ((t.name, t.dtype, t.shape) for t in shard.tensors))
    if problem is not None:
        raise OutputError(
            f"{file}: safetensors cannot read what was written: {problem}; check the disk, then "
            "run the same command again"
        )
