"""Gives the tensors of a checkpoint: mapped where they are stored as wanted, else made."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, Any

from .._utils.parallel import num_processors, run_parallel
from ..checkpoint.metadata import CheckpointInfo
from ..checkpoint.open_reader import RandomAccess
from ..checkpoint.reader import ElementRange
from ..errors import OutputError
from ..tensors.compiled import is_enabled
from ..transforms.materialize import materialize, materialize_rows
from ..transforms.mxfp4_operand import Mxfp4Operand
from ..transforms.output_tensor import OutputTensor, element_ranges
from .mapped_tensors import MappedTensors
from .torch_dtypes import torch_dtype

if TYPE_CHECKING:
    import numpy as np
    import torch

__all__ = ["TensorLoader"]

_MIN_NBYTES = 1 << 20
"""The least bytes of a tensor that are worth a thread of their own."""
_TILE_NBYTES = 16 << 20
"""The most bytes of a tile: half an expert's matrix. Smaller tiles take more calls, between which
threads wait for each other (with 1 MB it took 1.7 times as long)."""


class TensorLoader:
    """Maps and makes output tensors, from any thread.

    Args:
        info: The source.
        open_readers: Opens readers of all that the tensors are made of.
    """

    def __init__(
        self,
        info: CheckpointInfo,
        open_readers: Callable[[], AbstractContextManager[RandomAccess]],
    ) -> None:
        self._info = info
        self._mapped = MappedTensors(info)
        self._open_readers = open_readers
        self._readers: RandomAccess | None = None
        self._stack = ExitStack()
        weakref.finalize(self, self._stack.close)  # also when the interpreter ends
        weakref.finalize(self, self._mapped.close)
        self._lock = threading.Lock()
        self._is_closed = False

    def close(self) -> None:
        """Close all files and refuse further reads. Tensors stay valid."""
        with self._lock:
            self._is_closed = True
            self._readers = None
            self._stack.close()
            self._mapped.close()

    def can_map(self, tensor: OutputTensor) -> bool:
        """Return whether a tensor is a view of a mapped file. No data is read."""
        return self._mapped.can_map(tensor)

    def load(self, tensor: OutputTensor, begin: int, end: int) -> torch.Tensor:
        """Return bytes `begin … end` of a tensor, whole rows, or the whole tensor.

        Returns:
            [elements] in the tensor's dtype; the whole tensor has its shape.
        """
        import torch

        self._check_open()
        is_whole = (begin, end) == (0, tensor.nbytes)
        if is_whole and self.can_map(tensor):
            return self._mapped.view(tensor)
        out = torch.empty(end - begin, dtype=torch.uint8)
        self.make_into(tensor, begin, end, out.numpy())
        made = out.view(torch_dtype(tensor.dtype, tensor.name))
        return made.view(tensor.shape) if is_whole else made

    def make_into(
        self,
        tensor: OutputTensor,
        begin: int,
        end: int,
        out: np.ndarray[Any, Any],
    ) -> None:
        """Make bytes `begin … end` of a tensor, on all processors.

        Args:
            tensor: The tensor.
            begin: The first byte.
            end: The byte after the last.
            out: Memory for the bytes, [end - begin] uint8.

        Raises:
            CheckpointError: If a local file has changed since it was opened.
        """
        readers = self._opened()
        threads = num_processors()
        pieces = deque(_pieces(tensor, begin, end, threads))
        make = partial(materialize_rows, reader=readers.every, tile_nbytes=_TILE_NBYTES)

        def make_pieces() -> None:
            while pieces:
                try:
                    low, high = pieces.popleft()
                except IndexError:  # another thread took the last one
                    return
                materialize(tensor, low, high, out[low - begin : high - begin], make)

        with self._reading(tensor, list(pieces)):
            run_parallel([make_pieces] * min(threads, len(pieces)))

    def can_multiply(self, tensor: OutputTensor) -> bool:
        """Return whether `multiply` can be called for a tensor. No data is read."""
        return is_enabled() and _packed_rows(tensor) is not None

    def multiply(
        self, tensor: OutputTensor, tokens: np.ndarray[Any, Any], out: np.ndarray[Any, Any]
    ) -> None:
        """Multiply tokens with a matrix in MXFP4 that is not decoded to memory.

        Args:
            tensor: The matrix, [rows, columns].
            tokens: [tokens, columns] float32, C-contiguous.
            out: Memory for the products [tokens, rows], float32.
        """
        operand = _packed_rows(tensor)
        assert operand is not None
        reader, num_rows, threads = self._opened().every, tensor.shape[0], num_processors()
        bounds = [num_rows * i // threads for i in range(threads + 1)]
        with self._reading(tensor, [(0, tensor.nbytes)]):
            run_parallel(
                [
                    partial(operand.multiply, reader, (low, high), tokens, out[:, low:high])
                    for low, high in pairwise(bounds)
                    if low < high
                ]
            )

    @contextmanager
    def _reading(self, tensor: OutputTensor, pieces: list[tuple[int, int]]) -> Iterator[None]:
        """Give a context in which pieces of a tensor are made.

        What they are made of is fetched at once if it is remote: each tile would else wait for a
        request. If it is local, its files must not have changed at the end; a remote file is
        checked with each request (see `File.read_into`).
        """
        source = self._opened().source
        if self._info.location.is_local:
            yield
            source.check_unchanged()
            return
        ranges = [one for piece in pieces for one in _of_source(tensor, *piece)]
        with source.prefetch(ranges):
            yield

    def prefetch(self, tensor: OutputTensor) -> None:
        """Begin to read what a tensor is made of, in the background."""
        self._opened().source.prefetch(_of_source(tensor, 0, tensor.nbytes))

    def source_nbytes(self, tensor: OutputTensor) -> int:
        """Return the bytes that are read of the source to make a tensor."""
        return sum(one.byte_range[1] for one in _of_source(tensor, 0, tensor.nbytes))

    def forget(self, tensor: OutputTensor) -> None:
        """Tell the system that what a tensor is made of need not stay in its cache."""
        self._opened().source.forget(_of_source(tensor, 0, tensor.nbytes))

    def _check_open(self) -> None:
        if self._is_closed:
            raise OutputError(f"{self._info.location}: closed; open it again")

    def _opened(self) -> RandomAccess:
        """Return the readers, which are opened when they are first used."""
        with self._lock:
            self._check_open()
            if self._readers is None:
                self._readers = self._stack.enter_context(self._open_readers())
            return self._readers


def _packed_rows(tensor: OutputTensor) -> Mxfp4Operand | None:
    """Return the operand of a tensor whose rows are rows of MXFP4 as they are stored."""
    segment = tensor.segments[0]
    is_whole = len(tensor.segments) == 1 and segment.rearrangement.is_copy
    operand = segment.operand
    return operand if is_whole and isinstance(operand, Mxfp4Operand) else None


def _of_source(tensor: OutputTensor, begin: int, end: int) -> Iterator[ElementRange]:
    """Yield what is read of the source to make bytes `begin … end` of a tensor."""
    for one in element_ranges(tensor, begin, end):
        if one.raw.checkpoint == 0:
            yield one


def _pieces(tensor: OutputTensor, begin: int, end: int, count: int) -> Iterator[tuple[int, int]]:
    """Cut bytes of a tensor into pieces that threads make.

    A transposition is not cut: each piece would read all of the source.
    """
    offset = 0
    for segment in tensor.segments:
        size = segment.elements * tensor.dtype.itemsize
        low, high = max(begin, offset), min(end, offset + size)
        if low < high:
            row_nbytes = prod(segment.row_shape) * tensor.dtype.itemsize
            step = min(max(_MIN_NBYTES, -(-(high - low) // count)), _TILE_NBYTES)
            step = -(-step // row_nbytes) * row_nbytes
            if segment.rearrangement.transposes:
                step = high - low
            for piece in range(low, high, step):
                yield piece, min(high, piece + step)
        offset += size
