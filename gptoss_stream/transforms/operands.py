"""Where the elements of an output come from: stored tensors, or a part of them, as one array.

An operand has a shape and loads any block of it. Four kinds: `Dense` (floats, or bytes, as they
are), `Packed` (an MXFP4 matrix), `Interleaved` (the rows or columns of several in turn) and `Zeros`
(nothing stored). None knows names, layers or files beyond the raw tensors it was given.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

from ..checkpoint.metadata import RawTensor
from ..checkpoint.reader import ElementRange, Reader
from ..errors import TensorError
from ..tensors.dtypes import BLOCK_NBYTES, BLOCK_VALUES, DType

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "Block",
    "DenseOperand",
    "InterleavedOperand",
    "Mxfp4Operand",
    "Operand",
    "ZeroOperand",
    "as_dense",
]


Range: TypeAlias = tuple[int, int]  # [begin, end)


class Block(NamedTuple):
    """A block of an operand: `[rows, columns]`, of all columns for None."""

    rows: Range
    columns: Range | None
    dtype: DType
    """What the caller will cast to; what is decoded is decoded to it."""
    into: np.ndarray[Any, Any] | None = None
    """Memory of the block's shape that it may be made in."""


Loaded: TypeAlias = "tuple[np.ndarray[Any, Any], DType]"


class Operand(Protocol):
    """What the four kinds have in common."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        ...

    def load(self, reader: Reader, block: Block) -> AbstractContextManager[Loaded]:
        """Load a block.

        Returns:
            The block as an array, good within the context, and its dtype. It is `block.into`
            itself where it was made there.
        """
        ...

    def element_ranges(self, rows: Range) -> Iterator[ElementRange]:
        """Yield what loading the rows reads."""
        ...


@dataclass(frozen=True, slots=True)
class DenseOperand:
    """Elements from `first` on of a raw tensor, with the shape `stored_shape`.

    `taken` are the indices along `axis` (0 or 1) that the operand consists of, all for None.
    """

    raw: RawTensor
    first: int
    stored_shape: tuple[int, ...]
    axis: int = 0
    taken: range | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Operand`."""
        if self.taken is None:
            return self.stored_shape
        axis, shape = self.axis, self.stored_shape
        return (*shape[:axis], len(self.taken), *shape[axis + 1 :])

    def _stored(self, axis: int, span: Range) -> slice:
        """What some of the operand's rows or columns are of the stored ones."""
        if self.taken is None or self.axis != axis:
            return slice(*span)
        wanted = self.taken[span[0] : span[1]]
        return slice(wanted[0], wanted[-1] + 1, wanted.step)

    @contextmanager
    def load(self, reader: Reader, block: Block) -> Iterator[Loaded]:
        """See `Operand`; the block has the raw tensor's dtype and is never `into`."""
        stored = self._stored(0, block.rows)
        width = prod(self.stored_shape[1:])
        shape = (stored.stop - stored.start, *self.stored_shape[1:])
        with reader.read(self.raw, self.first + stored.start * width, shape) as array:
            array = array[:: stored.step]
            if block.columns is not None or self.axis == 1:
                array = array[:, self._stored(1, block.columns or (0, self.shape[1]))]
            yield array, self.raw.dtype

    def element_ranges(self, rows: Range) -> Iterator[ElementRange]:
        """See `Operand`."""
        stored, width = self._stored(0, rows), prod(self.stored_shape[1:])
        count = (stored.stop - stored.start) * width
        yield ElementRange(self.raw, self.first + stored.start * width, count)


