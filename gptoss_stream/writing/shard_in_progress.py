"""A shard that threads are writing: its file, its spill files, and how its rows are made."""

from __future__ import annotations

import threading
from pathlib import Path

from ..checkpoint.reader import Reader
from ..planning.shards import PlannedShard
from ..tensors.dtypes import DType
from ..tensors.mxfp4_encoder import EncodingLoss, measured_step
from ..transforms.encode import encode_rows
from ..transforms.materialize import materialize_rows
from ..transforms.output_tensor import OutputTensor, Segment
from ..transforms.tiles import TargetRows
from .checksums import RunningChecksum
from .shard_file import ShardFile
from .shard_summary import ShardSummary
from .spill_file import SpilledTranspose
from .spilled_scales import SpilledScales

__all__ = ["ShardInProgress", "spilled_segments"]


class ShardInProgress:
    """A shard that is being written, from any thread.

    Args:
        shard: The shard.
        chunk_nbytes: The size of a chunk in bytes.
        folder: The folder for spill files, which are created at once.
        checksum: Whether the SHA-256 is computed.
    """

    def __init__(
        self, shard: PlannedShard, chunk_nbytes: int, folder: Path, *, checksum: bool
    ) -> None:
        self.shard = shard
        self.chunks_left = -(-shard.nbytes // chunk_nbytes)
        self.checksum = RunningChecksum() if checksum else None
        self.file: ShardFile | None = None
        """None until the first chunk: spill files begin earlier."""
        self.counting = threading.Lock()
        self.transposes: dict[Segment, SpilledTranspose] = {}
        self._scales: dict[Segment, SpilledScales] = {}
        """By the segments of blocks and those of scales."""
        self._losses: dict[str, EncodingLoss] = {}
        for number, (segment, _) in enumerate(shard.spilled()):
            file = folder / f"{shard.name}.spill-{number}"
            self.transposes[segment] = SpilledTranspose(segment, file, chunk_nbytes)
        for number, (blocks, scales) in enumerate(shard.encoded_pairs()):
            first = shard.offsets[shard.tensors.index(blocks)]
            last = first + blocks.nbytes - 1
            chunks = last // chunk_nbytes - first // chunk_nbytes + 1
            file = folder / f"{shard.name}.scales-{number}"
            spilled = SpilledScales(blocks, scales, chunks, file)
            self._scales |= dict.fromkeys((*blocks.segments, *scales.segments), spilled)

    @property
    def summary(self) -> ShardSummary:
        """What is known of the shard once all of it is written."""
        checksum = self.checksum
        return ShardSummary(None if checksum is None else checksum.hexdigest(), self._losses)

    def make_rows(
        self,
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
            self._encode_rows(tensor, segment, targets, reader)
        elif segment in self._scales:
            self._scales[segment].read_rows(segment, targets, stop)
        else:
            materialize_rows(segment, targets, dtype, reader)

    def _encode_rows(
        self, tensor: OutputTensor, segment: Segment, targets: list[TargetRows], reader: Reader
    ) -> None:
        """Make rows of blocks, and write their scales to the spill file if there is one."""
        loss = EncodingLoss(measured_step(tensor.nbytes // segment.row_shape[0]))
        found = encode_rows(segment, targets, reader, loss)
        if segment in self._scales:
            for target, scales in zip(targets, found, strict=True):
                self._scales[segment].write_rows(segment, target.first, scales)
        with self.counting:
            self._losses.setdefault(tensor.name, EncodingLoss(loss.step)).add(loss)

    def end_tensor(self, tensor: OutputTensor) -> None:
        """Note that all bytes of a tensor in one chunk are made."""
        spilled = self._scales.get(tensor.segments[0])
        if spilled is not None and not tensor.made_with:
            spilled.end_chunk()

    def close_spill_files(self) -> None:
        """Close and delete the spill files."""
        for transpose in self.transposes.values():
            transpose.close()
        for scales in self._scales.values():
            scales.close()

    def close(self) -> None:
        """Close all files and delete those that are not finished."""
        self.close_spill_files()
        if self.file is not None:
            self.file.discard()


def spilled_segments(shard: PlannedShard) -> set[Segment]:
    """Return the segments of a shard that are read from spill files."""
    transposed = {segment for segment, _ in shard.spilled()}
    return transposed.union(*(scales.segments for _, scales in shard.encoded_pairs()))
