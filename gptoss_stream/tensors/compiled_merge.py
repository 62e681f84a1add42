"""Adding to bfloat16 values by code that numba compiles (extra `fast`).

It gives the bits that numpy gives in `low_rank.add_product_to_bfloat16`. numpy passes over memory
nine times to add and to round, which takes longer than the product itself; this is one pass.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from .cast import ROUNDS_TO_INFINITY
from .compiled import compile_for, readable, without_axes

__all__ = ["add_to_bfloat16"]

_Array = np.ndarray[Any, Any]

_BLOCK = 1024
"""Values that are added at a time, in memory that the processor's first cache holds."""


def add_to_bfloat16(bits: _Array, added: _Array, out: _Array) -> bool:
    """Add to bfloat16 values in float32, and round the sums to bfloat16.

    Args:
        bits: [rows, columns] uint16, the values' bits, rows in ascending order in memory.
        added: [rows, columns] float64, C-contiguous; rounded to float32 before it is added.
        out: Memory for the sums' bits, of the same shape, aligned, of which the columns are
            contiguous. It can be `bits` itself.

    Returns:
        Whether all sums are finite in bfloat16; if not, `out` has no meaning.
    """
    if bits.strides[1] != bits.itemsize or not bits.flags.aligned:
        bits = bits.copy()
    (values, step), (sums, out_step) = (
        (without_axes(one), one.strides[0] // one.itemsize) for one in (bits, out)
    )
    return _compiled_add()(values, step, added, sums, out_step, ROUNDS_TO_INFINITY)


@lru_cache(maxsize=1)
def _compiled_add() -> Callable[..., bool]:
    """Return `_add`, compiled."""
    from numba import types

    return compile_for(
        _add,
        [
            readable(types.uint16, 1),
            types.int64,
            readable(types.float64, 2),
            types.uint16[::1],
            types.int64,
            types.float32,
        ],
        types.boolean,
    )


def _add(
    values: _Array,
    values_step: int,
    added: _Array,
    out: _Array,
    out_step: int,
    limit: np.float32,
) -> bool:
    """See `add_to_bfloat16`; row r begins at r * step, and a sum must be less than the limit.

    The sums are in memory of their own, so that several are made by one instruction although `out`
    may be what is read.
    """
    sums = np.empty(_BLOCK, np.float32)
    bits = sums.view(np.uint32)
    is_finite = True
    half, one, width = np.uint32(0x7FFF), np.uint32(1), np.uint32(16)
    for row in range(added.shape[0]):
        for begin in range(0, added.shape[1], _BLOCK):
            count = min(_BLOCK, added.shape[1] - begin)
            start = row * values_step + begin
            source = values[start : start + count]
            for i in range(count):
                bits[i] = np.uint32(source[i]) << width
            terms = added[row, begin : begin + count]
            are_finite = True
            for i in range(count):
                sums[i] += np.float32(terms[i])
                are_finite &= abs(sums[i]) < limit  # false for NaN
            is_finite &= are_finite
            start = row * out_step + begin
            target = out[start : start + count]
            for i in range(count):  # to nearest, ties to even, as `cast.round_finite` does
                odd = (bits[i] >> width) & one
                target[i] = np.uint16((bits[i] + half + odd) >> width)
    return is_finite
