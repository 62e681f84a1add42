"""Decoding MXFP4, and multiplying with it, by code that numba compiles (extra `fast`).

Decoding gives the same bits as `mxfp4.decode`, in a quarter of the processor's time, also where the
values are transposed. Multiplying packed rows with one token takes a third of the time of decoding
them and multiplying then: nothing but the packed rows goes through memory. numba takes half a
second to import and some 120 MB of memory, which a short conversion does not regain. So only long
ones, and models that run straight off a checkpoint, use it.

Functions are compiled when they are first called, once for each machine where numba finds a folder
for its cache. Any number of threads can run them at the same time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import numpy as np

__all__ = [
    "compile_for",
    "decode_columns",
    "decode_pairs",
    "enable",
    "enable_for",
    "is_available",
    "is_enabled",
    "is_worthwhile",
    "multiply_packed",
    "readable",
    "without_axes",
]

_Array = np.ndarray[Any, Any]

_is_enabled = False
_BLOCK_ROWS = 512
_WORTHWHILE_NBYTES = 8_000_000_000
"""Decoding as many bytes by numpy takes some 2 s of the processor's time longer, 4 s if they are
transposed or encoded; numba's import takes 0.5 s."""


def is_available() -> bool:
    """Return whether numba is installed."""
    return find_spec("numba") is not None


def enable() -> bool:
    """Let `mxfp4.decode` use compiled code from now on if numba is installed.

    Returns:
        Whether it is.
    """
    global _is_enabled
    _is_enabled = is_available()
    return _is_enabled


def enable_for(nbytes: int) -> bool:
    """Let MXFP4 be decoded and encoded by compiled code if it is worth its import.

    Args:
        nbytes: The bytes of floats that are decoded or encoded.

    Returns:
        Whether compiled code is used from now on.
    """
    return is_enabled() or (is_worthwhile(nbytes) and enable())


def is_worthwhile(nbytes: int) -> bool:
    """Return whether numba is installed, and so many bytes of floats are worth its import."""
    return nbytes >= _WORTHWHILE_NBYTES and is_available()


def is_enabled() -> bool:
    """Return whether `mxfp4.decode` uses compiled code."""
    return _is_enabled


def decode_pairs(blocks: _Array, scales: _Array, table: _Array, out: _Array) -> None:
    """Look up both values of each byte.

    Args:
        blocks: [rows, groups, 16] uint8.
        scales: [rows, groups] uint8.
        table: The pairs [65536], uint32 or uint64, by `scale << 8 | byte`.
        out: Memory for pairs [rows, groups, 16], C-contiguous.
    """
    _compiled_decode(table.itemsize)(blocks, scales, table, out)


def decode_columns(
    blocks: _Array, scales: _Array, first: int, out: _Array, mantissa_bits: int, bias: int
) -> None:
    """Decode columns as rows of floats. With every scale, all 16 codes must be normal numbers.

    Args:
        blocks: [rows, groups, 16] uint8, of which the last axis is contiguous.
        scales: [rows, groups] uint8.
        first: The first column to decode.
        out: Memory for the floats' bits [columns, rows], uint16 or uint32, of which the last axis
            is contiguous.
        mantissa_bits: Of the float's dtype.
        bias: Of the float's exponent.
    """
    words = blocks.view(np.uint64)
    if not words.flags.aligned:
        words = words.copy()
    step = out.strides[0] // out.itemsize
    compiled = _compiled_columns(out.itemsize)
    compiled(
        words, scales, first, first + len(out), without_axes(out), step, mantissa_bits, 127 - bias
    )


def multiply_packed(
    blocks: _Array, scales: _Array, table: _Array, tokens: _Array, out: _Array
) -> None:
    """Multiply tokens with rows of MXFP4, in float32.

    The weights are exact. The order of the terms in a sum depends on the processor. With 8
    tokens or more, decoding to bfloat16 and multiplying with torch's `linear` is faster.

    Args:
        blocks: [rows, groups, 16] uint8.
        scales: [rows, groups] uint8.
        table: The pairs of float32 [65536], uint64, by `scale << 8 | byte`.
        tokens: [tokens, groups * 32] float32, C-contiguous.
        out: Memory for the products [tokens, rows], float32, with any strides.
    """
    _compiled_multiply()(blocks, scales, table, tokens, out)


@lru_cache(maxsize=2)
def _compiled_decode(pair_nbytes: int) -> Callable[..., None]:
    """Return `_decode` for pairs of 4 or 8 bytes."""
    from numba import types

    pair = {4: types.uint32, 8: types.uint64}[pair_nbytes]
    return compile_for(_decode, [*_packed(), readable(pair, 1), pair[:, :, ::1]])


@lru_cache(maxsize=2)
def _compiled_columns(nbytes: int) -> Callable[..., None]:
    """Return `_decode_columns` for floats of 2 or 4 bytes."""
    from numba import types

    floats = {2: types.uint16, 4: types.uint32}[nbytes]
    words, scales = readable(types.uint64, 3, "A"), readable(types.uint8, 2, "A")
    numbers = [types.int64, types.int64]
    return compile_for(
        _decode_columns, [words, scales, *numbers, floats[::1], *numbers, types.int64]
    )


