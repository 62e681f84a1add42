"""Writes shards in threads of this process, chunk by chunk.

A chunk is an aligned run of a shard's bytes, small enough for memory. Threads take chunks in
order, make each in a buffer of their own and write it at its offset, so that some convert while
others wait for the disk. The thread that completes a shard gives it its final name. Memory is set
by the number of threads and the size of a chunk, not by any tensor, shard or layer. The bytes
written depend on the plan alone.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from .._utils.memory import peak_rss_nbytes
from .._utils.thread_pool import Buffer, Step, run_steps
from ..checkpoint.reader import ElementRange, Reader, ReadSchedule
from ..errors import OutputError
from ..planning.shards import PlannedShard
from ..tensors.dtypes import DType
from ..tensors.mxfp4_encoder import EncodingLoss, measured_step
from ..transforms.encode import encode_rows
from ..transforms.materialize import materialize, materialize_rows
from ..transforms.output_tensor import OutputTensor, Segment, element_ranges
from ..transforms.tiles import TargetRows
from . import executor
from .checksums import RunningChecksum
from .executor import Callbacks
from .safetensors_check import find_problem
from .shard_file import ShardFile
from .shard_summary import ShardSummary
from .spill_file import SpilledTranspose
from .spilled_scales import SpilledScales

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


@dataclass
class _ShardInProgress:
    """A shard that threads are writing: its file, its spill files, and the chunks to come."""

    shard: PlannedShard
    chunks_left: int
    checksum: RunningChecksum | None
    transposes: dict[Segment, SpilledTranspose] = field(default_factory=dict)
    scales: dict[Segment, SpilledScales] = field(default_factory=dict)
    """By the segments of blocks and those of scales."""
    losses: dict[str, EncodingLoss] = field(default_factory=dict)
    """What encoding has lost, by the name of the tensor of blocks."""
    file: ShardFile | None = None
    """None until the first chunk: spill files begin earlier."""
    counting: threading.Lock = field(default_factory=threading.Lock)

    def close(self) -> None:
        """Close all files and delete those that are not finished."""
        self.close_spill_files()
        if self.file is not None:
            self.file.discard()

    def close_spill_files(self) -> None:
        """Close and delete the spill files."""
        for transpose in self.transposes.values():
            transpose.close()
        for scales in self.scales.values():
            scales.close()


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

    @property
    def peak_rss(self) -> int:
        """The peak resident memory of this process, in bytes."""
        return peak_rss_nbytes()

    def setup(self, work: Path | None) -> None:
        """Do nothing: this process is ready."""

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

        After an error, shards that were finished stay and no partial file does.
        """
        self._folder, self._partial_folder = folder, partial_folder
        self._callbacks, self._checksums = callbacks, checksums
        self._stop = threading.Event()
        self._in_progress: dict[str, _ShardInProgress] = {}
        self._spilled = {shard.name: _spilled_segments(shard) for shard in shards}
        self._order = self._ordered_steps(shards)
        self._reader.set_schedule(ReadSchedule(len(self._order), self._ranges_read), self._stop)
        try:
            run_steps(self._steps(), self._threads, self._chunk_nbytes, self._stop)
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
            starts = range(0, shard.nbytes, self._chunk_nbytes)
            chunks = [_PlannedStep(shard, start) for start in starts]
            steps += chunks
            for segment, offset in shard.spilled():
                needed = steps.index(chunks[offset // self._chunk_nbytes])
                count = len(SpilledTranspose.blocks_of(segment, self._chunk_nbytes))
                blocks = [_PlannedStep(shard, block, segment) for block in range(count)]
                steps = _spread(blocks, steps, max(0, needed - _MAX_SPREAD * count), needed)
        return steps

    def _ranges_read(self, number: int) -> Iterator[ElementRange]:
        """Yield what a step reads of the source."""
        shard, start, segment = self._order[number]
        if segment is not None:
            block = SpilledTranspose.blocks_of(segment, self._chunk_nbytes)[start]
            yield from segment.operand.element_ranges(block)
            return
        for tensor, low, high, _ in shard.overlapping(start, start + self._chunk_nbytes):
            yield from element_ranges(tensor, low, high, without=self._spilled[shard.name])

    def _steps(self) -> Iterator[Step]:
        """Yield every step as a function, and create the files that it needs."""
        for number, (shard, start, segment) in enumerate(self._order):
            progress = self._in_progress.get(shard.name) or self._begin_shard(shard)
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
                    partial(_check_header, shard),
                )
            write = partial(self._write_chunk, progress, progress.file, start)
            yield partial(self._run_step, number, write)

    def _begin_shard(self, shard: PlannedShard) -> _ShardInProgress:
        chunks = -(-shard.nbytes // self._chunk_nbytes)
        progress = _ShardInProgress(shard, chunks, RunningChecksum() if self._checksums else None)
        self._in_progress[shard.name] = progress
        for number, (segment, _) in enumerate(shard.spilled()):
            file = self._partial_folder / f"{shard.name}.spill-{number}"
            progress.transposes[segment] = SpilledTranspose(segment, file, self._chunk_nbytes)
        for number, (blocks, scales) in enumerate(shard.encoded_pairs()):
            offset = shard.offsets[shard.tensors.index(blocks)]
            last = (offset + blocks.nbytes - 1) // self._chunk_nbytes
            count = last - offset // self._chunk_nbytes + 1
            file = self._partial_folder / f"{shard.name}.scales-{number}"
            spilled = SpilledScales(blocks, scales, count, file)
            progress.scales |= dict.fromkeys((*blocks.segments, *scales.segments), spilled)
        return progress

    # --- in the threads ----------------------------------------------------------------------

    def _run_step(self, number: int, step: Step, buffer: Buffer) -> None:
        self._reader.begin_step(number)
        step(buffer)
        self._reader.end_step(number)

    def _spill(self, transpose: SpilledTranspose, block: int, buffer: Buffer) -> None:
        transpose.spill(block, self._reader, buffer, drop_cache=self._low_memory)

    def _write_chunk(
        self, progress: _ShardInProgress, file: ShardFile, begin: int, buffer: Buffer
    ) -> None:
        """Make the bytes of a shard from `begin` on, write them, and commit a complete shard."""
        shard = progress.shard
        end = min(begin + self._chunk_nbytes, shard.nbytes)
        if begin < len(shard.header):
            header = shard.header[begin:end]
            buffer[: len(header)] = np.frombuffer(header, np.uint8)
        for tensor, low, high, offset in shard.overlapping(begin, end):
            out = buffer[offset - begin : offset - begin + high - low]
            materialize(tensor, low, high, out, partial(self._materialize_rows, progress, tensor))
            if not tensor.made_with and tensor.segments[0] in progress.scales:
                progress.scales[tensor.segments[0]].end_chunk()
        if self._stop.is_set():
            return
        length = end - begin
        padded = min(-(-length // 4096) * 4096, len(buffer))
        buffer[length:padded] = 0
        file.write(buffer[:padded], begin)
        if progress.checksum is not None:
            progress.checksum.add(begin, buffer[:length], self._stop)
        self._callbacks.on_progress(length)
        with progress.counting:
            progress.chunks_left -= 1
            is_last = progress.chunks_left == 0
        if is_last:
            self._commit(progress, file)

    def _materialize_rows(
        self,
        progress: _ShardInProgress,
        tensor: OutputTensor,
        segment: Segment,
        targets: list[TargetRows],
        dtype: DType,
    ) -> None:
        """Make rows of a segment, from its spill file if it has one."""
        transpose = progress.transposes.get(segment) if progress.transposes else None
        scales = progress.scales.get(segment) if progress.scales else None
        if transpose is not None:
            transpose.read_rows(targets, dtype, self._stop, ahead=self._threads)
        elif scales is not None and tensor.made_with:
            scales.read_rows(segment, targets, self._stop)
        elif segment.encoding is not None and not tensor.made_with:
            self._encode_rows(progress, tensor, segment, targets, scales)
        else:
            materialize_rows(segment, targets, dtype, self._reader)

    def _encode_rows(
        self,
        progress: _ShardInProgress,
        tensor: OutputTensor,
        segment: Segment,
        targets: list[TargetRows],
        scales: SpilledScales | None,
    ) -> None:
        """Make rows of blocks, and write their scales to the spill file if there is one."""
        loss = EncodingLoss(measured_step(tensor.nbytes // segment.row_shape[0]))
        found = encode_rows(segment, targets, self._reader, loss)
        if scales is not None:
            for target, rows in zip(targets, found, strict=True):
                scales.write_rows(segment, target.first, rows)
        with progress.counting:
            progress.losses.setdefault(tensor.name, EncodingLoss(loss.step)).add(loss)

    def _commit(self, progress: _ShardInProgress, file: ShardFile) -> None:
        if self._stop.is_set():
            return  # a chunk may have been skipped
        name, checksum = progress.shard.name, progress.checksum
        self._reader.check_unchanged()
        sha256 = None if checksum is None else checksum.hexdigest()
        self._callbacks.before_commit(name, ShardSummary(sha256, progress.losses))
        file.commit()
        progress.close_spill_files()
        del self._in_progress[name]
        self._callbacks.on_shard_finished(name)


def _spilled_segments(shard: PlannedShard) -> set[Segment]:
    """Return the segments of a shard that are read from spill files."""
    transposed = {segment for segment, _ in shard.spilled()}
    return transposed.union(*(scales.segments for _, scales in shard.encoded_pairs()))


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
