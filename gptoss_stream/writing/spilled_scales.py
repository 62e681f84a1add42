"""Keeps MXFP4 scales in a spill file until their place in the shard is written.

Blocks and scales are encoded in one pass, and in a shard the scales come after all blocks of their
tensor. The scales of one tensor can have 66 MB (gpt-oss-120b), so they do not wait in memory.
"""

from __future__ import annotations

import threading
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from .._utils.temporary_file import TemporaryFile
from ..planning.shards import PlannedShard
from ..transforms.output_tensor import OutputTensor, Segment
from ..transforms.tiles import TargetRows

__all__ = ["SpilledScales", "scales_file"]


def scales_file(folder: Path, shard: PlannedShard, number: int) -> Path:
    """Return the path of the spill file of a shard's pair of blocks and scales."""
    return folder / f"{shard.name}.scales-{number}"


class SpilledScales:
    """The scales of one tensor, from any thread.

    Once `end_chunk` was called for every chunk with blocks, `read_rows` gives the scales.

    Args:
        blocks: The tensor of blocks.
        scales: The tensor of scales.
        chunks: The number of chunks in which the blocks are still to be made.
        file: The spill file.
        existing: Whether it exists, with the scales of the other chunks.
    """

    def __init__(
        self,
        blocks: OutputTensor,
        scales: OutputTensor,
        chunks: int,
        file: Path,
        *,
        existing: bool,
    ) -> None:
        begins = list(accumulate((s.elements for s in scales.segments), initial=0))
        self._begins: dict[Segment, int] = {}
        for tensor in (blocks, scales):
            self._begins |= dict(zip(tensor.segments, begins, strict=False))
        self._chunks_left = chunks
        self._counting = threading.Lock()
        self._is_ready = threading.Event()
        if chunks == 0:
            self._is_ready.set()
        self._file = TemporaryFile(file, existing=existing)
        if not existing:
            self._file.resize(scales.nbytes)

    def write_rows(self, segment: Segment, first: int, scales: np.ndarray[Any, Any]) -> None:
        """Write the scales of rows whose blocks were made.

        Args:
            segment: The segment of the blocks.
            first: The first row's number in it.
            scales: The scales, [rows, groups] uint8, C-contiguous.
        """
        self._file.write(scales, self._begins[segment] + first * scales.shape[1])

    def end_chunk(self) -> None:
        """Count a chunk in which all blocks are made and their scales written here."""
        with self._counting:
            self._chunks_left -= 1
            if self._chunks_left == 0:
                self._is_ready.set()

    def read_rows(self, segment: Segment, targets: list[TargetRows], stop: threading.Event) -> None:
        """Read rows of the scales; waits for chunks that are still being made.

        Args:
            segment: The segment of the scales.
            targets: The rows, and the memory for them.
            stop: Ends the waiting when it is set.
        """
        while not self._is_ready.wait(0.1):
            if stop.is_set():
                return
        for target in targets:
            offset = self._begins[segment] + target.first * target.out.shape[1]
            self._file.read([target.out.data.cast("B")], offset)

    def sync(self) -> None:
        """Make the scales that were written durable."""
        self._file.sync()

    def close(self, *, keep: bool = False) -> None:
        """Close the spill file, and delete it unless it is to be kept."""
        self._file.close(keep=keep)
