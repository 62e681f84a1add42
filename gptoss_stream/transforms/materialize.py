"""Making any byte range of an output tensor.

`materialize` finds the rows of each segment that are in the byte range and calls a function for
them, usually `materialize_rows`. That one loads the operand a tile at a time, rearranges the tile
and casts or encodes it into the output. It reads only what these rows need, and a tile has a few
MB at most.

For example, bytes 100 to 1100 of a bfloat16 tensor [8, 120], whose rows have 240 bytes: rows 1 to 3
are made in the output itself. Of rows 0 and 4 only some bytes are needed. Each of the two is made
in memory of its own, and these bytes are copied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

from ..checkpoint.reader import Reader
from ..errors import TensorError
from ..tensors.dtypes import DType
from .mxfp4_operand import Mxfp4Operand
from .operands import row_parts
from .output_tensor import OutputTensor, Segment
from .tiles import (
    TILE_NBYTES,
    TargetRows,
    intervals,
    load_rows,
    row_intervals,
    transposed_tiles,
)

if TYPE_CHECKING:
    import numpy as np

__all__ = ["MakeRows", "materialize", "materialize_rows"]

_PACKED_TILE_ROWS = 512
"""The most rows of MXFP4 in a tile that compiled code transposes."""

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

    row_shape, storage = segment.row_shape, STORAGE[dtype]
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
            targets.append(TargetRows(low // row_nbytes, rows, begins=not low % row_nbytes))
    make(segment, targets, dtype)
    for target, rows, skipped in incomplete:
        target[...] = rows.view(np.uint8).reshape(-1)[skipped : skipped + len(target)]


def materialize_rows(
    segment: Segment,
    targets: list[TargetRows],
    dtype: DType,
    reader: Reader,
    operand_rows: tuple[int, int] | None = None,
    tile_nbytes: int = TILE_NBYTES,
) -> None:
    """Make rows of a segment (see `MakeRows`) of what a reader reads.

    Args:
        segment: The segment.
        targets: The rows to make.
        dtype: The dtype to make them in.
        reader: Reads the operand.
        operand_rows: Of a transposition, the rows of the operand [begin, end) to make columns of;
            the targets then have these columns only. By default all rows.
        tile_nbytes: The most bytes in a tile that is neither transposed nor merged with adapters.

    Raises:
        OverflowError: If the dtype cannot represent a value.
    """
    if segment.encoding is not None:
        from .encode import encode_rows

        encode_rows(segment, targets, reader)
        return
    if segment.rearrangement.transposes:
        operand_rows = operand_rows or (0, segment.operand.shape[0])
        for operand, rows, place in row_parts(segment.operand, operand_rows):
            outs = [replace(target, out=target.out[..., place]) for target in targets]
            _transpose_rows(replace(segment, operand=operand), outs, dtype, reader, rows)
        return
    for target in targets:
        _rearrange_rows(segment, target, dtype, reader, tile_nbytes)


def _rearrange_rows(
    segment: Segment, target: TargetRows, dtype: DType, reader: Reader, tile_nbytes: int
) -> None:
    """Make rows of a segment of the operand's rows with the same numbers."""
    from ..tensors.cast import cast

    for begin, end in row_intervals(segment, target, dtype, tile_nbytes):
        out = target.out[begin - target.first : end - target.first]
        with load_rows(segment, (begin, end), dtype, reader, out) as (array, source_dtype):
            if array is not out:
                cast(array, source_dtype, out, dtype)


def _transpose_rows(
    segment: Segment,
    targets: list[TargetRows],
    dtype: DType,
    reader: Reader,
    operand_rows: tuple[int, int],
) -> None:
    """Make rows of a segment of the operand's columns with the same numbers."""
    from ..tensors import compiled
    from ..tensors.cast import cast

    first, top = targets[0].first, operand_rows[0]
    if isinstance(segment.operand, Mxfp4Operand) and compiled.is_enabled():
        for begin, end in intervals(*operand_rows, _PACKED_TILE_ROWS):
            outs = [(one.first, one.out[..., begin - top : end - top]) for one in targets]
            segment.operand.load_columns(reader, (begin, end), outs, dtype)
        return
    for (begin, end), transposed, source_dtype in transposed_tiles(
        segment, (first, targets[-1].end), operand_rows, dtype, reader
    ):
        for target in targets:
            rows = transposed[target.first - first : target.end - first]
            cast(rows, source_dtype, target.out[..., begin - top : end - top], dtype)
