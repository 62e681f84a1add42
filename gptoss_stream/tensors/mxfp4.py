"""Decodes MXFP4 blocks and scales to floats, by one look-up for two values.

OCP Microscaling Formats (MX) v1.0, sections 5.1 to 5.3: 32 E2M1 values share an E8M0 scale. A
byte holds two values, the low nibble first; a scale byte s means 2^(s-127).

A table of 65,536 pairs, indexed by `scale << 8 | byte`, has both values of a byte in the output
dtype. This is 6 times as fast as a look-up for each nibble followed by `ldexp`, and there is no
arithmetic that could round or flush to zero. Example: byte 0x2B with scale 128 gives -3.0 (code
0xB, -1.5, times 2), then 2.0 (code 0x2, 1.0, times 2).
"""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import Any

import numpy as np

from . import compiled
from .cast import STORAGE, cast
from .dtypes import DType

__all__ = ["E2M1", "NAN_SCALE", "decode", "decode_columns", "largest_scale", "multiply"]

NAN_SCALE = 255
"""E8M0's NaN, which is refused. Released weights have none; transformers would read it as 2^128."""

# fmt: off
E2M1 = (+0.0, +0.5, +1.0, +1.5, +2.0, +3.0, +4.0, +6.0,
        -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The value of each 4-bit code. Bit 3 is the sign; code 8 is -0.0, which is kept."""
# fmt: on

_TILE_LOOKUPS = 1 << 17  # with fewer there are more calls, and each needs the GIL

_memory = threading.local()

# The unsigned integer for the bits of two values.
_PAIR = {DType.BF16: np.uint32, DType.F16: np.uint32, DType.F32: np.uint64}

# Bits of the mantissa, bias of the exponent, and the unsigned integer for the bits of a value.
_FLOAT = {
    DType.BF16: (7, 127, np.uint16),
    DType.F16: (10, 15, np.uint16),
    DType.F32: (23, 127, np.uint32),
}


def largest_scale(dtype: DType) -> int:
    """Return the largest scale byte with which every code is finite in the output dtype."""
    # 6 = 1.5 * 2^2 is the largest code: 2^(s-127+2) must be at most the dtype's largest exponent.
    return 140 if dtype is DType.F16 else 252


@lru_cache(maxsize=3)
def _pairs(dtype: DType) -> np.ndarray[Any, Any]:
    """Return [65536] pairs of values, each as one integer; the index is `scale << 8 | byte`."""
    codes = np.array(E2M1, np.float64)
    byte = np.arange(256)
    values = np.stack([codes[byte & 15], codes[byte >> 4]], axis=-1)  # [byte, 2]
    scales = np.ldexp(1.0, np.arange(256) - 127)  # [scale]; exact in float64, and so is:
    with np.errstate(over="ignore"):
        floats = (scales[:, None, None] * values).astype(np.float32)  # [scale, byte, 2]
    table = np.empty(floats.shape, STORAGE[dtype])
    cast(floats, DType.F32, table, dtype, overflow="infinity")
    return table.view(_PAIR[dtype]).reshape(65536)


def decode(
    blocks: np.ndarray[Any, Any],
    scales: np.ndarray[Any, Any],
    out: np.ndarray[Any, Any],
    dtype: DType,
) -> None:
    """Decode rows of MXFP4.

    Values that the dtype cannot hold become infinities: the caller checks the scales
    (`largest_scale`).

    Args:
        blocks: [rows, groups, 16] uint8.
        scales: [rows, groups] uint8.
        out: [rows, groups * 32] in the `STORAGE` of the dtype, C-contiguous.
        dtype: The dtype of `out`.
    """
    rows, groups, width = blocks.shape
    table = _pairs(dtype)
    pairs = out.view(table.dtype).reshape(rows, groups, width)
    if compiled.is_enabled():
        compiled.decode_pairs(blocks, scales, table, pairs)
        return
    tile_rows = max(1, _TILE_LOOKUPS // (groups * width))
    narrow, wide = _indices(min(rows, tile_rows) * groups * width)
    for first in range(0, rows, tile_rows):
        tile = slice(first, min(first + tile_rows, rows))
        shape = (tile.stop - first, groups, width)
        index = narrow[: shape[0] * groups * width].reshape(shape)
        np.bitwise_or(scales[tile, :, None].astype(np.uint16) << 8, blocks[tile], out=index)
        # numpy looks up by intp only, and would itself allocate such a copy for each tile.
        positions = wide[: index.size].reshape(shape)
        positions[...] = index
        # mode="clip" writes directly to `out`; every uint16 is a valid index anyway.
        np.take(table, positions, out=pairs[tile], mode="clip")


def decode_columns(
    blocks: np.ndarray[Any, Any],
    scales: np.ndarray[Any, Any],
    first: int,
    out: np.ndarray[Any, Any],
    dtype: DType,
) -> bool:
    """Decode columns of rows of MXFP4 as rows, if numba is enabled and the scales allow it.

    Args:
        blocks: [rows, groups, 16] uint8, of which the last axis is contiguous.
        scales: [rows, groups] uint8.
        first: The first column to decode.
        out: [columns, rows] in the `STORAGE` of the dtype.
        dtype: The dtype of `out`.

    Returns:
        Whether it was done. It is not if a value would be subnormal or infinite, or if the last
        axis of `out` is not contiguous.
    """
    bits, bias, storage = _FLOAT[dtype]
    # The least code but zero is 2^-1, whose exponent must be at least 1 - bias.
    smallest = 127 + 2 - bias
    if not compiled.is_enabled() or out.strides[-1] != out.itemsize:
        return False
    if scales.min() < smallest or scales.max() > largest_scale(dtype):
        return False
    compiled.decode_columns(blocks, scales, first, out.view(storage), bits, bias)
    return True


def multiply(
    blocks: np.ndarray[Any, Any],
    scales: np.ndarray[Any, Any],
    tokens: np.ndarray[Any, Any],
    out: np.ndarray[Any, Any],
) -> None:
    """Multiply tokens with rows of MXFP4, in float32; needs numba (see `compiled`).

    Args:
        blocks: [rows, groups, 16] uint8.
        scales: [rows, groups] uint8.
        tokens: [tokens, groups * 32] float32, C-contiguous.
        out: Memory for the products [tokens, rows], float32, with any strides.
    """
    compiled.multiply_packed(blocks, scales, _pairs(DType.F32), tokens, out)


def _indices(count: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return this thread's memory for indices, which is reused: new pages cost more than the
    look-ups."""
    if getattr(_memory, "count", 0) < count:
        _memory.narrow, _memory.wide = np.empty(count, np.uint16), np.empty(count, np.intp)
        _memory.count = count
    return _memory.narrow, _memory.wide
