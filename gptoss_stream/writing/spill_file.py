"""The one large transpose, `unembed.W_U`, through a scratch file.

A shard is written in order, and a transpose's output begins with the first element of every
input row: read in columns, a matrix of 1.16 GB would come from the disk once for each piece of
the output. Instead it is read once, in blocks of rows; each block goes into the scratch file
transposed; and a piece of the output is then a run of every block.
"""

from __future__ import annotations

import os
import threading
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from .._utils.buffers import ALIGNMENT
from .._utils.memory import available_nbytes
from ..checkpoint.reader import Reader
from ..planning.plan import Plan
from ..tensors.cast import STORAGE, cast
from ..tensors.dtypes import DType
from ..transforms.materialize import TargetRows, materialize_rows
from ..transforms.operands import as_dense
from ..transforms.output_tensor import Segment

__all__ = ["SpilledTranspose", "is_memory_low"]


_WRITING = 8  # blocks of a scratch file that may be on their way to the disk


_LEAST_VIEW_NBYTES = 512


_MOST_VIEWS = 1024  # that one call fills (IOV_MAX, on all systems that have the call)


class SpilledTranspose:
    """A part whose rows go through a scratch file, block by block and from any thread.

    Buffered on purpose: where memory is free the system keeps it there and it never meets the
    disk, where memory is short it is written like any other file.

    Once `stage` has been called with each of `blocks`, `make` gives its units.
    """

    def __init__(self, segment: Segment, file: Path, block_nbytes: int) -> None:
        self._segment = segment
        self._dtype = as_dense(segment.operand).raw.dtype
        step = _block_rows(segment, block_nbytes)
        row_nbytes = segment.elements // segment.operand.shape[0] * self._dtype.itemsize
        self.blocks = self.blocks_of(segment, block_nbytes)
        self._rows_of_block = step
        self._slot = -(-step * row_nbytes // ALIGNMENT) * ALIGNMENT
        self._row_nbytes = row_nbytes
        self._left = len(self.blocks)
        self._counting = threading.Lock()
        self._ready = threading.Event()
        self._file = file
        self._descriptor = os.open(
            file, os.O_RDWR | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0), 0o600
        )
        # Runs are read where they lie, each once: what the system would read beyond is waste.
        _advise(self._descriptor, 0, 0, "POSIX_FADV_RANDOM")

    @staticmethod
    def blocks_of(segment: Segment, block_nbytes: int) -> list[tuple[int, int]]:
        """The rows of each block of at most `block_nbytes` that a part has."""
        rows = segment.operand.shape[0]
        return list(pairwise([*range(0, rows, _block_rows(segment, block_nbytes)), rows]))

    def stage(
        self, block: int, reader: Reader, buffer: np.ndarray[Any, Any], *, release: bool
    ) -> None:
        """Read, transpose and put away one block; `buffer` has room for it. `release` has what
        was written of the scratch file dropped from the page cache."""
        begin, end = self.blocks[block]
        how = self._segment.rearrangement
        data = buffer[: (end - begin) * self._row_nbytes]
        whole = data.view(STORAGE[self._dtype]).reshape(
            how.num_rows, *how.row_shape[:-1], end - begin
        )
        materialize_rows(self._segment, [TargetRows(0, whole)], self._dtype, reader, (begin, end))
        _write(self._descriptor, data, block * self._slot)
        if release:
            self._release(block)
        with self._counting:
            self._left -= 1
            if self._left == 0:
                self._ready.set()

    def _release(self, block: int) -> None:
        # Starts writing what is not yet on the disk; a later call drops it.
        at = max(0, block - _WRITING) * self._slot
        nbytes = block * self._slot + self._slot - at
        _advise(self._descriptor, at, nbytes, "POSIX_FADV_DONTNEED")

    def make(
        self, targets: list[TargetRows], dtype: DType, stop: threading.Event, ahead: int
    ) -> None:
        """Make pieces of the part (see `recipe.Make`); waits for blocks that are under way.

        What the piece so many pieces `ahead` needs is read meanwhile.
        """
        while not self._ready.wait(0.1):
            if stop.is_set():
                return
        how = self._segment.rearrangement
        first, last = targets[0].first, targets[-1].last
        size = self._dtype.itemsize
        per_row = prod(how.row_shape[:-1]) * size  # bytes of a unit for each row of a block
        # Straight into the output, where that takes no view for every few elements.
        is_direct = dtype is self._dtype and self._rows_of_block * size >= _LEAST_VIEW_NBYTES
        rows = [
            row.data.cast("B")
            for target_rows in (targets if is_direct else ())
            for row in target_rows.out.reshape(-1, how.row_shape[-1])
        ]
        for block, (begin, end) in enumerate(self.blocks):
            at = block * self._slot + first * per_row * (end - begin)
            nbytes = (last - first) * per_row * (end - begin)
            _advise(self._descriptor, at + ahead * nbytes, nbytes, "POSIX_FADV_WILLNEED")
            if is_direct:
                _read(self._descriptor, [row[begin * size : end * size] for row in rows], at)
                continue
            run = np.empty((last - first, *how.row_shape[:-1], end - begin), STORAGE[self._dtype])
            _read(self._descriptor, [run.data.cast("B")], at)
            for target_rows in targets:
                num_rows = run[target_rows.first - first : target_rows.last - first]
                cast(num_rows, self._dtype, target_rows.out[..., begin:end], dtype)

    def close(self) -> None:
        """Close and delete the scratch file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            self._file.unlink(missing_ok=True)


def _block_rows(segment: Segment, block_nbytes: int) -> int:
    operand = as_dense(segment.operand)
    row_nbytes = segment.elements // operand.shape[0] * operand.raw.dtype.itemsize
    return max(1, block_nbytes // row_nbytes)


def _advise(descriptor: int, at: int, nbytes: int, advice: str) -> None:
    if hasattr(os, advice):
        os.posix_fadvise(descriptor, at, nbytes, getattr(os, advice))


def _write(descriptor: int, data: np.ndarray[Any, Any], offset: int) -> None:
    view = data.data
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def _read(descriptor: int, views: list[memoryview], offset: int) -> None:
    """Fill views, one after another, from `offset` on."""
    while views:
        got = os.preadv(descriptor, views[:_MOST_VIEWS], offset)
        if got == 0:
            raise OSError("the scratch file is shorter than what was written to it")
        offset += got
        full = 0
        while full < len(views) and got >= len(views[full]):
            got -= len(views[full])
            full += 1
        views = views[full:]
        if got:
            views[0] = views[0][got:]


def is_memory_low(planned: Plan) -> bool:
    """Whether there is too little memory for the system to keep what is read ahead."""
    return available_nbytes() < 2 * planned.spill_nbytes + 1_000_000_000