@lru_cache(maxsize=1)
def _compiled_multiply() -> Callable[..., None]:
    """Return `_multiply`, whose sums may be reordered; infinities and NaN keep their meaning."""
    from numba import types

    inputs = [*_packed(), readable(types.uint64, 1), readable(types.float32, 2)]
    return compile_for(
        _multiply, [*inputs, types.float32[:, :]], fastmath={"reassoc", "contract", "nsz"}
    )


def _packed() -> list[Any]:
    """Return numba's types for blocks and scales."""
    from numba import types

    return [readable(types.uint8, 3, "A"), readable(types.uint8, 2, "A")]


def readable(dtype: Any, ndim: int, layout: str = "C") -> Any:
    """Return numba's type for an array that is read: contiguous ("C") or of any strides ("A")."""
    from numba import types

    return types.Array(dtype, ndim, layout, readonly=True)


def without_axes(array: _Array) -> _Array:
    """Return all memory from the first element of an array to its last one, as one axis."""
    last = sum((n - 1) * stride for n, stride in zip(array.shape, array.strides, strict=True))
    return np.lib.stride_tricks.as_strided(array, (last // array.itemsize + 1,), (array.itemsize,))


def compile_for(
    function: Callable[..., Any], arguments: list[Any], result: Any = None, **options: Any
) -> Callable[..., Any]:
    """Compile a function, or load it from numba's cache.

    Args:
        function: The function.
        arguments: numba's types of its arguments.
        result: numba's type of its result; None if it returns nothing.
        options: Of `numba.njit`.
    """
    from numba import njit, void

    signature = (result or void)(*arguments)
    try:
        compiled = njit(signature, nogil=True, cache=True, **options)(function)
    except (RuntimeError, OSError):  # no folder that can be written to, or a full disk
        compiled = njit(signature, nogil=True, **options)(function)
    return compiled  # type: ignore[no-any-return]


def _decode(blocks: _Array, scales: _Array, table: _Array, out: _Array) -> None:
    """See `decode_pairs`."""
    for row in range(blocks.shape[0]):
        for group in range(blocks.shape[1]):
            scale = np.int64(scales[row, group]) << 8
            for i in range(16):
                out[row, group, i] = table[scale | blocks[row, group, i]]


def _decode_columns(
    words: _Array,
    scales: _Array,
    first: int,
    end: int,
    out: _Array,
    step: int,
    bits: int,
    zero: int,
) -> None:
    """See `decode_columns`; a word is 16 codes of a row, and row r of `out` begins at r * step.

    Column by column, in blocks of rows whose words fit in the processor's first cache, so that
    several rows are decoded by one instruction. A code of three bits without its sign, except 0 and
    0.5, has a float's exponent and the first bit of its mantissa: with s for the scale byte, code
    0b101 is 1.5 * 2^(2 - 1) * 2^(s - 127), or (0b101 << bits - 1) + (s - 1 - zero << bits).
    """
    sign = np.int32(8 * out.itemsize - 4)
    half, exponent = np.int32(bits - 1), np.int32(bits)
    block = np.empty(_BLOCK_ROWS, np.uint64)
    added = np.empty(_BLOCK_ROWS, np.int32)
    for begin in range(0, scales.shape[0], _BLOCK_ROWS):
        rows = min(_BLOCK_ROWS, scales.shape[0] - begin)
        for column in range(first, end):
            group, inside = column // 32, column % 32
            if column == first or inside == 0:
                for row in range(rows):
                    scale = np.int32(scales[begin + row, group])
                    added[row] = (scale - np.int32(1 + zero)) << exponent
            if column == first or inside % 16 == 0:
                for row in range(rows):
                    block[row] = words[begin + row, group, inside // 16]
            shift = np.uint64(inside % 16 * 4)
            start = (column - first) * step + begin
            target = out[start : start + rows]
            for row in range(rows):
                code = np.int32(block[row] >> shift)
                size = code & np.int32(7)
                value = (size << half) + added[row]
                value = value - (np.int32(1) << half) if size == 1 else value
                value = np.int32(0) if size == 0 else value
                target[row] = value | ((code & np.int32(8)) << sign)


def _multiply(blocks: _Array, scales: _Array, table: _Array, tokens: _Array, out: _Array) -> None:
    """See `multiply_packed`. A row is decoded to memory that the processor's first cache holds."""
    pairs = np.empty(tokens.shape[1] // 2, np.uint64)
    values = pairs.view(np.float32)
    for row in range(blocks.shape[0]):
        for group in range(blocks.shape[1]):
            scale = np.int64(scales[row, group]) << 8
            for i in range(16):
                pairs[group * 16 + i] = table[scale | blocks[row, group, i]]
        for token in range(tokens.shape[0]):
            total = np.float32(0)
            for i in range(tokens.shape[1]):
                total += values[i] * tokens[token, i]
            out[token, row] = total
