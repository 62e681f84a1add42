"""Tiles of a segment: some of its rows, a few MB at a time, rearranged but not cast yet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, Any

from ..checkpoint.reader import Reader
from ..tensors.dtypes import BLOCK_VALUES, DType
from .adapted_operand import AdaptedOperand
from .operand import Interval, Loaded, Tile
from .output_tensor import Segment

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "TILE_NBYTES",
    "TargetRows",
    "intervals",
    "load_rows",
    "row_intervals",
    "transposed_tiles",
]

TILE_NBYTES = 1 << 20
"""The most bytes in a tile that is not transposed, by default."""
_TRANSPOSED_TILE_NBYTES = 4 << 20
"""The most bytes in a tile that is transposed, of whole rows of the operand."""
_TRANSPOSED_TILE_ROWS = 192
"""The most rows of the operand in a tile that is transposed. With fewer, calls cost more than the
copying (32 rows took twice as long). With many more, the tile does not fit in the processor's
cache."""
_ADAPTED_ELEMENTS = 5 << 17
"""The most elements in a tile that is merged with adapters, in float32. Merging takes many calls
for each tile, between which threads wait for each other."""
_ADAPTED_ROWS = 512
"""The most rows of the operand in such a tile that is transposed."""


@dataclass(frozen=True, slots=True)
class TargetRows:
    """Rows of a segment that are to be made into memory."""

    first: int
    """The first row's number in the segment."""
    out: np.ndarray[Any, Any]
    """The memory, [rows, *row_shape], in the `STORAGE` of the output's dtype."""
    begins: bool = True
    """Whether the bytes to make begin with the first row or before it. If they begin within the
    row, the row is made for the bytes before them too, and is counted there."""

    @property
    def end(self) -> int:
        """The number that follows the last row's."""
        return self.first + len(self.out)


def row_intervals(
    segment: Segment, target: TargetRows, dtype: DType, tile_nbytes: int = TILE_NBYTES
) -> list[Interval]:
    """Cut target rows into intervals [begin, end) of a tile each.

    Args:
        segment: A segment that is not a transposition.
        target: The rows.
        dtype: The dtype in which the tiles are made, before any encoding.
        tile_nbytes: The most bytes in a tile, unless it is merged with adapters.
    """
    row_elements = prod(segment.rearrangement.row_shape)
    num_rows = tile_nbytes // (row_elements * dtype.itemsize)
    if isinstance(segment.operand, AdaptedOperand):
        num_rows = _ADAPTED_ELEMENTS // row_elements
    return intervals(target.first, target.end, num_rows)


@contextmanager
def load_rows(
    segment: Segment,
    rows: Interval,
    dtype: DType,
    reader: Reader,
    out: np.ndarray[Any, Any] | None = None,
) -> Iterator[Loaded]:
    """Load rows of a segment that is not a transposition, rearranged.

    Args:
        segment: The segment.
        rows: The rows [begin, end).
        dtype: The dtype that the caller will cast to.
        reader: Reads the operand.
        out: Memory for the result, which is used where that saves a copy.

    Yields:
        The rows and their dtype. They are `out` itself if that was used.
    """
    from einops import rearrange

    rearrangement = segment.rearrangement
    tile = Tile(rows, None, dtype, out if rearrangement.is_copy else None)
    with segment.operand.load(reader, tile) as (array, source_dtype):
        if not rearrangement.is_copy:
            array = rearrange(array, rearrangement.pattern)
        yield array, source_dtype


def transposed_tiles(
    segment: Segment,
    rows: Interval,
    operand_rows: Interval,
    dtype: DType,
    reader: Reader,
) -> Iterator[tuple[Interval, np.ndarray[Any, Any], DType]]:
    """Yield rows of a transposition, some of the operand's rows at a time.

    Args:
        segment: The segment.
        rows: The segment's rows [begin, end).
        operand_rows: The rows of the operand to make columns of.
        dtype: The dtype that the caller will cast to.
        reader: Reads the operand.

    Yields:
        The rows of the operand, [begin, end), a multiple of 32 except for the last ones, so that no
        MXFP4 block is parted; the segment's rows with these columns; and their dtype.
    """
    from einops import rearrange

    row_nbytes = segment.operand.shape[1] * dtype.itemsize
    num_rows = min(_TRANSPOSED_TILE_ROWS, _TRANSPOSED_TILE_NBYTES // row_nbytes)
    if isinstance(segment.operand, AdaptedOperand):
        num_rows = min(_ADAPTED_ROWS, _ADAPTED_ELEMENTS // (rows[1] - rows[0]))
    if segment.encoding is not None:
        num_rows = max(BLOCK_VALUES, num_rows // BLOCK_VALUES * BLOCK_VALUES)
    for begin, end in intervals(*operand_rows, num_rows):
        tile = Tile((begin, end), rows, dtype, by_column=True)
        with segment.operand.load(reader, tile) as (array, source_dtype):
            transposed = rearrange(array, segment.rearrangement.pattern)
            yield (begin, end), transposed, source_dtype


def intervals(begin: int, end: int, length: int) -> list[Interval]:
    """Cut an interval into intervals [begin, end) of at most `length`, which is at least 1."""
    return list(pairwise([*range(begin, end, max(1, length)), end]))
