"""A shard that threads are writing: its file, its spill files, and how its rows are made."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from ..checkpoint.reader import Reader
from ..planning.shards import PlannedShard
from ..tensors.dtypes import DType
from ..tensors.encoding_loss import EncodingLoss, measured_step
from ..transforms.encode import encode_rows
from ..transforms.materialize import materialize_rows
from ..transforms.output_tensor import OutputTensor, Segment
from ..transforms.tiles import TargetRows
from .checksums import RunningChecksum
from .shard_file import ShardFile
from .shard_journal import ShardJournal, WrittenPart
from .shard_summary import ShardSummary
from .spill_file import SpilledTranspose
from .spilled_scales import SpilledScales, scales_file

__all__ = ["JOURNAL_SECONDS", "ShardInProgress", "spilled_segments"]

JOURNAL_SECONDS = 5.0
"""How much work an interruption costs, at most, and some chunks. Syncing more often than this
would take more than 1 % of the time."""


class ShardInProgress:
    """A shard that is being written, from any thread.

    Args:
        shard: The shard.
        chunk_nbytes: The size of a chunk in bytes.
        folder: The folder for spill files, which are created at once.
        checksum: Whether the SHA-256 is computed.
        written: The part of the shard that an interrupted run has written.
        journal: Where to keep what is written; None if an interrupted shard is not resumed.
    """

    def __init__(
        self,
        shard: PlannedShard,
        chunk_nbytes: int,
        folder: Path,
        *,
        checksum: bool,
        written: WrittenPart,
        journal: ShardJournal | None,
    ) -> None:
        self.shard = shard
        self.checksum = RunningChecksum() if checksum else None
        self.file: ShardFile | None = None
        """None until the first chunk: spill files begin earlier."""
        self.transposes: dict[Segment, SpilledTranspose] = {}
        self._chunk_nbytes = chunk_nbytes
        self._counting = threading.Lock()
        self._written = written
        self._written_beyond: set[int] = set()
        """Chunks that are written while one before them is not."""
        self._losses: dict[int, dict[str, EncodingLoss]] = {}
        """Of these chunks, and of those that are being made."""
        self._journal = journal
        self._saving = threading.Lock()
        self._saved_at = time.monotonic()
        self._saved_nbytes = written.nbytes
        self._scales: dict[Segment, SpilledScales] = {}
        """By the segments of blocks and those of scales."""
        for number, (segment, _) in enumerate(shard.spilled(written.nbytes)):
            file = folder / f"{shard.name}.spill-{number}"
            self.transposes[segment] = SpilledTranspose(segment, file, chunk_nbytes)
        for number, (blocks, scales) in enumerate(shard.encoded_pairs()):
            first = shard.begin_of(blocks)
            if shard.begin_of(scales) + scales.nbytes <= written.nbytes:
                continue
            end = -(-(first + blocks.nbytes) // chunk_nbytes)
            chunks = end - max(first, written.nbytes) // chunk_nbytes
            file = scales_file(folder, shard, number)
            spilled = SpilledScales(
                blocks, scales, max(0, chunks), file, existing=first < written.nbytes
            )
            self._scales |= dict.fromkeys((*blocks.segments, *scales.segments), spilled)

    @property
    def summary(self) -> ShardSummary:
        """What is known of the shard once all of it is written."""
        checksum = self.checksum
        return ShardSummary(
            None if checksum is None else checksum.hexdigest(), self._written.losses
        )

    def make_rows(
        self,
        chunk: int,
        tensor: OutputTensor,
        reader: Reader,
        stop: threading.Event,
        ahead: int,
        segment: Segment,
        targets: list[TargetRows],
        dtype: DType,
    ) -> None:
        """Make rows of a segment (see `MakeRows`), from its spill file if it has one.

        Args:
            chunk: The first byte of the chunk that the rows are for.
            tensor: The tensor that the segment belongs to.
            reader: Reads the source.
            stop: Ends all waiting when it is set.
            ahead: The system reads the rows of this many calls ahead in a spill file.
            segment: The segment.
            targets: The rows to make.
            dtype: The dtype to make them in.
        """
        if segment in self.transposes:
            self.transposes[segment].read_rows(targets, dtype, stop, ahead)
        elif segment.encoding is not None and not tensor.made_with:
            self._encode_rows(chunk, tensor, segment, targets, reader)
        elif segment in self._scales:
            self._scales[segment].read_rows(segment, targets, stop)
        else:
            materialize_rows(segment, targets, dtype, reader)

    def _encode_rows(
        self,
        chunk: int,
        tensor: OutputTensor,
        segment: Segment,
        targets: list[TargetRows],
        reader: Reader,
    ) -> None:
        """Make rows of blocks, and write their scales to the spill file if there is one."""
        loss = EncodingLoss(measured_step(tensor.nbytes // segment.row_shape[0]))
        found = encode_rows(segment, targets, reader, loss)
        if segment in self._scales:
            for target, scales in zip(targets, found, strict=True):
                self._scales[segment].write_rows(segment, target.first, scales)
        with self._counting:
            _add_losses(self._losses.setdefault(chunk, {}), {tensor.name: loss})

    def end_tensor(self, tensor: OutputTensor) -> None:
        """Note that all bytes of a tensor in one chunk are made."""
        spilled = self._scales.get(tensor.segments[0])
        if spilled is not None and not tensor.made_with:
            spilled.end_chunk()

    def end_chunk(self, begin: int) -> bool:
        """Note that a chunk is written; return whether the shard is."""
        with self._counting:
            self._written_beyond.add(begin)
            written, losses = self._written.nbytes, dict(self._written.losses)
            while written in self._written_beyond:
                self._written_beyond.remove(written)
                _add_losses(losses, self._losses.pop(written, {}))
                written += self._chunk_nbytes
            self._written = WrittenPart(written, losses)
            return written >= self.shard.nbytes

    def save(self, check: Callable[[], None]) -> None:
        """Write the journal, if that has not been done for some time.

        Args:
            check: Raises an error if the source has changed or the folder is another run's.
        """
        if self._journal is None or self.file is None or not self._saving.acquire(blocking=False):
            return
        try:
            if time.monotonic() - self._saved_at < JOURNAL_SECONDS:
                return
            with self._counting:
                written = self._written
            if self._saved_nbytes < written.nbytes < self.shard.nbytes:
                for scales in {*self._scales.values()}:
                    scales.sync()
                self.file.sync()
                self._journal.write(written, check)
                self._saved_nbytes = written.nbytes
            self._saved_at = time.monotonic()
        finally:
            self._saving.release()

    def stop_saving(self) -> None:
        """Wait for the journal that is being written, and write no other: the shard is complete."""
        self._saving.acquire()

    def finish(self) -> None:
        """Delete the spill files and the journal: the shard has its final name."""
        self.file = None
        self._close_spill_files(keep=False)
        if self._journal is not None:
            self._journal.close()

    def close(self) -> None:
        """Close all files of an unfinished shard; keep what the journal says is written."""
        keep = self._saved_nbytes > 0
        self._close_spill_files(keep=keep)
        if self.file is not None:
            self.file.close(keep=keep)

    def _close_spill_files(self, *, keep: bool) -> None:
        for transpose in self.transposes.values():
            transpose.close()
        for scales in self._scales.values():
            scales.close(keep=keep)


def _add_losses(losses: dict[str, EncodingLoss], more: Mapping[str, EncodingLoss]) -> None:
    """Add what was lost of more values; the losses that were there are not changed."""
    for name, loss in more.items():
        total = replace(losses[name]) if name in losses else EncodingLoss(loss.step)
        total.add(loss)
        losses[name] = total


def spilled_segments(shard: PlannedShard) -> set[Segment]:
    """Return the segments of a shard that are read from spill files."""
    transposed = {segment for segment, _ in shard.spilled()}
    return transposed.union(*(scales.segments for _, scales in shard.encoded_pairs()))
