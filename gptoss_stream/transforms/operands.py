"""Where the elements of an output tensor come from: stored tensors, or some of their elements.

An operand is an array of one or more axes that is loaded a tile at a time. There are four kinds:
`DenseOperand` (floats or bytes as they are stored), `Mxfp4Operand` (an MXFP4 matrix),
`InterleavedOperand` (rows or columns of several operands in turn) and `ZeroOperand` (zeros, stored
nowhere).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

from ..checkpoint.reader import ElementRange, Reader
from ..errors import TensorError
from ..tensors.dtypes import BLOCK_NBYTES, BLOCK_VALUES, DType
from ..tensors.raw_tensor import RawTensor

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "DenseOperand",
    "InterleavedOperand",
    "Mxfp4Operand",
    "Operand",
    "Tile",
    "ZeroOperand",
    "as_dense",
    "raw_tensors",
]

Interval: TypeAlias = tuple[int, int]
"""Indices [begin, end)."""


class Tile(NamedTuple):
    """Rows and columns of an operand to load."""

    rows: Interval
    """Indices along the first axis."""
    columns: Interval | None
    """Indices along the second axis; None for all, and for operands without one."""
    dtype: DType
    """The dtype that the caller will cast to. All operands except dense ones give it."""
    out: np.ndarray[Any, Any] | None = None
    """Memory of the tile's shape and dtype that the operand may use for the result."""


Loaded: TypeAlias = "tuple[np.ndarray[Any, Any], DType]"
"""The elements of a tile and their dtype."""
Packed: TypeAlias = "tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]"
"""Blocks and scales of MXFP4."""


class Operand(Protocol):
    """An array of elements that are stored in the source."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        ...

    def load(self, reader: Reader, tile: Tile) -> AbstractContextManager[Loaded]:
        """Load a tile.

        Returns:
            A context manager of the elements, valid within the context, and their dtype. The
            array is `tile.out` itself if the operand used that memory.
        """
        ...

    def element_ranges(self, rows: Interval) -> Iterator[ElementRange]:
        """Yield the element ranges that loading the rows reads."""
        ...


@dataclass(frozen=True, slots=True)
class DenseOperand:
    """Elements of a raw tensor, floats or bytes, as they are stored.

    Example: the up projection of expert 3 in `gate_up_proj` [32, 2880, 5760], whose last axis
    alternates between gate and up. `first` is 3 * 2880 * 5760, `stored_shape` [2880, 5760], `axis`
    1 and `selected` range(1, 5760, 2). The operand's shape is [2880, 2880].
    """

    raw: RawTensor
    first: int
    """The first element in the raw tensor."""
    stored_shape: tuple[int, ...]
    """The shape of the elements from there on."""
    axis: int = 0
    """The axis, 0 or 1, that `selected` is about."""
    selected: range | None = None
    """The indices along `axis` that belong to the operand; None for all."""

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Operand`."""
        if self.selected is None:
            return self.stored_shape
        axis, shape = self.axis, self.stored_shape
        return (*shape[:axis], len(self.selected), *shape[axis + 1 :])

    def _stored_indices(self, axis: int, interval: Interval) -> slice:
        """Return which stored rows or columns an interval of the operand's is."""
        if self.selected is None or self.axis != axis:
            return slice(*interval)
        indices = self.selected[interval[0] : interval[1]]
        return slice(indices[0], indices[-1] + 1, indices.step)

    @contextmanager
    def load(self, reader: Reader, tile: Tile) -> Iterator[Loaded]:
        """See `Operand`; the elements have the raw tensor's dtype, and `tile.out` is not used."""
        rows = self._stored_indices(0, tile.rows)
        row_size = prod(self.stored_shape[1:])
        shape = (rows.stop - rows.start, *self.stored_shape[1:])
        with reader.read(self.raw, self.first + rows.start * row_size, shape) as array:
            array = array[:: rows.step]
            if tile.columns is not None or self.axis == 1:
                array = array[:, self._stored_indices(1, tile.columns or (0, self.shape[1]))]
            yield array, self.raw.dtype

    def element_ranges(self, rows: Interval) -> Iterator[ElementRange]:
        """See `Operand`."""
        stored, row_size = self._stored_indices(0, rows), prod(self.stored_shape[1:])
        count = (stored.stop - stored.start) * row_size
        yield ElementRange(self.raw, self.first + stored.start * row_size, count)


