"""Where the elements of an output tensor come from: stored tensors, or some of their elements.

An operand is an array of one or more axes that is loaded a tile at a time. There are five kinds:
`DenseOperand` (floats or bytes as they are stored), `Mxfp4Operand` (an MXFP4 matrix),
`InterleavedOperand` (rows or columns of several operands in turn), `ZeroOperand` (zeros, stored
nowhere) and `AdaptedOperand` (another operand with what an adapter changes in it).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

from ..checkpoint.reader import ElementRange, Reader
from ..tensors.dtypes import DType
from ..tensors.raw_tensor import RawTensor
from .adapted_operand import AdaptedOperand
from .mxfp4_operand import Mxfp4Operand
from .operand import Interval, Loaded, Operand, Tile

__all__ = [
    "DenseOperand",
    "InterleavedOperand",
    "ZeroOperand",
    "raw_tensors",
    "row_parts",
    "spilled_dtype",
]


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

    def indices_of(self, number: int, interval: Interval) -> tuple[Interval, slice]:
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
            (begin, end), target = self.indices_of(number, intervals[self.axis])
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
            begin, end = self.indices_of(number, rows)[0] if self.axis == 0 else rows
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


def row_parts(operand: Operand, rows: Interval) -> Iterator[tuple[Operand, Interval, slice]]:
    """Yield the parts of some rows that can be loaded one after another.

    Rows that alternate between operands are all of one operand and then all of the next: nothing
    waits for the last one to be read, and no tile is put together from several.

    Args:
        operand: The operand.
        rows: Its rows [begin, end).

    Yields:
        An operand that is not interleaved by rows, its rows [begin, end), and which of the given
        rows these are, counted from the first one.
    """
    if not isinstance(operand, InterleavedOperand) or operand.axis != 0:
        yield operand, rows, slice(0, rows[1] - rows[0])
        return
    for number, one in enumerate(operand.operands):
        own, place = operand.indices_of(number, rows)
        if own[0] < own[1]:
            yield one, own, place


def raw_tensors(operand: Operand) -> Iterator[RawTensor]:
    """Yield the raw tensors that an operand reads, without those of adapters."""
    if isinstance(operand, DenseOperand):
        yield operand.raw
    elif isinstance(operand, Mxfp4Operand):
        yield from (operand.blocks, operand.scales)
    elif isinstance(operand, InterleavedOperand):
        for one in operand.operands:
            yield from raw_tensors(one)
    elif isinstance(operand, AdaptedOperand):
        yield from raw_tensors(operand.base)


def spilled_dtype(operand: Operand) -> DType | None:
    """Return the dtype of an operand's elements in a spill file; None if it is never spilled."""
    if isinstance(operand, AdaptedOperand):
        return None if spilled_dtype(operand.base) is None else operand.dtype
    return operand.raw.dtype if isinstance(operand, DenseOperand) else None
