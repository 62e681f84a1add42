"""An operand that is stored in MXFP4."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, TypeAlias

from ..checkpoint.reader import ElementRange, Reader
from ..errors import TensorError
from ..tensors.dtypes import BLOCK_NBYTES, BLOCK_VALUES
from ..tensors.raw_tensor import RawTensor
from .operand import Interval, Loaded, Tile

if TYPE_CHECKING:
    import numpy as np

    from ..tensors.dtypes import DType

__all__ = ["Mxfp4Operand", "Packed"]

Packed: TypeAlias = "tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]"
"""Blocks and scales of MXFP4."""


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
        from ..tensors import compiled

        left, right = tile.columns or (0, self.stored_shape[1])
        if tile.by_column and compiled.is_enabled():
            yield self._load_by_column(reader, tile.rows, (left, right), tile.dtype), tile.dtype
            return
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
        from ..tensors.mxfp4 import decode, largest_scale

        dtype, values = tile.dtype, tile.out
        largest = self._largest(scales)
        shape = len(scales), scales.shape[1] * BLOCK_VALUES
        # Values are decoded in pairs, which must be aligned, and in whole blocks.
        if values is None or values.shape != shape or values.ctypes.data % (2 * dtype.itemsize):
            values = np.empty(shape, STORAGE[dtype])
        decode(blocks, scales, values, dtype)
        if largest > largest_scale(dtype) and count_infinities(values, dtype):
            raise OverflowError(f"values with the scale 2^{largest - 127} exceed {dtype}")
        return values

    def _load_by_column(
        self, reader: Reader, rows: Interval, columns: Interval, dtype: DType
    ) -> np.ndarray[Any, Any]:
        """Load values [rows, columns] of which the columns are contiguous."""
        import numpy as np

        from ..tensors.cast import STORAGE

        turned = np.empty((columns[1] - columns[0], rows[1] - rows[0]), STORAGE[dtype])
        self.load_columns(reader, rows, [(columns[0], turned)], dtype)
        return turned.T

    def load_columns(
        self,
        reader: Reader,
        rows: Interval,
        outs: Iterable[tuple[int, np.ndarray[Any, Any]]],
        dtype: DType,
    ) -> None:
        """Load columns of some rows as rows (see `mxfp4.decode_columns`).

        Args:
            reader: Reads the rows.
            rows: The rows [begin, end).
            outs: The first column, and memory for the values [columns, rows], of each run of
                columns.
            dtype: The dtype to decode to.

        Raises:
            OverflowError: If the dtype cannot represent a value.
            TensorError: If a scale is NaN.
        """
        from ..tensors.mxfp4 import decode_columns

        with self.load_packed(reader, rows) as (blocks, scales):
            self._largest(scales)
            for first, out in outs:
                begin = first // BLOCK_VALUES
                groups = slice(begin, -(-(first + len(out)) // BLOCK_VALUES))
                packed, first = (blocks[:, groups], scales[:, groups]), first - begin * BLOCK_VALUES
                if not decode_columns(*packed, first, out, dtype):
                    values = self._decode(*packed, Tile(rows, None, dtype))
                    out[...] = values[:, first : first + len(out)].T

    def multiply(
        self,
        reader: Reader,
        rows: Interval,
        tokens: np.ndarray[Any, Any],
        out: np.ndarray[Any, Any],
    ) -> None:
        """Multiply tokens with rows that are not decoded to memory (see `tensors.compiled`).

        Args:
            reader: Reads the rows.
            rows: The rows [begin, end).
            tokens: [tokens, columns] float32, C-contiguous.
            out: Memory for the products [tokens, rows], float32.

        Raises:
            TensorError: If a scale is NaN.
        """
        from ..tensors.mxfp4 import multiply

        with self.load_packed(reader, rows) as (blocks, scales):
            self._largest(scales)
            multiply(blocks, scales, tokens, out)

    def _largest(self, scales: np.ndarray[Any, Any]) -> int:
        """Return the largest of some scales.

        Raises:
            TensorError: If one is NaN.
        """
        from ..tensors.mxfp4 import NAN_SCALE

        largest = int(scales.max())
        if largest == NAN_SCALE:
            raise TensorError(
                f"{self.scales.shard}: tensor {self.scales.name!r} holds the scale "
                f"{NAN_SCALE}, which is NaN; its weights are damaged, download them again"
            )
        return largest

    def element_ranges(self, rows: Interval) -> Iterator[ElementRange]:
        """See `Operand`."""
        stored = self._stored_rows(rows)
        for raw in (self.blocks, self.scales):
            row_size = prod(raw.shape) // prod(self.scales.shape[:-1])
            count = (stored.stop - stored.start) * row_size
            yield ElementRange(raw, stored.start * row_size, count)
