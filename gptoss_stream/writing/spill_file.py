"""Transposes a large matrix, such as `unembed.W_U`, through a spill file.

A shard is written in order, and the first row of a transposed matrix takes the first element of
every row of the source. Reading a matrix of 1.16 GB in columns would read it from the disk again
for each chunk of the output. Instead it is read once, in blocks of rows. Each block is written to
the spill file transposed, and a row of the output is then one run of bytes of every block.

Example: a matrix [5, 3] in blocks of 2 rows gives the slots [3, 2], [3, 2] and [3, 1] of the spill
file. Row 1 of the transposed matrix [3, 5] is row 1 of each slot, one after another.
"""

from __future__ import annotations

import threading
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from .._utils.buffers import ALIGNMENT
from .._utils.memory import available_nbytes
from .._utils.temporary_file import TemporaryFile
from ..checkpoint.reader import Reader
from ..tensors.cast import STORAGE, cast
from ..tensors.dtypes import DType
from ..transforms.materialize import materialize_rows
from ..transforms.operands import spilled_dtype
from ..transforms.output_tensor import Segment
from ..transforms.tiles import TargetRows

__all__ = ["SpilledTranspose", "is_memory_low"]

_WRITEBACK_BLOCKS = 8  # blocks that the system may still be writing to the disk
_MIN_VIEW_NBYTES = 512
_SPARE_NBYTES = 1_000_000_000


def is_memory_low(spill_nbytes: int) -> bool:
    """Return whether the page cache has too little room for spilled bytes and read-ahead."""
    return available_nbytes() < 2 * spill_nbytes + _SPARE_NBYTES


class SpilledTranspose:
    """A segment of an output tensor that is transposed through a spill file, from any thread.

    The file is written through the page cache on purpose: with enough memory its bytes never reach
    the disk, with little memory it is written like any other file. Once `spill` has returned for
    each of `blocks`, `read_rows` gives the rows of the segment.

    Args:
        segment: A transposition of a dense operand.
        file: Where to create the spill file.
        block_nbytes: The most bytes of a block.
    """

    def __init__(self, segment: Segment, file: Path, block_nbytes: int) -> None:
        self._segment = segment
        self._dtype = _dtype(segment)
        self._block_rows = _block_rows(segment, block_nbytes)
        self._row_nbytes = segment.elements // segment.operand.shape[0] * self._dtype.itemsize
        self.blocks = self.blocks_of(segment, block_nbytes)
        self._slot_nbytes = -(-self._block_rows * self._row_nbytes // ALIGNMENT) * ALIGNMENT
        self._blocks_left = len(self.blocks)
        self._counting = threading.Lock()
        self._is_ready = threading.Event()
        self._file = TemporaryFile(file)
        # Each run of bytes is read once: reading more than was asked for would be waste.
        self._file.advise(0, 0, "POSIX_FADV_RANDOM")

    @staticmethod
    def blocks_of(segment: Segment, block_nbytes: int) -> list[tuple[int, int]]:
        """Return the source rows [begin, end) of each block of at most `block_nbytes`."""
        rows = segment.operand.shape[0]
        return list(pairwise([*range(0, rows, _block_rows(segment, block_nbytes)), rows]))

    def spill(
        self, block: int, reader: Reader, buffer: np.ndarray[Any, Any], *, drop_cache: bool
    ) -> None:
        """Read one block, transpose it, and write it to the spill file.

        Args:
            block: The number of the block.
            reader: Reads the source.
            buffer: Memory for the block, uint8.
            drop_cache: Whether to drop what is written from the page cache.
        """
        begin, end = self.blocks[block]
        rearrangement = self._segment.rearrangement
        data = buffer[: (end - begin) * self._row_nbytes]
        rows = data.view(STORAGE[self._dtype]).reshape(
            rearrangement.num_rows, *rearrangement.row_shape[:-1], end - begin
        )
        targets = [TargetRows(0, rows)]
        materialize_rows(self._segment, targets, self._dtype, reader, (begin, end))
        self._file.write(data, block * self._slot_nbytes)
        if drop_cache:
            self._drop_cache(block)
        with self._counting:
            self._blocks_left -= 1
            if self._blocks_left == 0:
                self._is_ready.set()

    def _drop_cache(self, block: int) -> None:
        # Starts writing what is not yet on the disk; the call for a later block drops it.
        begin = max(0, block - _WRITEBACK_BLOCKS) * self._slot_nbytes
        nbytes = (block + 1) * self._slot_nbytes - begin
        self._file.advise(begin, nbytes, "POSIX_FADV_DONTNEED")

    def read_rows(
        self, targets: list[TargetRows], dtype: DType, stop: threading.Event, ahead: int
    ) -> None:
        """Read rows of the transposed segment; waits for blocks that are still being spilled.

        Args:
            targets: Adjacent rows and the memory for them (see `materialize.MakeRows`).
            dtype: The dtype of that memory.
            stop: Ends the waiting when it is set.
            ahead: The system reads the rows of this many calls ahead.
        """
        while not self._is_ready.wait(0.1):
            if stop.is_set():
                return
        row_shape = self._segment.rearrangement.row_shape
        first, last = targets[0].first, targets[-1].end
        itemsize = self._dtype.itemsize
        # Bytes that a row of the output has for each source row of a block.
        nbytes_per_source_row = prod(row_shape[:-1]) * itemsize
        # Read into the output directly, unless that takes a view for every few elements.
        is_direct = dtype is self._dtype and self._block_rows * itemsize >= _MIN_VIEW_NBYTES
        rows = [
            row.data.cast("B")
            for target in (targets if is_direct else ())
            for row in target.out.reshape(-1, row_shape[-1])
        ]
        for block, (begin, end) in enumerate(self.blocks):
            row_nbytes = nbytes_per_source_row * (end - begin)
            offset = block * self._slot_nbytes + first * row_nbytes
            nbytes = (last - first) * row_nbytes
            self._file.advise(offset + ahead * nbytes, nbytes, "POSIX_FADV_WILLNEED")
            if is_direct:
                views = [row[begin * itemsize : end * itemsize] for row in rows]
                self._file.read(views, offset)
                continue
            found = np.empty((last - first, *row_shape[:-1], end - begin), STORAGE[self._dtype])
            self._file.read([found.data.cast("B")], offset)
            for target in targets:
                part = found[target.first - first : target.end - first]
                cast(part, self._dtype, target.out[..., begin:end], dtype)

    def close(self) -> None:
        """Close and delete the spill file."""
        self._file.close()


def _block_rows(segment: Segment, block_nbytes: int) -> int:
    row_nbytes = segment.elements // segment.operand.shape[0] * _dtype(segment).itemsize
    return max(1, block_nbytes // row_nbytes)


def _dtype(segment: Segment) -> DType:
    """Return the dtype of the spilled elements."""
    dtype = spilled_dtype(segment.operand)
    assert dtype is not None
    return dtype
