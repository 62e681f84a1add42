"""Output tensors as recipes: what each is made of, and making any run of its bytes.

An `OutputTensor` is one `Part` after another (usually one); a part is an operand rearranged by a
pattern. All of it is known, with shape and size, before any data is read. `fill` makes bytes
`begin … end` of a tensor, reading only what these need and holding only a tile at a time.
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
from .operands import Block
from .output_tensor import OutputTensor, Segment

if TYPE_CHECKING:
    import numpy as np

__all__ = ["MakeRows", "TargetRows", "materialize", "materialize_rows"]


TILE_NBYTES = 1 << 20
"""What is read, rearranged and given back at a time."""


READ_NBYTES = 4 << 20
"""The most that is read at a time of a matrix to transpose, whole rows of it."""


TRANSPOSE_ROWS = 192
"""Rows of a tile that is transposed: with fewer, calls cost more than the copying (32 rows took
twice as long), with many more the tile leaves the cache."""


@dataclass(frozen=True, slots=True)
class TargetRows:
    """Units `first … first + len(out)` of a part, wanted in `out` `[units, *unit_shape]`."""

    first: int
    out: np.ndarray[Any, Any]

    @property
    def last(self) -> int:
        """The unit after the last."""
        return self.first + len(self.out)


MakeRows = Callable[[Segment, "list[TargetRows]", DType], None]
"""Make pieces of a part, each following on the one before, in a dtype."""


def materialize_rows(
    segment: Segment,
    targets: list[TargetRows],
    dtype: DType,
    reader: Reader,
    rows: tuple[int, int] | None = None,
) -> None:
    """Make pieces of a part; see `Make`.

    Where units gather from every row of the operand, `rows` limits them to some of these.
    Raises `OverflowError` for values that the dtype cannot hold.
    """
    if segment.rearrangement.transposes:
        _transpose_rows(segment, targets, dtype, reader, rows or (0, segment.operand.shape[0]))
        return
    for target_rows in targets:
        _copy_rows(segment, target_rows, dtype, reader)


def _copy_rows(segment: Segment, target_rows: TargetRows, dtype: DType, reader: Reader) -> None:
    from einops import rearrange

    from ..tensors.cast import cast

    how = segment.rearrangement
    row_nbytes = prod(how.row_shape) * dtype.itemsize
    for begin, end in _tiles(target_rows.first, target_rows.last, TILE_NBYTES // row_nbytes):
        target = target_rows.out[begin - target_rows.first : end - target_rows.first]
        block = Block((begin, end), None, dtype, target if how.is_copy else None)
        with segment.operand.load(reader, block) as (array, source_dtype):
            if array is not block.into:
                tile = array if how.is_copy else rearrange(array, how.pattern)
                cast(tile, source_dtype, target, dtype)


def _transpose_rows(
    segment: Segment,
    targets: list[TargetRows],
    dtype: DType,
    reader: Reader,
    rows: tuple[int, int],
) -> None:
    from einops import rearrange

    from ..tensors.cast import cast

    how = segment.rearrangement
    first, last = targets[0].first, targets[-1].last
    top, bottom = rows
    row_nbytes = segment.operand.shape[1] * dtype.itemsize
    for begin, end in _tiles(top, bottom, min(TRANSPOSE_ROWS, READ_NBYTES // row_nbytes)):
        block = Block((begin, end), (first, last), dtype)
        with segment.operand.load(reader, block) as (array, source_dtype):
            tile = rearrange(array, how.pattern)
            for target_rows in targets:
                num_rows = tile[target_rows.first - first : target_rows.last - first]
                cast(num_rows, source_dtype, target_rows.out[..., begin - top : end - top], dtype)


def _tiles(first: int, last: int, size: int) -> list[tuple[int, int]]:
    return list(pairwise([*range(first, last, max(1, size)), last]))


def materialize(
    tensor: OutputTensor, begin: int, end: int, out: np.ndarray[Any, Any], make: MakeRows
) -> None:
    """Bytes `begin … end` of a tensor's data into `out`, uint8 of that length.

    Units that straddle an end are made whole and cut. Raises `TensorError`, naming the tensor,
    for values that the dtype cannot hold.
    """
    at = 0  # where the part begins in the tensor
    try:
        for segment in tensor.segments:
            size = segment.elements * tensor.dtype.itemsize
            low, high = max(begin, at), min(end, at + size)
            if low < high:
                _materialize_segment(
                    segment, low - at, high - at, out[low - begin : high - begin], tensor, make
                )
            at += size
    except OverflowError as error:
        raise TensorError(
            f"output tensor {tensor.name!r}: {error}; choose a dtype with a wider range"
        ) from None


def _materialize_segment(
    segment: Segment,
    begin: int,
    end: int,
    out: np.ndarray[Any, Any],
    tensor: OutputTensor,
    make: MakeRows,
) -> None:
    """Bytes `begin … end` of a part: a cut unit, whole units, a cut unit, where there are such."""
    import numpy as np

    from ..tensors.cast import STORAGE

    shape, storage = segment.rearrangement.row_shape, STORAGE[tensor.dtype]
    row_nbytes = prod(shape) * tensor.dtype.itemsize
    head = min(end, -(-begin // row_nbytes) * row_nbytes)
    tail = max(head, end // row_nbytes * row_nbytes)
    targets, cuts = [], []
    for low, high in ((begin, head), (head, tail), (tail, end)):
        if low < high:
            target, skipped = out[low - begin : high - begin], low % row_nbytes
            if skipped or high % row_nbytes:
                whole = np.empty((1, *shape), storage)
                cuts.append((target, whole, skipped))
            else:
                whole = target.view(storage).reshape(-1, *shape)
            targets.append(TargetRows(low // row_nbytes, whole))
    make(segment, targets, tensor.dtype)
    for target, whole, skipped in cuts:
        target[...] = whole.view(np.uint8).reshape(-1)[skipped : skipped + len(target)]
