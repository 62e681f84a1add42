"""Casts floats from one dtype to another, rounding as torch does.

numpy has no bfloat16, so a bfloat16 array is one of its bits (uint16): the upper half of a float32.
bfloat16 is cast by integer arithmetic, which is exact and independent of any flush-to-zero mode of
the processor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from .dtypes import DType

__all__ = [
    "ROUNDS_TO_INFINITY",
    "STORAGE",
    "as_float32",
    "cast",
    "count_infinities",
    "is_finite_in_bfloat16",
    "round_finite",
]

STORAGE: dict[DType, type[np.generic]] = {
    DType.U8: np.uint8,
    DType.BF16: np.uint16,
    DType.F16: np.float16,
    DType.F32: np.float32,
}
"""The numpy dtype of arrays that hold each dtype; safetensors is little-endian."""

_Array = np.ndarray[Any, Any]

_ROUNDED_ELEMENTS = 1 << 16
"""Elements that are rounded at a time, so that the processor's cache holds what is in between."""
ROUNDS_TO_INFINITY = np.uint32(0x7F7F_8000).view(np.float32)
"""The least float32 that bfloat16 cannot hold."""

# The unsigned integer for the bits of each dtype, and the bits of infinity.
_INFINITY: dict[DType, tuple[type, int]] = {
    DType.BF16: (np.uint16, 0x7F80),
    DType.F16: (np.uint16, 0x7C00),
    DType.F32: (np.uint32, 0x7F80_0000),
}


def _widen(source: _Array, out: _Array) -> None:
    """Cast bfloat16 to float32."""
    bits = out.view(np.uint32)
    bits[...] = source
    np.left_shift(bits, 16, out=bits)


def _round(source: _Array, out: _Array) -> None:
    """Cast float32 to bfloat16."""
    if not source.flags.c_contiguous:
        # In the order of the source's memory, and what is turned are two bytes instead of four.
        order = np.argsort([-abs(stride) for stride in source.strides], kind="stable")
        turned = np.ascontiguousarray(source.transpose(order))
        as_rounded: _Array = np.empty(turned.shape, np.uint16)
        _round(turned, as_rounded)
        out.transpose(order)[...] = as_rounded
        return
    if not out.flags.c_contiguous:
        as_rounded = np.empty(source.shape, np.uint16)
        _round(source, as_rounded)
        out[...] = as_rounded
        return
    every, target = source.reshape(-1), out.reshape(-1)
    scratch = np.empty(min(len(every), _ROUNDED_ELEMENTS), np.uint32)
    for first in range(0, len(every), _ROUNDED_ELEMENTS):
        values = every[first : first + _ROUNDED_ELEMENTS]
        _round_block(values, target[first : first + len(values)], scratch[: len(values)])


def round_finite(values: _Array, out: _Array, scratch: _Array) -> None:
    """Cast a few float32 values to bfloat16, NaN to any value.

    Args:
        values: float32, C-contiguous, few enough for the processor's cache.
        out: The target, of the same shape, uint16.
        scratch: Memory of the same shape, uint32.
    """
    bits = values.view(np.uint32)
    # To nearest, ties to even: add one less than half a unit in the last place, and one more where
    # the last bit that stays is 1.
    np.right_shift(bits, 16, out=scratch)
    scratch &= 1
    scratch += bits
    scratch += np.uint32(0x7FFF)
    np.right_shift(scratch, 16, out=out, casting="unsafe")


def _round_block(values: _Array, out: _Array, scratch: _Array) -> None:
    """Cast a few float32 values to bfloat16, with memory for as many uint32."""
    round_finite(values, out, scratch)
    bits = values.view(np.uint32)
    if np.isnan(values.max(initial=0.0)):
        nan = (bits & 0x7FFF_FFFF) > 0x7F80_0000
        out[nan] = ((bits[nan] >> 16) | 0x40).astype(np.uint16)  # stays NaN, quiet


def _between_numpy_dtypes(source: _Array, out: _Array) -> None:
    """Cast float16 to float32 or back."""
    with np.errstate(over="ignore", invalid="ignore"):
        out[...] = source


def _bf16_to_f16(source: _Array, out: _Array) -> None:
    wide = np.empty(source.shape, np.float32)
    _widen(source, wide)
    _between_numpy_dtypes(wide, out)


def _f16_to_bf16(source: _Array, out: _Array) -> None:
    _round(source.astype(np.float32), out)


_CASTS: dict[tuple[DType, DType], Callable[[_Array, _Array], None]] = {
    (DType.BF16, DType.F32): _widen,
    (DType.BF16, DType.F16): _bf16_to_f16,
    (DType.F16, DType.BF16): _f16_to_bf16,
    (DType.F16, DType.F32): _between_numpy_dtypes,
    (DType.F32, DType.BF16): _round,
    (DType.F32, DType.F16): _between_numpy_dtypes,
}

_CAN_OVERFLOW = {
    (DType.BF16, DType.F16),
    (DType.F32, DType.F16),
    (DType.F32, DType.BF16),
}


def count_infinities(array: _Array, dtype: DType) -> int:
    """Count the infinite elements of an array in the dtype's `STORAGE`."""
    unsigned, infinity = _INFINITY[dtype]
    # Shifting the sign out leaves twice the magnitude.
    return int(np.count_nonzero(array.view(unsigned) << 1 == unsigned(2 * infinity)))


def _may_overflow(source: _Array, source_dtype: DType, dtype: DType) -> bool:
    """Return whether a value may be too large, as far as it is seen at once."""
    if (source_dtype, dtype) != (DType.F32, DType.BF16):
        return (source_dtype, dtype) in _CAN_OVERFLOW
    return not is_finite_in_bfloat16(source)


def is_finite_in_bfloat16(values: _Array) -> bool:
    """Return whether float32 values are finite, also once they are rounded to bfloat16."""
    if not values.size:
        return True
    return bool(values.min() > -ROUNDS_TO_INFINITY and values.max() < ROUNDS_TO_INFINITY)


def cast(
    source: _Array,
    source_dtype: DType,
    out: _Array,
    dtype: DType,
    overflow: Literal["error", "infinity"] = "error",
) -> None:
    """Copy an array to another dtype, rounding to nearest, ties to even.

    Values too small for the dtype become subnormal or zero, as in torch.

    Args:
        source: The array, in the `STORAGE` of its dtype.
        source_dtype: Its dtype.
        out: The target, of the same shape, in the `STORAGE` of its dtype.
        dtype: The dtype of the target.
        overflow: What happens to a finite value that is too large: an error, or infinity.

    Raises:
        OverflowError: If a finite value would become infinite.
    """
    if source_dtype is dtype:
        np.copyto(out, source)
        return
    _CASTS[source_dtype, dtype](source, out)
    if overflow == "error" and _may_overflow(source, source_dtype, dtype):
        infinities = count_infinities(out, dtype)
        if infinities and infinities > count_infinities(source, source_dtype):
            raise OverflowError(f"{infinities} values are too large for {dtype}")


def as_float32(array: _Array, dtype: DType) -> _Array:
    """Return floats as float32: the array itself if it is that.

    Args:
        array: The floats, in the `STORAGE` of their dtype.
        dtype: Their dtype.
    """
    if dtype is DType.F32:
        return array
    wide = np.empty(array.shape, np.float32)
    cast(array, dtype, wide, DType.F32)
    return wide
