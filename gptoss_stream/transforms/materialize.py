"""Making any byte range of an output tensor.

`materialize` finds the rows of each segment that are in the byte range and calls a function for
them, usually `materialize_rows`. That one loads the operand a tile at a time, rearranges the tile
and casts it into the output. It reads only what these rows need, and a tile has a few MB at most.

For example, bytes 100 to 1100 of a bfloat16 tensor [8, 120], whose rows have 240 bytes: rows 1 to 3
are made in the output itself. Of rows 0 and 4 only some bytes are needed. Each of the two is made
in memory of its own, and these bytes are copied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, Any

from ..checkpoint.reader import Reader
from ..errors import TensorError
from ..tensors.dtypes import DType
from .operands import Tile
from .output_tensor import OutputTensor, Segment

if TYPE_CHECKING:
    import numpy as np

__all__ = ["MakeRows", "TargetRows", "materialize", "materialize_rows"]

_TILE_NBYTES = 1 << 20
"""The most bytes of the output in a tile that is not transposed."""
_TRANSPOSED_TILE_NBYTES = 4 << 20
"""The most bytes in a tile that is transposed, of whole rows of the operand."""
_TRANSPOSED_TILE_ROWS = 192
"""The most rows of the operand in a tile that is transposed. With fewer, calls cost more than the
copying (32 rows took twice as long). With many more, the tile does not fit in the processor's
cache."""


@dataclass(frozen=True, slots=True)
class TargetRows:
    """Rows of a segment that are to be made into memory."""

    first: int
    """The first row's number in the segment."""
    out: np.ndarray[Any, Any]
    """The memory, [rows, *row_shape], in the `STORAGE` of the output's dtype."""

    @property
    def end(self) -> int:
        """The number that follows the last row's."""
        return self.first + len(self.out)


MakeRows = Callable[[Segment, "list[TargetRows]", DType], None]
"""Make rows of a segment in a dtype. The target rows are in order and without gaps."""


def materialize(
    tensor: OutputTensor, begin: int, end: int, out: np.ndarray[Any, Any], make: MakeRows
) -> None:
    """Make bytes `begin … end` of a tensor's data.

    Args:
        tensor: The output tensor.
        begin: The first byte.
        end: The byte after the last.
        out: Memory for the bytes, [end - begin] uint8.
        make: Makes rows of a segment.

    Raises:
        TensorError: If the dtype cannot represent a value.
    """
    offset = 0  # of the segment, in bytes
    try:
        for segment in tensor.segments:
            size = segment.elements * tensor.dtype.itemsize
            low, high = max(begin, offset), min(end, offset + size)
            if low < high:
                target = out[low - begin : high - begin]
                _materialize_segment(
                    segment, low - offset, high - offset, target, tensor.dtype, make
                )
            offset += size
    except OverflowError as error:
        raise TensorError(
            f"output tensor {tensor.name!r}: {error}; choose a dtype with a wider range"
        ) from None


def _materialize_segment(
    segment: Segment,
    begin: int,
    end: int,
    out: np.ndarray[Any, Any],
    dtype: DType,
    make: MakeRows,
) -> None:
    """Make bytes `begin … end` of a segment: whole rows, and an incomplete one at either end."""
    import numpy as np

    from ..tensors.cast import STORAGE

    row_shape, storage = segment.rearrangement.row_shape, STORAGE[dtype]
    row_nbytes = prod(row_shape) * dtype.itemsize
    whole_begin = min(end, -(-begin // row_nbytes) * row_nbytes)
    whole_end = max(whole_begin, end // row_nbytes * row_nbytes)
    targets, incomplete = [], []
    for low, high in ((begin, whole_begin), (whole_begin, whole_end), (whole_end, end)):
        if low < high:
            target, skipped = out[low - begin : high - begin], low % row_nbytes
            if skipped or high % row_nbytes:
                rows = np.empty((1, *row_shape), storage)
                incomplete.append((target, rows, skipped))
            else:
                rows = target.view(storage).reshape(-1, *row_shape)
            targets.append(TargetRows(low // row_nbytes, rows))
    make(segment, targets, dtype)
    for target, rows, skipped in incomplete:
        target[...] = rows.view(np.uint8).reshape(-1)[skipped : skipped + len(target)]


def materialize_rows(
    segment: Segment,
    targets: list[TargetRows],
    dtype: DType,
    reader: Reader,
    operand_rows: tuple[int, int] | None = None,
) -> None:
    """Make rows of a segment (see `MakeRows`) of what a reader reads.

    Args:
        segment: The segment.
        targets: The rows to make.
        dtype: The dtype to make them in.
        reader: Reads the operand.
        operand_rows: Of a transposition, the rows of the operand [begin, end) to make columns of;
            the targets then have these columns only. By default all rows.

    Raises:
        OverflowError: If the dtype cannot represent a value.
    """
    if segment.rearrangement.transposes:
        operand_rows = operand_rows or (0, segment.operand.shape[0])
        _transpose_rows(segment, targets, dtype, reader, operand_rows)
        return
    for target in targets:
        _rearrange_rows(segment, target, dtype, reader)


def _rearrange_rows(segment: Segment, target: TargetRows, dtype: DType, reader: Reader) -> None:
    """Make rows of a segment of the operand's rows with the same numbers."""
    from einops import rearrange

    from ..tensors.cast import cast

    rearrangement = segment.rearrangement
    row_nbytes = prod(rearrangement.row_shape) * dtype.itemsize
    for begin, end in _intervals(target.first, target.end, _TILE_NBYTES // row_nbytes):
        out = target.out[begin - target.first : end - target.first]
        tile = Tile((begin, end), None, dtype, out if rearrangement.is_copy else None)
        with segment.operand.load(reader, tile) as (array, source_dtype):
            if array is not tile.out:
                if not rearrangement.is_copy:
                    array = rearrange(array, rearrangement.pattern)
                cast(array, source_dtype, out, dtype)


def _transpose_rows(
    segment: Segment,
    targets: list[TargetRows],
    dtype: DType,
    reader: Reader,
    operand_rows: tuple[int, int],
) -> None:
    """Make rows of a segment of the operand's columns with the same numbers."""
    from einops import rearrange

    from ..tensors.cast import cast

    first, end_row = targets[0].first, targets[-1].end
    top, bottom = operand_rows
    row_nbytes = segment.operand.shape[1] * dtype.itemsize
    num_rows = min(_TRANSPOSED_TILE_ROWS, _TRANSPOSED_TILE_NBYTES // row_nbytes)
    for begin, end in _intervals(top, bottom, num_rows):
        tile = Tile((begin, end), (first, end_row), dtype)
        with segment.operand.load(reader, tile) as (array, source_dtype):
            transposed = rearrange(array, segment.rearrangement.pattern)
            for target in targets:
                rows = transposed[target.first - first : target.end - first]
                cast(rows, source_dtype, target.out[..., begin - top : end - top], dtype)


def _intervals(begin: int, end: int, length: int) -> list[tuple[int, int]]:
    """Cut an interval into intervals [begin, end) of at most `length`, which is at least 1."""
    return list(pairwise([*range(begin, end, max(1, length)), end]))
