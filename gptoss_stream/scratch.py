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

from .cast import STORAGE, cast
from .dtypes import DType
from .operands import Plain, Reader
from .recipe import Part, make_units
from .shard_file import ALIGNMENT

__all__ = ["StagedTranspose"]


class StagedTranspose:
    """A part whose rows go through a scratch file, block by block and from any thread.

    Once `stage` has been called with each of `blocks`, `make` gives its units.
    """

    def __init__(self, part: Part, file: Path, block_nbytes: int) -> None:
        if not isinstance(part.operand, Plain):
            raise TypeError("only plain operands are staged")
        self._part = part
        self._dtype = part.operand.raw.dtype
        rows = part.operand.shape[0]
        row_nbytes = part.elements // rows * self._dtype.itemsize
        step = max(1, block_nbytes // row_nbytes)
        self.blocks = list(pairwise([*range(0, rows, step), rows]))
        self._slot = -(-step * row_nbytes // ALIGNMENT) * ALIGNMENT
        self._row_nbytes = row_nbytes
        self._left = len(self.blocks)
        self._counting = threading.Lock()
        self._ready = threading.Event()
        self._file = file
        self._descriptor = os.open(
            file, os.O_RDWR | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0), 0o600
        )

    def stage(self, block: int, reader: Reader, buffer: np.ndarray[Any, Any]) -> None:
        """Read, transpose and put away one block; `buffer` has room for it."""
        begin, end = self.blocks[block]
        how = self._part.rearrangement
        nbytes = (end - begin) * self._row_nbytes
        out = buffer[:nbytes].view(STORAGE[self._dtype])
        make_units(
            self._part,
            reader,
            0,
            how.units,
            out.reshape(how.units, *how.unit_shape[:-1], end - begin),
            self._dtype,
            rows=(begin, end),
        )
        _write(self._descriptor, buffer[:nbytes], block * self._slot)
        with self._counting:
            self._left -= 1
            if self._left == 0:
                self._ready.set()

    def make(
        self,
        first: int,
        last: int,
        out: np.ndarray[Any, Any],
        dtype: DType,
        stop: threading.Event,
    ) -> None:
        """Units `first … last` of the part into `out`; waits for the blocks that are under way."""
        while not self._ready.wait(0.1):
            if stop.is_set():
                return
        storage = STORAGE[self._dtype]
        unit_rows = prod(self._part.rearrangement.unit_shape[:-1])
        for block, (begin, end) in enumerate(self.blocks):
            width = end - begin
            run = np.empty((last - first, *out.shape[1:-1], width), storage)
            at = block * self._slot + first * unit_rows * width * run.itemsize
            _read(self._descriptor, run, at)
            cast(run, self._dtype, out[..., begin:end], dtype)

    def close(self) -> None:
        """Close and delete the scratch file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            self._file.unlink(missing_ok=True)


def _write(descriptor: int, data: np.ndarray[Any, Any], offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def _read(descriptor: int, out: np.ndarray[Any, Any], offset: int) -> None:
    view = memoryview(out).cast("B")
    while view:
        got = os.preadv(descriptor, [view], offset)
        if got == 0:
            raise OSError("the scratch file is shorter than what was written to it")
        view, offset = view[got:], offset + got
