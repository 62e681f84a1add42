"""How one model tensor lies in the checkpoint, bound to its raw tensors: what recipes read.

An operand has a shape of one or two axes and loads any block of it. Three kinds: `Plain` (floats
as they are), `Packed` (MXFP4 blocks and scales) and `Zeros` (nothing stored). None knows names,
layers or files beyond the raw tensors it was given.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from .checkpoint import Extent, RawTensor, Schedule
from .dtypes import BLOCK_NBYTES, BLOCK_VALUES, DType
from .errors import TensorError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Operand", "Packed", "Plain", "Reader", "Zeros", "plain", "take_rows"]

Span: TypeAlias = tuple[int, int]  # [begin, end)


class Reader(Protocol):
    """Where operands get the elements of raw tensors (see `checkpoint.Checkpoint`)."""

    def read(
        self, tensor: RawTensor, first: int, shape: tuple[int, ...]
    ) -> AbstractContextManager[np.ndarray[Any, Any]]:
        """`prod(shape)` elements from element `first` on, for as long as the block lasts."""
        ...

    def schedule(self, schedule: Schedule, stop: threading.Event) -> None:
        """Told once, before reading, what will be read; waiting ends when `stop` is set."""
        return

    def begin(self, step: int) -> None:
        """Told when a step of the schedule begins."""
        return

    def end(self, step: int) -> None:
        """Told when a step has read what it reads."""
        return

    def check_unchanged(self) -> None:
        """Raise if what was read so far may not have been of one state of its files."""
        return


@dataclass(frozen=True, slots=True)
class Plain:
    """Floats from element `first` of a raw tensor on: `stored_shape`, one or two axes.

    The model's rows are the stored rows, or the stored columns where it `is_transposed`. `start`
    and `step` choose among them; `shape` is what is left, with the axes as they are stored.
    """

    raw: RawTensor
    first: int
    stored_shape: tuple[int, ...]
    is_transposed: bool = False
    start: int = 0
    step: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """What is left of `stored_shape`."""
        sizes, axis = list(self.stored_shape), int(self.is_transposed)
        sizes[axis] = len(range(self.start, sizes[axis], self.step))
        return tuple(sizes)

    @property
    def _width(self) -> int:
        """Elements of a stored row."""
        return self.stored_shape[1] if len(self.stored_shape) == 2 else 1

    def _block(self, rows: Span, columns: Span | None) -> tuple[Span, tuple[slice, ...]]:
        """The stored rows to read, and what to take of them."""
        begin, end = columns if columns is not None else (0, self._width)
        if self.is_transposed:
            last = self.start + (end - 1) * self.step + 1
            return rows, (slice(None), slice(self.start + begin * self.step, last, self.step))
        stored = self.start + rows[0] * self.step, self.start + (rows[1] - 1) * self.step + 1
        take = (slice(None, None, self.step), slice(begin, end))
        return stored, take[: len(self.stored_shape)]

    @contextmanager
    def load(
        self,
        reader: Reader,
        rows: Span,
        columns: Span | None,
        dtype: DType,
        into: np.ndarray[Any, Any] | None = None,
    ) -> Iterator[tuple[np.ndarray[Any, Any], DType]]:
        """The block `[rows, columns]` of `shape`, in the raw tensor's dtype; never `into`."""
        (begin, end), take = self._block(rows, columns)
        shape = (end - begin, *self.stored_shape[1:])
        with reader.read(self.raw, self.first + begin * self._width, shape) as array:
            yield array[take], self.raw.dtype

    def extents(self, rows: Span) -> Iterator[Extent]:
        """What loading the rows reads."""
        (begin, end), _ = self._block(rows, None)
        yield Extent(self.raw, self.first + begin * self._width, (end - begin) * self._width)


@dataclass(frozen=True, slots=True)
class Packed:
    """An MXFP4 matrix: `stored_shape` rows and columns from row `first` of the raw tensors on."""

    blocks: RawTensor  # [..., columns / 32, 16] U8
    scales: RawTensor  # [..., columns / 32] U8
    first: int
    stored_shape: tuple[int, int]
    start: int = 0
    step: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        """What `start` and `step` leave of `stored_shape`."""
        rows, columns = self.stored_shape
        return len(range(self.start, rows, self.step)), columns

    def _rows(self, rows: Span) -> Span:
        begin = self.first + self.start + rows[0] * self.step
        return begin, begin + (rows[1] - rows[0] - 1) * self.step + 1

    @contextmanager
    def load(
        self,
        reader: Reader,
        rows: Span,
        columns: Span | None,
        dtype: DType,
        into: np.ndarray[Any, Any] | None = None,
    ) -> Iterator[tuple[np.ndarray[Any, Any], DType]]:
        """The block `[rows, columns]` of `shape`, decoded to `dtype`; in `into` itself where
        that is given and can take it."""
        import numpy as np

        from .cast import STORAGE, count_infinities
        from .mxfp4 import NAN_SCALE, decode, largest_scale

        groups = self.stored_shape[1] // BLOCK_VALUES
        begin, end = self._rows(rows)
        left, right = columns if columns is not None else (0, self.stored_shape[1])
        taken = slice(left // BLOCK_VALUES, -(-right // BLOCK_VALUES))
        with (
            reader.read(
                self.blocks,
                begin * groups * BLOCK_NBYTES,
                (end - begin, groups, BLOCK_NBYTES),
            ) as blocks,
            reader.read(self.scales, begin * groups, (end - begin, groups)) as scales,
        ):
            tile_blocks = blocks[:: self.step, taken]
            tile_scales = scales[:: self.step, taken]
            largest = int(tile_scales.max())
            if largest == NAN_SCALE:
                raise TensorError(
                    f"{self.scales.shard}: tensor {self.scales.name!r} holds the scale "
                    f"{NAN_SCALE}, which is NaN; its weights are damaged, download them again"
                )
            count, width = tile_scales.shape
            if into is not None and into.ctypes.data % (2 * dtype.itemsize) == 0:
                values = into
            else:
                values = np.empty((count, width * BLOCK_VALUES), STORAGE[dtype])
            decode(tile_blocks, tile_scales, values, dtype)
            if largest > largest_scale(dtype) and count_infinities(values, dtype):
                raise OverflowError(f"values with the scale 2^{largest - 127} exceed {dtype}")
            skipped = left - taken.start * BLOCK_VALUES
            wanted = values if columns is None else values[:, skipped : skipped + right - left]
            yield wanted, dtype

    def extents(self, rows: Span) -> Iterator[Extent]:
        """What loading the rows reads."""
        begin, end = self._rows(rows)
        for raw in (self.blocks, self.scales):
            width = prod(raw.shape) // prod(self.scales.shape[:-1])
            yield Extent(raw, begin * width, (end - begin) * width)


@dataclass(frozen=True, slots=True)
class Zeros:
    """A tensor that the model lacks and the target has, all zero."""

    shape: tuple[int, ...]


Operand: TypeAlias = Plain | Packed | Zeros


def plain(operand: Operand) -> Plain:
    """An operand that can only be plain: no other is transposed through a scratch file."""
    if not isinstance(operand, Plain):
        raise TypeError("only plain operands are staged")
    return operand


def take_rows(operand: Operand, start: int, step: int) -> Operand:
    """The operand's rows `start::step`, of model rows (whichever stored axis holds them)."""
    if isinstance(operand, Zeros):
        rows, *rest = operand.shape
        return Zeros((len(range(start, rows, step)), *rest))
    return replace(operand, start=start, step=step)
