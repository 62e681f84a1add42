"""Output tensors as recipes: what each is made of, and making any run of its bytes.

An `OutputTensor` is one `Part` after another (usually one); a part is an operand rearranged by a
pattern. All of it is known, with shape and size, before any data is read. `fill` makes bytes
`begin … end` of a tensor, reading only what these need and holding only a tile at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, Any

from .checkpoint import Extent
from .dtypes import DType, nbytes
from .errors import TensorError
from .operands import Block, Operand, Reader
from .patterns import Rearrangement

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Make", "OutputTensor", "Part", "Piece", "extents", "fill", "make_pieces"]

TILE_NBYTES = 1 << 20
"""What is read, rearranged and given back at a time."""
READ_NBYTES = 4 << 20
"""The most that is read at a time of a matrix to transpose, whole rows of it."""
TRANSPOSE_ROWS = 192
"""Rows of a tile that is transposed: with fewer, calls cost more than the copying (32 rows took
twice as long), with many more the tile leaves the cache."""


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """An operand and how it is rearranged."""

    operand: Operand
    rearrangement: Rearrangement

    @property
    def elements(self) -> int:
        """Elements of the output that the part makes."""
        return self.rearrangement.units * prod(self.rearrangement.unit_shape)


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor of the output: its parts lie one after another along its first axis."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return nbytes(self.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class Piece:
    """Units `first … first + len(out)` of a part, wanted in `out` `[units, *unit_shape]`."""

    first: int
    out: np.ndarray[Any, Any]

    @property
    def last(self) -> int:
        """The unit after the last."""
        return self.first + len(self.out)


Make = Callable[[Part, "list[Piece]", DType], None]
"""Make pieces of a part, each following on the one before, in a dtype."""


def make_pieces(
    part: Part,
    pieces: list[Piece],
    dtype: DType,
    reader: Reader,
    rows: tuple[int, int] | None = None,
) -> None:
    """Make pieces of a part; see `Make`.

    Where units gather from every row of the operand, `rows` limits them to some of these.
    Raises `OverflowError` for values that the dtype cannot hold.
    """
    if part.rearrangement.transposes:
        _make_from_columns(part, pieces, dtype, reader, rows or (0, part.operand.shape[0]))
        return
    for piece in pieces:
        _make_from_rows(part, piece, dtype, reader)


def _make_from_rows(part: Part, piece: Piece, dtype: DType, reader: Reader) -> None:
    from einops import rearrange

    from .cast import cast

    how = part.rearrangement
    unit_nbytes = prod(how.unit_shape) * dtype.itemsize
    for begin, end in _tiles(piece.first, piece.last, TILE_NBYTES // unit_nbytes):
        target = piece.out[begin - piece.first : end - piece.first]
        block = Block((begin, end), None, dtype, target if how.is_copy else None)
        with part.operand.load(reader, block) as (array, source_dtype):
            if array is not block.into:
                tile = array if how.is_copy else rearrange(array, how.pattern)
                cast(tile, source_dtype, target, dtype)


def _make_from_columns(
    part: Part,
    pieces: list[Piece],
    dtype: DType,
    reader: Reader,
    rows: tuple[int, int],
) -> None:
    from einops import rearrange

    from .cast import cast

    how = part.rearrangement
    first, last = pieces[0].first, pieces[-1].last
    top, bottom = rows
    row_nbytes = part.operand.shape[1] * dtype.itemsize
    for begin, end in _tiles(top, bottom, min(TRANSPOSE_ROWS, READ_NBYTES // row_nbytes)):
        block = Block((begin, end), (first, last), dtype)
        with part.operand.load(reader, block) as (array, source_dtype):
            tile = rearrange(array, how.pattern)
            for piece in pieces:
                units = tile[piece.first - first : piece.last - first]
                cast(units, source_dtype, piece.out[..., begin - top : end - top], dtype)


def _tiles(first: int, last: int, size: int) -> list[tuple[int, int]]:
    return list(pairwise([*range(first, last, max(1, size)), last]))


def fill(tensor: OutputTensor, begin: int, end: int, out: np.ndarray[Any, Any], make: Make) -> None:
    """Bytes `begin … end` of a tensor's data into `out`, uint8 of that length.

    Units that straddle an end are made whole and cut. Raises `TensorError`, naming the tensor,
    for values that the dtype cannot hold.
    """
    at = 0  # where the part begins in the tensor
    try:
        for part in tensor.parts:
            size = part.elements * tensor.dtype.itemsize
            low, high = max(begin, at), min(end, at + size)
            if low < high:
                _fill_part(part, low - at, high - at, out[low - begin : high - begin], tensor, make)
            at += size
    except OverflowError as error:
        raise TensorError(
            f"output tensor {tensor.name!r}: {error}; choose a dtype with a wider range"
        ) from None


def _fill_part(
    part: Part,
    begin: int,
    end: int,
    out: np.ndarray[Any, Any],
    tensor: OutputTensor,
    make: Make,
) -> None:
    """Bytes `begin … end` of a part: a cut unit, whole units, a cut unit, where there are such."""
    import numpy as np

    from .cast import STORAGE

    shape, storage = part.rearrangement.unit_shape, STORAGE[tensor.dtype]
    unit_nbytes = prod(shape) * tensor.dtype.itemsize
    head = min(end, -(-begin // unit_nbytes) * unit_nbytes)
    tail = max(head, end // unit_nbytes * unit_nbytes)
    pieces, cuts = [], []
    for low, high in ((begin, head), (head, tail), (tail, end)):
        if low < high:
            target, skipped = out[low - begin : high - begin], low % unit_nbytes
            if skipped or high % unit_nbytes:
                whole = np.empty((1, *shape), storage)
                cuts.append((target, whole, skipped))
            else:
                whole = target.view(storage).reshape(-1, *shape)
            pieces.append(Piece(low // unit_nbytes, whole))
    make(part, pieces, tensor.dtype)
    for target, whole, skipped in cuts:
        target[...] = whole.view(np.uint8).reshape(-1)[skipped : skipped + len(target)]


def extents(
    tensor: OutputTensor, begin: int, end: int, without: Container[Part] = ()
) -> Iterator[Extent]:
    """What making bytes `begin … end` of a tensor reads, but for the parts `without`."""
    at = 0
    for part in tensor.parts:
        size = part.elements * tensor.dtype.itemsize
        low, high = max(begin, at) - at, min(end, at + size) - at
        at += size
        if low < high and part not in without:
            how = part.rearrangement
            unit_nbytes = prod(how.unit_shape) * tensor.dtype.itemsize
            rows = low // unit_nbytes, -(-high // unit_nbytes)
            rows = (0, part.operand.shape[0]) if how.transposes else rows
            yield from part.operand.extents(rows)
