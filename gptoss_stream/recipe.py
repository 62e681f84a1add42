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

from .dtypes import DType, nbytes
from .errors import TensorError
from .operands import Operand, Reader, Zeros
from .patterns import Rearrangement

if TYPE_CHECKING:
    import numpy as np

__all__ = ["MakeUnits", "OutputTensor", "Part", "fill", "make_units", "prefetch"]

TILE_NBYTES = 1 << 20
"""What is read, rearranged and given back at a time."""
TRANSPOSE_ROWS = 32
"""Rows of a tile that is transposed: 64 bytes of each output row, a cache line."""


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """An operand and how it is rearranged."""

    operand: Operand
    rearrangement: Rearrangement

    @property
    def elements(self) -> int:
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


MakeUnits = Callable[[Part, int, int, "np.ndarray[Any, Any]", DType], None]
"""Make units `first … last` of a part into an array `[last - first, *unit_shape]` of a dtype."""


def make_units(
    part: Part,
    reader: Reader,
    first: int,
    last: int,
    out: np.ndarray[Any, Any],
    dtype: DType,
    rows: tuple[int, int] | None = None,
) -> None:
    """Units `first … last` of a part into `out` `[last - first, *unit_shape]`, of `dtype`.

    Where units gather from every row of the operand, `rows` limits them to some of these.
    Raises `OverflowError` for values that the dtype cannot hold.
    """
    from einops import rearrange

    from .cast import cast

    operand, how = part.operand, part.rearrangement
    if isinstance(operand, Zeros):
        out[...] = 0
    elif how.axis == 0:
        unit_nbytes = prod(how.unit_shape) * dtype.itemsize
        for begin, end in _tiles(first, last, TILE_NBYTES // unit_nbytes):
            with operand.load(reader, (begin * how.span, end * how.span), None, dtype) as loaded:
                array, source_dtype = loaded
                tile = rearrange(array, how.pattern, **how.tile_sizes)
                target = out[begin - first : end - first].reshape(tile.shape)
                cast(tile, source_dtype, target, dtype)
    else:
        columns = first * how.span, last * how.span
        top, bottom = rows or (0, operand.shape[0])
        for begin, end in _tiles(top, bottom, TRANSPOSE_ROWS):
            with operand.load(reader, (begin, end), columns, dtype) as (array, source_dtype):
                tile = rearrange(array, how.pattern, **how.tile_sizes)
                cast(tile, source_dtype, out[..., begin - top : end - top], dtype)


def _tiles(first: int, last: int, size: int) -> list[tuple[int, int]]:
    return list(pairwise([*range(first, last, max(1, size)), last]))


def fill(
    tensor: OutputTensor,
    begin: int,
    end: int,
    out: np.ndarray[Any, Any],
    make: MakeUnits,
) -> None:
    """Bytes `begin … end` of a tensor's data into `out`, uint8 of that length.

    Units that straddle an end are made whole and cut. Raises `TensorError`, naming the tensor,
    for values that the dtype cannot hold.
    """
    import numpy as np

    from .cast import STORAGE

    dtype = tensor.dtype
    at = 0  # where the part begins in the tensor
    try:
        for part in tensor.parts:
            size = part.elements * dtype.itemsize
            low, high = max(begin, at), min(end, at + size)
            if low < high:
                unit_nbytes = prod(part.rearrangement.unit_shape) * dtype.itemsize
                shape = part.rearrangement.unit_shape
                for first, last, skip, length in _runs(low - at, high - at, unit_nbytes):
                    target = out[low - begin : low - begin + length]
                    low += length
                    if length == (last - first) * unit_nbytes:
                        units = target.view(STORAGE[dtype]).reshape(last - first, *shape)
                        make(part, first, last, units, dtype)
                    else:
                        unit = np.empty((1, *shape), STORAGE[dtype])
                        make(part, first, last, unit, dtype)
                        target[...] = unit.view(np.uint8).reshape(-1)[skip : skip + length]
            at += size
    except OverflowError as error:
        raise TensorError(
            f"output tensor {tensor.name!r}: {error}; choose a dtype with a wider range"
        ) from None


def _runs(begin: int, end: int, unit_nbytes: int) -> list[tuple[int, int, int, int]]:
    """Bytes `begin … end` as runs (first unit, last unit, bytes skipped, length): a cut unit,
    whole units, a cut unit, where there are such."""
    head = min(end, -(-begin // unit_nbytes) * unit_nbytes)
    tail = max(head, end // unit_nbytes * unit_nbytes)
    return [
        (low // unit_nbytes, -(-high // unit_nbytes), low % unit_nbytes, high - low)
        for low, high in ((begin, head), (head, tail), (tail, end))
        if low < high
    ]


def prefetch(tensor: OutputTensor, begin: int, end: int, reader: Reader) -> None:
    """Have what bytes `begin … end` of a tensor are made of read ahead."""
    dtype = tensor.dtype
    at = 0
    for part in tensor.parts:
        size = part.elements * dtype.itemsize
        low, high = max(begin, at) - at, min(end, at + size) - at
        at += size
        if low < high and not isinstance(part.operand, Zeros):
            how = part.rearrangement
            unit_nbytes = prod(how.unit_shape) * dtype.itemsize
            rows = low // unit_nbytes * how.span, -(-high // unit_nbytes) * how.span
            part.operand.prefetch(reader, rows if how.axis == 0 else (0, part.operand.shape[0]))