@dataclass(frozen=True, slots=True)
class Mxfp4Operand:
    """A matrix that is stored in MXFP4, in blocks of 32 values along its rows.

    Example: the up projection of expert 3 in `gate_up_proj` [32, 5760, 2880], whose rows alternate
    between gate and up. `first_row` is 3 * 5760, `stored_shape` [5760, 2880] and `selected`
    range(1, 5760, 2). The operand's shape is [2880, 2880].
    """

    blocks: RawTensor
    """[..., columns / 32, 16] U8, two values in a byte."""
    scales: RawTensor
    """[..., columns / 32] U8."""
    first_row: int
    """The first row, counted over all leading axes of the raw tensors."""
    stored_shape: tuple[int, int]
    """The rows from there on, and the columns."""
    selected: range | None = None
    """The rows of these that belong to the operand; None for all."""

    @property
    def shape(self) -> tuple[int, int]:
        """See `Operand`."""
        rows, columns = self.stored_shape
        return (rows if self.selected is None else len(self.selected)), columns

    def _stored_rows(self, rows: Interval) -> slice:
        """Return which rows of the raw tensors rows of the operand are."""
        if self.selected is None:
            return slice(self.first_row + rows[0], self.first_row + rows[1])
        indices = self.selected[rows[0] : rows[1]]
        return slice(self.first_row + indices[0], self.first_row + indices[-1] + 1, indices.step)

    @contextmanager
    def load_packed(self, reader: Reader, rows: Interval) -> Iterator[Packed]:
        """Load the blocks [rows, groups, 16] and the scales [rows, groups] of rows."""
        stored = self._stored_rows(rows)
        num_rows, num_groups = stored.stop - stored.start, self.stored_shape[1] // BLOCK_VALUES
        with (
            reader.read(
                self.blocks,
                stored.start * num_groups * BLOCK_NBYTES,
                (num_rows, num_groups, BLOCK_NBYTES),
            ) as blocks,
            reader.read(self.scales, stored.start * num_groups, (num_rows, num_groups)) as scales,
        ):
            yield blocks[:: stored.step], scales[:: stored.step]

    @contextmanager
    def load(self, reader: Reader, tile: Tile) -> Iterator[Loaded]:
        """See `Operand`; the values are decoded to the tile's dtype."""
        left, right = tile.columns or (0, self.stored_shape[1])
        groups = slice(left // BLOCK_VALUES, -(-right // BLOCK_VALUES))
        with self.load_packed(reader, tile.rows) as (blocks, scales):
            values = self._decode(blocks[:, groups], scales[:, groups], tile)
            first_column = groups.start * BLOCK_VALUES
            if tile.columns is not None:
                values = values[:, left - first_column : right - first_column]
            yield values, tile.dtype

    def _decode(
        self, blocks: np.ndarray[Any, Any], scales: np.ndarray[Any, Any], tile: Tile
    ) -> np.ndarray[Any, Any]:
        """Decode blocks [rows, groups, 16] and their scales to values [rows, groups * 32]."""
        import numpy as np

        from ..tensors.cast import STORAGE, count_infinities
        from ..tensors.mxfp4 import NAN_SCALE, decode, largest_scale

        dtype, values = tile.dtype, tile.out
        largest = int(scales.max())
        if largest == NAN_SCALE:
            raise TensorError(
                f"{self.scales.shard}: tensor {self.scales.name!r} holds the scale "
                f"{NAN_SCALE}, which is NaN; its weights are damaged, download them again"
            )
        # Values are decoded in pairs, which must be aligned.
        if values is None or values.ctypes.data % (2 * dtype.itemsize):
            num_rows, num_groups = scales.shape
            values = np.empty((num_rows, num_groups * BLOCK_VALUES), STORAGE[dtype])
        decode(blocks, scales, values, dtype)
        if largest > largest_scale(dtype) and count_infinities(values, dtype):
            raise OverflowError(f"values with the scale 2^{largest - 127} exceed {dtype}")
        return values

    def element_ranges(self, rows: Interval) -> Iterator[ElementRange]:
        """See `Operand`."""
        stored = self._stored_rows(rows)
        for raw in (self.blocks, self.scales):
            row_size = prod(raw.shape) // prod(self.scales.shape[:-1])
            count = (stored.stop - stored.start) * row_size
            yield ElementRange(raw, stored.start * row_size, count)


@dataclass(frozen=True, slots=True)
class InterleavedOperand:
    """The rows or columns of several operands of one shape in turn.

    Example: gate and up of one expert, each [2880, 2880], along axis 0 give [5760, 2880] with the
    rows gate 0, up 0, gate 1, up 1, …
    """

    operands: tuple[Operand, ...]
    axis: int
    """0 for rows, 1 for columns."""

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Operand`."""
        shape = [*self.operands[0].shape]
        shape[self.axis] *= len(self.operands)
        return tuple(shape)

    def _indices_of(self, number: int, interval: Interval) -> tuple[Interval, slice]:
        """Return which indices of one operand are in an interval, and where they are in it."""
        count = len(self.operands)
        begin, end = (-(-(index - number) // count) for index in interval)
        return (begin, end), slice(begin * count + number - interval[0], None, count)

    @contextmanager
    def load(self, reader: Reader, tile: Tile) -> Iterator[Loaded]:
        """See `Operand`; the elements are cast to the tile's dtype."""
        import numpy as np

        from ..tensors.cast import STORAGE, cast

        intervals = [tile.rows, *((0, size) for size in self.shape[1:])]
        if tile.columns is not None:
            intervals[1] = tile.columns
        out = tile.out
        if out is None:
            out = np.empty([end - begin for begin, end in intervals], STORAGE[tile.dtype])
        for number, operand in enumerate(self.operands):
            (begin, end), target = self._indices_of(number, intervals[self.axis])
            if begin == end:
                continue
            own = [*intervals]
            own[self.axis] = begin, end
            own_tile = Tile(own[0], own[1] if len(own) > 1 else None, tile.dtype)
            with operand.load(reader, own_tile) as (array, dtype):
                cast(array, dtype, out[target] if self.axis == 0 else out[:, target], tile.dtype)
        yield out, tile.dtype

    def element_ranges(self, rows: Interval) -> Iterator[ElementRange]:
        """See `Operand`."""
        for number, operand in enumerate(self.operands):
            begin, end = self._indices_of(number, rows)[0] if self.axis == 0 else rows
            if begin < end:
                yield from operand.element_ranges((begin, end))


@dataclass(frozen=True, slots=True)
class ZeroOperand:
    """Zeros, for a tensor that the output stores and the source does not."""

    shape: tuple[int, ...]

    @contextmanager
    def load(self, reader: Reader, tile: Tile) -> Iterator[Loaded]:
        """See `Operand`; the zeros have the tile's dtype."""
        import numpy as np

        from ..tensors.cast import STORAGE

        (begin, end), out = tile.rows, tile.out
        if out is None:
            out = np.empty((end - begin, *self.shape[1:]), STORAGE[tile.dtype])
        out[...] = 0
        yield out, tile.dtype

    def element_ranges(self, rows: Interval) -> Iterator[ElementRange]:
        """Yield nothing, since zeros are not read."""
        return iter(())


def raw_tensors(operand: Operand) -> Iterator[RawTensor]:
    """Yield the raw tensors that an operand reads."""
    if isinstance(operand, DenseOperand):
        yield operand.raw
    elif isinstance(operand, Mxfp4Operand):
        yield from (operand.blocks, operand.scales)
    elif isinstance(operand, InterleavedOperand):
        for one in operand.operands:
            yield from raw_tensors(one)


def as_dense(operand: Operand) -> DenseOperand:
    """Return the operand of a spilled transposition, which is always dense.

    Raises:
        TypeError: For another operand.
    """
    if not isinstance(operand, DenseOperand):
        raise TypeError("only dense operands are spilled")
    return operand
