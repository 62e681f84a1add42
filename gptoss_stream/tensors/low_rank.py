"""Products of two low-rank factors whose bits depend on the factors alone.

A sum of floats depends on the order of its terms, and a BLAS chooses that by the shapes and by the
processor. A merged tensor would then have other bits on another machine, or in other tiles, and
could not be verified. So the factors are rounded first, each column to a grid of its own, which is
so coarse that float64 holds every product and every sum exactly. With rank 32 or less a value keeps
24 bits below the largest of its column, as many as a float32 has, with rank 256 it keeps 22. So a
float32 holds the rounded values too.

This is the idea of error-free matrix products by K. Ozaki, T. Ogita, S. Oishi and S. M. Rump
(Numerical Algorithms 59, 2012), with one slice only.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from . import compiled
from .cast import is_finite_in_bfloat16, round_finite

__all__ = ["add_product", "add_product_to_bfloat16", "on_grid"]

_MANTISSA_BITS = 53  # of float64
_MOST_BITS = 24  # of float32, in which the rounded values are kept
_BLOCK_ELEMENTS = 3 << 16
"""Elements of a product that are computed at a time: 1.5 MB, which the processor's cache holds.
With fewer, threads wait for each other between the calls."""

_memory = threading.local()

_Array = np.ndarray[Any, Any]


def on_grid(factor: _Array) -> _Array:
    """Round a factor, each of its columns, so that products with another such factor are exact.

    Args:
        factor: A factor, [rank, columns] float64, finite.

    Returns:
        The rounded factor, [rank, columns] float32, C-contiguous; infinite where that is too small.
    """
    rank = len(factor)
    # The products of two values have twice the bits of one, and a sum of `rank` of them has
    # ceil(log2(rank)) more.
    bits = min(_MOST_BITS, (_MANTISSA_BITS - (rank - 1).bit_length()) // 2)
    exponents = np.frexp(np.abs(factor).max(axis=0, initial=0.0))[1]
    units = np.ldexp(1.0, exponents - bits)
    rounded = factor / units
    np.rint(rounded, out=rounded)
    rounded *= units
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(rounded, np.float32)


def add_product(
    values: _Array,
    left: _Array,
    right: _Array,
    through: Callable[[_Array], None] | None = None,
) -> None:
    """Add `left.T @ right` to values.

    Args:
        values: [rows, columns] float32, with rows or columns contiguous; changed in place.
        left: [rank, rows] float32, rounded by `on_grid`.
        right: [rank, columns] float32, rounded by `on_grid`.
        through: Rounds the product further, in place, before it is added.
    """
    if values.strides[0] < values.strides[1]:
        values, left, right = values.T, right, left
    with np.errstate(all="ignore"):  # values that are not finite are refused by the caller
        for rows, delta in _rounded_products(left, right):
            if through is not None:
                through(delta)
            values[rows] += delta


def add_product_to_bfloat16(bits: _Array, left: _Array, right: _Array, out: _Array) -> bool:
    """Add `left.T @ right` to bfloat16 values in float32, and round the sums to bfloat16.

    Args:
        bits: [rows, columns] uint16, the values' bits.
        left: [rank, rows] float32, rounded by `on_grid`.
        right: [rank, columns] float32, rounded by `on_grid`.
        out: Memory for the sums' bits, of the same shape, with rows or columns contiguous. It can
            be `bits` itself.

    Returns:
        Whether all sums are finite in bfloat16; if not, `out` has no meaning.
    """
    if out.strides[0] < out.strides[1]:
        bits, out, left, right = bits.T, out.T, right, left
    with np.errstate(all="ignore"):
        if compiled.is_enabled() and out.flags.aligned:
            from .compiled_merge import add_to_bfloat16

            products = _products(left, right)
            return all(add_to_bfloat16(bits[rows], exact, out[rows]) for rows, exact in products)
        wide = _reused("wide", (_block_rows(right), right.shape[1]), np.uint32)
        for rows, delta in _rounded_products(left, right):
            scratch = wide[: len(delta)]
            np.left_shift(bits[rows], 16, out=scratch, dtype=np.uint32)
            np.add(delta, scratch.view(np.float32), out=delta)
            if not is_finite_in_bfloat16(delta):
                return False
            round_finite(delta, out[rows], scratch)
    return True


def _rounded_products(left: _Array, right: _Array) -> Iterator[tuple[slice, _Array]]:
    """Yield the same as `_products`, rounded to float32."""
    rounded = _reused("rounded", (_block_rows(right), right.shape[1]), np.float32)
    for rows, exact in _products(left, right):
        delta = rounded[: len(exact)]
        np.copyto(delta, exact, casting="same_kind")
        yield rows, delta


def _products(left: _Array, right: _Array) -> Iterator[tuple[slice, _Array]]:
    """Yield some rows of `left.T @ right` at a time, float64, in memory that is used again."""
    num_rows, step = left.shape[1], _block_rows(right)
    exact = _reused("exact", (step, right.shape[1]), np.float64)
    by_row, right = np.ascontiguousarray(left.T, np.float64), right.astype(np.float64)
    for first in range(0, num_rows, step):
        rows = slice(first, min(first + step, num_rows))
        product = exact[: rows.stop - first]
        np.matmul(by_row[rows], right, out=product)
        yield rows, product


def _block_rows(right: _Array) -> int:
    """Return how many rows of a product are computed at a time."""
    return max(1, _BLOCK_ELEMENTS // int(right.shape[1]))


def _reused(name: str, shape: tuple[int, int], dtype: type[np.generic]) -> _Array:
    """Return this thread's memory of a name, which is reused: new pages cost as much as adding."""
    memory: _Array | None = getattr(_memory, name, None)
    if memory is None or memory.size < shape[0] * shape[1]:
        memory = np.empty(shape[0] * shape[1], dtype)
        setattr(_memory, name, memory)
    return memory[: shape[0] * shape[1]].reshape(shape)
