"""Decoding MXFP4, and multiplying with it, by code that numba compiles (extra `fast`).

Decoding gives the same bits as `mxfp4.decode`, in a quarter of the processor's time. Multiplying
packed rows with one token takes a third of the time of decoding them and multiplying then: nothing
but the packed rows goes through memory. numba takes half a second to import and some 80 MB of
memory, which is more than a conversion gains. So only models that run straight off a checkpoint
use it.

Functions are compiled when they are first called, once for each machine where numba finds a folder
for its cache. Any number of threads can run them at the same time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import numpy as np

__all__ = ["decode_pairs", "enable", "is_available", "is_enabled", "multiply_packed"]

_Array = np.ndarray[Any, Any]

_is_enabled = False


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
    return _compile(_decode, [*_packed(), _readable(pair, 1), pair[:, :, ::1]])


@lru_cache(maxsize=1)
def _compiled_multiply() -> Callable[..., None]:
    """Return `_multiply`, whose sums may be reordered; infinities and NaN keep their meaning."""
    from numba import types

    inputs = [*_packed(), _readable(types.uint64, 1), _readable(types.float32, 2)]
    return _compile(
        _multiply, [*inputs, types.float32[:, :]], fastmath={"reassoc", "contract", "nsz"}
    )


def _packed() -> list[Any]:
    """Return numba's types for blocks and scales."""
    from numba import types

    return [_readable(types.uint8, 3, "A"), _readable(types.uint8, 2, "A")]


def _readable(dtype: Any, ndim: int, layout: str = "C") -> Any:
    """Return numba's type for an array that is read: contiguous ("C") or of any strides ("A")."""
    from numba import types

    return types.Array(dtype, ndim, layout, readonly=True)


def _compile(
    function: Callable[..., None], arguments: list[Any], **options: Any
) -> Callable[..., None]:
    """Compile a function for arguments of these types, or load it from numba's cache."""
    from numba import njit, void

    signature = void(*arguments)
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