@dataclass(frozen=True, slots=True)
class Mxfp4Operand:
    """An MXFP4 matrix: `stored_shape` rows and columns from row `first` of the raw tensors on, of
    which `taken` are the rows that the operand consists of, all for None."""

    blocks: RawTensor  # [..., columns / 32, 16] U8
    scales: RawTensor  # [..., columns / 32] U8
    first: int
    stored_shape: tuple[int, int]
    taken: range | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """See `Operand`."""
        rows, columns = self.stored_shape
        return (rows if self.taken is None else len(self.taken)), columns

    def _rows(self, rows: Range) -> slice:
        if self.taken is None:
            return slice(self.first + rows[0], self.first + rows[1])
        wanted = self.taken[rows[0] : rows[1]]
        return slice(self.first + wanted[0], self.first + wanted[-1] + 1, wanted.step)

    @contextmanager
    def load(self, reader: Reader, block: Block) -> Iterator[Loaded]:
        """See `Operand`; the block is decoded to `dtype`."""
        import numpy as np

        from ..tensors.cast import STORAGE, count_infinities
        from ..tensors.mxfp4 import NAN_SCALE, decode, largest_scale

        dtype, columns, into = block.dtype, block.columns, block.into
        groups = self.stored_shape[1] // BLOCK_VALUES
        stored = self._rows(block.rows)
        begin, end = stored.start, stored.stop
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
            tile_blocks = blocks[:: stored.step, taken]
            tile_scales = scales[:: stored.step, taken]
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

    def element_ranges(self, rows: Range) -> Iterator[ElementRange]:
        """See `Operand`."""
        stored = self._rows(rows)
        for raw in (self.blocks, self.scales):
            width = prod(raw.shape) // prod(self.scales.shape[:-1])
            yield ElementRange(raw, stored.start * width, (stored.stop - stored.start) * width)


@dataclass(frozen=True, slots=True)
class InterleavedOperand:
    """The rows (`axis` 0) or columns (1) of several operands of one shape, in turn."""

    operands: tuple[Operand, ...]
    axis: int

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Operand`."""
        shape = [*self.operands[0].shape]
        shape[self.axis] *= len(self.operands)
        return tuple(shape)

    def _part(self, span: Range, number: int) -> tuple[Range, slice]:
        """Which rows or columns of an operand lie in a span, and where in it they belong."""
        count = len(self.operands)
        begin, end = (-(-(at - number) // count) for at in span)
        return (begin, end), slice(begin * count + number - span[0], None, count)

    @contextmanager
    def load(self, reader: Reader, block: Block) -> Iterator[Loaded]:
        """See `Operand`; the block has the dtype `dtype`."""
        import numpy as np

        from ..tensors.cast import STORAGE, cast

        spans = [block.rows, *((0, size) for size in self.shape[1:])]
        if block.columns is not None:
            spans[1] = block.columns
        out = block.into
        if out is None:
            out = np.empty([end - begin for begin, end in spans], STORAGE[block.dtype])
        for number, operand in enumerate(self.operands):
            (begin, end), where = self._part(spans[self.axis], number)
            if begin == end:
                continue
            theirs = [*spans]
            theirs[self.axis] = begin, end
            asked = Block(theirs[0], theirs[1] if len(theirs) > 1 else None, block.dtype)
            with operand.load(reader, asked) as (array, found):
                cast(array, found, out[where] if self.axis == 0 else out[:, where], block.dtype)
        yield out, block.dtype

    def element_ranges(self, rows: Range) -> Iterator[ElementRange]:
        """See `Operand`."""
        for number, operand in enumerate(self.operands):
            begin, end = self._part(rows, number)[0] if self.axis == 0 else rows
            if begin < end:
                yield from operand.element_ranges((begin, end))


@dataclass(frozen=True, slots=True)
class ZeroOperand:
    """A tensor that the model lacks and the output has, all zero."""

    shape: tuple[int, ...]

    @contextmanager
    def load(self, reader: Reader, block: Block) -> Iterator[Loaded]:
        """See `Operand`; the block has the dtype `dtype`."""
        import numpy as np

        from ..tensors.cast import STORAGE

        (begin, end), out = block.rows, block.into
        if out is None:
            out = np.empty((end - begin, *self.shape[1:]), STORAGE[block.dtype])
        out[...] = 0
        yield out, block.dtype

    def element_ranges(self, rows: Range) -> Iterator[ElementRange]:
        """Yield nothing: nothing is read."""
        return iter(())


def as_dense(operand: Operand) -> DenseOperand:
    """Return an operand that can only be dense: no other goes through a spill file."""
    if not isinstance(operand, DenseOperand):
        raise TypeError("only dense operands are spilled")
    return operand
