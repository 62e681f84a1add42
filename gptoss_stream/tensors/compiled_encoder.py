"""Encoding to MXFP4 by code that numba compiles (extra `fast`; see `compiled`).

Gives the same bytes as the arithmetic by numpy in `mxfp4_encoder`, in half of the processor's time
or less. Blocks are handled side by side: value by value, in as many rows as the processor's first
cache holds, so that one instruction encodes many values.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from .compiled import compile_for, readable, without_axes

__all__ = ["Distances", "copy_transposed", "encode_planes", "find_scales", "sum_squares"]

_Array = np.ndarray[Any, Any]

_ROWS = 480
_MAGNITUDE = 0x7FFF


class Distances(NamedTuple):
    """What decides about the codes of values (see `mxfp4_encoder`)."""

    midpoints: _Array
    """The distances that a value must exceed for codes 1 to 7, and to be clipped, [8] int16."""
    zeros: _Array
    """The largest magnitude that gets the code of -0, by scale byte, [256] int16."""


def find_scales(values: _Array, carry: int, limits: tuple[int, int], scales: _Array) -> bool:
    """Find the scales of blocks of bfloat16, if all their largest magnitudes are within limits.

    Args:
        values: The bits of the values, [groups, 32, rows] uint16, of which the last axis is
            contiguous.
        carry: See `mxfp4_rules.Rule`.
        limits: The smallest and the largest bits of a block's largest magnitude.
        scales: Memory for the scales, [rows, groups] uint8.

    Returns:
        Whether they are; if not, nothing useful is written.
    """
    return bool(_compiled_scales()(*_planes(values), carry, *limits, scales))


def encode_planes(
    values: _Array, scales: _Array, distances: Distances, blocks: _Array
) -> tuple[int, int]:
    """Encode blocks of bfloat16 with scales of 3 to 252.

    Args:
        values: The bits of the values, as for `find_scales`.
        scales: The scales, [rows, groups] uint8.
        distances: What follows from the rule.
        blocks: Memory for the blocks, [rows, groups, 16] uint8, of which the last axis is
            contiguous.

    Returns:
        How many values that are not zero became zero, and how many exceeded the largest code.
    """
    counts = np.zeros(2, np.int64)
    _compiled_encode()(*_planes(values), scales, *distances, blocks.view(np.uint64), counts)
    return int(counts[0]), int(counts[1])


def sum_squares(
    values: _Array, blocks: _Array, scales: _Array, sizes: _Array, runs: tuple[int, int, int]
) -> tuple[float, float]:
    """Sum the squares of the errors of encoded values, and of the values.

    Args:
        values: The bits of the values, [groups, 32, rows] uint16.
        blocks: Their blocks, [rows, groups, 16] uint8.
        scales: Their scales, [rows, groups] uint8.
        sizes: The magnitudes of codes, [8] float64.
        runs: The rows that are summed: the first one of the first run, which may be negative, how
            many a run has, and how many there are from the begin of one run to that of the next.

    Returns:
        The sum of the squared errors, and that of the squared values.
    """
    sums = np.zeros(2)
    _compiled_squares()(values, blocks, scales, sizes, *runs, sums)
    return float(sums[0]), float(sums[1])


def copy_transposed(source: _Array, out: _Array) -> bool:
    """Copy a matrix of 16 bits an element to its transpose, where the memory allows it.

    Args:
        source: [rows, columns] uint16.
        out: [columns, rows] uint16.

    Returns:
        Whether it is copied: elements must be contiguous along the last axes, and four of a row
        aligned as one integer of 64 bits.
    """
    if source.strides[1] != 2 or out.strides[1] != 2 or source.shape[1] % 4:
        return False
    words = source.view(np.uint64)
    if not words.flags.aligned:
        return False
    _compiled_transpose()(words, without_axes(out), out.strides[0] // 2)
    return True


def _planes(values: _Array) -> tuple[_Array, int, int]:
    """Return values [groups, 32, rows] as int16 without axes, and how far apart groups and planes
    begin there."""
    group_step, step = (stride // values.itemsize for stride in values.strides[:2])
    return without_axes(values.view(np.int16)), group_step, step


@lru_cache(maxsize=1)
def _compiled_scales() -> Callable[..., Any]:
    """Return `_find_scales`."""
    from numba import types

    number, bits = types.int64, readable(types.int16, 1)
    arguments = [bits, *[number] * 5, types.uint8[:, :]]
    return compile_for(_find_scales, arguments, types.boolean)


@lru_cache(maxsize=1)
def _compiled_encode() -> Callable[..., Any]:
    """Return `_encode_planes`."""
    from numba import types

    number, bits = types.int64, readable(types.int16, 1)
    words = types.Array(types.uint64, 3, "A", aligned=False)
    inputs = [bits, number, number, readable(types.uint8, 2, "A"), bits, bits]
    return compile_for(_encode_planes, [*inputs, words, types.int64[::1]])


@lru_cache(maxsize=1)
def _compiled_squares() -> Callable[..., Any]:
    """Return `_sum_squares`."""
    from numba import types

    arrays = [
        readable(types.uint16, 3, "A"), readable(types.uint8, 3, "A"),
        readable(types.uint8, 2, "A"), readable(types.float64, 1),
    ]  # fmt: skip
    return compile_for(_sum_squares, [*arrays, *[types.int64] * 3, types.float64[::1]])


@lru_cache(maxsize=1)
def _compiled_transpose() -> Callable[..., Any]:
    """Return `_copy_transposed`."""
    from numba import types

    arguments = [readable(types.uint64, 2, "A"), types.uint16[::1], types.int64]
    return compile_for(_copy_transposed, arguments)


def _find_scales(
    bits: _Array,
    group_step: int,
    step: int,
    carry: int,
    smallest: int,
    largest: int,
    scales: _Array,
) -> bool:
    """See `find_scales`; value i of a block is `bits[group * group_step + i * step + row]`."""
    maxima = np.empty(_ROWS, np.int16)
    for begin in range(0, scales.shape[0], _ROWS):
        rows = min(_ROWS, scales.shape[0] - begin)
        for group in range(scales.shape[1]):
            maxima[:rows] = 0
            for i in range(32):
                start = group * group_step + i * step + begin
                some = bits[start : start + rows]
                for row in range(rows):
                    size = some[row] & np.int16(_MAGNITUDE)
                    maxima[row] = size if size > maxima[row] else maxima[row]
            low, high = np.int16(_MAGNITUDE), np.int16(0)
            for row in range(rows):
                low, high = min(low, maxima[row]), max(high, maxima[row])
            if low < smallest or high > largest:
                return False
            for row in range(rows):
                scales[begin + row, group] = (maxima[row] + carry >> 7) - 2
    return True


def _encode_planes(
    bits: _Array,
    group_step: int,
    step: int,
    scales: _Array,
    midpoints: _Array,
    zeros: _Array,
    words: _Array,
    counts: _Array,
) -> None:
    """See `encode_planes`, and `_find_scales` for the values.

    Conversions to int16 and uint8 keep the arithmetic narrow: one instruction then makes up to
    eight times as many values as with numba's own integers of 64 bits.
    """
    m1, m2, m3, m4 = midpoints[0], midpoints[1], midpoints[2], midpoints[3]
    m5, m6, m7, m8 = midpoints[4], midpoints[5], midpoints[6], midpoints[7]
    quarters = np.empty(_ROWS, np.int16)
    smallest = np.empty(_ROWS, np.int16)
    flushed = np.empty(_ROWS, np.int16)
    clipped = np.empty(_ROWS, np.int16)
    pairs = np.empty((16, _ROWS), np.uint8)
    word = np.empty(_ROWS, np.uint64)
    for begin in range(0, scales.shape[0], _ROWS):
        rows = min(_ROWS, scales.shape[0] - begin)
        for group in range(scales.shape[1]):
            for row in range(rows):
                scale = scales[begin + row, group]
                quarters[row] = (np.int64(scale) - 2) << 7
                smallest[row] = zeros[scale]
            flushed[:rows], clipped[:rows], pairs[:, :rows] = 0, 0, 0
            for i in range(32):
                start = group * group_step + i * step + begin
                some, target, nibble = bits[start : start + rows], pairs[i >> 1], i % 2 * 4
                for row in range(rows):
                    value = some[row]
                    size = np.int16(value & np.int16(_MAGNITUDE))
                    x = np.int16(size - quarters[row])
                    code = np.uint8(x > m1) + np.uint8(x > m2) + np.uint8(x > m3) + np.uint8(x > m4)
                    code += np.uint8(x > m5) + np.uint8(x > m6) + np.uint8(x > m7)
                    sign = np.uint8(value < 0) | np.uint8(size <= smallest[row])
                    target[row] |= (code | (sign << 3)) << nibble
                    flushed[row] += np.int16((size > 0) & (x <= m1))
                    clipped[row] += np.int16(x > m8)
            for half in range(2):
                word[:rows] = 0
                for i in range(8):
                    eight, shift = pairs[8 * half + i], np.uint64(8 * i)
                    for row in range(rows):
                        word[row] |= np.uint64(eight[row]) << shift
                for row in range(rows):
                    words[begin + row, group, half] = word[row]
            for row in range(rows):
                counts[0] += flushed[row]
                counts[1] += clipped[row]


def _sum_squares(
    values: _Array,
    blocks: _Array,
    scales: _Array,
    sizes: _Array,
    first: int,
    length: int,
    step: int,
    sums: _Array,
) -> None:
    """See `sum_squares`."""
    bits = np.zeros(32, np.uint32)
    exact = bits.view(np.float32)
    error, norm = 0.0, 0.0
    for begin in range(first, scales.shape[0], step):
        for row in range(max(begin, 0), min(begin + length, scales.shape[0])):
            for group in range(scales.shape[1]):
                for i in range(32):
                    bits[i] = np.uint32(values[group, i, row] & _MAGNITUDE) << np.uint32(16)
                scale = 2.0 ** (np.int64(scales[row, group]) - 127)
                for i in range(32):
                    code = blocks[row, group, i >> 1] >> (i % 2 * 4) & 7
                    size = np.float64(exact[i])
                    error += (size - sizes[code] * scale) ** 2
                    norm += size * size
    sums[0], sums[1] = error, norm


def _copy_transposed(words: _Array, out: _Array, step: int) -> None:
    """See `copy_transposed`; a word has four elements, and a row of `out` begins at each `step`."""
    word = np.empty(_ROWS, np.uint64)
    for begin in range(0, words.shape[0], _ROWS):
        rows = min(_ROWS, words.shape[0] - begin)
        for column in range(words.shape[1]):
            for row in range(rows):
                word[row] = words[begin + row, column]
            for i in range(4):
                start = (4 * column + i) * step + begin
                target, shift = out[start : start + rows], np.uint64(16 * i)
                for row in range(rows):
                    target[row] = word[row] >> shift
